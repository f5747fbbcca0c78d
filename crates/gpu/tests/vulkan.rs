//! Part of the conformance suite on the Vulkan device of this machine, software or not. Without one a line `SKIPPED` is printed.
#![cfg(feature = "vulkan")]

use std::io::Write;

use marlin_conformance::{Family, VerifyOptions, verify};

/// The families whose kernels software Vulkan compiles and runs in seconds; `marlin verify --device vulkan` runs all.
const FAMILIES: [Family; 5] = [Family::Device, Family::Norm, Family::Rope, Family::Hadamard, Family::Convert];

#[test]
fn operations_equal_the_oracle() {
    let gpu = match marlin_gpu::vulkan(None) {
        Ok(gpu) => gpu.with_exact(true),
        Err(error) => {
            // Past the capture of the test harness, which hides what passing tests print.
            let line = format!("SKIPPED: conformance on Vulkan, because {error}\n");
            return std::io::stderr().write_all(line.as_bytes()).unwrap();
        }
    };
    let options = VerifyOptions { families: Some(FAMILIES.to_vec()), ..VerifyOptions::default() };
    let report = verify(&gpu, &options);
    let failures: Vec<_> = report.failures().collect();
    println!("vulkan: {} passed, {} failed", report.passed, report.failed);
    assert!(failures.is_empty(), "{} failures: {failures:#?}", failures.len());
    assert!(report.passed > 1000);
}

#[test]
fn an_absent_device_is_an_error_that_says_what_there_is() {
    let error = marlin_gpu::vulkan(Some(99)).err().unwrap().to_string();
    assert!(error.contains("Vulkan device 99") && error.contains("there "), "{error}");
}

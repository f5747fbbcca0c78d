//! The conformance suite on the Vulkan device of this machine, software or not. Without one a line `SKIPPED` is printed.
#![cfg(feature = "vulkan")]

use std::io::Write;

use marlin_conformance::{Family, VerifyOptions, verify};

/// The families that GPUs have so far.
const FAMILIES: [Family; 7] = [
    Family::Device,
    Family::Norm,
    Family::Rope,
    Family::Attention,
    Family::Hadamard,
    Family::Sampling,
    Family::Convert,
];

#[test]
fn every_operation_equals_the_oracle() {
    let gpu = match marlin_gpu::vulkan(None) {
        Ok(gpu) => gpu,
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

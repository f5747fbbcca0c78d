//! `cargo run --release -p marlin-gpu --features vulkan --example verify [FAMILY ...]`: the conformance suite on one
//! device, failures in full.

use marlin_conformance::{Family, VerifyOptions, verify};

fn main() {
    let families: Vec<Family> = std::env::args().skip(1).map(|name| name.parse().expect("a family")).collect();
    let families = (!families.is_empty()).then_some(families);
    let options = VerifyOptions { families, ..VerifyOptions::default() };
    #[cfg(feature = "cuda")]
    let report = verify(&marlin_gpu::cuda(None).expect("a CUDA device"), &options);
    #[cfg(all(feature = "vulkan", not(feature = "cuda")))]
    let report = verify(&marlin_gpu::vulkan(None).expect("a Vulkan device"), &options);
    for failure in report.failures() {
        println!("{failure:?}");
    }
    println!("{}: {} passed, {} failed", report.device, report.passed, report.failed);
}

//! `cargo run --release -p marlin-gpu --features vulkan --example verify [FAMILY ...] [--containing TEXT] [--exact]`: the
//! conformance suite on one device, or its cases whose configuration contains a text; failures in full.

#[cfg(any(feature = "vulkan", feature = "cuda", target_os = "macos"))]
fn main() {
    use marlin_conformance::{Family, Mode, VerifyOptions, verify};
    let mut families: Vec<Family> = Vec::new();
    let (mut containing, mut exact) = (String::new(), false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--containing" => containing = arguments.next().expect("--containing TEXT"),
            "--exact" => exact = true,
            name => families.push(name.parse().expect("a family")),
        }
    }
    let families = (!families.is_empty()).then_some(families);
    #[cfg(feature = "cuda")]
    let gpu = marlin_gpu::cuda(None).expect("a CUDA device").with_exact(exact);
    #[cfg(all(feature = "vulkan", not(feature = "cuda")))]
    let gpu = marlin_gpu::vulkan(None).expect("a Vulkan device").with_exact(exact);
    #[cfg(all(target_os = "macos", not(feature = "cuda")))]
    let gpu = marlin_gpu::metal(None).expect("a Metal device").with_exact(exact);
    let mode = if exact || !gpu.has_modes() { Mode::Exact } else { Mode::F16Activations };
    let report = verify(&gpu, &VerifyOptions { families, containing, mode, ..VerifyOptions::default() });
    for failure in report.failures() {
        println!("{failure:?}");
    }
    println!("{}: {} passed, {} failed", report.device, report.passed, report.failed);
}

#[cfg(not(any(feature = "vulkan", feature = "cuda", target_os = "macos")))]
fn main() {
    panic!("this build has no device: give it the feature `vulkan` or `cuda`");
}

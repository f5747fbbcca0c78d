//! `marlin verify`: every operation of a device against the f64 oracle.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use clap::Args;
use marlin_conformance::{CaseResult, Family, Report, VerifyOptions};
use serde_json::json;

use crate::args::{DeviceArgs, DeviceKind, threads};
use crate::device::{self, Opened};

/// Arguments of `marlin verify`.
#[derive(Args)]
pub struct VerifyArgs {
    /// Device to verify
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceKind,
    /// Number of the device among those of its kind
    #[arg(long, value_name = "N")]
    device_index: Option<usize>,
    /// Only this family (device, linear, norm, rope, attention, moe, hadamard, sampling, convert)
    #[arg(long, value_name = "F")]
    family: Option<Family>,
    /// Only operations whose name contains this
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
    /// Print one JSON object with every result
    #[arg(long)]
    json: bool,
}

/// Verifies the exact and the default mode, where they differ; any failure makes the exit status 1.
pub fn run(args: VerifyArgs) -> Result<()> {
    let mut results = Vec::new();
    let mut device = String::new();
    for exact in [true, false] {
        let options = VerifyOptions { families: args.family.map(|family| vec![family]), ..VerifyOptions::default() };
        let device_args =
            DeviceArgs { device: args.device, device_index: args.device_index, exact, threads: args.threads };
        let report = match device::open(&device_args)? {
            Opened::Cpu(cpu) => {
                marlin_conformance::verify(&*cpu, &VerifyOptions { int8_activations: !exact, ..options })
            }
            // GPUs have one mode.
            _ if !exact => break,
            #[cfg(all(feature = "gpu", target_os = "macos"))]
            Opened::Metal(gpu) => marlin_conformance::verify(&*gpu, &options),
            #[cfg(feature = "cuda")]
            Opened::Cuda(gpu) => marlin_conformance::verify(&*gpu, &options),
            #[cfg(all(feature = "gpu", not(target_os = "macos")))]
            Opened::Vulkan(gpu) => marlin_conformance::verify(&*gpu, &options),
        };
        let mode = if exact { "exact" } else { "default" };
        results.extend(
            report
                .results
                .into_iter()
                .map(|result| CaseResult { configuration: format!("{mode} mode, {}", result.configuration), ..result }),
        );
        device = report.device;
    }
    if let Some(name) = &args.kernel {
        results.retain(|result| result.operation.contains(name.as_str()));
        if results.is_empty() {
            bail!("no operation is called `{name}`");
        }
    }
    let report = Report::new(&device, results);
    if args.json {
        print_line!("{}", json!(report));
    } else {
        print_summary(&report)?;
    }
    if report.failed > 0 {
        bail!("{} of {} checks failed", report.failed, report.results.len());
    }
    Ok(())
}

/// One line per operation, then every failure.
fn print_summary(report: &Report) -> Result<()> {
    let mut operations: BTreeMap<(&str, &str), (usize, usize, f64)> = BTreeMap::new();
    for result in &report.results {
        let entry = operations.entry((result.family, result.operation)).or_default();
        entry.0 += usize::from(result.passed);
        entry.1 += 1;
        if result.tolerance > 0.0 {
            entry.2 = entry.2.max(result.max_error / result.tolerance);
        }
    }
    print_line!("{:<12} {:<28} {:>13}  largest error / tolerance", "family", "operation", "passed");
    for ((family, operation), (passed, total, share)) in operations {
        print_line!("{family:<12} {operation:<28} {passed:>6}/{total:<6}  {share:.3}");
    }
    for result in report.failures() {
        print_line!(
            "FAILED {} {} [{}]: error {:e}, tolerance {:e} {}",
            result.family,
            result.operation,
            result.configuration,
            result.max_error,
            result.tolerance,
            result.error.as_deref().unwrap_or(""),
        );
    }
    print_line!("{}: {} passed, {} failed", report.device, report.passed, report.failed);
    Ok(())
}

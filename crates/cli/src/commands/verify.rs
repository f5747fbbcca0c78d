//! `marlin verify`: the kernel audit, or every operation of a device, against the f64 oracle.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use clap::Args;
#[cfg(feature = "gpu")]
use marlin_conformance::audit::GpuVariants;
use marlin_conformance::audit::{Audit, AuditReport, Kernel, PlainOnly, RowResult, Status, Variants, kernels};
use marlin_conformance::{CaseResult, Family, Mode, Report, VerifyOptions};
use marlin_ops::Backend;
use serde_json::json;

use crate::args::{DeviceArgs, DeviceKind, threads};
use crate::device::{self, Opened, with_device};

/// Arguments of `marlin verify`.
#[derive(Args)]
pub struct VerifyArgs {
    /// Device to verify
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceKind,
    /// Number of the device among those of its kind
    #[arg(long, value_name = "N")]
    device_index: Option<usize>,
    /// Only the kernel that is called so, or else those whose name contains this; with --suite operations
    #[arg(long, value_name = "NAME")]
    kernel: Option<String>,
    /// Every operation in many more shapes instead of the kernel collection
    #[arg(long)]
    suite: bool,
    /// As --suite, only this family (device, linear, norm, rope, attention, moe, hadamard, sampling, convert)
    #[arg(long, value_name = "F")]
    family: Option<Family>,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = threads)]
    threads: Option<usize>,
    /// Print one JSON object with every result
    #[arg(long)]
    json: bool,
}

/// Any failure makes the exit status 1.
pub fn run(args: VerifyArgs) -> Result<()> {
    if args.suite || args.family.is_some() { suite(&args) } else { audit(&args) }
}

fn open(args: &VerifyArgs, exact: bool) -> Result<Opened> {
    let VerifyArgs { device, device_index, threads, .. } = *args;
    device::open(&DeviceArgs { device, device_index, exact, threads })
}

/// Audits the kernels of the collection, in the exact mode of the device.
fn audit(args: &VerifyArgs) -> Result<()> {
    let rows = selected(args.kernel.as_deref())?;
    match open(args, true)? {
        Opened::Cpu(cpu) => audit_rows(&*cpu, &PlainOnly, &rows, args.json),
        #[cfg(all(feature = "gpu", target_os = "macos"))]
        Opened::Metal(gpu) => audit_rows(&*gpu, &GpuVariants, &rows, args.json),
        #[cfg(feature = "cuda")]
        Opened::Cuda(gpu) => audit_rows(&*gpu, &GpuVariants, &rows, args.json),
        #[cfg(all(feature = "gpu", not(target_os = "macos")))]
        Opened::Vulkan(gpu) => audit_rows(&*gpu, &GpuVariants, &rows, args.json),
    }
}

/// All kernels, the one called `name`, or those whose name contains it.
fn selected(name: Option<&str>) -> Result<Vec<&'static Kernel>> {
    let Some(name) = name else { return Ok(kernels().iter().collect()) };
    if let Some(kernel) = kernels().iter().find(|kernel| kernel.name == name) {
        return Ok(vec![kernel]);
    }
    let rows: Vec<&Kernel> = kernels().iter().filter(|kernel| kernel.name.contains(name)).collect();
    if rows.is_empty() {
        bail!("no kernel is called `{name}`, `marlin kernels` lists them");
    }
    Ok(rows)
}

/// Prints a line for each kernel when it has run, then every failure and the counts.
fn audit_rows<B: Backend, V: Variants<B>>(backend: &B, variants: &V, rows: &[&Kernel], json: bool) -> Result<()> {
    let device = backend.name();
    let name_width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    let operation_width = rows.iter().map(|row| row.operation.len()).max().unwrap_or(0);
    let line = |cells: [&str; 7]| -> Result<()> {
        let [name, operation, device, error, tolerance, status, configuration] = cells;
        print_line!(
            "{name:<name_width$}  {operation:<operation_width$}  {device:<6}  {error:>9}  {tolerance:>9}  {status:<11}  \
             {configuration}"
        );
        Ok(())
    };
    if !json {
        line(["kernel", "operation", "device", "error", "tolerance", "result", "configuration"])?;
    }
    let mut audit = Audit::new(backend, variants);
    let mut results = Vec::new();
    for kernel in rows {
        let row = audit.row(kernel);
        if !json {
            let RowResult { name, operation, configuration, status, max_error, tolerance, launches, .. } = &row;
            let number = |value: &f64| if *launches == 0 { "-".to_owned() } else { format!("{value:.2e}") };
            let (error, tolerance) = (number(max_error), number(tolerance));
            let missing = row.reason.as_ref().filter(|_| *status == Status::NotYet);
            let missing = missing.map_or(String::new(), |reason| format!(" (not yet: {reason})"));
            let configuration = format!("{configuration}{missing}");
            line([name, operation, device, &error, &tolerance, status.name(), &configuration])?;
        }
        results.push(row);
    }
    let report = AuditReport::new(device, results);
    match json {
        true => print_line!("{}", json!(report)),
        false => print_audit_summary(&report)?,
    }
    if report.failed > 0 {
        bail!("{} of {} kernels failed", report.failed, report.results.len());
    }
    Ok(())
}

/// Every failure in full, then the counts.
fn print_audit_summary(report: &AuditReport) -> Result<()> {
    let AuditReport { device, passed, failed, not_applicable, not_yet, results } = report;
    for row in results.iter().filter(|row| row.status == Status::Failed) {
        print_line!("FAILED {} {}", row.name, row.reason.as_deref().unwrap_or_default());
    }
    let gpu = if *not_applicable == 0 { String::new() } else { format!(", {not_applicable} need a GPU") };
    print_line!("{device}: {passed} rows passed, {failed} failed, {not_yet} not yet{gpu}");
    Ok(())
}

/// Verifies every operation in the exact and the default mode, where they differ.
fn suite(args: &VerifyArgs) -> Result<()> {
    let mut results = Vec::new();
    let mut device = String::new();
    for exact in [true, false] {
        let opened = open(args, exact)?;
        let mode = match opened.default_mode() {
            _ if exact => Mode::Exact,
            Mode::Exact => break,
            mode => mode,
        };
        let families = args.family.map(|family| vec![family]);
        let options = VerifyOptions { families, mode, ..VerifyOptions::default() };
        let report = with_device!(opened, |backend| marlin_conformance::verify(&*backend, &options));
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

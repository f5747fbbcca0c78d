//! `marlin kernels`: the kernels of the original collection and what stands for them here.

#[cfg(feature = "gpu")]
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use marlin_conformance::audit::{Binding, Kernel, binding, kernel_families, kernels, markdown};
use serde_json::json;

/// Arguments of `marlin kernels`.
#[derive(Args)]
pub struct KernelsArgs {
    /// Only this family (gemm, attention, moe_gemm, selftest, ...)
    #[arg(long, value_name = "F")]
    family: Option<String>,
    /// Print one JSON array
    #[arg(long)]
    json: bool,
    /// Print docs/kernels.md
    #[arg(long, conflicts_with_all = ["family", "json"])]
    markdown: bool,
    /// Write the text of every kernel of the conformance suite in this language into a new folder
    #[cfg(feature = "gpu")]
    #[arg(long, num_args = 2, value_names = ["msl", "DIR"], conflicts_with_all = ["family", "json", "markdown"])]
    emit: Option<Vec<PathBuf>>,
}

/// Lists the table, or writes kernels; runs nothing on a device.
pub fn run(args: KernelsArgs) -> Result<()> {
    #[cfg(feature = "gpu")]
    if let Some([language, dir]) = args.emit.as_deref() {
        if language.as_os_str() != "msl" {
            bail!("unknown language `{}` of --emit, the only one is msl", language.display());
        }
        return super::emit_msl::emit(dir);
    }
    if args.markdown {
        use std::io::Write as _;
        std::io::stdout().write_all(markdown().as_bytes())?;
        return Ok(());
    }
    let of_family = |kernel: &&Kernel| args.family.as_deref().is_none_or(|family| kernel.family == family);
    let rows: Vec<&Kernel> = kernels().iter().filter(of_family).collect();
    if let (true, Some(family)) = (rows.is_empty(), &args.family) {
        bail!("unknown kernel family `{family}`, the families are {}", kernel_families().join(", "));
    }
    if args.json {
        print_line!("{}", json!(rows.iter().map(|kernel| object(kernel)).collect::<Vec<_>>()));
        return Ok(());
    }
    let operation_width = rows.iter().map(|kernel| kernel.operation.len()).max().unwrap_or(0);
    let name_width = rows.iter().map(|kernel| kernel.name.len()).max().unwrap_or(0);
    for kernel in &rows {
        let Kernel { name, operation, configuration, .. } = kernel;
        let status = status(&binding(kernel));
        print_line!("{name:<name_width$}  {operation:<operation_width$}  {status:<12}  {configuration}");
    }
    let bound = rows.iter().filter(|kernel| matches!(binding(kernel), Binding::Bound { .. })).count();
    print_line!("{} kernels, {bound} bound, {} not yet", rows.len(), rows.len() - bound);
    Ok(())
}

/// How many launches a row has, or what is missing.
fn status(binding: &Binding) -> String {
    match binding {
        Binding::Bound { launches, .. } => format!("{launches} launches"),
        Binding::NotYet(reason) => format!("not yet: {reason}"),
    }
}

fn object(kernel: &Kernel) -> serde_json::Value {
    let mut object = json!({
        "name": kernel.name,
        "family": kernel.family,
        "operation": kernel.operation,
        "configuration": kernel.configuration.to_string(),
        "priority": kernel.priority,
        "note": kernel.note,
    });
    let bound = match binding(kernel) {
        Binding::Bound { launches, variants, left_to_kernel } => json!({
            "status": "bound",
            "launches": launches,
            "gpu_only": variants,
            "left_to_kernel": left_to_kernel,
        }),
        Binding::NotYet(reason) => json!({ "status": "not_yet", "reason": reason }),
    };
    if let (Some(object), serde_json::Value::Object(bound)) = (object.as_object_mut(), bound) {
        object.extend(bound);
    }
    object
}

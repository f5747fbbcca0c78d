//! What the user is told.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use marlin_formats::Scheme;
use marlin_models::WriteSummary;
use marlin_quantize::{Method, Sensitivity, Summary};

use super::recipe::Recipe;

/// What a user should know about modules that calibration served badly, on stderr.
pub(super) fn warn(summary: &Summary) {
    for name in &summary.notes.without_rows {
        eprintln!("warning: no calibration token reached {name}; it was quantized without calibration");
    }
    if let Some((name, rows)) = summary.notes.few_rows.iter().min_by_key(|(_, rows)| *rows) {
        let count = summary.notes.few_rows.len();
        eprintln!(
            "warning: {count} modules saw fewer calibration tokens than an eighth of their inputs \
             ({name}: {rows}); more calibration text would help"
        );
    }
    for (name, damping) in &summary.notes.damped {
        eprintln!("warning: {name} needed damping {damping}");
    }
}

/// How much of a mixture each format got; with `verbose` what each block got and would have lost.
pub(super) fn mixture(blocks: &[(Sensitivity, Scheme)], verbose: bool) -> Result<()> {
    if verbose {
        for (block, scheme) in blocks {
            let losses: Vec<String> = block.losses.iter().map(|loss| format!("{loss:.2e}")).collect();
            print_line!("{:<40} {:<10} losses {}", block.block, scheme.format.name(), losses.join(" "));
        }
    }
    let total: u64 = blocks.iter().map(|(block, _)| block.weights).sum();
    let mut shares: BTreeMap<(u32, &str), (usize, u64)> = BTreeMap::new();
    for (block, scheme) in blocks {
        let (count, weights) = shares.entry((scheme.format.code_bits(), scheme.format.name())).or_default();
        *count += 1;
        *weights += block.weights;
    }
    for ((_, name), (count, weights)) in shares {
        print_line!("{name}: {count} blocks, {:.1} % of the weights", 100.0 * weights as f64 / total as f64);
    }
    Ok(())
}

pub(super) fn summary_line(
    output: &Path,
    recipe: &Recipe,
    (method, rotated): (Method, bool),
    summary: &Summary,
    written: &WriteSummary,
    start: Instant,
) -> String {
    let format = match recipe {
        Recipe::Native(plan) => format!("{} group {}", plan.default.format, plan.default.group_size),
        Recipe::Mixed { bits, .. } => format!("mixture of {bits} bits"),
        Recipe::Exl3(recipe) => format!("exl3 {}, {} bits", recipe.codebook.name(), recipe.bits),
    };
    let method = match method {
        Method::Rtn(_) => " (rtn)",
        Method::Gptq(_) if rotated => " (mr-gptq)",
        Method::Gptq(_) => " (gptq)",
        Method::Awq(_) => " (awq)",
        Method::Exl3(_) => "",
    };
    let restored = match summary.restored {
        0 => String::new(),
        restored => format!(", {restored} of {} parts from an interrupted run", summary.parts),
    };
    format!(
        "{}: {format}{method}, {} modules at {:.3} bits per weight, {:.1} MB in all, {:.1} s{restored}",
        output.display(),
        summary.modules,
        summary.bits_per_weight(),
        written.bytes as f64 / 1e6,
        start.elapsed().as_secs_f64()
    )
}

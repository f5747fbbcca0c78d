//! Where the time goes, operation by operation, next to what the machine could do at most.

use std::time::Duration;

use anyhow::Result;
use marlin_ops::profile::{Record, Roofline};
use serde_json::{Value, json};

/// The operations of a prefill or a decode.
pub struct PhaseProfile {
    name: &'static str,
    tokens: usize,
    seconds: f64,
    /// Longest first.
    records: Vec<Record>,
}

/// Bytes of weights and KV caches that the recorded operations read.
pub fn bytes_read(records: &[Record]) -> u64 {
    records.iter().map(|record| record.cost.weight_bytes + record.cost.cache_bytes).sum()
}

impl PhaseProfile {
    /// `records` of a phase that took `time` for `tokens` tokens.
    pub fn new(name: &'static str, tokens: usize, time: Duration, mut records: Vec<Record>) -> Self {
        records.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Self { name, tokens, seconds: time.as_secs_f64(), records }
    }

    /// Time outside of operations: copies, positions, the code around them, and the recording itself.
    fn unaccounted_seconds(&self) -> f64 {
        self.seconds - self.records.iter().map(|record| record.seconds).sum::<f64>()
    }

    fn to_json(&self, roofline: &Roofline) -> Value {
        let operations: Vec<Value> = self
            .records
            .iter()
            .map(|record| {
                let Record { operation, calls, seconds, cost } = record;
                json!({
                    "family": operation.family,
                    "operation": operation.name,
                    "weights": operation.weights,
                    "calls": calls,
                    "seconds": seconds,
                    "time_share": seconds / self.seconds,
                    "bytes": cost.bytes(),
                    "weight_bytes": cost.weight_bytes,
                    "cache_bytes": cost.cache_bytes,
                    "flops": cost.flops(),
                    "achieved_bytes_per_s": cost.bytes() as f64 / seconds,
                    "achieved_flops_per_s": cost.flops() as f64 / seconds,
                    "roofline_share": roofline.least_seconds(cost) / seconds,
                })
            })
            .collect();
        json!({
            "tokens": self.tokens,
            "seconds": self.seconds,
            "unaccounted_seconds": self.unaccounted_seconds(),
            "operations": operations,
        })
    }

    fn print(&self, roofline: &Roofline) -> Result<()> {
        let Self { name, tokens, seconds, .. } = self;
        print_line!();
        print_line!("{name}: {tokens} tokens in {:.1} ms", 1e3 * seconds);
        print_line!(
            "  {:36} {:>6} {:>9} {:>6} {:>9} {:>7} {:>8} {:>8} {:>9}",
            "operation",
            "calls",
            "ms",
            "time",
            "MB",
            "GB/s",
            "GFLOP",
            "GFLOP/s",
            "roofline"
        );
        for Record { operation, calls, seconds, cost } in &self.records {
            let label = format!("{} {} {}", operation.family, operation.name, operation.weights.unwrap_or_default());
            let (bytes, flops) = (cost.bytes() as f64, cost.flops() as f64);
            print_line!(
                "  {label:36} {calls:>6} {:>9.2} {:>4.1} % {:>9.1} {:>7.1} {:>8.2} {:>8.1} {:>7.0} %",
                1e3 * seconds,
                100.0 * seconds / self.seconds,
                bytes / 1e6,
                bytes / seconds / 1e9,
                flops / 1e9,
                flops / seconds / 1e9,
                100.0 * roofline.least_seconds(cost) / seconds,
            );
        }
        let rest = self.unaccounted_seconds();
        print_line!("  {:43} {:>9.2} {:>4.1} %", "unaccounted", 1e3 * rest, 100.0 * rest / seconds);
        Ok(())
    }
}

/// The machine's bounds, then each phase by its name.
pub fn to_json(phases: &[PhaseProfile], roofline: &Roofline) -> Value {
    let mut profile = json!({
        "roofline": {
            "read_bytes_per_s": roofline.read_bytes_per_s,
            "f32_flops_per_s": roofline.f32_flops_per_s,
            "int8_ops_per_s": roofline.int8_ops_per_s,
        },
    });
    for phase in phases {
        profile[phase.name] = phase.to_json(roofline);
    }
    profile
}

/// Prints a table for each phase.
pub fn print(phases: &[PhaseProfile], roofline: &Roofline) -> Result<()> {
    print_line!(
        "roofline {:.1} GB/s of reads, {:.0} GFLOP/s in f32, {:.0} GFLOP/s of int8 dot products",
        roofline.read_bytes_per_s / 1e9,
        roofline.f32_flops_per_s / 1e9,
        roofline.int8_ops_per_s / 1e9,
    );
    phases.iter().try_for_each(|phase| phase.print(roofline))?;
    print_line!();
    print_line!(
        "roofline: the least time for the bytes and FLOPs over the time taken; above 100 %, data came from caches"
    );
    Ok(())
}

//! `marlin devices`: what this machine and build can run on.

use anyhow::Result;
use clap::Args;
use marlin_cpu::{Cpu, CpuOptions};
use serde_json::json;

/// Arguments of `marlin devices`.
#[derive(Args)]
pub struct DevicesArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Lists the devices.
pub fn run(args: DevicesArgs) -> Result<()> {
    let cpu = Cpu::new(CpuOptions::default())?;
    let (isa, threads) = (format!("{:?}", cpu.isa()).to_lowercase(), cpu.threads());
    if args.json {
        let device = json!({ "name": "cpu", "instructions": isa, "threads": threads });
        print_line!("{}", json!({ "devices": [device] }));
    } else {
        print_line!("cpu    {isa}, {threads} threads");
    }
    Ok(())
}

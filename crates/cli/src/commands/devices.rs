//! `marlin devices`: what this machine and build can run on.

use anyhow::Result;
use clap::Args;
use marlin_cpu::{Cpu, CpuOptions};
use serde_json::{Value, json};

/// Arguments of `marlin devices`.
#[derive(Args)]
pub struct DevicesArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// A line of the list.
struct Listed {
    kind: &'static str,
    index: usize,
    description: String,
    details: Value,
}

/// Lists the devices.
pub fn run(args: DevicesArgs) -> Result<()> {
    let cpu = Cpu::new(CpuOptions::default())?;
    let (isa, threads) = (format!("{:?}", cpu.isa()).to_lowercase(), cpu.threads());
    let mut devices = vec![Listed {
        kind: "cpu",
        index: 0,
        description: format!("{isa}, {threads} threads"),
        details: json!({ "name": "cpu", "instructions": isa, "threads": threads }),
    }];
    devices.extend(gpus());
    if args.json {
        let devices: Vec<_> = devices.into_iter().map(|device| device.details).collect();
        print_line!("{}", json!({ "devices": devices }));
    } else {
        for Listed { kind, index, description, .. } in devices {
            print_line!("{kind:<7}{index}  {description}");
        }
    }
    Ok(())
}

#[cfg(feature = "gpu")]
fn gpus() -> Vec<Listed> {
    let listed = |device: marlin_gpu::DeviceInfo| {
        let software = if device.software { ", software" } else { "" };
        Listed {
            kind: device.kind,
            index: device.index,
            description: format!("{}{software}", device.name),
            details: json!({
                "name": device.kind,
                "index": device.index,
                "description": device.name,
                "software": device.software,
            }),
        }
    };
    marlin_gpu::devices().into_iter().map(listed).collect()
}

#[cfg(not(feature = "gpu"))]
fn gpus() -> Vec<Listed> {
    Vec::new()
}

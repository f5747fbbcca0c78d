//! The one place where a device is chosen.

use std::sync::Arc;

use anyhow::{Result, bail};
use marlin_cpu::{Cpu, CpuOptions};

use crate::args::{DeviceArgs, DeviceKind};

/// Opens the device that was asked for; a device this build lacks is an error, never a fallback.
pub fn open(args: &DeviceArgs) -> Result<Arc<Cpu>> {
    match args.device {
        DeviceKind::Auto | DeviceKind::Cpu => {
            let options = CpuOptions { threads: args.threads, exact: args.exact, ..CpuOptions::default() };
            Ok(Arc::new(Cpu::new(options)?))
        }
        DeviceKind::Metal | DeviceKind::Cuda | DeviceKind::Vulkan => {
            let name = format!("{:?}", args.device).to_lowercase();
            bail!("device `{name}` is not in this build; it has: cpu")
        }
    }
}

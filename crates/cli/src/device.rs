//! The one place where a device is chosen.

use std::sync::Arc;

use anyhow::{Result, bail};
use marlin_conformance::Mode;
use marlin_cpu::{Cpu, CpuOptions};

use crate::args::{DeviceArgs, DeviceKind};

/// An open device.
pub enum Opened {
    /// The CPU.
    Cpu(Arc<Cpu>),
    /// An Apple GPU.
    #[cfg(all(feature = "gpu", target_os = "macos"))]
    Metal(Arc<marlin_gpu::Metal>),
    /// An NVIDIA GPU.
    #[cfg(feature = "cuda")]
    Cuda(Arc<marlin_gpu::Cuda>),
    /// A Vulkan device.
    #[cfg(all(feature = "gpu", not(target_os = "macos")))]
    Vulkan(Arc<marlin_gpu::Vulkan>),
}

impl Opened {
    /// What the device rounds unless it is opened as an exact one.
    pub fn default_mode(&self) -> Mode {
        #[cfg(any(feature = "gpu", feature = "cuda"))]
        let of_gpu = |has_modes| if has_modes { Mode::F16Activations } else { Mode::Exact };
        match self {
            Self::Cpu(_) => Mode::Int8Activations,
            #[cfg(all(feature = "gpu", target_os = "macos"))]
            Self::Metal(gpu) => of_gpu(gpu.has_modes()),
            #[cfg(feature = "cuda")]
            Self::Cuda(gpu) => of_gpu(gpu.has_modes()),
            #[cfg(all(feature = "gpu", not(target_os = "macos")))]
            Self::Vulkan(gpu) => of_gpu(gpu.has_modes()),
        }
    }
}

/// Runs the body with an open device: `with_device!(opened, |backend| expression)`.
macro_rules! with_device {
    ($opened:expr, |$backend:ident| $body:expr) => {
        match $opened {
            $crate::device::Opened::Cpu($backend) => $body,
            #[cfg(all(feature = "gpu", target_os = "macos"))]
            $crate::device::Opened::Metal($backend) => $body,
            #[cfg(feature = "cuda")]
            $crate::device::Opened::Cuda($backend) => $body,
            #[cfg(all(feature = "gpu", not(target_os = "macos")))]
            $crate::device::Opened::Vulkan($backend) => $body,
        }
    };
}
pub(crate) use with_device;

/// Runs the body with the device that the arguments ask for: `on_device!(&args, |backend| expression)`.
macro_rules! on_device {
    ($args:expr, |$backend:ident| $body:expr) => {
        $crate::device::with_device!($crate::device::open($args)?, |$backend| $body)
    };
}
pub(crate) use on_device;

/// Opens the device that was asked for; one that this build or machine lacks is an error, never a fallback.
pub fn open(args: &DeviceArgs) -> Result<Opened> {
    let args = &resolve(args);
    let kind = args.device;
    if kind == DeviceKind::Cpu {
        return Ok(Opened::Cpu(open_cpu(args)?));
    }
    if args.threads.is_some() {
        bail!("--threads is a setting of the CPU: use it with --device cpu");
    }
    match kind {
        #[cfg(all(feature = "gpu", target_os = "macos"))]
        DeviceKind::Metal => Ok(Opened::Metal(Arc::new(marlin_gpu::metal(args.device_index)?.with_exact(args.exact)))),
        #[cfg(feature = "cuda")]
        DeviceKind::Cuda => Ok(Opened::Cuda(Arc::new(marlin_gpu::cuda(args.device_index)?.with_exact(args.exact)))),
        #[cfg(all(feature = "gpu", not(target_os = "macos")))]
        DeviceKind::Vulkan => {
            Ok(Opened::Vulkan(Arc::new(marlin_gpu::vulkan(args.device_index)?.with_exact(args.exact))))
        }
        _ => bail!("device `{}` is not in this build; it has: {}", name(kind), built().join(", ")),
    }
}

/// The same with a device in place of `auto`: the best GPU, or the CPU where there is none or its threads are asked for.
fn resolve(args: &DeviceArgs) -> DeviceArgs {
    let (device, device_index) = match args.device {
        // An index is a number within a kind: without one there is nothing to count.
        DeviceKind::Auto if args.threads.is_none() && args.device_index.is_none() => best_gpu(),
        DeviceKind::Auto => None,
        kind => Some((kind, args.device_index)),
    }
    .unwrap_or((DeviceKind::Cpu, args.device_index));
    DeviceArgs { device, device_index, ..args.clone() }
}

/// CUDA before Vulkan or Metal, never software.
#[cfg(feature = "gpu")]
fn best_gpu() -> Option<(DeviceKind, Option<usize>)> {
    let best = marlin_gpu::best_device()?;
    let kind = match best.kind {
        "cuda" => DeviceKind::Cuda,
        "metal" => DeviceKind::Metal,
        _ => DeviceKind::Vulkan,
    };
    Some((kind, Some(best.index)))
}

#[cfg(not(feature = "gpu"))]
fn best_gpu() -> Option<(DeviceKind, Option<usize>)> {
    None
}

/// The CPU, for what runs nowhere else.
pub fn open_cpu(args: &DeviceArgs) -> Result<Arc<Cpu>> {
    if let Some(index) = args.device_index {
        bail!("--device-index {index}: there is one CPU; name a GPU with --device");
    }
    let options = CpuOptions { threads: args.threads, exact: args.exact, ..CpuOptions::default() };
    Ok(Arc::new(Cpu::new(options)?))
}

fn name(kind: DeviceKind) -> &'static str {
    match kind {
        DeviceKind::Auto => "auto",
        DeviceKind::Cpu => "cpu",
        DeviceKind::Metal => "metal",
        DeviceKind::Cuda => "cuda",
        DeviceKind::Vulkan => "vulkan",
    }
}

/// The kinds of this build.
fn built() -> Vec<&'static str> {
    let mut kinds = vec!["cpu"];
    if cfg!(all(feature = "gpu", target_os = "macos")) {
        kinds.push("metal");
    }
    if cfg!(feature = "cuda") {
        kinds.push("cuda");
    }
    if cfg!(all(feature = "gpu", not(target_os = "macos"))) {
        kinds.push("vulkan");
    }
    kinds
}

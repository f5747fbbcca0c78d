//! Which devices there are, and opening one.

#[cfg(any(feature = "vulkan", feature = "cuda", target_os = "macos"))]
use marlin_ops::{OpError, Result};

#[cfg(any(feature = "vulkan", feature = "cuda", target_os = "macos"))]
use crate::Gpu;

#[cfg(all(feature = "vulkan", target_os = "macos"))]
compile_error!("on macOS the device is Metal: build without the feature `vulkan`");

/// A device that this build can open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    /// `cuda`, `metal` or `vulkan`.
    pub kind: &'static str,
    /// Number among the devices of its kind.
    pub index: usize,
    /// What the driver calls it.
    pub name: String,
    /// A processor that only pretends to be a GPU.
    pub software: bool,
}

/// The Vulkan backend.
#[cfg(feature = "vulkan")]
pub type Vulkan = Gpu<cubecl::wgpu::WgpuRuntime>;

/// The Metal backend: CubeCL's Metal compiler behind wgpu. Its runtime without wgpu does not compile in this version.
#[cfg(target_os = "macos")]
pub type Metal = Gpu<cubecl::wgpu::WgpuRuntime>;

/// The CUDA backend.
#[cfg(feature = "cuda")]
pub type Cuda = Gpu<cubecl::cuda::CudaRuntime>;

/// Opens the CUDA device with this index, or the first; [`Gpu::with_exact`] has its modes.
///
/// # Errors
/// A device error if there is no such device, no driver, or no CUDA toolkit to compile kernels with.
#[cfg(feature = "cuda")]
pub fn cuda(index: Option<usize>) -> Result<Cuda> {
    use cubecl::Runtime;
    let failure = |reason: String| OpError::Device { operation: "open", reason };
    let found = cuda_devices().map_err(failure)?;
    let index = index.unwrap_or(0);
    if index >= found.len() {
        return Err(absent("CUDA", Some(index), &found));
    }
    // SAFETY: only looks whether the library can be loaded.
    if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
        return Err(failure("CUDA device found, but not NVRTC (libnvrtc), which compiles the kernels".into()));
    }
    if cubecl::cuda::install::cuda_path().is_none() {
        return Err(failure("CUDA device found, but no toolkit headers: set CUDA_PATH".into()));
    }
    let mut client = cubecl::cuda::CudaRuntime::client(&cubecl::cuda::CudaDevice::new(index));
    // SAFETY: the stream is that of the thread which opens the device. All work goes there, from whichever thread, so that
    // repeated records are in order with the rest.
    unsafe { client.set_stream(cubecl_environment::stream::StreamId::current()) };
    let gpu = Gpu::new(client, "cuda");
    gpu.steps.use_graphs(gpu.can_record());
    Ok(gpu)
}

/// The CUDA devices, or why they cannot be counted.
#[cfg(feature = "cuda")]
fn cuda_devices() -> std::result::Result<Vec<DeviceInfo>, String> {
    use cudarc::driver::result;
    // SAFETY: only looks whether the library can be loaded.
    if !unsafe { cudarc::driver::sys::is_culib_present() } {
        return Err("no CUDA device is available: NVIDIA's driver (libcuda) is not installed".into());
    }
    let reason = |error: cudarc::driver::DriverError| format!("no CUDA device is available: {error}");
    result::init().map_err(reason)?;
    let count = result::device::get_count().map_err(reason)?;
    let info = |index: i32| {
        let name = result::device::get(index).and_then(result::device::get_name).map_err(reason)?;
        Ok(DeviceInfo { kind: "cuda", index: index as usize, name, software: false })
    };
    (0..count).map(info).collect()
}

/// The error of a device that is not there; `found` are the others of its kind.
#[cfg(any(feature = "vulkan", feature = "cuda", target_os = "macos"))]
fn absent(kind: &str, index: Option<usize>, found: &[DeviceInfo]) -> OpError {
    let found: Vec<_> = found.iter().map(|info| format!("{}: {}", info.index, info.name)).collect();
    let found = if found.is_empty() { "there is none".into() } else { format!("there are {}", found.join(", ")) };
    let which = index.map_or(format!("a {kind} device"), |i| format!("{kind} device {i}"));
    OpError::Device { operation: "open", reason: format!("{which} is not available: {found}") }
}

/// All devices of this build, the best first: CUDA, then other GPUs, then software that pretends to be one.
pub fn devices() -> Vec<DeviceInfo> {
    let mut devices: Vec<DeviceInfo> = Vec::new();
    // Without a driver there are none.
    #[cfg(feature = "cuda")]
    devices.extend(cuda_devices().unwrap_or_default());
    #[cfg(any(feature = "vulkan", target_os = "macos"))]
    devices.extend(adapters().into_iter().map(|(_, info)| info));
    devices.sort_by_key(|device| device.software);
    devices
}

/// The best device that is no software, if there is one.
pub fn best_device() -> Option<DeviceInfo> {
    #[cfg(feature = "cuda")]
    if let Some(first) = cuda_devices().unwrap_or_default().into_iter().next() {
        return Some(first);
    }
    // A look at the devices of Vulkan loads all of its drivers, software too, which take 100 MB.
    if cfg!(target_os = "linux") && !GPU_NODES.iter().any(|path| std::path::Path::new(path).exists()) {
        return None;
    }
    devices().into_iter().find(|device| !device.software)
}

/// Where Linux shows GPUs to their drivers: most of them, NVIDIA, WSL, Adreno, Mali.
const GPU_NODES: [&str; 5] = ["/dev/dri", "/dev/nvidiactl", "/dev/dxg", "/dev/kgsl-3d0", "/dev/mali0"];

/// Opens the Vulkan device with this index, or the best one.
///
/// # Errors
/// A device error if there is no such device.
#[cfg(feature = "vulkan")]
pub fn vulkan(index: Option<usize>) -> Result<Vulkan> {
    open_adapter(index)
}

/// Opens the Metal device with this index, or the first.
///
/// # Errors
/// A device error if there is no such device.
#[cfg(target_os = "macos")]
pub fn metal(index: Option<usize>) -> Result<Metal> {
    open_adapter(index)
}

/// What wgpu drives on this system: the kind of its devices, what people call it, and wgpu's own name.
#[cfg(all(feature = "vulkan", not(target_os = "macos")))]
const API: (&str, &str, wgpu::Backends) = ("vulkan", "Vulkan", wgpu::Backends::VULKAN);
#[cfg(target_os = "macos")]
const API: (&str, &str, wgpu::Backends) = ("metal", "Metal", wgpu::Backends::METAL);

#[cfg(any(feature = "vulkan", target_os = "macos"))]
fn open_adapter(index: Option<usize>) -> Result<Gpu<cubecl::wgpu::WgpuRuntime>> {
    use cubecl::Runtime;
    let (kind, api, _) = API;
    let adapters = adapters();
    let (device, _) = match index {
        Some(index) => adapters.iter().find(|(_, info)| info.index == index),
        None => adapters.iter().min_by_key(|(_, info)| info.software),
    }
    .ok_or_else(|| {
        let found: Vec<_> = adapters.iter().map(|(_, info)| info.clone()).collect();
        absent(api, index, &found)
    })?;
    let mut client = cubecl::wgpu::WgpuRuntime::client(device);
    // SAFETY: the stream is that of the thread which opens the device. All work goes there, from whichever thread, and takes
    // its memory from one pool.
    unsafe { client.set_stream(cubecl_environment::stream::StreamId::current()) };
    Ok(Gpu::new(client, kind))
}

/// The adapters of wgpu, by the name that CubeCL knows them by: kind and number within the kind.
#[cfg(any(feature = "vulkan", target_os = "macos"))]
fn adapters() -> Vec<(cubecl::wgpu::WgpuDevice, DeviceInfo)> {
    use cubecl::wgpu::WgpuDevice;
    use wgpu::DeviceType;
    let (kind, _, backends) = API;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends,
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let adapters = cubecl::future::block_on(instance.enumerate_adapters(backends));
    let mut numbers = [0; 3];
    let mut number = |of: usize| {
        numbers[of] += 1;
        numbers[of] - 1
    };
    let known = adapters.into_iter().filter_map(|adapter| {
        let info = adapter.get_info();
        let device = match info.device_type {
            DeviceType::DiscreteGpu => WgpuDevice::DiscreteGpu(number(0)),
            DeviceType::IntegratedGpu => WgpuDevice::IntegratedGpu(number(1)),
            DeviceType::VirtualGpu => WgpuDevice::VirtualGpu(number(2)),
            DeviceType::Cpu => WgpuDevice::Cpu,
            DeviceType::Other => return None,
        };
        Some((device, info.name, info.device_type == DeviceType::Cpu))
    });
    let numbered = known.enumerate();
    numbered.map(|(index, (device, name, software))| (device, DeviceInfo { kind, index, name, software })).collect()
}

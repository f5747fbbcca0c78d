//! How a GPU computes the operations of [`marlin_ops`]: kernels written once with CubeCL, compiled at run time to Metal
//! (MSL), CUDA C++ or Vulkan (SPIR-V).
//!
//! A family is a file or folder called as in `marlin-ops`. Kernels read every dtype through [`element`], decode weights
//! through [`decode`], and report bad values inside operands through [`fault`]: the next read returns the error.

mod attention;
mod buffer;
mod convert;
mod decode;
mod device;
mod element;
mod fault;
mod hadamard;
mod launch;
mod linear;
mod math;
mod moe;
mod norm;
mod open;
mod reduce;
mod rope;
mod sampling;
mod weight;

pub use buffer::Buffer;
pub use device::Gpu;
#[cfg(feature = "cuda")]
pub use open::{Cuda, cuda};
pub use open::{DeviceInfo, devices};
#[cfg(feature = "metal")]
pub use open::{Metal, metal};
#[cfg(feature = "vulkan")]
pub use open::{Vulkan, vulkan};
pub use weight::{GpuExperts, GpuWeight};

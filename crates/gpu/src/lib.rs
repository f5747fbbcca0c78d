//! How a GPU computes the operations of [`marlin_ops`]: kernels written once with CubeCL, compiled at run time to Metal
//! (MSL), CUDA C++ or Vulkan (SPIR-V).
//!
//! A family is a file or folder called as in `marlin-ops`. Kernels read every dtype through `element`, decode weights
//! through `decode`, and report bad values inside operands through `fault`: the next read returns the error.

// Kernels are Rust that CubeCL reads: most methods of the standard library do not exist there, `#[define]` makes a second
// argument of each, and constants are written as published.
#![allow(
    clippy::assign_op_pattern,
    clippy::collapsible_if,
    clippy::duplicate_underscore_argument,
    clippy::excessive_precision,
    clippy::manual_div_ceil,
    clippy::manual_is_multiple_of,
    clippy::neg_cmp_op_on_partial_ord
)]

mod attention;
mod buffer;
mod convert;
mod decode;
mod dequantize;
mod device;
mod element;
mod fault;
mod hadamard;
mod halves;
mod launch;
mod linear;
mod math;
mod measure;
mod moe;
mod norm;
mod open;
#[cfg(feature = "record")]
pub mod record;
mod reduce;
mod rope;
mod sampling;
mod step;
#[cfg(all(test, any(feature = "vulkan", feature = "cuda")))]
mod test_values;
mod traffic;
mod trellis;
mod weight;

pub use attention::AttentionKernel;
pub use buffer::Buffer;
pub use cubecl::prelude::Runtime;
pub use device::Gpu;
pub use linear::{Accumulate, Gemv, LinearKernel, TensorRows, TensorTile, Tile};
pub use measure::Measured;
pub use moe::{ExpertKernel, ExpertStrategy};
#[cfg(feature = "cuda")]
pub use open::{Cuda, cuda};
pub use open::{DeviceInfo, best_device, devices};
#[cfg(target_os = "macos")]
pub use open::{Metal, metal};
#[cfg(feature = "vulkan")]
pub use open::{Vulkan, vulkan};
pub use step::Recording;
pub use traffic::Traffic;
pub use weight::{GpuExperts, GpuWeight};

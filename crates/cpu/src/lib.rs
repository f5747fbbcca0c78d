//! The CPU backend: SIMD kernels chosen at run time, one thread pool, two numeric modes.
//!
//! - exact: dequantized weights times f32 activations, f32 accumulation;
//! - fast (default): for formats with small-integer codes, activations are quantized per 32 channels to int8 for
//!   dot-product instructions ([`marlin_ops::activation`]).
//!
//! Results depend on the instruction set and the mode, never on the thread count.

mod ahead;
mod arena;
mod attention;
mod buffer;
mod convert;
mod device;
mod hadamard;
mod layout;
mod linear;
mod moe;
mod norm;
mod pool;
mod roofline;
mod rope;
mod sampling;
mod simd;
mod workspace;

pub use arena::Pages;
pub use buffer::Buffer;
pub use device::{Cpu, CpuOptions, Isa};
pub use layout::{PackedExperts, PackedWeight};
pub use roofline::PlainReads;

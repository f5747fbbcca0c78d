//! Weight formats of Metal Marlin: what every code, scale and packed word means.
//!
//! The crate is the scalar reference for the native formats. It defines
//!
//! - element codes: [`fp4`], [`fp8`], [`e8m0`], [`normal_float`];
//! - packed words: [`pack`];
//! - [`Format`], what it stores ([`Levels`], [`ScaleKind`], [`Shift`]), and [`Scheme`], with its group size along K;
//! - [`Group`], the stored scale and zero or offset of one group, and the rules that choose and read them;
//! - [`StoredGroups`], the groups of an imported matrix as its checkpoint stores them; [`load_f32`] and [`store_f32`];
//! - [`QuantizedMatrix`], one weight matrix in the native K-major layout;
//! - [`exl3`]: trellis codes, whose matrices are not grouped;
//! - [`grid`]: scalar grid codes in tiles, with signs of inputs and outputs;
//! - [`hadamard()`], the rotation that trellis formats and quantizers share;
//! - [`DType`], the element types of stored tensors.
//!
//! Throughout, `K` is in_features (the reduction axis), `N` is out_features, and dense weights
//! are `[N, K]` row-major as in Hugging Face checkpoints.

mod definition;
mod dtype;
pub mod e8m0;
mod error;
pub mod exl3;
mod format;
pub mod fp4;
pub mod fp8;
pub mod grid;
mod group;
mod hadamard;
mod matrix;
pub mod normal_float;
pub mod pack;
mod scheme;
mod stored;

pub use definition::{IQ4, Levels, SUPER_BLOCK, ScaleKind, Shift};
pub use dtype::DType;
pub use error::FormatError;
pub use format::Format;
pub use group::Group;
pub use hadamard::hadamard;
pub use matrix::QuantizedMatrix;
pub use scheme::Scheme;
pub use stored::{StoredGroups, load_f32, store_f32};

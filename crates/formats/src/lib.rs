//! Weight formats of Metal Marlin: what every code, scale and packed word means.
//!
//! The crate is the scalar reference for the native formats. It defines
//!
//! - element codes: [`fp4`], [`fp8`], [`e8m0`], [`normal_float`];
//! - packed words: [`pack`];
//! - [`Format`] and [`Scheme`], a format with its group size along K;
//! - [`Group`], the stored scale and zero of one group, and the rules that choose and read them;
//! - [`QuantizedMatrix`], one weight matrix in the native K-major layout;
//! - [`exl3`]: trellis codes, whose matrices are not grouped;
//! - [`DType`], the element types of stored tensors.
//!
//! Throughout, `K` is in_features (the reduction axis), `N` is out_features, and dense weights
//! are `[N, K]` row-major as in Hugging Face checkpoints.

mod dtype;
pub mod e8m0;
mod error;
pub mod exl3;
mod format;
pub mod fp4;
pub mod fp8;
mod group;
mod matrix;
pub mod normal_float;
pub mod pack;
mod scheme;

pub use dtype::DType;
pub use error::FormatError;
pub use format::{Format, ScaleKind};
pub use group::Group;
pub use matrix::QuantizedMatrix;
pub use scheme::Scheme;

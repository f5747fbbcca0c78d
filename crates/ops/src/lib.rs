//! What is computed: tensors, weights, the [`Backend`] trait with one file per operation family, and every
//! argument check. The [`oracle`] is the f64 backend that all others are tested against.
//!
//! An operation is called through the provided method of its family's trait ([`LinearOps::linear`], ...): it checks
//! shapes, dtypes and ranges, then calls the backend's `run_*` body. Backends therefore fail alike.

mod backend;
mod check;
mod error;
mod input_order;
mod tensor;
mod weight;

pub mod activation;
pub mod attention;
pub mod convert;
pub mod hadamard;
pub mod linear;
pub mod moe;
pub mod norm;
pub mod oracle;
pub mod profile;
pub mod rng;
pub mod rope;
pub mod sampling;
pub mod trellis;

pub use attention::{AttentionOps, PagedAttentionOps};
pub use backend::{Backend, Device};
pub use convert::ConvertOps;
pub use error::{OpError, Result};
pub use hadamard::HadamardOps;
pub use input_order::InputOrder;
pub use linear::LinearOps;
pub use moe::MoeOps;
pub use norm::NormOps;
pub use rope::RopeOps;
pub use sampling::SamplingOps;
pub use tensor::{HostTensor, MAX_RANK, Shape, Tensor};
pub use trellis::PathSearch;
pub use weight::{ExpertProjection, ExpertStack, ExpertWeights, Linear, Weight, WeightData};

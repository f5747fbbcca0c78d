//! The kernel audit: every kernel of the original collection, bound to launches of the generic kernels in its
//! configuration, or to the fact that its self-test proves.
//!
//! The table is data ([`kernels`]); [`Audit`] runs it on a device and holds every launch against the oracle;
//! [`markdown`] writes `docs/kernels.md`.

mod attention;
mod bind;
mod bounds;
mod case;
mod configuration;
mod convert;
mod dequantize;
mod fusion;
#[cfg(feature = "gpu")]
mod gpu;
mod hadamard;
mod linear;
mod markdown;
mod mla;
mod moe;
mod paged;
mod reference;
mod report;
mod rope;
mod sampling;
mod schema;
mod suite;
mod table;
mod trellis;
mod variants;

pub use bind::{Binding, binding};
pub use configuration::{Configuration, ConfigurationError};
#[cfg(feature = "gpu")]
pub use gpu::GpuVariants;
pub use markdown::markdown;
pub use report::{Audit, AuditReport, RowResult, Status};
pub use table::{Kernel, kernel_families, kernels};
pub use variants::{PlainOnly, Variants};

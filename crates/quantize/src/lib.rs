//! Quantizers: dense f32 weights in, native [`QuantizedMatrix`](marlin_formats::QuantizedMatrix)
//! out.
//!
//! - [`rtn()`]: round to nearest, every format;
//! - [`Hessian`]: `X^T X` of a layer's inputs, accumulated from calibration activations;
//! - [`gptq()`]: sequential elimination against that Hessian (Frantar et al. 2022);
//! - [`mod@exl3`]: trellis-coded weights of 1 to 8 bits, against that Hessian too;
//! - [`ScaleSearch`]: how the scale of one group is chosen, shared by both;
//! - [`Plan`]: which modules of a model are quantized and to what;
//! - [`quantize_model`]: the loop over a model's layers, driven through [`ModelSource`] and
//!   [`ModelSink`], so that this crate knows neither checkpoints nor architectures.
//!
//! Throughout, `K` is in_features (the reduction axis), `N` is out_features, and dense weights
//! are `[N, K]` row-major as in Hugging Face checkpoints. Results never depend on the number of
//! threads.

mod dense;
mod error;
pub mod exl3;
mod gptq;
mod hessian;
mod job;

mod plan;
mod rtn;
mod scale;

pub use error::{QuantizeError, Result};
pub use gptq::{Gptq, GptqOptions, InverseFactor, MAX_DAMPING, gptq};
pub use hessian::{Hessian, proxy_loss};
pub use job::{
    ActivationSink, Calibration, Event, Method, ModelSink, ModelSource, Settings, SourceError, Summary, quantize_model,
};
pub use plan::{Assignment, Module, Override, Pattern, Plan, Role, parse_scheme};
pub use rtn::rtn;
pub use scale::{ScaleSearch, fit_group};

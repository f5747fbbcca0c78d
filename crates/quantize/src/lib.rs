//! Quantizers: dense f32 weights in, native [`QuantizedMatrix`](marlin_formats::QuantizedMatrix)
//! out.
//!
//! - [`rtn()`]: round to nearest, every format;
//! - [`Hessian`]: `X^T X` of a layer's inputs, accumulated from calibration activations;
//! - [`gptq()`]: sequential elimination against that Hessian (Frantar et al. 2022);
//! - [`AwqOptions`]: channel scales against the activations' size, folded into the operations before ([`Fold`]);
//! - [`exl3`]: trellis-coded weights;
//! - [`ScaleSearch`]: how the scale of one group is chosen, shared by both;
//! - [`allocate_formats`]: mixed precision under a budget of bits, from what [`measure_model`] found;
//! - [`Plan`]: which modules of a model are quantized and to what;
//! - [`quantize_model`]: the loop over a model's layers, driven through [`ModelSource`] and
//!   [`PartStore`], so that this crate knows neither checkpoints nor architectures;
//! - [`Staging`]: the folder of finished parts that lets a killed job go on.
//!
//! Throughout, `K` is in_features (the reduction axis), `N` is out_features, and dense weights
//! are `[N, K]` row-major as in Hugging Face checkpoints. Results never depend on the number of
//! threads.

mod awq;
mod dense;
mod error;
pub mod exl3;
mod fold;
mod gptq;
mod hessian;
mod job;
mod mixed;
mod part;
mod plan;
mod rtn;
mod scale;
mod staging;

pub use awq::AwqOptions;
pub use error::{QuantizeError, Result};
pub use fold::{Fold, Previous};
pub use gptq::{Gptq, GptqOptions, InverseFactor, MAX_DAMPING, gptq};
pub use hessian::{Hessian, proxy_loss};
pub use job::{
    ActivationSink, After, Calibration, Event, Measured, Method, Mixture, ModelSource, PartStore, Replacement,
    Settings, SourceError, Summary, measure_model, quantize_model,
};
pub use mixed::{Sensitivity, allocate_formats};
pub use part::{Changed, Notes, Part, QuantizedWeight};
pub use plan::{Assignment, Module, Override, Pattern, Plan, Role, Target, parse_scheme};
pub use rtn::rtn;
pub use scale::{ScaleSearch, fit_group};
pub use staging::{Fingerprint, Staging, StagingError};

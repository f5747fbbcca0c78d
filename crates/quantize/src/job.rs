//! Quantizing a whole model part by part: its decoder layers, then what lies outside them.
//!
//! With calibration, the inputs of each layer are those that the already quantized layers before
//! it produce. Only one layer's Hessians are held at a time; modules that read the same input share
//! one. Every finished part goes to a [`PartStore`] at once; a job that finds parts there takes
//! them as they are and ends with the same result as one that was never interrupted.

mod awq;
mod collector;
mod measure;
mod run;

use marlin_ops::PathSearch;

use crate::exl3::Exl3Options;
use crate::fold::Fold;
use crate::part::{Notes, Part, QuantizedWeight};
use crate::plan::{Assignment, Module};
use crate::{AwqOptions, GptqOptions, Result, ScaleSearch};

pub use measure::{After, Measured, Mixture, measure_model};
pub use run::quantize_model;

/// What a source, a calibration or a store may fail with.
pub type SourceError = Box<dyn std::error::Error + Send + Sync>;

/// Where dense weights come from; read from several threads at once.
pub trait ModelSource: Sync {
    /// The dense weight of a module, `[out_features, in_features]` row-major.
    ///
    /// # Errors
    /// Whatever reading raises ends the job.
    fn weight(&self, module: &Module) -> std::result::Result<Vec<f32>, SourceError>;

    /// A vector by its full tensor name: the weight of a norm, a bias. Only AWQ reads them.
    ///
    /// # Errors
    /// Whatever reading raises ends the job.
    fn vector(&self, tensor: &str, len: usize) -> std::result::Result<Vec<f32>, SourceError>;
}

/// Where finished parts are kept, numbered from 0 without gaps in the order of quantization.
pub trait PartStore {
    /// Whether part `index` was stored before.
    fn contains(&self, index: usize) -> bool;

    /// A stored part.
    ///
    /// # Errors
    /// Whatever reading raises ends the job.
    fn load(&mut self, index: usize) -> std::result::Result<Part, SourceError>;

    /// Stores a part for good: once this returns, no interruption loses it.
    ///
    /// # Errors
    /// Whatever writing raises ends the job.
    fn store(&mut self, index: usize, part: &Part) -> std::result::Result<(), SourceError>;
}

/// Receives the inputs of linear layers.
pub trait ActivationSink {
    /// `values`, `[rows, columns]` row-major, is an input of the module called `module`.
    ///
    /// # Errors
    /// Non-finite values, or columns that differ from the module's in_features.
    fn activations(&mut self, module: &str, rows: usize, columns: usize, values: &[f32]) -> Result<()>;
}

/// The weight that a module of the current layer has from now on.
#[derive(Clone, Debug, PartialEq)]
pub enum Replacement {
    /// The quantized weight itself.
    Quantized(QuantizedWeight),
    /// Its effect between unchanged neighbours, `[out_features, in_features]` row-major: its
    /// neighbours' channel scales are folded in.
    Dense(Vec<f32>),
}

/// A model that runs calibration text one decoder layer at a time.
pub trait Calibration {
    /// Decoder layers.
    fn num_layers(&self) -> usize;

    /// Makes decoder layer `index` the current one.
    ///
    /// # Errors
    /// Whatever loading raises ends the job.
    fn load_layer(&mut self, index: usize) -> std::result::Result<(), SourceError>;

    /// Runs the current layer on all calibration text and reports the inputs of its linear
    /// layers; modules with a common parent that read the same input report it one after the
    /// other.
    ///
    /// # Errors
    /// Whatever running raises ends the job.
    fn observe(&mut self, sink: &mut dyn ActivationSink) -> std::result::Result<(), SourceError>;

    /// Gives a module of the current layer its quantized weight.
    ///
    /// # Errors
    /// Whatever replacing raises ends the job.
    fn replace(&mut self, module: &Module, weight: Replacement) -> std::result::Result<(), SourceError>;

    /// Moves past the current layer with the weights it has now.
    ///
    /// # Errors
    /// Whatever running raises ends the job.
    fn advance(&mut self) -> std::result::Result<(), SourceError>;

    /// After the last layer: reports the input of `lm_head`.
    ///
    /// # Errors
    /// Whatever running raises ends the job.
    fn observe_head(&mut self, sink: &mut dyn ActivationSink) -> std::result::Result<(), SourceError>;
}

/// How weights become codes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// Round to nearest.
    Rtn(ScaleSearch),
    /// GPTQ for the decoder's linear layers and `lm_head`. Embeddings and routers, and experts that
    /// no calibration row reached, are rounded to nearest with the same scale search.
    Gptq(GptqOptions),
    /// AWQ for the decoder's linear layers, with channel scales where [`Settings::folds`] permits
    /// them. Other modules, and experts that no calibration row reached, are rounded to nearest.
    Awq(AwqOptions),
    /// EXL3; codebook and bits are those of each module's target. Modules outside the decoder's
    /// linear layers and `lm_head`, and experts that no calibration row reached, are quantized
    /// without a Hessian.
    Exl3(Exl3Options),
}

/// What happens, as it happens; for progress displays.
#[derive(Clone, Copy, Debug)]
pub enum Event<'a> {
    /// Calibration text runs through decoder layer `layer` of `layers`.
    Calibrating {
        /// Index of the layer.
        layer: usize,
        /// Decoder layers.
        layers: usize,
    },
    /// A module was quantized.
    Quantized {
        /// The module.
        module: &'a Module,
    },
    /// A stored part was taken over.
    Restored {
        /// Its weights.
        weights: u64,
    },
}

/// What a job did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Parts in the store.
    pub parts: usize,
    /// Those of them that an earlier run left there.
    pub restored: usize,
    /// Quantized modules.
    pub modules: usize,
    /// Their weights.
    pub weights: u64,
    /// Their stored bits, scales and padding included.
    pub bits: f64,
    /// For the user.
    pub notes: Notes,
}

impl Summary {
    /// Stored bits a quantized weight; 0 when nothing was quantized.
    pub fn bits_per_weight(&self) -> f64 {
        match self.weights {
            0 => 0.0,
            weights => self.bits / weights as f64,
        }
    }
}

/// Everything a job is told but for the model.
#[derive(Clone, Copy)]
pub struct Settings<'a> {
    /// What happens to each module; those without a target are left alone.
    pub assignments: &'a [Assignment],
    /// How weights become codes.
    pub method: Method,
    /// Where [`Method::Awq`] may fold channel scales; a module reads one fold at most, and precedes
    /// one at most.
    pub folds: &'a [Fold],
    /// Where [`Method::Exl3`] searches for codes; on the CPU if nowhere else.
    pub search: Option<&'a dyn PathSearch>,
}

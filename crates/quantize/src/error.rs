//! Errors of the quantizers.

use marlin_formats::FormatError;
use marlin_ops::OpError;

/// The result of every quantizer.
pub type Result<T> = std::result::Result<T, QuantizeError>;

/// Why a weight, an activation or a plan was refused.
#[derive(Debug, thiserror::Error)]
pub enum QuantizeError {
    /// A weight, scale, group size or shape that the format layer refuses.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// A buffer whose length contradicts the shape.
    #[error("{what} holds {found} elements, expected {expected}")]
    Length {
        /// Which buffer.
        what: &'static str,
        /// Elements required by the shape.
        expected: usize,
        /// Elements found.
        found: usize,
    },
    /// A Hessian of another width than the weight.
    #[error("the Hessian covers {hessian} input features, the weight has {weight}")]
    Features {
        /// Width of the Hessian.
        hessian: usize,
        /// K of the weight.
        weight: usize,
    },
    /// A Hessian that would not fit the address space.
    #[error("a Hessian of {features} input features is not possible")]
    HessianSize {
        /// The requested width.
        features: usize,
    },
    /// A NaN or infinity among the calibration activations.
    #[error("calibration activation [row {row}, feature {feature}] is {value}")]
    NonFiniteActivation {
        /// Row since the Hessian was created.
        row: u64,
        /// Input feature.
        feature: usize,
        /// The offending value.
        value: f32,
    },
    /// Activations so large that their squares leave f32.
    #[error("the Hessian is not finite at input feature {feature}: the activations are too large")]
    NonFiniteHessian {
        /// Input feature.
        feature: usize,
    },
    /// GPTQ without a single calibration row.
    #[error("the Hessian has no calibration rows")]
    NoCalibrationRows,
    /// An option outside its range.
    #[error("{option} is {value}; it must be {rule}")]
    Option {
        /// Name of the option.
        option: &'static str,
        /// The value that was given.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
    /// Damping up to the limit did not make the Hessian positive definite.
    #[error("the Hessian is not positive definite even with damping {damping} of its mean diagonal")]
    NotPositiveDefinite {
        /// The largest damping that was tried.
        damping: f64,
    },
    /// The compensated weights of a row left the finite range.
    #[error("error compensation diverged in output feature {n}; raise the damping")]
    Diverged {
        /// Output feature.
        n: usize,
    },
    /// A pattern, override or scheme that cannot be read.
    #[error("{what} `{text}`: {reason}")]
    Syntax {
        /// What was being read.
        what: &'static str,
        /// The text.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An option of the plan that selects nothing in this model.
    #[error("{option} matches no weight matrix of the model")]
    NothingMatched {
        /// The option with its value.
        option: String,
    },
    /// A module that cannot be stored in the format chosen for it.
    #[error("module `{module}` [out_features={out_features}, in_features={in_features}]: {source}")]
    Module {
        /// Module path.
        module: String,
        /// N.
        out_features: usize,
        /// K.
        in_features: usize,
        /// What is wrong.
        source: Box<QuantizeError>,
    },
    /// Activations for a module that the layer does not have, or of the wrong width.
    #[error("calibration of module `{module}`: {reason}")]
    Calibration {
        /// Module path.
        module: String,
        /// What is wrong.
        reason: String,
    },
    /// A stored part that is not one of this job.
    #[error("stored part {index} does not belong to this job: {reason}")]
    StoredPart {
        /// Index of the part.
        index: usize,
        /// What is wrong.
        reason: String,
    },
    /// The device that searches for codes failed.
    #[error(transparent)]
    Device(#[from] OpError),
    /// Reading the model or writing the result failed.
    #[error(transparent)]
    Source(Box<dyn std::error::Error + Send + Sync>),
}

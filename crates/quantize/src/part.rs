//! What the steps of a job make.

use marlin_formats::exl3::Exl3Matrix;
use marlin_formats::{FormatError, QuantizedMatrix};
use serde::{Deserialize, Serialize};

use crate::plan::Target;

/// A quantized weight in the form that is stored.
#[derive(Clone, Debug, PartialEq)]
pub enum QuantizedWeight {
    /// Codes with scales by groups along K.
    Grouped(QuantizedMatrix),
    /// An EXL3 trellis.
    Exl3(Exl3Matrix),
}

impl QuantizedWeight {
    /// N.
    pub fn out_features(&self) -> usize {
        match self {
            Self::Grouped(matrix) => matrix.out_features,
            Self::Exl3(matrix) => matrix.out_features,
        }
    }

    /// K.
    pub fn in_features(&self) -> usize {
        match self {
            Self::Grouped(matrix) => matrix.in_features,
            Self::Exl3(matrix) => matrix.in_features,
        }
    }

    /// What it was quantized to.
    pub fn target(&self) -> Target {
        match self {
            Self::Grouped(matrix) => Target::Grouped(matrix.scheme),
            Self::Exl3(matrix) => Target::Exl3 { codebook: matrix.codebook, bits: matrix.bits },
        }
    }

    /// Stored bits (codes with padding, scales) divided by `K * N`.
    pub fn bits_per_weight(&self) -> f64 {
        match self {
            Self::Grouped(matrix) => matrix.scheme.bits_per_weight(matrix.in_features, matrix.out_features),
            Self::Exl3(matrix) => matrix.bits_per_weight(),
        }
    }

    /// Checks lengths and scales.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), FormatError> {
        match self {
            Self::Grouped(matrix) => matrix.validate(),
            Self::Exl3(matrix) => matrix.validate(),
        }
    }

    /// The decoded weight, `[N, K]` row-major.
    ///
    /// # Errors
    /// As [`QuantizedWeight::validate`].
    pub fn decode(&self) -> Result<Vec<f32>, FormatError> {
        match self {
            Self::Grouped(matrix) => matrix.decode(),
            Self::Exl3(matrix) => matrix.decode(),
        }
    }
}

/// A stored tensor's new values.
#[derive(Clone, Debug, PartialEq)]
pub struct Changed {
    /// Full tensor name, such as `model.layers.0.input_layernorm.weight`.
    pub tensor: String,
    /// Dimensions, slowest first.
    pub dims: Vec<usize>,
    /// Row-major values.
    pub values: Vec<f32>,
}

/// What a user should know about modules that calibration served badly.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Notes {
    /// Modules meant for calibration that no calibration row reached; they were quantized without.
    pub without_rows: Vec<String>,
    /// Modules calibrated on fewer than K/8 rows, with their rows.
    pub few_rows: Vec<(String, u64)>,
    /// Modules whose Hessian needed more damping than asked for, with the damping used.
    pub damped: Vec<(String, f64)>,
}

/// What one step of a job made: a decoder layer, `lm_head`, or matrices outside the layers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Part {
    /// Quantized modules by path, in the order of quantization.
    pub weights: Vec<(String, QuantizedWeight)>,
    /// Tensors that stay unquantized with other values than the model's.
    pub changed: Vec<Changed>,
    /// The channel scales of each [`Fold`](crate::Fold) of the layer, empty where it was left alone.
    pub scales: Vec<Vec<f32>>,
    /// For the user.
    pub notes: Notes,
}

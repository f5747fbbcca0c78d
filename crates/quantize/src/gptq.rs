//! GPTQ: quantization by sequential elimination (Frantar et al., "GPTQ: Accurate Post-Training
//! Quantization for Generative Pre-trained Transformers", 2022).
//!
//! The input features of a layer are quantized one after the other; the error of each is spread
//! over the features still to come so that the layer's output on the calibration inputs changes
//! least. With `H^-1 = U^T U`, `U` upper triangular, feature `i` with error
//! `e = (w_i - q_i) / U_ii` changes every later weight by `w_j -= e * U_ij`. Within a block of
//! features this happens at once, beyond it once a block, as one matrix product.

mod elimination;
mod factor;
pub(crate) mod triangular;

use marlin_formats::{QuantizedMatrix, Scheme};

use crate::rtn::check_weight;
use crate::scale::ScaleSearch;
use crate::{Hessian, QuantizeError, Result};

pub use factor::{InverseFactor, MAX_DAMPING};

/// How GPTQ runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GptqOptions {
    /// Added to the Hessian's diagonal, as a fraction of its mean over live channels. Raised
    /// tenfold, at most to [`MAX_DAMPING`], while the Hessian is not positive definite.
    pub damping: f64,
    /// Features eliminated between two lazy updates of the rest.
    pub block: usize,
    /// Eliminate in order of descending Hessian diagonal. Group parameters are then fitted
    /// beforehand from the original weights, so that groups stay contiguous along K; otherwise
    /// each group is fitted from the compensated weights when its first feature is reached.
    pub act_order: bool,
    /// How group scales are chosen; squared errors are weighted by `1 / U_kk^2`, the share of
    /// each feature in the loss.
    pub scale_search: ScaleSearch,
}

impl Default for GptqOptions {
    fn default() -> Self {
        Self { damping: 0.01, block: 128, act_order: true, scale_search: ScaleSearch::Mse }
    }
}

impl GptqOptions {
    /// Checks the ranges of the options.
    ///
    /// # Errors
    /// [`QuantizeError::Option`] for a damping outside `[0, 1]` or an empty block.
    pub fn validate(&self) -> Result<()> {
        if !(0.0..=MAX_DAMPING).contains(&self.damping) {
            return Err(QuantizeError::Option {
                option: "damping",
                value: self.damping.to_string(),
                rule: "between 0 and 1",
            });
        }
        if self.block == 0 {
            return Err(QuantizeError::Option { option: "block", value: self.block.to_string(), rule: "at least 1" });
        }
        Ok(())
    }
}

/// A weight quantized by GPTQ.
#[derive(Clone, Debug, PartialEq)]
pub struct Gptq {
    /// The result, in the layout of every other quantizer.
    pub matrix: QuantizedMatrix,
    /// `tr((W - Q) (H + damping) (W - Q)^T)` with the damped Hessian, the weights of dead channels
    /// taken as 0.
    pub loss: f64,
}

/// Quantizes `weight`, `[out_features, in_features]` row-major, against the Hessian of its inputs.
///
/// Channels that no calibration row used (`H_kk = 0`) are quantized as if their weights were 0.
///
/// # Errors
/// As [`InverseFactor::new`] and [`InverseFactor::quantize`].
pub fn gptq(
    scheme: Scheme,
    weight: &[f32],
    out_features: usize,
    in_features: usize,
    hessian: &Hessian,
    options: &GptqOptions,
) -> Result<Gptq> {
    check_weight(scheme, weight, out_features, in_features)?;
    check_features(hessian.features(), in_features)?;
    InverseFactor::new(hessian, options)?.quantize(scheme, weight, out_features, in_features)
}

fn check_features(hessian: usize, weight: usize) -> Result<()> {
    if hessian == weight { Ok(()) } else { Err(QuantizeError::Features { hessian, weight }) }
}

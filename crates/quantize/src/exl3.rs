//! EXL3: trellis-coded weights of 1 to 8 bits (QTIP, Tseng et al. 2024, in the variant of ExLlamaV3).
//!
//! A weight is scaled and rotated until its elements look like independent normal values, then quantized in tiles of
//! 16 x 16: a Viterbi search finds the path through the trellis closest to the tile, and block LDLQ (Chee et al., "QuIP",
//! 2023) moves the error of each row of tiles to the rows still to come, as GPTQ does feature by feature.
//!
//! - [`Exl3Inputs`]: signs and factored Hessian of one input, shared by all weights that read it;
//! - [`exl3()`]: quantizes one weight;
//! - [`allocate_bits`]: whole bit rates whose average is a fractional one;
//! - [`Encoder`]: the search in one tile.

mod aligned;
mod allocation;
mod global_scale;
mod incoherence;
mod inputs;
mod ldl;
mod ldlq;
mod search;
mod signs;
mod step;
mod viterbi;

use half::f16;
use marlin_formats::FormatError;
use marlin_formats::exl3::{Codebook, Exl3Matrix};
use marlin_ops::PathSearch;

use crate::{QuantizeError, Result};

pub use allocation::{BitGroup, allocate_bits};
pub use inputs::Exl3Inputs;
pub use step::Isa;
pub use viterbi::{Encoder, Workspace};

/// Whether the columns of a weight are brought to the same size before it is quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OutputScales {
    /// Always.
    Always,
    /// Unless few input features dominate: the largest 2 % of `sqrt(diag H)` hold at least 15 % of their sum.
    Auto,
    /// Never.
    Never,
}

/// How a weight is quantized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Exl3Options {
    /// State to value.
    pub codebook: Codebook,
    /// Bits a weight, 1 to 8.
    pub bits: u32,
    /// Added to the Hessian's diagonal, as a fraction of its mean.
    pub sigma: f64,
    /// Key of the random signs, with the names of the input and of the module.
    pub seed: u64,
    /// Scales of the output features.
    pub output_scales: OutputScales,
}

impl Default for Exl3Options {
    fn default() -> Self {
        Self { codebook: Codebook::Mul1, bits: 4, sigma: 0.025, seed: 0, output_scales: OutputScales::Always }
    }
}

impl Exl3Options {
    /// Checks the ranges of the options.
    ///
    /// # Errors
    /// [`FormatError::TrellisBits`] and, for a sigma outside `[0, 1]`, [`QuantizeError::Option`].
    pub fn validate(&self) -> Result<()> {
        if !(1..=8).contains(&self.bits) {
            return Err(FormatError::TrellisBits { bits: self.bits }.into());
        }
        if !(0.0..=1.0).contains(&self.sigma) {
            return Err(QuantizeError::Option {
                option: "sigma",
                value: self.sigma.to_string(),
                rule: "between 0 and 1",
            });
        }
        Ok(())
    }
}

/// A weight quantized to EXL3.
#[derive(Clone, Debug, PartialEq)]
pub struct Exl3 {
    /// The result.
    pub matrix: Exl3Matrix,
    /// `tr(E^T H E) / tr(W^T H W)` of the rotated and scaled weight `W [K, N]` with its error `E` and the rotated and damped
    /// Hessian `H`, the identity without calibration; 0 for a weight of zeros.
    pub proxy_error: f64,
    /// What the normalized weight was multiplied by to suit the codebook.
    pub global_scale: f32,
}

/// Quantizes `weight`, `[out_features, in_features]` row-major, whose input is `inputs`. `module` and the seed choose the
/// signs of the outputs. Paths are searched on `device`, or on the CPU without one: they are the same but where costs
/// differ by their rounding.
///
/// # Errors
/// A NaN or infinite weight with its index, a wrong length or shape, inputs of another width, options out of range, a scale
/// beyond f16, [`QuantizeError::Diverged`], a failure of the device.
pub fn exl3(
    device: Option<&dyn PathSearch>,
    inputs: &Exl3Inputs,
    module: &str,
    weight: &[f32],
    out_features: usize,
    in_features: usize,
    options: &Exl3Options,
) -> Result<Exl3> {
    options.validate()?;
    incoherence::check_weight(weight, out_features, in_features)?;
    if inputs.features() != in_features {
        return Err(QuantizeError::Features { hessian: inputs.features(), weight: in_features });
    }
    let scaled = match options.output_scales {
        OutputScales::Always => true,
        OutputScales::Auto => !inputs.is_concentrated(),
        OutputScales::Never => false,
    };
    let signs = signs::outputs(options.seed, module, out_features.next_multiple_of(marlin_formats::exl3::HADAMARD));
    let mut normal = incoherence::normalize(weight, in_features, inputs.signs(), &signs, scaled)?;
    let search = search::Search::new(options.codebook, options.bits, device);
    let global_scale = global_scale::find(&search, &normal.inner)?;
    normal.inner.scale(global_scale);
    let suh = normal.su.iter().map(|su| stored_scale(su / f64::from(global_scale))).collect::<Result<_>>()?;
    let coded = ldlq::quantize(inputs.factor(), &search, &normal.inner)?;
    let matrix = Exl3Matrix {
        codebook: options.codebook,
        bits: options.bits,
        in_features,
        out_features,
        trellis: coded.trellis,
        suh,
        svh: normal.svh,
    };
    Ok(Exl3 { matrix, proxy_error: coded.proxy_error, global_scale })
}

/// The bits of a scale in f16, the smallest value of its sign instead of 0.
fn stored_scale(scale: f64) -> Result<u16> {
    let stored = f16::from_f64(scale);
    if !stored.is_finite() {
        return Err(FormatError::ScaleOverflow { ideal: scale as f32 }.into());
    }
    if stored.to_f64() == 0.0 && scale != 0.0 {
        return Ok(stored.to_bits() | 1);
    }
    Ok(stored.to_bits())
}

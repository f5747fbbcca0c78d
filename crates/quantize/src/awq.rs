//! Activation-aware scales (Lin et al., "AWQ: Activation-aware Weight Quantization for On-Device
//! LLM Compression and Acceleration", 2023).
//!
//! Rounding errors of a channel count as much as its activations are large. Multiplying the
//! channel's weights by `t` and dividing its activations by `t` makes its errors smaller at the
//! expense of the others in its groups. `t` is a power of the activations' mean magnitude, the
//! exponent found by search against the error of the layer's output.

use ndarray::linalg::general_mat_mul;
use rayon::prelude::*;

use crate::dense::{view, view_mut};
use crate::plan::Module;
use crate::rtn::rtn;
use crate::{Hessian, QuantizeError, Result, ScaleSearch};
use marlin_formats::Scheme;

/// How AWQ runs.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AwqOptions {
    /// Exponents tried: `i / exponents` for `i` below this number, and no scales at all.
    pub exponents: usize,
    /// How group scales are chosen once the channel scales are found: [`ScaleSearch::Mse`] is a
    /// search for clipping ranges, squared errors weighted by the mean square of each channel's
    /// activation.
    pub scale_search: ScaleSearch,
}

impl Default for AwqOptions {
    fn default() -> Self {
        Self { exponents: 20, scale_search: ScaleSearch::Mse }
    }
}

impl AwqOptions {
    /// Checks the ranges of the options.
    ///
    /// # Errors
    /// [`QuantizeError::Option`] without an exponent.
    pub fn validate(&self) -> Result<()> {
        match self.exponents {
            0 => Err(QuantizeError::Option { option: "exponents", value: "0".into(), rule: "at least 1" }),
            _ => Ok(()),
        }
    }
}

/// The smallest scale before normalization.
const SMALLEST: f64 = 1e-4;

/// Rows of an error matrix multiplied at once by one task.
const ROWS: usize = 64;

/// Inputs of the layers that share scales.
pub(crate) struct Inputs<'a> {
    pub(crate) hessian: &'a Hessian,
    /// Mean magnitude of each channel.
    pub(crate) mean_abs: &'a [f64],
}

/// A quantized layer whose columns are to be scaled.
pub(crate) struct Reader<'a> {
    pub(crate) module: &'a Module,
    pub(crate) scheme: Scheme,
    pub(crate) inputs: Inputs<'a>,
}

/// The scales `[K]` with the smallest output error summed over the readers' calibration rows, or
/// `None` when no scales are better than those found. `weight` gives a reader's `[N, K]`.
pub(crate) fn search(
    readers: &[Reader<'_>],
    options: &AwqOptions,
    weight: &(dyn Fn(&Module) -> Result<Vec<f32>> + Sync),
) -> Result<Option<Vec<f32>>> {
    let Some(first) = readers.first() else {
        return Ok(None);
    };
    let k = first.module.in_features;
    let mut magnitude = vec![0.0; k];
    let mut shares = vec![0.0; k];
    let (mut rows, mut outputs) = (0.0, 0.0);
    for Reader { module, scheme, inputs } in readers {
        let weight = weight(module)?;
        for (sum, mean) in magnitude.iter_mut().zip(inputs.mean_abs) {
            *sum += mean * inputs.hessian.rows() as f64;
        }
        rows += inputs.hessian.rows() as f64;
        add_shares(&weight, scheme.group_size, &mut shares);
        outputs += module.out_features as f64;
    }
    magnitude.iter_mut().for_each(|value| *value /= rows);
    shares.iter_mut().for_each(|value| *value /= outputs);

    let candidates: Vec<Vec<f32>> =
        (0..options.exponents).map(|i| scales(&magnitude, &shares, i as f64 / options.exponents as f64)).collect();
    let ones = vec![1.0; k];
    let mut losses = vec![0.0; candidates.len() + 1];
    for reader in readers {
        let weight = weight(reader.module)?;
        let hessian = reader.inputs.hessian.symmetric();
        let found: Vec<Result<f64>> = std::iter::once(&ones)
            .chain(&candidates)
            .collect::<Vec<_>>()
            .into_par_iter()
            .map(|scales| output_error(&weight, scales, reader, &hessian))
            .collect();
        for (sum, loss) in losses.iter_mut().zip(found) {
            *sum += loss? * reader.inputs.hessian.rows() as f64;
        }
    }
    let mut best = 0;
    for (i, loss) in losses.iter().enumerate() {
        if *loss < losses[best] {
            best = i;
        }
    }
    Ok(best.checked_sub(1).map(|i| candidates[i].clone()))
}

/// `t = x^a / (w^(1 - a) + 1e-4)`, normalized so that the largest and the smallest are reciprocal.
fn scales(magnitude: &[f64], shares: &[f64], exponent: f64) -> Vec<f32> {
    let raw = |(x, w): (&f64, &f64)| (x.powf(exponent) / (w.powf(1.0 - exponent) + 1e-4)).max(SMALLEST);
    let raw: Vec<f64> = magnitude.iter().zip(shares).map(raw).collect();
    let (min, max) = raw.iter().fold((f64::INFINITY, 0.0f64), |(min, max), &t| (min.min(t), max.max(t)));
    let middle = (min * max).sqrt();
    raw.into_iter().map(|t| (t / middle) as f32).collect()
}

/// Adds each weight's magnitude as a share of the largest of its group, summed over the outputs.
fn add_shares(weight: &[f32], group_size: usize, sums: &mut [f64]) {
    for row in weight.chunks_exact(sums.len()) {
        for (group, sums) in row.chunks(group_size).zip(sums.chunks_mut(group_size)) {
            let largest = group.iter().fold(0.0f32, |max, w| max.max(w.abs()));
            if largest > 0.0 {
                for (sum, w) in sums.iter_mut().zip(group) {
                    *sum += f64::from(w.abs() / largest);
                }
            }
        }
    }
}

/// `tr(E H E^T)` with `E` the error of rounding the scaled weight, scales undone.
fn output_error(weight: &[f32], scales: &[f32], reader: &Reader<'_>, hessian: &[f32]) -> Result<f64> {
    let k = scales.len();
    let scaled: Vec<f32> = weight.chunks_exact(k).flat_map(|row| row.iter().zip(scales).map(|(w, t)| w * t)).collect();
    let matrix = rtn(reader.scheme, &scaled, reader.module.out_features, k, ScaleSearch::Range)?;
    drop(scaled);
    let mut error = matrix.decode()?;
    for (error, row) in error.chunks_exact_mut(k).zip(weight.chunks_exact(k)) {
        for ((e, w), t) in error.iter_mut().zip(row).zip(scales) {
            *e = *e / t - w;
        }
    }
    Ok(quadratic_error(&error, hessian, k))
}

/// `tr(E H E^T)` of the errors `[N, K]` with the whole symmetric `H [K, K]`.
pub(crate) fn quadratic_error(error: &[f32], hessian: &[f32], k: usize) -> f64 {
    let of_rows = |error: &[f32]| {
        let mut product = vec![0.0f32; error.len()];
        general_mat_mul(1.0, &view(error, k), &view(hessian, k), 0.0, &mut view_mut(&mut product, k));
        error.iter().zip(&product).map(|(&e, &p)| f64::from(e) * f64::from(p)).sum::<f64>()
    };
    let losses: Vec<f64> = error.par_chunks(ROWS * k).map(of_rows).collect();
    losses.iter().sum()
}

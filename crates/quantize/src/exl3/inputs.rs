//! What all weights that read the same input share: its signs and its factored Hessian.

use marlin_formats::FormatError;
use marlin_formats::exl3::{HADAMARD, hadamard};
use rayon::prelude::*;

use super::ldl::BlockLdl;
use super::{Exl3Options, signs};
use crate::{Hessian, QuantizeError, Result};

/// How often the damping may be raised.
const RETRIES: u32 = 10;

/// A mean diagonal below this one counts as no calibration.
const SMALLEST_MEAN: f64 = 1e-20;

/// The smallest pivot, as a fraction of the mean diagonal, that counts as positive.
const SMALLEST_PIVOT: f64 = 1e-10;

/// Signs and rotated Hessian of one input.
#[derive(Clone, Debug)]
pub struct Exl3Inputs {
    features: usize,
    /// `[K]`, padded, 1 and -1.
    signs: Vec<f64>,
    factor: Option<BlockLdl>,
    concentrated: bool,
}

impl Exl3Inputs {
    /// Damps, rotates and factors the Hessian of the input `name`; `options` give sigma and the seed of the signs.
    ///
    /// A Hessian without rows, with a mean diagonal below 1e-20 or with a diagonal that is not finite counts as none, see
    /// [`Exl3Inputs::is_calibrated`].
    ///
    /// # Errors
    /// [`QuantizeError::NotPositiveDefinite`] when ten rises of the damping do not suffice, options out of range, a size
    /// beyond the address space.
    pub fn new(hessian: &Hessian, name: &str, options: &Exl3Options) -> Result<Self> {
        let mut inputs = Self::uncalibrated(hessian.features(), name, options)?;
        let diagonal = hessian.diagonal();
        let mean = diagonal.iter().sum::<f64>() / diagonal.len() as f64;
        if hessian.rows() == 0 || mean < SMALLEST_MEAN || !mean.is_finite() {
            return Ok(inputs);
        }
        inputs.concentrated = is_concentrated(diagonal.iter().map(|d| d + options.sigma * mean));
        for retry in 0..=RETRIES {
            let damping = options.sigma * f64::from(1 + 2 * retry);
            let rotated = rotate(hessian, &inputs.signs, damping * mean);
            inputs.factor = BlockLdl::new(rotated, inputs.signs.len(), SMALLEST_PIVOT * mean);
            if inputs.factor.is_some() {
                return Ok(inputs);
            }
        }
        Err(QuantizeError::NotPositiveDefinite { damping: options.sigma * f64::from(1 + 2 * RETRIES) })
    }

    /// An input of `features` without calibration: the errors of a weight count alike, and none is moved.
    ///
    /// # Errors
    /// Options out of range, a shape without elements or beyond the address space.
    pub fn uncalibrated(features: usize, name: &str, options: &Exl3Options) -> Result<Self> {
        options.validate()?;
        let padded = features.checked_next_multiple_of(HADAMARD).filter(|_| features > 0);
        let padded = padded.filter(|&k| k.checked_mul(k).is_some_and(|count| count <= isize::MAX as usize / 8));
        let padded = padded.ok_or(FormatError::Shape { out_features: 1, in_features: features })?;
        let signs = signs::inputs(options.seed, name, padded);
        Ok(Self { features, signs, factor: None, concentrated: false })
    }

    /// K.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Whether errors are weighted with a Hessian.
    pub fn is_calibrated(&self) -> bool {
        self.factor.is_some()
    }

    pub(super) fn signs(&self) -> &[f64] {
        &self.signs
    }

    pub(super) fn factor(&self) -> Option<&BlockLdl> {
        self.factor.as_ref()
    }

    /// Whether few features dominate, see [`super::OutputScales::Auto`].
    pub(super) fn is_concentrated(&self) -> bool {
        self.concentrated
    }
}

fn is_concentrated(diagonal: impl Iterator<Item = f64>) -> bool {
    let mut sizes: Vec<f64> = diagonal.map(f64::sqrt).collect();
    sizes.sort_by(|a, b| b.total_cmp(a));
    let largest = sizes.len().div_ceil(50);
    sizes[..largest].iter().sum::<f64>() >= 0.15 * sizes.iter().sum::<f64>()
}

/// `H diag(signs) (hessian + damping) diag(signs) H`, `[K, K]` padded, its lower triangle only.
fn rotate(hessian: &Hessian, signs: &[f64], damping: f64) -> Vec<f64> {
    let k = signs.len();
    let mut rotated = vec![0.0; k * k];
    rotated.par_chunks_exact_mut(HADAMARD * k).enumerate().for_each(|(b, panel)| {
        let first_row = b * HADAMARD;
        for first_column in (0..=first_row).step_by(HADAMARD) {
            let mut block: Vec<[f64; HADAMARD]> = (first_row..first_row + HADAMARD)
                .map(|i| {
                    let mut row = std::array::from_fn(|j| damped(hessian, signs, damping, i, first_column + j));
                    hadamard(&mut row);
                    row
                })
                .collect();
            (0..HADAMARD).for_each(|column| {
                let mut values: [f64; HADAMARD] = std::array::from_fn(|row| block[row][column]);
                hadamard(&mut values);
                block.iter_mut().zip(values).for_each(|(row, value)| row[column] = value);
            });
            for (row, values) in panel.chunks_exact_mut(k).zip(&block) {
                row[first_column..first_column + HADAMARD].copy_from_slice(values);
            }
        }
    });
    rotated
}

/// An element of the damped Hessian with signs; beyond the features only the damping is left.
fn damped(hessian: &Hessian, signs: &[f64], damping: f64, i: usize, j: usize) -> f64 {
    let inside = i.max(j) < hessian.features();
    let value = if inside { hessian.at(i, j) * signs[i] * signs[j] } else { 0.0 };
    if i == j { value + damping } else { value }
}

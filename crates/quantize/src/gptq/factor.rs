//! The triangular factor of the inverse Hessian.

use std::cmp::Reverse;

use rayon::prelude::*;

use super::GptqOptions;
use super::triangular::{cholesky, invert_lower};
use crate::{Hessian, QuantizeError, Result};

/// The largest damping, as a fraction of the mean diagonal.
pub const MAX_DAMPING: f64 = 1.0;

/// The first damping after a failure without any.
const MIN_DAMPING: f64 = 1e-6;

/// The smallest pivot, as a fraction of the mean diagonal, that counts as positive: anything below
/// is rounding noise of a singular Hessian.
const SMALLEST_PIVOT: f64 = 1e-10;

/// `U`, upper triangular with `U^T U = (P H P^T + damping)^-1`, and the elimination order `P`.
///
/// Layers that read the same inputs share one factor.
#[derive(Clone, Debug)]
pub struct InverseFactor {
    pub(super) options: GptqOptions,
    /// Input feature eliminated at each step.
    pub(super) order: Vec<usize>,
    /// By input feature: no calibration row used it.
    pub(super) dead: Vec<bool>,
    /// `U`, `[K, K]` row-major, in elimination order.
    pub(super) upper: Vec<f32>,
    /// `1 / U_kk^2` by input feature: the loss of a unit error there.
    pub(super) importance: Vec<f32>,
    damping: f64,
}

impl InverseFactor {
    /// Damps the Hessian, orders its features and factors its inverse.
    ///
    /// # Errors
    /// [`QuantizeError::NoCalibrationRows`], [`QuantizeError::NonFiniteHessian`],
    /// [`QuantizeError::NotPositiveDefinite`] when [`MAX_DAMPING`] does not suffice, and options
    /// out of range.
    pub fn new(hessian: &Hessian, options: &GptqOptions) -> Result<Self> {
        options.validate()?;
        if hessian.rows() == 0 {
            return Err(QuantizeError::NoCalibrationRows);
        }
        let diagonal = hessian.diagonal();
        if let Some(feature) = diagonal.iter().position(|d| !d.is_finite()) {
            return Err(QuantizeError::NonFiniteHessian { feature });
        }
        let dead: Vec<bool> = diagonal.iter().map(|&d| d == 0.0).collect();
        let order = elimination_order(&diagonal, options.act_order);
        let mean = mean_of_live(&diagonal);
        let mut damping = options.damping;
        let upper = loop {
            match factor(hessian, &order, mean, damping) {
                Some(upper) => break upper,
                None if damping >= MAX_DAMPING => {
                    return Err(QuantizeError::NotPositiveDefinite { damping });
                }
                None => damping = (damping * 10.0).clamp(MIN_DAMPING, MAX_DAMPING),
            }
        };
        let mut importance = vec![0.0; order.len()];
        for (step, &feature) in order.iter().enumerate() {
            let pivot = upper[step * order.len() + step];
            importance[feature] = if dead[feature] { 0.0 } else { (pivot * pivot).recip() };
        }
        Ok(Self { options: *options, order, dead, upper, importance, damping })
    }

    /// K.
    pub fn features(&self) -> usize {
        self.order.len()
    }

    /// The damping that was needed, as a fraction of the mean diagonal.
    pub fn damping(&self) -> f64 {
        self.damping
    }
}

/// All features along K, or by descending diagonal with ties in order of K.
fn elimination_order(diagonal: &[f64], act_order: bool) -> Vec<usize> {
    let mut order: Vec<usize> = (0..diagonal.len()).collect();
    if act_order {
        // The bits of non-negative floats sort like their values.
        order.sort_by_key(|&k| Reverse(diagonal[k].to_bits()));
    }
    order
}

/// Mean of the non-zero diagonal elements; 1 when there are none.
fn mean_of_live(diagonal: &[f64]) -> f64 {
    let live = diagonal.iter().filter(|&&d| d > 0.0).count();
    if live == 0 {
        return 1.0;
    }
    diagonal.iter().sum::<f64>() / live as f64
}

/// `U` for the damped Hessian, or `None` when it is not positive definite or `U` leaves f32.
///
/// With the features reversed, `H = L L^T` gives `H^-1 = L^-T L^-1`, and `L^-1` reversed again is
/// the upper factor: one Cholesky and one triangular inverse, without forming `H^-1`.
fn factor(hessian: &Hessian, order: &[usize], mean: f64, damping: f64) -> Option<Vec<f32>> {
    let k = order.len();
    let reversed: Vec<usize> = order.iter().rev().copied().collect();
    let mut lower = vec![0.0; k * k];
    let rows = lower.par_chunks_exact_mut(k).enumerate();
    rows.for_each(|(i, row)| {
        for (h, &feature) in row[..=i].iter_mut().zip(&reversed) {
            *h = hessian.at(reversed[i], feature);
        }
        // A dead channel is coupled to nothing: any positive value does.
        row[i] = if row[i] == 0.0 { mean } else { row[i] } + damping * mean;
    });
    if !cholesky(&mut lower, k, SMALLEST_PIVOT * mean) {
        return None;
    }
    let inverse = invert_lower(&lower, k);
    let upper: Vec<f32> = inverse.par_iter().rev().map(|&value| value as f32).collect();
    upper.iter().all(|value| value.is_finite()).then_some(upper)
}

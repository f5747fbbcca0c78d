//! The Hessian of a linear layer's output error with respect to one row of its weight:
//! `H = X^T X / rows`, the same for every output feature.

use ndarray::linalg::general_mat_mul;
use ndarray::s;
use rayon::prelude::*;

use crate::dense::{view, view_mut};
use crate::{QuantizeError, Result};

/// Rows of the matrix that one task updates.
const PANEL: usize = 256;

/// Activation rows multiplied at once, so that f32 sums stay short.
const ROW_BLOCK: usize = 512;

/// Values that one task looks at for any that are not finite.
const CHECKED: usize = 1 << 16;

/// `X^T X` over the calibration inputs `X` of one linear layer.
///
/// Products and sums are f32. The result depends on how the rows were split into calls, not on
/// the number of threads.
#[derive(Clone, PartialEq)]
pub struct Hessian {
    features: usize,
    rows: u64,
    /// `[K, K]` row-major; only the lower triangle is meaningful.
    sum: Vec<f32>,
}

impl Hessian {
    /// The Hessian of a layer with `features` inputs, before any activation.
    ///
    /// # Errors
    /// [`QuantizeError::HessianSize`] for zero features or a matrix beyond the address space.
    pub fn new(features: usize) -> Result<Self> {
        let elements = features
            .checked_mul(features)
            .filter(|&count| count > 0 && count <= isize::MAX as usize / size_of::<f32>())
            .ok_or(QuantizeError::HessianSize { features })?;
        Ok(Self { features, rows: 0, sum: vec![0.0; elements] })
    }

    /// K.
    pub fn features(&self) -> usize {
        self.features
    }

    /// Activation rows seen so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Adds activation rows, `[rows, K]` row-major.
    ///
    /// # Errors
    /// [`QuantizeError::Length`] when the length is not a multiple of K, and
    /// [`QuantizeError::NonFiniteActivation`]; nothing is added then.
    pub fn accumulate(&mut self, activations: &[f32]) -> Result<()> {
        let k = self.features;
        let rows = activations.len() / k;
        if rows * k != activations.len() {
            return Err(QuantizeError::Length {
                what: "calibration activations",
                expected: (rows + 1) * k,
                found: activations.len(),
            });
        }
        let damaged = |part: &[f32]| part.iter().position(|v| !v.is_finite());
        let found = activations.par_chunks(CHECKED).any(|part| damaged(part).is_some());
        if let Some(index) = found.then(|| damaged(activations)).flatten() {
            return Err(QuantizeError::NonFiniteActivation {
                row: self.rows + (index / k) as u64,
                feature: index % k,
                value: activations[index],
            });
        }
        for block in activations.chunks(ROW_BLOCK * k) {
            let x = view(block, k);
            let panels = self.sum.par_chunks_mut(PANEL * k).enumerate();
            panels.for_each(|(p, panel)| {
                let first = p * PANEL;
                let width = first + panel.len() / k;
                let mut panel = view_mut(panel, k);
                let mut lower = panel.slice_mut(s![.., ..width]);
                let left = x.slice(s![.., first..width]);
                general_mat_mul(1.0, &left.t(), &x.slice(s![.., ..width]), 1.0, &mut lower);
            });
        }
        self.rows += rows as u64;
        Ok(())
    }

    /// `H[i, j]`, the mean over the rows; 0 before any row.
    pub fn at(&self, i: usize, j: usize) -> f64 {
        let (row, column) = (i.max(j), i.min(j));
        match self.rows {
            0 => 0.0,
            rows => f64::from(self.sum[row * self.features + column]) / rows as f64,
        }
    }

    /// Both triangles, `[K, K]` row-major.
    pub(crate) fn symmetric(&self) -> Vec<f32> {
        let k = self.features;
        let mut whole = vec![0.0; k * k];
        let rows = whole.par_chunks_exact_mut(k).enumerate();
        rows.for_each(|(i, row)| row.iter_mut().enumerate().for_each(|(j, h)| *h = self.at(i, j) as f32));
        whole
    }

    /// The diagonal, `E[x_k^2]`. A channel whose value is 0 never carried a signal.
    pub fn diagonal(&self) -> Vec<f64> {
        (0..self.features).map(|k| self.at(k, k)).collect()
    }
}

impl std::fmt::Debug for Hessian {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hessian(K={}, rows={})", self.features, self.rows)
    }
}

/// `tr((W - Q) H (W - Q)^T)`: the squared output error a mean calibration row suffers when `weight`
/// becomes `quantized`, summed over output features. Both are `[N, K]` row-major.
///
/// # Errors
/// [`QuantizeError::Length`] when the two lengths differ or are no multiple of K.
pub fn proxy_loss(hessian: &Hessian, weight: &[f32], quantized: &[f32]) -> Result<f64> {
    let k = hessian.features;
    let expected = weight.len() / k * k;
    for (what, found) in [("weight", weight.len()), ("quantized", quantized.len())] {
        if found != expected {
            return Err(QuantizeError::Length { what, expected, found });
        }
    }
    let row_losses: Vec<f64> = weight
        .par_chunks_exact(k)
        .zip(quantized.par_chunks_exact(k))
        .map(|(w, q)| {
            let difference: Vec<f64> = w.iter().zip(q).map(|(&w, &q)| f64::from(w) - f64::from(q)).collect();
            quadratic_form(hessian, &difference)
        })
        .collect();
    Ok(row_losses.iter().sum())
}

/// `d^T H d` from the lower triangle.
fn quadratic_form(hessian: &Hessian, d: &[f64]) -> f64 {
    (0..d.len())
        .map(|i| {
            let below: f64 = (0..i).map(|j| hessian.at(i, j) * d[j]).sum();
            d[i] * (2.0 * below + hessian.at(i, i) * d[i])
        })
        .sum()
}

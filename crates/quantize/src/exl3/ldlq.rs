//! Block LDLQ: rows of tiles from the last to the first, each compensating the errors of those below it.

use half::f16;
use marlin_formats::exl3::tile::{self, SIDE};
use ndarray::linalg::general_mat_mul;
use rayon::prelude::*;

use super::incoherence::Inner;
use super::ldl::BlockLdl;
use super::viterbi::{Encoder, Workspace, Workspaces};
use crate::dense::{view, view_mut};
use crate::{QuantizeError, Result};

/// A quantized matrix.
pub(super) struct Coded {
    /// `[K / 16, N / 16, 16 bits]` row-major.
    pub(super) trellis: Vec<u16>,
    /// `tr(E^T H E) / tr(W^T H W)`; 0 for a matrix of zeros.
    pub(super) proxy_error: f64,
}

/// Sixteen columns after quantization.
struct Column {
    /// `[K / 16, 16 bits]`.
    trellis: Vec<u16>,
    /// `tr(E^T H E)`.
    loss: f64,
    /// `tr(W^T H W)`.
    energy: f64,
}

/// Quantizes all tiles; without a factor each on its own, and `H` is the identity.
///
/// With `H = L D L^T`, `tr(E^T H E)` is the sum over blocks of rows `j` of `tr(r_j^T D_j r_j)`, `r = L^T E`: the choice of
/// block `j` cannot change the later terms, and `r_j` is the error of encoding `W_j + (L^T E)_j - E_j`. Columns do not
/// depend on each other.
pub(super) fn quantize(factor: Option<&BlockLdl>, encoder: &Encoder, inner: &Inner) -> Result<Coded> {
    let workspaces = Workspaces::new(encoder);
    let columns = (0..inner.columns / SIDE)
        .into_par_iter()
        .map(|c| workspaces.with(|workspace| quantize_column(factor, encoder, inner, c, workspace)))
        .collect::<Result<Vec<Column>>>()?;
    let words = tile::words(encoder.bits());
    let tiles =
        (0..inner.rows / SIDE).flat_map(|a| columns.iter().map(move |column| &column.trellis[a * words..][..words]));
    let trellis = tiles.flatten().copied().collect();
    let loss: f64 = columns.iter().map(|column| column.loss).sum();
    let energy: f64 = columns.iter().map(|column| column.energy).sum();
    Ok(Coded { trellis, proxy_error: if energy == 0.0 { 0.0 } else { loss / energy } })
}

/// Quantizes the sixteen columns from `16 c`.
fn quantize_column(
    factor: Option<&BlockLdl>,
    encoder: &Encoder,
    inner: &Inner,
    c: usize,
    workspace: &mut Workspace,
) -> Result<Column> {
    let words = tile::words(encoder.bits());
    let mut column = Column { trellis: vec![0; inner.rows / SIDE * words], loss: 0.0, energy: 0.0 };
    // Rows of sixteen errors, 0 until known, then sixteen weights.
    let mut rows: Vec<f32> =
        inner.column(c).flat_map(|weights| [0.0; SIDE].into_iter().chain(weights.iter().copied())).collect();
    for block in (0..inner.rows / SIDE).rev() {
        let (above, below) = rows.split_at_mut((block + 1) * SIDE * 2 * SIDE);
        let rows = &mut above[block * SIDE * 2 * SIDE..];
        let mut carried = [0.0f32; SIDE * 2 * SIDE];
        if let Some(factor) = factor.filter(|_| !below.is_empty()) {
            let panel = view(factor.panel(block), SIDE);
            general_mat_mul(1.0, &panel.t(), &view(below, 2 * SIDE), 0.0, &mut view_mut(&mut carried, 2 * SIDE));
        }
        let at = |row: usize, column: usize| row * 2 * SIDE + column;
        let mut target = [0.0; tile::WEIGHTS];
        for (p, target) in target.iter_mut().enumerate() {
            let (i, n) = tile::element(p);
            *target = rows[at(i, SIDE + n)] + carried[at(i, n)];
            if !f16::from_f32(*target).is_finite() {
                return Err(QuantizeError::Diverged { n: c * SIDE + n });
            }
        }
        let path = encoder.encode(&target, workspace);
        tile::pack(&path, encoder.bits(), &mut column.trellis[block * words..][..words])?;

        let mut error = [[0.0; SIDE]; SIDE];
        let mut energy = [[0.0; SIDE]; SIDE];
        for (p, (&word, target)) in path.iter().zip(target).enumerate() {
            let (i, n) = tile::element(p);
            let (weight, value) = (rows[at(i, SIDE + n)], encoder.value(word));
            error[i][n] = f64::from(target) - f64::from(value);
            energy[i][n] = f64::from(weight) + f64::from(carried[at(i, SIDE + n)]);
            rows[at(i, n)] = weight - value;
        }
        column.loss += weigh(factor, block, &error);
        column.energy += weigh(factor, block, &energy);
    }
    Ok(column)
}

fn weigh(factor: Option<&BlockLdl>, block: usize, x: &[[f64; SIDE]; SIDE]) -> f64 {
    match factor {
        Some(factor) => factor.weigh(block, x),
        None => x.as_flattened().iter().map(|x| x * x).sum(),
    }
}

#[cfg(test)]
mod tests {
    use marlin_formats::exl3::Codebook;

    use super::*;

    const K: usize = 128;

    /// Sums of twelve draws of a linear congruence, about normal.
    fn weights(mut state: u32, count: usize) -> Vec<f64> {
        let mut draw = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 16) / 65_536.0
        };
        (0..count).map(|_| (0..12).map(|_| draw()).sum::<f64>() - 6.0).collect()
    }

    fn hessian() -> Vec<f64> {
        let element = |i: usize, j: usize| 0.9f64.powi(i.abs_diff(j) as i32) + if i == j { 0.025 } else { 0.0 };
        (0..K * K).map(|i| element(i / K, i % K)).collect()
    }

    /// Mean squared error and `tr(E^T H E) / tr(W^T H W)`, from the decoded tiles alone.
    fn errors(coded: &Coded, weight: &[f64], h: &[f64]) -> (f64, f64) {
        let mut error = weight.to_vec();
        for (t, words) in coded.trellis.chunks_exact(tile::words(2)).enumerate() {
            for (p, state) in tile::states(words).unwrap().into_iter().enumerate() {
                let (row, column) = tile::element(p);
                let (k, n) = (t / (K / SIDE) * SIDE + row, t % (K / SIDE) * SIDE + column);
                error[k * K + n] -= Codebook::Mul1.value(state).to_f64();
            }
        }
        let form = |x: &[f64]| -> f64 {
            let row = |i: usize, j: usize| (0..K).map(|n| x[i * K + n] * x[j * K + n]).sum::<f64>();
            (0..K * K).map(|ij| h[ij] * row(ij / K, ij % K)).sum()
        };
        let squares: f64 = error.iter().map(|e| e * e).sum();
        (squares / (K * K) as f64, form(&error) / form(weight))
    }

    #[test]
    fn feedback_lowers_the_proxy_error_as_published() {
        let weight = weights(99, K * K);
        let inner = Inner::from_fn(K, K, |k, n| weight[k * K + n] as f32);
        let h = hessian();
        let encoder = Encoder::new(Codebook::Mul1, 2);

        let plain = quantize(None, &encoder, &inner).unwrap();
        let (mse, proxy) = errors(&plain, &weight, &h);
        assert!((mse - 0.0669).abs() < 5e-5 && (proxy - 0.0693).abs() < 5e-5, "mse {mse}, proxy error {proxy}");

        let factor = BlockLdl::new(h.clone(), K, 0.0).unwrap();
        let coded = quantize(Some(&factor), &encoder, &inner).unwrap();
        let (mse, proxy) = errors(&coded, &weight, &h);
        assert!((mse - 0.0780).abs() < 5e-5 && (proxy - 0.0572).abs() < 5e-5, "mse {mse}, proxy error {proxy}");
        assert!((coded.proxy_error / proxy - 1.0).abs() < 1e-5, "{} of the blocks, {proxy}", coded.proxy_error);
    }

    #[test]
    fn weights_beyond_f16_diverge() {
        let inner = Inner::from_fn(K, K, |k, n| if (k, n) == (3, 77) { 65_520.0 } else { 0.0 });
        let result = quantize(None, &Encoder::new(Codebook::Mcg, 8), &inner);
        assert!(matches!(result, Err(QuantizeError::Diverged { n: 77 })));
    }
}

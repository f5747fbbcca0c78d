//! Block LDLQ: rows of tiles from the last to the first, each compensating the errors of those below it.

use half::f16;
use marlin_formats::exl3::tile::{self, SIDE};
use marlin_ops::trellis::{Path, Tile};
use ndarray::linalg::general_mat_mul;
use rayon::prelude::*;

use super::incoherence::Inner;
use super::ldl::BlockLdl;
use super::search::Search;
use crate::dense::{view, view_mut};
use crate::{QuantizeError, Result};

/// A quantized matrix.
pub(super) struct Coded {
    /// `[K / 16, N / 16, 16 bits]` row-major.
    pub(super) trellis: Vec<u16>,
    /// `tr(E^T H E) / tr(W^T H W)`; 0 for a matrix of zeros.
    pub(super) proxy_error: f64,
}

/// Quantizes all tiles; without a factor each on its own, and `H` is the identity.
///
/// With `H = L D L^T`, `tr(E^T H E)` is the sum over blocks of rows `j` of `tr(r_j^T D_j r_j)`, `r = L^T E`: the choice of
/// block `j` cannot change the later terms, and `r_j` is the error of encoding `W_j + (L^T E)_j - E_j`. Columns do not
/// depend on each other.
pub(super) fn quantize(factor: Option<&BlockLdl>, search: &Search<'_>, inner: &Inner) -> Result<Coded> {
    let count = inner.columns / SIDE;
    let numbers: Vec<usize> = (0..count).collect();
    let mut columns = Vec::with_capacity(count);
    for numbers in numbers.chunks(search.columns_at_once(count)) {
        let batches = numbers.par_chunks(search.batch(count));
        let done: Vec<Vec<Column>> =
            batches.map(|numbers| quantize_columns(factor, search, inner, numbers)).collect::<Result<_>>()?;
        columns.extend(done.into_iter().flatten());
    }
    let words = tile::words(search.bits());
    let tiles =
        (0..inner.rows / SIDE).flat_map(|a| columns.iter().map(move |column| &column.trellis[a * words..][..words]));
    let trellis = tiles.flatten().copied().collect();
    let loss: f64 = columns.iter().map(|column| column.loss).sum();
    let energy: f64 = columns.iter().map(|column| column.energy).sum();
    Ok(Coded { trellis, proxy_error: if energy == 0.0 { 0.0 } else { loss / energy } })
}

/// Quantizes some columns of tiles, a tile of each at a time.
fn quantize_columns(
    factor: Option<&BlockLdl>,
    search: &Search<'_>,
    inner: &Inner,
    columns: &[usize],
) -> Result<Vec<Column>> {
    let mut columns: Vec<Column> = columns.iter().map(|&c| Column::new(inner, c, search.bits())).collect();
    for block in (0..inner.rows / SIDE).rev() {
        let targets =
            columns.par_iter_mut().map(|column| column.target(factor, block)).collect::<Result<Vec<Tile>>>()?;
        let paths = search.paths(&targets)?;
        let coded = columns.par_iter_mut().zip(targets.par_iter().zip(&paths));
        coded
            .map(|(column, (target, path))| column.take(factor, search, block, target, path))
            .collect::<Result<()>>()?;
    }
    Ok(columns.into_iter().map(Column::finished).collect())
}

/// Elements of a row: sixteen errors, 0 until known, then sixteen weights.
const ROW: usize = 2 * SIDE;

/// Sixteen columns under way from the last row to the first.
struct Column {
    /// Number among the columns of tiles.
    c: usize,
    /// `[K, ROW]`.
    rows: Vec<f32>,
    /// What the rows below add to those of the current block, `[SIDE, ROW]`.
    carried: [f32; SIDE * ROW],
    /// `[K / 16, 16 bits]`.
    trellis: Vec<u16>,
    /// `tr(E^T H E)`.
    loss: f64,
    /// `tr(W^T H W)`.
    energy: f64,
}

impl Column {
    fn new(inner: &Inner, c: usize, bits: u32) -> Self {
        Self {
            c,
            rows: inner.column(c).flat_map(|weights| [0.0; SIDE].into_iter().chain(weights.iter().copied())).collect(),
            carried: [0.0; SIDE * ROW],
            trellis: vec![0; inner.rows / SIDE * tile::words(bits)],
            loss: 0.0,
            energy: 0.0,
        }
    }

    /// Without the rows, which nobody needs any more.
    fn finished(mut self) -> Self {
        self.rows = Vec::new();
        self
    }

    /// The target of block `block`, the one above those that are quantized.
    fn target(&mut self, factor: Option<&BlockLdl>, block: usize) -> Result<Tile> {
        let (above, below) = self.rows.split_at((block + 1) * SIDE * ROW);
        let rows = &above[block * SIDE * ROW..];
        self.carried.fill(0.0);
        if let Some(factor) = factor.filter(|_| !below.is_empty()) {
            let panel = view(factor.panel(block), SIDE);
            general_mat_mul(1.0, &panel.t(), &view(below, ROW), 0.0, &mut view_mut(&mut self.carried, ROW));
        }
        let mut target = [0.0; tile::WEIGHTS];
        for (p, target) in target.iter_mut().enumerate() {
            let (i, n) = tile::element(p);
            *target = rows[at(i, SIDE + n)] + self.carried[at(i, n)];
            if !f16::from_f32(*target).is_finite() {
                return Err(QuantizeError::Diverged { n: self.c * SIDE + n });
            }
        }
        Ok(target)
    }

    /// Takes the path that was found for the target of block `block`.
    fn take(
        &mut self,
        factor: Option<&BlockLdl>,
        search: &Search<'_>,
        block: usize,
        target: &Tile,
        path: &Path,
    ) -> Result<()> {
        let words = tile::words(search.bits());
        tile::pack(path, search.bits(), &mut self.trellis[block * words..][..words])?;
        let rows = &mut self.rows[block * SIDE * ROW..][..SIDE * ROW];
        let mut error = [[0.0; SIDE]; SIDE];
        let mut energy = [[0.0; SIDE]; SIDE];
        for (p, (&word, &target)) in path.iter().zip(target).enumerate() {
            let (i, n) = tile::element(p);
            let (weight, value) = (rows[at(i, SIDE + n)], search.value(word));
            error[i][n] = f64::from(target) - f64::from(value);
            energy[i][n] = f64::from(weight) + f64::from(self.carried[at(i, SIDE + n)]);
            rows[at(i, n)] = weight - value;
        }
        self.loss += weigh(factor, block, &error);
        self.energy += weigh(factor, block, &energy);
        Ok(())
    }
}

/// Index in a block of rows.
fn at(row: usize, column: usize) -> usize {
    row * ROW + column
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
        let search = Search::new(Codebook::Mul1, 2, None);

        let plain = quantize(None, &search, &inner).unwrap();
        let (mse, proxy) = errors(&plain, &weight, &h);
        assert!((mse - 0.0669).abs() < 5e-5 && (proxy - 0.0693).abs() < 5e-5, "mse {mse}, proxy error {proxy}");

        let factor = BlockLdl::new(h.clone(), K, 0.0).unwrap();
        let coded = quantize(Some(&factor), &search, &inner).unwrap();
        let (mse, proxy) = errors(&coded, &weight, &h);
        assert!((mse - 0.0780).abs() < 5e-5 && (proxy - 0.0572).abs() < 5e-5, "mse {mse}, proxy error {proxy}");
        assert!((coded.proxy_error / proxy - 1.0).abs() < 1e-5, "{} of the blocks, {proxy}", coded.proxy_error);
    }

    #[test]
    fn weights_beyond_f16_diverge() {
        let inner = Inner::from_fn(K, K, |k, n| if (k, n) == (3, 77) { 65_520.0 } else { 0.0 });
        let result = quantize(None, &Search::new(Codebook::Mcg, 8, None), &inner);
        assert!(matches!(result, Err(QuantizeError::Diverged { n: 77 })));
    }
}

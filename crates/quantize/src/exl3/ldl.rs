//! `H = L D L^T` with diagonal blocks of 16 x 16.

use marlin_formats::exl3::tile::SIDE;
use rayon::prelude::*;

use crate::gptq::triangular::cholesky;

/// `L` with identities on its block diagonal, and the Cholesky factors of the blocks of `D`.
#[derive(Clone, Debug)]
pub(super) struct BlockLdl {
    /// By block of columns: the rows of `L` below the diagonal block, `[K - 16 (j + 1), 16]`.
    panels: Vec<Vec<f32>>,
    /// By block: the lower triangular `C` with `D = C C^T`.
    diagonal: Vec<[[f64; SIDE]; SIDE]>,
}

impl BlockLdl {
    /// Factors the symmetric `h`, `[k, k]` row-major, `k` a multiple of 16; its upper triangle is not read. `None` when a
    /// pivot is not above `smallest_pivot` or `L` leaves f32.
    pub(super) fn new(mut h: Vec<f64>, k: usize, smallest_pivot: f64) -> Option<Self> {
        if !cholesky(&mut h, k, smallest_pivot) {
            return None;
        }
        let diagonal: Vec<[[f64; SIDE]; SIDE]> = (0..k)
            .step_by(SIDE)
            .map(|first| {
                let element = |i: usize, j: usize| if j <= i { h[(first + i) * k + first + j] } else { 0.0 };
                std::array::from_fn(|i| std::array::from_fn(|j| element(i, j)))
            })
            .collect();
        let panel = |(block, c): (usize, &[[f64; SIDE]; SIDE])| {
            let rows = h.chunks_exact(k).skip((block + 1) * SIDE);
            rows.flat_map(|row| times_inverse(&row[block * SIDE..][..SIDE], c)).collect()
        };
        let panels: Vec<Vec<f32>> = diagonal.par_iter().enumerate().map(panel).collect();
        panels.iter().flatten().all(|l| l.is_finite()).then_some(Self { panels, diagonal })
    }

    /// The rows of `L` below diagonal block `block`, `[K - 16 (block + 1), 16]`.
    pub(super) fn panel(&self, block: usize) -> &[f32] {
        &self.panels[block]
    }

    /// `tr(x^T D x)` of a block of rows `x`.
    pub(super) fn weigh(&self, block: usize, x: &[[f64; SIDE]; SIDE]) -> f64 {
        let c = &self.diagonal[block];
        // Element (i, n) of C^T x.
        let element = |i: usize, n: usize| (i..SIDE).map(|row| c[row][i] * x[row][n]).sum::<f64>();
        (0..SIDE * SIDE).map(|i| element(i / SIDE, i % SIDE).powi(2)).sum()
    }
}

/// `x C = row` for lower triangular `C`.
fn times_inverse(row: &[f64], c: &[[f64; SIDE]; SIDE]) -> [f32; SIDE] {
    let mut x = [0.0; SIDE];
    for i in (0..SIDE).rev() {
        let sum: f64 = (i + 1..SIDE).map(|p| x[p] * c[p][i]).sum();
        x[i] = (row[i] - sum) / c[i][i];
    }
    x.map(|x| x as f32)
}

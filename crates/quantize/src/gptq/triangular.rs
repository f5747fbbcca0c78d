//! Blocked Cholesky factorization and triangular inverse in f64, row-major, in parallel over panels
//! of fixed size.

use std::ops::Range;

use ndarray::linalg::general_mat_mul;
use ndarray::s;
use rayon::prelude::*;

use crate::dense::{view, view_mut};

/// Columns factored at once, and rows or columns of one task's panel.
const BLOCK: usize = 96;

/// Replaces the lower triangle of `a`, `[k, k]` row-major symmetric, by `L` with `A = L L^T`. The
/// upper triangle is not read.
///
/// Returns false, with `a` half-factored, at the first pivot that is not above `smallest_pivot`.
pub(crate) fn cholesky(a: &mut [f64], k: usize, smallest_pivot: f64) -> bool {
    for start in (0..k).step_by(BLOCK) {
        let end = k.min(start + BLOCK);
        let (done, below) = a.split_at_mut(end * k);
        let diagonal = &mut done[start * k..];
        if !factor_block(diagonal, k, start..end, smallest_pivot) {
            return false;
        }
        below.par_chunks_exact_mut(k).for_each(|row| solve_row(diagonal, k, start, &mut row[start..end]));
        subtract_outer_product(below, k, start, end);
    }
    true
}

/// Unblocked factorization of the diagonal block; `rows` are its rows, of length `k`.
fn factor_block(rows: &mut [f64], k: usize, block: Range<usize>, smallest_pivot: f64) -> bool {
    for i in 0..block.len() {
        let (above, row) = rows.split_at_mut(i * k);
        let row = &mut row[block.start..block.end];
        solve_row(above, k, block.start, &mut row[..i]);
        let pivot = row[i] - row[..i].iter().map(|l| l * l).sum::<f64>();
        if pivot.is_nan() || pivot <= smallest_pivot {
            return false;
        }
        row[i] = pivot.sqrt();
    }
    true
}

/// Solves `x L^T = row` in place, `L` the block at column `start` of `lower`'s rows.
fn solve_row(lower: &[f64], k: usize, start: usize, row: &mut [f64]) {
    for j in 0..row.len() {
        let l = &lower[j * k + start..][..=j];
        let sum: f64 = l[..j].iter().zip(&*row).map(|(l, x)| l * x).sum();
        row[j] = (row[j] - sum) / l[j];
    }
}

/// The trailing update: the lower triangle of columns `end..` of `rows` loses the product of
/// columns `start..end` with their transpose.
fn subtract_outer_product(rows: &mut [f64], k: usize, start: usize, end: usize) {
    let width = end - start;
    let panel: Vec<f64> = rows.chunks_exact(k).flat_map(|row| &row[start..end]).copied().collect();
    let chunks = rows.par_chunks_mut(BLOCK * k).enumerate();
    chunks.for_each(|(c, rows)| {
        let (first, height) = (c * BLOCK, rows.len() / k);
        let reach = first + height;
        let left = view(&panel[first * width..reach * width], width);
        let right = view(&panel[..reach * width], width);
        let mut rows = view_mut(rows, k);
        let mut target = rows.slice_mut(s![.., end..end + reach]);
        general_mat_mul(-1.0, &left, &right.t(), 1.0, &mut target);
    });
}

/// The inverse of the lower triangular `l`, `[k, k]` row-major; its upper triangle is not read and
/// that of the result is 0.
pub(super) fn invert_lower(l: &[f64], k: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; k * k];
    let l_view = view(l, k);
    for start in (0..k).step_by(BLOCK) {
        let end = k.min(start + BLOCK);
        let (done, rows) = inverse.split_at_mut(start * k);
        let done = view(done, k);
        // Rows start..end of L X = I: the finished rows of X move to the right-hand side.
        let solved: Vec<Vec<f64>> = (0..end)
            .into_par_iter()
            .step_by(BLOCK)
            .map(|first| {
                let last = end.min(first + BLOCK);
                let width = last - first;
                let mut x = vec![0.0; (end - start) * width];
                if first == start {
                    (0..width).for_each(|i| x[i * width + i] = 1.0);
                } else {
                    // Column `first` of X is 0 above row `first`.
                    let left = l_view.slice(s![start..end, first..start]);
                    let right = done.slice(s![first..start, first..last]);
                    general_mat_mul(-1.0, &left, &right, 0.0, &mut view_mut(&mut x, width));
                }
                solve_rows(&l[start * k..], k, start, &mut x, width);
                x
            })
            .collect();
        for (block, x) in solved.iter().enumerate() {
            let first = block * BLOCK;
            let width = x.len() / (end - start);
            for (row, x) in rows.chunks_exact_mut(k).zip(x.chunks_exact(width)) {
                row[first..first + width].copy_from_slice(x);
            }
        }
    }
    inverse
}

/// Solves `L X = x` in place, `L` the block at column `start` of `lower`'s rows, `x` of `width`
/// columns.
fn solve_rows(lower: &[f64], k: usize, start: usize, x: &mut [f64], width: usize) {
    for i in 0..x.len() / width {
        let (above, row) = x.split_at_mut(i * width);
        let row = &mut row[..width];
        let l = &lower[i * k + start..][..=i];
        for (factor, above) in l.iter().zip(above.chunks_exact(width)) {
            for (x, a) in row.iter_mut().zip(above) {
                *x -= factor * a;
            }
        }
        for x in row {
            *x /= l[i];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A well-conditioned `L` with its product `L L^T`.
    fn example(k: usize) -> (Vec<f64>, Vec<f64>) {
        let mut l = vec![0.0; k * k];
        for i in 0..k {
            for j in 0..i {
                l[i * k + j] = (((i * 7919 + j * 104_729) % 199) as f64 / 99.0 - 1.0) / k as f64;
            }
            l[i * k + i] = 1.0 + (i % 5) as f64;
        }
        let mut a = vec![0.0; k * k];
        for i in 0..k {
            for j in 0..=i {
                a[i * k + j] = (0..=j).map(|p| l[i * k + p] * l[j * k + p]).sum();
            }
        }
        (l, a)
    }

    #[test]
    fn factors_and_inverts_sizes_around_the_block() {
        for k in [1, 2, 95, 96, 97, 192, 301] {
            let (l, mut a) = example(k);
            assert!(cholesky(&mut a, k, 0.0));
            let inverse = invert_lower(&a, k);
            for i in 0..k {
                for j in 0..=i {
                    assert!((a[i * k + j] - l[i * k + j]).abs() < 1e-12, "L[{i}, {j}], k {k}");
                    let product: f64 = (j..=i).map(|p| l[i * k + p] * inverse[p * k + j]).sum();
                    let identity = f64::from(u8::from(i == j));
                    assert!((product - identity).abs() < 1e-12, "[{i}, {j}], k {k}");
                }
                assert!(inverse[i * k + i + 1..(i + 1) * k].iter().all(|&x| x == 0.0));
            }
        }
    }

    #[test]
    fn refuses_pivots_that_are_not_positive() {
        for bad in [0.0, -3.0, f64::NAN] {
            for at in [0, 50, 150] {
                let (_, mut a) = example(160);
                a[at * 160 + at] = bad;
                assert!(!cholesky(&mut a, 160, 0.0));
            }
        }
    }
}

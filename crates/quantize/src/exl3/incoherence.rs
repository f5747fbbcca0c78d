//! Scales and rotations that make the elements of a weight look normal and alike.

use half::f16;
use marlin_formats::FormatError;
use marlin_formats::exl3::{HADAMARD, hadamard, tile};
use rayon::prelude::*;

use super::stored_scale;
use crate::{QuantizeError, Result};

/// Standard deviation of the values of [`Codebook::ThreeInst`](marlin_formats::exl3::Codebook), which the normalized weight
/// takes on for every codebook.
const DEVIATION: f64 = 1.243_710_88;

/// The scale of a row or column of zeros.
const EMPTY_SCALE: f64 = 0.1;

/// A weight between the two rotations, `[K, N]` padded to whole Hadamard blocks.
pub(super) struct Inner {
    /// K, padded.
    pub(super) rows: usize,
    /// N, padded.
    pub(super) columns: usize,
    /// `[N / HADAMARD, K, HADAMARD]`.
    blocks: Vec<f32>,
}

/// A weight `diag(su) H W_inner H diag(svh)`.
pub(super) struct Normalized {
    pub(super) inner: Inner,
    /// `[K]`, padded.
    pub(super) su: Vec<f64>,
    /// f16 bits `[N]`, padded; 0 for columns of zeros.
    pub(super) svh: Vec<u16>,
}

impl Inner {
    /// A matrix `[rows, columns]` whose elements are `value(row, column)`; both sizes are multiples of 128.
    #[cfg(test)]
    pub(super) fn from_fn(rows: usize, columns: usize, value: impl Fn(usize, usize) -> f32) -> Self {
        let element = |i: usize| {
            let (block, row, column) = (i / (rows * HADAMARD), i / HADAMARD % rows, i % HADAMARD);
            value(row, block * HADAMARD + column)
        };
        Self { rows, columns, blocks: (0..rows * columns).map(element).collect() }
    }

    /// Sixteen columns from `16 c`, `[K, 16]` row-major.
    pub(super) fn column(&self, c: usize) -> impl Iterator<Item = &[f32]> {
        let tiles = HADAMARD / tile::SIDE;
        let block = &self.blocks[c / tiles * self.rows * HADAMARD..][..self.rows * HADAMARD];
        block.chunks_exact(HADAMARD).map(move |row| &row[c % tiles * tile::SIDE..][..tile::SIDE])
    }

    /// Tile `(a, c)` in the order of positions.
    pub(super) fn tile(&self, a: usize, c: usize) -> [f32; tile::WEIGHTS] {
        let mut weights = [0.0; tile::WEIGHTS];
        for (row, values) in self.column(c).skip(a * tile::SIDE).take(tile::SIDE).enumerate() {
            for (column, &value) in values.iter().enumerate() {
                weights[tile::position(row, column)] = value;
            }
        }
        weights
    }

    /// Multiplies all elements.
    pub(super) fn scale(&mut self, factor: f32) {
        self.blocks.par_iter_mut().for_each(|w| *w *= factor);
    }
}

/// Checks shape, length and that every weight is finite.
pub(super) fn check_weight(weight: &[f32], out_features: usize, in_features: usize) -> Result<()> {
    let shape = FormatError::Shape { out_features, in_features };
    let padded = |size: usize| size.checked_next_multiple_of(HADAMARD).filter(|_| size > 0);
    let count = padded(in_features).zip(padded(out_features)).and_then(|(k, n)| k.checked_mul(n));
    if count.is_none() {
        return Err(shape.into());
    }
    let expected = out_features * in_features;
    if weight.len() != expected {
        return Err(QuantizeError::Length { what: "weight", expected, found: weight.len() });
    }
    match weight.par_iter().position_first(|w| !w.is_finite()) {
        None => Ok(()),
        Some(index) => {
            let (n, k) = (index / in_features, index % in_features);
            Err(FormatError::NonFiniteWeight { n, k, value: weight[index] }.into())
        }
    }
}

/// Scales and rotates a checked `weight`, `[N, K]` row-major, with the signs of its padded inputs and outputs. Its elements
/// get a root mean square of 1.2437. `scaled`: bring the columns to the same size first.
pub(super) fn normalize(
    weight: &[f32],
    in_features: usize,
    input_signs: &[f64],
    output_signs: &[f64],
    scaled: bool,
) -> Result<Normalized> {
    let (rows, columns) = (input_signs.len(), output_signs.len());
    let mut svh = output_scales(weight, in_features, output_signs, scaled)?;
    let sv: Vec<f64> = svh.iter().map(|&bits| f16::from_bits(bits).to_f64()).collect();

    let mut blocks = vec![0.0f32; rows * columns];
    let sums: Vec<Vec<f64>> = blocks
        .par_chunks_exact_mut(rows * HADAMARD)
        .enumerate()
        .map(|(b, block)| {
            let first = b * HADAMARD;
            rotate_columns(&weight[first * in_features..], in_features, &sv[first..first + HADAMARD], block)
        })
        .collect();
    let su: Vec<f64> = (0..rows)
        .map(|k| {
            let sum: f64 = sums.iter().map(|sums| sums[k]).sum();
            let size = if sum == 0.0 { EMPTY_SCALE } else { (sum / columns as f64).sqrt() };
            -input_signs[k] * size / DEVIATION
        })
        .collect();
    blocks.par_chunks_exact_mut(HADAMARD * HADAMARD).enumerate().for_each(|(i, block)| {
        let first = i * HADAMARD % rows;
        rotate_rows(&su[first..first + HADAMARD], block);
    });

    let empty = |n: usize| weight.chunks_exact(in_features).nth(n).is_none_or(|row| row.iter().all(|&w| w == 0.0));
    svh.iter_mut().enumerate().filter(|&(n, _)| empty(n)).for_each(|(_, svh)| *svh = 0);
    Ok(Normalized { inner: Inner { rows, columns, blocks }, su, svh })
}

/// Signs and sizes of all columns as f16 bits; padded columns count as columns of zeros.
fn output_scales(weight: &[f32], in_features: usize, signs: &[f64], scaled: bool) -> Result<Vec<u16>> {
    if !scaled {
        return signs.iter().map(|&sign| stored_scale(sign)).collect();
    }
    let size = |row: &[f32]| (row.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>() / in_features as f64).sqrt();
    let sizes: Vec<f64> = weight.par_chunks_exact(in_features).map(size).collect();
    let mean = sizes.iter().sum::<f64>() / sizes.len() as f64;
    let scale = |(n, sign): (usize, &f64)| match sizes.get(n) {
        Some(&size) if size > 0.0 => stored_scale(sign * size / mean),
        _ => stored_scale(sign * EMPTY_SCALE),
    };
    signs.iter().enumerate().map(scale).collect()
}

/// Divides 128 columns by `sv` and transforms each row of them into `block`, `[K, 128]`; returns the sum of squares of each
/// row. `weight` starts with the first column, `[.., in_features]`, and may have fewer than 128.
fn rotate_columns(weight: &[f32], in_features: usize, sv: &[f64], block: &mut [f32]) -> Vec<f64> {
    let transform = |(k, row): (usize, &mut [f32])| {
        if k >= in_features {
            return 0.0;
        }
        let mut values = [0.0; HADAMARD];
        for ((value, column), sv) in values.iter_mut().zip(weight.chunks_exact(in_features)).zip(sv) {
            *value = f64::from(column[k]) / sv;
        }
        hadamard(&mut values);
        row.iter_mut().zip(values).for_each(|(out, value)| *out = value as f32);
        values.iter().map(|value| value * value).sum()
    };
    block.chunks_exact_mut(HADAMARD).enumerate().map(transform).collect()
}

/// Divides the rows of `block`, `[128, 128]`, by `su` and transforms its columns.
fn rotate_rows(su: &[f64], block: &mut [f32]) {
    for column in 0..HADAMARD {
        let mut values: [f64; HADAMARD] = std::array::from_fn(|k| f64::from(block[k * HADAMARD + column]) / su[k]);
        hadamard(&mut values);
        values.iter().enumerate().for_each(|(k, &value)| block[k * HADAMARD + column] = value as f32);
    }
}

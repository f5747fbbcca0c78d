//! One EXL3 weight matrix.

use half::f16;

use super::{Codebook, HADAMARD, hadamard, tile};
use crate::FormatError;

/// One weight matrix in EXL3.
///
/// Its tensors have the padded sizes [`Exl3Matrix::padded_in`] and [`Exl3Matrix::padded_out`]: inputs beyond `in_features`
/// are zeros, outputs beyond `out_features` are discarded.
#[derive(Clone, Debug, PartialEq)]
pub struct Exl3Matrix {
    /// State to value.
    pub codebook: Codebook,
    /// Bits a weight, 1 to 8.
    pub bits: u32,
    /// K.
    pub in_features: usize,
    /// N.
    pub out_features: usize,
    /// `[padded_in / 16, padded_out / 16, 16 bits]` row-major, see [`tile`].
    pub trellis: Vec<u16>,
    /// Signs and scales of the inputs, f16 bits `[padded_in]`.
    pub suh: Vec<u16>,
    /// Signs and scales of the outputs, f16 bits `[padded_out]`.
    pub svh: Vec<u16>,
}

impl Exl3Matrix {
    /// K padded to whole Hadamard blocks.
    pub const fn padded_in(&self) -> usize {
        self.in_features.next_multiple_of(HADAMARD)
    }

    /// N padded to whole Hadamard blocks.
    pub const fn padded_out(&self) -> usize {
        self.out_features.next_multiple_of(HADAMARD)
    }

    /// Checks the bit rate, the lengths of all tensors and that every scale is finite.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), FormatError> {
        let (n, k) = (self.out_features, self.in_features);
        if !(1..=8).contains(&self.bits) {
            return Err(FormatError::TrellisBits { bits: self.bits });
        }
        let shape = FormatError::Shape { out_features: n, in_features: k };
        let padded = |size: usize| size.checked_next_multiple_of(HADAMARD).filter(|_| size > 0);
        let (Some(padded_k), Some(padded_n)) = (padded(k), padded(n)) else {
            return Err(shape);
        };
        let tiles = (padded_k / tile::SIDE).checked_mul(padded_n / tile::SIDE);
        let Some(words) = tiles.and_then(|tiles| tiles.checked_mul(tile::words(self.bits))) else {
            return Err(shape);
        };
        for (what, expected, found) in [
            ("trellis", words, self.trellis.len()),
            ("suh", padded_k, self.suh.len()),
            ("svh", padded_n, self.svh.len()),
        ] {
            if expected != found {
                return Err(FormatError::Length { what, expected, found });
            }
        }
        for scales in [&self.suh, &self.svh] {
            if let Some(&bits) = scales.iter().find(|&&bits| !f16::from_bits(bits).is_finite()) {
                return Err(FormatError::InvalidScale { bits, kind: "F16" });
            }
        }
        Ok(())
    }

    /// Stored bits (trellis with padding, scales) divided by `K * N`.
    pub fn bits_per_weight(&self) -> f64 {
        let words = self.trellis.len() + self.suh.len() + self.svh.len();
        words as f64 * 16.0 / (self.in_features as f64 * self.out_features as f64)
    }

    /// The words of tile `(row, column)` of the grid `[padded_in / 16, padded_out / 16]`.
    ///
    /// # Panics
    /// When there is no such tile, as slice indexing does.
    pub fn tile(&self, row: usize, column: usize) -> &[u16] {
        let words = tile::words(self.bits);
        let columns = self.padded_out() / tile::SIDE;
        assert!(column < columns, "tile column {column} is out of range, there are {columns}");
        &self.trellis[(row * columns + column) * words..][..words]
    }

    /// The decoded weights between the two rotations, `[padded_in, padded_out]` row-major, exact.
    ///
    /// # Errors
    /// As [`Exl3Matrix::validate`].
    pub fn inner(&self) -> Result<Vec<f16>, FormatError> {
        self.validate()?;
        let (rows, columns) = (self.padded_in() / tile::SIDE, self.padded_out() / tile::SIDE);
        let mut inner = vec![f16::ZERO; self.padded_in() * self.padded_out()];
        for a in 0..rows {
            for c in 0..columns {
                self.decode_tile(a, c, |row, column, value| {
                    inner[(a * tile::SIDE + row) * self.padded_out() + c * tile::SIDE + column] = value;
                })?;
            }
        }
        Ok(inner)
    }

    fn decode_tile(&self, a: usize, c: usize, mut put: impl FnMut(usize, usize, f16)) -> Result<(), FormatError> {
        for (position, state) in tile::states(self.tile(a, c))?.into_iter().enumerate() {
            let (row, column) = tile::element(position);
            put(row, column, self.codebook.value(state));
        }
        Ok(())
    }

    /// The effective weight `diag(suh) H W_inner H diag(svh)`, transposed to `[N, K]` row-major, computed in f64.
    ///
    /// # Errors
    /// As [`Exl3Matrix::validate`].
    pub fn decode_f64(&self) -> Result<Vec<f64>, FormatError> {
        self.validate()?;
        let (n, k) = (self.out_features, self.in_features);
        let mut weight = vec![0.0; n * k];
        for n0 in (0..n).step_by(HADAMARD) {
            self.decode_columns(n0, |column, row, value| weight[column * k + row] = value)?;
        }
        Ok(weight)
    }

    /// The effective weight, `[N, K]` row-major, each element rounded to f32 once.
    ///
    /// # Errors
    /// As [`Exl3Matrix::validate`].
    pub fn decode(&self) -> Result<Vec<f32>, FormatError> {
        self.validate()?;
        let (n, k) = (self.out_features, self.in_features);
        let mut weight = vec![0.0; n * k];
        for n0 in (0..n).step_by(HADAMARD) {
            self.decode_columns(n0, |column, row, value| weight[column * k + row] = value as f32)?;
        }
        Ok(weight)
    }

    /// Calls `put(n, k, W[n, k])` for the outputs from `n0`, the first of a Hadamard block, to the end of that block.
    fn decode_columns(&self, n0: usize, mut put: impl FnMut(usize, usize, f64)) -> Result<(), FormatError> {
        const TILES: usize = HADAMARD / tile::SIDE;
        let columns = HADAMARD.min(self.out_features - n0);
        for k0 in (0..self.in_features).step_by(HADAMARD) {
            // Element [k][n].
            let mut block = vec![[0.0; HADAMARD]; HADAMARD];
            for (a, c) in (0..TILES * TILES).map(|t| (t / TILES, t % TILES)) {
                self.decode_tile(k0 / tile::SIDE + a, n0 / tile::SIDE + c, |row, column, value| {
                    block[a * tile::SIDE + row][c * tile::SIDE + column] = value.to_f64();
                })?;
            }
            block.iter_mut().for_each(hadamard);
            let rows = HADAMARD.min(self.in_features - k0);
            for (n, &svh) in (n0..).zip(&self.svh[n0..][..columns]) {
                let mut values: [f64; HADAMARD] = std::array::from_fn(|row| block[row][n - n0]);
                hadamard(&mut values);
                for ((k, &suh), value) in (k0..).zip(&self.suh[k0..][..rows]).zip(values) {
                    put(n, k, f16::from_bits(suh).to_f64() * value * f16::from_bits(svh).to_f64());
                }
            }
        }
        Ok(())
    }
}

//! One matrix of grid codes.

use super::{InnerOrder, TileOrder, check_bits, unpack};
use crate::FormatError;
use crate::pack::Layout;

/// What group sizes are multiples of: the codes of the largest packing unit.
pub const GROUP_UNIT: usize = 32;

/// One weight matrix of grid codes: `W[k, n] = grid[code] * scales[k / group_size, n] * su[k] * sv[n]`, in f32.
#[derive(Clone, Debug, PartialEq)]
pub struct GridMatrix {
    /// Bits a code, 2 to 8.
    pub bits: u32,
    /// K.
    pub in_features: usize,
    /// N.
    pub out_features: usize,
    /// Weights along K that share a scale, a multiple of [`GROUP_UNIT`]; it may exceed K.
    pub group_size: usize,
    /// [`TileOrder::Kn`] and [`InnerOrder::Column`], without header; the codes of the padding do not matter.
    pub tiles: Vec<u8>,
    /// `[G, N]` row-major.
    pub scales: Vec<f32>,
    /// Signs of the inputs, +1 or -1, `[K]`.
    pub su: Vec<f32>,
    /// Signs of the outputs, +1 or -1, `[N]`.
    pub sv: Vec<f32>,
    /// Values of the codes, at most `2^bits`; the value of the last code but i is minus that of code i, as in
    /// [`super::uniform`].
    pub grid: Vec<f32>,
}

/// A matrix of grid codes without signs: `W[k, n] = levels[code] * scales[k / group_size, n]` is bit for bit that of the
/// [`GridMatrix`]. Signs of inputs are in the codes, as the grid is odd, signs of outputs in the scales.
#[derive(Clone, Debug, PartialEq)]
pub struct FoldedGrid {
    /// How codes lie in words.
    pub layout: Layout,
    /// At most K, rounded up to a multiple of [`GROUP_UNIT`].
    pub group_size: usize,
    /// K-major, `[layout.rows(K), N]`; padding is code 0.
    pub words: Vec<u32>,
    /// `[G, N]` row-major.
    pub scales: Vec<f32>,
    /// By code; bits above [`GridMatrix::bits`] do not matter.
    pub levels: Box<[f32; 256]>,
}

impl GridMatrix {
    /// Checks the bit rate, the lengths of all tensors, that scales and grid are finite, the grid odd, signs +1 or -1, and
    /// every code inside the grid.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn validate(&self) -> Result<(), FormatError> {
        self.codes().map(|_| ())
    }

    /// The codes `[N, K]` row-major.
    ///
    /// # Errors
    /// As [`GridMatrix::validate`].
    pub fn codes(&self) -> Result<Vec<u8>, FormatError> {
        check_bits(self.bits)?;
        let (n, k) = (self.out_features, self.in_features);
        if self.group_size == 0 || !self.group_size.is_multiple_of(GROUP_UNIT) {
            return Err(FormatError::GridGroupSize { group_size: self.group_size });
        }
        let codes = unpack(&self.tiles, self.bits, [n, k], TileOrder::Kn, InnerOrder::Column)?;
        for (what, expected, found) in [
            ("scales", k.div_ceil(self.group_size) * n, self.scales.len()),
            ("su", k, self.su.len()),
            ("sv", n, self.sv.len()),
        ] {
            if expected != found {
                return Err(FormatError::Length { what, expected, found });
            }
        }
        self.check_grid()?;
        if let Some(&value) = self.scales.iter().find(|scale| !scale.is_finite()) {
            return Err(FormatError::InvalidValue { what: "scale", value });
        }
        for (what, signs) in [("su", &self.su), ("sv", &self.sv)] {
            if let Some(index) = signs.iter().position(|sign| sign.abs() != 1.0) {
                return Err(FormatError::GridSign { what, index, value: signs[index] });
            }
        }
        let levels = self.grid.len();
        match codes.iter().position(|&code| usize::from(code) >= levels) {
            Some(at) => Err(FormatError::GridIndex { n: at / k, k: at % k, code: codes[at], levels }),
            None => Ok(codes),
        }
    }

    fn check_grid(&self) -> Result<(), FormatError> {
        let expected = 1 << self.bits;
        if self.grid.is_empty() || self.grid.len() > expected {
            return Err(FormatError::Length { what: "grid", expected, found: self.grid.len() });
        }
        if let Some(&value) = self.grid.iter().find(|value| !value.is_finite()) {
            return Err(FormatError::InvalidValue { what: "grid value", value });
        }
        let mut pairs = self.grid.iter().zip(self.grid.iter().rev());
        match pairs.position(|(&value, &mirrored)| value != -mirrored) {
            Some(index) => Err(FormatError::GridNotOdd { index, value: self.grid[index] }),
            None => Ok(()),
        }
    }

    /// The dense weight, `[N, K]` row-major: the product of the four factors in f32.
    ///
    /// # Errors
    /// As [`GridMatrix::validate`].
    pub fn decode(&self) -> Result<Vec<f32>, FormatError> {
        let (n, k) = (self.out_features, self.in_features);
        let value = |(at, code): (usize, u8)| {
            let (row, column) = (at % k, at / k);
            let scale = self.scales[row / self.group_size * n + column];
            self.grid[usize::from(code)] * scale * self.su[row] * self.sv[column]
        };
        Ok(self.codes()?.into_iter().enumerate().map(value).collect())
    }

    /// The form for kernels.
    ///
    /// # Errors
    /// As [`GridMatrix::validate`].
    pub fn folded(&self) -> Result<FoldedGrid, FormatError> {
        let (n, k) = (self.out_features, self.in_features);
        let layout = layout(self.bits);
        let mut codes = self.codes()?;
        let mut words = vec![0; layout.rows(k) * n];
        let last = (self.grid.len() - 1) as u8;
        for (column, codes) in codes.chunks_exact_mut(k).enumerate() {
            for (code, _) in codes.iter_mut().zip(&self.su).filter(|(_, su)| **su < 0.0) {
                *code = last - *code;
            }
            layout.store_column(codes, &mut words, n, column);
        }
        let mask = (1usize << self.bits) - 1;
        Ok(FoldedGrid {
            layout,
            group_size: self.group_size.min(k.next_multiple_of(GROUP_UNIT)),
            words,
            scales: self
                .scales
                .chunks_exact(n)
                .flat_map(|row| row.iter().zip(&self.sv).map(|(s, sv)| s * sv))
                .collect(),
            levels: Box::new(std::array::from_fn(|code| self.grid.get(code & mask).copied().unwrap_or(0.0))),
        })
    }

    /// Stored bits (tiles with padding, f32 scales and signs, grid) divided by `K * N`.
    pub fn bits_per_weight(&self) -> f64 {
        let floats = self.scales.len() + self.su.len() + self.sv.len() + self.grid.len();
        (self.tiles.len() * 8 + floats * 32) as f64 / (self.in_features as f64 * self.out_features as f64)
    }
}

/// The packing of codes in words; seven bits take the place of eight.
const fn layout(bits: u32) -> Layout {
    match bits {
        2 => Layout::Bits2,
        3 => Layout::Planar3,
        4 => Layout::Bits4,
        5 => Layout::Planar5,
        6 => Layout::Planar6,
        _ => Layout::Bits8,
    }
}

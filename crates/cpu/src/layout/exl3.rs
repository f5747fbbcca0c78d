//! EXL3 weights: the tiles of sixteen columns one after the other, their bits as they are stored, see
//! [`crate::simd::trellis`].

use half::f16;
use marlin_formats::exl3::{Codebook, Exl3Matrix, HADAMARD, hadamard, tile};
use marlin_ops::Result;

use crate::Cpu;
use crate::arena::Array;
use crate::simd::LANES;
use crate::simd::trellis::TrellisRow;

/// Column tiles that one Hadamard transform mixes.
pub(crate) const SPAN: usize = HADAMARD / LANES;

/// Trellis codes between two rotations.
pub(crate) struct Exl3 {
    pub(crate) codebook: Codebook,
    /// Bits a weight, and rows of words a tile.
    pub(crate) bits: usize,
    /// `[padded N / 16][padded K / 16][bits]`.
    words: Array<TrellisRow>,
    /// Signs and scales of the inputs, `[padded K]`.
    pub(crate) suh: Vec<f32>,
    /// Signs and scales of the outputs, `[padded N]`.
    pub(crate) svh: Vec<f32>,
    /// Whether sums of two f16 are rounded to f16; the fast mode keeps them as they are, which is closer to what the
    /// codebook stands for.
    pub(crate) rounds: bool,
}

impl Exl3 {
    /// Repacks a validated matrix.
    pub(super) fn new(cpu: &Cpu, matrix: &Exl3Matrix) -> Result<Self> {
        let bits = matrix.bits as usize;
        let (rows, columns) = (matrix.padded_in() / tile::SIDE, matrix.padded_out() / tile::SIDE);
        let mut words = cpu.arena.zeros::<TrellisRow>(rows * columns * bits)?;
        cpu.pool.for_chunks(&mut words, rows * bits, |column, words| {
            for (row, out) in words.chunks_exact_mut(bits).enumerate() {
                for (i, pair) in matrix.tile(row, column).as_chunks::<2>().0.iter().enumerate() {
                    out[i % bits].0[i / bits] = u32::from(pair[0]) | u32::from(pair[1]) << 16;
                }
            }
        });
        let floats = |scales: &[u16]| scales.iter().map(|&bits| f16::from_bits(bits).to_f32()).collect();
        let (suh, svh) = (floats(&matrix.suh), floats(&matrix.svh));
        Ok(Self { codebook: matrix.codebook, bits, words, suh, svh, rounds: cpu.exact() })
    }

    pub(super) fn size_in_bytes(&self) -> usize {
        size_of_val(&self.words[..]) + size_of_val(&self.suh[..]) + size_of_val(&self.svh[..])
    }

    /// The words of column tile `column`, `bits` for each of its tiles.
    pub(crate) fn column_words(&self, column: usize) -> &[TrellisRow] {
        &self.words_from(column)[..self.words_per_column()]
    }

    /// The words from column tile `column` to the last.
    pub(crate) fn words_from(&self, column: usize) -> &[TrellisRow] {
        &self.words[column * self.words_per_column()..]
    }

    fn words_per_column(&self) -> usize {
        self.suh.len() / tile::SIDE * self.bits
    }

    /// The decoded weight of a row and a column between the two rotations.
    fn inner(&self, row: usize, column: usize) -> f16 {
        let words = &self.column_words(column / tile::SIDE)[row / tile::SIDE * self.bits..][..self.bits];
        let count = 8 * self.bits;
        let word = |i: usize| u64::from(words[i % count % self.bits].0[i % count / self.bits]);
        let position = tile::position(row % tile::SIDE, column % tile::SIDE);
        // The state ends inside the second of two words.
        let end = (position + 1) * self.bits + 32 * count;
        let last = (end - 1) / 32;
        let state = (word(last - 1) << 32 | word(last)) >> (32 * (last + 1) - end);
        self.codebook.value(state as u16)
    }

    /// The weights of input features `k0 ..` (a Hadamard block) and of the span of outputs `n0 ..`, both rotations
    /// applied along the outputs only, `[k][n]`.
    fn rotated_row(&self, k: usize, n0: usize) -> [f64; HADAMARD] {
        let mut row = std::array::from_fn(|n| self.inner(k, n0 + n).to_f64());
        hadamard(&mut row);
        row
    }

    /// Effective weights of output `n`.
    pub(super) fn column(&self, n: usize, out: &mut [f32]) {
        self.columns(n, out.len(), &mut vec![0.0; HADAMARD * HADAMARD], out);
    }

    /// Effective weights of the `out.len() / in_features` outputs from `n`, all of one Hadamard block, `[n][k]`, as
    /// [`Exl3Matrix::decode`] computes them. `block` holds 128 x 128 numbers.
    pub(crate) fn columns(&self, n: usize, in_features: usize, block: &mut [f64], out: &mut [f32]) {
        let (n0, first) = (n / HADAMARD * HADAMARD, n % HADAMARD);
        let (block, _) = block.as_chunks_mut::<HADAMARD>();
        for k0 in (0..in_features).step_by(HADAMARD) {
            for (k, row) in block.iter_mut().enumerate() {
                *row = self.rotated_row(k0 + k, n0);
            }
            for (i, out) in out.chunks_exact_mut(in_features).enumerate() {
                let mut values = std::array::from_fn(|k| block[k][first + i]);
                hadamard(&mut values);
                let svh = f64::from(self.svh[n + i]);
                for ((out, value), &suh) in out[k0..].iter_mut().zip(values).zip(&self.suh[k0..]) {
                    *out = (f64::from(suh) * value * svh) as f32;
                }
            }
        }
    }
}

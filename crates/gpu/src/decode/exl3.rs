//! EXL3 tiles: trellis states of loaded words, and their values.
//!
//! A tile of 16 x 16 weights is a cyclic stream of `8 bits` words, the most significant bit of a word first. The state of a
//! position is the 16 bits that end with its symbol. Columns `g` and `g + 8` of a tile are the 32 positions of `bits` whole
//! words, so a unit that has such a pair reads these and the word before.

use cubecl::prelude::*;
use half::f16;
use marlin_formats::exl3::{Codebook, tile};

/// How the states of a tile become values; kernels are compiled for it.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) struct Trellis {
    /// Bits a weight, 1 to 8.
    pub(crate) bits: usize,
    pub(crate) codebook: Codebook,
}

/// Rows and columns of a tile.
pub(crate) const SIDE: usize = tile::SIDE;

/// Rows of two tiles, one above the other: together they have `bits` words a column.
pub(crate) const UNIT: usize = 2 * SIDE;

/// What is kept of the product of a state, and what is changed, in both halves: signs, the low exponent bits and the
/// mantissas stay. Kernels that count instructions take the first at run time, so that both are one.
pub(crate) const KEPT: u32 = 0x8fff_8fff;
pub(crate) const CHANGED: u32 = 0x3b60_3b60;

impl Trellis {
    /// u32 words of a tile.
    pub(crate) const fn tile_words(self) -> usize {
        8 * self.bits
    }

    /// The values that sums of bytes stand for, or nothing.
    pub(crate) fn table(self) -> Vec<f32> {
        match self.codebook {
            Codebook::Mul1 => (0..=1020).map(|sum| Codebook::mul1_value(sum).to_f32()).collect(),
            Codebook::ThreeInst | Codebook::Mcg => Vec::new(),
        }
    }
}

/// The product of a state, from which its value is read.
#[cube]
pub(crate) fn product(state: u32, #[comptime] codebook: Codebook) -> u32 {
    let product = state * comptime!(codebook.multiplier());
    if comptime!(codebook.increment() > 0) { product + comptime!(codebook.increment()) } else { product }
}

/// The value of a state; `table` is [`Trellis::table`].
#[cube]
pub(crate) fn value(state: u32, table: &[f32], #[comptime] codebook: Codebook) -> f32 {
    let x = product(state, codebook);
    if comptime!(codebook == Codebook::Mul1) {
        let sums = (x & 0x00ff_00ffu32) + ((x >> 8u32) & 0x00ff_00ffu32);
        table[((sums & 0xffffu32) + (sums >> 16u32)) as usize]
    } else {
        let halves = Vector::<f16, Const<2>>::reinterpret((x & KEPT) ^ CHANGED);
        f32::cast_from(halves.extract(0usize) + halves.extract(1usize))
    }
}

/// The words of columns `g` and `g + 8` of the tile whose first word is at `first`: the one before theirs, and theirs.
#[cube]
pub(crate) fn pair_words(words: &[u32], first: usize, g: usize, #[comptime] t: Trellis) -> Array<u32> {
    let mut out = Array::<u32>::new(comptime!(t.bits + 1));
    let own = g * comptime!(t.bits);
    out[0] = words[first + select(g == 0usize, comptime!(t.tile_words()).runtime(), own) - 1usize];
    #[unroll]
    for i in 0..comptime!(t.bits) {
        out[comptime!(i + 1)] = words[first + own + i];
    }
    out
}

/// The state of position `p` of 32 of [`pair_words`].
#[cube]
pub(crate) fn pair_state(words: &Array<u32>, #[comptime] p: usize, #[comptime] t: Trellis) -> u32 {
    // Bit 0 is the first of the word before.
    let end = comptime!(32 + (p + 1) * t.bits);
    let (first, last, shift) = comptime!(((end - 16) / 32, (end - 1) / 32, (32 - end % 32) as u32 % 32));
    if comptime!(first == last) {
        (words[last] >> shift) & 0xffffu32
    } else {
        ((words[first] << comptime!(32 - shift)) | (words[last] >> shift)) & 0xffffu32
    }
}

/// The position, among the 32 of a pair of columns, of row `row` of its first column; that of the second is 4 more.
pub(crate) const fn pair_position(row: usize) -> usize {
    tile::position(row, 0)
}

/// Rows `32 unit` to `32 unit + 31` of column `n`, in order. `start` is the first word of a matrix of `columns` columns.
#[cube]
pub(super) fn decode_rows(
    words: &[u32],
    table: &[f32],
    start: usize,
    unit: usize,
    n: usize,
    columns: usize,
    #[comptime] t: Trellis,
) -> Array<f32> {
    let mut out = Array::<f32>::new(UNIT);
    let column = n % SIDE;
    let second = column >= 8usize;
    #[unroll]
    for half in 0..2usize {
        let index = (unit * 2usize + half) * (columns / SIDE) + n / SIDE;
        let pair = pair_words(words, start + index * comptime!(t.tile_words()), column % 8usize, t);
        #[unroll]
        for row in 0..SIDE {
            let p = comptime!(pair_position(row));
            let state = select(second, pair_state(&pair, comptime!(p + 4), t), pair_state(&pair, p, t));
            out[comptime!(half * SIDE + row)] = value(state, table, t.codebook);
        }
    }
    out
}

//! One tile: 16 x 16 weights in a cyclic bit stream.
//!
//! A tile of `bits` bits a weight has `16 bits` u16 words. Its bits come most significant first in little-endian u32 words,
//! so each pair of u16 words is swapped. Position `p` of 256 owns the bits from `p bits`; its *state* is the 16 bits of the
//! stream that end with them, cyclically.

use crate::FormatError;

/// Rows (along K) and columns (along N) of a tile.
pub const SIDE: usize = 16;
/// Weights of a tile.
pub const WEIGHTS: usize = SIDE * SIDE;

/// Row (offset along K) and column (offset along N) of a position: the order in which the lanes of a tensor-core
/// instruction hold a 16 x 16 operand.
#[inline]
pub const fn element(position: usize) -> (usize, usize) {
    let (lane, j) = (position / 8, position % 8);
    (2 * (lane % 4) + (j & 1) + 8 * ((j >> 1) & 1), lane / 4 + 8 * (j >> 2))
}

/// The position of an element, see [`element`].
#[inline]
pub const fn position(row: usize, column: usize) -> usize {
    8 * (4 * (column & 7) + ((row & 7) >> 1)) + (row & 1) + 2 * (row >> 3) + 4 * (column >> 3)
}

/// u16 words of a tile.
pub const fn words(bits: u32) -> usize {
    SIDE * bits as usize
}

/// The states of all positions of a tile of `16 bits` words.
///
/// # Errors
/// [`FormatError::Length`] when the number of words is not 16 times a bit rate of 1 to 8.
pub fn states(words: &[u16]) -> Result<[u16; WEIGHTS], FormatError> {
    let bits = words.len() / SIDE;
    if !(1..=8).contains(&bits) || !words.len().is_multiple_of(SIDE) {
        return Err(FormatError::Length { what: "trellis tile", expected: SIDE, found: words.len() });
    }
    // The word of each pair that holds the earlier bits is the second.
    let stream = |i: usize| words[i ^ 1];
    let mut state = stream(words.len() - 1);
    let mut next = (0..words.len()).flat_map(|i| (0..16).rev().map(move |bit| stream(i) >> bit & 1));
    let mut states = [0; WEIGHTS];
    for out in &mut states {
        for bit in next.by_ref().take(bits) {
            state = state << 1 | bit;
        }
        *out = state;
    }
    Ok(states)
}

/// Packs the low `bits` bits of each position's state into `out`, `16 bits` words. Reading them back gives the same states
/// when these form a tail-biting sequence.
///
/// # Errors
/// [`FormatError::Length`] when `out` has another length.
pub fn pack(states: &[u16; WEIGHTS], bits: u32, out: &mut [u16]) -> Result<(), FormatError> {
    let expected = words(bits);
    if out.len() != expected || !(1..=8).contains(&bits) {
        return Err(FormatError::Length { what: "trellis tile", expected, found: out.len() });
    }
    let mut stream = states.iter().flat_map(|state| (0..bits).rev().map(move |bit| state >> bit & 1));
    for i in 0..out.len() {
        out[i ^ 1] = stream.by_ref().take(16).fold(0, |word, bit| word << 1 | bit);
    }
    Ok(())
}

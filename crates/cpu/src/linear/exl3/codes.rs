//! The tiles of a span of [`Codebook::Mul1`] times activations as i16, whose sums of products are exact.

use marlin_formats::exl3::{Codebook, HADAMARD};

use super::super::Rows;
use super::{BLOCK_TILES, fetch_ahead, rotate_back};
use crate::layout::exl3::{Exl3, SPAN};
use crate::simd::trellis::{PAIRS, TrellisRow};
use crate::simd::{Kernel, LANES, Line, Simd};

/// The largest code of an activation.
const MOST: f32 = 32767.0;

/// 128 rotated activations of one row as i16.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(crate) struct RotatedBlock {
    /// Codes of two rows each, the first in the low half.
    pairs: [i32; HADAMARD / 2],
    /// `-510 sum` of the codes, modulo 2^32: what sums of products start from.
    start: i32,
    /// Multiplier of those sums.
    scale: f32,
    /// The part of the result that is the same for all columns.
    rest: f32,
}

impl Default for RotatedBlock {
    fn default() -> Self {
        Self { pairs: [0; HADAMARD / 2], start: 0, scale: 0.0, rest: 0.0 }
    }
}

/// The codes of the rows of every second pair of a [`RotatedBlock`], each in both halves.
#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(crate) struct DoubledCodes([[i32; 2]; HADAMARD / 4]);

impl Default for DoubledCodes {
    fn default() -> Self {
        Self([[0; 2]; HADAMARD / 4])
    }
}

impl DoubledCodes {
    pub(super) fn of(block: &RotatedBlock) -> Self {
        let mut doubled = Self::default();
        for (doubled, [_, pair]) in doubled.0.iter_mut().zip(block.pairs.as_chunks().0) {
            *doubled = [pair & 0xFFFF | pair << 16, (pair >> 16) & 0xFFFF | pair & !0xFFFF];
        }
        doubled
    }
}

/// Blocks whose largest magnitude lies below are enlarged first, so that its inverse is finite.
const LEAST_MAGNITUDE: f32 = 1e-30;

/// Codes of 128 rotated values; the result is NaN where one of them is not finite.
#[inline(always)]
pub(super) fn quantize<S: Simd>(s: S, mut v: [S::F; SPAN]) -> RotatedBlock {
    // Stays 0 as long as all values are finite.
    let (mut nothing, mut largest) = (s.splat(0.0), s.splat(0.0));
    for &v in &v {
        nothing = s.fma(v, s.splat(0.0), nothing);
        largest = s.max(s.max(v, s.sub(s.splat(0.0), v)), largest);
    }
    if s.reduce_add(nothing) != 0.0 {
        return RotatedBlock { scale: f32::NAN, rest: f32::NAN, ..RotatedBlock::default() };
    }
    let mut largest = s.reduce_max(largest);
    if largest == 0.0 {
        return RotatedBlock::default();
    }
    let mut unit = 1.0;
    if largest < LEAST_MAGNITUDE {
        let factor = 2f32.powi(64);
        for v in &mut v {
            *v = s.mul(*v, s.splat(factor));
        }
        (largest, unit) = (largest * factor, factor.recip());
    }
    let inverse = s.splat(MOST / largest);
    let (mut codes, mut sums) = ([[0; LANES]; SPAN], s.splat_i(0));
    for (v, codes) in v.into_iter().zip(&mut codes) {
        let rounded = s.round_i(s.mul(v, inverse));
        sums = s.add_i(sums, rounded);
        s.store_i(rounded, codes);
    }
    // At most 2^22: every partial sum is exact.
    let sum = s.reduce_add(s.to_f32(sums));
    let mut block = RotatedBlock {
        start: -510 * sum as i32,
        scale: largest / MOST * Codebook::MUL1_STEP * unit,
        rest: largest / MOST * Codebook::MUL1_MIDDLE * sum * unit,
        ..RotatedBlock::default()
    };
    for (pair, codes) in block.pairs.iter_mut().zip(codes.as_flattened().as_chunks::<2>().0) {
        *pair = (codes[0] & 0xFFFF | codes[1] << 16) as i32;
    }
    block
}

/// Lines of code pairs that are decoded at once for several rows: they stay in the first-level cache.
pub(in crate::linear) const CODE_PANEL: usize = 256;
/// Blocks of 128 input features of such a panel.
const PANEL_BLOCKS: usize = CODE_PANEL / (HADAMARD / 2);

/// The tiles of a span times activations as i16.
pub(super) struct CodeSpan<'a> {
    pub(super) q: &'a Exl3,
    pub(super) span: usize,
    pub(super) x: Rows<'a, RotatedBlock>,
    /// Those of a single row, if its byte sums are to be products.
    pub(super) doubled: Option<&'a [DoubledCodes]>,
    /// [`CODE_PANEL`] lines; none for a single row.
    pub(super) codes: &'a mut [Line<u32>],
    pub(super) acc: &'a mut [Line<f32>],
}

impl Kernel for CodeSpan<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { q, span, x, doubled, codes, acc } = self;
        let rows = acc.len() / SPAN;
        for (t, acc) in acc.chunks_exact_mut(rows).enumerate() {
            let column = SPAN * span + t;
            match acc {
                [acc] => *acc = with_bits!(q.bits, one_row::<S>(s, q.words_from(column), x.row(0), doubled)),
                _ => multiply_codes(s, q.bits, q.column_words(column), x, codes, acc),
            }
        }
        rotate_back(s, &q.svh[span * HADAMARD..], acc);
    }
}

/// Products of the states of two rows of all columns, whose byte sums are `u + 510`.
#[inline(always)]
fn multiply_states<S: Simd, const BITS: usize>(s: S, tile: &[TrellisRow; BITS], pair: usize) -> [S::I; 2] {
    let multiplier = s.splat_i(Codebook::Mul1.multiplier() as i32);
    let [even, odd] = s.trellis_states(tile, pair);
    [s.mul_i(even, multiplier), s.mul_i(odd, multiplier)]
}

/// `u + 510` of two rows of all columns.
#[inline(always)]
fn sum_pairs<S: Simd, const BITS: usize>(s: S, tile: &[TrellisRow; BITS], pair: usize) -> S::I {
    let [even, odd] = multiply_states(s, tile, pair);
    s.sum_byte_pairs(even, odd)
}

/// The highest rate at which byte sums by products pay: above, memory bounds a row.
pub(super) const MOST_BITS_BY_PRODUCTS: usize = 3;

#[inline(always)]
fn one_row<S: Simd, const BITS: usize>(
    s: S,
    words: &[TrellisRow],
    x: &[RotatedBlock],
    doubled: Option<&[DoubledCodes]>,
) -> Line<f32> {
    match doubled {
        Some(doubled) if BITS <= MOST_BITS_BY_PRODUCTS => s.outlined(OneRow::<BITS, true> { words, x, doubled }),
        _ => s.outlined(OneRow::<BITS, false> { words, x, doubled: &[] }),
    }
}

/// One row straight from the packed words; with `PRODUCTS` its byte sums are made by products.
struct OneRow<'a, const BITS: usize, const PRODUCTS: bool> {
    /// Those of the column, and what follows it.
    words: &'a [TrellisRow],
    x: &'a [RotatedBlock],
    /// Of `x`, for `PRODUCTS`.
    doubled: &'a [DoubledCodes],
}

impl<const BITS: usize, const PRODUCTS: bool> Kernel for OneRow<'_, BITS, PRODUCTS> {
    type Output = Line<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Line<f32> {
        let (mut acc, mut rest) = (s.splat(0.0), 0.0);
        let blocks: &[[[TrellisRow; BITS]; BLOCK_TILES]] = self.words.as_chunks().0.as_chunks().0;
        for (b, (tiles, x)) in blocks.iter().zip(self.x).enumerate() {
            // As many chains as there are registers for: their sum is exact, whatever the order.
            let chains = if S::WIDE { PAIRS } else { PAIRS / 2 };
            let mut dots = [s.splat_i(0); PAIRS];
            dots[0] = s.splat_i(x.start);
            for (i, (tile, x)) in tiles.iter().zip(x.pairs.as_chunks::<PAIRS>().0).enumerate() {
                fetch_ahead::<S, BITS>(s, self.words, b * BLOCK_TILES + i);
                for_pairs!(s, |pair| {
                    let dot = &mut dots[pair % chains];
                    *dot = if !PRODUCTS {
                        s.dot2(*dot, sum_pairs(s, tile, pair), x[pair])
                    } else {
                        let [even, odd] = multiply_states(s, tile, pair);
                        // Every second pair in another way: one has more products, the other more operations.
                        if pair.is_multiple_of(2) {
                            let sums = s.add_byte_sums(s.shl(s.sum_bytes(odd), 16), even);
                            s.dot2(*dot, sums, x[pair])
                        } else {
                            let doubled = self.doubled[b].0[i * PAIRS / 2 + pair / 2];
                            s.dot_bytes(s.dot_bytes(*dot, even, doubled[0]), odd, doubled[1])
                        }
                    };
                });
            }
            let mut dot = dots[0];
            for other in &dots[1..chains] {
                dot = s.add_i(dot, *other);
            }
            acc = s.fma(s.to_f32(dot), s.splat(x.scale), acc);
            rest += x.rest;
        }
        let mut out = Line::default();
        s.store(s.add(acc, s.splat(rest)), &mut out.0);
        out
    }
}

/// Several rows: panels of decoded codes, each multiplied with all rows; a row's sums are those of [`OneRow`].
#[inline(always)]
fn multiply_codes<S: Simd>(
    s: S,
    bits: usize,
    words: &[TrellisRow],
    x: Rows<'_, RotatedBlock>,
    codes: &mut [Line<u32>],
    acc: &mut [Line<f32>],
) {
    acc.fill(Line::default());
    let blocks = words.len() / bits / BLOCK_TILES;
    for b0 in (0..blocks).step_by(PANEL_BLOCKS) {
        let count = PANEL_BLOCKS.min(blocks - b0);
        let codes = &mut codes[..count * HADAMARD / 2];
        let words = &words[b0 * BLOCK_TILES * bits..];
        with_bits!(bits, decode_pairs::<S>(s, words, codes));
        let (codes, _) = codes.as_chunks();
        let mut r = 0;
        if S::WIDE {
            while r + 8 <= acc.len() {
                add_rows::<S, 8>(s, codes, x, b0, r, acc);
                r += 8;
            }
            if r + 4 <= acc.len() {
                add_rows::<S, 4>(s, codes, x, b0, r, acc);
                r += 4;
            }
        }
        while r + 2 <= acc.len() {
            add_rows::<S, 2>(s, codes, x, b0, r, acc);
            r += 2;
        }
        if r < acc.len() {
            add_rows::<S, 1>(s, codes, x, b0, r, acc);
        }
    }
    for (r, acc) in acc.iter_mut().enumerate() {
        let rest = x.row(r).iter().fold(0.0, |rest, block| rest + block.rest);
        s.store(s.add(s.load(&acc.0), s.splat(rest)), &mut acc.0);
    }
}

#[inline(always)]
fn decode_pairs<S: Simd, const BITS: usize>(s: S, words: &[TrellisRow], codes: &mut [Line<u32>]) {
    s.outlined(DecodePairs::<BITS> { tiles: words.as_chunks().0, codes });
}

/// Byte sums of as many tiles as `codes` has room for.
struct DecodePairs<'a, const BITS: usize> {
    tiles: &'a [[TrellisRow; BITS]],
    codes: &'a mut [Line<u32>],
}

impl<const BITS: usize> Kernel for DecodePairs<'_, BITS> {
    type Output = ();

    // The number of a pair is a constant where the loop is unrolled.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (tile, lines) in self.tiles.iter().zip(self.codes.as_chunks_mut::<PAIRS>().0) {
            for_pairs!(s, |pair| {
                s.store_i(sum_pairs(s, tile, pair), &mut lines[pair].0);
            });
        }
    }
}

/// Rows `r .. r + R` times the blocks of a panel, the first of them block `b0`.
#[inline(always)]
fn add_rows<S: Simd, const R: usize>(
    s: S,
    codes: &[[Line<u32>; HADAMARD / 2]],
    x: Rows<'_, RotatedBlock>,
    b0: usize,
    r: usize,
    acc: &mut [Line<f32>],
) {
    let mut rows: [&[RotatedBlock]; R] = [&[]; R];
    let mut sums = [s.splat(0.0); R];
    for (i, (row, sums)) in rows.iter_mut().zip(&mut sums).enumerate() {
        *row = &x.row(r + i)[b0..b0 + codes.len()];
        *sums = s.load(&acc[r + i].0);
    }
    for (b, lines) in codes.iter().enumerate() {
        let mut dots = [s.splat_i(0); R];
        for (dot, row) in dots.iter_mut().zip(rows) {
            *dot = s.splat_i(row[b].start);
        }
        for (pair, line) in lines.iter().enumerate() {
            let codes = s.load_i(&line.0);
            for (dot, row) in dots.iter_mut().zip(rows) {
                *dot = s.dot2(*dot, codes, row[b].pairs[pair]);
            }
        }
        for ((sums, dot), row) in sums.iter_mut().zip(dots).zip(rows) {
            *sums = s.fma(s.to_f32(dot), s.splat(row[b].scale), *sums);
        }
    }
    for (sums, acc) in sums.into_iter().zip(&mut acc[r..]) {
        s.store(sums, &mut acc.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;

    /// A row with both kinds of byte sums.
    struct BothSums<'a> {
        bits: u32,
        words: &'a [TrellisRow],
        x: &'a [RotatedBlock],
        doubled: &'a [DoubledCodes],
    }

    impl Kernel for BothSums<'_> {
        type Output = [Line<f32>; 2];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [Line<f32>; 2] {
            let Self { bits, words, x, doubled } = self;
            [None, Some(doubled)].map(|doubled| with_bits!(bits, one_row::<S>(s, words, x, doubled)))
        }
    }

    #[test]
    fn byte_sums_by_products_are_the_same() {
        let word = |i: usize| (i as u32).wrapping_mul(2_654_435_761).rotate_left(i as u32 % 29);
        // Small codes, whose sums are whole numbers of f32; codes of all sizes and both signs; sums that pass 2^31.
        for (start, code) in [(0, 3), (-510, 0xFFFF), (i32::MAX - 1000, 0xFFFF)] {
            let x = [RotatedBlock {
                pairs: std::array::from_fn(|i| match i % 5 {
                    0 if code == 0xFFFF => 0x7FFF_8001u32 as i32,
                    1 => (0x10000 - code) as i32 | 1 << 16,
                    _ => (word(i) & (code << 16 | code)) as i32,
                }),
                start,
                scale: 1.0,
                rest: 0.5,
            }];
            let doubled = x.each_ref().map(DoubledCodes::of);
            for bits in 1..=MOST_BITS_BY_PRODUCTS as u32 {
                let words: Vec<_> = (0..BLOCK_TILES * bits as usize)
                    .map(|row| TrellisRow(std::array::from_fn(|i| word(8 * row + i))))
                    .collect();
                for level in Level::all() {
                    let case = || BothSums { bits, words: &words, x: &x, doubled: &doubled };
                    for [expected, found] in [level.run(case()), level.run_trellis(case())] {
                        assert_eq!(found.0, expected.0, "{level:?} {bits} bits from {start}");
                        assert_ne!(found.0, [start as f32 + 0.5; LANES], "{level:?} {bits} bits: no sums");
                    }
                }
            }
        }
    }
}

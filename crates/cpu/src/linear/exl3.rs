//! Products with EXL3 weights: `y = H (H (x suh) W) svh` with orthonormal Hadamard transforms H of 128 channels.
//!
//! Rows are rotated first. A task then computes the eight tiles of sixteen columns that one output transform mixes.
//! Sums of two f16 (two of the codebooks) are decoded to f32 panels and multiplied with f32 activations. The values of
//! the third are `a (1534 + u) + c` with an integer u of -510 to 510, so that the fast mode takes activations as i16, one
//! scale for each block of 128: `sum u x` is exact in i32, and the constant part is added once.

use std::ops::Range;

use marlin_formats::exl3::{Codebook, HADAMARD, tile};

use super::{Activations, Panels, Rows, SPREAD_ELEMENTS};
use crate::Cpu;
use crate::layout::PackedWeight;
use crate::layout::exl3::{Exl3, SPAN};
use crate::simd::trellis::{PAIRS, TrellisRow};
use crate::simd::{Kernel, LANES, Line, Simd};
use crate::workspace::Scratch;
use floats::FloatSpan;

/// Factor of an orthonormal transform.
const NORM: f32 = 0.088_388_346;
/// `a`: the f16 with bits 0x1EEE.
const STEP: f32 = 1774.0 / 262_144.0;
/// `1534 a + c`, the value of byte sum 510; c is the f16 with bits 0xC931.
const MIDDLE: f32 = -476.0 / 262_144.0;
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
    fn of(block: &RotatedBlock) -> Self {
        let mut doubled = Self::default();
        for (doubled, [_, pair]) in doubled.0.iter_mut().zip(block.pairs.as_chunks().0) {
            *doubled = [pair & 0xFFFF | pair << 16, (pair >> 16) & 0xFFFF | pair & !0xFFFF];
        }
        doubled
    }
}

/// Rotated rows in the form that a weight takes.
pub(super) enum Rotated<'a> {
    Floats(Scratch<'a, f32>),
    Codes {
        blocks: Scratch<'a, RotatedBlock>,
        /// Of a single row, where its byte sums are to be products.
        doubled: Option<Scratch<'a, DoubledCodes>>,
    },
}

/// Weights whose rotated rows an operation prepares for all of its tasks; tasks rotate their rows for others.
pub(super) const PREPARED: usize = 4;

/// Rotated rows of one weight.
pub(super) struct ForWeight<'a> {
    /// Its address.
    weight: usize,
    rows: Range<usize>,
    rotated: Rotated<'a>,
}

/// The identity of a weight within an operation.
fn address(q: &Exl3) -> usize {
    std::ptr::from_ref(q).addr()
}

impl Cpu {
    /// Rotates all rows for a weight.
    pub(super) fn prepare_rotated<'a>(&'a self, activations: &mut Activations<'a>, q: &Exl3) {
        let prepared = activations.rotated.iter().flatten().any(|rotated| rotated.weight == address(q));
        let Some(slot) = activations.rotated.iter_mut().find(|slot| slot.is_none()) else {
            return;
        };
        let (x, columns) = (activations.x, activations.columns);
        if prepared || columns == 0 {
            return;
        }
        let count = x.len() / columns;
        let rows = Rows { data: x, stride: columns, first: 0, index: None };
        let rotated = self.rotate(q, rows, count, activations.f32_only, true);
        *slot = Some(ForWeight { weight: address(q), rows: 0..count, rotated });
    }

    /// Some rows in the form that a weight takes; `spread` lets other threads help.
    fn rotate(&self, q: &Exl3, x: Rows<'_, f32>, count: usize, f32_only: bool, spread: bool) -> Rotated<'_> {
        let width = q.suh.len();
        let grain = match spread && count * width >= SPREAD_ELEMENTS {
            true => self.pool.grain(count),
            false => count.max(1),
        };
        let rows = |i: usize| Rows { first: x.first + i * grain, ..x };
        if q.codebook == Codebook::Mul1 && !self.exact() && !f32_only {
            let per_row = width / HADAMARD;
            let mut blocks = self.workspace.rotated.take(count * per_row);
            self.pool.for_chunks(&mut blocks, grain * per_row, |i, out| {
                self.level.run(RotateRows { x: rows(i), scales: &q.suh, out: Out::Codes(out) });
            });
            let doubled = (count == 1 && self.sums_bytes_by_products).then(|| {
                let mut doubled = self.workspace.doubled.take(per_row);
                doubled.iter_mut().zip(&*blocks).for_each(|(doubled, block)| *doubled = DoubledCodes::of(block));
                doubled
            });
            Rotated::Codes { blocks, doubled }
        } else {
            let mut floats = self.workspace.floats.take(count * width);
            self.pool.for_chunks(&mut floats, grain * width, |i, out| {
                self.level.run(RotateRows { x: rows(i), scales: &q.suh, out: Out::Floats(out) });
            });
            Rotated::Floats(floats)
        }
    }

    /// `acc[t][r] = x[rows[r]] W` for the eight tiles from `SPAN span`; those past the last column are not meaningful.
    pub(super) fn multiply_span(
        &self,
        (weight, q): (&PackedWeight, &Exl3),
        span: usize,
        x: &Activations<'_>,
        rows: Range<usize>,
        panels: &mut Panels<'_>,
        acc: &mut [Line<f32>],
    ) {
        debug_assert_eq!(acc.len(), SPAN * rows.len());
        let own = |rotated: &ForWeight<'_>| rotated.weight == address(q);
        if let Some(prepared) = x.rotated.iter().flatten().find(|rotated| own(rotated)) {
            let rows = (rows.start, x.index);
            return self.multiply_rotated((weight, q), span, &prepared.rotated, rows, panels, acc);
        }
        let place = panels.rotated.iter().position(|r| r.as_ref().is_some_and(|r| own(r) && r.rows == rows));
        // Taken out, so that the panels can be lent.
        let rotated = match place {
            Some(place) => panels.rotated[place].take(),
            None => None,
        };
        let rotated = rotated.unwrap_or_else(|| {
            let source = Rows { data: x.x, stride: x.columns, first: rows.start, index: x.index };
            let rotated = panels.cpu.rotate(q, source, rows.len(), x.f32_only, false);
            ForWeight { weight: address(q), rows: rows.clone(), rotated }
        });
        self.multiply_rotated((weight, q), span, &rotated.rotated, (0, None), panels, acc);
        panels.rotated.swap(0, 1);
        panels.rotated[0] = Some(rotated);
    }

    /// [`Cpu::multiply_span`] of rotated rows from the first one, possibly picked by index.
    fn multiply_rotated(
        &self,
        (weight, q): (&PackedWeight, &Exl3),
        span: usize,
        rotated: &Rotated<'_>,
        (first, index): (usize, Option<&[u32]>),
        panels: &mut Panels<'_>,
        acc: &mut [Line<f32>],
    ) {
        match rotated {
            Rotated::Codes { blocks, doubled } => {
                let doubled = doubled.as_deref();
                let x = Rows { data: &blocks[..], stride: q.suh.len() / HADAMARD, first, index };
                let codes = match acc.len() {
                    SPAN => &mut [],
                    _ => panels.lines().1,
                };
                self.level.run_trellis(CodeSpan { q, span, x, doubled, codes, acc });
            }
            Rotated::Floats(floats) => {
                let x = Rows { data: &floats[..], stride: q.suh.len(), first, index };
                let (floats, _) = panels.lines();
                self.level.run_trellis(FloatSpan { weight, q, span, x, floats, acc });
            }
        }
    }
}

enum Out<'a> {
    /// `[rows, padded K]`.
    Floats(&'a mut [f32]),
    /// `[rows, padded K / 128]`.
    Codes(&'a mut [RotatedBlock]),
}

/// `H (x scales)` of rows that `out` has room for.
struct RotateRows<'a> {
    x: Rows<'a, f32>,
    scales: &'a [f32],
    out: Out<'a>,
}

impl Kernel for RotateRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let scales = self.scales.as_chunks::<HADAMARD>().0;
        match self.out {
            Out::Floats(out) => {
                let (blocks, _) = out.as_chunks_mut::<HADAMARD>();
                for (r, out) in blocks.chunks_exact_mut(scales.len()).enumerate() {
                    let row = self.x.row(r);
                    for ((b, scales), out) in scales.iter().enumerate().zip(out) {
                        let values = rotated_block(s, row, b, scales);
                        for (v, out) in values.into_iter().zip(out.as_chunks_mut::<LANES>().0) {
                            s.store(v, out);
                        }
                    }
                }
            }
            Out::Codes(blocks) => {
                for (r, out) in blocks.chunks_exact_mut(scales.len()).enumerate() {
                    let row = self.x.row(r);
                    for ((b, scales), out) in scales.iter().enumerate().zip(out) {
                        *out = quantize(s, rotated_block(s, row, b, scales));
                    }
                }
            }
        }
    }
}

/// `H (x scales)` of block `b` of a row; the row is continued with zeros.
#[inline(always)]
fn rotated_block<S: Simd>(s: S, row: &[f32], b: usize, scales: &[f32; HADAMARD]) -> [S::F; SPAN] {
    let row = &row[b * HADAMARD..];
    let mut padded = [0.0; HADAMARD];
    let x = match row.first_chunk() {
        Some(block) => block,
        None => {
            padded[..row.len()].copy_from_slice(row);
            &padded
        }
    };
    let mut values = [s.splat(0.0); SPAN];
    for ((v, x), scale) in values.iter_mut().zip(x.as_chunks::<LANES>().0).zip(scales.as_chunks::<LANES>().0) {
        *v = s.mul(s.load(x), s.load(scale));
    }
    transform(s, values)
}

/// The orthonormal Hadamard transform of 128 values.
#[inline(always)]
pub(crate) fn transform<S: Simd>(s: S, mut v: [S::F; SPAN]) -> [S::F; SPAN] {
    for v in &mut v {
        *v = s.butterfly::<1>(*v);
        *v = s.butterfly::<2>(*v);
        *v = s.butterfly::<4>(*v);
        *v = s.butterfly::<8>(*v);
    }
    for width in [1, 2, 4] {
        for i in 0..SPAN {
            if i & width == 0 {
                (v[i], v[i + width]) = (s.add(v[i], v[i + width]), s.sub(v[i], v[i + width]));
            }
        }
    }
    for v in &mut v {
        *v = s.mul(*v, s.splat(NORM));
    }
    v
}

/// Blocks whose largest magnitude lies below are enlarged first, so that its inverse is finite.
const LEAST_MAGNITUDE: f32 = 1e-30;

/// Codes of 128 rotated values; the result is NaN where one of them is not finite.
#[inline(always)]
fn quantize<S: Simd>(s: S, mut v: [S::F; SPAN]) -> RotatedBlock {
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
        scale: largest / MOST * STEP * unit,
        rest: largest / MOST * MIDDLE * sum * unit,
        ..RotatedBlock::default()
    };
    for (pair, codes) in block.pairs.iter_mut().zip(codes.as_flattened().as_chunks::<2>().0) {
        *pair = (codes[0] & 0xFFFF | codes[1] << 16) as i32;
    }
    block
}

/// Calls `$f::<S, BITS>(...)` for a bit rate.
macro_rules! with_bits {
    ($bits:expr, $call:ident :: <$s:ident> $args:tt) => {
        match $bits {
            1 => $call::<$s, 1> $args,
            2 => $call::<$s, 2> $args,
            3 => $call::<$s, 3> $args,
            4 => $call::<$s, 4> $args,
            5 => $call::<$s, 5> $args,
            6 => $call::<$s, 6> $args,
            7 => $call::<$s, 7> $args,
            8 => $call::<$s, 8> $args,
            bits => unreachable!("a validated matrix does not have {bits} bits a weight"),
        }
    };
}

/// Expands a step for each of the row pairs of a tile, so that their shifts are constants; a loop where instructions
/// gain nothing by that.
macro_rules! for_pairs {
    ($s:ident, |$pair:ident| $step:block) => {
        if $s.unrolls() {
            for_pairs!(@ $pair $step 0 1 2 3 4 5 6 7);
        } else {
            for $pair in 0..PAIRS $step
        }
    };
    (@ $pair:ident $step:block $($i:literal)*) => {
        $({
            let $pair: usize = $i;
            $step
        })*
    };
}
const _: () = assert!(PAIRS == 8);

// After the macros that it uses.
mod floats;

/// Products of the states of two rows of all columns, whose byte sums are `u + 510`.
#[inline(always)]
fn multiply_states<S: Simd, const BITS: usize>(s: S, tile: &[TrellisRow; BITS], pair: usize) -> [S::I; 2] {
    let multiplier = s.splat_i(Codebook::Mul1.multiplier() as i32);
    s.trellis_states(tile, pair).map(|states| s.mul_i(states, multiplier))
}

/// `u + 510` of two rows of all columns.
#[inline(always)]
fn sum_pairs<S: Simd, const BITS: usize>(s: S, tile: &[TrellisRow; BITS], pair: usize) -> S::I {
    let [even, odd] = multiply_states(s, tile, pair);
    s.sum_byte_pairs(even, odd)
}

/// Decodes input features `k0 ..` of a column tile to f32, one line each; both are whole tiles.
#[inline(always)]
pub(super) fn decode_panel<S: Simd>(s: S, q: &Exl3, column: usize, k0: usize, panel: &mut [Line<f32>]) {
    with_bits!(q.bits, decode_bits::<S>(s, q, column, k0, panel));
}

#[inline(always)]
fn decode_bits<S: Simd, const BITS: usize>(s: S, q: &Exl3, column: usize, k0: usize, panel: &mut [Line<f32>]) {
    let tiles = &q.column_words(column).as_chunks::<BITS>().0[k0 / tile::SIDE..];
    match (q.codebook, q.rounds) {
        (Codebook::Mul1, _) => s.outlined(ByteSums { tiles, panel }),
        (codebook, true) => s.outlined(HalfSums::<BITS, true> { codebook, tiles, panel }),
        (codebook, false) => s.outlined(HalfSums::<BITS, false> { codebook, tiles, panel }),
    }
}

/// Tiles of [`Codebook::Mul1`] to f32.
struct ByteSums<'a, const BITS: usize> {
    tiles: &'a [[TrellisRow; BITS]],
    panel: &'a mut [Line<f32>],
}

impl<const BITS: usize> Kernel for ByteSums<'_, BITS> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let multiplier = s.splat_i(Codebook::Mul1.multiplier() as i32);
        for (tile, lines) in self.tiles.iter().zip(self.panel.as_chunks_mut::<{ tile::SIDE }>().0) {
            for_pairs!(s, |pair| {
                for (state, line) in s.trellis_states(tile, pair).into_iter().zip(&mut lines[2 * pair..]) {
                    let u = s.add_i(s.sum_bytes(s.mul_i(state, multiplier)), s.splat_i(-510));
                    // The product is exact, so this rounds as the sum of the definition does.
                    let value = s.fma(s.to_f32(u), s.splat(STEP), s.splat(MIDDLE));
                    s.store(s.round_f16(value), &mut line.0);
                }
            });
        }
    }
}

/// Tiles of the other codebooks to f32, rounded to f16 or as they are.
struct HalfSums<'a, const BITS: usize, const ROUND: bool> {
    codebook: Codebook,
    tiles: &'a [[TrellisRow; BITS]],
    panel: &'a mut [Line<f32>],
}

impl<const BITS: usize, const ROUND: bool> Kernel for HalfSums<'_, BITS, ROUND> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let multiplier = s.splat_i(self.codebook.multiplier() as i32);
        let increment = s.splat_i(self.codebook.increment() as i32);
        for (tile, lines) in self.tiles.iter().zip(self.panel.as_chunks_mut::<{ tile::SIDE }>().0) {
            for_pairs!(s, |pair| {
                for (state, line) in s.trellis_states(tile, pair).into_iter().zip(&mut lines[2 * pair..]) {
                    let value = sum_halves(s, s.add_i(s.mul_i(state, multiplier), increment));
                    s.store(if ROUND { s.round_f16(value) } else { value }, &mut line.0);
                }
            });
        }
    }
}

/// Sum of the two f16 that a codebook makes of the halves of each lane; it is exact.
#[inline(always)]
fn sum_halves<S: Simd>(s: S, x: S::I) -> S::F {
    s.add(upper_half(s, x), upper_half(s, s.shl(x, 16)))
}

/// The f16 with bits `(x >> 16 & 0x8FFF) ^ 0x3B60` as f32: the sign, two bits of the exponent and the mantissa move to
/// their places, and the exponent gets 112 more.
#[inline(always)]
fn upper_half<S: Simd>(s: S, x: S::I) -> S::F {
    let bits = s.and(s.sar(x, 3), s.splat_i(0x81FF_E000u32 as i32));
    s.bits_to_f32(s.xor(bits, s.splat_i(0x3F6C_0000)))
}

/// Lines of code pairs that are decoded at once for several rows: they stay in the first-level cache.
pub(super) const CODE_PANEL: usize = 256;
/// Blocks of 128 input features of such a panel.
const PANEL_BLOCKS: usize = CODE_PANEL / (HADAMARD / 2);

/// The tiles of a span times activations as i16.
struct CodeSpan<'a> {
    q: &'a Exl3,
    span: usize,
    x: Rows<'a, RotatedBlock>,
    /// Those of a single row, if its byte sums are to be products.
    doubled: Option<&'a [DoubledCodes]>,
    /// [`CODE_PANEL`] lines; none for a single row.
    codes: &'a mut [Line<u32>],
    acc: &'a mut [Line<f32>],
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

/// `y = H acc svh` for the rows of a span, `[tiles][rows]`.
#[inline(always)]
fn rotate_back<S: Simd>(s: S, svh: &[f32], acc: &mut [Line<f32>]) {
    let rows = acc.len() / SPAN;
    for r in 0..rows {
        let mut v = [s.splat(0.0); SPAN];
        for (v, line) in v.iter_mut().zip(acc[r..].iter().step_by(rows)) {
            *v = s.load(&line.0);
        }
        let lines = acc[r..].iter_mut().step_by(rows);
        for ((v, svh), line) in transform(s, v).into_iter().zip(svh.as_chunks::<LANES>().0).zip(lines) {
            s.store(s.mul(v, s.load(svh)), &mut line.0);
        }
    }
}

/// Tiles of one block of 128 input features.
const BLOCK_TILES: usize = HADAMARD / tile::SIDE;

#[inline(always)]
fn one_row<S: Simd, const BITS: usize>(
    s: S,
    words: &[TrellisRow],
    x: &[RotatedBlock],
    doubled: Option<&[DoubledCodes]>,
) -> Line<f32> {
    match doubled {
        Some(doubled) => s.outlined(OneRow::<BITS, true> { words, x, doubled }),
        None => s.outlined(OneRow::<BITS, false> { words, x, doubled: &[] }),
    }
}

/// Rows of words that are fetched ahead of their use.
const AHEAD: usize = 128;
/// Rows of words in a cache line.
const ROWS_PER_LINE: usize = 2;

/// Starts to fetch what is used a while after tile `tile`.
#[inline(always)]
fn fetch_ahead<S: Simd, const BITS: usize>(s: S, words: &[TrellisRow], tile: usize) {
    for row in (0..BITS).step_by(ROWS_PER_LINE) {
        s.prefetch(words, tile * BITS + AHEAD + row);
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
                        if pair % 2 == 0 {
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

    struct Value(Codebook, [u32; LANES], bool);

    impl Kernel for Value {
        type Output = [f32; LANES];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [f32; LANES] {
            let Self(codebook, states, round) = self;
            let product = s.mul_i(s.load_i(&states), s.splat_i(codebook.multiplier() as i32));
            let value = match codebook {
                Codebook::Mul1 => {
                    let u = s.add_i(s.sum_bytes(product), s.splat_i(-510));
                    s.fma(s.to_f32(u), s.splat(STEP), s.splat(MIDDLE))
                }
                _ => {
                    let x = s.add_i(product, s.splat_i(codebook.increment() as i32));
                    s.add(upper_half(s, x), upper_half(s, s.shl(x, 16)))
                }
            };
            let mut out = [0.0; LANES];
            s.store(if round { s.round_f16(value) } else { value }, &mut out);
            out
        }
    }

    #[test]
    fn every_state_has_the_value_of_its_codebook() {
        for level in Level::all() {
            for codebook in Codebook::ALL {
                for first in (0..=u16::MAX).step_by(LANES) {
                    let states = std::array::from_fn(|lane| u32::from(first) + lane as u32);
                    let found = level.run(Value(codebook, states, true));
                    let expected = states.map(|state| codebook.value(state as u16).to_f32());
                    assert_eq!(found, expected, "{level:?} {codebook:?} from state {first}");
                }
            }
        }
    }

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
        // Codes of all sizes, the largest of both signs among them.
        let x: [RotatedBlock; 3] = std::array::from_fn(|b| RotatedBlock {
            pairs: std::array::from_fn(|i| match i % 5 {
                0 => 0x7FFF_8001u32 as i32,
                1 => 0x8001_7FFFu32 as i32,
                _ => (word(i + 64 * b) & 0x7FFF_7FFF) as i32,
            }),
            start: b as i32 - 1,
            scale: 1.0,
            rest: 0.5,
        });
        let doubled = x.each_ref().map(DoubledCodes::of);
        for bits in 1..=8 {
            let words: Vec<_> = (0..x.len() * BLOCK_TILES * bits as usize)
                .map(|row| TrellisRow(std::array::from_fn(|i| word(8 * row + i))))
                .collect();
            for level in Level::all() {
                let case = || BothSums { bits, words: &words, x: &x, doubled: &doubled };
                for [expected, found] in [level.run(case()), level.run_trellis(case())] {
                    assert_eq!(found.0, expected.0, "{level:?} {bits} bits");
                    assert_ne!(found.0, [1.5; LANES], "{level:?} {bits} bits: no sums");
                }
            }
        }
    }

    struct Transform([f32; HADAMARD]);

    impl Kernel for Transform {
        type Output = [f32; HADAMARD];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> [f32; HADAMARD] {
            let mut v = [s.splat(0.0); SPAN];
            for (v, x) in v.iter_mut().zip(self.0.as_chunks::<LANES>().0) {
                *v = s.load(x);
            }
            let mut out = [0.0; HADAMARD];
            for (v, out) in transform(s, v).into_iter().zip(out.as_chunks_mut::<LANES>().0) {
                s.store(v, out);
            }
            out
        }
    }

    #[test]
    fn the_transform_is_the_hadamard_matrix() {
        for level in Level::all() {
            for column in 0..HADAMARD {
                let mut x = [0.0; HADAMARD];
                x[column] = 2.0;
                let found = level.run(Transform(x));
                for (row, v) in found.into_iter().enumerate() {
                    let sign = if (row & column).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
                    assert_eq!(v, 2.0 * sign * NORM, "{level:?} {row} {column}");
                }
            }
        }
    }
}

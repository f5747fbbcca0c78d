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
pub(super) use codes::CODE_PANEL;
use codes::{CodeSpan, MOST_BITS_BY_PRODUCTS, quantize};
pub(crate) use codes::{DoubledCodes, RotatedBlock};
use floats::FloatSpan;

/// Factor of an orthonormal transform.
const NORM: f32 = 0.088_388_346;

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
            let by_products = q.bits <= MOST_BITS_BY_PRODUCTS && self.level.sums_bytes_by_products();
            let doubled = (count == 1 && by_products).then(|| {
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

// After the macros that they use.
mod codes;
mod floats;

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
                    let value = s.fma(s.to_f32(u), s.splat(Codebook::MUL1_STEP), s.splat(Codebook::MUL1_MIDDLE));
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
                    s.fma(s.to_f32(u), s.splat(Codebook::MUL1_STEP), s.splat(Codebook::MUL1_MIDDLE))
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

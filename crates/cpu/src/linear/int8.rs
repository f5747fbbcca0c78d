//! Tiles of small-integer codes times int8 activations.
//!
//! Every format here is `w = (u - c) * scale + offset` with an unsigned byte u per weight:
//!
//! | codes | u | c | factor on the scale |
//! |---|---|---|---|
//! | E2M1 | 2 value + 12 | 12 | 1/2 |
//! | 4, 5, 6 bits | q | 8, 16, 32, or the zero point | 1 |
//! | two's complement bytes | q + 128 | 128 | 1 |
//! | unsigned bytes | q | the zero point | 1 |
//! | 2 and 3 bits | 2 q | 3, 7, 8, or twice the zero point | 1/2 |
//! | IQ4 | level + 128 | 128 | 1 |
//!
//! so a block of 32 gives `((sum u a - c sum a) * scale + offset sum a) * activation scale`, the first sum in i32, exact.
//! Formats with offsets have c = 0. Groups of 16 take half a block each.

use marlin_formats::{Format, IQ4};
use marlin_ops::activation::{ACTIVATION_BLOCK, quantize_activation_block};

use crate::layout::{CodeOrder, Quantized};
use crate::simd::{Kernel, LANES, Line, Simd};

use super::Rows;
use super::decode::{load_scale, load_shift, prefetch_scale};

/// Vectors of codes in a block.
const VECTORS: usize = ACTIVATION_BLOCK / 4;

/// 32 activations of one row as int8, in the order of a weight layout; one cache line.
#[derive(Clone, Copy, Debug, Default)]
#[repr(align(64))]
pub(crate) struct ActivationBlock {
    /// Four codes each, first in the lowest byte.
    codes: [i32; VECTORS],
    /// `-offset sum` for the two constant offsets that formats of this order have: what their dot products start from.
    starts: [i32; 2],
    /// Sums of the codes of both halves.
    half_sums: [i32; 2],
    /// Sum of all codes, for offsets that are zero points.
    sum: f32,
    /// Multiplier of the codes.
    scale: f32,
}

/// What the most used formats of an order subtract, as [`ActivationBlock::starts`] has it.
const fn constant_offsets(order: CodeOrder) -> [i32; 2] {
    match order {
        CodeOrder::Nibbles => [8, 12],
        CodeOrder::Bytes => [128, 0],
        CodeOrder::Pairs => [7, 3],
    }
}

/// How codes become unsigned bytes, what is subtracted from them, and what is added at the end.
#[derive(Clone, Copy)]
struct Kind {
    bytes: Bytes,
    shift: Shift,
    /// Whether a block has two groups.
    halves: bool,
}

/// How codes become unsigned bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bytes {
    /// Nibbles as they are.
    Four,
    /// Nibbles and a high bit.
    Five,
    /// Nibbles and two high bits.
    Six,
    /// E2M1 nibbles to `2 value + 12`.
    Fp4,
    /// Nibbles to [`IQ4`] + 128.
    Iq4,
    /// Bytes as they are.
    Eight,
    /// Two's complement bytes + 128.
    Signed,
    /// 2-bit codes, doubled.
    Two,
    /// 3-bit codes, doubled.
    Three,
}

impl Bytes {
    /// All, by their numbers.
    const ALL: [Self; 9] =
        [Self::Four, Self::Five, Self::Six, Self::Fp4, Self::Iq4, Self::Eight, Self::Signed, Self::Two, Self::Three];
}

/// What is subtracted or added.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shift {
    /// A constant is subtracted from the bytes.
    Constant(i32),
    /// Zero points are subtracted.
    Zeros,
    /// Offsets are added to the product.
    Offsets,
}

/// Kinds as the numbers that kernels are compiled for.
mod kind {
    use super::{Bytes, Kind, Shift};

    /// A kind with whole blocks.
    pub(super) const fn whole(bytes: Bytes, shift: Shift) -> u32 {
        let shift = match shift {
            Shift::Zeros => 0,
            Shift::Offsets => 1,
            Shift::Constant(offset) => 2 + offset as u32,
        };
        shift << 8 | bytes as u32
    }

    /// A kind with two groups a block.
    pub(super) const fn halved(bytes: Bytes, shift: Shift) -> u32 {
        whole(bytes, shift) | 1 << 7
    }

    /// The kind of a number.
    pub(super) const fn of(kind: u32) -> Kind {
        let shift = match kind >> 8 {
            0 => Shift::Zeros,
            1 => Shift::Offsets,
            offset => Shift::Constant(offset as i32 - 2),
        };
        Kind { bytes: Bytes::ALL[kind as usize & 127], shift, halves: kind >> 7 & 1 == 1 }
    }

    /// Groups that share a block.
    pub const fn halves(kind: u32) -> usize {
        if of(kind).halves { 2 } else { 1 }
    }

    /// Whether the groups' zero points are subtracted.
    pub const fn has_zeros(kind: u32) -> bool {
        matches!(of(kind).shift, Shift::Zeros)
    }

    /// Whether the groups' offsets are added.
    pub const fn has_offsets(kind: u32) -> bool {
        matches!(of(kind).shift, Shift::Offsets)
    }

    /// Factor on the scales.
    pub const fn factor(kind: u32) -> f32 {
        if matches!(of(kind).bytes, Bytes::Fp4 | Bytes::Three | Bytes::Two) { 0.5 } else { 1.0 }
    }

    /// Lines of code words per block of 32.
    pub const fn rows_per_block(kind: u32) -> usize {
        match of(kind).bytes {
            Bytes::Four | Bytes::Fp4 | Bytes::Iq4 => 4,
            Bytes::Five => 5,
            Bytes::Six => 6,
            Bytes::Eight | Bytes::Signed => 8,
            Bytes::Two => 2,
            Bytes::Three => 3,
        }
    }
}

/// [`IQ4`] + 128.
const IQ4_BYTES: [u8; 16] = {
    let mut bytes = [0; 16];
    let mut i = 0;
    while i < 16 {
        bytes[i] = (IQ4[i] + 128.0) as u8;
        i += 1;
    }
    bytes
};

/// `2 value + 12` of each E2M1 code.
const FP4_BYTES: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// Rows of `columns` activations to `ceil(columns / 32)` blocks each, as [`quantize_activation_block`] rounds them.
pub(super) struct QuantizeRows<'a> {
    pub(super) x: &'a [f32],
    pub(super) columns: usize,
    pub(super) order: CodeOrder,
    pub(super) out: &'a mut [ActivationBlock],
}

impl Kernel for QuantizeRows<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let per_row = self.columns.div_ceil(ACTIVATION_BLOCK);
        for (row, out) in self.x.chunks_exact(self.columns).zip(self.out.chunks_exact_mut(per_row)) {
            match self.order {
                CodeOrder::Nibbles => quantize_row::<S, 0>(s, row, out),
                CodeOrder::Bytes => quantize_row::<S, 1>(s, row, out),
                CodeOrder::Pairs => quantize_row::<S, 2>(s, row, out),
            }
        }
    }
}

/// Blocks whose largest magnitude lies below have scales that are not normal numbers; they take the slow way.
const LEAST_MAGNITUDE: f32 = 1e-30;

/// One row. `ORDER` is an index into [`CodeOrder::ALL`].
#[inline(always)]
fn quantize_row<S: Simd, const ORDER: usize>(s: S, row: &[f32], out: &mut [ActivationBlock]) {
    let (whole, tail) = row.as_chunks::<ACTIVATION_BLOCK>();
    // Stays 0 as long as all values are finite.
    let mut nothing = s.splat(0.0);
    for values in row.as_chunks::<LANES>().0 {
        nothing = s.fma(s.load(values), s.splat(0.0), nothing);
    }
    let finite = s.reduce_add(nothing) == 0.0;
    for (values, out) in whole.iter().zip(&mut *out) {
        let halves = values.as_chunks::<LANES>().0;
        let (a, b) = (s.load(&halves[0]), s.load(&halves[1]));
        let magnitude = |v| s.max(v, s.sub(s.splat(0.0), v));
        let largest = if finite { s.reduce_max(s.max(magnitude(a), magnitude(b))) } else { 0.0 };
        *out = if largest >= LEAST_MAGNITUDE {
            let inverse = s.splat(127.0 / largest);
            let codes = [s.round_i(s.mul(a, inverse)), s.round_i(s.mul(b, inverse))];
            let sums = codes.map(|codes| s.reduce_add(s.to_f32(codes)) as i32);
            let bytes = codes.map(|codes| s.low_bytes(codes));
            block_of::<ORDER>(&bytes, sums, largest / 127.0)
        } else {
            quantize_block::<ORDER>(values)
        };
    }
    if let [.., last] = out
        && !tail.is_empty()
    {
        *last = quantize_block::<ORDER>(tail);
    }
}

/// One block of at most 32 values; the rest counts as 0.
fn quantize_block<const ORDER: usize>(values: &[f32]) -> ActivationBlock {
    let mut codes = [0i8; ACTIVATION_BLOCK];
    let scale = quantize_activation_block(values, &mut codes);
    let mut halves = [[0; LANES]; 2];
    for (half, codes) in halves.iter_mut().zip(codes.as_chunks::<LANES>().0) {
        *half = codes.map(|code| code as u8);
    }
    let sum = |codes: &[u8; LANES]| codes.iter().map(|&code| i32::from(code as i8)).sum();
    block_of::<ORDER>(&halves, [sum(&halves[0]), sum(&halves[1])], scale)
}

/// A block from its codes as bytes in two halves, the sums of the halves, and the scale.
#[inline(always)]
fn block_of<const ORDER: usize>(bytes: &[[u8; LANES]; 2], sums: [i32; 2], scale: f32) -> ActivationBlock {
    let order = const { CodeOrder::ALL[ORDER] };
    let sum = sums[0] + sums[1];
    let mut codes = [0; VECTORS];
    for (codes, bytes) in codes.as_chunks_mut::<{ VECTORS / 2 }>().0.iter_mut().zip(bytes) {
        // An order moves codes within halves only, in both alike.
        for (v, word) in codes.iter_mut().enumerate() {
            *word = i32::from_le_bytes(std::array::from_fn(|b| bytes[order.feature(v, b)]));
        }
    }
    ActivationBlock {
        codes,
        starts: constant_offsets(order).map(|offset| -offset * sum),
        half_sums: sums,
        sum: sum as f32,
        scale,
    }
}

/// Tiles that share broadcast activations.
pub(crate) const PAIR: usize = 2;

/// Scratch lines that [`multiply`] needs for several rows: codes and floats.
pub(super) fn panel_lines(in_features: usize) -> (usize, usize) {
    let blocks = in_features.div_ceil(ACTIVATION_BLOCK);
    (PAIR * VECTORS * blocks, PAIR * 4 * blocks)
}

/// A tile of a quantized weight.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    pub(super) weight: &'a Quantized,
    pub(super) index: usize,
}

/// `acc[t][r][lane] = sum_k x[r][k] w_t[k][lane]` for the rows of `x` and one or two tiles of weights with the same
/// format and size. A row's result does not depend on the other rows, a tile's not on the other tile.
#[inline(always)]
pub(super) fn multiply<S: Simd>(
    s: S,
    tiles: &[Tile<'_>],
    x: Rows<'_, ActivationBlock>,
    codes: &mut [Line<u32>],
    floats: &mut [Line<f32>],
    acc: &mut [Line<f32>],
) {
    use Bytes::*;
    use Shift::*;
    let mut task = Task { s, tiles, x, codes, floats, acc };
    match tiles[0].weight.scheme.format {
        Format::Int4S4 => task.run::<{ kind::whole(Four, Constant(8)) }>(),
        Format::Int4U4 => task.run::<{ kind::whole(Four, Zeros) }>(),
        Format::Q4K | Format::Q4_1 | Format::Affine4 => task.run::<{ kind::whole(Four, Offsets) }>(),
        Format::Fp4E2m1 | Format::Mxfp4 => task.run::<{ kind::whole(Fp4, Constant(12)) }>(),
        Format::Nvfp4 => task.run::<{ kind::halved(Fp4, Constant(12)) }>(),
        Format::Int8 => task.run::<{ kind::whole(Signed, Constant(128)) }>(),
        Format::Int8Asym => task.run::<{ kind::whole(Eight, Zeros) }>(),
        Format::Affine8 => task.run::<{ kind::whole(Eight, Offsets) }>(),
        Format::Int3 => task.run::<{ kind::whole(Three, Constant(7)) }>(),
        Format::Int3U3 => task.run::<{ kind::whole(Three, Zeros) }>(),
        Format::Affine3 => task.run::<{ kind::whole(Three, Offsets) }>(),
        Format::Q3K => task.run::<{ kind::halved(Three, Constant(8)) }>(),
        Format::Int2 => task.run::<{ kind::whole(Two, Constant(3)) }>(),
        Format::Int2U2 => task.run::<{ kind::whole(Two, Zeros) }>(),
        Format::Affine2 => task.run::<{ kind::whole(Two, Offsets) }>(),
        Format::Q2K => task.run::<{ kind::halved(Two, Offsets) }>(),
        Format::Q5_0 => task.run::<{ kind::whole(Five, Constant(16)) }>(),
        Format::Q5K | Format::Q5_1 | Format::Affine5 => task.run::<{ kind::whole(Five, Offsets) }>(),
        Format::Q6K => task.run::<{ kind::halved(Six, Constant(32)) }>(),
        Format::Iq4Xs | Format::Iq4Nl => task.run::<{ kind::whole(Iq4, Constant(128)) }>(),
        Format::Affine6 => task.run::<{ kind::whole(Six, Offsets) }>(),
        format @ (Format::Fp8E4m3 | Format::Fp8E5m2 | Format::Fp8E4m3F32 | Format::Nf4 | Format::Nf3 | Format::Nf2) => {
            unreachable!("{format} takes f32 activations")
        }
    }
}

struct Task<'a, S> {
    s: S,
    tiles: &'a [Tile<'a>],
    x: Rows<'a, ActivationBlock>,
    codes: &'a mut [Line<u32>],
    floats: &'a mut [Line<f32>],
    acc: &'a mut [Line<f32>],
}

impl<S: Simd> Task<'_, S> {
    #[inline(always)]
    fn run<const KIND: u32>(&mut self) {
        let rows = self.acc.len() / self.tiles.len();
        if rows == 1 {
            for (tile, acc) in self.tiles.iter().zip(&mut *self.acc) {
                *acc = one_row::<S, KIND>(self.s, tile, self.x.row(0));
            }
        } else if S::WIDE && self.tiles.len() == PAIR {
            self.decode::<PAIR, KIND>(0);
            let mut r = 0;
            while r + 6 <= rows {
                self.rows::<6, PAIR, KIND>(0, r);
                r += 6;
            }
            if r + 4 <= rows {
                self.rows::<4, PAIR, KIND>(0, r);
                r += 4;
            }
            if r + 2 <= rows {
                self.rows::<2, PAIR, KIND>(0, r);
                r += 2;
            }
            if r < rows {
                self.rows::<1, PAIR, KIND>(0, r);
            }
        } else {
            for t in 0..self.tiles.len() {
                self.decode::<1, KIND>(t);
                let mut r = 0;
                if S::WIDE {
                    while r + 8 <= rows {
                        self.rows::<8, 1, KIND>(t, r);
                        r += 8;
                    }
                }
                while r + 2 <= rows {
                    self.rows::<2, 1, KIND>(t, r);
                    r += 2;
                }
                if r < rows {
                    self.rows::<1, 1, KIND>(t, r);
                }
            }
        }
    }

    /// Unpacks `T` tiles from `first`: codes to bytes, and per block the scales and zero points (of both halves).
    #[inline(always)]
    fn decode<const T: usize, const KIND: u32>(&mut self, first: usize) {
        let s = self.s;
        let factor = s.splat(kind::factor(KIND));
        for (t, tile) in self.tiles[first..first + T].iter().enumerate() {
            let q = tile.weight;
            let words = q.tile_codes(tile.index);
            let (codes, _) = self.codes.as_chunks_mut::<VECTORS>();
            let (floats, _) = self.floats.as_chunks_mut::<4>();
            let panel = codes.iter_mut().zip(floats).skip(t).step_by(T);
            for (b, (codes, floats)) in panel.enumerate().take(q.code_rows / kind::rows_per_block(KIND)) {
                let bytes = block_bytes::<S, KIND>(s, words, b);
                for (bytes, out) in bytes.into_iter().zip(codes) {
                    s.store_i(bytes, &mut out.0);
                }
                for half in 0..kind::halves(KIND) {
                    let line = tile.index * q.groups + group::<KIND>(q, b, half);
                    let scale = s.mul(load_scale(s, &q.scales, line), factor);
                    s.store(scale, &mut floats[2 * half].0);
                    if kind::has_zeros(KIND) || kind::has_offsets(KIND) {
                        s.store(load_shift(s, &q.shifts, line), &mut floats[2 * half + 1].0);
                    }
                }
            }
        }
    }

    /// Rows `r .. r + R` from `T` unpacked tiles, the first of them `tile`.
    #[inline(always)]
    fn rows<const R: usize, const T: usize, const KIND: u32>(&mut self, tile: usize, r: usize) {
        let s = self.s;
        let blocks = self.tiles[tile].weight.code_rows / kind::rows_per_block(KIND);
        let mut rows: [&[ActivationBlock]; R] = [&[]; R];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = &self.x.row(r + i)[..blocks];
        }
        let mut acc = [[s.splat(0.0); T]; R];
        let codes = &self.codes.as_chunks::<VECTORS>().0.as_chunks::<T>().0[..blocks];
        let floats = &self.floats.as_chunks::<4>().0.as_chunks::<T>().0[..blocks];
        for (b, (codes, floats)) in codes.iter().zip(floats).enumerate() {
            for half in 0..kind::halves(KIND) {
                let mut dots = [[s.splat_i(0); T]; R];
                for (dots, row) in dots.iter_mut().zip(rows) {
                    *dots = [s.splat_i(start::<KIND>(&row[b], half)); T];
                }
                let vectors = VECTORS / kind::halves(KIND);
                for v in half * vectors..(half + 1) * vectors {
                    let mut bytes = [s.splat_i(0); T];
                    for (bytes, codes) in bytes.iter_mut().zip(codes) {
                        *bytes = s.load_i(&codes[v].0);
                    }
                    for (dots, row) in dots.iter_mut().zip(rows) {
                        for (dot, &bytes) in dots.iter_mut().zip(&bytes) {
                            *dot = dot4::<S, KIND>(s, *dot, bytes, row[b].codes[v]);
                        }
                    }
                }
                let mut scales = [s.splat(0.0); T];
                let mut zeros = [s.splat(0.0); T];
                for (t, floats) in floats.iter().enumerate() {
                    scales[t] = s.load(&floats[2 * half].0);
                    if kind::has_zeros(KIND) || kind::has_offsets(KIND) {
                        zeros[t] = s.load(&floats[2 * half + 1].0);
                    }
                }
                for ((acc, dots), row) in acc.iter_mut().zip(dots).zip(rows) {
                    for t in 0..T {
                        acc[t] = add_scaled::<S, KIND>(s, acc[t], dots[t], scales[t], zeros[t], &row[b], half);
                    }
                }
            }
        }
        let count = self.acc.len() / self.tiles.len();
        for (i, acc) in acc.into_iter().enumerate() {
            for (t, acc) in acc.into_iter().enumerate() {
                s.store(acc, &mut self.acc[(tile + t) * count + r + i].0);
            }
        }
    }
}

/// Blocks that are fetched ahead of their use.
const AHEAD: usize = 32;

/// One row straight from the packed words.
#[inline(always)]
fn one_row<S: Simd, const KIND: u32>(s: S, tile: &Tile<'_>, x: &[ActivationBlock]) -> Line<f32> {
    let q = tile.weight;
    let words = q.tile_codes(tile.index);
    let x = &x[..q.code_rows / kind::rows_per_block(KIND)];
    let factor = s.splat(kind::factor(KIND));
    let mut acc = s.splat(0.0);
    // A group is at least one block long, except where blocks have two.
    let per_group = (q.scheme.group_size / ACTIVATION_BLOCK).max(1);
    for (g, x) in x.chunks(per_group).enumerate() {
        let mut scales = [s.splat(0.0); 2];
        let mut zeros = [s.splat(0.0); 2];
        for half in 0..kind::halves(KIND) {
            let line = tile.index * q.groups + kind::halves(KIND) * g + half;
            prefetch_scale(s, &q.scales, line + kind::halves(KIND) * AHEAD.div_ceil(per_group));
            scales[half] = s.mul(load_scale(s, &q.scales, line), factor);
            if kind::has_zeros(KIND) || kind::has_offsets(KIND) {
                zeros[half] = load_shift(s, &q.shifts, line);
            }
        }
        for (i, x) in x.iter().enumerate() {
            let per_block = kind::rows_per_block(KIND);
            let ahead = tile.index * q.code_rows + (g * per_group + i + AHEAD) * per_block;
            for line in 0..per_block {
                s.prefetch(&q.codes, ahead + line);
            }
            let bytes = block_bytes::<S, KIND>(s, words, g * per_group + i);
            if kind::halves(KIND) == 2 {
                for half in 0..2 {
                    let mut dot = s.splat_i(start::<KIND>(x, half));
                    let vectors = 4 * half..4 * half + 4;
                    for (&bytes, &codes) in bytes[vectors.clone()].iter().zip(&x.codes[vectors]) {
                        dot = dot4::<S, KIND>(s, dot, bytes, codes);
                    }
                    acc = add_scaled::<S, KIND>(s, acc, dot, scales[half], zeros[half], x, half);
                }
            } else {
                // Two chains: their sum is exact, whatever the order.
                let mut dots = [s.splat_i(start::<KIND>(x, 0)), s.splat_i(0)];
                for (v, (&bytes, &codes)) in bytes.iter().zip(&x.codes).enumerate() {
                    dots[v % 2] = dot4::<S, KIND>(s, dots[v % 2], bytes, codes);
                }
                acc = add_scaled::<S, KIND>(s, acc, s.add_i(dots[0], dots[1]), scales[0], zeros[0], x, 0);
            }
        }
    }
    let mut out = Line::default();
    s.store(acc, &mut out.0);
    out
}

/// What the dot product of a block, or of one of its halves, starts from.
#[inline(always)]
fn start<const KIND: u32>(x: &ActivationBlock, half: usize) -> i32 {
    let Kind { bytes, shift, halves } = const { kind::of(KIND) };
    let Shift::Constant(offset) = shift else { return 0 };
    if halves {
        return -offset * x.half_sums[half];
    }
    match (bytes, offset) {
        (Bytes::Four, 8) | (Bytes::Signed, 128) | (Bytes::Three, 7) => x.starts[0],
        (Bytes::Fp4, 12) | (Bytes::Two, 3) => x.starts[1],
        _ => -offset * (x.half_sums[0] + x.half_sums[1]),
    }
}

#[inline(always)]
fn dot4<S: Simd, const KIND: u32>(s: S, acc: S::I, u: S::I, x: i32) -> S::I {
    match const { kind::of(KIND) }.bytes {
        Bytes::Eight | Bytes::Signed | Bytes::Iq4 => s.dot4_wide(acc, u, x),
        _ => s.dot4(acc, u, x),
    }
}

/// `acc + ((dot - zero sum) * weight scale + offset sum) * activation scale`; `shift` are zero points or offsets, and
/// `scale` includes the factor of the bytes.
#[inline(always)]
fn add_scaled<S: Simd, const KIND: u32>(
    s: S,
    acc: S::F,
    dot: S::I,
    scale: S::F,
    shift: S::F,
    x: &ActivationBlock,
    half: usize,
) -> S::F {
    let mut dot = s.to_f32(dot);
    if kind::has_zeros(KIND) {
        dot = s.fma(shift, s.splat(-x.sum / kind::factor(KIND)), dot);
    }
    let acc = s.fma(s.mul(dot, s.splat(x.scale)), scale, acc);
    if !kind::has_offsets(KIND) {
        return acc;
    }
    let sum = if kind::halves(KIND) == 2 { x.half_sums[half] as f32 } else { x.sum };
    s.fma(shift, s.splat(sum * x.scale), acc)
}

/// The group of a block, or of one of its halves.
#[inline(always)]
fn group<const KIND: u32>(q: &Quantized, block: usize, half: usize) -> usize {
    match kind::halves(KIND) {
        2 => 2 * block + half,
        _ => block * ACTIVATION_BLOCK / q.scheme.group_size,
    }
}

/// The unsigned bytes of a block, in the order of the format's [`CodeOrder`].
#[inline(always)]
fn block_bytes<S: Simd, const KIND: u32>(s: S, words: &[Line<u32>], block: usize) -> [S::I; VECTORS] {
    let per_block = kind::rows_per_block(KIND);
    let words = &words[block * per_block..(block + 1) * per_block];
    let mut out = [s.splat_i(0); VECTORS];
    let bytes = const { kind::of(KIND) }.bytes;
    match bytes {
        Bytes::Four | Bytes::Fp4 | Bytes::Iq4 | Bytes::Five => {
            nibbles(s, &words[..4], &mut out);
            for (v, out) in out.iter_mut().enumerate() {
                *out = match bytes {
                    Bytes::Fp4 => s.lut16_bytes(&FP4_BYTES, *out),
                    Bytes::Iq4 => s.lut16_bytes(&IQ4_BYTES, *out),
                    // Bit v of a byte of the high bits.
                    Bytes::Five => s.or(*out, s.and(move_bit(s, s.load_i(&words[4].0), v, 4), s.splat_i(0x1010_1010))),
                    _ => *out,
                };
            }
        }
        Bytes::Six => {
            for (words, out) in words.chunks_exact(3).zip(out.chunks_exact_mut(4)) {
                nibbles(s, &words[..2], out);
                let high = s.load_i(&words[2].0);
                for (v, out) in out.iter_mut().enumerate() {
                    *out = s.or(*out, s.and(move_bit(s, high, 2 * v, 4), s.splat_i(0x3030_3030)));
                }
            }
        }
        Bytes::Eight | Bytes::Signed => {
            let flip = s.splat_i(0x8080_8080u32 as i32);
            for (out, word) in out.iter_mut().zip(words) {
                *out = s.load_i(&word.0);
                if bytes == Bytes::Signed {
                    *out = s.xor(*out, flip);
                }
            }
        }
        Bytes::Two | Bytes::Three => {
            // Doubled codes: the low two bits come to bits 1 and 2 of a byte, the high bit of a 3-bit code to bit 3.
            let (low_mask, high_mask) = (s.splat_i(0x0606_0606), s.splat_i(0x0808_0808));
            for half in 0..2 {
                let word = s.load_i(&words[half].0);
                for i in 0..4 {
                    let shifted = match i {
                        0 => s.shl(word, 1),
                        _ => s.shr(word, 2 * i as u32 - 1),
                    };
                    let mut codes = s.and(shifted, low_mask);
                    if bytes == Bytes::Three {
                        let high = s.load_i(&words[2].0);
                        codes = s.or(codes, s.and(move_bit(s, high, 4 * half + i, 3), high_mask));
                    }
                    out[4 * half + i] = codes;
                }
            }
        }
    }
    out
}

/// The nibbles of words: even ones, then odd ones of each.
#[inline(always)]
fn nibbles<S: Simd>(s: S, words: &[Line<u32>], out: &mut [S::I]) {
    let mask = s.splat_i(0x0F0F_0F0F);
    for (word, out) in words.iter().zip(out.chunks_exact_mut(2)) {
        let word = s.load_i(&word.0);
        out[0] = s.and(word, mask);
        out[1] = s.and(s.shr(word, 4), mask);
    }
}

/// The words moved so that bit `from` comes to bit `to`.
#[inline(always)]
fn move_bit<S: Simd>(s: S, words: S::I, from: usize, to: usize) -> S::I {
    if from < to { s.shl(words, (to - from) as u32) } else { s.shr(words, (from - to) as u32) }
}

const _: () = assert!(LANES == 16 && VECTORS == 8);

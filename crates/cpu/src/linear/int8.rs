//! Tiles of small-integer codes times int8 activations.
//!
//! Every format here is `w = (u - offset) * scale` with an unsigned byte u per weight:
//!
//! | format | u | offset | factor on the scale |
//! |---|---|---|---|
//! | fp4, nvfp4, mxfp4 | 2 value + 12 | 12 | 1/2 |
//! | int4_s4 | q | 8 | 1 |
//! | int4_u4, int8_asym | q | z | 1 |
//! | int8 | q + 128 | 128 | 1 |
//! | int3 / int2 | 2 c | 7 / 3 | 1/2 |
//!
//! so a block of 32 gives `(sum u a - offset sum a) * activation scale * weight scale`, the first sum in i32, exact.

use marlin_formats::Format;
use marlin_ops::activation::{ACTIVATION_BLOCK, quantize_activation_block};

use crate::layout::{CodeOrder, Quantized};
use crate::simd::{Kernel, LANES, Line, Simd};

use super::Rows;
use super::decode::{load_scale, load_zero, prefetch_scale};

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
    /// The same of both halves for NVFP4.
    half_starts: [i32; 2],
    /// Sum of all codes, for offsets that are zero points.
    sum: f32,
    /// Multiplier of the codes.
    scale: f32,
}

/// The constant offsets of the formats of an order, as [`ActivationBlock::starts`] has them.
const fn constant_offsets(order: CodeOrder) -> [i32; 2] {
    match order {
        CodeOrder::Nibbles => [8, 12],
        CodeOrder::Bytes => [128, 0],
        CodeOrder::Pairs => [7, 3],
    }
}

/// How codes become unsigned bytes, and what is subtracted from them.
mod kind {
    /// Nibbles as they are, offset 8.
    pub const INT4: u8 = 0;
    /// Nibbles as they are, zero points.
    pub const INT4_ZEROS: u8 = 1;
    /// E2M1 nibbles to `2 value + 12`, offset 12.
    pub const FP4: u8 = 2;
    /// [`FP4`] with two groups of 16 per block.
    pub const FP4_HALVES: u8 = 3;
    /// Two's complement bytes + 128, offset 128.
    pub const INT8: u8 = 4;
    /// Bytes as they are, zero points.
    pub const INT8_ZEROS: u8 = 5;
    /// 3-bit codes, doubled, offset 7.
    pub const INT3: u8 = 6;
    /// 2-bit codes, doubled, offset 3.
    pub const INT2: u8 = 7;

    /// Groups that share a block.
    pub const fn halves(kind: u8) -> usize {
        if kind == FP4_HALVES { 2 } else { 1 }
    }

    /// Whether offsets are the groups' zero points.
    pub const fn has_zeros(kind: u8) -> bool {
        matches!(kind, INT4_ZEROS | INT8_ZEROS)
    }

    /// Factor on the scales.
    pub const fn factor(kind: u8) -> f32 {
        if matches!(kind, FP4 | FP4_HALVES | INT3 | INT2) { 0.5 } else { 1.0 }
    }

    /// Lines of code words per block of 32.
    pub const fn rows_per_block(kind: u8) -> usize {
        match kind {
            INT4 | INT4_ZEROS | FP4 | FP4_HALVES => 4,
            INT8 | INT8_ZEROS => 8,
            INT2 => 2,
            _ => 3,
        }
    }
}

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
        half_starts: sums.map(|half| -12 * half),
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
    let mut task = Task { s, tiles, x, codes, floats, acc };
    match tiles[0].weight.scheme.format {
        Format::Int4S4 => task.run::<{ kind::INT4 }>(),
        Format::Int4U4 => task.run::<{ kind::INT4_ZEROS }>(),
        Format::Fp4E2m1 | Format::Mxfp4 => task.run::<{ kind::FP4 }>(),
        Format::Nvfp4 => task.run::<{ kind::FP4_HALVES }>(),
        Format::Int8 => task.run::<{ kind::INT8 }>(),
        Format::Int8Asym => task.run::<{ kind::INT8_ZEROS }>(),
        Format::Int3 => task.run::<{ kind::INT3 }>(),
        Format::Int2 => task.run::<{ kind::INT2 }>(),
        Format::Fp8E4m3 | Format::Fp8E5m2 | Format::Nf4 | Format::Nf3 | Format::Nf2 => {
            unreachable!("{} takes f32 activations", tiles[0].weight.scheme.format)
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
    fn run<const KIND: u8>(&mut self) {
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
    fn decode<const T: usize, const KIND: u8>(&mut self, first: usize) {
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
                    if kind::has_zeros(KIND) {
                        s.store(load_zero(s, &q.zeros, line), &mut floats[2 * half + 1].0);
                    }
                }
            }
        }
    }

    /// Rows `r .. r + R` from `T` unpacked tiles, the first of them `tile`.
    #[inline(always)]
    fn rows<const R: usize, const T: usize, const KIND: u8>(&mut self, tile: usize, r: usize) {
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
                    if kind::has_zeros(KIND) {
                        zeros[t] = s.load(&floats[2 * half + 1].0);
                    }
                }
                for ((acc, dots), row) in acc.iter_mut().zip(dots).zip(rows) {
                    for t in 0..T {
                        acc[t] = add_scaled::<S, KIND>(s, acc[t], dots[t], scales[t], zeros[t], &row[b]);
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
const AHEAD: usize = 16;

/// One row straight from the packed words.
#[inline(always)]
fn one_row<S: Simd, const KIND: u8>(s: S, tile: &Tile<'_>, x: &[ActivationBlock]) -> Line<f32> {
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
            if kind::has_zeros(KIND) {
                zeros[half] = load_zero(s, &q.zeros, line);
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
                    acc = add_scaled::<S, KIND>(s, acc, dot, scales[half], zeros[half], x);
                }
            } else {
                // Two chains: their sum is exact, whatever the order.
                let mut dots = [s.splat_i(start::<KIND>(x, 0)), s.splat_i(0)];
                for (v, (&bytes, &codes)) in bytes.iter().zip(&x.codes).enumerate() {
                    dots[v % 2] = dot4::<S, KIND>(s, dots[v % 2], bytes, codes);
                }
                acc = add_scaled::<S, KIND>(s, acc, s.add_i(dots[0], dots[1]), scales[0], zeros[0], x);
            }
        }
    }
    let mut out = Line::default();
    s.store(acc, &mut out.0);
    out
}

/// What the dot product of a block, or of one of its halves, starts from.
#[inline(always)]
fn start<const KIND: u8>(x: &ActivationBlock, half: usize) -> i32 {
    match KIND {
        kind::INT4_ZEROS | kind::INT8_ZEROS => 0,
        kind::FP4_HALVES => x.half_starts[half],
        kind::INT4 | kind::INT8 | kind::INT3 => x.starts[0],
        _ => x.starts[1],
    }
}

#[inline(always)]
fn dot4<S: Simd, const KIND: u8>(s: S, acc: S::I, u: S::I, x: i32) -> S::I {
    match KIND {
        kind::INT8 | kind::INT8_ZEROS => s.dot4_wide(acc, u, x),
        _ => s.dot4(acc, u, x),
    }
}

/// `acc + (dot - zero sum) * activation scale * weight scale`.
#[inline(always)]
fn add_scaled<S: Simd, const KIND: u8>(
    s: S,
    acc: S::F,
    dot: S::I,
    scale: S::F,
    zero: S::F,
    x: &ActivationBlock,
) -> S::F {
    let mut dot = s.to_f32(dot);
    if kind::has_zeros(KIND) {
        dot = s.fma(zero, s.splat(-x.sum), dot);
    }
    s.fma(s.mul(dot, s.splat(x.scale)), scale, acc)
}

/// The group of a block, or of one of its halves.
#[inline(always)]
fn group<const KIND: u8>(q: &Quantized, block: usize, half: usize) -> usize {
    match kind::halves(KIND) {
        2 => 2 * block + half,
        _ => block * ACTIVATION_BLOCK / q.scheme.group_size,
    }
}

/// The unsigned bytes of a block, in the order of the format's [`CodeOrder`].
#[inline(always)]
fn block_bytes<S: Simd, const KIND: u8>(s: S, words: &[Line<u32>], block: usize) -> [S::I; VECTORS] {
    let per_block = kind::rows_per_block(KIND);
    let words = &words[block * per_block..(block + 1) * per_block];
    let mut out = [s.splat_i(0); VECTORS];
    match KIND {
        kind::INT4 | kind::INT4_ZEROS | kind::FP4 | kind::FP4_HALVES => {
            let mask = s.splat_i(0x0F0F_0F0F);
            for j in 0..4 {
                let word = s.load_i(&words[j].0);
                out[2 * j] = s.and(word, mask);
                out[2 * j + 1] = s.and(s.shr(word, 4), mask);
            }
            if matches!(KIND, kind::FP4 | kind::FP4_HALVES) {
                for bytes in &mut out {
                    *bytes = s.lut16_bytes(&FP4_BYTES, *bytes);
                }
            }
        }
        kind::INT8 | kind::INT8_ZEROS => {
            let flip = s.splat_i(0x8080_8080u32 as i32);
            for (out, word) in out.iter_mut().zip(words) {
                *out = s.load_i(&word.0);
                if KIND == kind::INT8 {
                    *out = s.xor(*out, flip);
                }
            }
        }
        _ => {
            // Doubled codes: the low two bits come to bits 1 and 2 of a byte, the high bit of a 3-bit code to bit 3.
            let (low_mask, high_mask) = (s.splat_i(0x0606_0606), s.splat_i(0x0808_0808));
            for half in 0..2 {
                let word = s.load_i(&words[half].0);
                for i in 0..4 {
                    let shifted = match i {
                        0 => s.shl(word, 1),
                        _ => s.shr(word, 2 * i as u32 - 1),
                    };
                    let mut bytes = s.and(shifted, low_mask);
                    if KIND == kind::INT3 {
                        let high = s.load_i(&words[2].0);
                        let high = match 4 * half + i {
                            p @ 0..3 => s.shl(high, 3 - p as u32),
                            p => s.shr(high, p as u32 - 3),
                        };
                        bytes = s.or(bytes, s.and(high, high_mask));
                    }
                    out[4 * half + i] = bytes;
                }
            }
        }
    }
    out
}

const _: () = assert!(LANES == 16 && VECTORS == 8);

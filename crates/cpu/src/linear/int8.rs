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
use crate::simd::{LANES, Line, Simd};

use super::Rows;
use super::decode::{load_scale, load_zero};

/// Vectors of codes in a block.
const VECTORS: usize = ACTIVATION_BLOCK / 4;

/// 32 activations of one row as int8, in the order of a weight layout.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ActivationBlock {
    /// Four codes each, first in the lowest byte.
    codes: [i32; VECTORS],
    /// Sums of the codes of the first and second half.
    half_sums: [f32; 2],
    /// Sum of all codes.
    sum: f32,
    /// Multiplier of the codes.
    scale: f32,
}

/// How codes become unsigned bytes.
mod kind {
    /// Nibbles as they are.
    pub const NIBBLES: u8 = 0;
    /// E2M1 nibbles to `2 value + 12`.
    pub const FP4: u8 = 1;
    /// Bytes as they are.
    pub const BYTES: u8 = 2;
    /// Two's complement bytes + 128.
    pub const SIGNED_BYTES: u8 = 3;
    /// 2-bit codes, doubled.
    pub const INT2: u8 = 4;
    /// 3-bit codes, doubled.
    pub const INT3: u8 = 5;
}

/// `2 value + 12` of each E2M1 code.
const FP4_BYTES: [u8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];

/// Quantizes rows of `columns` activations into `ceil(columns / 32)` blocks each.
pub(crate) fn quantize_rows(x: &[f32], columns: usize, order: CodeOrder, out: &mut [ActivationBlock]) {
    let per_row = columns.div_ceil(ACTIVATION_BLOCK);
    for (row, out) in x.chunks_exact(columns).zip(out.chunks_exact_mut(per_row)) {
        for (values, out) in row.chunks(ACTIVATION_BLOCK).zip(out) {
            *out = match order {
                CodeOrder::Nibbles => quantize_block::<0>(values),
                CodeOrder::Bytes => quantize_block::<1>(values),
                CodeOrder::Pairs => quantize_block::<2>(values),
            };
        }
    }
}

/// One block of at most 32 values; the rest counts as 0. `ORDER` is an index into [`CodeOrder::ALL`].
fn quantize_block<const ORDER: usize>(values: &[f32]) -> ActivationBlock {
    let mut codes = [0i8; ACTIVATION_BLOCK];
    let scale = quantize_activation_block(values, &mut codes);
    let half = |codes: &[i8]| codes.iter().map(|&c| i32::from(c)).sum::<i32>() as f32;
    let half_sums = [half(&codes[..16]), half(&codes[16..])];
    let mut out = ActivationBlock { codes: [0; VECTORS], half_sums, sum: half_sums[0] + half_sums[1], scale };
    for (v, word) in out.codes.iter_mut().enumerate() {
        let mut bytes = [0u8; 4];
        for (b, byte) in bytes.iter_mut().enumerate() {
            *byte = codes[CodeOrder::ALL[ORDER].feature(v, b)] as u8;
        }
        *word = i32::from_le_bytes(bytes);
    }
    out
}

/// Scratch lines that [`multiply`] needs for several rows: codes and floats.
pub(super) fn panel_lines(in_features: usize) -> (usize, usize) {
    let blocks = in_features.div_ceil(ACTIVATION_BLOCK);
    (VECTORS * blocks, 4 * blocks)
}

/// `acc[r][lane] = sum_k x[r][k] w[k][lane]` for the rows of `x`. A row's result does not depend on the others.
#[inline(always)]
pub(super) fn multiply<S: Simd>(
    s: S,
    q: &Quantized,
    tile: usize,
    x: Rows<'_, ActivationBlock>,
    codes: &mut [Line<u32>],
    floats: &mut [Line<f32>],
    acc: &mut [Line<f32>],
) {
    let mut task = Task { s, q, tile, x, codes, floats, acc };
    match q.scheme.format {
        Format::Int4S4 => task.run::<{ kind::NIBBLES }, false, false>(8.0, 1.0),
        Format::Int4U4 => task.run::<{ kind::NIBBLES }, true, false>(0.0, 1.0),
        Format::Fp4E2m1 | Format::Mxfp4 => task.run::<{ kind::FP4 }, false, false>(12.0, 0.5),
        Format::Nvfp4 => task.run::<{ kind::FP4 }, false, true>(12.0, 0.5),
        Format::Int8 => task.run::<{ kind::SIGNED_BYTES }, false, false>(128.0, 1.0),
        Format::Int8Asym => task.run::<{ kind::BYTES }, true, false>(0.0, 1.0),
        Format::Int3 => task.run::<{ kind::INT3 }, false, false>(7.0, 0.5),
        Format::Int2 => task.run::<{ kind::INT2 }, false, false>(3.0, 0.5),
        Format::Fp8E4m3 | Format::Fp8E5m2 | Format::Nf4 | Format::Nf3 | Format::Nf2 => {
            unreachable!("{} takes f32 activations", q.scheme.format)
        }
    }
}

struct Task<'a, S> {
    s: S,
    q: &'a Quantized,
    tile: usize,
    x: Rows<'a, ActivationBlock>,
    codes: &'a mut [Line<u32>],
    floats: &'a mut [Line<f32>],
    acc: &'a mut [Line<f32>],
}

impl<S: Simd> Task<'_, S> {
    /// `ZEROS`: offsets are the groups' zero points. `HALVES`: two groups of 16 per block (NVFP4).
    #[inline(always)]
    fn run<const KIND: u8, const ZEROS: bool, const HALVES: bool>(&mut self, offset: f32, factor: f32) {
        if let [acc] = &mut *self.acc {
            let row = self.x.row(0);
            *acc = one_row::<S, KIND, ZEROS, HALVES>(self.s, self.q, self.tile, row, offset, factor);
            return;
        }
        self.decode::<KIND, ZEROS, HALVES>(offset, factor);
        let mut r = 0;
        if S::WIDE {
            while r + 8 <= self.acc.len() {
                self.rows::<8, KIND, HALVES>(r);
                r += 8;
            }
        }
        while r + 2 <= self.acc.len() {
            self.rows::<2, KIND, HALVES>(r);
            r += 2;
        }
        if r < self.acc.len() {
            self.rows::<1, KIND, HALVES>(r);
        }
    }

    /// Unpacks the tile: codes to bytes, and per block the scales and offsets (of both halves with `HALVES`).
    #[inline(always)]
    fn decode<const KIND: u8, const ZEROS: bool, const HALVES: bool>(&mut self, offset: f32, factor: f32) {
        let (s, q) = (self.s, self.q);
        let words = q.tile_codes(self.tile);
        let (codes, _) = self.codes.as_chunks_mut::<VECTORS>();
        let (floats, _) = self.floats.as_chunks_mut::<4>();
        let blocks = q.code_rows / rows_per_block::<KIND>();
        let blocks = codes.iter_mut().zip(floats).take(blocks);
        for (b, (codes, floats)) in blocks.enumerate() {
            let bytes = block_bytes::<S, KIND>(s, words, b);
            for (bytes, out) in bytes.into_iter().zip(codes) {
                s.store_i(bytes, &mut out.0);
            }
            for half in 0..1 + usize::from(HALVES) {
                let line = self.tile * q.groups + group::<HALVES>(q, b, half);
                let scale = s.mul(load_scale(s, &q.scales, line), s.splat(factor));
                s.store(scale, &mut floats[2 * half].0);
                let offset = offsets::<S, ZEROS>(s, q, line, offset);
                s.store(offset, &mut floats[2 * half + 1].0);
            }
        }
    }

    /// Rows `r .. r + R` from the unpacked tile.
    #[inline(always)]
    fn rows<const R: usize, const KIND: u8, const HALVES: bool>(&mut self, r: usize) {
        let s = self.s;
        let blocks = self.q.code_rows / rows_per_block::<KIND>();
        let mut rows: [&[ActivationBlock]; R] = [&[]; R];
        for (i, row) in rows.iter_mut().enumerate() {
            *row = &self.x.row(r + i)[..blocks];
        }
        let mut acc = [s.splat(0.0); R];
        let codes = &self.codes.as_chunks::<VECTORS>().0[..blocks];
        let floats = &self.floats.as_chunks::<4>().0[..blocks];
        for (b, (codes, floats)) in codes.iter().zip(floats).enumerate() {
            let mut bytes = [s.splat_i(0); VECTORS];
            for (bytes, line) in bytes.iter_mut().zip(codes) {
                *bytes = s.load_i(&line.0);
            }
            let scales = [s.load(&floats[0].0), s.load(&floats[2].0)];
            let offsets = [s.load(&floats[1].0), s.load(&floats[3].0)];
            for (acc, row) in acc.iter_mut().zip(rows) {
                *acc = add_block::<S, KIND, HALVES>(s, *acc, &bytes, scales, offsets, &row[b]);
            }
        }
        for (acc, out) in acc.into_iter().zip(&mut self.acc[r..r + R]) {
            s.store(acc, &mut out.0);
        }
    }
}

/// One row straight from the packed words.
#[inline(always)]
fn one_row<S: Simd, const KIND: u8, const ZEROS: bool, const HALVES: bool>(
    s: S,
    q: &Quantized,
    tile: usize,
    x: &[ActivationBlock],
    offset: f32,
    factor: f32,
) -> Line<f32> {
    let words = q.tile_codes(tile);
    let blocks = q.code_rows / rows_per_block::<KIND>();
    let x = &x[..blocks];
    let factor = s.splat(factor);
    let mut acc = s.splat(0.0);
    // A group is at least one block long, except where HALVES.
    let per_group = (q.scheme.group_size / ACTIVATION_BLOCK).max(1);
    for (g, x) in x.chunks(per_group).enumerate() {
        let line = tile * q.groups + if HALVES { 2 * g } else { g };
        let second = line + usize::from(HALVES);
        let scales = [s.mul(load_scale(s, &q.scales, line), factor), s.mul(load_scale(s, &q.scales, second), factor)];
        let offsets = [offsets::<S, ZEROS>(s, q, line, offset), offsets::<S, ZEROS>(s, q, second, offset)];
        for (i, x) in x.iter().enumerate() {
            let bytes = block_bytes::<S, KIND>(s, words, g * per_group + i);
            acc = add_block::<S, KIND, HALVES>(s, acc, &bytes, scales, offsets, x);
        }
    }
    let mut out = Line::default();
    s.store(acc, &mut out.0);
    out
}

/// `acc + (sum u a - offset sum a) * activation scale * weight scale` of one block.
#[inline(always)]
fn add_block<S: Simd, const KIND: u8, const HALVES: bool>(
    s: S,
    acc: S::F,
    bytes: &[S::I; VECTORS],
    scales: [S::F; 2],
    offsets: [S::F; 2],
    x: &ActivationBlock,
) -> S::F {
    let mut dots = [s.splat_i(0); 2];
    for (v, (&u, &a)) in bytes.iter().zip(&x.codes).enumerate() {
        let dot = &mut dots[v / (VECTORS / 2)];
        *dot = match KIND {
            kind::BYTES | kind::SIGNED_BYTES => s.dot4_wide(*dot, u, a),
            _ => s.dot4(*dot, u, a),
        };
    }
    let activation = s.splat(x.scale);
    if HALVES {
        let first = corrected(s, dots[0], offsets[0], x.half_sums[0]);
        let second = corrected(s, dots[1], offsets[1], x.half_sums[1]);
        let acc = s.fma(s.mul(first, activation), scales[0], acc);
        s.fma(s.mul(second, activation), scales[1], acc)
    } else {
        let dot = corrected(s, s.add_i(dots[0], dots[1]), offsets[0], x.sum);
        s.fma(s.mul(dot, activation), scales[0], acc)
    }
}

/// `dot - offset sum`.
#[inline(always)]
fn corrected<S: Simd>(s: S, dot: S::I, offset: S::F, sum: f32) -> S::F {
    s.fma(offset, s.splat(-sum), s.to_f32(dot))
}

/// The group of a block, or of one of its halves.
#[inline(always)]
fn group<const HALVES: bool>(q: &Quantized, block: usize, half: usize) -> usize {
    if HALVES { 2 * block + half } else { block * ACTIVATION_BLOCK / q.scheme.group_size }
}

#[inline(always)]
fn offsets<S: Simd, const ZEROS: bool>(s: S, q: &Quantized, line: usize, offset: f32) -> S::F {
    if ZEROS { load_zero(s, &q.zeros, line) } else { s.splat(offset) }
}

/// Lines of code words per block of 32.
const fn rows_per_block<const KIND: u8>() -> usize {
    match KIND {
        kind::NIBBLES | kind::FP4 => 4,
        kind::BYTES | kind::SIGNED_BYTES => 8,
        kind::INT2 => 2,
        _ => 3,
    }
}

/// The unsigned bytes of a block, in the order of the format's [`CodeOrder`].
#[inline(always)]
fn block_bytes<S: Simd, const KIND: u8>(s: S, words: &[Line<u32>], block: usize) -> [S::I; VECTORS] {
    let per_block = rows_per_block::<KIND>();
    let words = &words[block * per_block..(block + 1) * per_block];
    let mut out = [s.splat_i(0); VECTORS];
    match KIND {
        kind::NIBBLES | kind::FP4 => {
            let mask = s.splat_i(0x0F0F_0F0F);
            for j in 0..4 {
                let word = s.load_i(&words[j].0);
                out[2 * j] = s.and(word, mask);
                out[2 * j + 1] = s.and(s.shr(word, 4), mask);
            }
            if KIND == kind::FP4 {
                for bytes in &mut out {
                    *bytes = s.lut16_bytes(&FP4_BYTES, *bytes);
                }
            }
        }
        kind::BYTES | kind::SIGNED_BYTES => {
            let flip = s.splat_i(0x8080_8080u32 as i32);
            for (out, word) in out.iter_mut().zip(words) {
                *out = s.load_i(&word.0);
                if KIND == kind::SIGNED_BYTES {
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

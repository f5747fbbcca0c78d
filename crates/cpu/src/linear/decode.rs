//! Weight tiles to f32, exactly as [`marlin_formats`] defines the values.

use marlin_formats::Format;
use marlin_formats::pack::Layout;

use crate::layout::{PackedWeight, Quantized, Scales, Values};
use crate::simd::{Line, Simd};

/// Input features decoded at once: a panel of this many lines stays in the first-level cache.
pub(crate) const PANEL: usize = 256;

/// Decodes input features `k0 .. k0 + count` (at most [`PANEL`], `k0` a multiple of 32) of a tile. Lines of `panel` past
/// `count` may be overwritten.
#[inline(always)]
pub(crate) fn decode_panel<S: Simd>(
    s: S,
    weight: &PackedWeight,
    tile: usize,
    k0: usize,
    count: usize,
    panel: &mut [Line<f32>],
) {
    let first = tile * weight.in_features + k0;
    match &weight.values {
        Values::F32(lines) => panel[..count].copy_from_slice(&lines[first..first + count]),
        Values::F16(lines) => {
            for (out, line) in panel[..count].iter_mut().zip(&lines[first..]) {
                s.store(s.load_f16(line), &mut out.0);
            }
        }
        Values::BF16(lines) => {
            for (out, line) in panel[..count].iter_mut().zip(&lines[first..]) {
                s.store(s.load_bf16(line), &mut out.0);
            }
        }
        Values::Quantized(q) => decode_quantized(s, q, tile, k0, count, panel),
    }
}

/// The multipliers of group line `line`.
#[inline(always)]
pub(crate) fn load_scale<S: Simd>(s: S, scales: &Scales, line: usize) -> S::F {
    match scales {
        Scales::F16(lines) => s.load_f16(&lines[line]),
        Scales::Byte { bytes, table } => s.lut256(table, s.load_u8(&bytes[line])),
    }
}

/// Starts to bring group line `line` closer.
#[inline(always)]
pub(crate) fn prefetch_scale<S: Simd>(s: S, scales: &Scales, line: usize) {
    match scales {
        Scales::F16(lines) => s.prefetch(lines, line),
        Scales::Byte { bytes, .. } => s.prefetch(bytes, line),
    }
}

/// The zero points of group line `line`, 0 in formats without them.
#[inline(always)]
pub(crate) fn load_zero<S: Simd>(s: S, zeros: &[[u16; 16]], line: usize) -> S::F {
    match zeros {
        [] => s.splat(0.0),
        zeros => s.load_f16(&zeros[line]),
    }
}

#[inline(always)]
fn decode_quantized<S: Simd>(s: S, q: &Quantized, tile: usize, k0: usize, count: usize, panel: &mut [Line<f32>]) {
    let layout = q.scheme.format.layout();
    let (unit, words) = (layout.codes_per_unit(), layout.words_per_unit());
    let codes = &q.tile_codes(tile)[k0 / unit * words..];
    let group_size = q.scheme.group_size;
    // Units are whole within a group, so groups advance at unit borders only.
    let (mut k, end) = (k0, k0 + count);
    while k < end {
        let g = k / group_size;
        let stop = end.min((g + 1) * group_size);
        let line = tile * q.groups + g;
        let scale = load_scale(s, &q.scales, line);
        let zero = load_zero(s, &q.zeros, line);
        let units = (stop - k).div_ceil(unit);
        let at = (k - k0) / unit;
        let codes = &codes[at * words..(at + units) * words];
        let out = &mut panel[at * unit..(at + units) * unit];
        match layout {
            Layout::Bits4 => decode_bits4(s, &q.levels, codes, scale, zero, out),
            Layout::Bits2 => decode_bits2(s, &q.levels, codes, scale, out),
            Layout::Planar3 => decode_planar3(s, &q.levels, codes, scale, out),
            Layout::Bits8 => match (q.scheme.format, &q.byte_levels) {
                (Format::Fp8E4m3 | Format::Fp8E5m2, Some(table)) => {
                    decode_bytes(s, codes, scale, out, |s, word, i| s.lut256(table, s.shr(word, 8 * i)));
                }
                (Format::Int8Asym, _) => decode_bytes(s, codes, scale, out, |s, word, i| {
                    let code = s.and(s.shr(word, 8 * i), s.splat_i(255));
                    s.sub(s.to_f32(code), zero)
                }),
                _ => decode_bytes(s, codes, scale, out, |s, word, i| s.to_f32(s.sar(s.shl(word, 24 - 8 * i), 24))),
            },
        }
        k = stop;
    }
}

#[inline(always)]
fn decode_bits4<S: Simd>(
    s: S,
    levels: &[f32; 16],
    codes: &[Line<u32>],
    scale: S::F,
    zero: S::F,
    out: &mut [Line<f32>],
) {
    for (word, out) in codes.iter().zip(out.as_chunks_mut::<8>().0) {
        let mut word = s.load_i(&word.0);
        for out in out {
            let value = s.sub(s.lut16(levels, word), zero);
            s.store(s.mul(value, scale), &mut out.0);
            word = s.shr(word, 4);
        }
    }
}

#[inline(always)]
fn decode_bits2<S: Simd>(s: S, levels: &[f32; 16], codes: &[Line<u32>], scale: S::F, out: &mut [Line<f32>]) {
    // The levels repeat with period four, so bits above the code do not matter.
    for (word, out) in codes.iter().zip(out.as_chunks_mut::<16>().0) {
        let mut word = s.load_i(&word.0);
        for out in out {
            s.store(s.mul(s.lut16(levels, word), scale), &mut out.0);
            word = s.shr(word, 2);
        }
    }
}

#[inline(always)]
fn decode_planar3<S: Simd>(s: S, levels: &[f32; 16], codes: &[Line<u32>], scale: S::F, out: &mut [Line<f32>]) {
    let (low_mask, high_mask) = (s.splat_i(3), s.splat_i(4));
    for (words, out) in codes.as_chunks::<3>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        let high = s.load_i(&words[2].0);
        for (half, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let mut low = s.load_i(&words[half].0);
            for (i, out) in out.iter_mut().enumerate() {
                let position = (8 * (i / 4) + 4 * half + i % 4) as u32;
                let bit = s.and(s.shl(s.shr(high, position), 2), high_mask);
                let code = s.or(s.and(low, low_mask), bit);
                s.store(s.mul(s.lut16(levels, code), scale), &mut out.0);
                low = s.shr(low, 2);
            }
        }
    }
}

/// `value(s, word, i)` gives the unscaled byte `i` of a word.
#[inline(always)]
fn decode_bytes<S: Simd>(
    s: S,
    codes: &[Line<u32>],
    scale: S::F,
    out: &mut [Line<f32>],
    value: impl Fn(S, S::I, u32) -> S::F,
) {
    for (word, out) in codes.iter().zip(out.as_chunks_mut::<4>().0) {
        let word = s.load_i(&word.0);
        for (i, out) in (0..).zip(out) {
            s.store(s.mul(value(s, word, i), scale), &mut out.0);
        }
    }
}

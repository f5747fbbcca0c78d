//! Weight tiles to f32, exactly as [`marlin_formats`] defines the values.

use marlin_formats::Levels;
use marlin_formats::pack::Layout;

use super::exl3;
use crate::layout::grid::Grid;
use crate::layout::{PackedWeight, Quantized, Scales, Values, high_position};
use crate::simd::{Kernel, LANES, Line, Simd};

/// Input features decoded at once: a panel of this many lines stays in the first-level cache.
pub(crate) const PANEL: usize = 256;

/// Decodes input features `k0 .. k0 + count` (at most [`PANEL`], `k0` a multiple of 32) of a tile. Lines of `panel` past
/// `count` may be overwritten. Of EXL3 it decodes the matrix between the rotations; `count` is a multiple of 16 there.
#[inline(always)]
pub(crate) fn decode_panel<S: Simd>(
    s: S,
    weight: &PackedWeight,
    tile: usize,
    k0: usize,
    count: usize,
    panel: &mut [Line<f32>],
) {
    s.outlined(DecodePanel { weight, tile, k0, count, panel });
}

/// The arguments of [`decode_panel`].
struct DecodePanel<'a> {
    weight: &'a PackedWeight,
    tile: usize,
    k0: usize,
    count: usize,
    panel: &'a mut [Line<f32>],
}

impl Kernel for DecodePanel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weight, tile, k0, count, panel } = self;
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
            Values::Quantized(q) if q.scheme.format.has_offsets() => {
                decode_quantized::<S, true>(s, q, tile, k0, count, panel);
            }
            Values::Quantized(q) => decode_quantized::<S, false>(s, q, tile, k0, count, panel),
            Values::Exl3(q) => exl3::decode_panel(s, q, tile, k0, &mut panel[..count]),
            Values::Grid(q) => decode_grid(s, q, tile, k0, count, panel),
        }
    }
}

/// The multipliers of group line `line`.
#[inline(always)]
pub(crate) fn load_scale<S: Simd>(s: S, scales: &Scales, line: usize) -> S::F {
    match scales {
        Scales::F16(lines) => s.load_f16(&lines[line]),
        Scales::F32(lines) => s.load(&lines[line].0),
        Scales::TwoLevel { bytes, signed, supers, shift } => {
            let byte = s.load_u8(&bytes[line]);
            let byte = if *signed { s.sar(s.shl(byte, 24), 24) } else { byte };
            s.mul(s.load_f16(&supers[line >> shift]), s.to_f32(byte))
        }
        Scales::Byte { bytes, table } => s.lut256(table, s.load_u8(&bytes[line])),
    }
}

/// Starts to bring group line `line` closer.
#[inline(always)]
pub(crate) fn prefetch_scale<S: Simd>(s: S, scales: &Scales, line: usize) {
    match scales {
        Scales::F16(lines) => s.prefetch(lines, line),
        Scales::F32(lines) => s.prefetch(lines, line),
        Scales::TwoLevel { bytes, .. } | Scales::Byte { bytes, .. } => s.prefetch(bytes, line),
    }
}

/// The zero points or offsets of group line `line`, 0 in formats without them.
#[inline(always)]
pub(crate) fn load_shift<S: Simd>(s: S, shifts: &Option<Scales>, line: usize) -> S::F {
    match shifts {
        None => s.splat(0.0),
        Some(shifts) => load_scale(s, shifts, line),
    }
}

/// From levels to weights.
#[derive(Clone, Copy)]
struct Group<S: Simd> {
    scale: S::F,
    /// Zero points, or with `OFFSET` offsets.
    shift: S::F,
}

impl<S: Simd> Group<S> {
    #[inline(always)]
    fn load(s: S, q: &Quantized, line: usize) -> Self {
        Self { scale: load_scale(s, &q.scales, line), shift: load_shift(s, &q.shifts, line) }
    }

    #[inline(always)]
    fn weight<const OFFSET: bool>(&self, s: S, level: S::F) -> S::F {
        if OFFSET {
            // Two roundings, as the formats say: not fused.
            s.add(s.mul(level, self.scale), self.shift)
        } else {
            s.mul(s.sub(level, self.shift), self.scale)
        }
    }
}

#[inline(always)]
fn decode_quantized<S: Simd, const OFFSET: bool>(
    s: S,
    q: &Quantized,
    tile: usize,
    k0: usize,
    count: usize,
    panel: &mut [Line<f32>],
) {
    let layout = q.scheme.format.layout();
    let (unit, words) = (layout.codes_per_unit(), layout.words_per_unit());
    let codes = &q.tile_codes(tile)[k0 / unit * words..];
    let group_size = q.scheme.group_size;
    // Units are whole within a group, so groups advance at unit borders only; or a unit has two groups.
    let (mut k, end) = (k0, k0 + count);
    while k < end {
        let line = tile * q.groups + k / group_size;
        let stop = end.min((k / group_size + 1) * group_size).max(end.min(k + unit));
        let first = Group::load(s, q, line);
        let groups = [first, if group_size < unit { Group::load(s, q, line + 1) } else { first }];
        let units = (stop - k).div_ceil(unit);
        let at = (k - k0) / unit;
        let codes = &codes[at * words..(at + units) * words];
        let out = &mut panel[at * unit..(at + units) * unit];
        match layout {
            Layout::Bits4 => decode_bits4::<S, OFFSET>(s, &q.levels, codes, &first, out),
            Layout::Bits2 => decode_bits2::<S, OFFSET>(s, &q.levels, codes, &first, out),
            Layout::Planar3 => {
                decode_planar::<S, OFFSET, 3, 32>(s, layout, codes, &groups, out, |s, code| s.lut16(&q.levels, code));
            }
            Layout::Planar5 => decode_planar::<S, OFFSET, 5, 32>(s, layout, codes, &groups, out, |s, code| {
                s.sub(s.to_f32(code), s.splat(middle(q)))
            }),
            Layout::Planar6 => decode_planar::<S, OFFSET, 3, 16>(s, layout, codes, &groups, out, |s, code| {
                s.sub(s.to_f32(code), s.splat(middle(q)))
            }),
            Layout::Bits8 => match (q.scheme.format.levels(), &q.byte_levels) {
                (Levels::E4m3 | Levels::E5m2, Some(table)) => {
                    decode_bytes::<S, OFFSET>(s, codes, &first, out, |s, word, i| s.lut256(table, s.shr(word, 8 * i)));
                }
                (Levels::Minus { .. }, _) => decode_bytes::<S, OFFSET>(s, codes, &first, out, |s, word, i| {
                    s.to_f32(s.and(s.shr(word, 8 * i), s.splat_i(255)))
                }),
                _ => decode_bytes::<S, OFFSET>(s, codes, &first, out, |s, word, i| {
                    s.to_f32(s.sar(s.shl(word, 24 - 8 * i), 24))
                }),
            },
        }
        k = stop;
    }
}

/// As [`decode_quantized`]; groups are multiples of all units.
#[inline(always)]
fn decode_grid<S: Simd>(s: S, q: &Grid, tile: usize, k0: usize, count: usize, panel: &mut [Line<f32>]) {
    let (unit, words) = (q.layout.codes_per_unit(), q.layout.words_per_unit());
    let codes = &q.tile_codes(tile)[k0 / unit * words..];
    let levels = &q.levels;
    let few: [f32; LANES] = std::array::from_fn(|code| levels[code]);
    let (mut k, end) = (k0, k0 + count);
    while k < end {
        let g = k / q.group_size;
        let stop = end.min((g + 1) * q.group_size);
        let group = Group { scale: s.load(&q.scales[tile * q.groups + g].0), shift: s.splat(0.0) };
        let (at, units) = ((k - k0) / unit, (stop - k).div_ceil(unit));
        let codes = &codes[at * words..(at + units) * words];
        let out = &mut panel[at * unit..(at + units) * unit];
        let halves = [group; 2];
        match q.layout {
            Layout::Bits2 => decode_bits2::<S, false>(s, &few, codes, &group, out),
            Layout::Bits4 => decode_bits4::<S, false>(s, &few, codes, &group, out),
            Layout::Planar3 => {
                decode_planar::<S, false, 3, 32>(s, q.layout, codes, &halves, out, |s, code| s.lut16(&few, code));
            }
            Layout::Planar5 => {
                decode_planar::<S, false, 5, 32>(s, q.layout, codes, &halves, out, |s, code| s.lut256(levels, code));
            }
            Layout::Planar6 => {
                decode_planar::<S, false, 3, 16>(s, q.layout, codes, &halves, out, |s, code| s.lut256(levels, code));
            }
            Layout::Bits8 => {
                decode_bytes::<S, false>(s, codes, &group, out, |s, word, i| s.lut256(levels, s.shr(word, 8 * i)))
            }
        }
        k = stop;
    }
}

/// What the codes of a format of integers are counted from.
fn middle(q: &Quantized) -> f32 {
    match q.scheme.format.levels() {
        Levels::Minus { half } => half as f32 * 0.5,
        levels => unreachable!("{levels:?} do not come in five or six bits"),
    }
}

#[inline(always)]
fn decode_bits4<S: Simd, const OFFSET: bool>(
    s: S,
    levels: &[f32; 16],
    codes: &[Line<u32>],
    group: &Group<S>,
    out: &mut [Line<f32>],
) {
    for (word, out) in codes.iter().zip(out.as_chunks_mut::<8>().0) {
        let mut word = s.load_i(&word.0);
        for out in out {
            s.store(group.weight::<OFFSET>(s, s.lut16(levels, word)), &mut out.0);
            word = s.shr(word, 4);
        }
    }
}

#[inline(always)]
fn decode_bits2<S: Simd, const OFFSET: bool>(
    s: S,
    levels: &[f32; 16],
    codes: &[Line<u32>],
    group: &Group<S>,
    out: &mut [Line<f32>],
) {
    // The levels repeat with period four, so bits above the code do not matter.
    for (word, out) in codes.iter().zip(out.as_chunks_mut::<16>().0) {
        let mut word = s.load_i(&word.0);
        for out in out {
            s.store(group.weight::<OFFSET>(s, s.lut16(levels, word)), &mut out.0);
            word = s.shr(word, 2);
        }
    }
}

/// Units of `CODES` codes in `WORDS` words; `groups` are those of the unit's halves, and `level` gives that of a code.
#[inline(always)]
fn decode_planar<S: Simd, const OFFSET: bool, const WORDS: usize, const CODES: usize>(
    s: S,
    layout: Layout,
    codes: &[Line<u32>],
    groups: &[Group<S>; 2],
    out: &mut [Line<f32>],
    level: impl Fn(S, S::I) -> S::F,
) {
    let (low_bits, high_bits) = (layout.low_bits(), layout.high_bits());
    let (low_mask, high_mask) = (s.splat_i((1 << low_bits) - 1), s.splat_i(((1 << high_bits) - 1) << low_bits));
    let per_word = CODES / (WORDS - 1);
    for (words, out) in codes.as_chunks::<WORDS>().0.iter().zip(out.as_chunks_mut::<CODES>().0) {
        let high = s.load_i(&words[WORDS - 1].0);
        for (w, out) in out.chunks_exact_mut(per_word).enumerate() {
            let mut low = s.load_i(&words[w].0);
            for (i, out) in out.iter_mut().enumerate() {
                let at = w * per_word + i;
                let bits = s.shl(s.shr(high, high_position(layout, at) as u32), low_bits);
                let code = s.or(s.and(low, low_mask), s.and(bits, high_mask));
                s.store(groups[2 * at / CODES].weight::<OFFSET>(s, level(s, code)), &mut out.0);
                low = s.shr(low, low_bits);
            }
        }
    }
}

/// `level(s, word, i)` gives that of byte `i` of a word.
#[inline(always)]
fn decode_bytes<S: Simd, const OFFSET: bool>(
    s: S,
    codes: &[Line<u32>],
    group: &Group<S>,
    out: &mut [Line<f32>],
    level: impl Fn(S, S::I, u32) -> S::F,
) {
    for (word, out) in codes.iter().zip(out.as_chunks_mut::<4>().0) {
        let word = s.load_i(&word.0);
        for (i, out) in (0..).zip(out) {
            s.store(group.weight::<OFFSET>(s, level(s, word, i)), &mut out.0);
        }
    }
}

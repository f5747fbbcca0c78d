//! Weight tiles to f32, exactly as [`marlin_formats`] defines the values.

use marlin_formats::Levels;
use marlin_formats::pack::Layout;

use super::exl3;
use crate::layout::grid::Grid;
use crate::layout::{ByteFloats, PackedWeight, Quantized, Scales, Values, high_position};
use crate::simd::{Kernel, LANES, LINE_BYTES, Line, Simd};

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
        match &weight.values {
            Values::Exl3(q) => exl3::decode_panel(s, q, tile, k0, &mut panel[..count]),
            _ => for_quads(s, weight, tile, k0, count, &mut ToPanel(panel)),
        }
    }
}

/// Decoded lines that are handed on together.
pub(crate) const QUAD: usize = 4;

/// What becomes of decoded lines. A closure as large as these could be compiled without the instruction set of its caller.
pub(crate) trait Quads<S: Simd> {
    /// Takes lines `at .. at + QUAD`, counted from the first that was asked for.
    fn take(&mut self, s: S, at: usize, lines: [S::F; QUAD]);
}

/// Lines are stored.
struct ToPanel<'a>(&'a mut [Line<f32>]);

impl<S: Simd> Quads<S> for ToPanel<'_> {
    #[inline(always)]
    fn take(&mut self, s: S, at: usize, lines: [S::F; QUAD]) {
        for (line, out) in lines.into_iter().zip(&mut self.0[at..at + QUAD]) {
            s.store(line, &mut out.0);
        }
    }
}

/// Hands on input features `k0 .. k0 + count` of a tile, as [`decode_panel`] stores them, straight from registers; `count`
/// is rounded up to whole units of the format. Not for EXL3.
#[inline(always)]
pub(crate) fn for_quads<S: Simd>(
    s: S,
    weight: &PackedWeight,
    tile: usize,
    k0: usize,
    count: usize,
    out: &mut impl Quads<S>,
) {
    let first = tile * weight.in_features + k0;
    match &weight.values {
        Values::F32(lines) => dense(s, &lines[first..], count, |s, line| s.load(&line.0), out),
        Values::F16(lines) => dense(s, &lines[first..], count, |s, line| s.load_f16(line), out),
        Values::BF16(lines) => dense(s, &lines[first..], count, |s, line| s.load_bf16(line), out),
        Values::Quantized(q) if q.scheme.format.has_offsets() => {
            decode_quantized::<S, OFFSETS>(s, q, tile, k0, count, out);
        }
        Values::Quantized(q) if q.shifts.is_some() => decode_quantized::<S, ZEROS>(s, q, tile, k0, count, out),
        Values::Quantized(q) => decode_quantized::<S, NO_SHIFT>(s, q, tile, k0, count, out),
        Values::Grid(q) => decode_grid(s, q, tile, k0, count, out),
        Values::Exl3(_) => unreachable!("EXL3 is decoded in panels"),
    }
}

/// Lines of codes or values that are fetched ahead of their use.
const LINES_AHEAD: usize = 128;

/// Group lines that are fetched ahead.
const GROUPS_AHEAD: usize = 32;

/// Codes up to the end of their array, so that those ahead can be fetched; the first `count` lines are to be decoded.
#[derive(Clone, Copy)]
struct Codes<'a> {
    lines: &'a [Line<u32>],
    count: usize,
}

impl<'a> Codes<'a> {
    /// What is to be decoded.
    #[inline(always)]
    fn own(self) -> &'a [Line<u32>] {
        &self.lines[..self.count]
    }
}

/// `count` lines of values; the last quad is filled up with zeros.
#[inline(always)]
fn dense<S: Simd, T>(s: S, lines: &[T], count: usize, load: impl Fn(S, &T) -> S::F, out: &mut impl Quads<S>) {
    let (quads, rest) = lines[..count].as_chunks::<QUAD>();
    for (i, quad) in quads.iter().enumerate() {
        let mut values = [s.splat(0.0); QUAD];
        for (value, line) in values.iter_mut().zip(quad) {
            *value = load(s, line);
        }
        for line in (0..QUAD).step_by(LINE_BYTES / size_of::<T>()) {
            s.prefetch(lines, QUAD * i + line + LINES_AHEAD);
        }
        out.take(s, QUAD * i, values);
    }
    if !rest.is_empty() {
        let mut values = [s.splat(0.0); QUAD];
        for (value, line) in values.iter_mut().zip(rest) {
            *value = load(s, line);
        }
        out.take(s, QUAD * quads.len(), values);
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

/// The shift of a format's groups: none, zero points, or offsets.
const NO_SHIFT: u8 = 0;
const ZEROS: u8 = 1;
const OFFSETS: u8 = 2;

/// From levels to weights.
#[derive(Clone, Copy)]
struct Group<S: Simd> {
    scale: S::F,
    /// Zero points or offsets; not read with `NO_SHIFT`.
    shift: S::F,
}

impl<S: Simd> Group<S> {
    #[inline(always)]
    fn load(s: S, q: &Quantized, line: usize) -> Self {
        Self { scale: load_scale(s, &q.scales, line), shift: load_shift(s, &q.shifts, line) }
    }

    #[inline(always)]
    fn weight<const SHIFT: u8>(&self, s: S, level: S::F) -> S::F {
        match SHIFT {
            NO_SHIFT => s.mul(level, self.scale),
            ZEROS => s.mul(s.sub(level, self.shift), self.scale),
            // Two roundings, as the formats say: not fused.
            _ => s.add(s.mul(level, self.scale), self.shift),
        }
    }
}

#[inline(always)]
fn decode_quantized<S: Simd, const SHIFT: u8>(
    s: S,
    q: &Quantized,
    tile: usize,
    k0: usize,
    count: usize,
    out: &mut impl Quads<S>,
) {
    let layout = q.scheme.format.layout();
    let (unit, words) = (layout.codes_per_unit(), layout.words_per_unit());
    let codes = &q.codes[tile * q.code_rows + k0 / unit * words..];
    let group_size = q.scheme.group_size;
    // Units are whole within a group, so groups advance at unit borders only; or a unit has two groups.
    let (mut k, end) = (k0, k0 + count);
    while k < end {
        let line = tile * q.groups + k / group_size;
        prefetch_scale(s, &q.scales, line + GROUPS_AHEAD);
        let stop = end.min((k / group_size + 1) * group_size).max(end.min(k + unit));
        let first = Group::load(s, q, line);
        let groups = [first, if group_size < unit { Group::load(s, q, line + 1) } else { first }];
        let units = (stop - k).div_ceil(unit);
        let at = (k - k0) / unit;
        let codes = Codes { lines: &codes[at * words..], count: units * words };
        let out = (&mut *out, at * unit);
        match layout {
            Layout::Bits4 => decode_bits4::<S, SHIFT>(s, &q.levels, codes, &first, out),
            Layout::Bits2 => decode_bits2::<S, SHIFT>(s, &q.levels, codes, &first, out),
            Layout::Planar3 => {
                decode_planar::<S, SHIFT, 3, 32>(s, layout, codes, &groups, out, |s, code| s.lut16(&q.levels, code));
            }
            Layout::Planar5 => decode_planar::<S, SHIFT, 5, 32>(s, layout, codes, &groups, out, |s, code| {
                s.sub(s.to_f32(code), s.splat(middle(q)))
            }),
            Layout::Planar6 => decode_planar::<S, SHIFT, 3, 16>(s, layout, codes, &groups, out, |s, code| {
                s.sub(s.to_f32(code), s.splat(middle(q)))
            }),
            Layout::Bits8 => match (q.scheme.format.levels(), &q.byte_floats) {
                (_, Some(ByteFloats::Table(table))) => {
                    decode_bytes::<S, SHIFT>(s, codes, &first, out, |s, word, i| s.lut256(table, s.shr(word, 8 * i)));
                }
                (Levels::E4m3, _) => decode_bytes::<S, SHIFT>(s, codes, &first, out, byte_float::<S, 4>),
                (Levels::E5m2, _) => decode_bytes::<S, SHIFT>(s, codes, &first, out, byte_float::<S, 5>),
                (Levels::Minus { .. }, _) => decode_bytes::<S, SHIFT>(s, codes, &first, out, |s, word, i| {
                    s.to_f32(s.and(s.shr(word, 8 * i), s.splat_i(255)))
                }),
                _ => decode_bytes::<S, SHIFT>(s, codes, &first, out, |s, word, i| {
                    s.to_f32(s.sar(s.shl(word, 24 - 8 * i), 24))
                }),
            },
        }
        k = stop;
    }
}

/// Bits of the exponent of an f32.
const EXPONENT_BITS: u32 = 8;

/// The value of byte `i` of a word, a finite float with `EXPONENT` bits of exponent.
#[inline(always)]
fn byte_float<S: Simd, const EXPONENT: u32>(s: S, word: S::I, i: u32) -> S::F {
    // To the exponent and the upper mantissa of an f32; copies of the sign and other bytes are cleared.
    let shift = const { EXPONENT_BITS - EXPONENT };
    let spread = s.sar(s.shl(word, 24 - 8 * i), shift);
    let bits = s.and(spread, s.splat_i(i32::MIN | 0x7F << (24 - shift)));
    // Exact, subnormal bytes included.
    let bias = (1 << (EXPONENT - 1)) - 1;
    s.mul(s.bits_to_f32(bits), s.splat(f32::from_bits((127 + 127 - bias) << 23)))
}

/// As [`decode_quantized`]; groups are multiples of all units.
#[inline(always)]
fn decode_grid<S: Simd>(s: S, q: &Grid, tile: usize, k0: usize, count: usize, out: &mut impl Quads<S>) {
    let (unit, words) = (q.layout.codes_per_unit(), q.layout.words_per_unit());
    let codes = &q.codes_from(tile)[k0 / unit * words..];
    let levels = &q.levels;
    let few: [f32; LANES] = std::array::from_fn(|code| levels[code]);
    let (mut k, end) = (k0, k0 + count);
    while k < end {
        let g = k / q.group_size;
        let stop = end.min((g + 1) * q.group_size);
        let group = Group { scale: s.load(&q.scales[tile * q.groups + g].0), shift: s.splat(0.0) };
        let (at, units) = ((k - k0) / unit, (stop - k).div_ceil(unit));
        let codes = Codes { lines: &codes[at * words..], count: units * words };
        let out = (&mut *out, at * unit);
        let halves = [group; 2];
        match q.layout {
            Layout::Bits2 => decode_bits2::<S, NO_SHIFT>(s, &few, codes, &group, out),
            Layout::Bits4 => decode_bits4::<S, NO_SHIFT>(s, &few, codes, &group, out),
            Layout::Planar3 => {
                decode_planar::<S, NO_SHIFT, 3, 32>(s, q.layout, codes, &halves, out, |s, code| s.lut16(&few, code));
            }
            Layout::Planar5 => {
                decode_planar::<S, NO_SHIFT, 5, 32>(s, q.layout, codes, &halves, out, |s, code| s.lut256(levels, code));
            }
            Layout::Planar6 => {
                decode_planar::<S, NO_SHIFT, 3, 16>(s, q.layout, codes, &halves, out, |s, code| s.lut256(levels, code));
            }
            Layout::Bits8 => {
                decode_bytes::<S, NO_SHIFT>(s, codes, &group, out, |s, word, i| s.lut256(levels, s.shr(word, 8 * i)))
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
fn decode_bits4<S: Simd, const SHIFT: u8>(
    s: S,
    levels: &[f32; 16],
    codes: Codes<'_>,
    group: &Group<S>,
    (out, at): (&mut impl Quads<S>, usize),
) {
    for (i, word) in codes.own().iter().enumerate() {
        s.prefetch(codes.lines, i + LINES_AHEAD);
        let mut word = s.load_i(&word.0);
        for quad in 0..2 {
            let mut lines = [s.splat(0.0); QUAD];
            for line in &mut lines {
                *line = group.weight::<SHIFT>(s, s.lut16(levels, word));
                word = s.shr(word, 4);
            }
            out.take(s, at + 8 * i + QUAD * quad, lines);
        }
    }
}

#[inline(always)]
fn decode_bits2<S: Simd, const SHIFT: u8>(
    s: S,
    levels: &[f32; 16],
    codes: Codes<'_>,
    group: &Group<S>,
    (out, at): (&mut impl Quads<S>, usize),
) {
    // The levels repeat with period four, so bits above the code do not matter.
    for (i, word) in codes.own().iter().enumerate() {
        s.prefetch(codes.lines, i + LINES_AHEAD);
        let mut word = s.load_i(&word.0);
        for quad in 0..4 {
            let mut lines = [s.splat(0.0); QUAD];
            for line in &mut lines {
                *line = group.weight::<SHIFT>(s, s.lut16(levels, word));
                word = s.shr(word, 2);
            }
            out.take(s, at + 16 * i + QUAD * quad, lines);
        }
    }
}

/// Units of `CODES` codes in `WORDS` words; `groups` are those of the unit's halves, and `level` gives that of a code.
#[inline(always)]
fn decode_planar<S: Simd, const SHIFT: u8, const WORDS: usize, const CODES: usize>(
    s: S,
    layout: Layout,
    codes: Codes<'_>,
    groups: &[Group<S>; 2],
    (out, at): (&mut impl Quads<S>, usize),
    level: impl Fn(S, S::I) -> S::F,
) {
    let (low_bits, high_bits) = (layout.low_bits(), layout.high_bits());
    let (low_mask, high_mask) = (s.splat_i((1 << low_bits) - 1), s.splat_i(((1 << high_bits) - 1) << low_bits));
    let per_word = CODES / (WORDS - 1);
    for (u, words) in codes.own().as_chunks::<WORDS>().0.iter().enumerate() {
        for w in 0..WORDS {
            s.prefetch(codes.lines, WORDS * u + w + LINES_AHEAD);
        }
        let high = s.load_i(&words[WORDS - 1].0);
        for (w, word) in words[..WORDS - 1].iter().enumerate() {
            let mut low = s.load_i(&word.0);
            for quad in 0..per_word / QUAD {
                let first = w * per_word + QUAD * quad;
                let mut lines = [s.splat(0.0); QUAD];
                for (i, line) in lines.iter_mut().enumerate() {
                    let bits = s.shl(s.shr(high, high_position(layout, first + i) as u32), low_bits);
                    let code = s.or(s.and(low, low_mask), s.and(bits, high_mask));
                    *line = groups[2 * first / CODES].weight::<SHIFT>(s, level(s, code));
                    low = s.shr(low, low_bits);
                }
                out.take(s, at + CODES * u + first, lines);
            }
        }
    }
}

/// `level(s, word, i)` gives that of byte `i` of a word.
#[inline(always)]
fn decode_bytes<S: Simd, const SHIFT: u8>(
    s: S,
    codes: Codes<'_>,
    group: &Group<S>,
    (out, at): (&mut impl Quads<S>, usize),
    level: impl Fn(S, S::I, u32) -> S::F,
) {
    for (i, word) in codes.own().iter().enumerate() {
        s.prefetch(codes.lines, i + LINES_AHEAD);
        let word = s.load_i(&word.0);
        let mut lines = [s.splat(0.0); QUAD];
        for (byte, line) in (0..).zip(&mut lines) {
            *line = group.weight::<SHIFT>(s, level(s, word, byte));
        }
        out.take(s, at + QUAD * i, lines);
    }
}

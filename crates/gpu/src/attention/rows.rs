//! Rows of queries, keys and values, read as words: every dtype and cache format through one loader.

use cubecl::prelude::*;
use half::f16;
use marlin_formats::DType;
use marlin_ops::attention::KvFormat;

/// Four values, the unit of arithmetic.
pub(super) type Four = Vector<f32, Const<4>>;

/// How values lie in words.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) enum Codes {
    F32,
    F16,
    BF16,
    /// E4M3FN bytes.
    Fp8,
    /// Two's complement bytes.
    Int8,
    /// Nibbles of value `code - 8`.
    Int4,
    /// E2M1 nibbles.
    Fp4,
}

impl Codes {
    /// Those of a checked float dtype.
    pub(super) fn of(dtype: DType) -> Self {
        match dtype {
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            _ => Self::F32,
        }
    }

    /// Those of a cache format.
    pub(super) fn of_format(format: KvFormat) -> Self {
        match format {
            KvFormat::F32 => Self::F32,
            KvFormat::F16 => Self::F16,
            KvFormat::BF16 => Self::BF16,
            KvFormat::Fp8 => Self::Fp8,
            KvFormat::Int8 => Self::Int8,
            KvFormat::Int4 => Self::Int4,
            KvFormat::Fp4 => Self::Fp4,
        }
    }

    /// Values of a word.
    pub(super) const fn per_word(self) -> usize {
        match self {
            Self::F32 => 1,
            Self::F16 | Self::BF16 => 2,
            Self::Fp8 | Self::Int8 => 4,
            Self::Int4 | Self::Fp4 => 8,
        }
    }

    /// Bits of a value.
    pub(super) const fn bits(self) -> u32 {
        32 / self.per_word() as u32
    }

    /// Whether rows have scales.
    pub(super) const fn is_quantized(self) -> bool {
        matches!(self, Self::Fp8 | Self::Int8 | Self::Int4 | Self::Fp4)
    }
}

/// How rows are read; kernels are compiled for it.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) struct Rows {
    pub(super) codes: Codes,
    /// Words of one access.
    pub(super) line: usize,
    /// Rows may start or end inside a word.
    pub(super) split: bool,
}

impl Rows {
    /// The widest reads of rows that lie `stride` values apart, of which `width` are used.
    pub(super) fn new(codes: Codes, stride: usize, width: usize) -> Self {
        let whole = |line: usize| {
            let values = line * codes.per_word();
            values <= 8 && stride % values == 0 && width % values == 0
        };
        let line = [4, 2, 1].into_iter().find(|&line| whole(line));
        Self { codes, line: line.unwrap_or(1), split: line.is_none() }
    }

    /// The same by single words, which may start at any column.
    pub(super) fn by_words(codes: Codes) -> Self {
        Self { codes, line: 1, split: codes.per_word() > 1 }
    }
}

/// Value `at` of rows that are read by single words.
#[cube]
pub(super) fn load_one<N: Size>(data: &[Vector<u32, N>], at: usize, #[comptime] rows: Rows) -> f32 {
    let word = data[at / comptime!(rows.codes.per_word())].extract(0usize);
    let shift = u32::cast_from(at % comptime!(rows.codes.per_word())) * comptime!(rows.codes.bits());
    code_value(word >> shift, rows.codes)
}

/// Values `column..column + 8` of the row that starts at value `start`, 0 from `width` on.
#[cube]
pub(super) fn load_eight<N: Size>(
    data: &[Vector<u32, N>],
    start: usize,
    column: usize,
    width: usize,
    #[comptime] rows: Rows,
) -> Array<f32> {
    let mut out = Array::<f32>::new(8usize);
    #[unroll]
    for i in 0..8usize {
        out[i] = 0.0;
    }
    if comptime!(rows.split) {
        #[unroll]
        for i in 0..8usize {
            if column + i < width {
                out[i] = load_one::<N>(data, start + column + i, rows);
            }
        }
    } else {
        let values = comptime!(rows.line * rows.codes.per_word());
        #[unroll]
        for l in 0..comptime!(8 / values) {
            let first = column + l * values;
            if first < width {
                let words = data[(start + first) / values];
                #[unroll]
                for w in 0..comptime!(rows.line) {
                    unpack(words.extract(w), &mut out, comptime!(l * values + w * rows.codes.per_word()), rows.codes);
                }
            }
        }
    }
    out
}

/// The values of a word, to `out[first..]`.
#[cube]
fn unpack(word: u32, out: &mut Array<f32>, #[comptime] first: usize, #[comptime] codes: Codes) {
    #[unroll]
    for i in 0..comptime!(codes.per_word()) {
        out[comptime!(first + i)] = code_value(word >> comptime!(i as u32 * codes.bits()), codes);
    }
}

/// The value of the code in the lowest bits of a word, before any scale.
#[cube]
pub(super) fn code_value(word: u32, #[comptime] codes: Codes) -> f32 {
    match comptime!(codes) {
        Codes::F32 => f32::reinterpret(word),
        Codes::F16 => f32::cast_from(Vector::<f16, Const<2>>::reinterpret(word).extract(0usize)),
        Codes::BF16 => f32::reinterpret(word << 16u32),
        Codes::Fp8 => {
            let value = small_float(word, 4u32, 3u32);
            select((word & 0x7fu32) == 0x7fu32, f32::reinterpret(0x7fc0_0000u32), value)
        }
        Codes::Int8 => f32::cast_from(i32::cast_from(word << 24u32) >> 24i32),
        Codes::Int4 => f32::cast_from(word & 15u32) - 8.0f32,
        Codes::Fp4 => small_float(word, 2u32, 1u32),
    }
}

/// A float with a sign, `exponent` bits of the usual bias and `mantissa` bits, without infinities.
#[cube]
fn small_float(word: u32, #[comptime] exponent: u32, #[comptime] mantissa: u32) -> f32 {
    let m = word & comptime!((1u32 << mantissa) - 1);
    let e = (word >> mantissa) & comptime!((1u32 << exponent) - 1);
    // Integer arithmetic: devices may flush subnormal floats.
    let digits = f32::cast_from(select(e == 0u32, m, m + comptime!(1u32 << mantissa)));
    let e = select(e == 0u32, 1u32.runtime(), e);
    let unit = f32::reinterpret((e + comptime!(128 - (1u32 << (exponent - 1)) - mantissa)) << 23u32);
    let sign = ((word >> comptime!(exponent + mantissa)) & 1u32) << 31u32;
    f32::reinterpret(u32::reinterpret(digits * unit) | sign)
}

/// The value of the bits of a non-negative f16.
#[cube]
pub(super) fn scale_value(bits: u16) -> f32 {
    let bits = u32::cast_from(bits);
    let usual = f32::reinterpret((bits << 13u32) + 0x3800_0000u32);
    let tiny = f32::cast_from(bits) * 5.960_464_5e-8f32;
    select(bits < 0x400u32, tiny, usual)
}

/// Four of eight values.
#[cube]
pub(super) fn four_of(values: &Array<f32>, #[comptime] first: usize) -> Four {
    let mut out = Four::new(0.0f32);
    #[unroll]
    for i in 0..4usize {
        out.insert(i, values[comptime!(first + i)]);
    }
    out
}

/// The sum of four values.
#[cube]
pub(super) fn sum_of(values: Four) -> f32 {
    (values.extract(0usize) + values.extract(1usize)) + (values.extract(2usize) + values.extract(3usize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_divide_rows() {
        let rows = |codes, stride, width| {
            let rows = Rows::new(codes, stride, width);
            (rows.line, rows.split)
        };
        assert_eq!(rows(Codes::F32, 64, 64), (4, false));
        assert_eq!(rows(Codes::F32, 65, 65), (1, false));
        assert_eq!(rows(Codes::F16, 128, 128), (4, false));
        assert_eq!(rows(Codes::F16, 100, 100), (2, false));
        assert_eq!(rows(Codes::BF16, 576, 511), (1, true));
        assert_eq!(rows(Codes::BF16, 33, 33), (1, true));
        assert_eq!(rows(Codes::Fp8, 64, 64), (2, false));
        assert_eq!(rows(Codes::Int8, 20, 20), (1, false));
        assert_eq!(rows(Codes::Int4, 64, 64), (1, false));
    }
}

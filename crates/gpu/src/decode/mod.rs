//! Weight decoders: what the words of a column mean, for every kernel that reads weights.
//!
//! All weights lie K-major, words `[word rows, N]`, so that neighbouring units read neighbouring words: quantized ones as
//! they are stored ([`marlin_formats::pack`]), dense ones with one f32 or two 16-bit values a word. The smallest whole
//! unit is a *unit* of 1 to 32 input features; a group of weights that share a scale has whole units.

mod block;
pub(crate) mod exl3;
mod scale;

use cubecl::ir::{ElemType, FloatKind, UIntKind};
use cubecl::prelude::*;
use half::f16;
use marlin_formats::pack::Layout;
use marlin_formats::{DType, Levels as FormatLevels, ScaleKind, Scheme};

use block::planar_code;
pub(crate) use block::{block_level, field_level};
pub(crate) use exl3::Trellis;
pub(crate) use scale::{group_scale, group_zero, stored_scale, summand, weight_of};

/// Input features are padded to a multiple of this with codes 0, whose levels are finite.
pub(crate) const PADDED: usize = 32;

/// How a weight is decoded; kernels are compiled for it.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) struct Decoder {
    pub(crate) codes: Codes,
    pub(crate) levels: Levels,
    pub(crate) scale: Scale,
    /// Zero points are subtracted before scaling.
    pub(crate) zeros: bool,
    /// Offsets are added after scaling.
    pub(crate) offsets: bool,
    /// Input features that share a scale; 0 without scales.
    pub(crate) group_size: usize,
}

/// How codes lie in words.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) enum Codes {
    F32,
    F16,
    BF16,
    Packed(Layout),
    /// Tiles of 16 x 16, in rows: the weights between the two rotations of EXL3.
    Trellis(Trellis),
}

/// The value of a code at zero point 0.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) enum Levels {
    /// Dense values stand for themselves.
    Dense,
    /// E2M1.
    Fp4,
    /// `code - half / 2`.
    Minus { half: i32 },
    /// Two's complement byte.
    Signed8,
    /// FP8 E4M3FN.
    E4m3,
    /// FP8 E5M2.
    E5m2,
    /// Looked up in the weight's table.
    Table,
}

/// The stored scale of a group.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) enum Scale {
    None,
    F16,
    F32,
    /// The f32 product of both levels, which is exact.
    TwoLevel,
    /// A byte, looked up in the weight's table.
    Byte,
}

impl Decoder {
    /// The decoder of a dense weight.
    pub(crate) fn dense(dtype: DType) -> Self {
        let codes = match dtype {
            DType::F16 => Codes::F16,
            DType::BF16 => Codes::BF16,
            _ => Codes::F32,
        };
        Self { codes, levels: Levels::Dense, scale: Scale::None, zeros: false, offsets: false, group_size: 0 }
    }

    /// The decoder of a quantized weight.
    pub(crate) fn quantized(scheme: Scheme) -> Self {
        let format = scheme.format;
        let levels = match format.levels() {
            FormatLevels::E2m1 => Levels::Fp4,
            FormatLevels::E4m3 => Levels::E4m3,
            FormatLevels::E5m2 => Levels::E5m2,
            FormatLevels::Signed8 => Levels::Signed8,
            FormatLevels::Minus { half } => Levels::Minus { half },
            FormatLevels::Table(_) => Levels::Table,
        };
        let scale = match format.scale_kind() {
            ScaleKind::F16 => Scale::F16,
            ScaleKind::E4m3 | ScaleKind::E8m0 => Scale::Byte,
            ScaleKind::F32 => Scale::F32,
            ScaleKind::F16U8 | ScaleKind::F16I8 => Scale::TwoLevel,
        };
        let layout = match format.layout() {
            // A unit must not lie in two groups.
            Layout::Planar3 if scheme.group_size < Layout::Planar3.codes_per_unit() => Layout::Bits4,
            layout => layout,
        };
        let (zeros, offsets) = (format.has_zeros(), format.has_offsets());
        Self { codes: Codes::Packed(layout), levels, scale, zeros, offsets, group_size: scheme.group_size }
    }

    /// The decoder of the weights between the rotations of EXL3; K and N are padded.
    pub(crate) fn trellis(trellis: Trellis) -> Self {
        let codes = Codes::Trellis(trellis);
        Self { codes, levels: Levels::Dense, scale: Scale::None, zeros: false, offsets: false, group_size: 0 }
    }

    /// The decoder of grid codes, whose signs are in the codes and scales.
    pub(crate) fn grid(layout: Layout, group_size: usize) -> Self {
        let (codes, levels, scale) = (Codes::Packed(layout), Levels::Table, Scale::F32);
        Self { codes, levels, scale, zeros: false, offsets: false, group_size }
    }

    /// Whether x and the results are rotated.
    pub(crate) const fn is_trellis(self) -> bool {
        matches!(self.codes, Codes::Trellis(_))
    }

    /// The same codes and levels for kernels that take the group size at run time.
    pub(crate) fn ungrouped(self) -> Self {
        Self { group_size: 0, ..self }
    }

    /// Input features of a unit.
    pub(crate) const fn unit(self) -> usize {
        match self.codes {
            Codes::F32 => 1,
            Codes::F16 | Codes::BF16 => 2,
            Codes::Packed(layout) => layout.codes_per_unit(),
            Codes::Trellis(_) => exl3::UNIT,
        }
    }

    /// Words of a unit.
    pub(crate) const fn words(self) -> usize {
        match self.codes {
            Codes::Packed(layout) => layout.words_per_unit(),
            Codes::Trellis(trellis) => trellis.bits,
            _ => 1,
        }
    }

    /// The element type of the scales, zero points and offsets that kernels see.
    pub(crate) fn scale_elem(self) -> ElemType {
        match self.scale {
            Scale::F16 => ElemType::Float(FloatKind::F16),
            Scale::F32 | Scale::TwoLevel => ElemType::Float(FloatKind::F32),
            Scale::Byte => ElemType::UInt(UIntKind::U8),
            Scale::None => ElemType::UInt(UIntKind::U32),
        }
    }
}

/// The levels of unit `unit` of column `n`, before zero point and scale: [`Decoder::unit`] values in the order of K.
/// `words` starts at the weight's first word, or at an expert's.
#[cube]
pub(crate) fn decode_unit(
    words: &[u32],
    table: &[f32],
    start: usize,
    unit: usize,
    n: usize,
    columns: usize,
    #[comptime] d: Decoder,
) -> Array<f32> {
    let mut out = Array::<f32>::new(comptime!(d.unit()));
    let at = start + unit * comptime!(d.words()) * columns + n;
    match comptime!(d.codes) {
        Codes::F32 => {
            out[0] = f32::reinterpret(words[at]);
        }
        Codes::F16 => {
            let pair = Vector::<f16, Const<2>>::reinterpret(words[at]);
            out[0] = f32::cast_from(pair.extract(0usize));
            out[1] = f32::cast_from(pair.extract(1usize));
        }
        Codes::BF16 => {
            let word = words[at];
            out[0] = f32::reinterpret(word << 16u32);
            out[1] = f32::reinterpret(word & 0xffff_0000u32);
        }
        Codes::Trellis(trellis) => {
            let values = exl3::decode_rows(words, table, start, unit, n, columns, trellis);
            #[unroll]
            for i in 0..exl3::UNIT {
                out[i] = values[i];
            }
        }
        Codes::Packed(layout) => {
            if comptime!(layout.high_bits() > 0) {
                let mut loaded = Array::<u32>::new(comptime!(layout.words_per_unit()));
                #[unroll]
                for i in 0..comptime!(layout.words_per_unit()) {
                    loaded[i] = words[at + i * columns];
                }
                #[unroll]
                for i in 0..comptime!(layout.codes_per_unit()) {
                    let low = loaded[comptime!(i * layout.low_bits() as usize / 32)];
                    let high = loaded[comptime!(layout.words_per_unit() - 1)];
                    out[i] = field_level(planar_code(low, high, i, layout), table, 0u32, layout.bits(), d.levels);
                }
            } else {
                let word = words[at];
                #[unroll]
                for i in 0..comptime!(layout.codes_per_unit()) {
                    let first_bit = comptime!(layout.bits() * i as u32);
                    out[i] = field_level(word, table, first_bit, comptime!(layout.bits()), d.levels);
                }
            }
        }
    }
    out
}

//! What every format stores, in one table.

use crate::pack::Layout;
use crate::{Format, normal_float};

/// Weights that share the f16 scale (and minimum) of a two-level format.
pub const SUPER_BLOCK: usize = 256;

/// The levels of ggml's IQ4_NL and IQ4_XS, ascending.
pub const IQ4: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

/// What a code stands for before zero point, scale and offset.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Levels {
    /// FP4.
    E2m1,
    /// FP8 E4M3FN.
    E4m3,
    /// FP8 E5M2.
    E5m2,
    /// Two's complement byte.
    Signed8,
    /// `code - half / 2`.
    Minus {
        /// Twice what is subtracted.
        half: i32,
    },
    /// Looked up, one level a code, ascending.
    Table(&'static [f32]),
}

/// How the scale of a group is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleKind {
    /// IEEE binary16.
    F16,
    /// E4M3FN byte, non-negative, divided by the tensor scale.
    E4m3,
    /// E8M0 byte.
    E8m0,
    /// IEEE binary32.
    F32,
    /// An unsigned byte times the f16 scale of its [`SUPER_BLOCK`].
    F16U8,
    /// A two's complement byte times the f16 scale of its [`SUPER_BLOCK`].
    F16I8,
}

impl ScaleKind {
    /// Bits that one group stores.
    pub const fn bits(self) -> u32 {
        match self {
            ScaleKind::F16 => 16,
            ScaleKind::F32 => 32,
            ScaleKind::E4m3 | ScaleKind::E8m0 | ScaleKind::F16U8 | ScaleKind::F16I8 => 8,
        }
    }

    /// The type's usual name.
    pub const fn name(self) -> &'static str {
        match self {
            ScaleKind::F16 => "F16",
            ScaleKind::E4m3 => "E4M3",
            ScaleKind::E8m0 => "E8M0",
            ScaleKind::F32 => "F32",
            ScaleKind::F16U8 => "F16_U8",
            ScaleKind::F16I8 => "F16_I8",
        }
    }

    /// 16-bit words of one stored scale in [`crate::QuantizedMatrix::scales`]; bytes take a word.
    pub const fn words(self) -> usize {
        match self {
            ScaleKind::F32 => 2,
            _ => 1,
        }
    }

    /// Whether a group's byte is multiplied with the f16 scale of its [`SUPER_BLOCK`].
    pub const fn is_two_level(self) -> bool {
        matches!(self, ScaleKind::F16U8 | ScaleKind::F16I8)
    }
}

/// What a group stores beside its scale, in the scale's type (two-level: a byte times an f16).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shift {
    /// Nothing: `level * scale`.
    None,
    /// A zero point: `(level - zero) * scale`.
    Zero,
    /// An offset, or minimum: `level * scale + offset`, two roundings.
    Offset,
}

/// The group sizes of a format.
#[derive(Clone, Copy)]
pub(crate) enum GroupSize {
    /// No other one.
    Fixed(usize),
    /// Any whole number of packing units; this one when none is asked for.
    Default(usize),
}

/// One row of the table.
#[derive(Clone, Copy)]
pub(crate) struct Definition {
    pub(crate) name: &'static str,
    pub(crate) layout: Layout,
    pub(crate) levels: Levels,
    pub(crate) scale: ScaleKind,
    pub(crate) shift: Shift,
    pub(crate) group_size: GroupSize,
}

const UNSIGNED: Levels = Levels::Minus { half: 0 };

impl Format {
    pub(crate) const fn definition(self) -> Definition {
        use GroupSize::{Default, Fixed};
        use Layout::{Bits2, Bits4, Bits8, Planar3, Planar5, Planar6};
        use ScaleKind::{E4m3, E8m0, F16, F16I8, F16U8, F32};
        use Shift::{None, Offset, Zero};
        let (name, layout, levels, scale, shift, group_size) = match self {
            Format::Fp4E2m1 => ("fp4_e2m1", Bits4, Levels::E2m1, F16, None, Default(128)),
            Format::Nvfp4 => ("nvfp4", Bits4, Levels::E2m1, E4m3, None, Fixed(16)),
            Format::Mxfp4 => ("mxfp4", Bits4, Levels::E2m1, E8m0, None, Fixed(32)),
            Format::Int4U4 => ("int4_u4", Bits4, UNSIGNED, F16, Zero, Default(128)),
            Format::Int4S4 => ("int4_s4", Bits4, Levels::Minus { half: 16 }, F16, None, Default(128)),
            Format::Int8 => ("int8", Bits8, Levels::Signed8, F16, None, Default(128)),
            Format::Int8Asym => ("int8_asym", Bits8, UNSIGNED, F16, Zero, Default(128)),
            Format::Fp8E4m3 => ("fp8_e4m3", Bits8, Levels::E4m3, F16, None, Default(128)),
            Format::Fp8E5m2 => ("fp8_e5m2", Bits8, Levels::E5m2, F16, None, Default(128)),
            Format::Int3 => ("int3", Planar3, Levels::Minus { half: 7 }, F16, None, Default(128)),
            Format::Int2 => ("int2", Bits2, Levels::Minus { half: 3 }, F16, None, Default(128)),
            Format::Nf4 => ("nf4", Bits4, Levels::Table(&normal_float::NF4), F16, None, Default(64)),
            Format::Nf3 => ("nf3", Planar3, Levels::Table(&normal_float::NF3), F16, None, Default(128)),
            Format::Nf2 => ("nf2", Bits2, Levels::Table(&normal_float::NF2), F16, None, Default(128)),
            Format::Int3U3 => ("int3_u3", Planar3, UNSIGNED, F16, Zero, Default(128)),
            Format::Int2U2 => ("int2_u2", Bits2, UNSIGNED, F16, Zero, Default(128)),
            Format::Q2K => ("q2_k", Bits2, UNSIGNED, F16U8, Offset, Fixed(16)),
            Format::Q3K => ("q3_k", Planar3, Levels::Minus { half: 8 }, F16I8, None, Fixed(16)),
            Format::Q4K => ("q4_k", Bits4, UNSIGNED, F16U8, Offset, Fixed(32)),
            Format::Q5K => ("q5_k", Planar5, UNSIGNED, F16U8, Offset, Fixed(32)),
            Format::Q6K => ("q6_k", Planar6, Levels::Minus { half: 64 }, F16I8, None, Fixed(16)),
            Format::Iq4Xs => ("iq4_xs", Bits4, Levels::Table(&IQ4), F16I8, None, Fixed(32)),
            Format::Iq4Nl => ("iq4_nl", Bits4, Levels::Table(&IQ4), F16, None, Fixed(32)),
            Format::Q4_1 => ("q4_1", Bits4, UNSIGNED, F16, Offset, Fixed(32)),
            Format::Q5_0 => ("q5_0", Planar5, Levels::Minus { half: 32 }, F16, None, Fixed(32)),
            Format::Q5_1 => ("q5_1", Planar5, UNSIGNED, F16, Offset, Fixed(32)),
            Format::Affine2 => ("affine2", Bits2, UNSIGNED, F32, Offset, Default(64)),
            Format::Affine3 => ("affine3", Planar3, UNSIGNED, F32, Offset, Default(64)),
            Format::Affine4 => ("affine4", Bits4, UNSIGNED, F32, Offset, Default(64)),
            Format::Affine5 => ("affine5", Planar5, UNSIGNED, F32, Offset, Default(64)),
            Format::Affine6 => ("affine6", Planar6, UNSIGNED, F32, Offset, Default(64)),
            Format::Affine8 => ("affine8", Bits8, UNSIGNED, F32, Offset, Default(64)),
            Format::Fp8E4m3F32 => ("fp8_e4m3_f32", Bits8, Levels::E4m3, F32, None, Default(128)),
        };
        Definition { name, layout, levels, scale, shift, group_size }
    }
}

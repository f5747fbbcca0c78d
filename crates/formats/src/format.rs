//! The native weight formats and what their codes mean.

use std::fmt;
use std::str::FromStr;

use crate::pack::Layout;
use crate::{FormatError, fp4, fp8, normal_float};

/// A native weight format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    /// E2M1 codes, one f16 scale a group.
    Fp4E2m1,
    /// E2M1 codes, one E4M3 scale per 16 weights and one f32 tensor scale that divides.
    Nvfp4,
    /// E2M1 codes, one power-of-two E8M0 scale per 32 weights (OCP Microscaling).
    Mxfp4,
    /// Unsigned 4-bit codes with an f16 scale and zero point: `(q - z) * s`.
    Int4U4,
    /// Offset-binary 4-bit codes: `(q - 8) * s`.
    Int4S4,
    /// Two's complement bytes: `q * s`.
    Int8,
    /// Unsigned bytes with an f16 scale and zero point: `(q - z) * s`.
    Int8Asym,
    /// E4M3FN bytes, one f16 scale a group.
    Fp8E4m3,
    /// E5M2 bytes, one f16 scale a group.
    Fp8E5m2,
    /// 3-bit mid-rise grid: `(c - 3.5) * s`.
    Int3,
    /// 2-bit mid-rise grid: `(c - 1.5) * s`.
    Int2,
    /// The 16 QLoRA normal-float levels times an f16 scale.
    Nf4,
    /// Eight symmetric normal-float levels times an f16 scale.
    Nf3,
    /// Four symmetric normal-float levels times an f16 scale.
    Nf2,
}

/// The stored type of a group's scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScaleKind {
    /// IEEE binary16.
    F16,
    /// E4M3FN byte, non-negative, divided by the tensor scale.
    E4m3,
    /// E8M0 byte.
    E8m0,
}

impl ScaleKind {
    /// Bits of one stored scale.
    pub const fn bits(self) -> u32 {
        match self {
            ScaleKind::F16 => 16,
            ScaleKind::E4m3 | ScaleKind::E8m0 => 8,
        }
    }

    /// The type's usual name.
    pub const fn name(self) -> &'static str {
        match self {
            ScaleKind::F16 => "F16",
            ScaleKind::E4m3 => "E4M3",
            ScaleKind::E8m0 => "E8M0",
        }
    }
}

impl Format {
    /// Every native format.
    pub const ALL: [Format; 14] = [
        Format::Fp4E2m1,
        Format::Nvfp4,
        Format::Mxfp4,
        Format::Int4U4,
        Format::Int4S4,
        Format::Int8,
        Format::Int8Asym,
        Format::Fp8E4m3,
        Format::Fp8E5m2,
        Format::Int3,
        Format::Int2,
        Format::Nf4,
        Format::Nf3,
        Format::Nf2,
    ];

    /// Short names accepted beside the formats' own.
    pub const ALIASES: [(&str, Format); 4] =
        [("fp4", Format::Fp4E2m1), ("int4", Format::Int4S4), ("int4_asym", Format::Int4U4), ("fp8", Format::Fp8E4m3)];

    /// The name used in `config.json` and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Format::Fp4E2m1 => "fp4_e2m1",
            Format::Nvfp4 => "nvfp4",
            Format::Mxfp4 => "mxfp4",
            Format::Int4U4 => "int4_u4",
            Format::Int4S4 => "int4_s4",
            Format::Int8 => "int8",
            Format::Int8Asym => "int8_asym",
            Format::Fp8E4m3 => "fp8_e4m3",
            Format::Fp8E5m2 => "fp8_e5m2",
            Format::Int3 => "int3",
            Format::Int2 => "int2",
            Format::Nf4 => "nf4",
            Format::Nf3 => "nf3",
            Format::Nf2 => "nf2",
        }
    }

    /// Every valid name and alias, comma separated, for messages.
    pub fn name_list() -> String {
        let names = Format::ALL.iter().map(|format| format.name());
        let aliases = Format::ALIASES.iter().map(|(alias, _)| *alias);
        names.chain(aliases).collect::<Vec<_>>().join(", ")
    }

    /// How codes lie in u32 words.
    pub const fn layout(self) -> Layout {
        match self {
            Format::Int2 | Format::Nf2 => Layout::Bits2,
            Format::Int3 | Format::Nf3 => Layout::Planar3,
            Format::Fp4E2m1 | Format::Nvfp4 | Format::Mxfp4 | Format::Int4U4 | Format::Int4S4 | Format::Nf4 => {
                Layout::Bits4
            }
            Format::Int8 | Format::Int8Asym | Format::Fp8E4m3 | Format::Fp8E5m2 => Layout::Bits8,
        }
    }

    /// Bits of one code: 2, 3, 4 or 8.
    pub const fn code_bits(self) -> u32 {
        self.layout().bits()
    }

    /// The group size used when none is asked for.
    pub const fn default_group_size(self) -> usize {
        match self {
            Format::Nvfp4 => 16,
            Format::Mxfp4 => 32,
            Format::Nf4 => 64,
            _ => 128,
        }
    }

    /// Whether the format can store groups of `group_size` weights along K.
    ///
    /// NVFP4 and MXFP4 fix it; the others need whole packing units. It may exceed K, which
    /// gives one group a column.
    ///
    /// # Errors
    /// [`FormatError::GroupSize`], which states the rule.
    pub fn check_group_size(self, group_size: usize) -> Result<(), FormatError> {
        let refuse = |rule| Err(FormatError::GroupSize { format: self, group_size, rule });
        if let Format::Nvfp4 | Format::Mxfp4 = self {
            let only = self.default_group_size();
            return if group_size == only { Ok(()) } else { refuse(format!("it must be {only}")) };
        }
        let unit = self.layout().codes_per_unit();
        if group_size == 0 || !group_size.is_multiple_of(unit) {
            return refuse(format!("it must be a positive multiple of {unit}"));
        }
        Ok(())
    }

    /// Whether each group stores a zero point.
    pub const fn has_zeros(self) -> bool {
        matches!(self, Format::Int4U4 | Format::Int8Asym)
    }

    /// The stored type of a group's scale.
    pub const fn scale_kind(self) -> ScaleKind {
        match self {
            Format::Nvfp4 => ScaleKind::E4m3,
            Format::Mxfp4 => ScaleKind::E8m0,
            _ => ScaleKind::F16,
        }
    }

    /// The unscaled value of a code as stored; bits above [`Format::code_bits`] are ignored.
    ///
    /// `zero` is the group's zero point and matters only where [`Format::has_zeros`].
    #[inline]
    pub fn value(self, code: u8, zero: f32) -> f32 {
        let code = code & ((1u32 << self.code_bits()) - 1) as u8;
        match self {
            Format::Fp4E2m1 | Format::Nvfp4 | Format::Mxfp4 => fp4::decode(code),
            Format::Int4U4 | Format::Int8Asym => f32::from(code) - zero,
            Format::Int4S4 => f32::from(code) - 8.0,
            Format::Int8 => f32::from(code as i8),
            Format::Fp8E4m3 => fp8::e4m3::decode(code),
            Format::Fp8E5m2 => fp8::e5m2::decode(code),
            Format::Int3 => f32::from(code) - 3.5,
            Format::Int2 => f32::from(code) - 1.5,
            Format::Nf4 => normal_float::NF4[usize::from(code)],
            Format::Nf3 => normal_float::NF3[usize::from(code)],
            Format::Nf2 => normal_float::NF2[usize::from(code)],
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Format {
    type Err = FormatError;

    /// Reads a format name or alias, exactly as written.
    fn from_str(name: &str) -> Result<Self, FormatError> {
        let formats = Format::ALL.iter().map(|&format| (format.name(), format));
        formats
            .chain(Format::ALIASES)
            .find(|(known, _)| *known == name)
            .map(|(_, format)| format)
            .ok_or_else(|| FormatError::UnknownFormat { name: name.to_owned() })
    }
}

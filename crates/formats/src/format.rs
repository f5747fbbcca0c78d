//! The native weight formats and what their codes mean.

use std::fmt;
use std::str::FromStr;

use crate::definition::GroupSize;
use crate::pack::Layout;
use crate::{FormatError, Levels, ScaleKind, Shift, fp4, fp8};

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
    /// Unsigned 3-bit codes with an f16 scale and zero point: `(q - z) * s`.
    Int3U3,
    /// Unsigned 2-bit codes with an f16 scale and zero point: `(q - z) * s`.
    Int2U2,
    /// ggml Q2_K: 2-bit codes, groups of 16 with two-level scale and minimum.
    Q2K,
    /// ggml Q3_K: 3-bit codes minus 4, groups of 16 with a two-level scale.
    Q3K,
    /// ggml Q4_K: 4-bit codes, groups of 32 with two-level scale and minimum.
    Q4K,
    /// ggml Q5_K: 5-bit codes, groups of 32 with two-level scale and minimum.
    Q5K,
    /// ggml Q6_K: 6-bit codes minus 32, groups of 16 with a two-level scale.
    Q6K,
    /// ggml IQ4_XS: the [`crate::IQ4`] levels, groups of 32 with a two-level scale.
    Iq4Xs,
    /// ggml IQ4_NL: the [`crate::IQ4`] levels, an f16 scale per 32 weights.
    Iq4Nl,
    /// ggml Q4_1: 4-bit codes, an f16 scale and offset per 32 weights.
    Q4_1,
    /// ggml Q5_0: 5-bit codes minus 16, an f16 scale per 32 weights.
    Q5_0,
    /// ggml Q5_1: 5-bit codes, an f16 scale and offset per 32 weights.
    Q5_1,
    /// Unsigned 2-bit codes with an f32 scale and offset: `s * q + b`.
    Affine2,
    /// Unsigned 3-bit codes with an f32 scale and offset.
    Affine3,
    /// Unsigned 4-bit codes with an f32 scale and offset.
    Affine4,
    /// Unsigned 5-bit codes with an f32 scale and offset.
    Affine5,
    /// Unsigned 6-bit codes with an f32 scale and offset.
    Affine6,
    /// Unsigned bytes with an f32 scale and offset.
    Affine8,
    /// E4M3FN bytes, one f32 scale a group.
    Fp8E4m3F32,
}

impl Format {
    /// Every native format.
    pub const ALL: [Format; 33] = [
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
        Format::Int3U3,
        Format::Int2U2,
        Format::Q2K,
        Format::Q3K,
        Format::Q4K,
        Format::Q5K,
        Format::Q6K,
        Format::Iq4Xs,
        Format::Iq4Nl,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Affine2,
        Format::Affine3,
        Format::Affine4,
        Format::Affine5,
        Format::Affine6,
        Format::Affine8,
        Format::Fp8E4m3F32,
    ];

    /// The formats that weights can be quantized to, the first of [`Format::ALL`]. The others are stored as imported
    /// checkpoints have them.
    pub const ENCODABLE: [Format; 14] = *Self::ALL.first_chunk().expect("there are more formats");

    /// Short names accepted beside the formats' own.
    pub const ALIASES: [(&str, Format); 4] =
        [("fp4", Format::Fp4E2m1), ("int4", Format::Int4S4), ("int4_asym", Format::Int4U4), ("fp8", Format::Fp8E4m3)];

    /// Whether weights can be quantized to the format, see [`Format::ENCODABLE`].
    pub fn can_encode(self) -> bool {
        Format::ENCODABLE.contains(&self)
    }

    /// The name used in `config.json` and on the command line.
    pub const fn name(self) -> &'static str {
        self.definition().name
    }

    /// Every valid name and alias, comma separated, for messages.
    pub fn name_list() -> String {
        let names = Format::ALL.iter().map(|format| format.name());
        let aliases = Format::ALIASES.iter().map(|(alias, _)| *alias);
        names.chain(aliases).collect::<Vec<_>>().join(", ")
    }

    /// How codes lie in u32 words.
    pub const fn layout(self) -> Layout {
        self.definition().layout
    }

    /// Bits of one code: 2, 3, 4, 5, 6 or 8.
    pub const fn code_bits(self) -> u32 {
        self.layout().bits()
    }

    /// What codes stand for.
    pub const fn levels(self) -> Levels {
        self.definition().levels
    }

    /// The group size used when none is asked for.
    pub const fn default_group_size(self) -> usize {
        match self.definition().group_size {
            GroupSize::Fixed(size) | GroupSize::Default(size) => size,
        }
    }

    /// The only group size of the format, where there is just one.
    pub const fn fixed_group_size(self) -> Option<usize> {
        match self.definition().group_size {
            GroupSize::Fixed(size) => Some(size),
            GroupSize::Default(_) => None,
        }
    }

    /// Whether the format can store groups of `group_size` weights along K.
    ///
    /// NVFP4, MXFP4 and the formats of ggml fix it; the others need whole packing units. It may exceed K, which
    /// gives one group a column.
    ///
    /// # Errors
    /// [`FormatError::GroupSize`], which states the rule.
    pub fn check_group_size(self, group_size: usize) -> Result<(), FormatError> {
        let refuse = |rule| Err(FormatError::GroupSize { format: self, group_size, rule });
        if let Some(only) = self.fixed_group_size() {
            return if group_size == only { Ok(()) } else { refuse(format!("it must be {only}")) };
        }
        let unit = self.layout().codes_per_unit();
        if group_size == 0 || !group_size.is_multiple_of(unit) {
            return refuse(format!("it must be a positive multiple of {unit}"));
        }
        Ok(())
    }

    /// What each group stores beside its scale.
    pub const fn shift(self) -> Shift {
        self.definition().shift
    }

    /// Whether each group stores a zero point, subtracted before scaling.
    pub const fn has_zeros(self) -> bool {
        matches!(self.shift(), Shift::Zero)
    }

    /// Whether each group stores an offset (two-level: a minimum), added after scaling.
    pub const fn has_offsets(self) -> bool {
        matches!(self.shift(), Shift::Offset)
    }

    /// The stored type of a group's scale, and of its offset.
    pub const fn scale_kind(self) -> ScaleKind {
        self.definition().scale
    }

    /// The unscaled value of a code as stored; bits above [`Format::code_bits`] are ignored.
    ///
    /// `zero` is the group's zero point and matters only where [`Format::has_zeros`].
    #[inline]
    pub fn value(self, code: u8, zero: f32) -> f32 {
        let code = code & ((1u32 << self.code_bits()) - 1) as u8;
        let level = match self.levels() {
            Levels::E2m1 => fp4::decode(code),
            Levels::E4m3 => fp8::e4m3::decode(code),
            Levels::E5m2 => fp8::e5m2::decode(code),
            Levels::Signed8 => f32::from(code as i8),
            Levels::Minus { half } => f32::from(code) - half as f32 * 0.5,
            Levels::Table(levels) => levels[usize::from(code)],
        };
        if self.has_zeros() { level - zero } else { level }
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

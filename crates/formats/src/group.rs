//! The scale and zero of one group: how writers choose them and readers accept them.
//!
//! Writers compute the ideal scale in f32, round it to the stored type, and only then divide each
//! weight by the stored scale, so that reader and writer use the same multiplier.

use half::f16;

use crate::e8m0::{self, ScaleRule};
use crate::{Format, FormatError, Levels, ScaleKind, Shift, fp4, fp8, normal_float};

/// Scale and zero or offset of one group, as stored.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Group {
    /// f16 bits, or a byte zero-extended; 0 for f32 scales, which [`Group::scale`] holds as stored.
    pub scale_bits: u16,
    /// f16 bits of the zero point or offset, or the byte of the minimum; 0 when there is none, or where it is an f32.
    pub zero_bits: u16,
    /// The f32 multiplier of the group. For NVFP4 this is the E4M3 scale divided by the tensor
    /// scale. 0 marks a group of zeros.
    pub scale: f32,
    /// The zero point; 0 when the format has none.
    pub zero: f32,
    /// What is added to the product; 0 when the format has no offsets. A stored minimum is a negative offset.
    pub offset: f32,
}

impl Group {
    /// What a writer stores for a group without a nonzero weight, in every format.
    pub const ZERO: Group = Group { scale_bits: 0, zero_bits: 0, scale: 0.0, zero: 0.0, offset: 0.0 };

    /// A group without zero point whose positive ideal scale is rounded to f16.
    pub(crate) fn from_ideal_f16_scale(ideal: f32) -> Result<Group, FormatError> {
        let scale = round_scale(ideal)?;
        Ok(Group { scale_bits: scale.to_bits(), scale: scale.to_f32(), ..Group::ZERO })
    }
}

/// Largest scaled tensor magnitude of NVFP4: the E4M3 maximum times the E2M1 maximum.
const NVFP4_TENSOR_MAX: f32 = fp8::e4m3::MAX * fp4::MAX;

impl Format {
    /// The tensor scale a writer stores for a tensor whose largest magnitude is `amax_tensor`.
    ///
    /// `Some` only for NVFP4: `2688 / amax`, a divisor; 1 for a tensor of zeros, and at most
    /// `f32::MAX`.
    pub fn tensor_scale(self, amax_tensor: f32) -> Option<f32> {
        (self == Format::Nvfp4).then(|| match amax_tensor {
            0.0 => 1.0,
            amax => (NVFP4_TENSOR_MAX / amax).min(f32::MAX),
        })
    }

    /// Chooses the scale and zero of one group of weights.
    ///
    /// A scale that rounds to zero although a weight is not zero becomes the smallest positive
    /// value of the stored type. `tensor_scale` is required by NVFP4 and refused elsewhere.
    ///
    /// # Errors
    /// [`FormatError::NonFinite`] for a NaN or infinite weight, [`FormatError::ScaleOverflow`]
    /// when an f16 scale would be infinite, [`FormatError::ImportOnly`] for a format outside
    /// [`Format::ENCODABLE`], and the tensor scale errors.
    pub fn fit(self, group: &[f32], tensor_scale: Option<f32>) -> Result<Group, FormatError> {
        self.check_encodable()?;
        let divisor = self.check_tensor_scale(tensor_scale)?;
        let (min, max) = range_with_zero(group)?;
        let amax = max.max(-min);
        if amax == 0.0 {
            return Ok(Group::ZERO);
        }
        let scaled_max = match self {
            Format::Nvfp4 => {
                let byte = fp8::e4m3::encode(divisor * amax / fp4::MAX).max(1);
                return self.group_from_bits(u16::from(byte), 0, tensor_scale);
            }
            Format::Mxfp4 => {
                let byte = e8m0::scale_byte(amax, ScaleRule::Bump);
                return self.group_from_bits(u16::from(byte), 0, None);
            }
            Format::Int4U4 => return fit_asymmetric(min, max, 15.0),
            Format::Int8Asym => return fit_asymmetric(min, max, 255.0),
            Format::Fp4E2m1 => fp4::MAX,
            Format::Int4S4 => 7.0,
            Format::Int8 => 127.0,
            // E5M2 shares the E4M3 divisor: dividing by its own 57344 would push the f16 scale of ordinary
            // weights into coarse subnormals, and its exponent range has room to spare.
            Format::Fp8E4m3 | Format::Fp8E5m2 => fp8::e4m3::MAX,
            Format::Int3 => 3.5,
            Format::Int2 => 1.5,
            Format::Nf4 | Format::Nf3 | Format::Nf2 => 1.0,
            _ => return Err(FormatError::ImportOnly { format: self }),
        };
        Group::from_ideal_f16_scale(amax / scaled_max)
    }

    /// Reads the stored scale and zero, or offset, of a group. Formats without either ignore `zero_bits`.
    ///
    /// # Errors
    /// [`FormatError::InvalidScale`] for a NaN or infinite scale, an E8M0 byte of 255, a negative
    /// or NaN E4M3 byte, or bits above the byte; [`FormatError::InvalidZero`] for a non-finite
    /// zero or offset; [`FormatError::WideGroup`] for f32 and two-level scales, which 16 bits do not
    /// hold; the tensor scale errors.
    pub fn group_from_bits(
        self,
        scale_bits: u16,
        zero_bits: u16,
        tensor_scale: Option<f32>,
    ) -> Result<Group, FormatError> {
        let divisor = self.check_tensor_scale(tensor_scale)?;
        let kind = self.scale_kind();
        let invalid = || FormatError::InvalidScale { bits: scale_bits, kind: kind.name() };
        let byte = || u8::try_from(scale_bits).map_err(|_| invalid());
        let scale = match kind {
            ScaleKind::F16 => f16::from_bits(scale_bits).to_f32(),
            ScaleKind::E4m3 => match byte()? {
                code @ 0..0x80 => fp8::e4m3::decode(code) / divisor,
                _ => return Err(invalid()),
            },
            ScaleKind::E8m0 => e8m0::decode(byte()?)?,
            ScaleKind::F32 | ScaleKind::F16U8 | ScaleKind::F16I8 => {
                return Err(FormatError::WideGroup { format: self });
            }
        };
        if !scale.is_finite() {
            return Err(invalid());
        }
        let group = Group { scale_bits, scale, ..Group::ZERO };
        if self.shift() == Shift::None {
            return Ok(group);
        }
        let value = f16::from_bits(zero_bits).to_f32();
        if !value.is_finite() {
            return Err(FormatError::InvalidZero { bits: zero_bits });
        }
        Ok(match self.shift() {
            Shift::Offset => Group { zero_bits, offset: value, ..group },
            _ => Group { zero_bits, zero: value, ..group },
        })
    }

    /// The code of weight `w` (finite): one division by the stored scale, the format's rounding,
    /// then saturation. In a group of scale 0 every weight gets the code of +0.
    #[inline]
    pub fn code(self, w: f32, group: &Group) -> u8 {
        let w = if self.has_offsets() { w - group.offset } else { w };
        let t = if group.scale == 0.0 { 0.0 } else { w / group.scale };
        let last = ((1u32 << self.code_bits()) - 1) as f32;
        match self.levels() {
            Levels::E2m1 => fp4::encode(t),
            Levels::E4m3 => fp8::e4m3::encode(t),
            Levels::E5m2 => fp8::e5m2::encode(t),
            Levels::Signed8 => t.round_ties_even().clamp(-127.0, 127.0) as i8 as u8,
            Levels::Table(levels) => normal_float::encode(levels, t),
            Levels::Minus { half } if half % 2 != 0 => mid_rise_code(t, half as f32 * 0.5, last),
            Levels::Minus { half: 0 } => asymmetric_code(t, group.zero, last),
            Levels::Minus { half } => {
                let middle = half as f32 * 0.5;
                (t.round_ties_even().clamp(-middle, last - middle) + middle) as u8
            }
        }
    }

    /// The weight a code stands for: its value times the group's scale, in f32, plus the offset where there is one.
    #[inline]
    pub fn dequantize(self, code: u8, group: &Group) -> f32 {
        let product = self.value(code, group.zero) * group.scale;
        // An offset of 0 would turn -0 into 0.
        if self.has_offsets() { product + group.offset } else { product }
    }

    pub(crate) fn check_encodable(self) -> Result<(), FormatError> {
        if self.can_encode() { Ok(()) } else { Err(FormatError::ImportOnly { format: self }) }
    }

    /// The divisor of the group scales: the tensor scale for NVFP4, 1 for formats without one.
    pub(crate) fn check_tensor_scale(self, tensor_scale: Option<f32>) -> Result<f32, FormatError> {
        match (self, tensor_scale) {
            (Format::Nvfp4, None) => Err(FormatError::MissingTensorScale { format: self }),
            (Format::Nvfp4, Some(value)) if value.is_finite() && value > 0.0 => Ok(value),
            (Format::Nvfp4, Some(value)) => Err(FormatError::InvalidTensorScale { value }),
            (_, Some(value)) => Err(FormatError::UnexpectedTensorScale { format: self, value }),
            (_, None) => Ok(1.0),
        }
    }
}

/// Scale and zero of an unsigned grid `0..=levels` that holds `min <= 0 <= max`.
fn fit_asymmetric(min: f32, max: f32, levels: f32) -> Result<Group, FormatError> {
    let scale = round_scale((max - min) / levels)?;
    // Adding +0 turns the -0 of a group without negative weights into the stored +0.
    let zero = (-min / scale.to_f32()).round_ties_even().clamp(0.0, levels) + 0.0;
    let (scale_bits, zero_bits) = (scale.to_bits(), f16::from_f32(zero).to_bits());
    Ok(Group { scale_bits, zero_bits, scale: scale.to_f32(), zero, ..Group::ZERO })
}

/// `rint(t) + z` clamped to the grid. A fractional zero read from a file moves the rounding
/// points with it; for the integral zeros that writers store the formula is the plain one.
#[inline]
fn asymmetric_code(t: f32, zero: f32, levels: f32) -> u8 {
    let whole = zero.floor();
    ((t + (zero - whole)).round_ties_even() + whole).clamp(0.0, levels) as u8
}

/// Ties go up, so 0 and -0 give the code just above the middle of the grid.
#[inline]
fn mid_rise_code(t: f32, half: f32, levels: f32) -> u8 {
    (t + half + 0.5).floor().clamp(0.0, levels) as u8
}

/// Rounds a positive ideal scale to f16, never to zero.
fn round_scale(ideal: f32) -> Result<f16, FormatError> {
    let scale = f16::from_f32(ideal);
    match scale.to_bits() {
        0 => Ok(f16::from_bits(1)),
        _ if scale.is_finite() => Ok(scale),
        _ => Err(FormatError::ScaleOverflow { ideal }),
    }
}

/// Smallest and largest of the weights and 0.
fn range_with_zero(group: &[f32]) -> Result<(f32, f32), FormatError> {
    let (mut min, mut max) = (0.0f32, 0.0f32);
    for (index, &value) in group.iter().enumerate() {
        if !value.is_finite() {
            return Err(FormatError::NonFinite { index, value });
        }
        min = if value < min { value } else { min };
        max = if value > max { value } else { max };
    }
    Ok((min, max))
}

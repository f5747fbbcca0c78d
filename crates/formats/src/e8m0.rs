//! E8M0, the power-of-two block scale of OCP Microscaling: byte `e` is `2^(e-127)`, 255 is NaN.

use crate::FormatError;

/// How the exponent of an MXFP4 block is chosen from its largest magnitude.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ScaleRule {
    /// `floor(log2 amax) - 2`, plus one when the mantissa of amax is at least 1.75, so that no
    /// scaled value reaches 7.
    #[default]
    Bump,
    /// `floor(log2 amax) - 2` as the OCP document has it; values in (6, 8) saturate to 6.
    OcpFloor,
}

/// The value of a scale byte.
///
/// # Errors
/// [`FormatError::InvalidScale`] for 255, the NaN byte.
#[inline]
pub fn decode(byte: u8) -> Result<f32, FormatError> {
    match byte {
        255 => Err(FormatError::InvalidScale { bits: 255, kind: "E8M0" }),
        // 2^-127 is an f32 subnormal, which the exponent field cannot express.
        0 => Ok(f32::from_bits(0x0040_0000)),
        e => Ok(f32::from_bits(u32::from(e) << 23)),
    }
}

/// The scale byte for a block of E2M1 codes whose largest magnitude is `amax` (finite, >= 0).
///
/// A zero block gives byte 0. The exponent is clamped to [-127, 127].
pub fn scale_byte(amax: f32, rule: ScaleRule) -> u8 {
    let bits = amax.to_bits();
    let exponent = (bits >> 23) as i32 & 0xFF;
    let bump = rule == ScaleRule::Bump && bits & 0x007F_FFFF >= 0x0060_0000;
    // Zero and f32 subnormals have exponent 0 and end at the lower clamp; the upper is out of reach.
    (exponent - 2 + i32::from(bump)).max(0) as u8
}

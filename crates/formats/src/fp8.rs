//! Eight-bit floats: E4M3FN and E5M2 (OCP 8-bit Floating Point Specification).
//!
//! Both encoders round to nearest, ties to even, and then saturate: a finite or infinite input
//! never becomes an infinity or a NaN. NaN becomes 0x7F.

/// Rounds `a >= 0` to a float with `mantissa` stored bits, minimum exponent `1 - bias`.
///
/// Returns the unsaturated code: the exponent continues past the format's last one.
#[inline]
fn round_magnitude(a: f32, mantissa: u32, bias: u32) -> u32 {
    let drop = 23 - mantissa;
    let min_normal = f32::from_bits((128 - bias) << 23);
    if a < min_normal {
        // One ulp of this power of two is the subnormal step, so the f32 add does the rounding.
        let magic = f32::from_bits((128 - bias + drop) << 23);
        return (a + magic).to_bits() - magic.to_bits();
    }
    let bits = a.to_bits();
    let rounded = bits + ((1 << (drop - 1)) - 1) + ((bits >> drop) & 1);
    (rounded >> drop) - ((127 - bias) << mantissa)
}

#[inline]
fn encode(t: f32, mantissa: u32, bias: u32, max: u32) -> u8 {
    if t.is_nan() {
        return 0x7F;
    }
    let magnitude = round_magnitude(t.abs(), mantissa, bias).min(max);
    magnitude as u8 | ((t.to_bits() >> 24) as u8 & 0x80)
}

/// E4M3FN: `s eeee mmm`, bias 7, no infinities, NaN only at 0x7F and 0xFF.
pub mod e4m3 {
    /// Largest finite value, code 0x7E.
    pub const MAX: f32 = 448.0;

    /// The nearest code, ties to even, saturated to +-448; NaN gives 0x7F.
    #[inline]
    pub fn encode(t: f32) -> u8 {
        super::encode(t, 3, 7, 0x7E)
    }

    /// The value of a code; 0x7F and 0xFF are NaN.
    #[inline]
    pub fn decode(code: u8) -> f32 {
        let (exponent, mantissa) = (u32::from(code >> 3) & 15, u32::from(code) & 7);
        let magnitude = match (exponent, mantissa) {
            (15, 7) => f32::NAN,
            (0, m) => m as f32 * (1.0 / 512.0),
            (e, m) => f32::from_bits(((e + 120) << 23) | (m << 20)),
        };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    }
}

/// E5M2: `s eeeee mm`, bias 15, the upper byte of an f16.
pub mod e5m2 {
    /// Largest finite value, code 0x7B.
    pub const MAX: f32 = 57344.0;

    /// The nearest code, ties to even, saturated to +-57344; NaN gives 0x7F.
    #[inline]
    pub fn encode(t: f32) -> u8 {
        super::encode(t, 2, 15, 0x7B)
    }

    /// The value of a code; 0x7C and 0xFC are infinities, the three codes above each are NaN.
    #[inline]
    pub fn decode(code: u8) -> f32 {
        let (exponent, mantissa) = (u32::from(code >> 2) & 31, u32::from(code) & 3);
        let magnitude = match (exponent, mantissa) {
            (31, 0) => f32::INFINITY,
            (31, _) => f32::NAN,
            (0, m) => m as f32 * (1.0 / 65536.0),
            (e, m) => f32::from_bits(((e + 112) << 23) | (m << 21)),
        };
        if code & 0x80 == 0 { magnitude } else { -magnitude }
    }
}

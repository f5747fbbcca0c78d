//! One correct rounding from f64 to a stored float.

use marlin_formats::DType;

/// `value` rounded once to `dtype`, to nearest even; an F32 tensor of the oracle keeps the f64 value.
///
/// NaN becomes quiet and keeps its sign and the payload bits that fit.
pub fn round_to(dtype: DType, value: f64) -> f64 {
    match dtype {
        DType::F16 => round(value, 10, -14, 65504.0),
        DType::BF16 => round(value, 7, -126, f64::from(half::bf16::MAX.to_f32())),
        _ => value,
    }
}

/// Rounds to `mantissa` stored bits with smallest normal exponent `min_exponent`; beyond `max` is infinity.
fn round(value: f64, mantissa: i32, min_exponent: i32, max: f64) -> f64 {
    if value.is_nan() {
        let kept = !0 << (52 - mantissa);
        return f64::from_bits(value.to_bits() & kept | 1 << 51);
    }
    if value == 0.0 || value.is_infinite() {
        return value;
    }
    // The exponent field of a normal f64; an f64 subnormal is far below every quantum.
    let exponent = ((value.to_bits() >> 52) & 0x7FF) as i32 - 1023;
    let quantum = 2f64.powi(exponent.max(min_exponent) - mantissa);
    let rounded = (value / quantum).round_ties_even() * quantum;
    if rounded.abs() > max { f64::INFINITY.copysign(value) } else { rounded }
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn every_stored_value_is_kept() {
        for bits in 0..=u16::MAX {
            let value = f16::from_bits(bits).to_f64();
            assert_eq!(round_to(DType::F16, value).to_bits(), value.to_bits());
            let value = f64::from(bf16::from_bits(bits).to_f32());
            assert_eq!(round_to(DType::BF16, value).to_bits(), value.to_bits());
        }
    }

    #[test]
    fn midpoints_go_to_even_and_nothing_is_rounded_twice() {
        for bits in 0..0x7BFFu16 {
            let (low, high) = (f16::from_bits(bits).to_f64(), f16::from_bits(bits + 1).to_f64());
            let middle = (low + high) / 2.0;
            let even = if bits % 2 == 0 { low } else { high };
            assert_eq!(round_to(DType::F16, middle), even);
            // Rounding to f32 first would make these the midpoint.
            assert_eq!(round_to(DType::F16, middle.next_down()), low);
            assert_eq!(round_to(DType::F16, middle.next_up()), high);
        }
    }

    #[test]
    fn limits() {
        assert_eq!(round_to(DType::F16, 65519.99), 65504.0);
        assert_eq!(round_to(DType::F16, 65520.0), f64::INFINITY);
        assert_eq!(round_to(DType::F16, -65520.0), f64::NEG_INFINITY);
        assert_eq!(round_to(DType::F16, 2f64.powi(-25)), 0.0);
        assert_eq!(round_to(DType::F16, 2f64.powi(-25) * 1.0001), 2f64.powi(-24));
        assert_eq!(round_to(DType::BF16, f64::from(f32::MAX)), f64::INFINITY);
        assert_eq!(round_to(DType::BF16, -f64::INFINITY), -f64::INFINITY);
        assert!(round_to(DType::BF16, -0.0).is_sign_negative());
        assert_eq!(round_to(DType::F32, 0.1), 0.1);
        assert!(round_to(DType::BF16, f64::NAN).is_nan());
    }
}

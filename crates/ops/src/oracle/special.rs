//! Functions of one value in f64.

use std::f64::consts::{FRAC_2_SQRT_PI, PI, SQRT_2};

use crate::linear::Activation;

/// The pointwise functions of [`Activation`], without cancellation in their tails.
pub(super) fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::None => x,
        Activation::Relu => relu(x),
        Activation::Relu2 => relu(x) * relu(x),
        Activation::Silu => x_sigmoid(x, x),
        Activation::GeluErf => {
            if x == f64::NEG_INFINITY {
                -0.0
            } else {
                x * erfc(-x / SQRT_2) / 2.0
            }
        }
        // (1 + tanh u) / 2 = 1 / (1 + e^-2u)
        Activation::GeluTanh => x_sigmoid(x, 2.0 * 0.7978845608028654 * (x + 0.044715 * x * x * x)),
        Activation::GeluQuick => x_sigmoid(x, 1.702 * x),
        Activation::Sigmoid => sigmoid(x),
    }
}

/// max(x, 0); NaN stays NaN, unlike `f64::max`.
fn relu(x: f64) -> f64 {
    if x < 0.0 { 0.0 } else { x }
}

/// 1 / (1 + e^-x).
pub(super) fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// x / (1 + e^-t), with the limit -0 at x = -inf.
fn x_sigmoid(x: f64, t: f64) -> f64 {
    if x == f64::NEG_INFINITY {
        return -0.0;
    }
    x / (1.0 + (-t).exp())
}

/// The complementary error function, to about 1e-15 of its value.
fn erfc(x: f64) -> f64 {
    if x.is_nan() {
        x
    } else if x > 2.5 {
        erfc_continued_fraction(x)
    } else if x >= -2.5 {
        1.0 - erf_series(x)
    } else {
        2.0 - erfc_continued_fraction(-x)
    }
}

/// `erf x = 2/sqrt(pi) e^(-x^2) sum_n 2^n x^(2n+1) / (2n+1)!!`, all terms of one sign.
fn erf_series(x: f64) -> f64 {
    let (mut term, mut sum, mut n) = (x, 0.0, 0.0);
    while sum + term != sum {
        sum += term;
        n += 1.0;
        term *= 2.0 * x * x / (2.0 * n + 1.0);
    }
    FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

/// `erfc x = e^(-x^2) / sqrt(pi) / (x + (1/2)/(x + (2/2)/(x + (3/2)/(x + ...))))` for x > 2.
fn erfc_continued_fraction(x: f64) -> f64 {
    let tail = (1..=200).rev().fold(x, |tail, n| x + f64::from(n) / 2.0 / tail);
    (-x * x).exp() / PI.sqrt() / tail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erfc_known_values() {
        // Abramowitz and Stegun, tables 7.1 and 7.3 and the DLMF.
        for (x, expected) in [
            (0.0, 1.0),
            (0.5, 0.479_500_122_186_953_5),
            (1.0, 0.157_299_207_050_285_13),
            (2.0, 4.677_734_981_047_266e-3),
            (3.0, 2.209_049_699_858_544e-5),
            (5.0, 1.537_459_794_428_035e-12),
            (-1.0, 1.842_700_792_949_715),
            (-3.0, 1.999_977_909_503_001_4),
        ] {
            assert!((erfc(x) / expected - 1.0).abs() < 1e-13, "erfc({x}) = {}", erfc(x));
        }
        assert!((erfc(2.4999999999) / erfc(2.5000000001) - 1.0).abs() < 1e-8);
        assert_eq!(erfc(f64::INFINITY), 0.0);
        assert_eq!(erfc(f64::NEG_INFINITY), 2.0);
    }

    #[test]
    fn epilogue_values() {
        let close = |a, x: f64, y: f64| {
            assert!((activate(a, x) - y).abs() < 1e-12, "{a:?}({x}) = {}", activate(a, x));
        };
        close(Activation::Relu, -1.5, 0.0);
        close(Activation::Relu2, 1.5, 2.25);
        close(Activation::Silu, 1.0, 0.731_058_578_630_004_9);
        close(Activation::GeluErf, 1.0, 0.841_344_746_068_542_9);
        close(Activation::GeluErf, -1.0, -0.158_655_253_931_457_05);
        let u = 0.7978845608028654 * (1.0 + 0.044715);
        close(Activation::GeluTanh, 1.0, 0.5 * (1.0 + f64::tanh(u)));
        close(Activation::GeluQuick, 1.0, 1.0 / (1.0 + (-1.702f64).exp()));
        close(Activation::Sigmoid, 0.0, 0.5);
        // operations.md epilogue_apply: the quick form is up to 2.0e-2 from erf, the tanh form 4.7e-4.
        let largest = |a: Activation| {
            (-8000..8000)
                .map(|i| f64::from(i) / 1000.0)
                .map(|x| (activate(a, x) - activate(Activation::GeluErf, x)).abs())
                .fold(0.0, f64::max)
        };
        assert!((largest(Activation::GeluQuick) - 2.0e-2).abs() < 5e-4);
        assert!((largest(Activation::GeluTanh) - 4.7e-4).abs() < 1e-5);
    }

    #[test]
    fn infinities_and_nan() {
        use Activation::*;
        for a in [None, Relu, Relu2, Silu, GeluErf, GeluTanh, GeluQuick, Sigmoid] {
            assert!(activate(a, f64::NAN).is_nan(), "{a:?}");
            let top = if a == Sigmoid { 1.0 } else { f64::INFINITY };
            assert_eq!(activate(a, f64::INFINITY), top, "{a:?}");
            let bottom = if a == None { f64::NEG_INFINITY } else { 0.0 };
            assert_eq!(activate(a, f64::NEG_INFINITY), bottom, "{a:?}");
        }
        assert!(activate(Silu, -1e4).is_sign_negative());
    }
}

//! Bias, activation and scale on the sums of a tile.

use marlin_ops::linear::Activation;

use crate::simd::math::exp;
use crate::simd::{Kernel, LANES, Line, Simd};

/// `line = act(line + bias) * scale`.
pub(crate) struct Finish<'a> {
    pub(crate) bias: [f32; LANES],
    pub(crate) activation: Activation,
    pub(crate) scale: f32,
    pub(crate) lines: &'a mut [Line<f32>],
}

impl Kernel for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (bias, scale) = (s.load(&self.bias), s.splat(self.scale));
        for line in self.lines {
            let v = activate(s, self.activation, s.add(s.load(&line.0), bias));
            s.store(s.mul(v, scale), &mut line.0);
        }
    }
}

/// `values[n] = act(values[n] + bias[n]) * scale`.
pub(crate) struct ApplyRow<'a> {
    pub(crate) values: &'a mut [f32],
    pub(crate) bias: Option<&'a [f32]>,
    pub(crate) activation: Activation,
    pub(crate) scale: f32,
}

impl Kernel for ApplyRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for (i, values) in self.values.chunks_mut(LANES).enumerate() {
            let (mut lanes, mut bias) = ([0.0; LANES], [0.0; LANES]);
            lanes[..values.len()].copy_from_slice(values);
            let mut v = s.load(&lanes);
            if let Some(all) = self.bias {
                bias[..values.len()].copy_from_slice(&all[i * LANES..][..values.len()]);
                v = s.add(v, s.load(&bias));
            }
            s.store(s.mul(activate(s, self.activation, v), s.splat(self.scale)), &mut lanes);
            values.copy_from_slice(&lanes[..values.len()]);
        }
    }
}

/// `gate = act(gate + gate bias) * (up + up bias)`.
pub(crate) struct Combine<'a> {
    pub(crate) gate_bias: [f32; LANES],
    pub(crate) up_bias: [f32; LANES],
    pub(crate) activation: Activation,
    pub(crate) gate: &'a mut [Line<f32>],
    pub(crate) up: &'a [Line<f32>],
}

impl Kernel for Combine<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (gate_bias, up_bias) = (s.load(&self.gate_bias), s.load(&self.up_bias));
        for (gate, up) in self.gate.iter_mut().zip(self.up) {
            let g = activate(s, self.activation, s.add(s.load(&gate.0), gate_bias));
            s.store(s.mul(g, s.add(s.load(&up.0), up_bias)), &mut gate.0);
        }
    }
}

#[inline(always)]
fn activate<S: Simd>(s: S, activation: Activation, x: S::F) -> S::F {
    match activation {
        Activation::None => x,
        Activation::Relu => s.max(s.splat(0.0), x),
        Activation::Relu2 => {
            let x = s.max(s.splat(0.0), x);
            s.mul(x, x)
        }
        // -inf is taken as the largest negative value, whose quotient by +inf is -0.
        Activation::Silu => s.div(s.max(s.splat(f32::MIN), x), one_plus_exp(s, x)),
        Activation::Sigmoid => s.div(s.splat(1.0), one_plus_exp(s, x)),
        Activation::GeluErf => scalar(s, x, gelu_erf),
        Activation::GeluTanh => scalar(s, x, gelu_tanh),
        Activation::GeluQuick => scalar(s, x, gelu_quick),
    }
}

/// `1 + e^-x`.
#[inline(always)]
fn one_plus_exp<S: Simd>(s: S, x: S::F) -> S::F {
    s.add(s.splat(1.0), exp(s, s.sub(s.splat(0.0), x)))
}

#[inline(always)]
fn scalar<S: Simd>(s: S, x: S::F, f: fn(f64) -> f64) -> S::F {
    let mut lanes = [0.0f32; LANES];
    s.store(x, &mut lanes);
    for lane in &mut lanes {
        *lane = f(f64::from(*lane)) as f32;
    }
    s.load(&lanes)
}

/// `x (1 + erf(x / sqrt 2)) / 2`, through erfc so that the negative tail keeps its relative accuracy.
fn gelu_erf(x: f64) -> f64 {
    match x {
        f64::NEG_INFINITY => -0.0,
        _ => x * 0.5 * erfc(-x * std::f64::consts::FRAC_1_SQRT_2),
    }
}

/// `x (1 + tanh(t)) / 2 = x / (1 + e^(-2t))`, `t = 0.7978845608028654 (x + 0.044715 x^3)`.
fn gelu_tanh(x: f64) -> f64 {
    match x {
        f64::NEG_INFINITY => -0.0,
        _ => x / (1.0 + (-2.0 * 0.797_884_560_802_865_4 * (x + 0.044715 * x * x * x)).exp()),
    }
}

/// `x / (1 + e^(-1.702 x))`; the product in f32 would cost the exponential its last digits.
fn gelu_quick(x: f64) -> f64 {
    match x {
        f64::NEG_INFINITY => -0.0,
        _ => x / (1.0 + (-1.702 * x).exp()),
    }
}

/// Complementary error function, relative error near 1e-13: the Maclaurin series of erf near 0, else the continued
/// fraction of the incomplete gamma function evaluated from its tail.
fn erfc(x: f64) -> f64 {
    if x.is_nan() {
        return x;
    }
    let a = x.abs();
    if a < 2.0 {
        let (mut term, mut sum) = (a, a);
        for n in 1..60 {
            let n = f64::from(n);
            term *= -a * a / n;
            sum += term / (2.0 * n + 1.0);
        }
        let erf = sum * std::f64::consts::FRAC_2_SQRT_PI;
        return if x < 0.0 { 1.0 + erf } else { 1.0 - erf };
    }
    // erfc(a) = exp(-a^2) / sqrt(pi) * 1 / (a + (1/2) / (a + 1 / (a + (3/2) / (a + ...)))).
    let tail = (1..=120).rev().fold(a, |tail, n| a + 0.5 * f64::from(n) / tail);
    let erfc = (-a * a).exp() * 0.5 * std::f64::consts::FRAC_2_SQRT_PI / tail;
    if x < 0.0 { 2.0 - erfc } else { erfc }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn erfc_known_values() {
        // Abramowitz & Stegun table 7.1 and 50-digit evaluations.
        for (x, expected) in [
            (0.0, 1.0),
            (0.5, 0.479_500_122_186_953_5),
            (1.0, 0.157_299_207_050_285_13),
            (1.9, 0.007_209_570_764_742_524),
            (2.0, 0.004_677_734_981_047_266),
            (3.0, 2.209_049_699_858_544e-5),
            (5.0, 1.537_459_794_428_035e-12),
            (-1.0, 1.842_700_792_949_715),
            (-3.0, 1.999_977_909_503_001_4),
        ] {
            let relative = erfc(x) / expected - 1.0;
            assert!(relative.abs() < 1e-12, "erfc({x}) off by {relative:e}");
        }
    }
}

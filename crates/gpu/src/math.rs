//! Functions that devices offer only roughly: Vulkan allows several ulps and more for exp.

use cubecl::prelude::*;
use marlin_ops::linear::Activation;

/// e^x within 1.5 ulp: x = n ln 2 + r with ln 2 in two parts, a polynomial of degree 6 in r (Cephes, expf), 2^n in two
/// steps so that subnormal results round once.
#[cube]
pub(crate) fn exp(x: f32) -> f32 {
    let n = f32::floor(x * 1.442_695_04f32 + 0.5f32);
    let r = (x - n * 0.693_359_375f32) - n * -2.121_944_4e-4f32;
    let mut p = f32::new(1.987_569_1e-4);
    p = p * r + 1.398_199_9e-3f32;
    p = p * r + 8.333_452e-3f32;
    p = p * r + 4.166_579_5e-2f32;
    p = p * r + 1.666_666_5e-1f32;
    p = p * r + 0.5f32;
    let y = p * r * r + r + 1.0f32;
    // Beyond these bounds the result is 0 or infinite whatever n is; a NaN passes through y.
    let bounded = clamp_to(n, -200.0f32, 200.0f32);
    let half = f32::floor(bounded * 0.5f32);
    let result = y * power_of_two(half) * power_of_two(bounded - half);
    let result = select(x > 88.722_84f32, f32::INFINITY, result);
    select(x < -104.0f32, f32::new(0.0), result)
}

/// 2^n for an integer n in [-126, 127].
#[cube]
fn power_of_two(n: f32) -> f32 {
    f32::reinterpret(u32::cast_from(i32::cast_from(n) + 127i32) << 23u32)
}

#[cube]
fn clamp_to(x: f32, low: f32, high: f32) -> f32 {
    let x = select(x < low, low, x);
    select(x > high, high, x)
}

/// The pointwise function of an epilogue or a gated product.
#[cube]
pub(crate) fn activate(x: f32, #[comptime] activation: Activation) -> f32 {
    match comptime!(activation) {
        Activation::None => x,
        Activation::Relu => select(x > 0.0f32 || x != x, x, f32::new(0.0)),
        Activation::Relu2 => select(x > 0.0f32 || x != x, x * x, f32::new(0.0)),
        Activation::Silu => x / (1.0f32 + exp(-x)),
        Activation::GeluErf => 0.5f32 * x * (1.0f32 + erf(x * 0.707_106_77f32)),
        Activation::GeluTanh => {
            let inner = 0.797_884_6f32 * (x + 0.044_715f32 * x * x * x);
            // (1 + tanh u) / 2 = 1 / (1 + e^-2u)
            x / (1.0f32 + exp(-2.0f32 * inner))
        }
        Activation::GeluQuick => x / (1.0f32 + exp(-1.702f32 * x)),
        Activation::Sigmoid => 1.0f32 / (1.0f32 + exp(-x)),
    }
}

/// erf: placeholder until the linear family brings its own.
#[cube]
fn erf(x: f32) -> f32 {
    f32::erf(x)
}

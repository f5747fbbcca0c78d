//! Functions that devices offer only roughly: Vulkan allows several ulps and more for exp.

use cubecl::prelude::*;
use marlin_ops::linear::Activation;

/// e^x within 1.5 ulp: x = n ln 2 + r with ln 2 in two parts, a polynomial of degree 6 in r (Cephes, expf), 2^n in two
/// steps so that subnormal results round once.
#[cube]
pub(crate) fn exp(x: f32) -> f32 {
    let n = f32::floor(x * core::f32::consts::LOG2_E + 0.5f32);
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

/// e^(high + low) for a low part below 1/4. Factors, because a compiler that may reorder sums adds the parts first, which
/// loses what the low one is for (Mesa does).
#[cube]
pub(crate) fn exp_of_sum(high: f32, low: f32) -> f32 {
    let mut p = low * 8.333_333e-3f32 + 4.166_666_7e-2f32;
    p = p * low + 1.666_666_7e-1f32;
    p = p * low + 0.5f32;
    p = p * low + 1.0f32;
    exp(high) * (p * low + 1.0f32)
}

/// ln x for a normal x > 0, within about 1 ulp also next to x = 1: x = m 2^e with m in [sqrt 1/2, sqrt 2), a polynomial of
/// degree 8 in m - 1 (Cephes, logf), ln 2 in two parts.
#[cube]
pub(crate) fn ln(x: f32) -> f32 {
    let bits = u32::reinterpret(x);
    let fraction = f32::reinterpret((bits & 0x007f_ffffu32) | 0x3f00_0000u32);
    let low = fraction < core::f32::consts::FRAC_1_SQRT_2;
    let exponent = f32::cast_from(bits >> 23u32) - select(low, f32::new(127.0), f32::new(126.0));
    let m = select(low, fraction + fraction, fraction) - 1.0f32;
    let square = m * m;
    let mut p = f32::new(7.037_683_6e-2);
    p = p * m - 1.151_461_03e-1f32;
    p = p * m + 1.167_699_87e-1f32;
    p = p * m - 1.242_014_08e-1f32;
    p = p * m + 1.424_932_28e-1f32;
    p = p * m - 1.666_805_77e-1f32;
    p = p * m + 2.000_071_48e-1f32;
    p = p * m - 2.499_999_4e-1f32;
    p = p * m + 3.333_333_1e-1f32;
    let rest = p * m * square + exponent * -2.121_944_4e-4f32 - 0.5f32 * square;
    m + rest + exponent * 0.693_359_375f32
}

/// -ln(1 - u) for u in [0, 1/2]: the error of 1 - u is taken back by the factor u / (1 - (1 - u)).
#[cube]
pub(crate) fn ln_1p_negative(u: f32) -> f32 {
    let rest = 1.0f32 - u;
    let lost = 1.0f32 - rest;
    let series = u + u * u * (0.5f32 + u * 0.333_333_34f32);
    let quotient = -ln(rest) * (u / select(lost == 0.0f32, f32::new(1.0), lost));
    select(u < 2.441_406_3e-4f32, series, quotient)
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
        Activation::Relu => select(!(x <= 0.0f32), x, f32::new(0.0)),
        Activation::Relu2 => select(!(x <= 0.0f32), x * x, f32::new(0.0)),
        Activation::Silu => x_sigmoid(x, x, f32::new(0.0)),
        Activation::GeluErf => gelu_erf(x),
        Activation::GeluTanh => gelu_tanh(x),
        Activation::GeluQuick => gelu_quick(x),
        Activation::Sigmoid => 1.0f32 / (1.0f32 + exp(-x)),
    }
}

/// `x / (1 + e^-(high + low))`, with the limit -0 at x = -inf.
#[cube]
fn x_sigmoid(x: f32, high: f32, low: f32) -> f32 {
    let y = x / (1.0f32 + exp_of_sum(-high, -low));
    select(x == f32::NEG_INFINITY, f32::new(-0.0), y)
}

/// The value without the lower 12 bits of its significand: products of two such values are exact.
#[cube]
fn upper_half(x: f32) -> f32 {
    f32::reinterpret(u32::reinterpret(x) & 0xffff_f000u32)
}

/// x Phi(x), within about 3e-7 of its value also where Phi vanishes. Near 0 Phi is 1/2 and an odd polynomial; beyond,
/// the tail is e^(-x^2/2) R(|x|) with x^2 in two parts, R (t = |x| + 4) fitted in (t - 8) / t.
#[cube]
fn gelu_erf(x: f32) -> f32 {
    let size = f32::abs(x);
    let size = select(size > 20.0f32, f32::new(20.0), size);
    let high = upper_half(size);
    let low = (size - high) * (size + high);
    let t = size + 4.0f32;
    let lost = (t - 4.0f32) - size;
    let s = (t - 8.0f32) / t;
    let mut p = f32::new(-1.913_787_6e-4);
    p = p * s + 1.310_066_1e-4f32;
    p = p * s + 1.613_205_3e-3f32;
    p = p * s - 3.478_486e-3f32;
    p = p * s - 7.536_722e-3f32;
    p = p * s + 6.039_631_7e-2f32;
    p = p * s - 1.865_221_4e-1f32;
    p = p * s + 3.871_374_1e-1f32;
    p = p * s - 6.078_966e-1f32;
    p = p * s + 7.552_851_4e-1f32;
    let mut r = p / t;
    // R' = |x| R - 1 / sqrt(2 pi), for what the sum t has lost.
    r -= lost * (size * r - 0.398_942_3f32);
    let tail = exp_of_sum(high * high * -0.5f32, low * -0.5f32) * r;
    let y = x * x;
    let mut odd = f32::new(-8.360_251e-6);
    odd = odd * y + 1.147_424_4e-4f32;
    odd = odd * y - 1.187_122_2e-3f32;
    odd = odd * y + 9.973_529e-3f32;
    odd = odd * y - 6.649_038e-2f32;
    odd = odd * y + 3.989_423e-1f32;
    let beyond = select(x < 0.0f32, tail, 1.0f32 - tail);
    let phi = select(size < 0.75f32, 0.5f32 + x * odd, beyond);
    select(x < -20.0f32, f32::new(-0.0), x * phi)
}

/// `x / (1 + e^(-1.702 x))`, the product in two parts: its error is relative to the result.
#[cube]
fn gelu_quick(x: f32) -> f32 {
    // Beyond, e^(1.702 x) is 0 or infinite.
    let size = clamp_to(x, -128.0f32, 128.0f32);
    let high = upper_half(size);
    // 1.702 in two parts.
    x_sigmoid(x, 1.701_660_2f32 * high, 1.701_660_2f32 * (size - high) + 3.398_438e-4f32 * size)
}

/// `x / (1 + e^-t)`, `t = 1.5957691216 x (1 + 0.044715 x^2)` in two parts: an error of t is relative to the result.
#[cube]
fn gelu_tanh(x: f32) -> f32 {
    // Beyond, t is above 100: e^-t is 0 beside 1, e^t infinite.
    let size = clamp_to(x, -12.0f32, 12.0f32);
    let high = upper_half(size);
    let low = size - high;
    let square = high * high;
    let square_low = low * (size + high);
    let square_high = upper_half(square);
    // 0.044715 in two parts.
    let cubic = 0.044_708_252f32 * square_high;
    let cubic_low = 0.044_708_252f32 * (square - square_high) + 6.748_047e-6f32 * square + 0.044_715f32 * square_low;
    let factor = 1.0f32 + cubic;
    let back = factor - 1.0f32;
    let factor_low = ((1.0f32 - (factor - back)) + (cubic - back)) + cubic_low;
    // 1.5957691216 in two parts.
    let linear = 1.595_703_1f32 * high;
    let linear_low = 1.595_703_1f32 * low + 6.599_66e-5f32 * size;
    let (linear_high, factor_high) = (upper_half(linear), upper_half(factor));
    let t = linear_high * factor_high;
    let t_low = linear_high * (factor - factor_high)
        + (linear - linear_high) * factor
        + linear_low * (factor + factor_low)
        + linear * factor_low;
    x_sigmoid(x, t, t_low)
}

//! What happens to the sum of a product before it is stored.

use cubecl::prelude::*;
use marlin_ops::linear::Activation;

use crate::element::{Storage, load, store, widen};
use crate::math::activate;

/// What an epilogue is compiled for; the rest are [`flags`].
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) struct Epilogue {
    pub(super) activation: Activation,
    /// The activation's value is multiplied by a second product.
    pub(super) gated: bool,
    /// The previous contents of `out` are added last.
    pub(super) in_place: bool,
    pub(super) residual: Storage,
    pub(super) out: Storage,
}

/// Bits of the run-time operand `flags`.
pub(super) mod flags {
    /// `bias` is added to the product.
    pub(in crate::linear) const BIAS: u32 = 1;
    /// `up_bias` is added to the second product.
    pub(in crate::linear) const UP_BIAS: u32 = 2;
    /// `residual` is added last.
    pub(in crate::linear) const ADD: u32 = 4;
    /// The result is multiplied by `residual`.
    pub(in crate::linear) const MULTIPLY: u32 = 8;
}

/// Stores `out[at] = act(sum + bias[n]) * (up + up_bias[n]) * out_scale + residual[at]`; what is absent is left out.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn finish<H: Numeric, O: Numeric>(
    sum: f32,
    up: f32,
    bias: &[f32],
    up_bias: &[f32],
    residual: &[H],
    out: &mut [O],
    at: usize,
    n: usize,
    flags: u32,
    out_scale: f32,
    #[comptime] e: Epilogue,
) {
    let mut add = f32::new(0.0);
    let mut up_add = f32::new(0.0);
    let mut other = f32::new(0.0);
    let mut previous = f32::new(0.0);
    if (flags & flags::BIAS) != 0u32 {
        add = bias[n];
    }
    if (flags & flags::UP_BIAS) != 0u32 {
        up_add = up_bias[n];
    }
    if (flags & (flags::ADD | flags::MULTIPLY)) != 0u32 {
        other = load::<H>(residual, at, e.residual);
    }
    if comptime!(e.in_place) {
        previous = widen::<O>(out[at], e.out);
    }
    store::<O>(out, at, result(sum, up, add, up_add, other, previous, flags, out_scale, e), e.out);
}

/// What [`finish`] stores; values that are absent are not read.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn result(
    sum: f32,
    up: f32,
    bias: f32,
    up_bias: f32,
    residual: f32,
    previous: f32,
    flags: u32,
    out_scale: f32,
    #[comptime] e: Epilogue,
) -> f32 {
    let mut value = sum;
    if (flags & flags::BIAS) != 0u32 {
        value += bias;
    }
    value = activate(value, e.activation);
    if comptime!(e.gated) {
        let mut factor = up;
        if (flags & flags::UP_BIAS) != 0u32 {
            factor += up_bias;
        }
        value *= factor;
    }
    value *= out_scale;
    if (flags & flags::ADD) != 0u32 {
        value += residual;
    }
    if comptime!(e.in_place) {
        value += previous;
    }
    if (flags & flags::MULTIPLY) != 0u32 {
        value *= residual;
    }
    value
}

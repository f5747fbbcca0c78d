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
    let mut value = sum;
    if (flags & flags::BIAS) != 0u32 {
        value += bias[n];
    }
    value = activate(value, e.activation);
    if comptime!(e.gated) {
        let mut factor = up;
        if (flags & flags::UP_BIAS) != 0u32 {
            factor += up_bias[n];
        }
        value *= factor;
    }
    value *= out_scale;
    if (flags & flags::ADD) != 0u32 {
        value += load::<H>(residual, at, e.residual);
    }
    if comptime!(e.in_place) {
        value += widen::<O>(out[at], e.out);
    }
    if (flags & flags::MULTIPLY) != 0u32 {
        value *= load::<H>(residual, at, e.residual);
    }
    store::<O>(out, at, value, e.out);
}

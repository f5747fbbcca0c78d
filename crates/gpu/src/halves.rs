//! f32 as operands of 16 bits. A value is the sum of the nearest operand and of one nearest to what that leaves. f16 lacks the
//! range of f32, so rows are multiplied with a power of two first, and what comes of them with one over it, both exactly.

use cubecl::prelude::*;

/// The exponent of a row's largest value times its power of two, for f16, which ends just below 2^16.
pub(crate) const TOP: u32 = 14;

/// The largest exponent of a power that has an inverse.
const MOST: u32 = 253;

/// The power of two for a row whose largest value this is, which it moves to `[2^top, 2^(top + 1))`.
#[cube]
pub(crate) fn power(largest: f32, #[comptime] top: u32) -> f32 {
    // Biased exponents of the two.
    let exponent = comptime!(2 * 127 + top) - (u32::reinterpret(largest) >> 23u32);
    f32::reinterpret(select(exponent < comptime!(MOST), exponent, MOST.runtime()) << 23u32)
}

/// One over a power of two.
#[cube]
pub(crate) fn inverse(power: f32) -> f32 {
    f32::reinterpret(comptime!(254u32 << 23) - u32::reinterpret(power))
}

/// Two values as operands.
#[cube]
pub(crate) fn pair<F: Float>(low: f32, high: f32) -> Vector<F, Const<2>> {
    let mut out = Vector::<F, Const<2>>::empty();
    out.insert(0usize, F::cast_from(low));
    out.insert(1usize, F::cast_from(high));
    out
}

/// What is left of a value when its operand is taken away.
#[cube]
pub(crate) fn rest<F: Float>(value: f32) -> f32 {
    value - f32::cast_from(F::cast_from(value))
}

/// The same, 0 where the operand is not finite.
#[cube]
pub(crate) fn finite_rest<F: Float>(value: f32) -> f32 {
    let near = f32::cast_from(F::cast_from(value));
    select(f32::abs(near) < f32::INFINITY, value - near, 0.0f32.runtime())
}

//! Scales, zero points and offsets of groups, `[G, N]`.

use cubecl::prelude::*;

use super::{Decoder, Scale};

/// The scale of a group; `at` is its index `start + g N + n`.
#[cube]
pub(crate) fn group_scale<S: Numeric>(scales: &[S], table: &[f32], at: usize, #[comptime] d: Decoder) -> f32 {
    if comptime!(d.scale == Scale::None) { f32::new(1.0) } else { stored_scale::<S>(scales[at], table, d) }
}

/// The value of a stored scale.
#[cube]
pub(crate) fn stored_scale<S: Numeric>(stored: S, table: &[f32], #[comptime] d: Decoder) -> f32 {
    match comptime!(d.scale) {
        Scale::None => f32::new(1.0),
        Scale::F16 | Scale::F32 | Scale::TwoLevel => f32::cast_from(stored),
        Scale::Byte => table[u32::cast_from(stored) as usize],
    }
}

/// The zero point or offset of a group; 0 in formats without.
#[cube]
pub(crate) fn group_zero<S: Numeric>(zeros: &[S], at: usize, #[comptime] d: Decoder) -> f32 {
    if comptime!(d.zeros || d.offsets) { f32::cast_from(zeros[at]) } else { f32::new(0.0) }
}

/// `level * scale + offset` in two roundings, whatever the compiler makes of a product and a sum: the product of a
/// two-level or f16 scale is exact, and that of an f32 scale is no plain product.
#[cube]
fn with_offset(level: f32, scale: f32, offset: f32, #[comptime] d: Decoder) -> f32 {
    if comptime!(d.scale == Scale::F32) { fma(level, scale, f32::new(0.0)) + offset } else { level * scale + offset }
}

/// A weight from its level.
#[cube]
pub(crate) fn weight_of(level: f32, scale: f32, zero: f32, #[comptime] d: Decoder) -> f32 {
    if comptime!(d.offsets) { with_offset(level, scale, zero, d) } else { (level - zero) * scale }
}

/// What sums over a group add up: with offsets, which leave no common factor, weights, else weights without the scale.
#[cube]
pub(crate) fn summand(level: f32, scale: f32, zero: f32, #[comptime] d: Decoder) -> f32 {
    if comptime!(d.offsets) { with_offset(level, scale, zero, d) } else { level - zero }
}

//! Scales and zero points of groups, `[G, N]`.

use cubecl::prelude::*;
use half::f16;

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
        Scale::F16 => f32::cast_from(stored),
        Scale::Byte => table[u32::cast_from(stored) as usize],
    }
}

/// The zero point of a group; 0 in formats without.
#[cube]
pub(crate) fn group_zero(zeros: &[f16], at: usize, #[comptime] d: Decoder) -> f32 {
    if comptime!(d.zeros) { f32::cast_from(zeros[at]) } else { f32::new(0.0) }
}

//! Which ids of a row the filters have left, and their weights.

use cubecl::prelude::*;

use super::bins::Bins;
use super::order::{BANNED, key_of};
use super::wide::{Wide, fixed, quotient};
use crate::math::exp;

/// Before any cut.
pub(super) const ALL: u32 = u32::MAX;

/// Ids in the order of a list come before its cut: a smaller order, or the same and an index below `end`.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Cut {
    pub(super) order: u32,
    pub(super) end: u32,
}

/// What is left of a row.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Survivors {
    /// The largest logit, of weight 1.
    pub(super) largest: f32,
    /// In the order of descending logits; -inf never survives.
    pub(super) by_value: Cut,
    /// Least weight.
    pub(super) least: f32,
    /// The mean of `largest - logit`, in two parts.
    pub(super) mean: f32,
    pub(super) mean_rest: f32,
    /// In the order of ascending distance from the mean.
    pub(super) by_distance: Cut,
}

/// The order by value of -inf, where the first cut lies.
#[cube]
pub(super) fn banned_order() -> u32 {
    !BANNED.runtime()
}

/// Descending logits.
#[cube]
pub(super) fn value_order(logit: f32) -> u32 {
    !key_of(logit)
}

/// Ascending `|-ln p - entropy|`: of the logits' differences, the softmax's sum cancels.
#[cube]
pub(super) fn distance_order(logit: f32, s: &Survivors) -> u32 {
    let distance = (s.largest - logit) - s.mean - s.mean_rest;
    u32::reinterpret(distance) & 0x7fff_ffffu32
}

/// `exp(logit - largest)`.
#[cube]
pub(super) fn weight_of(logit: f32, s: &Survivors) -> f32 {
    exp(logit - s.largest)
}

#[cube]
fn before(order: u32, index: u32, cut: &Cut) -> bool {
    order < cut.order || (order == cut.order && index < cut.end)
}

/// Whether an id is left.
#[cube]
pub(super) fn survives(logit: f32, index: u32, s: &Survivors) -> bool {
    before(value_order(logit), index, &s.by_value)
        && weight_of(logit, s) >= s.least
        && before(distance_order(logit, s), index, &s.by_distance)
}

/// The mean of `largest - logit` over the softmax of the survivors, in steps of 2^-28.
#[cube]
pub(super) fn mean_difference(logits: &[f32], start: usize, columns: usize, s: &Survivors, bins: &mut Bins) -> u32 {
    bins.clear();
    // As many rounds for every unit, see [`Bins::total`].
    for round in 0..columns.div_ceil(CUBE_DIM as usize) {
        let i = round * CUBE_DIM as usize + UNIT_POS as usize;
        if i < columns {
            let logit = logits[start + i];
            let weight = weight_of(logit, s);
            // A difference may be infinite where the weight is 0.
            if survives(logit, i as u32, s) && weight > 0.0f32 {
                bins.add(0u32.runtime(), fixed(weight));
                // At most 1/e.
                bins.add(1u32.runtime(), fixed(weight * (s.largest - logit)));
            }
        }
    }
    sync_cube();
    let weights: Wide = bins.bin(0usize.runtime());
    let products: Wide = bins.bin(1usize.runtime());
    quotient(&products, &weights)
}

//! Whole bit rates whose average is a fractional one.

use std::cmp::Reverse;

use crate::{QuantizeError, Result};

/// The largest bit rate.
const MOST_BITS: u32 = 8;

/// Weights that get the same bit rate: the projections of one input in one layer, say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitGroup {
    /// Elements of all its weights.
    pub weights: u64,
    /// Groups of higher priority are the first to get more bits.
    pub priority: u32,
    /// Index of the layer.
    pub layer: usize,
}

/// Bits of every group: `average` rounded down, and one more for as many groups as keep the total within
/// `average * weights`. They come in order of priority, then of the distance to the nearer end of the `layers`, then as
/// given; a group that would exceed the total is passed over.
///
/// # Errors
/// [`QuantizeError::Option`] for an average outside `[1, 8]` or a layer beyond `layers`.
pub fn allocate_bits(groups: &[BitGroup], layers: usize, average: f64) -> Result<Vec<u32>> {
    if !(1.0..=f64::from(MOST_BITS)).contains(&average) {
        let value = average.to_string();
        return Err(QuantizeError::Option { option: "bits a weight", value, rule: "between 1 and 8" });
    }
    if let Some(group) = groups.iter().find(|group| group.layer >= layers) {
        let value = group.layer.to_string();
        return Err(QuantizeError::Option { option: "layer", value, rule: "below the number of layers" });
    }
    let base = average.floor() as u32;
    let total: f64 = groups.iter().map(|group| group.weights as f64).sum();
    let mut spare = average * total - f64::from(base) * total;
    let mut order: Vec<usize> = (0..groups.len()).collect();
    order.sort_by_key(|&i| {
        let BitGroup { priority, layer, .. } = groups[i];
        (Reverse(priority), layer.min(layers - 1 - layer))
    });
    let mut bits = vec![base; groups.len()];
    for i in order.into_iter().filter(|_| base < MOST_BITS) {
        let weights = groups[i].weights as f64;
        if weights <= spare {
            spare -= weights;
            bits[i] += 1;
        }
    }
    Ok(bits)
}

//! Products of one row in shared memory with one column of an expert's weight.

use cubecl::prelude::*;

use crate::decode::{Decoder, PADDED, Scale, decode_unit, group_scale, group_zero, summand};

/// Units that are decoded at once: about 32 features that share a scale.
pub(super) fn span_units(decoder: Decoder) -> usize {
    let most = (32 / decoder.unit()).max(1);
    match decoder.group_size / decoder.unit() {
        0 => most,
        group => (1..=most).rev().find(|&units| group.is_multiple_of(units)).unwrap_or(1),
    }
}

/// The largest number of features up to `most` that is whole spans of all these decoders.
pub(super) fn whole_spans(most: usize, decoders: &[Decoder]) -> usize {
    let features = |decoder: &Decoder| span_units(*decoder) * decoder.unit();
    let common = decoders.iter().map(features).fold(1, least_common_multiple);
    most / common * common
}

fn least_common_multiple(a: usize, b: usize) -> usize {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    a / x * b
}

/// 0, given a `zero` that is 0: added to an index of shared memory that is the same in all units of a plane. Software
/// Vulkan also runs branches that no unit of a plane takes; there it reads at such an index unmasked, whatever it is.
#[cube]
pub(super) fn masked(zero: u32) -> usize {
    (UNIT_POS * zero) as usize
}

/// Where an expert's weight lies in its bank.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Place {
    /// First word.
    pub(super) words: usize,
    /// First scale and zero point.
    pub(super) scales: usize,
    /// First entry of its own table.
    pub(super) table: usize,
    /// Features along K, and units that hold them; codes of the last unit beyond them mean nothing.
    pub(super) features: usize,
    pub(super) units: usize,
}

/// The place of expert `index` of a bank of weights `[features, columns]`.
#[cube]
pub(super) fn place(index: u32, features: usize, columns: usize, #[comptime] d: Decoder) -> Place {
    let units = features.div_ceil(comptime!(d.unit()));
    let stored = features.div_ceil(PADDED) * comptime!(PADDED / d.unit());
    let mut groups = 0usize.runtime();
    if comptime!(d.group_size > 0) {
        groups = features.div_ceil(comptime!(d.group_size));
    }
    Place {
        words: index as usize * stored * comptime!(d.words()) * columns,
        scales: index as usize * groups * columns,
        table: index as usize * 256usize,
        features,
        units,
    }
}

/// The scale at `at`; byte scales are looked up in the expert's own table.
#[cube]
pub(super) fn expert_scale<S: Numeric>(
    scales: &[S],
    table: &[f32],
    at: usize,
    own_table: usize,
    #[comptime] d: Decoder,
) -> f32 {
    if comptime!(d.scale == Scale::Byte) {
        table[own_table + u32::cast_from(scales[at]) as usize]
    } else {
        group_scale::<S>(scales, table, at, d)
    }
}

/// `sum_k x[k - base] W[k, n]` over every `step`-th span of units from `first` to before `end`. `first`, `step` and
/// `base` are at whole spans.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn dot<S: Numeric>(
    x: &[f32],
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    place: &Place,
    base: usize,
    first: usize,
    end: usize,
    step: usize,
    n: usize,
    columns: usize,
    #[comptime] d: Decoder,
) -> f32 {
    let span = comptime!(span_units(d));
    let full_units = place.features / comptime!(d.unit());
    let mut total = f32::new(0.0);
    let mut unit = first;
    while unit < end {
        let mut at = place.scales;
        if comptime!(d.group_size > 0) {
            at += unit / comptime!(d.group_size / d.unit()) * columns + n;
        }
        let mut zero = f32::new(0.0);
        if comptime!(d.zeros || d.offsets) {
            zero = group_zero::<S>(zeros, at, d);
        }
        let mut factor = f32::new(1.0);
        if comptime!(d.offsets) {
            factor = group_scale::<S>(scales, table, at, d);
        }
        let mut sum = f32::new(0.0);
        if unit + span <= end && unit + span <= full_units {
            #[unroll]
            for i in 0..span {
                let levels = decode_unit(words, table, place.words, unit + i, n, columns, d);
                let from = (unit + i) * comptime!(d.unit()) - base;
                #[unroll]
                for j in 0..comptime!(d.unit()) {
                    sum += summand(levels[j], factor, zero, d) * x[from + j];
                }
            }
        } else {
            #[unroll]
            for i in 0..span {
                let from = (unit + i) * comptime!(d.unit());
                if unit + i < end {
                    let levels = decode_unit(words, table, place.words, unit + i, n, columns, d);
                    #[unroll]
                    for j in 0..comptime!(d.unit()) {
                        if from + j < place.features {
                            sum += summand(levels[j], factor, zero, d) * x[from + j - base];
                        }
                    }
                }
            }
        }
        if comptime!(d.offsets) {
            total += sum;
        } else {
            total += sum * expert_scale::<S>(scales, table, at, place.table, d);
        }
        unit += step;
    }
    total
}

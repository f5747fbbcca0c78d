//! Filtered draws without sorting.
//!
//! A row belongs to one cube. Each stage (top-k, top-p, typical, the draw) looks for the id at which a running sum of
//! counts or weights, in the order of the stage, passes a target: a radix search over the order's word and then the
//! index, with sums of each digit in shared memory. Weights are integers, so neither the order of additions nor the
//! shape of a launch changes a result.

use cubecl::prelude::*;
use marlin_ops::sampling::SampleFilter;
use marlin_ops::{Device, OpError, Result, Tensor};

use super::bins::{BINS, Bins, DIGIT};
use super::order::{BAD, BANNED, cube_max_word, key_of, logit_of};
use super::survivors::{
    ALL, Cut, Survivors, banned_order, distance_order, mean_difference, survives, value_order, weight_of,
};
use super::wide::{MOST_TERMS, Wide, fixed, less, share};
use crate::Gpu;
use crate::fault::{self, Fault};
use crate::launch::cubes;

/// Stages in their order; min-p needs no search.
const TOP_K: u32 = 0;
const TOP_P: u32 = 1;
const TYPICAL: u32 = 2;
const DRAW: u32 = 3;

/// Passes of a search: the order's word by 11, 11 and 10 bits, the index by two digits.
const PASSES: u32 = 5;

/// Logits that a unit reads before it works on them.
const AHEAD: usize = 4;

/// Units for vocabularies of more than [`BINS`], and for others; both divide [`BINS`].
const MANY_UNITS: u32 = 512;
const FEW_UNITS: u32 = 64;

/// Places for the planes of a cube.
const PLANES: usize = 256;

/// The filters of a launch; fractions in steps of 2^-32.
#[derive(CubeType, Clone, Copy)]
struct Filter {
    /// Bit s: stage s takes place.
    stages: u32,
    top_k: u32,
    top_p: u32,
    typical: u32,
    min_p: f32,
}

/// The digits that a search has fixed so far, and where the next one lies.
#[derive(CubeType, Clone, Copy)]
struct Digit {
    order_bits: u32,
    order_mask: u32,
    index_bits: u32,
    index_mask: u32,
    /// The digit is one of the index.
    of_index: bool,
    shift: u32,
    mask: u32,
}

/// `ids[row]` drawn with the random word of the row. A row with NaN or +inf, or only -inf, is a fault; its id is 0, so
/// that this fault is the first to be seen.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn sample_rows(
    logits: &[f32],
    words: &[u32],
    ids: &mut [u32],
    faults: &mut [Atomic<u32>],
    rows: u32,
    columns: u32,
    stages: u32,
    top_k: u32,
    top_p: u32,
    typical: u32,
    min_p: f32,
) {
    let row = CUBE_POS;
    if row < rows as usize {
        let start = row * columns as usize;
        let mut key = 0u32.runtime();
        let mut bad = columns as usize;
        let mut i = UNIT_POS as usize;
        while i < columns as usize {
            let other = key_of(logits[start + i]);
            bad = select(other == BAD && i < bad, i, bad);
            key = select(other > key, other, key);
            i += CUBE_DIM as usize;
        }
        if bad < columns as usize {
            fault::record(faults, Fault::SampleLogit, start + bad);
        }
        let largest = cube_max_word(key, PLANES);
        let mut id = 0u32.runtime();
        if largest != BANNED && largest != BAD {
            let filter = Filter { stages, top_k, top_p, typical, min_p };
            id = draw_row(logits, start, columns as usize, logit_of(largest), words[row], &filter);
        }
        if UNIT_POS == 0 {
            if largest == BANNED {
                fault::record(faults, Fault::SampleEmpty, row);
            }
            ids[row] = id;
        }
    }
}

/// The id that `word / 2^32` draws from a row without bad logits.
#[cube]
fn draw_row(logits: &[f32], start: usize, columns: usize, largest: f32, word: u32, filter: &Filter) -> u32 {
    let mut bins = Bins::new();
    let mut value_order = banned_order();
    let mut value_end = 0u32.runtime();
    let mut distance_order = ALL.runtime();
    let mut distance_end = ALL.runtime();
    let mut mean = f32::new(0.0);
    let mut mean_rest = f32::new(0.0);
    for stage in 0..DRAW + 1 {
        if (filter.stages >> stage) & 1u32 == 1u32 {
            let least = select(stage >= TYPICAL, filter.min_p, f32::new(0.0));
            if stage == TYPICAL {
                let survivors = Survivors {
                    largest,
                    by_value: Cut { order: value_order, end: value_end },
                    least,
                    mean,
                    mean_rest,
                    by_distance: Cut { order: distance_order, end: distance_end },
                };
                let steps = mean_difference(logits, start, columns, &survivors, &mut bins);
                mean = f32::cast_from(steps >> 8u32) * 9.536_743e-7f32;
                mean_rest = f32::cast_from(steps & 255u32) * 3.725_290_3e-9f32;
            }
            let survivors = Survivors {
                largest,
                by_value: Cut { order: value_order, end: value_end },
                least,
                mean,
                mean_rest,
                by_distance: Cut { order: distance_order, end: distance_end },
            };
            let fraction = select(stage == TOP_P, filter.top_p, select(stage == TYPICAL, filter.typical, word));
            let cut = search(logits, start, columns, &survivors, stage, fraction, filter.top_k, &mut bins);
            if cut.end > 0u32 {
                if stage == TYPICAL {
                    distance_order = cut.order;
                    distance_end = cut.end;
                } else {
                    value_order = cut.order;
                    value_end = cut.end;
                }
            }
        }
    }
    // The draw is the last id before its own cut.
    value_end - 1u32
}

/// The cut behind the id at which the stage's sum passes its target; `end` is 0 where fewer than k ids are left.
#[cube]
#[allow(clippy::too_many_arguments)]
fn search(
    logits: &[f32],
    start: usize,
    columns: usize,
    survivors: &Survivors,
    stage: u32,
    fraction: u32,
    top_k: u32,
    bins: &mut Bins,
) -> Cut {
    let mut order_bits = 0u32.runtime();
    let mut order_mask = 0u32.runtime();
    let mut index_bits = 0u32.runtime();
    let mut index_mask = 0u32.runtime();
    let mut high = 0u32.runtime();
    let mut low = top_k - 1u32;
    let mut found = 1u32.runtime();
    for pass in 0..PASSES {
        // Short rows have no upper digit of the index.
        if found == 1u32 && (pass != 3u32 || columns > BINS) {
            let of_index = pass >= 3u32;
            let lower = select(pass == 3u32, DIGIT, 0u32.runtime());
            let shift = select(pass == 0u32, 21u32, select(pass == 1u32, 10u32, lower));
            let mask = select(pass == 2u32, 1023u32, 2047u32.runtime());
            let digit = Digit { order_bits, order_mask, index_bits, index_mask, of_index, shift, mask };
            bins.clear();
            tally(logits, start, columns, survivors, stage, &digit, bins);
            let total = bins.total();
            if pass == 0u32 {
                if stage == TOP_K {
                    found = select(less(&Wide { high, low }, &total), 1u32, 0u32.runtime());
                } else {
                    // The draw's sum must exceed its share, a filter's must reach it.
                    let target = share(&total, fraction, stage != DRAW);
                    high = target.high;
                    low = target.low;
                }
            }
            let place = bins.locate(&Wide { high, low });
            high = place.left.high;
            low = place.left.low;
            if of_index {
                index_bits |= place.bin << shift;
                index_mask |= mask << shift;
            } else {
                order_bits |= place.bin << shift;
                order_mask |= mask << shift;
            }
        }
    }
    Cut { order: order_bits, end: select(found == 1u32, index_bits + 1u32, 0u32.runtime()) }
}

/// Adds the survivors that agree with the fixed digits to the bins of the next.
#[cube]
fn tally(
    logits: &[f32],
    start: usize,
    columns: usize,
    survivors: &Survivors,
    stage: u32,
    digit: &Digit,
    bins: &mut Bins,
) {
    let step = CUBE_DIM as usize;
    // As many rounds for every unit, see [`Bins::total`].
    for round in 0..columns.div_ceil(AHEAD * step) {
        let first = round * AHEAD * step + UNIT_POS as usize;
        let mut ahead = Array::<f32>::new(AHEAD);
        #[unroll]
        for j in 0..AHEAD {
            // -inf does not survive.
            let mut logit = logit_of(BANNED.runtime());
            if first + j * step < columns {
                logit = logits[start + first + j * step];
            }
            ahead[j] = logit;
        }
        #[unroll]
        for j in 0..AHEAD {
            let logit = ahead[j];
            let index = (first + j * step) as u32;
            let order = select(stage == TYPICAL, distance_order(logit, survivors), value_order(logit));
            let agrees =
                (order & digit.order_mask) == digit.order_bits && (index & digit.index_mask) == digit.index_bits;
            if agrees && survives(logit, index, survivors) {
                let bin = (select(digit.of_index, index, order) >> digit.shift) & digit.mask;
                if stage == TOP_K {
                    bins.add(bin, Wide { high: 0u32.runtime(), low: 1u32.runtime() });
                } else {
                    bins.add(bin, fixed(weight_of(logit, survivors)));
                }
            }
        }
    }
}

/// A share in [0, 1) in steps of 2^-32.
fn fraction(share: f32) -> u32 {
    (f64::from(share) * 4_294_967_296.0).round() as u32
}

/// Enqueues [`marlin_ops::SamplingOps::sample`] with one random word a row.
pub(super) fn launch<R: Runtime>(
    gpu: &Gpu<R>,
    logits: &Tensor<Gpu<R>>,
    filter: &SampleFilter,
    words: &[u32],
    ids: &mut Tensor<Gpu<R>>,
) -> Result<()> {
    const OP: &str = "sample";
    let (rows, columns) = (logits.rows(), logits.columns());
    if rows == 0 {
        return Ok(());
    }
    if columns > MOST_TERMS {
        let what = format!("a vocabulary of {columns} (at most {MOST_TERMS})");
        return Err(OpError::Unsupported { operation: OP, backend: gpu.name(), what });
    }
    // k beyond the row keeps all of it; a mass of 1 likewise.
    let top_k = filter.top_k.filter(|&k| k < columns);
    let top_p = filter.top_p.filter(|&p| p < 1.0);
    let stage = |stage: u32, active: bool| u32::from(active) << stage;
    let stages = stage(TOP_K, top_k.is_some())
        | stage(TOP_P, top_p.is_some())
        | stage(TYPICAL, filter.typical.is_some())
        | stage(DRAW, true);
    let most = gpu.properties().hardware.max_units_per_cube;
    let units = if columns > BINS && MANY_UNITS <= most { MANY_UNITS } else { FEW_UNITS };
    let words = gpu.create_u32(OP, words)?;
    // SAFETY: logits hold rows * columns elements, words and ids one per row; the kernel stays within.
    unsafe {
        sample_rows::launch_unchecked::<R>(
            gpu.client(),
            cubes(rows),
            CubeDim::new_1d(units),
            logits.buffer().arg(logits.elements()),
            words.arg(rows),
            ids.buffer().arg(rows),
            gpu.faults(),
            rows as u32,
            columns as u32,
            stages,
            top_k.unwrap_or(1) as u32,
            fraction(top_p.unwrap_or(0.0)),
            fraction(filter.typical.unwrap_or(0.0)),
            filter.min_p.unwrap_or(0.0),
        );
    }
    Ok(())
}

//! Draws from given probabilities by their cumulative sums.
//!
//! A row belongs to one cube, whose units each take a stretch of ids; the stretch in which the sum passes its target is
//! divided in the same way until one id is left. Weights are integers, so that the order of additions changes nothing.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::sampling::DrawArgs;
use marlin_ops::{Device, OpError, Result};

use super::wide::{MOST_TERMS, Wide, add, fixed, less, share, subtract};
use crate::Gpu;
use crate::element::{Storage, load};
use crate::fault::{Fault, record};
use crate::launch::cubes;
use crate::reduce::cube_max;

const OP: &str = "sample_categorical";

/// Units of a cube.
const UNITS: usize = 128;

/// Divisions until a stretch of [`MOST_TERMS`] ids is one id.
const ROUNDS: usize = 3;

/// `ids[row]` drawn with the random word of the row. One cube a row.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments, clippy::manual_range_contains)] // Kernels have no ranges of floats.
fn draw_rows<E: Numeric>(
    probabilities: &[E],
    words: &[u32],
    ids: &mut [u32],
    faults: &mut [Atomic<u32>],
    rows: u32,
    columns: u32,
    #[comptime] storage: Storage,
    #[define(E)] _element: ElemType,
) {
    let mut highs = Shared::<[u32]>::new_slice(UNITS);
    let mut lows = Shared::<[u32]>::new_slice(UNITS);
    let row = CUBE_POS;
    if row < rows as usize {
        let start = row * columns as usize;
        let unit = UNIT_POS as usize;
        let mut largest = f32::new(0.0);
        let mut bad = u32::MAX.runtime();
        let mut i = unit;
        while i < columns as usize {
            let p = load::<E>(probabilities, start + i, storage);
            // False for NaN; -0 is no negative number.
            let good = p >= 0.0f32 && p <= 3.402_823_4e38f32;
            bad = select(!good && (i as u32) < bad, i as u32, bad);
            largest = select(p > largest, p, largest);
            i += UNITS;
        }
        if bad != u32::MAX {
            record(faults, comptime!(Fault::Probability), start + bad as usize);
        }
        let largest = cube_max(largest, UNITS);
        let usable = largest > 0.0f32 && largest <= 3.402_823_4e38f32;
        let divisor = select(usable, largest, f32::new(1.0));
        let mut first = 0usize.runtime();
        let mut length = columns as usize;
        let mut high = 0u32.runtime();
        let mut low = 0u32.runtime();
        #[unroll]
        for round in 0..ROUNDS {
            let stretch = length.div_ceil(UNITS);
            let mut sum_high = 0u32.runtime();
            let mut sum_low = 0u32.runtime();
            for j in 0..stretch {
                let offset = unit * stretch + j;
                let inside = offset < length;
                let p = load::<E>(probabilities, start + first + select(inside, offset, 0usize), storage);
                let weight = fixed(select(inside && p > 0.0f32, p / divisor, f32::new(0.0)));
                let sum = add(&Wide { high: sum_high, low: sum_low }, &weight);
                sum_high = sum.high;
                sum_low = sum.low;
            }
            highs[unit] = sum_high;
            lows[unit] = sum_low;
            sync_cube();
            if comptime!(round == 0) {
                let mut total_high = 0u32.runtime();
                let mut total_low = 0u32.runtime();
                for other in 0..UNITS {
                    let total =
                        add(&Wide { high: total_high, low: total_low }, &Wide { high: highs[other], low: lows[other] });
                    total_high = total.high;
                    total_low = total.low;
                }
                let target = share(&Wide { high: total_high, low: total_low }, words[row], false);
                high = target.high;
                low = target.low;
            }
            // The first stretch whose sum exceeds what is left of the target.
            let mut chosen = 0usize.runtime();
            let mut found = 0u32.runtime();
            for other in 0..UNITS {
                let sum = Wide { high: highs[other], low: lows[other] };
                let left = Wide { high, low };
                let here = found == 0u32 && less(&left, &sum);
                let rest = subtract(&left, &sum);
                let passed = found == 0u32 && !here;
                chosen = select(here, other, chosen);
                found = select(here, 1u32, found);
                high = select(passed, rest.high, high);
                low = select(passed, rest.low, low);
            }
            first += chosen * stretch;
            length = stretch;
            // The last stretch may end early; ids behind the row weigh nothing.
            let end = columns as usize;
            length = select(first + length > end, end - first, length);
            sync_cube();
        }
        if unit == 0usize {
            ids[row] = first as u32;
            if !(largest > 0.0f32) {
                record(faults, comptime!(Fault::NoProbability), row);
            }
        }
    }
}

/// Enqueues [`marlin_ops::SamplingOps::sample_categorical`] with one random word a row.
pub(super) fn launch<R: Runtime>(gpu: &Gpu<R>, args: &DrawArgs<'_, Gpu<R>>, words: &[u32]) -> Result<()> {
    let (rows, columns) = (args.values.rows(), args.values.columns());
    if rows == 0 {
        return Ok(());
    }
    if columns > MOST_TERMS {
        let what = format!("a vocabulary of {columns} (at most {MOST_TERMS})");
        return Err(OpError::Unsupported { operation: OP, backend: gpu.name(), what });
    }
    let words = gpu.create_u32(OP, words)?;
    let storage = Storage::of(args.values.dtype());
    // SAFETY: probabilities hold rows * columns elements, words and ids one per row; the kernel stays within.
    unsafe {
        draw_rows::launch_unchecked::<R>(
            gpu.client(),
            cubes(rows),
            CubeDim::new_1d(UNITS as u32),
            args.values.buffer().arg(args.values.elements()),
            words.arg(rows),
            args.ids.buffer().arg(rows),
            gpu.faults(),
            rows as u32,
            columns as u32,
            storage,
            storage.elem(),
        );
    }
    Ok(())
}

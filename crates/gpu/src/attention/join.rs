//! Joins the partial sums of an attention whose keys were split over cubes.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::flash::{HIDDEN, LEAST, is_empty, last_factor};
use crate::element::{Storage, store};
use crate::fault::{Fault, record};
use crate::launch::UNITS;
use crate::math::exp;
use crate::reduce::max_of;

/// `m = max m_p`, `l = sum e^(m_p - m) l_p`, `out = sum e^(m_p - m) o_p / l`, in ascending order of p; the sink joins l.
/// `partial` is `[rows, splits, Dv]`, `sums` `[rows, splits, (m, l)]`, `out` `[rows, Dv]`; one cube a row.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn join<S: Numeric, O: Numeric>(
    partial: &[f32],
    sums: &[f32],
    sinks: &[S],
    out: &mut [O],
    faults: &mut [Atomic<u32>],
    rows: u32,
    heads: u32,
    splits: u32,
    columns: u32,
    empty_is_error: u32,
    #[comptime] storage: Option<Storage>,
    #[comptime] out_storage: Storage,
    #[define(S, O)] _elements: [ElemType; 2],
) {
    let row = CUBE_POS;
    if row < rows as usize {
        let splits = splits as usize;
        let columns = columns as usize;
        let mut factors = Shared::<[f32]>::new_slice(comptime!(UNITS as usize));
        let mut max = HIDDEN.runtime();
        for split in 0..splits {
            max = max_of(max, sums[(row * splits + split) * 2]);
        }
        let base = select(max < LEAST, 0.0f32.runtime(), max);
        if (UNIT_POS as usize) < splits {
            factors[UNIT_POS as usize] = exp(sums[(row * splits + UNIT_POS as usize) * 2] - base);
        }
        sync_cube();
        let mut weight = f32::new(0.0);
        for split in 0..splits {
            weight += factors[split] * sums[(row * splits + split) * 2 + 1];
        }
        let head = row % heads as usize;
        let factor = last_factor::<S>(sinks, head, max, weight, storage);
        if UNIT_POS == 0 && empty_is_error == 1 && is_empty::<S>(sinks, head, weight, storage) {
            record(faults, Fault::EmptyRow, row);
        }
        let mut column = UNIT_POS as usize;
        while column < columns {
            let mut sum = f32::new(0.0);
            for split in 0..splits {
                sum += factors[split] * partial[(row * splits + split) * columns + column];
            }
            store::<O>(out, row * columns + column, sum * factor, out_storage);
            column += UNITS as usize;
        }
    }
}

//! Joining the partial sums of split attention as an operation of its own: one cube a row.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::Result;
use marlin_ops::attention::{EmptyRow, SplitReduceArgs};

use super::flash::{HIDDEN, LEAST};
use crate::Gpu;
use crate::element::{Storage, load, store};
use crate::fault::{Fault, record};
use crate::launch::{UNITS, cubes, units};
use crate::math::exp;
use crate::reduce::max_of;

const OP: &str = "attention_split_reduce";

/// `out = sum_p e^(m_p - m) o_p / (sum_p e^(m_p - m) l_p + e^(sink - m))` in ascending p over the partitions that are
/// used and have a key.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn reduce<S: Numeric, O: Numeric>(
    partial: &[f32],
    max: &[f32],
    sum: &[f32],
    used: &[u32],
    sinks: &[S],
    out: &mut [O],
    faults: &mut [Atomic<u32>],
    rows: u32,
    heads: u32,
    partitions: u32,
    columns: u32,
    empty_is_error: u32,
    #[comptime] sink_storage: Option<Storage>,
    #[comptime] out_storage: Storage,
    #[define(S, O)] _elements: [ElemType; 2],
) {
    let row = CUBE_POS;
    if row < rows as usize {
        let columns = columns as usize;
        let first = row * partitions as usize;
        let count = used[row / heads as usize] as usize;
        let mut largest = HIDDEN.runtime();
        if comptime!(sink_storage.is_some()) {
            largest = load::<S>(sinks, row % heads as usize, comptime!(sink_storage.unwrap_or(Storage::F32)));
        }
        let sink = largest;
        let mut keys = 0u32.runtime();
        for p in 0..count {
            let m = max[first + p];
            largest = max_of(largest, m);
            keys += select(m < LEAST, 0u32, 1u32);
        }
        let base = select(largest < LEAST, 0.0f32.runtime(), largest);
        let mut total = exp(sink - base);
        for p in 0..count {
            let m = max[first + p];
            let term = exp(m - base) * sum[first + p];
            total += select(m < LEAST, 0.0f32.runtime(), term);
        }
        if UNIT_POS == 0 && empty_is_error == 1 && keys == 0u32 && sink < LEAST {
            record(faults, comptime!(Fault::SplitEmpty), row);
        }
        let mut column = UNIT_POS as usize;
        while column < columns {
            let mut value = f32::new(0.0);
            for p in 0..count {
                let m = max[first + p];
                let term = exp(m - base) * partial[(first + p) * columns + column];
                value += select(m < LEAST, 0.0f32.runtime(), term);
            }
            let joined = select(keys == 0u32, 0.0f32.runtime(), value / total);
            store::<O>(out, row * columns + column, joined, out_storage);
            column += UNITS as usize;
        }
    }
}

/// Enqueues [`marlin_ops::AttentionOps::attention_split_reduce`].
pub(super) fn launch<R: Runtime>(gpu: &Gpu<R>, args: &SplitReduceArgs<'_, Gpu<R>>) -> Result<()> {
    let dims = args.partial.dims();
    let (rows, heads, partitions, columns) = (dims[0] * dims[1], dims[1], dims[2], dims[3]);
    let used: Vec<u32> = args.used.iter().map(|&used| used as u32).collect();
    let used = gpu.create_u32(OP, &used)?;
    let sinks = args.sinks.map(|sinks| Storage::of(sinks.dtype()));
    let out = Storage::of(args.out.dtype());
    // SAFETY: the partial sums hold rows * partitions * columns elements, maxima and sums one a partition, sinks one a
    // head, `used` at most `partitions` for each sequence; the kernel stays within.
    unsafe {
        reduce::launch_unchecked::<R>(
            gpu.client(),
            cubes(rows),
            units(),
            args.partial.buffer().arg(args.partial.elements()),
            args.max.buffer().arg(args.max.elements()),
            args.sum.buffer().arg(args.sum.elements()),
            used.arg(dims[0]),
            args.sinks.map_or_else(|| gpu.unread(), |sinks| sinks.buffer().arg(heads)),
            args.out.buffer().arg(args.out.elements()),
            gpu.faults(),
            rows as u32,
            heads as u32,
            partitions as u32,
            columns as u32,
            u32::from(args.empty_row == EmptyRow::Error),
            sinks,
            out,
            [sinks.unwrap_or(Storage::F32).elem(), out.elem()],
        );
    }
    Ok(())
}

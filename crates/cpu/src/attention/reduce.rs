//! Joining the partial sums of split attention. f64 sums of f32 parts.

use marlin_ops::Result;
use marlin_ops::attention::{EmptyRow, SplitReduceArgs, empty_partitions_error};

use crate::Cpu;
use crate::buffer::{Floats, FloatsMut, f32s};

/// Body of [`marlin_ops::AttentionOps::attention_split_reduce`].
pub(super) fn attention_split_reduce(cpu: &Cpu, args: SplitReduceArgs<'_, Cpu>) -> Result<()> {
    const OP: &str = "attention_split_reduce";
    let dims = args.partial.dims();
    let (heads, partitions, columns) = (dims[1], dims[2], dims[3]);
    let partial = f32s(OP, "partial", args.partial)?;
    let (max, sum) = (f32s(OP, "max", args.max)?, f32s(OP, "sum", args.sum)?);
    let mut sinks = cpu.workspace.floats.take(heads);
    if let Some(tensor) = args.sinks {
        Floats::of(OP, "sinks", tensor)?.widen(cpu.level, 0, &mut sinks);
    }
    let sinks = args.sinks.map(|_| &*sinks);
    let used = |row: usize| row * partitions..row * partitions + args.used[row / heads];
    let empty = |row: usize| max[used(row)].iter().all(|m| *m == f32::NEG_INFINITY);
    let rows = max.len() / partitions.max(1);
    if args.empty_row == EmptyRow::Error {
        let sink = |row: usize| sinks.is_some_and(|sinks| sinks[row % heads] > f32::NEG_INFINITY);
        if let Some(row) = (0..rows).find(|&row| empty(row) && !sink(row)) {
            return Err(empty_partitions_error(row / heads, row % heads));
        }
    }
    let mut joined = cpu.workspace.floats.take(args.out.elements());
    cpu.for_rows(&mut joined, columns, |row, out| {
        out.fill(0.0);
        if partitions == 0 || empty(row) {
            return;
        }
        let parts = used(row).filter(|&p| max[p] != f32::NEG_INFINITY);
        let sink = sinks.map_or(f64::NEG_INFINITY, |sinks| f64::from(sinks[row % heads]));
        let largest = parts.clone().map(|p| f64::from(max[p])).fold(sink, f64::max);
        let factor = |p: usize| (f64::from(max[p]) - largest).exp();
        let total = (sink - largest).exp() + parts.clone().map(|p| factor(p) * f64::from(sum[p])).sum::<f64>();
        let mut sums = cpu.workspace.doubles.take(columns);
        sums.fill(0.0);
        for p in parts {
            let factor = factor(p);
            for (sum, o) in sums.iter_mut().zip(&partial[p * columns..]) {
                *sum += factor * f64::from(*o);
            }
        }
        for (out, sum) in out.iter_mut().zip(&*sums) {
            *out = (sum / total) as f32;
        }
    });
    FloatsMut::of(OP, "out", args.out)?.store(0, &joined);
    Ok(())
}

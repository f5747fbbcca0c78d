//! Joining the partial sums of split attention.

use super::super::{Oracle, floats, store};
use crate::Result;
use crate::attention::{EmptyRow, SplitReduceArgs, empty_partitions_error};

/// Body of [`AttentionOps::attention_split_reduce`](crate::AttentionOps::attention_split_reduce).
pub(super) fn attention_split_reduce(args: SplitReduceArgs<'_, Oracle>) -> Result<()> {
    let &[batch, heads, partitions, columns] = args.partial.dims() else {
        unreachable!("the partial sums were checked to have 4 dimensions")
    };
    for b in 0..batch {
        for h in 0..heads {
            let first = (b * heads + h) * partitions;
            let max = &floats(args.max)[first..][..args.used[b]];
            let sink = args.sinks.map(|sinks| floats(sinks)[h]);
            let used: Vec<usize> = (0..max.len()).filter(|&p| max[p] != f64::NEG_INFINITY).collect();
            let mut out = vec![0.0; columns];
            if used.is_empty() {
                if args.empty_row == EmptyRow::Error && sink.is_none_or(|sink| sink == f64::NEG_INFINITY) {
                    return Err(empty_partitions_error(b, h));
                }
            } else {
                let largest = used.iter().map(|&p| max[p]).chain(sink).fold(f64::NEG_INFINITY, f64::max);
                let mut sum = sink.map_or(0.0, |sink| (sink - largest).exp());
                for &p in &used {
                    let factor = (max[p] - largest).exp();
                    sum += factor * floats(args.sum)[first + p];
                    for (out, o) in out.iter_mut().zip(&floats(args.partial)[(first + p) * columns..]) {
                        *out += factor * o;
                    }
                }
                out.iter_mut().for_each(|out| *out /= sum);
            }
            store(args.out, (b * heads + h) * columns, &out);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::{assert_close, empty, tensor};
    use super::*;
    use crate::{AttentionOps, Device};

    /// Two partitions of one row, of which `used` count.
    fn reduce(max: [f32; 2], used: usize, sink: Option<f32>) -> Result<Vec<f64>> {
        let oracle = Oracle::new();
        let partial = tensor(&[1, 1, 2, 1], &[3.0, 5.0]);
        let sink = sink.map(|sink| tensor(&[1], &[sink]));
        let mut out = empty(&[1, 1, 1]);
        oracle.attention_split_reduce(SplitReduceArgs {
            partial: &partial,
            max: &tensor(&[1, 1, 2], &max),
            sum: &tensor(&[1, 1, 2], &[1.0, 2.0]),
            used: &[used],
            sinks: sink.as_ref(),
            empty_row: EmptyRow::Error,
            out: &mut out,
        })?;
        oracle.read_f64(&out)
    }

    #[test]
    fn weighs_by_the_maxima() {
        let e = 1f64.exp();
        assert_close(&reduce([1.0, 0.0], 2, None).unwrap(), &[(3.0 * e + 5.0) / (e + 2.0)], 1e-15);
        assert_close(&reduce([1.0, f32::NAN], 1, None).unwrap(), &[3.0], 1e-15);
        assert_close(&reduce([f32::NEG_INFINITY, 9.0], 2, None).unwrap(), &[2.5], 1e-15);
        assert_close(&reduce([0.0, 0.0], 2, Some(1.0)).unwrap(), &[8.0 / (3.0 + e)], 1e-15);
        assert_eq!(reduce([f32::NEG_INFINITY; 2], 2, Some(0.0)).unwrap(), [0.0]);
        assert!(reduce([f32::NEG_INFINITY; 2], 2, None).is_err());
        assert!(reduce([0.0; 2], 0, None).is_err());
        assert!(reduce([0.0; 2], 3, None).is_err());
    }
}

//! Products of rows with the weights of their experts.

use super::super::{Oracle, floats, special::activate, store, words};
use super::check_ids;
use crate::Result;
use crate::moe::{GroupedGemmArgs, RowOrder, offsets_error, permutation_error};

/// Body of [`MoeOps::moe_grouped_gemm`](crate::MoeOps::moe_grouped_gemm).
pub(super) fn moe_grouped_gemm(args: GroupedGemmArgs<'_, Oracle>) -> Result<()> {
    let [k, n] = args.weight_shape();
    let (rows, slots, count) = (args.out.rows(), args.slots(), args.experts.count());
    // Expert and row of x of each row.
    let sources: Vec<(usize, usize)> = match &args.order {
        RowOrder::Token { ids } => {
            check_ids(ids, count)?;
            words(ids).iter().enumerate().map(|(a, &id)| (id as usize, a / slots)).collect()
        }
        RowOrder::Sorted { offsets, permutation } => {
            let offsets = words(offsets);
            let bound = |i: usize| if i == 0 { Some(0) } else { offsets.get(i - 1).copied() };
            let bad = |&i: &usize| bound(i) > Some(offsets[i]) || (i == count && offsets[i] as usize != rows);
            let first = (offsets[0] != 0).then_some(0);
            if let Some(i) = first.or((0..=count).find(bad)) {
                return Err(offsets_error(i));
            }
            let expert = |row: usize| (0..count).find(|&e| row < offsets[e + 1] as usize).unwrap_or(count - 1);
            let permutation = permutation.map(words);
            if let Some(row) = permutation.and_then(|rows_of| rows_of.iter().position(|&a| a as usize >= rows)) {
                return Err(permutation_error(row));
            }
            let source = |row: usize| permutation.map_or(row, |permutation| permutation[row] as usize / slots);
            (0..rows).map(|row| (expert(row), source(row))).collect()
        }
    };
    for (row, (expert, source)) in sources.into_iter().enumerate() {
        let weight = &args.experts.data().experts[expert][args.projection as usize];
        let y = weight.apply(&floats(args.x)[source * k..][..k]);
        let y: Vec<f64> = y.into_iter().map(|y| activate(args.activation, y)).collect();
        store(args.out, row * n, &y);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::{empty, ids, tensor};
    use super::*;
    use crate::linear::Activation;
    use crate::{Device, ExpertProjection, ExpertStack, ExpertWeights, HostTensor, MoeOps, Weight};

    fn run(order: RowOrder<'_, Oracle>, x: &[f32]) -> Result<Vec<f64>> {
        let oracle = Oracle::new();
        let weight = |v: f32| Weight::dense(HostTensor::from_f32(&[1, 1], &[v]).unwrap()).unwrap();
        let expert = |e: f32| ExpertWeights { gate: weight(e), up: weight(10.0 * e), down: weight(0.0) };
        let experts = ExpertStack::new(&oracle, vec![expert(1.0), expert(2.0), expert(3.0)]).unwrap();
        let mut out = empty(&[4, 1]);
        oracle.moe_grouped_gemm(GroupedGemmArgs {
            x: &tensor(&[x.len(), 1], x),
            order,
            experts: &experts,
            projection: ExpertProjection::Up,
            activation: Activation::None,
            out: &mut out,
        })?;
        oracle.read_f64(&out)
    }

    #[test]
    fn both_orders() {
        let chosen = ids(&[2, 2], &[2, 0, 0, 1]);
        assert_eq!(run(RowOrder::Token { ids: &chosen }, &[1.0, 5.0]).unwrap(), [30.0, 10.0, 50.0, 100.0]);
        let (offsets, permutation) = (ids(&[4], &[0, 2, 3, 4]), ids(&[4], &[1, 2, 3, 0]));
        let sorted = || RowOrder::Sorted { offsets: &offsets, permutation: Some(&permutation) };
        assert_eq!(run(sorted(), &[1.0, 5.0]).unwrap(), [10.0, 50.0, 100.0, 30.0]);
        let rows = || RowOrder::Sorted { offsets: &offsets, permutation: None };
        assert_eq!(run(rows(), &[1.0, 5.0, 5.0, 1.0]).unwrap(), [10.0, 50.0, 100.0, 30.0]);
        for bad in [[1, 2, 3, 4], [0, 3, 2, 4], [0, 2, 3, 3], [0, 5, 4, 4]] {
            let offsets = ids(&[4], &bad);
            assert!(run(RowOrder::Sorted { offsets: &offsets, permutation: None }, &[0.0; 4]).is_err(), "{bad:?}");
        }
        let permutation = ids(&[4], &[1, 2, 4, 0]);
        assert!(run(RowOrder::Sorted { offsets: &offsets, permutation: Some(&permutation) }, &[0.0; 2]).is_err());
    }
}

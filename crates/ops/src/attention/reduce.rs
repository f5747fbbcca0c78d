//! Joining the partial sums of split attention (operations.md: attention_split_reduce).

use marlin_formats::DType;

use super::EmptyRow;
use crate::profile::{Arithmetic, Cost};
use crate::{Device, OpError, Result, Tensor, check};

pub(super) const OP: &str = "attention_split_reduce";

/// Partition p of a row holds `o_p = sum_j e^(s_j - m_p) v_j`, `m_p = max_j s_j` and `l_p = sum_j e^(s_j - m_p)` of its
/// keys; without a key `m_p` is -inf, and it adds nothing. With `m` the largest `m_p` or sink, `a_p = e^(m_p - m)`:
/// `out = sum_p a_p o_p / (sum_p a_p l_p + e^(sink - m))`, in ascending p.
pub struct SplitReduceArgs<'a, D: Device> {
    /// `[B, H, P, D]` F32.
    pub partial: &'a Tensor<D>,
    /// `[B, H, P]` F32.
    pub max: &'a Tensor<D>,
    /// `[B, H, P]` F32.
    pub sum: &'a Tensor<D>,
    /// Partitions of each sequence that count, `[B]`; those behind are never read.
    pub used: &'a [usize],
    /// `[H]` logits that take probability and add no value.
    pub sinks: Option<&'a Tensor<D>>,
    /// Rows without a key and without a sink.
    pub empty_row: EmptyRow,
    /// `[B, H, D]`.
    pub out: &'a mut Tensor<D>,
}

impl<D: Device> SplitReduceArgs<'_, D> {
    pub(super) fn check(&self) -> Result<()> {
        let &[batch, heads, partitions, columns] = self.partial.dims() else {
            return Err(OpError::shape(OP, "partial", self.partial.dims(), "[B, H, P, D]"));
        };
        check::dtype(OP, "partial", self.partial, DType::F32)?;
        for (operand, tensor) in [("max", self.max), ("sum", self.sum)] {
            check::dims(OP, operand, tensor, &[batch, heads, partitions])?;
            check::dtype(OP, operand, tensor, DType::F32)?;
        }
        if let Some(sinks) = self.sinks {
            check::dims(OP, "sinks", sinks, &[heads])?;
            check::float(OP, "sinks", sinks)?;
        }
        check::dims(OP, "out", self.out, &[batch, heads, columns])?;
        check::float(OP, "out", self.out)?;
        if self.used.len() != batch {
            return Err(OpError::shape(OP, "used", &[self.used.len()], format!("[{batch}]")));
        }
        let least = usize::from(self.empty_row == EmptyRow::Error && self.sinks.is_none());
        for (b, &used) in self.used.iter().enumerate() {
            if used < least || used > partitions {
                let reason = format!("[{b}] is {used}, must be in {least}..={partitions}");
                return Err(OpError::value(OP, "used", reason));
            }
        }
        Ok(())
    }

    pub(super) fn cost(&self) -> Cost {
        let partials: usize = self.used.iter().sum::<usize>() * self.partial.dims()[1];
        let columns = self.partial.columns();
        let mut cost = Cost::default()
            .add_flops(Arithmetic::F32, 2 * partials * (columns + 1))
            .add_weights(self.sinks.map_or(0, |sinks| sinks.size_in_bytes()))
            .add_activations(&[self.out]);
        cost.activation_bytes += (4 * partials * (columns + 2)) as u64;
        cost
    }
}

/// The error of a row whose partitions are all empty.
pub fn empty_partitions_error(batch: usize, head: usize) -> OpError {
    OpError::value(OP, "max", format!("[{batch}, {head}] is -inf in every partition: no key"))
}

//! Products of rows with the weights of their experts (operations.md: moe_grouped_gemm).

use marlin_formats::DType;

use super::FAMILY;
use crate::linear::Activation;
use crate::profile::{self, Cost, Operation};
use crate::weight::ExpertProjection;
use crate::{Device, ExpertStack, OpError, Result, Tensor, check};

pub(super) const OP: &str = "moe_grouped_gemm";

/// Which expert a row has, and in which order the rows are.
pub enum RowOrder<'a, D: Device> {
    /// Row a of `out` belongs to assignment a, slot `a % k` of token `a / k`; x is `[T, K]`.
    Token {
        /// `[T, k]` U32, distinct per token.
        ids: &'a Tensor<D>,
    },
    /// Rows `offsets[e]..offsets[e + 1]` of `out` belong to expert e, as [`MoeOps::moe_group`](super::MoeOps::moe_group)
    /// sorts them.
    Sorted {
        /// `[E + 1]` U32, not descending, from 0 to the number of rows.
        offsets: &'a Tensor<D>,
        /// `[T k]` U32: row i is assignment `permutation[i]` and reads token `permutation[i] / k` of x `[T, K]`.
        /// Without, x is `[T k, K]` in sorted order.
        permutation: Option<&'a Tensor<D>>,
    },
}

/// `out[i] = act(x_i W_e + bias_e)`, e the expert of row i, sums in f32. To be combined afterwards
/// ([`MoeOps::moe_combine`](super::MoeOps::moe_combine)).
pub struct GroupedGemmArgs<'a, D: Device> {
    /// Rows of K.
    pub x: &'a Tensor<D>,
    /// Experts of the rows.
    pub order: RowOrder<'a, D>,
    /// The layer's experts, none with rows in an order of their own.
    pub experts: &'a ExpertStack<D>,
    /// Which of their weights.
    pub projection: ExpertProjection,
    /// Applied after the bias.
    pub activation: Activation,
    /// `[T k, N]`.
    pub out: &'a mut Tensor<D>,
}

impl<D: Device> GroupedGemmArgs<'_, D> {
    /// `[K, N]` of the weights.
    pub fn weight_shape(&self) -> [usize; 2] {
        match self.projection {
            ExpertProjection::Gate | ExpertProjection::Up => [self.experts.hidden(), self.experts.intermediate()],
            ExpertProjection::Down => [self.experts.intermediate(), self.experts.hidden()],
        }
    }

    /// Rows of `out` for each row of x.
    pub fn slots(&self) -> usize {
        self.out.rows() / self.x.rows().max(1)
    }

    /// The shapes and dtypes that [`MoeOps::moe_grouped_gemm`](super::MoeOps::moe_grouped_gemm) takes.
    pub fn check(&self) -> Result<()> {
        self.experts.check_channel_order(OP)?;
        let [k, n] = self.weight_shape();
        let (tokens, rows) = (self.x.rows(), self.out.rows());
        check::float(OP, "x", self.x)?;
        check::rows_columns(OP, "x", self.x, tokens, k)?;
        check::float(OP, "out", self.out)?;
        check::rows_columns(OP, "out", self.out, rows, n)?;
        match &self.order {
            RowOrder::Token { ids } => {
                check::dtype(OP, "ids", ids, DType::U32)?;
                check::rows_columns(OP, "ids", ids, tokens, ids.columns())?;
                check::rows_columns(OP, "out", self.out, ids.elements(), n)
            }
            RowOrder::Sorted { offsets, permutation } => {
                check::dtype(OP, "offsets", offsets, DType::U32)?;
                check::dims(OP, "offsets", offsets, &[self.experts.count() + 1])?;
                let Some(permutation) = permutation else {
                    return check::rows_columns(OP, "out", self.out, tokens, n);
                };
                check::dtype(OP, "permutation", permutation, DType::U32)?;
                check::dims(OP, "permutation", permutation, &[rows])?;
                if rows > 0 && (tokens == 0 || !rows.is_multiple_of(tokens)) {
                    let expected = format!("k rows for each of {tokens} tokens");
                    return Err(OpError::shape(OP, "out", self.out.dims(), expected));
                }
                Ok(())
            }
        }
    }

    /// Checks, and nothing else if there is no output.
    pub(super) fn run(self, device: &D, body: impl Fn(&D, Self) -> Result<()>) -> Result<()> {
        self.check()?;
        if self.out.elements() == 0 {
            return Ok(());
        }
        // Which experts are read is known to the device alone.
        let chosen = match profile::recorder(device) {
            Some(_) => self.chosen(device)?,
            None => Vec::new(),
        };
        let operation = Operation::new(FAMILY, OP).with_weights(self.experts.format_name());
        profile::run(device, operation, self, |args| args.cost(&chosen), body)
    }

    /// The expert of each row.
    fn chosen(&self, device: &D) -> Result<Vec<u32>> {
        match &self.order {
            RowOrder::Token { ids } => device.read_u32(ids),
            RowOrder::Sorted { offsets, .. } => {
                let offsets = device.read_u32(offsets)?;
                let rows = |e: usize| offsets[e + 1].saturating_sub(offsets[e]) as usize;
                Ok((0..self.experts.count()).flat_map(|e| std::iter::repeat_n(e as u32, rows(e))).collect())
            }
        }
    }

    fn cost(&self, chosen: &[u32]) -> Cost {
        let cost = self.experts.projection_cost(self.projection, chosen).add_activations(&[self.x, self.out]);
        match &self.order {
            RowOrder::Token { ids } => cost.add_activations(&[ids]),
            RowOrder::Sorted { offsets, permutation: None } => cost.add_activations(&[offsets]),
            RowOrder::Sorted { offsets, permutation: Some(permutation) } => {
                cost.add_activations(&[offsets, permutation])
            }
        }
    }
}

/// The error of offsets that descend, or do not go from 0 to the number of rows.
pub fn offsets_error(index: usize) -> OpError {
    OpError::value(OP, "offsets", format!("[{index}] is not between its neighbours, 0 and the number of rows"))
}

/// The error of a sorted row that is no assignment.
pub fn permutation_error(row: usize) -> OpError {
    OpError::value(OP, "permutation", format!("[{row}] is no assignment"))
}

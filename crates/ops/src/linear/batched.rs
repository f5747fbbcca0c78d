//! Batches of products (operations.md: gemm_batched).

use marlin_formats::pack::Layout;
use marlin_formats::{DType, ScaleKind, Scheme};

use super::Activation;
use crate::profile::{Arithmetic, Cost};
use crate::{Device, OpError, Result, Tensor, check};

pub(super) const OP: &str = "gemm_batched";

/// Where the matrices of a batch lie in a tensor, in elements: element (r, c) of head h of entry b is number
/// `b batch + h head + r row + c`. A batch or head stride of 0 gives every entry or head the same matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchStrides {
    /// From one entry of the batch to the next.
    pub batch: usize,
    /// From one head to the next.
    pub head: usize,
    /// From one row to the next, at least the columns of a row.
    pub row: usize,
}

impl BatchStrides {
    /// The strides of `[B, heads, rows, columns]`.
    pub const fn contiguous(heads: usize, rows: usize, columns: usize) -> Self {
        Self { batch: heads * rows * columns, head: rows * columns, row: columns }
    }

    /// Number of the first element of a matrix.
    pub const fn start(&self, batch: usize, head: usize) -> usize {
        batch * self.batch + head * self.head
    }
}

/// The matrices of a batch.
pub struct BatchedMatrix<'a, D: Device> {
    /// Their elements; its own dimensions do not matter.
    pub tensor: &'a Tensor<D>,
    /// Where they lie.
    pub strides: BatchStrides,
}

/// The right operands of a batch, `W [K, N]` for each entry and weight head.
pub enum BatchedWeight<'a, D: Device> {
    /// F32, F16 or BF16.
    Dense {
        /// `[K, N]`, or `[N, K]` if transposed.
        values: BatchedMatrix<'a, D>,
        /// Rows are those of `W^T`: checkpoint order, or the keys of `Q K^T`.
        transposed: bool,
    },
    /// 4-bit codes with f16 scales and no offsets ([`Format`](marlin_formats::Format) fp4_e2m1, int4_u4, int4_s4, nf4,
    /// iq4_nl). Scales that are not finite are not looked for: they show in the result.
    Quantized {
        /// Format and group size.
        scheme: Scheme,
        /// `[ceil(K / 8), N]` U32.
        codes: BatchedMatrix<'a, D>,
        /// `[ceil(K / G), N]` F16, with strides of their own.
        scales: BatchedMatrix<'a, D>,
        /// As the scales, if and only if the format has zero points.
        zeros: Option<BatchedMatrix<'a, D>>,
    },
}

/// Sizes of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchedShape {
    /// B.
    pub batch: usize,
    /// H, heads of the left operand and of the output.
    pub heads: usize,
    /// Heads of the weights, a divisor of H: head h reads weight head `h / (heads / weight_heads)`.
    pub weight_heads: usize,
    /// M.
    pub m: usize,
    /// N.
    pub n: usize,
    /// K.
    pub k: usize,
}

/// `out[b,h] = act(alpha a[b,h] W[b,h'])`, sums in f32, one rounding.
pub struct GemmBatchedArgs<'a, D: Device> {
    /// Sizes.
    pub shape: BatchedShape,
    /// `[M, K]` for each entry and head.
    pub a: BatchedMatrix<'a, D>,
    /// `[K, N]` for each entry and weight head.
    pub weight: BatchedWeight<'a, D>,
    /// Factor of the products.
    pub alpha: f32,
    /// Applied last.
    pub activation: Activation,
    /// Rows of each entry where they differ, `[B]`, at most M; rows beyond are neither read nor written.
    pub rows: Option<&'a [usize]>,
    /// Holds `[M, N]` for each entry and head; no two may overlap.
    pub out: &'a mut Tensor<D>,
    /// Where they lie.
    pub out_strides: BatchStrides,
}

impl BatchedShape {
    /// The weight head that head `head` reads.
    pub fn weight_head(&self, head: usize) -> usize {
        head / (self.heads / self.weight_heads)
    }

    /// Whether there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.batch == 0 || self.heads == 0 || self.m == 0 || self.n == 0
    }
}

impl<D: Device> BatchedWeight<'_, D> {
    fn check(&self, shape: &BatchedShape) -> Result<()> {
        let BatchedShape { batch, weight_heads, n, k, .. } = *shape;
        let inside = |operand, matrix: &BatchedMatrix<'_, D>, rows, columns| {
            check_matrices(operand, matrix.tensor, &matrix.strides, [batch, weight_heads, rows, columns])
        };
        match self {
            Self::Dense { values, transposed } => {
                check::float(OP, "weight", values.tensor)?;
                let (rows, columns) = if *transposed { (n, k) } else { (k, n) };
                inside("weight", values, rows, columns)
            }
            Self::Quantized { scheme, codes, scales, zeros } => {
                let format = scheme.format;
                format.check_group_size(scheme.group_size)?;
                if format.layout() != Layout::Bits4 || format.scale_kind() != ScaleKind::F16 || format.has_offsets() {
                    let reason = format!("is {}: only 4-bit codes with f16 scales and no offsets", format.name());
                    return Err(OpError::value(OP, "scheme", reason));
                }
                if zeros.is_some() != format.has_zeros() {
                    return Err(OpError::value(OP, "zeros", format!("do not go with {}", format.name())));
                }
                check::dtype(OP, "weight", codes.tensor, DType::U32)?;
                inside("weight", codes, scheme.code_rows(k), n)?;
                for (operand, matrix) in [("scales", Some(scales)), ("zeros", zeros.as_ref())] {
                    if let Some(matrix) = matrix {
                        check::dtype(OP, operand, matrix.tensor, DType::F16)?;
                        inside(operand, matrix, scheme.groups(k), n)?;
                    }
                }
                Ok(())
            }
        }
    }

    fn size_in_bytes(&self) -> usize {
        match self {
            Self::Dense { values, .. } => values.tensor.size_in_bytes(),
            Self::Quantized { codes, scales, zeros, .. } => {
                let zeros = zeros.as_ref().map_or(0, |zeros| zeros.tensor.size_in_bytes());
                codes.tensor.size_in_bytes() + scales.tensor.size_in_bytes() + zeros
            }
        }
    }

    pub(super) fn format_name(&self) -> &'static str {
        match self {
            Self::Dense { values, .. } => values.tensor.dtype().name(),
            Self::Quantized { scheme, .. } => scheme.format.name(),
        }
    }
}

impl<D: Device> GemmBatchedArgs<'_, D> {
    /// The shapes, strides, dtypes and scalars that [`LinearOps::gemm_batched`](super::LinearOps::gemm_batched) takes.
    pub fn check(&self) -> Result<()> {
        let BatchedShape { batch, heads, weight_heads, m, n, k } = self.shape;
        if heads > 0 && (weight_heads == 0 || !heads.is_multiple_of(weight_heads)) {
            let reason = format!("is {weight_heads}, must divide the {heads} heads");
            return Err(OpError::value(OP, "weight_heads", reason));
        }
        check::float(OP, "a", self.a.tensor)?;
        check::float(OP, "out", self.out)?;
        check::finite(OP, "alpha", self.alpha)?;
        if let Some(rows) = self.rows {
            if rows.len() != batch {
                return Err(OpError::shape(OP, "rows", &[rows.len()], format!("[{batch}]")));
            }
            if let Some(b) = rows.iter().position(|&rows| rows > m) {
                let reason = format!("[{b}] is {}, there are {m}", rows[b]);
                return Err(OpError::value(OP, "rows", reason));
            }
        }
        check_matrices("a", self.a.tensor, &self.a.strides, [batch, heads, m, k])?;
        self.weight.check(&self.shape)?;
        check_matrices("out", self.out, &self.out_strides, [batch, heads, m, n])?;
        if self.shape.is_empty() {
            return Ok(());
        }
        check_apart(&self.out_strides, [batch, heads, m, n])
    }

    /// Rows of entry `batch`.
    pub fn rows_of(&self, batch: usize) -> usize {
        self.rows.map_or(self.shape.m, |rows| rows[batch])
    }

    pub(super) fn cost(&self) -> Cost {
        let BatchedShape { heads, n, k, .. } = self.shape;
        let rows: usize = (0..self.shape.batch).map(|b| self.rows_of(b)).sum();
        let mut cost = Cost::default()
            .add_flops(Arithmetic::F32, 2 * rows * heads * n * k)
            .add_weights(self.weight.size_in_bytes())
            .add_activations(&[self.a.tensor]);
        cost.activation_bytes += (rows * heads * n * self.out.dtype().size_in_bytes()) as u64;
        cost
    }
}

/// All matrices `[batch, heads, rows, columns]` lie within the tensor.
fn check_matrices<D: Device>(
    operand: &'static str,
    tensor: &Tensor<D>,
    strides: &BatchStrides,
    [batch, heads, rows, columns]: [usize; 4],
) -> Result<()> {
    if batch == 0 || heads == 0 || rows == 0 || columns == 0 {
        return Ok(());
    }
    if rows > 1 && strides.row < columns {
        let reason = format!("has a row stride of {}, below the {columns} columns of a row", strides.row);
        return Err(OpError::value(OP, operand, reason));
    }
    let reach = |count: usize, stride: usize| (count - 1) as u128 * stride as u128;
    let end = reach(batch, strides.batch) + reach(heads, strides.head) + reach(rows, strides.row) + columns as u128;
    if end > tensor.elements() as u128 {
        let expected = format!("at least {end} elements: [{batch}, {heads}, {rows}, {columns}] at {strides:?}");
        return Err(OpError::shape(OP, operand, tensor.dims(), expected));
    }
    Ok(())
}

/// No two elements of the output are the same: each stride is at least what the smaller ones span.
fn check_apart(strides: &BatchStrides, [batch, heads, rows, columns]: [usize; 4]) -> Result<()> {
    let mut steps = [(strides.batch, batch), (strides.head, heads), (strides.row, rows)];
    steps.sort_unstable();
    let mut span = columns;
    for (stride, count) in steps.into_iter().filter(|(_, count)| *count > 1) {
        if stride < span {
            return Err(OpError::value(OP, "out_strides", format!("let matrices overlap: {strides:?}")));
        }
        span += (count - 1) * stride;
    }
    Ok(())
}

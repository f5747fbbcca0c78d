//! Batches of products and epilogues on their own. Plain loops: one task computes one matrix of the output, for which it
//! decodes its weights once.

use half::f16;
use marlin_formats::Scheme;
use marlin_ops::linear::{
    Activation, BatchStrides, BatchedMatrix, BatchedWeight, EpilogueArgs, GemmBatchedArgs, Residual,
};
use marlin_ops::{OpError, Result};

use super::epilogue::ApplyRow;
use crate::Cpu;
use crate::buffer::{Buffer, Floats, FloatsMut, u32s, unsupported};
use crate::simd::{Kernel, LANES, Simd};

const OP: &str = "gemm_batched";

/// The weights of a batch as they are stored.
enum Weights<'a> {
    Dense { values: Floats<'a>, strides: BatchStrides, transposed: bool },
    Quantized { scheme: Scheme, codes: (&'a [u32], BatchStrides), scales: Halves<'a>, zeros: Option<Halves<'a>> },
}

/// f16 values of a batch.
type Halves<'a> = (&'a [u16], BatchStrides);

fn halves<'a>(operand: &'static str, matrix: &BatchedMatrix<'a, Cpu>) -> Result<Halves<'a>> {
    match matrix.tensor.buffer() {
        Buffer::Half(values) => Ok((&values[..matrix.tensor.elements()], matrix.strides)),
        _ => Err(unsupported(OP, operand, matrix.tensor.dtype())),
    }
}

impl<'a> Weights<'a> {
    fn of(weight: &BatchedWeight<'a, Cpu>) -> Result<Self> {
        Ok(match weight {
            BatchedWeight::Dense { values, transposed } => Self::Dense {
                values: Floats::of(OP, "weight", values.tensor)?,
                strides: values.strides,
                transposed: *transposed,
            },
            BatchedWeight::Quantized { scheme, codes, scales, zeros } => Self::Quantized {
                scheme: *scheme,
                codes: (u32s(OP, "weight", codes.tensor)?, codes.strides),
                scales: halves("scales", scales)?,
                zeros: zeros.as_ref().map(|zeros| halves("zeros", zeros)).transpose()?,
            },
        })
    }

    /// Columns of K values, one behind the other.
    fn columns(&self, cpu: &Cpu, b: usize, head: usize, k: usize, out: &mut [f32]) {
        match self {
            Self::Dense { values, strides, transposed: true } => {
                for (n, column) in out.chunks_exact_mut(k).enumerate() {
                    values.widen(cpu.level, strides.start(b, head) + n * strides.row, column);
                }
            }
            Self::Dense { values, strides, transposed: false } => {
                let mut row = cpu.workspace.floats.take(out.len() / k);
                for i in 0..k {
                    values.widen(cpu.level, strides.start(b, head) + i * strides.row, &mut row);
                    for (column, v) in out.chunks_exact_mut(k).zip(&*row) {
                        column[i] = *v;
                    }
                }
            }
            Self::Quantized { scheme, codes, scales, zeros } => {
                let half = |(values, strides): &Halves<'_>, group: usize, n: usize| {
                    f16::from_bits(values[strides.start(b, head) + group * strides.row + n]).to_f32()
                };
                let (words, strides) = codes;
                for (n, column) in out.chunks_exact_mut(k).enumerate() {
                    for (i, out) in column.iter_mut().enumerate() {
                        let group = i / scheme.group_size;
                        let zero = zeros.as_ref().map_or(0.0, |zeros| half(zeros, group, n));
                        let word = words[strides.start(b, head) + i / 8 * strides.row + n];
                        let code = (word >> (4 * (i % 8)) & 15) as u8;
                        *out = scheme.format.value(code, zero) * half(scales, group, n);
                    }
                }
            }
        }
    }
}

/// `out[n] = alpha sum_k a[k] columns[n][k]`.
struct Row<'a> {
    a: &'a [f32],
    columns: &'a [f32],
    alpha: f32,
    out: &'a mut [f32],
}

impl Kernel for Row<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (chunks, tail) = self.a.as_chunks::<LANES>();
        for (out, column) in self.out.iter_mut().zip(self.columns.chunks_exact(self.a.len())) {
            let (column, column_tail) = column.as_chunks::<LANES>();
            let mut sums = s.splat(0.0);
            for (a, w) in chunks.iter().zip(column) {
                sums = s.fma(s.load(a), s.load(w), sums);
            }
            let mut lanes = [0.0; LANES];
            s.store(sums, &mut lanes);
            let rest: f32 = tail.iter().zip(column_tail).map(|(a, w)| a * w).sum();
            *out = self.alpha * (lanes.iter().sum::<f32>() + rest);
        }
    }
}

/// Body of [`marlin_ops::LinearOps::gemm_batched`].
pub(super) fn gemm_batched(cpu: &Cpu, args: GemmBatchedArgs<'_, Cpu>) -> Result<()> {
    let shape = args.shape;
    let (m, n, k) = (shape.m, shape.n, shape.k);
    let a = Floats::of(OP, "a", args.a.tensor)?;
    let weights = Weights::of(&args.weight)?;
    let (rows, strides) = (args.rows, args.a.strides);
    let rows_of = |b: usize| rows.map_or(m, |rows| rows[b]);
    let size = m
        .checked_mul(n)
        .and_then(|size| size.checked_mul(shape.batch * shape.heads))
        .ok_or_else(|| OpError::value(OP, "shape", format!("has more results than memory can address: {shape:?}")))?;
    let mut results = cpu.workspace.floats.take(size);
    cpu.pool.for_chunks_of(size * k, &mut results, m * n, |task, out| {
        let (b, head) = (task / shape.heads, task % shape.heads);
        if k == 0 {
            out.fill(0.0);
        } else {
            let mut columns = cpu.workspace.floats.take(n * k);
            weights.columns(cpu, b, shape.weight_head(head), k, &mut columns);
            let mut row = cpu.workspace.floats.take(k);
            for (i, out) in out.chunks_exact_mut(n).take(rows_of(b)).enumerate() {
                a.widen(cpu.level, strides.start(b, head) + i * strides.row, &mut row);
                cpu.level.run(Row { a: &row, columns: &columns, alpha: args.alpha, out });
            }
        }
        if args.activation != Activation::None {
            let rows = &mut out[..rows_of(b) * n];
            cpu.level.run(ApplyRow { values: rows, bias: None, activation: args.activation, scale: 1.0 });
        }
    });
    let mut out = FloatsMut::of(OP, "out", args.out)?;
    for (task, results) in results.chunks_exact(m * n).enumerate() {
        let (b, head) = (task / shape.heads, task % shape.heads);
        for (i, row) in results.chunks_exact(n).take(rows_of(b)).enumerate() {
            out.store(args.out_strides.start(b, head) + i * args.out_strides.row, row);
        }
    }
    Ok(())
}

/// Body of [`marlin_ops::LinearOps::apply_epilogue`].
pub(super) fn apply_epilogue(cpu: &Cpu, args: EpilogueArgs<'_, Cpu>) -> Result<()> {
    const OP: &str = "apply_epilogue";
    let (elements, columns) = (args.x.elements(), args.x.columns());
    let residual = match args.residual {
        Residual::Add(tensor) => Some(Floats::of(OP, "residual", tensor)?),
        Residual::None | Residual::InPlace => None,
    };
    let in_place = matches!(args.residual, Residual::InPlace);
    let mut bias = cpu.workspace.floats.take(columns);
    if let Some(tensor) = args.bias {
        Floats::of(OP, "bias", tensor)?.widen(cpu.level, 0, &mut bias);
    }
    let bias = args.bias.map(|_| &*bias);
    let x = Floats::of(OP, "x", args.x)?;
    let mut y = cpu.workspace.floats.take(elements);
    cpu.for_rows(&mut y, columns, |m, row| {
        x.widen(cpu.level, m * columns, row);
        cpu.level.run(ApplyRow { values: row, bias, activation: args.activation, scale: args.out_scale });
        if let Some(source) = if in_place { Some(x) } else { residual } {
            let mut addend = cpu.workspace.floats.take(columns);
            source.widen(cpu.level, m * columns, &mut addend);
            row.iter_mut().zip(&*addend).for_each(|(v, r)| *v += r);
        }
    });
    FloatsMut::of(OP, "x", args.x)?.store(0, &y);
    Ok(())
}

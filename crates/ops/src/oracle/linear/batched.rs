//! Batches of products and epilogues on their own.

use half::f16;

use super::super::{Oracle, floats, special::activate, store, words};
use super::residual_values;
use crate::Result;
use crate::linear::{BatchedWeight, EpilogueArgs, GemmBatchedArgs};

/// Element (k, n) of the weight of an entry and weight head.
fn weight_value(weight: &BatchedWeight<'_, Oracle>, b: usize, head: usize, k: usize, n: usize) -> f64 {
    match weight {
        BatchedWeight::Dense { values, transposed } => {
            let (row, column) = if *transposed { (n, k) } else { (k, n) };
            floats(values.tensor)[values.strides.start(b, head) + row * values.strides.row + column]
        }
        BatchedWeight::Quantized { scheme, codes, scales, zeros } => {
            let word = words(codes.tensor)[codes.strides.start(b, head) + k / 8 * codes.strides.row + n];
            let group = k / scheme.group_size;
            let scale = floats(scales.tensor)[scales.strides.start(b, head) + group * scales.strides.row + n];
            let zero = zeros.as_ref().map_or(0.0, |zeros| {
                floats(zeros.tensor)[zeros.strides.start(b, head) + group * zeros.strides.row + n]
            });
            let code = (word >> (4 * (k % 8)) & 15) as u8;
            f64::from(scheme.format.value(code, f16::from_f64(zero).to_f32())) * scale
        }
    }
}

/// Body of [`LinearOps::gemm_batched`](crate::LinearOps::gemm_batched).
pub(super) fn gemm_batched(args: GemmBatchedArgs<'_, Oracle>) -> Result<()> {
    let shape = args.shape;
    for b in 0..shape.batch {
        for head in 0..shape.heads {
            for m in 0..args.rows_of(b) {
                let a = &floats(args.a.tensor)[args.a.strides.start(b, head) + m * args.a.strides.row..];
                let value = |n: usize| {
                    let weight = |k| weight_value(&args.weight, b, shape.weight_head(head), k, n);
                    let sum: f64 = (0..shape.k).map(|k| a[k] * weight(k)).sum();
                    activate(args.activation, f64::from(args.alpha) * sum)
                };
                let row: Vec<f64> = (0..shape.n).map(value).collect();
                store(args.out, args.out_strides.start(b, head) + m * args.out_strides.row, &row);
            }
        }
    }
    Ok(())
}

/// Body of [`LinearOps::apply_epilogue`](crate::LinearOps::apply_epilogue).
pub(super) fn apply_epilogue(args: EpilogueArgs<'_, Oracle>) -> Result<()> {
    let columns = args.x.columns();
    let residual = residual_values(&args.residual, args.x);
    let bias = args.bias.map(floats);
    let y: Vec<f64> = floats(args.x)
        .iter()
        .zip(residual)
        .enumerate()
        .map(|(i, (x, r))| {
            let v = activate(args.activation, x + bias.map_or(0.0, |bias| bias[i % columns]));
            v * f64::from(args.out_scale) + r
        })
        .collect();
    store(args.x, 0, &y);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::{ids, tensor};
    use super::*;
    use crate::linear::{Activation, BatchStrides, BatchedMatrix, BatchedShape, Residual};
    use crate::{Device, HostTensor, LinearOps};
    use marlin_formats::{DType, Format, Scheme};

    #[test]
    fn strides_broadcast_and_group() {
        let oracle = Oracle::new();
        // Two heads of queries [1, 2] share the keys of one head.
        let q = tensor(&[2, 2], &[1.0, 2.0, 3.0, 4.0]);
        let keys = tensor(&[3, 2], &[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
        let mut out = tensor(&[6], &[0.0; 6]);
        let args = GemmBatchedArgs {
            shape: BatchedShape { batch: 1, heads: 2, weight_heads: 1, m: 1, n: 3, k: 2 },
            a: BatchedMatrix { tensor: &q, strides: BatchStrides { batch: 4, head: 2, row: 2 } },
            weight: BatchedWeight::Dense {
                values: BatchedMatrix { tensor: &keys, strides: BatchStrides { batch: 0, head: 0, row: 2 } },
                transposed: true,
            },
            alpha: 2.0,
            activation: Activation::None,
            rows: None,
            out: &mut out,
            out_strides: BatchStrides { batch: 6, head: 3, row: 3 },
        };
        oracle.gemm_batched(args).unwrap();
        assert_eq!(oracle.read_f64(&out).unwrap(), [2.0, 4.0, 6.0, 6.0, 8.0, 14.0]);
    }

    #[test]
    fn codes_and_scales_have_their_own_strides() {
        let oracle = Oracle::new();
        // One word of the codes 1 to 8: 0.5, 1, 1.5, 2, 3, 4, 6, -0 in fp4.
        let codes = ids(&[1], &[0x8765_4321]);
        let scales = HostTensor::from_f32_as(DType::F16, &[2], &[1.0, 3.0]).unwrap();
        let scales = oracle.upload(&scales).unwrap();
        let a = tensor(&[8], &[1.0; 8]);
        let mut out = tensor(&[2], &[0.0; 2]);
        let same = BatchStrides { batch: 0, head: 0, row: 8 };
        let args = GemmBatchedArgs {
            shape: BatchedShape { batch: 2, heads: 1, weight_heads: 1, m: 1, n: 1, k: 8 },
            a: BatchedMatrix { tensor: &a, strides: same },
            weight: BatchedWeight::Quantized {
                scheme: Scheme::new(Format::Fp4E2m1, 8).unwrap(),
                codes: BatchedMatrix { tensor: &codes, strides: same },
                scales: BatchedMatrix { tensor: &scales, strides: BatchStrides { batch: 1, head: 0, row: 1 } },
                zeros: None,
            },
            alpha: 1.0,
            activation: Activation::None,
            rows: None,
            out: &mut out,
            out_strides: BatchStrides { batch: 1, head: 0, row: 1 },
        };
        oracle.gemm_batched(args).unwrap();
        assert_eq!(oracle.read_f64(&out).unwrap(), [18.0, 54.0]);
    }

    #[test]
    fn epilogue_in_its_order() {
        let oracle = Oracle::new();
        let mut x = tensor(&[2, 2], &[1.0, -2.0, 3.0, -4.0]);
        let bias = tensor(&[2], &[1.0, 1.0]);
        let args = EpilogueArgs {
            x: &mut x,
            bias: Some(&bias),
            activation: Activation::Relu,
            out_scale: 10.0,
            residual: Residual::InPlace,
        };
        oracle.apply_epilogue(args).unwrap();
        assert_eq!(oracle.read_f64(&x).unwrap(), [21.0, -2.0, 43.0, -4.0]);
    }
}

//! Float conversion and decoded weights.

use super::{Oracle, floats, store};
use crate::convert::{DequantizeArgs, WeightOrder};
use crate::{ConvertOps, Result, Tensor};

impl ConvertOps for Oracle {
    fn run_convert(&self, x: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        store(out, 0, floats(x));
        Ok(())
    }

    fn run_dequantize(&self, args: DequantizeArgs<'_, Self>) -> Result<()> {
        let (weight, count) = (args.weight.data(), args.count());
        for n in 0..count {
            let row = weight.row(args.first + n);
            match args.order {
                WeightOrder::OutputMajor => store(args.out, n * row.len(), row),
                WeightOrder::InputMajor => {
                    for (k, value) in row.iter().enumerate() {
                        store(args.out, k * count + n, &[*value]);
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{dense, tensor};
    use super::*;
    use crate::{Device, OpError};
    use marlin_formats::DType;

    #[test]
    fn rows_of_a_weight_in_both_orders() {
        let oracle = Oracle::new();
        let weight = dense(3, 2, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        for (order, dims, expected) in [
            (WeightOrder::OutputMajor, [2, 2], [3.0, 4.0, 5.0, 6.0]),
            (WeightOrder::InputMajor, [2, 2], [3.0, 5.0, 4.0, 6.0]),
        ] {
            let mut out = oracle.zeros(DType::F16, &dims).unwrap();
            oracle.dequantize(DequantizeArgs { weight: &weight, first: 1, order, out: &mut out }).unwrap();
            assert_eq!(oracle.read_f64(&out).unwrap(), expected);
            let args = DequantizeArgs { weight: &weight, first: 2, order, out: &mut out };
            assert!(matches!(oracle.dequantize(args), Err(OpError::Value { operand: "first", .. })));
        }
    }

    #[test]
    fn edge_cases() {
        // operations.md convert_float.
        let oracle = Oracle::new();
        let values = [f32::from_bits(0x7F80_0001), f32::MAX, 65519.99, 65520.0, -0.0];
        let x = tensor(&[5], &values);
        let mut out = oracle.zeros(DType::BF16, &[5]).unwrap();
        oracle.convert(&x, &mut out).unwrap();
        let y = oracle.read_f64(&out).unwrap();
        assert!(y[0].is_nan());
        assert_eq!(y[1], f64::INFINITY);
        assert!(y[4] == 0.0 && y[4].is_sign_negative());
        let mut out = oracle.zeros(DType::F16, &[5]).unwrap();
        oracle.convert(&x, &mut out).unwrap();
        let y = oracle.read_f64(&out).unwrap();
        assert_eq!(y[1..4], [f64::INFINITY, 65504.0, f64::INFINITY]);
    }
}

//! Float conversion.

use super::{Oracle, floats, store};
use crate::{ConvertOps, Result, Tensor};

impl ConvertOps for Oracle {
    fn run_convert(&self, x: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        store(out, 0, floats(x));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::tensor;
    use super::*;
    use crate::Device;
    use marlin_formats::DType;

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

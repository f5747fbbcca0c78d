//! Row norms.

use super::{Oracle, floats, store};
use crate::norm::{LayerNormArgs, NormOps, RmsNormArgs, RmsNormInPlaceArgs};
use crate::{Result, Tensor};

/// `x / sqrt(mean x^2 + eps)`.
pub(super) fn rms_normalized(x: &[f64], eps: f32) -> Vec<f64> {
    let mean_square = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    let root = (mean_square + f64::from(eps)).sqrt();
    x.iter().map(|v| v / root).collect()
}

/// `(x - mean) / sqrt(var + eps)`, biased variance.
fn layer_normalized(x: &[f64], eps: f32) -> Vec<f64> {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let centred: Vec<f64> = x.iter().map(|v| v - mean).collect();
    let variance = centred.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    let root = (variance + f64::from(eps)).sqrt();
    centred.iter().map(|v| v / root).collect()
}

/// `x`, or `x + residual` with the sum written back (rounded to its dtype; the norm reads it unrounded).
fn add_residual(x: &Tensor<Oracle>, residual: Option<&mut Tensor<Oracle>>) -> Vec<f64> {
    let Some(residual) = residual else {
        return floats(x).to_vec();
    };
    let sum: Vec<f64> = floats(x).iter().zip(floats(residual)).map(|(x, r)| x + r).collect();
    store(residual, 0, &sum);
    sum
}

/// Normalised rows times `gamma + gamma_offset`; gamma is all ones when absent.
pub(super) fn rms_rows(h: &[f64], columns: usize, gamma: Option<&Tensor<Oracle>>, offset: f32, eps: f32) -> Vec<f64> {
    let gamma = gamma.map_or(vec![1.0; columns], |g| floats(g).to_vec());
    h.chunks(columns)
        .flat_map(|row| rms_normalized(row, eps).into_iter().zip(&gamma))
        .map(|(v, g)| v * (g + f64::from(offset)))
        .collect()
}

impl NormOps for Oracle {
    fn run_rms_norm(&self, args: RmsNormArgs<'_, Self>) -> Result<()> {
        let h = add_residual(args.x, args.residual);
        let columns = args.x.columns();
        store(args.out, 0, &rms_rows(&h, columns, args.gamma, args.gamma_offset, args.eps));
        Ok(())
    }

    fn run_rms_norm_in_place(&self, args: RmsNormInPlaceArgs<'_, Self>) -> Result<()> {
        let (h, columns) = (floats(args.x).to_vec(), args.x.columns());
        let y = rms_rows(&h, columns, Some(args.gamma), args.gamma_offset, args.eps);
        store(args.x, 0, &y);
        Ok(())
    }

    fn run_layer_norm(&self, args: LayerNormArgs<'_, Self>) -> Result<()> {
        let h = add_residual(args.x, args.residual);
        let columns = args.x.columns();
        let gamma = floats(args.gamma);
        let beta = args.beta.map_or(vec![0.0; columns], |b| floats(b).to_vec());
        let y: Vec<f64> = h
            .chunks(columns)
            .flat_map(|row| layer_normalized(row, args.eps).into_iter().zip(gamma).zip(&beta))
            .map(|((v, g), b)| v * g + b)
            .collect();
        store(args.out, 0, &y);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, empty, tensor};
    use super::*;
    use crate::Device;

    #[test]
    fn rms_norm_with_residual_and_offset() {
        let oracle = Oracle::new();
        let (x, mut residual) = (tensor(&[1, 2], &[1.0, 1.0]), tensor(&[1, 2], &[2.0, 3.0]));
        let gamma = tensor(&[2], &[1.0, -0.5]);
        let mut out = empty(&[1, 2]);
        let args = RmsNormArgs {
            x: &x,
            residual: Some(&mut residual),
            gamma: Some(&gamma),
            gamma_offset: 1.0,
            eps: 0.5,
            out: &mut out,
        };
        oracle.rms_norm(args).unwrap();
        // h = [3, 4], mean square 12.5, root of 13.
        assert_eq!(oracle.read_f64(&residual).unwrap(), [3.0, 4.0]);
        let root = 13f64.sqrt();
        assert_close(&oracle.read_f64(&out).unwrap(), &[6.0 / root, 2.0 / root], 1e-15);
    }

    #[test]
    fn a_zero_row_stays_zero_and_in_place_agrees() {
        let oracle = Oracle::new();
        let mut x = tensor(&[2, 2], &[0.0, 0.0, 3.0, -4.0]);
        let gamma = tensor(&[2], &[1.0, 2.0]);
        let args = RmsNormInPlaceArgs { x: &mut x, gamma: &gamma, gamma_offset: 0.0, eps: 1e-6 };
        oracle.rms_norm_in_place(args).unwrap();
        let root = (12.5 + f64::from(1e-6f32)).sqrt();
        assert_close(&oracle.read_f64(&x).unwrap(), &[0.0, 0.0, 3.0 / root, -8.0 / root], 1e-15);
    }

    #[test]
    fn layer_norm_of_a_constant_row_is_beta() {
        let oracle = Oracle::new();
        let x = tensor(&[2, 2], &[7.0, 7.0, 1.0, 3.0]);
        let (gamma, beta) = (tensor(&[2], &[2.0, 2.0]), tensor(&[2], &[0.5, -0.5]));
        let mut out = empty(&[2, 2]);
        let args = LayerNormArgs { x: &x, residual: None, gamma: &gamma, beta: Some(&beta), eps: 3.0, out: &mut out };
        oracle.layer_norm(args).unwrap();
        // Second row: mean 2, variance 1, root of 4.
        assert_close(&oracle.read_f64(&out).unwrap(), &[0.5, -0.5, -0.5, 0.5], 1e-15);
    }
}

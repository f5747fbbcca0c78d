//! Products of f32 rows, which are sums of two bf16, against the oracle: at the bounds of f32.

use marlin_formats::{DType, Format, QuantizedMatrix, Scheme};
use marlin_ops::linear::{Activation, GatedUpArgs, InputNorm, LinearArgs, Projection, ProjectionsArgs, Residual};
use marlin_ops::oracle::Oracle;
use marlin_ops::{Device, HostTensor, Linear, LinearOps, OpError, Result, Weight};

use crate::linear::{LinearKernel, TensorRows};
use crate::test_values::{assert_rows, values};

/// LIN32 of the specification, relative to the norm of a row.
const BOUND: f64 = 1e-5;

fn weight<D: Device>(d: &D, format: Format, group_size: usize, [n, k]: [usize; 2], seed: u32) -> Result<Linear<D>> {
    let matrix = QuantizedMatrix::encode(Scheme::new(format, group_size)?, &values(n * k, seed), n, k)?;
    Linear::new(d, Weight::quantized(matrix)?.with_bias(values(n, seed + 1))?)
}

fn layer<D: Device + LinearOps>(d: &D, weight: &Linear<D>, x: &[f32], rows: usize) -> Result<Vec<f64>> {
    let n = weight.out_features();
    let x = d.upload(&HostTensor::from_f32(&[rows, weight.in_features()], x)?)?;
    let residual = d.upload(&HostTensor::from_f32(&[rows, n], &values(rows * n, 3))?)?;
    let mut out = d.upload(&HostTensor::from_f32(&[rows, n], &vec![f32::NAN; rows * n])?)?;
    let (activation, residual) = (Activation::Silu, Residual::Add(&residual));
    d.linear(LinearArgs { x: &x, weight, activation, out_scale: 0.5, residual, out: &mut out })?;
    d.read_f64(&out)
}

#[test]
fn rows_of_f32_keep_their_precision() {
    let (gpu, oracle) = (crate::cuda(None).unwrap(), Oracle::new());
    for (format, group_size, m, [n, k]) in [
        (Format::Int4S4, 32, 9, [32, 128]),
        (Format::Fp4E2m1, 64, 17, [96, 256]),
        (Format::Int4S4, 128, 33, [64, 1024]),
        (Format::Fp4E2m1, 32, 64, [256, 512]),
        (Format::Int4S4, 256, 65, [128, 14_336]),
        (Format::Fp4E2m1, 128, 130, [512, 384]),
        (Format::Int4S4, 32, 257, [256, 4096]),
    ] {
        let what = format!("{format} group {group_size} M={m} N={n} K={k}");
        let x = values(m * k, 7);
        let own = weight(&gpu, format, group_size, [n, k], 1).unwrap();
        assert!(
            super::expert_shape(&gpu, m, DType::F32, own.data().decoder, [n, k]).is_some(),
            "{what}: other kernels"
        );
        let found = layer(&gpu, &own, &x, m).expect(&what);
        let expected = layer(&oracle, &weight(&oracle, format, group_size, [n, k], 1).unwrap(), &x, m).unwrap();
        assert_rows(&what, &found, &expected, n, BOUND);
    }
}

/// The products alone: no bias, activation or residual hides a row's size.
fn products<D: Device + LinearOps>(d: &D, x: &[f32], rows: usize, k: usize) -> Result<Vec<f64>> {
    let matrix = QuantizedMatrix::encode(Scheme::new(Format::Int4S4, 32)?, &values(64 * k, 1), 64, k)?;
    let weight = Linear::new(d, Weight::quantized(matrix)?)?;
    let x = d.upload(&HostTensor::from_f32(&[rows, k], x)?)?;
    let mut out = d.upload(&HostTensor::from_f32(&[rows, 64], &vec![f32::NAN; rows * 64])?)?;
    let (activation, residual) = (Activation::None, Residual::None);
    d.linear(LinearArgs { x: &x, weight: &weight, activation, out_scale: 1.0, residual, out: &mut out })?;
    d.read_f64(&out)
}

#[test]
fn rows_of_any_size() {
    const K: usize = 256;
    let (gpu, oracle) = (crate::cuda(None).unwrap(), Oracle::new());
    let scales = [1.0, 1e-20, 1e-6, 7e4, 1e20, 1e36, -3.0, 65_504.0, 1e-3];
    let mut x = values(scales.len() * K, 5);
    for (row, scale) in x.chunks_exact_mut(K).zip(scales) {
        row.iter_mut().for_each(|v| *v *= scale);
    }
    let mut rows = scales.len();
    // Outliers among small values.
    let mut outliers = values(K, 6);
    outliers[3] = 3e5;
    outliers[200] = -1e7;
    x.extend(outliers);
    rows += 1;
    let found = products(&gpu, &x, rows, K).unwrap();
    let expected = products(&oracle, &x, rows, K).unwrap();
    assert_rows("rows", &found, &expected, 64, BOUND);
    // What is not finite stays in its row.
    for (value, row) in [(f32::NAN, 2), (f32::INFINITY, 9), (f32::NEG_INFINITY, 0)] {
        let mut x = x.clone();
        x[row * K + 17] = value;
        let found = products(&gpu, &x, rows, K).unwrap();
        for (r, (found, expected)) in found.chunks_exact(64).zip(expected.chunks_exact(64)).enumerate() {
            match r == row {
                true => assert!(found.iter().all(|v| !v.is_finite()), "{value} in row {r}: {found:?}"),
                false => assert_rows("other rows", found, expected, 64, BOUND),
            }
        }
    }
}

/// A gated product and three projections of normalised rows, side by side.
fn normalised<D: Device + LinearOps>(d: &D, m: usize, k: usize, n: usize) -> Result<[Vec<f64>; 4]> {
    let weights = (0..3).map(|i| weight(d, Format::Fp4E2m1, 32, [n, k], 10 * i)).collect::<Result<Vec<_>>>()?;
    let x = d.upload(&HostTensor::from_f32(&[m, k], &values(m * k, 6))?)?;
    let gamma = d.upload(&HostTensor::from_f32(&[k], &values(k, 7))?)?;
    let norm = Some(InputNorm { gamma: &gamma, gamma_offset: 1.0, eps: 1e-6 });
    let new = || d.upload(&HostTensor::from_f32(&[m, n], &vec![f32::NAN; m * n])?);
    let mut outs = [new()?, new()?, new()?, new()?];
    let [gated, others @ ..] = &mut outs;
    let (gate, up) = (&weights[0], &weights[1]);
    d.gated_up(GatedUpArgs { x: &x, norm, gate, up, activation: Activation::Silu, out: gated })?;
    let mut projections: Vec<_> = weights.iter().zip(others).map(|(weight, out)| Projection { weight, out }).collect();
    d.projections(ProjectionsArgs { x: &x, norm, projections: &mut projections })?;
    drop(projections);
    let [a, b, c, e] = &outs;
    Ok([d.read_f64(a)?, d.read_f64(b)?, d.read_f64(c)?, d.read_f64(e)?])
}

#[test]
fn norms_and_gates() {
    let (gpu, oracle) = (crate::cuda(None).unwrap(), Oracle::new());
    for (m, k, n) in [(5, 256, 64), (70, 384, 96), (200, 1024, 128)] {
        let (found, expected) = (normalised(&gpu, m, k, n).unwrap(), normalised(&oracle, m, k, n).unwrap());
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_rows(&format!("output {i} of M={m}"), found, expected, n, BOUND);
        }
    }
}

#[test]
fn few_rows_of_f32_are_refused() {
    let gpu = crate::cuda(None).unwrap();
    let weight = weight(&gpu, Format::Int4S4, 32, [64, 256], 1).unwrap();
    let x = gpu.upload(&HostTensor::from_f32(&[2, 256], &values(512, 1)).unwrap()).unwrap();
    let mut out = gpu.upload(&HostTensor::from_f32(&[2, 64], &[0.0; 128]).unwrap()).unwrap();
    let rows = TensorRows { columns: 4, tiles: 1, planes: 2, prefetch: false, staged: false, slices: 1 };
    let (activation, residual) = (Activation::None, Residual::None);
    let args = LinearArgs { x: &x, weight: &weight, activation, out_scale: 1.0, residual, out: &mut out };
    match gpu.linear_with(LinearKernel::TensorRows(rows), args) {
        Err(OpError::Unsupported { what, .. }) => assert!(what.contains("f32 activations"), "{what}"),
        other => panic!("{other:?}"),
    }
}

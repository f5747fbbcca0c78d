//! Every kernel by name against the oracle; the conformance suite sees only those that [`super::select`] chooses.

use marlin_formats::{DType, Format, QuantizedMatrix, Scheme};
use marlin_ops::linear::{Activation, GatedUpArgs, InputNorm, LinearArgs, LinearOps, Residual};
use marlin_ops::oracle::Oracle;
use marlin_ops::{Device, HostTensor, Linear, OpError, Result, Weight};

use super::{Accumulate, Gemv, LinearKernel, Tile};
use crate::Vulkan;

/// Values in [-1/2, 1/2).
fn values(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / 16_777_216.0 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

fn weight(format: Option<Format>, n: usize, k: usize, seed: u32) -> Weight {
    let values = values(n * k, seed);
    match format {
        None => Weight::dense(HostTensor::from_f32_as(DType::BF16, &[n, k], &values).unwrap()).unwrap(),
        Some(format) => {
            let scheme = Scheme::new(format, 32).unwrap();
            Weight::quantized(QuantizedMatrix::encode(scheme, &values, n, k).unwrap()).unwrap()
        }
    }
    .with_bias(values[..n].to_vec())
    .unwrap()
}

type Shape = (usize, usize, usize);

/// A linear layer with bias, activation and residual, `[M, N]`.
fn layer<D: Device>(
    d: &D,
    (m, n, k): Shape,
    format: Option<Format>,
    run: impl Fn(&D, LinearArgs<'_, D>) -> Result<()>,
) -> Result<Vec<f64>> {
    let weight = Linear::new(d, weight(format, n, k, 1))?;
    let x = d.upload(&HostTensor::from_f32(&[m, k], &values(m * k, 2))?)?;
    let residual = d.upload(&HostTensor::from_f32(&[m, n], &values(m * n, 3))?)?;
    let mut out = d.upload(&HostTensor::from_f32(&[m, n], &vec![f32::NAN; m * n])?)?;
    let (activation, residual) = (Activation::Silu, Residual::Add(&residual));
    run(d, LinearArgs { x: &x, weight: &weight, activation, out_scale: 0.5, residual, out: &mut out })?;
    d.read_f64(&out)
}

/// A gated product of normalised rows.
fn gated<D: Device>(
    d: &D,
    (m, n, k): Shape,
    format: Option<Format>,
    run: impl Fn(&D, GatedUpArgs<'_, D>) -> Result<()>,
) -> Result<Vec<f64>> {
    let gate = Linear::new(d, weight(format, n, k, 4))?;
    let up = Linear::new(d, weight(format, n, k, 5))?;
    let x = d.upload(&HostTensor::from_f32(&[m, k], &values(m * k, 6))?)?;
    let gamma = d.upload(&HostTensor::from_f32(&[k], &values(k, 7))?)?;
    let norm = Some(InputNorm { gamma: &gamma, gamma_offset: 1.0, eps: 1e-6 });
    let mut out = d.upload(&HostTensor::from_f32(&[m, n], &vec![f32::NAN; m * n])?)?;
    run(d, GatedUpArgs { x: &x, norm, gate: &gate, up: &up, activation: Activation::Silu, out: &mut out })?;
    d.read_f64(&out)
}

fn relative_norm(found: &[f64], expected: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(f, e)| f - e)) / norm(&mut expected.iter().copied())
}

/// The specification's bound: LIN32, or ACC16(K).
fn bound(kernel: LinearKernel, k: usize) -> f64 {
    match kernel {
        LinearKernel::Matrix(tile) if tile.accumulate == Accumulate::F16 => (k as f64 / 6.0).sqrt() / 2048.0 + 6e-4,
        _ => 1e-5,
    }
}

fn agrees(gpu: &Vulkan, kernel: LinearKernel, shape: Shape, format: Option<Format>) {
    let what = format!("{kernel:?} {shape:?} {format:?}");
    let found = layer(gpu, shape, format, |d, args| d.linear_with(kernel, args)).expect(&what);
    let expected = layer(&Oracle::new(), shape, format, |d, args| d.linear(args)).unwrap();
    let error = relative_norm(&found, &expected);
    assert!(error <= bound(kernel, shape.2), "{what}: {error:e}");
    let again = layer(gpu, shape, format, |d, args| d.linear_with(kernel, args)).unwrap();
    assert_eq!(found, again, "{what}: two runs differ");
}

fn gated_agrees(gpu: &Vulkan, kernel: LinearKernel, shape: Shape, format: Option<Format>) {
    let what = format!("gated {kernel:?} {shape:?} {format:?}");
    let found = gated(gpu, shape, format, |d, args| d.gated_up_with(kernel, args)).expect(&what);
    let expected = gated(&Oracle::new(), shape, format, |d, args| d.gated_up(args)).unwrap();
    let error = relative_norm(&found, &expected);
    // Two sums in f16 and the product of their errors.
    let factor = if bound(kernel, shape.2) > 1e-5 { 2.0 } else { 1.0 };
    assert!(error <= factor * bound(kernel, shape.2), "{what}: {error:e}");
}

/// The device; without one the line `SKIPPED`.
fn device() -> Option<Vulkan> {
    let gpu = crate::vulkan(None);
    if let Err(error) = &gpu {
        eprintln!("SKIPPED: linear kernels on Vulkan, because {error}");
    }
    gpu.ok()
}

const FP4: Option<Format> = Some(Format::Fp4E2m1);

fn tile(m: usize, n: usize, k: usize, units: usize, stages: usize, accumulate: Accumulate) -> Tile {
    Tile { m, n, k, units, stages, accumulate }
}

#[test]
fn few_rows() {
    let Some(gpu) = device() else { return };
    for (columns, lanes_n, lanes_k) in [(1, 128, 1), (2, 128, 1), (4, 128, 1), (4, 8, 32)] {
        let kernel = LinearKernel::Gemv(Gemv { rows: 1, columns, lanes_n, lanes_k });
        for n in [8, 65] {
            agrees(&gpu, kernel, (1, n, 300), FP4);
        }
    }
    // More rows than one pass takes.
    agrees(&gpu, LinearKernel::Gemv(Gemv { rows: 4, columns: 2, lanes_n: 32, lanes_k: 8 }), (9, 66, 130), FP4);
    gated_agrees(&gpu, LinearKernel::Gemv(Gemv { rows: 2, columns: 1, lanes_n: 32, lanes_k: 8 }), (3, 40, 96), FP4);
}

#[test]
fn limits_are_named() {
    let Some(gpu) = device() else { return };
    let refused = |kernel, words: &str| {
        let outcome = layer(&gpu, (5, 64, 64), FP4, |d, args| d.linear_with(kernel, args));
        match outcome {
            Err(OpError::Unsupported { what, .. }) => assert!(what.contains(words), "{what}"),
            other => panic!("{kernel:?}: {other:?}"),
        }
    };
    let f32 = Accumulate::F32;
    refused(LinearKernel::Matrix(tile(256, 128, 64, 512, 4, f32)), "shared memory");
    refused(LinearKernel::Matrix(tile(64, 64, 12, 128, 1, f32)), "multiple of 8");
    refused(LinearKernel::Matrix(tile(64, 64, 32, 100, 1, f32)), "on 100 units");
    refused(LinearKernel::Matrix(tile(64, 64, 32, 128, 5, f32)), "5 stages");
    refused(LinearKernel::Gemv(Gemv { rows: 1, columns: 3, lanes_n: 32, lanes_k: 8 }), "3 columns");
}

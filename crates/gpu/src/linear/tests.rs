//! Every kernel by name against the oracle; the conformance suite sees only those that [`super::select`] chooses.

use marlin_formats::{DType, Format, QuantizedMatrix, Scheme};
use marlin_ops::linear::{Activation, GatedUpArgs, InputNorm, LinearArgs, LinearOps, Residual};
use marlin_ops::oracle::Oracle;
use marlin_ops::{Device, HostTensor, Linear, OpError, Result, Weight};

use super::{Accumulate, Gemv, LinearKernel, Tile};
use crate::Vulkan;
use crate::test_values::{relative_norm, values};

fn weight(format: Option<Format>, n: usize, k: usize, seed: u32) -> Weight {
    let values = values(n * k, seed);
    match format {
        None => Weight::dense(HostTensor::from_f32_as(DType::BF16, &[n, k], &values).unwrap()).unwrap(),
        Some(format) => {
            let scheme = Scheme::new(format, 32).unwrap();
            Weight::quantized(QuantizedMatrix::encode(scheme, &values, n, k).unwrap()).unwrap()
        }
    }
    .with_bias(self::values(n, seed + 1))
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

/// The specification's bound: LIN32, or ACC16(K).
fn bound(kernel: LinearKernel, k: usize) -> f64 {
    match kernel {
        LinearKernel::Matrix(tile) | LinearKernel::SplitK { tile, .. } | LinearKernel::StreamK { tile, .. }
            if tile.accumulate == Accumulate::F16 =>
        {
            (k as f64 / 6.0).sqrt() / 2048.0 + 6e-4
        }
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

const FP4: Option<Format> = Some(Format::Fp4E2m1);

fn tile(m: usize, n: usize, k: usize, units: usize, stages: usize, accumulate: Accumulate) -> Tile {
    Tile { m, n, k, units, stages, accumulate }
}

#[test]
fn few_rows() {
    let gpu = crate::vulkan(None).unwrap();
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
fn tiles() {
    let gpu = crate::vulkan(None).unwrap();
    use Accumulate::{F16, F32};
    for tile in [
        tile(64, 64, 32, 128, 1, F32),
        tile(64, 64, 32, 128, 2, F32),
        tile(64, 64, 32, 128, 3, F16),
        tile(16, 128, 32, 128, 1, F32),
        tile(32, 32, 16, 128, 4, F16),
        tile(128, 64, 16, 128, 2, F16),
        tile(8, 64, 32, 128, 2, F32),
    ] {
        agrees(&gpu, LinearKernel::Matrix(tile), (70, 130, 200), FP4);
    }
    agrees(&gpu, LinearKernel::Matrix(tile(64, 64, 32, 128, 2, F32)), (3, 5, 7), None);
    gated_agrees(&gpu, LinearKernel::Matrix(tile(8, 64, 16, 128, 2, F32)), (9, 65, 100), FP4);
}

#[test]
fn slices_of_k() {
    let gpu = crate::vulkan(None).unwrap();
    let tile = tile(32, 32, 32, 128, 1, Accumulate::F32);
    for splits in [1, 2, 3, 8, 16] {
        // 7 steps: some slices are empty.
        agrees(&gpu, LinearKernel::SplitK { tile, splits }, (5, 70, 200), FP4);
    }
    agrees(&gpu, LinearKernel::SplitK { tile, splits: 4 }, (5, 33, 0), None);
    gated_agrees(&gpu, LinearKernel::SplitK { tile, splits: 3 }, (33, 40, 200), None);
}

#[test]
fn streams() {
    let gpu = crate::vulkan(None).unwrap();
    let tile = tile(32, 32, 32, 128, 1, Accumulate::F32);
    for workers in [1, 2, 7, 40, 160] {
        // 6 tiles of 7 steps.
        agrees(&gpu, LinearKernel::StreamK { tile, workers }, (40, 70, 200), FP4);
        agrees(&gpu, LinearKernel::StreamK { tile, workers }, (5, 20, 200), FP4);
    }
    agrees(&gpu, LinearKernel::StreamK { tile, workers: 4 }, (5, 33, 0), None);
    gated_agrees(&gpu, LinearKernel::StreamK { tile, workers: 5 }, (33, 40, 200), None);
}

#[test]
fn limits_are_named() {
    let gpu = crate::vulkan(None).unwrap();
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
    refused(LinearKernel::SplitK { tile: tile(32, 32, 32, 128, 1, f32), splits: 0 }, "0 slices");
    refused(LinearKernel::StreamK { tile: tile(32, 32, 32, 128, 1, f32), workers: 0 }, "0 workers");
    refused(LinearKernel::Gemv(Gemv { rows: 1, columns: 3, lanes_n: 32, lanes_k: 8 }), "3 columns");
    refused(LinearKernel::Trellis, "not exl3");
}

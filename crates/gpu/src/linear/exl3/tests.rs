//! EXL3 products against the oracle: every bit rate and codebook, sizes that are padded, all kernels.

use marlin_formats::DType;
use marlin_formats::exl3::{Codebook, Exl3Matrix};
use marlin_ops::convert::{DequantizeArgs, WeightOrder};
use marlin_ops::linear::{Activation, EmbeddingArgs, GatedUpArgs, InputNorm, LinearArgs, Residual};
use marlin_ops::oracle::Oracle;
use marlin_ops::{ConvertOps, Device, HostTensor, Linear, LinearOps, OpError, Result, Weight};

use crate::linear::tile::{Accumulate, Tile};
use crate::linear::{Gemv, LinearKernel, TensorRows, TensorTile};
use crate::test_values::{TestDevice, exact_device, random, relative_norm, values};

/// The device in each mode that it has.
fn modes() -> Vec<TestDevice> {
    let exact = exact_device();
    let other = exact.has_modes().then(|| exact_device().with_exact(false));
    [exact].into_iter().chain(other).collect()
}

/// Error of a product relative to its norm: f16 rows after the rotation, or values of mul1 that are not rounded, where there
/// are tensor cores, f32 otherwise.
fn bound(gpu: &TestDevice, kernel: Option<LinearKernel>, dtype: DType) -> f64 {
    let own = matches!(kernel, None | Some(LinearKernel::Trellis));
    let narrow = own && (dtype == DType::F16 || !gpu.is_exact()) && super::tensor::available(gpu);
    if narrow { 6e-4 } else { 1e-5 }
}

fn matrix(codebook: Codebook, bits: u32, n: usize, k: usize, seed: u32) -> Exl3Matrix {
    let padded = |size: usize| size.next_multiple_of(128);
    let scales = |count: usize, seed| {
        let signed =
            |word: u32| half::f16::from_f32(0.5 + (word % 64) as f32 / 64.0).to_bits() | (word as u16 & 0x8000);
        random(count, seed).into_iter().map(signed).collect()
    };
    Exl3Matrix {
        codebook,
        bits,
        in_features: k,
        out_features: n,
        trellis: random(padded(k) * padded(n) * bits as usize / 16, seed).into_iter().map(|word| word as u16).collect(),
        suh: scales(padded(k), seed + 1),
        svh: scales(padded(n), seed + 2),
    }
}

fn weight(codebook: Codebook, bits: u32, n: usize, k: usize, seed: u32) -> Weight {
    Weight::exl3(matrix(codebook, bits, n, k, seed)).unwrap().with_bias(values(n, seed + 3)).unwrap()
}

/// A linear layer with bias, activation and residual, `[M, N]`.
fn layer<D: LinearOps>(
    d: &D,
    [m, n, k]: [usize; 3],
    weight: &Weight,
    dtype: DType,
    run: impl Fn(&D, LinearArgs<'_, D>) -> Result<()>,
) -> Vec<f64> {
    let weight = Linear::new(d, weight.clone()).unwrap();
    let x = d.upload(&HostTensor::from_f32_as(dtype, &[m, k], &values(m * k, 2)).unwrap()).unwrap();
    let residual = d.upload(&HostTensor::from_f32(&[m, n], &values(m * n, 3)).unwrap()).unwrap();
    let mut out = d.upload(&HostTensor::from_f32(&[m, n], &vec![f32::NAN; m * n]).unwrap()).unwrap();
    let (activation, residual) = (Activation::Silu, Residual::Add(&residual));
    run(d, LinearArgs { x: &x, weight: &weight, activation, out_scale: 0.5, residual, out: &mut out }).unwrap();
    d.read_f64(&out).unwrap()
}

#[test]
fn weights_are_unfolded() {
    let gpu = exact_device();
    for (codebook, bits) in Codebook::ALL.into_iter().flat_map(|codebook| (1..=8).map(move |bits| (codebook, bits))) {
        let (n, k) = (130, 200);
        let host = weight(codebook, bits, n, k, 7);
        let expected = host.to_f32().unwrap();
        let linear = Linear::new(&gpu, host).unwrap();
        let mut out = gpu.upload(&HostTensor::from_f32(&[k, 3], &vec![f32::NAN; 3 * k]).unwrap()).unwrap();
        let (first, order) = (126, WeightOrder::InputMajor);
        gpu.dequantize(DequantizeArgs { weight: &linear, first, order, out: &mut out }).unwrap();
        let found = gpu.read_f64(&out).unwrap();
        let expected: Vec<f64> = (0..3 * k).map(|i| f64::from(expected[(first + i % 3) * k + i / 3])).collect();
        let error = relative_norm(&found, &expected);
        assert!(error < 1e-6, "{codebook:?} {bits}: {error:e}");
    }
}

#[test]
fn rows_of_an_embedding() {
    let gpu = exact_device();
    let run = |d: &dyn Fn(&[u32]) -> Vec<f64>| d(&[129, 0, 77]);
    let host = weight(Codebook::Mcg, 6, 130, 128, 9);
    fn rows<D: LinearOps>(d: &D, host: &Weight, ids: &[u32]) -> Vec<f64> {
        let table = Linear::new(d, host.clone()).unwrap();
        let ids = d.upload(&HostTensor::from_u32(&[ids.len()], ids).unwrap()).unwrap();
        let mut out = d.upload(&HostTensor::from_f32(&[3, 128], &[f32::NAN; 3 * 128]).unwrap()).unwrap();
        d.embedding(EmbeddingArgs { ids: &ids, table: &table, out: &mut out }).unwrap();
        d.read_f64(&out).unwrap()
    }
    let found = run(&|ids| rows(&gpu, &host, ids));
    let expected = run(&|ids| rows(&Oracle::new(), &host, ids));
    let error = relative_norm(&found, &expected);
    assert!(error < 1e-6, "{error:e}");
}

#[test]
fn every_kernel_agrees() {
    modes().iter().for_each(kernels_agree);
}

fn kernels_agree(gpu: &TestDevice) {
    let tile = Tile { m: 32, n: 64, k: 32, units: 128, stages: 1, accumulate: Accumulate::F32 };
    let mut compared = 0;
    for (codebook, bits) in Codebook::ALL.into_iter().flat_map(|codebook| (1..=8).map(move |bits| (codebook, bits))) {
        let host = weight(codebook, bits, 200, 300, 11);
        for (m, kernel, dtype) in [
            (1, None, if gpu.is_exact() { DType::F16 } else { DType::F32 }),
            (3, Some(LinearKernel::Trellis), DType::F32),
            (9, Some(LinearKernel::Trellis), DType::BF16),
            (9, None, DType::F32),
            (3, None, DType::BF16),
            (20, None, DType::F16),
            (260, None, DType::F16),
            (3, Some(LinearKernel::SplitK { tile, splits: 3 }), DType::F32),
        ] {
            let shape = [m, 200, 300];
            if m > 1 && bits != 3 && codebook != Codebook::Mcg {
                continue;
            }
            let found = layer(gpu, shape, &host, dtype, |d, args| match kernel {
                None => d.linear(args),
                Some(kernel) => d.linear_with(kernel, args),
            });
            let expected = layer(&Oracle::new(), shape, &host, dtype, |d, args| d.linear(args));
            let error = relative_norm(&found, &expected);
            let bound = bound(gpu, kernel, dtype);
            assert!(error < bound, "{codebook:?} {bits} {m} {kernel:?} {dtype:?}: {error:e}");
            compared += 1;
        }
    }
    // One of every rate and codebook, seven more of every rate of one codebook and of one rate of the others.
    assert_eq!(compared, 24 + 7 * 8 + 7 * 2);
}

#[test]
fn kernels_of_other_formats_are_refused() {
    let gpu = exact_device();
    let linear = Linear::new(&gpu, weight(Codebook::Mcg, 4, 128, 128, 17)).unwrap();
    let x = gpu.upload(&HostTensor::from_f32_as(DType::F16, &[2, 128], &values(256, 2)).unwrap()).unwrap();
    let (planes_k, slices) = (1, 1);
    let tile = TensorTile { row_blocks: 4, planes_m: 1, planes_n: 1, planes_k, steps: 4, rescale: false, slices };
    for kernel in [
        LinearKernel::Gemv(Gemv { rows: 1, columns: 4, lanes_n: 32, lanes_k: 8 }),
        LinearKernel::TensorRows(TensorRows {
            columns: 4,
            tiles: 1,
            planes: 4,
            prefetch: false,
            staged: false,
            slices,
        }),
        LinearKernel::TensorTile(tile),
    ] {
        let mut out = gpu.zeros(DType::F32, &[2, 128]).unwrap();
        let (activation, residual) = (Activation::None, Residual::None);
        let args = LinearArgs { x: &x, weight: &linear, activation, out_scale: 1.0, residual, out: &mut out };
        match gpu.linear_with(kernel, args) {
            Err(OpError::Unsupported { what, .. }) => assert!(what.contains("exl3"), "{what}"),
            other => panic!("{kernel:?}: {other:?}"),
        }
    }
}

#[test]
fn long_rows_are_cut_into_slices() {
    let k = 4096;
    let shapes = [(128, &[1, 2, 5, 16, 30, 60, 120, 260][..]), (256, &[260])];
    for (gpu, (n, rows)) in modes().iter().flat_map(|gpu| shapes.map(|shape| (gpu, shape))) {
        let host = weight(Codebook::Mul1, 3, n, k, 13);
        for (&m, dtype) in rows.iter().flat_map(|m| [(m, DType::F16), (m, DType::F32)]) {
            let found = layer(gpu, [m, n, k], &host, dtype, |d, args| d.linear(args));
            let expected = layer(&Oracle::new(), [m, n, k], &host, dtype, |d, args| d.linear(args));
            let error = relative_norm(&found, &expected);
            assert!(error < bound(gpu, None, dtype), "{m} {n} {dtype:?}: {error:e}");
        }
    }
}

#[test]
fn gated_products_of_different_codebooks() {
    fn gated<D: LinearOps>(d: &D, m: usize, dtype: DType) -> Vec<f64> {
        let (n, k) = (130, 256);
        let gate = Linear::new(d, weight(Codebook::Mcg, 3, n, k, 21)).unwrap();
        let up = Linear::new(d, weight(Codebook::Mul1, 4, n, k, 25)).unwrap();
        let x = d.upload(&HostTensor::from_f32_as(dtype, &[m, k], &values(m * k, 6)).unwrap()).unwrap();
        let gamma = d.upload(&HostTensor::from_f32(&[k], &values(k, 7)).unwrap()).unwrap();
        let norm = Some(InputNorm { gamma: &gamma, gamma_offset: 1.0, eps: 1e-6 });
        let mut out = d.upload(&HostTensor::from_f32(&[m, n], &vec![f32::NAN; m * n]).unwrap()).unwrap();
        let activation = Activation::Silu;
        d.gated_up(GatedUpArgs { x: &x, norm, gate: &gate, up: &up, activation, out: &mut out }).unwrap();
        d.read_f64(&out).unwrap()
    }
    let rows = |dtype: DType| [1, 2, 5, 20].map(|m| (m, dtype));
    for (m, dtype) in [DType::F32, DType::F16, DType::BF16].into_iter().flat_map(rows) {
        let expected = gated(&Oracle::new(), m, dtype);
        for gpu in &modes() {
            let error = relative_norm(&gated(gpu, m, dtype), &expected);
            // Of two products.
            let bound = 2.0 * bound(gpu, None, dtype);
            assert!(error < bound, "{m} rows of {dtype:?}: {error:e}");
        }
    }
}

/// The products alone: no bias, activation or residual hides a row's size.
fn plain<D: LinearOps>(d: &D, host: &Weight, dtype: DType, x: &[f32]) -> Vec<f64> {
    let (n, k) = (host.out_features(), host.in_features());
    let m = x.len() / k;
    let weight = Linear::new(d, host.clone()).unwrap();
    let x = d.upload(&HostTensor::from_f32_as(dtype, &[m, k], x).unwrap()).unwrap();
    let mut out = d.upload(&HostTensor::from_f32(&[m, n], &vec![f32::NAN; m * n]).unwrap()).unwrap();
    let (activation, residual) = (Activation::None, Residual::None);
    d.linear(LinearArgs { x: &x, weight: &weight, activation, out_scale: 1.0, residual, out: &mut out }).unwrap();
    d.read_f64(&out).unwrap()
}

/// Sums of 14,336 products keep the precision of f32, or that of their rounded rows, of rows of any size: alone, a few
/// together, and many.
#[cfg(feature = "cuda")]
#[test]
fn rows_of_f32_keep_their_precision() {
    let (oracle, modes) = (Oracle::new(), modes());
    assert_eq!(modes.len(), 2);
    let sizes = [1.0, 1e-20, 1e-6, 7e4, 1e20, 1e30, -3.0, 65_504.0, 1e-3, 1e-34];
    // The size of the first row, and the shape.
    for (codebook, first, m, n, k) in [
        (Codebook::Mcg, 0, 1, 128, 14_336),
        (Codebook::Mul1, 0, 2, 130, 1000),
        (Codebook::Mul1, 5, 2, 256, 14_336),
        (Codebook::Mul1, 9, 2, 130, 640),
        (Codebook::ThreeInst, 0, 7, 128, 14_336),
        (Codebook::Mul1, 0, 11, 384, 14_336),
        (Codebook::Mcg, 0, 50, 256, 640),
        (Codebook::Mcg, 0, 140, 256, 14_336),
        (Codebook::Mul1, 0, 140, 384, 1000),
    ] {
        let host = Weight::exl3(matrix(codebook, 3, n, k, 51)).unwrap();
        let mut x = values(m * k, 5);
        for (row, size) in x.chunks_exact_mut(k).zip(sizes.iter().cycle().skip(first)) {
            row.iter_mut().for_each(|v| *v *= size);
        }
        // Outliers among small values.
        let last = (m - 1) * k;
        (x[last + 3], x[last + 200]) = (3e5, -1e7);
        let what = format!("{codebook:?} M={m} N={n} K={k}");
        let expected = plain(&oracle, &host, DType::F32, &x);
        for gpu in &modes {
            let bound = bound(gpu, None, DType::F32);
            crate::test_values::assert_rows(&what, &plain(gpu, &host, DType::F32, &x), &expected, n, bound);
            // What is not finite stays in its row.
            for (value, row) in [(f32::NAN, 0), (f32::INFINITY, m - 1)] {
                let mut x = x.clone();
                x[row * k + 17] = value;
                let found = plain(gpu, &host, DType::F32, &x);
                for (r, (found, expected)) in found.chunks_exact(n).zip(expected.chunks_exact(n)).enumerate() {
                    match r == row {
                        true => assert!(found.iter().all(|v| !v.is_finite()), "{what}, {value} in row {r}: {found:?}"),
                        false => crate::test_values::assert_rows(&what, found, expected, n, bound),
                    }
                }
            }
        }
    }
}

/// f16 rows of different sizes that are multiplied together do not change each other, nor does what is not finite.
#[test]
fn rows_of_f16_are_apart() {
    let (gpu, oracle) = (exact_device(), Oracle::new());
    let bound = bound(&gpu, None, DType::F16);
    for (bits, n, k) in [(3, 130, 1000), (7, 256, 512)] {
        let host = Weight::exl3(matrix(Codebook::Mul1, bits, n, k, 61)).unwrap();
        for (first, second) in [(1e-4, 6e4), (1.0, 1.0), (3e4, 1e-3)] {
            let mut x = values(2 * k, 9);
            let (a, b) = x.split_at_mut(k);
            a.iter_mut().for_each(|v| *v *= first);
            b.iter_mut().for_each(|v| *v *= second);
            let what = format!("{bits} bits, {first} and {second}");
            let expected = plain(&oracle, &host, DType::F16, &x);
            crate::test_values::assert_rows(&what, &plain(&gpu, &host, DType::F16, &x), &expected, n, bound);
            for (value, row) in [(f32::NAN, 0), (f32::NEG_INFINITY, 1)] {
                let mut x = x.clone();
                x[row * k + k - 1] = value;
                let found = plain(&gpu, &host, DType::F16, &x);
                let (bad, good) = (&found[row * n..][..n], &found[(1 - row) * n..][..n]);
                assert!(bad.iter().all(|v| !v.is_finite()), "{what}, {value} in row {row}: {bad:?}");
                crate::test_values::assert_rows(&what, good, &expected[(1 - row) * n..][..n], n, bound);
            }
        }
    }
}

/// `|dy[n]| <= 2.5e-3 |svh[n]| rms(z)`, z over the 128 outputs of n.
#[test]
fn errors_are_those_of_the_format() {
    for (gpu, dtype) in modes().iter().flat_map(|gpu| [(gpu, DType::F16), (gpu, DType::F32)]) {
        errors_are_within(gpu, dtype);
    }
}

fn errors_are_within(gpu: &TestDevice, dtype: DType) {
    for (codebook, bits, m, n, k) in [
        (Codebook::Mcg, 3, 1, 640, 1024),
        (Codebook::Mul1, 4, 2, 200, 2048),
        (Codebook::ThreeInst, 2, 4, 128, 1300),
        (Codebook::Mcg, 6, 16, 256, 1024),
        (Codebook::Mul1, 3, 70, 256, 1400),
    ] {
        let host = matrix(codebook, bits, n, k, 31);
        let svh: Vec<f64> = host.svh.iter().map(|&bits| half::f16::from_bits(bits).to_f64()).collect();
        let host = Weight::exl3(host).unwrap();
        let x = values(m * k, 5);
        let found = plain(gpu, &host, dtype, &x);
        let expected = plain(&Oracle::new(), &host, dtype, &x);
        for (row, (found, expected)) in found.chunks(n).zip(expected.chunks(n)).enumerate() {
            for start in (0..n).step_by(128) {
                let block = start..n.min(start + 128);
                let squares = block.clone().map(|i| (expected[i] / svh[i]).powi(2)).sum::<f64>();
                let rms = (squares / block.len() as f64).sqrt();
                for i in block {
                    let error = (found[i] - expected[i]).abs() / (svh[i].abs() * rms);
                    assert!(error <= 2.5e-3, "{codebook:?} {bits} row {row} column {i}: {error:e}");
                }
            }
        }
    }
}

/// `[m, k]` rows with a single 1 each, at the `place` of channel `row % k`.
#[cfg(feature = "cuda")]
fn unit_rows(gpu: &crate::Cuda, m: usize, k: usize, place: impl Fn(usize) -> usize) -> CudaTensor {
    let mut rows = vec![0.0; m * k];
    for row in 0..m {
        rows[row * k + place(row % k)] = 1.0;
    }
    gpu.upload(&HostTensor::from_f32_as(DType::F16, &[m, k], &rows).unwrap()).unwrap()
}

#[cfg(feature = "cuda")]
type CudaTensor = marlin_ops::Tensor<crate::Cuda>;

/// Rows with a single 1 after the rotation give the decoded weights, each exactly.
#[cfg(feature = "cuda")]
#[test]
fn tensor_cores_decode_exactly() {
    use super::tensor::{rows, tile};
    use crate::linear::operands::{Combine, Product};
    let gpu = exact_device();
    let k = 256;
    let rates = Codebook::ALL.into_iter().flat_map(|codebook| (1..=8).map(move |bits| (codebook, bits)));
    // Cubes of 128 columns and, where weights were decoded before, of 256.
    for ((codebook, bits), n) in rates.flat_map(|rate| [(rate, 384), (rate, 768)]) {
        let matrix = matrix(codebook, bits, n, k, 41);
        let expected = matrix.inner().unwrap();
        let trellis = crate::decode::Trellis { bits: bits as usize, codebook };
        let linear = Linear::new(&gpu, Weight::exl3(matrix).unwrap()).unwrap();
        // Weights decoded before: 257 rows; with their rows: 100, 50 and 20; by planes that share rows: 8 and 3.
        let counts = match (n, bits) {
            (768, _) => &[257][..],
            (_, 3) => &[257, 100, 50, 20, 8, 3],
            _ => &[257, 50, 8],
        };
        for &m in counts {
            // Of each tile of 16 channels, lane t has channels 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
            let lane = |channel: usize| channel % 8 / 2;
            let own = |channel: usize| channel % 16 / 8 * 2 + channel % 2;
            let out = gpu.zeros(DType::F16, &[m, n]).unwrap();
            let product = |x| Product {
                operation: "linear",
                x,
                norm: None,
                weight: linear.data(),
                up: None,
                activation: Activation::None,
                out_scale: 1.0,
                combine: Combine::Nothing,
                out: &out,
            };
            let nans = |slices: usize| {
                let nans = vec![f32::NAN; slices * m * n];
                gpu.upload(&HostTensor::from_f32(&[slices, m, n], &nans).unwrap()).unwrap()
            };
            let check = |partials: &CudaTensor| {
                let found = gpu.read_f32(partials).unwrap();
                for i in 0..m * n {
                    let sum: f32 = found.chunks(m * n).map(|slice| slice[i]).sum();
                    let (row, column) = (i / n, i % n);
                    assert_eq!(
                        sum,
                        expected[row % k * n + column].to_f32(),
                        "{codebook:?} {bits} bits, row {row} of {m}, column {column}"
                    );
                }
            };
            if m <= rows::MOST_ROWS {
                let x = unit_rows(&gpu, m, k, |channel| channel / 16 * 16 + lane(channel) * 4 + own(channel));
                let plan = rows::Plan::new(&gpu, &product(&x), trellis);
                assert!(plan.takes_rotated());
                let partials = nans(plan.slices);
                rows::multiply(&gpu, &product(&x), &plan, rows::Rows::Rotated(&x), &partials).unwrap();
                check(&partials);
                continue;
            }
            // A lane has those of two tiles together.
            let x = unit_rows(&gpu, m, k, |channel| {
                channel / 32 * 32 + lane(channel) * 8 + channel / 16 % 2 * 4 + own(channel)
            });
            // All columns at a time, and two parts of different widths.
            for columns in if m > k { vec![n, n / 3 * 2] } else { vec![n] } {
                let mut plan = tile::Plan::new(&gpu, &product(&x), trellis);
                assert_eq!(plan.columns, n);
                plan.columns = columns;
                let partials = nans(plan.slices);
                tile::multiply(&gpu, &product(&x), &plan, &x, &partials).unwrap();
                check(&partials);
            }
        }
    }
}

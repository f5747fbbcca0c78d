//! `cargo run --release -p marlin-gpu --features cuda --example tune [-- SECONDS [int4|fp4 [ROWS..]]]`: shapes of the
//! tensor-core kernels on the first CUDA device, a line each, until the time is over (600 s). Results of up to 512 rows are
//! compared with those of the kernels without tensor cores. Times as in `speed`.

#[path = "speed/measure.rs"]
mod measure;

use std::cell::RefCell;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use marlin_formats::{DType, Format};
use marlin_gpu::{Accumulate, Cuda, Gemv, LinearKernel, TensorRows, TensorTile, Tile};
use marlin_ops::linear::{Activation, LinearArgs, Residual};
use marlin_ops::{Device, Linear, Tensor};
use measure::{Bench, Random, rotation};

/// LIN16.
const TOLERANCE: f64 = 6e-4;

/// Rows whose results are compared.
const COMPARED: usize = 512;

/// Columns, tiles, planes, prefetch, staged, slices.
const fn rows(columns: usize, tiles: usize, planes: usize, prefetch: u8, staged: u8, slices: usize) -> LinearKernel {
    LinearKernel::TensorRows(TensorRows {
        columns,
        tiles,
        planes,
        prefetch: prefetch == 1,
        staged: staged == 1,
        slices,
    })
}

/// Row blocks, planes along M, N and K, steps, rescale, slices.
const fn tile(row_blocks: usize, planes: [usize; 3], steps: usize, rescale: u8, slices: usize) -> LinearKernel {
    let [planes_m, planes_n, planes_k] = planes;
    LinearKernel::TensorTile(TensorTile {
        row_blocks,
        planes_m,
        planes_n,
        planes_k,
        steps,
        rescale: rescale == 1,
        slices,
    })
}

/// What is tried for a shape: M, N, K, and kernels.
fn candidates() -> Vec<([usize; 3], Vec<LinearKernel>)> {
    let (up, down) = ([14_336, 4096], [4096, 14_336]);
    let with = |m, [n, k]: [usize; 2], kernels| ([m, n, k], kernels);
    vec![
        with(
            1,
            up,
            vec![
                rows(4, 1, 8, 0, 1, 1),
                rows(4, 1, 16, 0, 1, 1),
                rows(4, 1, 8, 0, 0, 1),
                rows(4, 1, 4, 0, 1, 1),
                rows(2, 1, 8, 0, 1, 1),
                rows(2, 1, 4, 0, 1, 1),
            ],
        ),
        with(1, down, vec![rows(4, 1, 32, 0, 1, 1), rows(4, 1, 28, 0, 1, 1), rows(2, 1, 16, 0, 1, 1)]),
        with(
            1,
            [16 * 14_336, 4096],
            vec![
                rows(4, 1, 4, 0, 1, 1),
                rows(4, 1, 8, 0, 1, 1),
                rows(4, 1, 8, 0, 0, 1),
                rows(2, 1, 4, 0, 1, 1),
                rows(2, 1, 8, 0, 1, 1),
            ],
        ),
        with(
            1,
            [16 * 4096, 14_336],
            vec![
                rows(4, 1, 8, 0, 1, 1),
                rows(4, 1, 16, 0, 1, 1),
                rows(4, 1, 8, 0, 0, 1),
                rows(2, 1, 8, 0, 1, 1),
                rows(2, 1, 16, 0, 1, 1),
            ],
        ),
        with(
            16,
            up,
            vec![
                rows(4, 2, 8, 0, 0, 1),
                rows(4, 1, 8, 0, 0, 1),
                rows(4, 2, 4, 0, 0, 1),
                rows(4, 2, 8, 0, 0, 2),
                rows(4, 4, 8, 0, 0, 2),
                tile(2, [1, 2, 4], 4, 1, 1),
                tile(2, [1, 2, 4], 4, 0, 1),
                tile(2, [1, 2, 2], 4, 1, 1),
                tile(2, [1, 1, 8], 4, 1, 1),
                tile(2, [1, 2, 8], 4, 1, 1),
            ],
        ),
        with(
            16,
            down,
            vec![
                rows(4, 1, 28, 0, 0, 1),
                rows(4, 1, 16, 0, 0, 1),
                rows(4, 2, 8, 0, 0, 2),
                rows(4, 2, 8, 0, 0, 4),
                rows(4, 2, 14, 0, 0, 2),
                rows(4, 1, 8, 0, 0, 2),
                rows(4, 1, 14, 0, 0, 2),
                rows(2, 1, 16, 0, 0, 1),
                tile(2, [1, 1, 8], 4, 1, 1),
                tile(2, [1, 1, 16], 4, 1, 1),
                tile(2, [1, 2, 4], 4, 1, 4),
                tile(2, [1, 2, 8], 4, 1, 2),
                tile(2, [1, 2, 4], 4, 1, 2),
            ],
        ),
        with(
            64,
            up,
            vec![
                tile(8, [1, 4, 2], 4, 1, 1),
                tile(8, [1, 4, 2], 4, 0, 1),
                tile(8, [1, 4, 1], 4, 1, 1),
                tile(8, [1, 4, 1], 4, 1, 2),
                tile(8, [1, 2, 4], 4, 1, 1),
                tile(8, [1, 2, 2], 4, 1, 1),
                tile(8, [1, 8, 1], 4, 1, 2),
                tile(4, [1, 4, 2], 4, 1, 1),
                tile(4, [2, 4, 1], 4, 1, 1),
            ],
        ),
        with(
            64,
            down,
            vec![
                tile(8, [1, 4, 2], 4, 1, 4),
                tile(8, [1, 4, 2], 4, 1, 2),
                tile(8, [1, 4, 2], 4, 1, 7),
                tile(8, [1, 4, 1], 4, 1, 4),
                tile(8, [1, 4, 1], 4, 1, 8),
                tile(8, [1, 2, 4], 4, 1, 2),
                tile(8, [1, 2, 4], 4, 1, 4),
                tile(8, [1, 2, 2], 4, 1, 4),
                tile(8, [1, 8, 1], 4, 1, 8),
                tile(8, [1, 4, 2], 4, 0, 4),
            ],
        ),
        with(
            512,
            down,
            vec![
                tile(16, [1, 8, 1], 4, 1, 2),
                tile(16, [1, 8, 1], 4, 1, 3),
                tile(16, [1, 8, 1], 4, 1, 4),
                tile(16, [1, 8, 1], 2, 1, 2),
                tile(16, [1, 4, 1], 4, 1, 1),
            ],
        ),
        with(512, up, vec![tile(16, [1, 8, 1], 4, 1, 1), tile(16, [1, 8, 1], 2, 1, 1), tile(16, [1, 4, 1], 4, 1, 1)]),
        with(
            4096,
            up,
            vec![
                tile(16, [1, 8, 1], 2, 1, 1),
                tile(16, [1, 4, 1], 4, 1, 1),
                tile(8, [1, 8, 1], 4, 1, 1),
                tile(16, [1, 8, 1], 4, 1, 1),
                tile(8, [2, 4, 1], 4, 1, 1),
                tile(16, [1, 4, 1], 2, 1, 1),
            ],
        ),
        with(
            4096,
            down,
            vec![
                tile(16, [1, 8, 1], 2, 1, 1),
                tile(16, [1, 4, 1], 4, 1, 1),
                tile(8, [1, 8, 1], 4, 1, 1),
                tile(16, [1, 8, 1], 4, 1, 1),
            ],
        ),
    ]
}

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let budget: f64 = arguments.next().map_or(Ok(600.0), |text| text.parse()).context("SECONDS")?;
    let formats = match arguments.next().as_deref() {
        None => vec![Format::Int4S4, Format::Fp4E2m1],
        Some("int4") => vec![Format::Int4S4],
        Some("fp4") => vec![Format::Fp4E2m1],
        Some(other) => bail!("unknown format {other}; known: int4, fp4"),
    };
    let wanted = arguments.map(|text| text.parse()).collect::<Result<Vec<usize>, _>>().context("ROWS")?;
    let start = Instant::now();
    let bench = Bench::new(false)?;
    println!("copy {:.0} GB/s", bench.copy_rate()? / 1e9);
    let mut candidates = candidates();
    candidates.retain(|([m, ..], _)| wanted.is_empty() || wanted.contains(m));
    for format in formats {
        for group in candidates.chunk_by(|([_, n, k], _), ([_, other_n, other_k], _)| (n, k) == (other_n, other_k)) {
            let [_, n, k] = group[0].0;
            let weights = Weights::new(&bench, format, n, k)?;
            for ([m, ..], kernels) in group {
                // What products with many rows lose to decoding is nearly the same for both formats.
                let tried = if format == Format::Fp4E2m1 && *m > 1 { 3.min(kernels.len()) } else { kernels.len() };
                let layer = Layer::new(&bench, &weights, *m)?;
                for kernel in &kernels[..tried] {
                    if start.elapsed().as_secs_f64() > budget {
                        println!("time is over");
                        return Ok(());
                    }
                    match layer.measure(&bench, *kernel) {
                        Ok(text) => println!("{format} {m} x {n} x {k}: {text} {kernel:?}"),
                        Err(error) => println!("{format} {m} x {n} x {k}: FAILED {kernel:?}: {error:#}"),
                    }
                }
            }
        }
    }
    println!("done in {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

/// A weight, as often as no cache holds it.
struct Weights {
    copies: Vec<Linear<Cuda>>,
    bytes: usize,
    n: usize,
    k: usize,
}

impl Weights {
    fn new(bench: &Bench, format: Format, n: usize, k: usize) -> Result<Self> {
        let weight = Random(77).weight(format, 128, n, k)?;
        let bytes = weight.size_in_bytes();
        let upload = |_| -> Result<Linear<Cuda>> { Ok(Linear::new(&bench.gpu, weight.clone())?) };
        Ok(Self { copies: (0..rotation(bytes)).map(upload).collect::<Result<_>>()?, bytes, n, k })
    }
}

/// A product and what it should give.
struct Layer<'a> {
    weights: &'a Weights,
    x: Tensor<Cuda>,
    out: RefCell<Tensor<Cuda>>,
    expected: Vec<f32>,
}

impl<'a> Layer<'a> {
    fn new(bench: &Bench, weights: &'a Weights, m: usize) -> Result<Self> {
        let x = bench.normals(DType::F16, &[m, weights.k], &mut Random(78))?;
        let out = RefCell::new(bench.gpu.zeros(DType::F16, &[m, weights.n])?);
        let mut layer = Self { weights, x, out, expected: Vec::new() };
        if m <= COMPARED {
            layer.run(bench, plain(m), 0)?;
            layer.expected = bench.gpu.read_f32(&layer.out.borrow())?;
        }
        Ok(layer)
    }

    fn run(&self, bench: &Bench, kernel: LinearKernel, i: usize) -> Result<()> {
        let weight = &self.weights.copies[i % self.weights.copies.len()];
        let (activation, residual) = (Activation::None, Residual::None);
        let out = &mut *self.out.borrow_mut();
        Ok(bench
            .gpu
            .linear_with(kernel, LinearArgs { x: &self.x, weight, activation, out_scale: 1.0, residual, out })?)
    }

    /// Time, rates and error.
    fn measure(&self, bench: &Bench, kernel: LinearKernel) -> Result<String> {
        let (m, Weights { bytes, n, k, .. }) = (self.x.rows(), self.weights);
        let mut error = String::from("not compared");
        if !self.expected.is_empty() {
            *self.out.borrow_mut() = bench.nans(DType::F16, &[m, *n])?;
            self.run(bench, kernel, 0)?;
            let relative = relative_norm(&bench.gpu.read_f32(&self.out.borrow())?, &self.expected);
            let verdict = if relative <= TOLERANCE { "" } else { " WRONG" };
            error = format!("{relative:.1e}{verdict}");
        }
        let seconds = bench.graph_seconds(2 * self.weights.copies.len(), |i| self.run(bench, kernel, i))?;
        let flops = 2.0 * (m * n * k) as f64;
        let (rate, flops) = (*bytes as f64 / seconds / 1e9, flops / seconds / 1e12);
        Ok(format!("{:.2} us {rate:.0} GB/s {flops:.1} TFLOP/s error {error}", seconds * 1e6))
    }
}

/// A kernel without tensor cores.
fn plain(m: usize) -> LinearKernel {
    match m {
        1 => LinearKernel::Gemv(Gemv { rows: 1, columns: 4, lanes_n: 32, lanes_k: 8 }),
        _ => LinearKernel::Matrix(Tile { m: 64, n: 64, k: 32, units: 128, stages: 1, accumulate: Accumulate::F32 }),
    }
}

/// `||found - expected|| / ||expected||`; NaN where something was not written.
fn relative_norm(found: &[f32], expected: &[f32]) -> f64 {
    let square = |value: f32| f64::from(value).powi(2);
    let error: f64 = found.iter().zip(expected).map(|(f, e)| square(f - e)).sum();
    (error / expected.iter().map(|e| square(*e)).sum::<f64>()).sqrt()
}

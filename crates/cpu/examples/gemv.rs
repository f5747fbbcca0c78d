//! Speed of the linear kernels: `cargo run --release -p marlin-cpu --example gemv` (`MARLIN_ISA` picks the instructions).
//!
//! Prints the rate at which one-row products (decode) read weights as a share of plain reads of memory, and the
//! arithmetic rate of 512-row products (prefill) as a share of int8 dot products on registers, both measured alongside.
//! Arguments choose formats by the start of their names; `--shape NxK` before them another shape than 3072x1024.

use std::time::Instant;

use marlin_cpu::{Cpu, CpuOptions};
use marlin_formats::exl3::{Codebook, Exl3Matrix};
use marlin_formats::{DType, Format, Group, QuantizedMatrix, Scheme, StoredGroups};
use marlin_ops::linear::{Activation, LinearArgs, Residual};
use marlin_ops::rng::{Stream, random_word};
use marlin_ops::{Device, HostTensor, Linear, LinearOps, OpError, Result, Tensor, Weight};

/// Output and input features.
type Shape = [usize; 2];

const SHAPE: Shape = [3072, 1024];
/// Sizes are whole blocks of all formats.
const MULTIPLE: usize = 256;
/// Weights are taken in turn, so that none is in a cache when its turn comes.
const ROTATED_BYTES: usize = 1 << 28;

/// What a weight is made of.
enum Kind {
    /// With a group size.
    Grouped(Format, usize),
    Dense(DType),
    /// With bits a weight.
    Exl3(Codebook, u32),
}

impl Kind {
    fn weight(&self, shape: Shape) -> Result<Weight> {
        match *self {
            Self::Grouped(format, group_size) => grouped(shape, format, group_size),
            Self::Dense(dtype) => dense(shape, dtype),
            Self::Exl3(codebook, bits) => exl3(shape, codebook, bits),
        }
    }
}

fn grouped([n, k]: Shape, format: Format, group_size: usize) -> Result<Weight> {
    let scheme = Scheme::new(format, group_size)?;
    let word = |i: usize| random_word(1, Stream::Weights, 0, 0, i as u32);
    let mask = ((1u32 << format.code_bits()) - 1) as u8;
    let codes: Vec<u8> = (0..n * k).map(|i| word(i / 4) as u8 >> (i % 4) & mask).collect();
    let (blocks, count) = (n * scheme.super_blocks(k), n * scheme.groups(k));
    if blocks > 0 {
        let (supers, bytes) = (vec![0x1000; blocks], vec![30; count]);
        let (minima, super_minima) = if format.has_offsets() { (&bytes[..], &supers[..]) } else { (&[][..], &[][..]) };
        let groups = StoredGroups::TwoLevel { super_scales: &supers, super_minima, scales: &bytes, minima };
        return Weight::quantized(QuantizedMatrix::from_stored(scheme, k, n, &codes, &groups)?);
    }
    let group = format.group_from_bits(0x2000, 0, None)?;
    let groups: Vec<Group> = vec![group; n * scheme.groups(k)];
    Weight::quantized(QuantizedMatrix::from_codes(scheme, k, n, &codes, &groups, None)?)
}

fn dense([n, k]: Shape, dtype: DType) -> Result<Weight> {
    let values: Vec<f32> = (0..n * k).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
    Weight::dense(HostTensor::from_f32_as(dtype, &[n, k], &values)?)
}

/// Random words: every bit pattern is a valid tile.
fn exl3([n, k]: Shape, codebook: Codebook, bits: u32) -> Result<Weight> {
    let words = n * k / 16 * bits as usize;
    let trellis = (0..words).map(|i| random_word(bits.into(), Stream::Weights, 1, 0, i as u32) as u16).collect();
    let (suh, svh) = (vec![0x2400; k], vec![0x3C00; n]);
    Weight::exl3(Exl3Matrix { codebook, bits, in_features: k, out_features: n, trellis, suh, svh })
}

fn rows(cpu: &Cpu, rows: usize, columns: usize) -> Result<Tensor<Cpu>> {
    let values: Vec<f32> = (0..rows * columns).map(|i| (i as f32).sin()).collect();
    cpu.upload(&HostTensor::from_f32(&[rows, columns], &values)?)
}

fn product(cpu: &Cpu, x: &Tensor<Cpu>, w: &Linear<Cpu>, out: &mut Tensor<Cpu>) -> Result<()> {
    cpu.linear(LinearArgs { x, weight: w, activation: Activation::None, out_scale: 1.0, residual: Residual::None, out })
}

/// Best of nine: seconds of one call of `f`.
fn best(mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let mut least = f64::INFINITY;
    for _ in 0..9 {
        let start = Instant::now();
        f()?;
        least = least.min(start.elapsed().as_secs_f64());
    }
    Ok(least)
}

fn measure(cpu: &Cpu, name: &str, weight: &Weight) -> Result<()> {
    let (n, k) = (weight.out_features(), weight.in_features());
    let bytes = weight.size_in_bytes();
    let count = (ROTATED_BYTES / bytes).max(1);
    let weights: Vec<Linear<Cpu>> = (0..count).map(|_| Linear::new(cpu, weight.clone())).collect::<Result<_>>()?;
    let (x, mut out) = (rows(cpu, 1, k)?, rows(cpu, 1, n)?);
    let seconds = best(|| weights.iter().try_for_each(|w| product(cpu, &x, w, &mut out)))?;
    let rate = (count * bytes) as f64 / seconds / 1e9;
    let (x, mut out) = (rows(cpu, 512, k)?, rows(cpu, 512, n)?);
    let some = &weights[..count.min(8)];
    let seconds = best(|| some.iter().try_for_each(|w| product(cpu, &x, w, &mut out)))?;
    let flops = some.len() as f64 * 2.0 * (512 * n * k) as f64 / seconds / 1e9;
    // The bounds are measured next to the kernels: the machine may be slower at times.
    let bounds = cpu.roofline()?;
    let read = rate * 1e9 / bounds.read_bytes_per_s;
    let peak = flops * 1e9 / bounds.int8_ops_per_s;
    println!("{name:16} {rate:7.1} GB/s  {read:5.2} of reads  {flops:8.0} GFLOP/s  {peak:5.2} of dot products");
    Ok(())
}

/// `NxK`.
fn parse_shape(text: &str) -> Result<Shape> {
    let sizes = text.split_once('x').and_then(|(n, k)| Some([n.parse().ok()?, k.parse().ok()?]));
    let valid = sizes.filter(|shape: &Shape| shape.iter().all(|&size| size > 0 && size.is_multiple_of(MULTIPLE)));
    valid.ok_or_else(|| {
        OpError::value("gemv", "--shape", format!("is {text:?}, expected NxK, both multiples of {MULTIPLE}"))
    })
}

fn main() -> Result<()> {
    let formats = [
        ("int4_s4 g32", Kind::Grouped(Format::Int4S4, 32)),
        ("int4_s4 g128", Kind::Grouped(Format::Int4S4, 128)),
        ("fp4 g32", Kind::Grouped(Format::Fp4E2m1, 32)),
        ("int8 g128", Kind::Grouped(Format::Int8, 128)),
        ("int3 g64", Kind::Grouped(Format::Int3, 64)),
        ("fp8_e4m3 g128", Kind::Grouped(Format::Fp8E4m3, 128)),
        ("q4_k", Kind::Grouped(Format::Q4K, 32)),
        ("q5_k", Kind::Grouped(Format::Q5K, 32)),
        ("q6_k", Kind::Grouped(Format::Q6K, 16)),
        ("iq4_xs", Kind::Grouped(Format::Iq4Xs, 32)),
        ("bf16", Kind::Dense(DType::BF16)),
        ("exl3 2 mul1", Kind::Exl3(Codebook::Mul1, 2)),
        ("exl3 3 mul1", Kind::Exl3(Codebook::Mul1, 3)),
        ("exl3 4 mul1", Kind::Exl3(Codebook::Mul1, 4)),
        ("exl3 6 mul1", Kind::Exl3(Codebook::Mul1, 6)),
        ("exl3 2 mcg", Kind::Exl3(Codebook::Mcg, 2)),
        ("exl3 3 mcg", Kind::Exl3(Codebook::Mcg, 3)),
        ("exl3 4 mcg", Kind::Exl3(Codebook::Mcg, 4)),
        ("exl3 3 3inst", Kind::Exl3(Codebook::ThreeInst, 3)),
        ("exl3 4 3inst", Kind::Exl3(Codebook::ThreeInst, 4)),
    ];
    let mut chosen: Vec<String> = std::env::args().skip(1).collect();
    let mut shape = SHAPE;
    if chosen.first().is_some_and(|option| option == "--shape") {
        shape = parse_shape(chosen.get(1).map_or("", String::as_str))?;
        chosen.drain(..2);
    }
    for exact in [false, true] {
        let cpu = Cpu::new(CpuOptions { exact, ..CpuOptions::default() })?;
        println!("{:?}, {} threads, exact {exact}", cpu.isa(), cpu.threads());
        for (name, kind) in &formats {
            if chosen.is_empty() || chosen.iter().any(|start| name.starts_with(start.as_str())) {
                measure(&cpu, name, &kind.weight(shape)?)?;
            }
        }
    }
    Ok(())
}

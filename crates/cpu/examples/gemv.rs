//! Speed of the linear kernels: `cargo run --release -p marlin-cpu --example gemv` (`MARLIN_ISA` picks the instructions).
//!
//! Prints the rate at which one-row products (decode) read weights as a share of plain reads of memory, and the
//! arithmetic rate of 512-row products (prefill) as a share of int8 dot products on registers, both measured alongside.
//! Arguments choose formats by the start of their names.

use std::time::Instant;

use marlin_cpu::{Cpu, CpuOptions};
use marlin_formats::exl3::{Codebook, Exl3Matrix};
use marlin_formats::{DType, Format, Group, QuantizedMatrix, Scheme, StoredGroups};
use marlin_ops::linear::{Activation, LinearArgs, Residual};
use marlin_ops::rng::{Stream, random_word};
use marlin_ops::{Device, HostTensor, Linear, LinearOps, Result, Tensor, Weight};

const N: usize = 3072;
const K: usize = 1024;
/// Weights are taken in turn, so that none is in a cache when its turn comes.
const ROTATED_BYTES: usize = 1 << 28;

fn weight(format: Format, group_size: usize, seed: u64) -> Result<Weight> {
    let scheme = Scheme::new(format, group_size)?;
    let word = |i: usize| random_word(seed, Stream::Weights, 0, 0, i as u32);
    let mask = ((1u32 << format.code_bits()) - 1) as u8;
    let codes: Vec<u8> = (0..N * K).map(|i| word(i / 4) as u8 >> (i % 4) & mask).collect();
    let (blocks, count) = (N * scheme.super_blocks(K), N * scheme.groups(K));
    if blocks > 0 {
        let (supers, bytes) = (vec![0x1000; blocks], vec![30; count]);
        let (minima, super_minima) = if format.has_offsets() { (&bytes[..], &supers[..]) } else { (&[][..], &[][..]) };
        let groups = StoredGroups::TwoLevel { super_scales: &supers, super_minima, scales: &bytes, minima };
        return Weight::quantized(QuantizedMatrix::from_stored(scheme, K, N, &codes, &groups)?);
    }
    let group = format.group_from_bits(0x2000, 0, None)?;
    let groups: Vec<Group> = vec![group; N * scheme.groups(K)];
    Weight::quantized(QuantizedMatrix::from_codes(scheme, K, N, &codes, &groups, None)?)
}

fn dense(dtype: DType) -> Result<Weight> {
    let values: Vec<f32> = (0..N * K).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
    Weight::dense(HostTensor::from_f32_as(dtype, &[N, K], &values)?)
}

/// Random words: every bit pattern is a valid tile.
fn exl3(codebook: Codebook, bits: u32) -> Result<Weight> {
    let words = N * K / 16 * bits as usize;
    let trellis = (0..words).map(|i| random_word(bits.into(), Stream::Weights, 1, 0, i as u32) as u16).collect();
    let (suh, svh) = (vec![0x2400; K], vec![0x3C00; N]);
    Weight::exl3(Exl3Matrix { codebook, bits, in_features: K, out_features: N, trellis, suh, svh })
}

fn rows(cpu: &Cpu, rows: usize, columns: usize) -> Result<Tensor<Cpu>> {
    let values: Vec<f32> = (0..rows * columns).map(|i| (i as f32).sin()).collect();
    cpu.upload(&HostTensor::from_f32(&[rows, columns], &values)?)
}

fn product(cpu: &Cpu, x: &Tensor<Cpu>, w: &Linear<Cpu>, out: &mut Tensor<Cpu>) -> Result<()> {
    cpu.linear(LinearArgs { x, weight: w, activation: Activation::None, out_scale: 1.0, residual: Residual::None, out })
}

/// Best of five: seconds of one call of `f`.
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
    let bytes = weight.size_in_bytes();
    let count = (ROTATED_BYTES / bytes).max(1);
    let weights: Vec<Linear<Cpu>> = (0..count).map(|_| Linear::new(cpu, weight.clone())).collect::<Result<_>>()?;
    let (x, mut out) = (rows(cpu, 1, K)?, rows(cpu, 1, N)?);
    let seconds = best(|| weights.iter().try_for_each(|w| product(cpu, &x, w, &mut out)))?;
    let rate = (count * bytes) as f64 / seconds / 1e9;
    let (x, mut out) = (rows(cpu, 512, K)?, rows(cpu, 512, N)?);
    let seconds = best(|| weights[..8].iter().try_for_each(|w| product(cpu, &x, w, &mut out)))?;
    let flops = 8.0 * 2.0 * (512 * N * K) as f64 / seconds / 1e9;
    // The bounds are measured next to the kernels: the machine may be slower at times.
    let bounds = cpu.roofline()?;
    let read = rate * 1e9 / bounds.read_bytes_per_s;
    let peak = flops * 1e9 / bounds.int8_ops_per_s;
    println!("{name:16} {rate:7.1} GB/s  {read:5.2} of reads  {flops:8.0} GFLOP/s  {peak:5.2} of dot products");
    Ok(())
}

fn main() -> Result<()> {
    let formats = [
        ("int4_s4 g32", weight(Format::Int4S4, 32, 1)?),
        ("int4_s4 g128", weight(Format::Int4S4, 128, 1)?),
        ("fp4 g32", weight(Format::Fp4E2m1, 32, 1)?),
        ("int8 g128", weight(Format::Int8, 128, 1)?),
        ("int3 g64", weight(Format::Int3, 64, 1)?),
        ("fp8_e4m3 g128", weight(Format::Fp8E4m3, 128, 1)?),
        ("q4_k", weight(Format::Q4K, 32, 1)?),
        ("q5_k", weight(Format::Q5K, 32, 1)?),
        ("q6_k", weight(Format::Q6K, 16, 1)?),
        ("iq4_xs", weight(Format::Iq4Xs, 32, 1)?),
        ("bf16", dense(DType::BF16)?),
        ("exl3 2 mul1", exl3(Codebook::Mul1, 2)?),
        ("exl3 3 mul1", exl3(Codebook::Mul1, 3)?),
        ("exl3 4 mul1", exl3(Codebook::Mul1, 4)?),
        ("exl3 6 mul1", exl3(Codebook::Mul1, 6)?),
        ("exl3 2 mcg", exl3(Codebook::Mcg, 2)?),
        ("exl3 3 mcg", exl3(Codebook::Mcg, 3)?),
        ("exl3 4 mcg", exl3(Codebook::Mcg, 4)?),
        ("exl3 3 3inst", exl3(Codebook::ThreeInst, 3)?),
        ("exl3 4 3inst", exl3(Codebook::ThreeInst, 4)?),
    ];
    let chosen: Vec<String> = std::env::args().skip(1).collect();
    for exact in [false, true] {
        let cpu = Cpu::new(CpuOptions { exact, ..CpuOptions::default() })?;
        println!("{:?}, {} threads, exact {exact}", cpu.isa(), cpu.threads());
        for (name, weight) in &formats {
            if chosen.is_empty() || chosen.iter().any(|start| name.starts_with(start.as_str())) {
                measure(&cpu, name, weight)?;
            }
        }
    }
    Ok(())
}

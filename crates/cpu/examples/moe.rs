//! Experts against dense layers: `cargo run --release -p marlin-cpu --example moe`.
//!
//! The experts of a GLM-4.7-Flash layer (64 of 2048 x 1536, int4) run as a mixture and as dense gated MLPs that read the
//! same bytes and compute the same products: for one token the 4 chosen experts, for 512 tokens all of them with 32 rows
//! each. The ratio is dense time / mixture time; runs alternate.

use std::time::Instant;

use marlin_cpu::{Cpu, CpuOptions};
use marlin_formats::{Format, Group, QuantizedMatrix, Scheme};
use marlin_ops::linear::{Activation, GatedUpArgs, LinearArgs, Residual};
use marlin_ops::moe::ExpertMlpArgs;
use marlin_ops::rng::{Stream, random_word};
use marlin_ops::{Device, ExpertStack, ExpertWeights, HostTensor, Linear, LinearOps, MoeOps, Result, Tensor, Weight};

const EXPERTS: usize = 64;
const TOP_K: usize = 4;
const HIDDEN: usize = 2048;
const INTERMEDIATE: usize = 1536;
const ROUNDS: usize = 15;

fn weight(out_features: usize, in_features: usize, seed: u64) -> Result<Weight> {
    let format = Format::Int4S4;
    let scheme = Scheme::new(format, 128)?;
    let word = |i: usize| random_word(seed, Stream::Weights, 0, 0, i as u32);
    let count = out_features * in_features;
    let codes: Vec<u8> = (0..count.div_ceil(4)).flat_map(|i| word(i).to_le_bytes()).map(|b| b & 15).collect();
    let group = format.group_from_bits(0x2000, 0, None)?;
    let groups: Vec<Group> = vec![group; out_features * scheme.groups(in_features)];
    Weight::quantized(QuantizedMatrix::from_codes(scheme, in_features, out_features, &codes[..count], &groups, None)?)
}

fn expert(seed: u64) -> Result<ExpertWeights> {
    Ok(ExpertWeights {
        gate: weight(INTERMEDIATE, HIDDEN, seed)?,
        up: weight(INTERMEDIATE, HIDDEN, seed + 1)?,
        down: weight(HIDDEN, INTERMEDIATE, seed + 2)?,
    })
}

fn rows(cpu: &Cpu, rows: usize, columns: usize) -> Result<Tensor<Cpu>> {
    let values: Vec<f32> = (0..rows * columns).map(|i| (i as f32).sin()).collect();
    cpu.upload(&HostTensor::from_f32(&[rows, columns], &values)?)
}

/// A dense gated MLP with its scratch.
struct Dense {
    gate: Linear<Cpu>,
    up: Linear<Cpu>,
    down: Linear<Cpu>,
}

impl Dense {
    fn run(&self, cpu: &Cpu, x: &Tensor<Cpu>, inner: &mut Tensor<Cpu>, out: &mut Tensor<Cpu>) -> Result<()> {
        let activation = Activation::Silu;
        cpu.gated_up(GatedUpArgs { x, norm: None, gate: &self.gate, up: &self.up, activation, out: inner })?;
        let (activation, residual) = (Activation::None, Residual::InPlace);
        cpu.linear(LinearArgs { x: inner, weight: &self.down, activation, out_scale: 1.0, residual, out })
    }
}

fn seconds(f: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    f()?;
    Ok(start.elapsed().as_secs_f64())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> Result<()> {
    let cpu = Cpu::new(CpuOptions::default())?;
    let experts = (0..EXPERTS as u64).map(|e| expert(3 * e)).collect::<Result<Vec<_>>>()?;
    let dense = experts
        .iter()
        .map(|e| {
            let linear = |weight: &Weight| Linear::new(&cpu, weight.clone());
            Ok(Dense { gate: linear(&e.gate)?, up: linear(&e.up)?, down: linear(&e.down)? })
        })
        .collect::<Result<Vec<_>>>()?;
    let stack = ExpertStack::new(&cpu, experts)?;
    println!("{:?}, {} threads", cpu.isa(), cpu.threads());
    for tokens in [1, 512] {
        let x = rows(&cpu, tokens, HIDDEN)?;
        // Expert ids that use all experts alike, and other ones in each round so that no weight stays in a cache.
        let ids = |round: usize| (0..tokens * TOP_K).map(move |a| ((a * 5 + round * TOP_K * 5) % EXPERTS) as u32);
        let weights = cpu.upload(&HostTensor::from_f32(&[tokens, TOP_K], &vec![0.25; tokens * TOP_K])?)?;
        let mut out = rows(&cpu, tokens, HIDDEN)?;
        let per_expert = (tokens * TOP_K / EXPERTS).max(1);
        let (own, mut inner) = (rows(&cpu, per_expert, HIDDEN)?, rows(&cpu, per_expert, INTERMEDIATE)?);
        let mut own_out = rows(&cpu, per_expert, HIDDEN)?;
        let (mut mixture, mut separate) = (Vec::new(), Vec::new());
        for round in 0..ROUNDS {
            let chosen: Vec<u32> = ids(2 * round).collect();
            let host = HostTensor::from_u32(&[tokens, TOP_K], &chosen)?;
            let chosen = cpu.upload(&host)?;
            mixture.push(seconds(|| {
                cpu.moe_expert_mlp(ExpertMlpArgs {
                    x: &x,
                    ids: &chosen,
                    weights: &weights,
                    experts: &stack,
                    activation: Activation::Silu,
                    residual: Residual::InPlace,
                    out: &mut out,
                })
            })?);
            let mut used: Vec<u32> = ids(2 * round + 1).collect();
            used.sort_unstable();
            used.dedup();
            separate.push(seconds(|| {
                used.iter().try_for_each(|&e| dense[e as usize].run(&cpu, &own, &mut inner, &mut own_out))
            })?);
        }
        let ratios: Vec<f64> = separate.iter().zip(&mixture).map(|(dense, mixture)| dense / mixture).collect();
        let flops = 6.0 * (tokens * TOP_K * HIDDEN * INTERMEDIATE) as f64;
        let rate = |times: Vec<f64>| flops / median(times) / 1e9;
        println!(
            "{tokens:4} tokens: mixture {:6.0} GFLOP/s, dense {:6.0} GFLOP/s, ratio {:.2}",
            rate(mixture),
            rate(separate),
            median(ratios)
        );
    }
    Ok(())
}

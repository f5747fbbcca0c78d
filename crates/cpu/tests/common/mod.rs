//! Devices under test and comparison against the oracle.

#![allow(dead_code)] // Each test file uses a part.

use marlin_cpu::{Cpu, CpuOptions, Isa};
use marlin_formats::DType;
use marlin_ops::oracle::Oracle;
use marlin_ops::rng::{Stream, random_word, uniform};
use marlin_ops::{Backend, HostTensor, Result, Tensor};

/// Every instruction set of this machine with two thread counts.
pub fn cpus(exact: bool) -> Vec<Cpu> {
    let sets = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Neon];
    let found: Vec<Cpu> = sets
        .into_iter()
        .flat_map(|isa| [(isa, 1), (isa, 3)])
        .filter_map(|(isa, threads)| {
            let threads = Some(threads);
            Cpu::new(CpuOptions { threads, exact, isa }).ok()
        })
        .collect();
    assert!(found.len() >= 2, "the portable set is always there");
    found
}

/// The oracle of a mode.
pub fn oracle(exact: bool) -> Oracle {
    if exact { Oracle::new() } else { Oracle::with_int8_activations() }
}

/// Reproducible values, roughly normal.
pub fn normals(count: usize, seed: u64) -> Vec<f32> {
    (0..count as u32)
        .map(|i| {
            let word = |part| uniform(random_word(seed, Stream::Weights, part, 0, i));
            let sum: f64 = (0..6).map(word).sum();
            ((sum - 3.0) * 1.414) as f32
        })
        .collect()
}

pub fn upload<B: Backend>(device: &B, dims: &[usize], values: &[f32]) -> Result<Tensor<B>> {
    device.upload(&HostTensor::from_f32(dims, values)?)
}

pub fn upload_as<B: Backend>(device: &B, dtype: DType, dims: &[usize], values: &[f32]) -> Result<Tensor<B>> {
    device.upload(&HostTensor::from_f32_as(dtype, dims, values)?)
}

pub fn upload_ids<B: Backend>(device: &B, dims: &[usize], values: &[u32]) -> Result<Tensor<B>> {
    device.upload(&HostTensor::from_u32(dims, values)?)
}

/// An output full of NaN, so that an element left unwritten shows.
pub fn poisoned<B: Backend>(device: &B, dims: &[usize]) -> Result<Tensor<B>> {
    upload(device, dims, &vec![f32::NAN; dims.iter().product()])
}

/// Relative Frobenius error at most `tolerance`, and no element off by more than 30 times that of the RMS.
pub fn assert_close(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let norm = |v: &mut dyn Iterator<Item = f64>| v.map(|v| v * v).sum::<f64>().sqrt();
    let reference = norm(&mut expected.iter().copied());
    let error = norm(&mut found.iter().zip(expected).map(|(f, e)| f - e));
    assert!(error <= tolerance * reference, "{what}: relF {:e}, bound {tolerance:e}", error / reference);
    let rms = reference / (expected.len() as f64).sqrt();
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!((f - e).abs() <= 30.0 * tolerance * rms.max(e.abs()), "{what}: [{i}] is {f}, expected {e}");
    }
}

/// A computation that runs on any backend.
pub trait Computation {
    fn run<B: Backend>(&self, device: &B) -> Result<Vec<f64>>;
}

/// Every instruction set agrees with the oracle, and thread counts with each other bit by bit.
pub fn check(computation: &impl Computation, exact: bool, tolerance: f64, what: &str) {
    let expected = computation.run(&oracle(exact)).unwrap();
    let cpus = cpus(exact);
    for pair in cpus.chunks(2) {
        let isa = pair[0].isa();
        let found = computation.run(&pair[0]).unwrap();
        assert_close(&found, &expected, tolerance, &format!("{what}, {isa:?}"));
        let threaded = computation.run(&pair[1]).unwrap();
        let bits = |v: &[f64]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&found), bits(&threaded), "{what}, {isa:?}: threads");
    }
}

//! Logits of every golden model against transformers, whole prompt, token by token and in pieces.

mod common;

use std::collections::HashSet;
use std::sync::Arc;

use common::parity::{check, check_all_golden_models};
use common::{bundled, golden_folders};
use marlin_cpu::{Cpu, CpuOptions, Isa};
use marlin_models::{Architecture, ModelConfig};
use marlin_ops::oracle::Oracle;

fn cpu(exact: bool, isa: Isa) -> Cpu {
    let options = CpuOptions { exact, isa, ..CpuOptions::default() };
    Cpu::new(options).unwrap()
}

#[test]
fn every_architecture_has_a_golden_model() {
    let present: HashSet<Architecture> =
        golden_folders().iter().map(|dir| ModelConfig::from_dir(dir).unwrap().architecture).collect();
    for architecture in Architecture::ALL {
        assert!(present.contains(&architecture), "{architecture:?} has no golden model");
    }
}

#[test]
fn oracle_equals_transformers() {
    check_all_golden_models(Oracle::new());
}

#[test]
fn cpu_equals_transformers() {
    check_all_golden_models(cpu(true, Isa::Auto));
}

/// Dense weights take f32 activations in the fast mode too.
#[test]
fn cpu_in_fast_mode_equals_transformers() {
    check_all_golden_models(cpu(false, Isa::Auto));
}

#[test]
fn cpu_without_simd_equals_transformers() {
    check_all_golden_models(cpu(true, Isa::Portable));
}

/// bf16 weights, f32 activations and cache.
#[test]
fn bundled_model_equals_transformers() {
    let (dir, golden) = bundled();
    let failures = check(&Arc::new(cpu(true, Isa::Auto)), &dir, &golden);
    assert!(failures.is_empty(), "beyond the tolerance:\n{}", failures.join("\n"));
}

//! Logits against llama.cpp, which evaluates the same weights decoded to f32 (its own kernels for quantized weights
//! round the activations to 8 bits).

use std::collections::HashSet;
use std::sync::Arc;

use marlin_cpu::{Cpu, CpuOptions};
use marlin_models::{Architecture, Checkpoint, ModelConfig};
use marlin_ops::Backend;
use marlin_ops::oracle::Oracle;

use crate::common::Golden;
use crate::common::parity::check;
use crate::golden;

const MODELS: [&str; 8] =
    ["llama-spm", "llama-bpe", "qwen3", "qwen3moe", "deepseek2-split", "deepseek2-joined", "blocks", "experts"];

fn check_all<B: Backend>(backend: B) {
    let backend = Arc::new(backend);
    let mut failures = Vec::new();
    for name in MODELS {
        let expected = Golden::read(&golden(&format!("{name}.safetensors")));
        failures.extend(check(&backend, &golden(&format!("{name}.gguf")), &expected));
    }
    assert!(failures.is_empty(), "beyond the tolerance:\n{}", failures.join("\n"));
}

#[test]
fn oracle_equals_llama_cpp() {
    check_all(Oracle::new());
}

#[test]
fn cpu_equals_llama_cpp() {
    check_all(Cpu::new(CpuOptions { exact: true, ..CpuOptions::default() }).unwrap());
}

#[test]
fn every_architecture_and_type_is_covered() {
    let configs = MODELS.map(|name| ModelConfig::from_dir(&golden(&format!("{name}.gguf"))).unwrap());
    let found: HashSet<Architecture> = configs.iter().map(|config| config.architecture).collect();
    for architecture in [
        Architecture::Llama,
        Architecture::Qwen3,
        Architecture::Qwen3Moe,
        Architecture::DeepseekV2,
        Architecture::DeepseekV3,
    ] {
        assert!(found.contains(&architecture), "{architecture:?}");
    }
    let checkpoint = Checkpoint::open(&golden("blocks.gguf")).unwrap();
    let types: HashSet<&str> = checkpoint.names().map(|name| checkpoint.get(name).unwrap().encoding).collect();
    assert_eq!(types.len(), 15, "{types:?}");
}

/// What `marlin inspect` shows of a module.
#[test]
fn encodings_are_those_of_the_file() {
    let checkpoint = Checkpoint::open(&golden("blocks.gguf")).unwrap();
    let encoding = checkpoint.gguf_encoding("model.layers.0.self_attn.k_proj", 32, 256);
    assert_eq!(encoding, Some(("Q3_K", 32 * 110)));
    let experts = Checkpoint::open(&golden("experts.gguf")).unwrap();
    let encoding = experts.gguf_encoding("model.layers.0.mlp.experts.3.up_proj", 32, 32);
    assert_eq!(encoding, Some(("Q5_0", 32 * 22)));
    let split = Checkpoint::open(&golden("deepseek2-split.gguf")).unwrap();
    let encoding = split.gguf_encoding("model.layers.1.self_attn.kv_b_proj", 4 * (16 + 12), 16);
    assert_eq!(encoding, Some(("F32", 4 * 28 * 16 * 4)));
}

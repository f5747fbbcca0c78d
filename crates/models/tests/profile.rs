//! What a device's profiler records of whole models.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{golden_folder, load};
use marlin_cpu::{Cpu, CpuOptions};
use marlin_models::{Checkpoint, KvCache, Logits, MlpConfig, Model, ModelConfig, ModuleKind};
use marlin_ops::Device;
use marlin_ops::profile::{Cost, Record};

/// Records of `tokens` after a prompt of five.
fn record(model: &Model<Cpu>, tokens: &[u32]) -> Vec<Record> {
    let mut cache = KvCache::new(model, 128).unwrap();
    let mut scratch = model.scratch(1).unwrap();
    model.forward(&[1, 2, 3, 4, 5], &mut cache, &mut scratch, Logits::Last).unwrap();
    let profiler = model.backend().profiler().expect("the CPU has one");
    profiler.start();
    model.forward(tokens, &mut cache, &mut scratch, Logits::Last).unwrap();
    let records = profiler.take();
    model.forward(tokens, &mut cache, &mut scratch, Logits::Last).unwrap();
    assert!(profiler.take().is_empty(), "nothing is recorded unasked");
    records
}

fn total(records: &[Record]) -> Cost {
    let mut total = Cost::default();
    for record in records {
        assert!(record.calls > 0 && record.seconds > 0.0, "{record:?}");
        total += record.cost;
    }
    total
}

fn calls(records: &[Record], name: &str) -> u64 {
    records.iter().filter(|r| r.operation.name == name).map(|r| r.calls).sum()
}

/// The share of each layer's experts that a token reads; all layers of the models here are alike.
fn chosen_share(config: &ModelConfig) -> (usize, usize) {
    let moe = config.layers.iter().find_map(|layer| match layer.mlp {
        MlpConfig::Moe { experts, routing, .. } => Some((routing.top_k, experts)),
        MlpConfig::Dense { .. } => None,
    });
    moe.unwrap_or((0, 1))
}

/// Stored bytes that one token reads, and the multiply-adds of its products, attention aside.
fn expected(dir: &Path, config: &ModelConfig) -> (usize, usize) {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let (mut bytes, mut products) = (0, 0);
    let (top_k, experts) = chosen_share(config);
    for module in config.linear_modules() {
        let (n, k) = (module.out_features, module.in_features);
        let weight = checkpoint.weight(&config.quantization, &module.name, n, k, module.bias).unwrap();
        let size = weight.size_in_bytes();
        let (read, multiplied) = match module.kind {
            ModuleKind::Embedding if config.tie_word_embeddings => (size + size / n, n * k),
            ModuleKind::Embedding => (size / n, 0),
            ModuleKind::Router => (4 * n * k, n * k),
            // Experts of a layer have the same size; the sum over them comes out whole.
            ModuleKind::Expert => (size * top_k / experts, n * k * top_k / experts),
            // Part of the attention.
            _ if module.name.ends_with("kv_b_proj") => (size, 0),
            _ => (size, n * k),
        };
        bytes += read;
        products += multiplied;
    }
    (bytes + config.vector_tensors().iter().map(|v| 4 * v.len).sum::<usize>(), products)
}

/// Every weight is read once by a decoded token, but for experts that are not chosen and rows of the embedding.
#[test]
fn a_decoded_token_reads_every_weight_once() {
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/marlin-stories-int4");
    for dir in ["qwen3-base", "llama-biases", "qwen3_moe-base", "glm4_moe_lite-base"].map(golden_folder) {
        check_decode(&dir, false);
    }
    check_decode(&bundled, true);
    check_decode(&bundled, false);
}

fn check_decode(dir: &Path, fast: bool) {
    let options = CpuOptions { exact: !fast, threads: Some(1), ..CpuOptions::default() };
    let model = load(&Arc::new(Cpu::new(options).unwrap()), dir, 512);
    let config = model.config();
    let records = record(&model, &[6]);
    let (bytes, products) = expected(dir, config);
    let found = total(&records);
    assert_eq!(found.weight_bytes, bytes as u64, "{}: {records:#?}", dir.display());

    let layers = config.num_layers as u64;
    assert_eq!(calls(&records, "attention") + calls(&records, "mla_decode") + calls(&records, "mla_prefill"), layers);
    assert_eq!(calls(&records, "kv_write") + calls(&records, "mla_latent_write"), layers);
    let moe = config.layers.iter().filter(|layer| matches!(layer.mlp, MlpConfig::Moe { .. })).count();
    assert_eq!(calls(&records, "moe_route"), moe as u64);
    assert_eq!(calls(&records, "moe_expert_mlp"), moe as u64);
    assert_eq!(calls(&records, "embedding"), 1);
    // Of one sequence, as much as its first token has written.
    let per_token = KvCache::new(&model, 64).unwrap().size_in_bytes() / 64;
    assert_eq!(found.cache_bytes, 6 * per_token as u64, "{}", dir.display());

    let of_weights = records.iter().filter(|r| r.operation.weights.is_some() && r.operation.family != "attention");
    let of_weights: Vec<Record> = of_weights.copied().collect();
    let flops = total(&of_weights).flops() as usize;
    // The norms of their inputs and the experts' weighted sum come on top.
    assert!(flops >= 2 * products && flops < 2 * products + 200 * config.hidden_size * config.num_layers);
    let plain = of_weights.iter().filter(|r| r.operation.weights.is_some_and(|format| !format.starts_with("int")));
    let plain: Vec<Record> = plain.copied().collect();
    assert_eq!(total(&plain).int8_flops, 0);
    assert_eq!(found.int8_flops > 0, fast, "{}", dir.display());
}

/// Several tokens that share experts read each of them once.
#[test]
fn a_prompt_reads_an_expert_once() {
    let dir = golden_folder("qwen3_moe-base");
    let model = load(&Arc::new(Cpu::new(CpuOptions::default()).unwrap()), &dir, 512);
    let prompt: Vec<u32> = (0..40).map(|i| i * 3).collect();
    let [one, many] = [&prompt[..1], &prompt[..]].map(|tokens| {
        let records = record(&model, tokens);
        let experts = records.iter().find(|r| r.operation.name == "moe_expert_mlp");
        experts.expect("a mixture of experts").cost
    });
    let (top_k, experts) = chosen_share(model.config());
    assert!(many.weight_bytes > one.weight_bytes);
    assert!(many.weight_bytes <= one.weight_bytes * experts as u64 / top_k as u64);
    assert_eq!(many.flops(), 40 * one.flops());
}

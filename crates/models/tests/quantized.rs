//! Quantized models from files: the logits are those of the decoded weights, on every backend.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use common::{Golden, golden_folder, load, max_difference};
use marlin_cpu::{Cpu, CpuOptions};
use marlin_formats::{Format, QuantizedMatrix, Scheme};
use marlin_models::{Checkpoint, KvCache, ModelConfig, ModuleKind, QuantizationConfig, Writer};
use marlin_ops::oracle::Oracle;
use marlin_ops::{Backend, HostTensor, InputOrder, Weight};

/// Of the largest |logit|.
const TOLERANCE: f32 = 1e-4;

/// Writes a golden model with its linear layers (router aside) quantized to `scheme`, and beside it the model of the
/// decoded weights in f32. If `ordered`, the rows of every matrix are in an order of their own.
fn write_quantized(from: &Path, scheme: Scheme, ordered: bool, quantized: &Path, decoded: &Path) {
    let config = ModelConfig::from_dir(from).unwrap();
    let checkpoint = Checkpoint::open(from).unwrap();
    let mut writers = [quantized, decoded].map(|out| Writer::create(out).unwrap());
    let mut ignored = Vec::new();
    for module in config.linear_modules() {
        let (name, n, k) = (&module.name, module.out_features, module.in_features);
        let weight = checkpoint.weight(&config.quantization, name, n, k, module.bias).unwrap();
        let values = weight.to_f32().unwrap();
        let stored = format!("{name}.weight");
        if let Some(bias) = &weight.bias {
            let bias = HostTensor::from_f32(&[n], bias).unwrap();
            for writer in &mut writers {
                writer.host_tensor(&format!("{name}.bias"), &bias).unwrap();
            }
        }
        if module.kind == ModuleKind::Router {
            ignored.push(name.clone());
            let values = HostTensor::from_f32(&[n, k], &values).unwrap();
            for writer in &mut writers {
                writer.host_tensor(&stored, &values).unwrap();
            }
            continue;
        }
        let order = |row: usize| if ordered { (k - 1 - row + name.len()) % k } else { row };
        let order = InputOrder::new((0..k).map(|row| order(row) as u32).collect()).unwrap();
        let mut sorted = values.clone();
        values.chunks(k).zip(sorted.chunks_mut(k)).for_each(|(row, sorted)| order.gather(row, sorted));
        let matrix = QuantizedMatrix::encode(scheme, &sorted, n, k).unwrap();
        writers[0].matrix(name, &matrix, ordered.then_some(&order)).unwrap();
        let weight = Weight::quantized(matrix).unwrap().with_input_order(order).unwrap();
        writers[1].host_tensor(&stored, &HostTensor::from_f32(&[n, k], &weight.to_f32().unwrap()).unwrap()).unwrap();
    }
    for vector in config.vector_tensors() {
        let values = checkpoint.vector(&vector.name, vector.len).unwrap();
        let values = HostTensor::from_f32(&[vector.len], &values).unwrap();
        for writer in &mut writers {
            writer.host_tensor(&vector.name, &values).unwrap();
        }
    }
    let json = std::fs::read_to_string(from.join("config.json")).unwrap();
    let plain: serde_json::Value = serde_json::from_str(&json).unwrap();
    let mut described = plain.clone();
    let quantization = QuantizationConfig::new(scheme, BTreeMap::new(), &ignored).unwrap();
    described["quantization_config"] = quantization.to_json();
    let [quantized, decoded] = writers;
    quantized.finish(&described).unwrap();
    decoded.finish(&plain).unwrap();
}

fn logits<B: Backend>(backend: &Arc<B>, dir: &Path, tokens: &[u32]) -> Vec<f32> {
    let model = load(backend, dir, 512);
    let mut cache = KvCache::new(&model, tokens.len()).unwrap();
    let mut scratch = model.scratch(tokens.len()).unwrap();
    // Some rows as a prompt, the others one by one.
    let (prompt, rest) = tokens.split_at(tokens.len() - 4);
    let mut all = model.logits(prompt, &mut cache, &mut scratch).unwrap();
    for token in rest {
        all.extend(model.logits(&[*token], &mut cache, &mut scratch).unwrap());
    }
    all
}

fn check(folder: &str) {
    let dir = golden_folder(folder);
    let golden = Golden::read(&dir.join("golden.safetensors"));
    let oracle = Arc::new(Oracle::new());
    let options = CpuOptions { exact: true, ..CpuOptions::default() };
    let cpu = Arc::new(Cpu::new(options).unwrap());
    for format in Format::ENCODABLE {
        let temporary = tempfile::tempdir().unwrap();
        let quantized = temporary.path().join("quantized");
        let decoded = temporary.path().join("decoded");
        let scheme = Scheme::with_default_group(format);
        write_quantized(&dir, scheme, false, &quantized, &decoded);
        let expected = logits(&oracle, &decoded, &golden.tokens);
        let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let found = logits(&oracle, &quantized, &golden.tokens);
        assert_eq!(found, expected, "{folder} {format}: the oracle decodes exactly");
        let on_cpu = logits(&cpu, &quantized, &golden.tokens);
        let error = max_difference(&on_cpu, &expected) / scale;
        println!("{folder} {format}: {error:.2e}");
        assert!(error <= TOLERANCE, "{folder} {format}: {error:.2e}");
        // The weights did change.
        assert!(max_difference(&found, &golden.logits) > 1e-4 * scale, "{folder} {format}");
    }
}

/// Embeddings, latent attention, experts and the head, each with its rows in an order of its own; those of the formats whose dense
/// values, where an operation needs these, are f32.
#[test]
fn rows_in_orders_of_their_own() {
    let cpu = Arc::new(Cpu::new(CpuOptions { exact: true, ..CpuOptions::default() }).unwrap());
    for folder in ["glm4_moe_lite-base", "qwen3_moe-base"] {
        let dir = golden_folder(folder);
        let tokens = Golden::read(&dir.join("golden.safetensors")).tokens;
        for format in [Format::Mxfp4, Format::Nvfp4] {
            let temporary = tempfile::tempdir().unwrap();
            let [quantized, decoded] = ["quantized", "decoded"].map(|name| temporary.path().join(name));
            write_quantized(&dir, Scheme::with_default_group(format), true, &quantized, &decoded);
            let expected = logits(&Arc::new(Oracle::new()), &decoded, &tokens);
            let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let found = logits(&cpu, &quantized, &tokens);
            let error = max_difference(&found, &expected) / scale;
            assert!(error <= TOLERANCE, "{folder} {format}: {error:.2e}");
        }
    }
}

#[test]
fn mla_mixture_of_experts() {
    check("glm4_moe_lite-base");
}

#[test]
fn gqa_with_biases() {
    check("llama-biases");
}

#[test]
fn gqa_mixture_of_experts() {
    check("qwen3_moe-base");
}

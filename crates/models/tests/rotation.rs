//! Rotated models compute the logits of the models they were made from.

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Golden, bundled, golden_folder, golden_folders, max_difference};
use marlin_cpu::{Cpu, CpuOptions};
use marlin_formats::DType;
use marlin_models::{Checkpoint, KvCache, LoadOptions, Logits, Model, ModelConfig, ModelError};
use marlin_ops::Backend;
use marlin_ops::oracle::Oracle;

/// Of the largest |logit|, as for the models as they are stored.
const TOLERANCE: f32 = 1e-4;

fn open(dir: &Path) -> (Checkpoint, ModelConfig) {
    (Checkpoint::open(dir).unwrap(), ModelConfig::from_dir(dir).unwrap())
}

fn rotated(dir: &Path) -> (Checkpoint, ModelConfig) {
    let (mut checkpoint, mut config) = open(dir);
    checkpoint.rotate(&mut config).unwrap();
    (checkpoint, config)
}

fn logits<B: Backend>(backend: &Arc<B>, (checkpoint, config): (Checkpoint, ModelConfig), tokens: &[u32]) -> Vec<f32> {
    let options = LoadOptions { cache_dtype: DType::F32, ..LoadOptions::default() };
    let model = Model::load(Arc::clone(backend), &checkpoint, config, options).unwrap();
    let mut cache = KvCache::new(&model, tokens.len()).unwrap();
    let mut scratch = model.scratch(tokens.len()).unwrap();
    let logits = model.forward(tokens, &mut cache, &mut scratch, Logits::All).unwrap();
    backend.read_f32(logits).unwrap()
}

fn check<B: Backend>(backend: &Arc<B>, dir: &Path, golden: &Golden) {
    let error = max_difference(&logits(backend, rotated(dir), &golden.tokens), &golden.logits) / golden.scale();
    println!("{}: {error:.2e}", dir.display());
    assert!(error <= TOLERANCE, "{}: {error:.2e}", dir.display());
}

fn exact() -> Arc<Cpu> {
    Arc::new(Cpu::new(CpuOptions { exact: true, ..CpuOptions::default() }).unwrap())
}

#[test]
fn rotated_golden_models_equal_transformers() {
    let (cpu, oracle) = (exact(), Arc::new(Oracle::new()));
    for dir in golden_folders() {
        let golden = Golden::read(&dir.join("golden.safetensors"));
        check(&cpu, &dir, &golden);
        check(&oracle, &dir, &golden);
    }
}

#[test]
fn the_rotated_bundled_model_equals_transformers() {
    let (dir, golden) = bundled();
    check(&exact(), &dir, &golden);
}

/// Every weight but those that nothing rotated reaches is another, and norms are 1.
#[test]
fn every_weight_is_rotated() {
    for name in ["glm4_moe_lite-base", "qwen3-yarn_bias", "qwen3_moe-fused", "deepseek_v2-biases_tied"] {
        let dir = golden_folder(name);
        let ((before, config), (mut after, mut untied)) = (open(&dir), rotated(&dir));
        after.rotate(&mut untied).unwrap();
        assert!(!untied.tie_word_embeddings);
        assert!(after.is_rotated() && !before.is_rotated());
        let energy = |values: &[f32]| values.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>();
        for module in config.linear_modules().iter().filter(|module| !module.name.contains(".experts.")) {
            let tensor = format!("{}.weight", module.name);
            let read = |checkpoint: &Checkpoint| {
                let (n, k) = (module.out_features, module.in_features);
                checkpoint.weight(&config.quantization, &module.name, n, k, module.bias).unwrap().to_f32().unwrap()
            };
            let (old, new) = (read(&before), read(&after));
            assert!(after.rotation_changes(&tensor), "{name} {tensor}");
            assert_ne!(old, new, "{name} {tensor}");
            // No norm before it: an orthonormal matrix keeps the sum of squares.
            if ["o_proj", "down_proj", "embed_tokens"].iter().any(|part| module.name.ends_with(part)) {
                assert!((energy(&new) / energy(&old) - 1.0).abs() < 1e-6, "{name} {tensor}");
            }
        }
        for vector in config.vector_tensors() {
            let values = after.vector(&vector.name, vector.len).unwrap();
            let kept = vector.correction_bias || vector.name.contains("q_norm") || vector.name.contains("k_norm");
            assert_eq!(after.rotation_changes(&vector.name), !kept, "{name} {}", vector.name);
            match kept {
                true => assert_eq!(values, before.vector(&vector.name, vector.len).unwrap()),
                false => assert!(values.iter().all(|&value| value == 1.0), "{name} {}", vector.name),
            }
        }
    }
}

#[test]
fn quantized_models_and_damaged_norms_are_refused() {
    let (mut checkpoint, mut config) = open(&bundled().0.with_file_name("marlin-stories-int4"));
    let error = checkpoint.rotate(&mut config).unwrap_err();
    assert!(matches!(&error, ModelError::Config { field, .. } if field == "quantization_config"), "{error}");
    assert!(!checkpoint.is_rotated());

    // The norms of another model.
    let (mut checkpoint, _) = open(&golden_folder("qwen3-base"));
    let (_, mut config) = open(&golden_folder("glm4_moe_lite-base"));
    let error = checkpoint.rotate(&mut config).unwrap_err();
    assert!(matches!(error, ModelError::MissingTensor { .. } | ModelError::TensorShape { .. }), "{error}");
}

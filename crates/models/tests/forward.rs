//! Caches, limits and loading errors of the forward pass, on the oracle with the golden models.

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use common::{Golden, golden_folder, load, max_difference, try_load};
use marlin_formats::DType;
use marlin_models::{Checkpoint, KvCache, LoadOptions, Logits, Model, ModelConfig, ModelError};
use marlin_ops::oracle::Oracle;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

fn oracle() -> Arc<Oracle> {
    Arc::new(Oracle::new())
}

fn golden(name: &str) -> (Model<Oracle>, Golden) {
    let dir = golden_folder(name);
    (load(&oracle(), &dir, 512), Golden::read(&dir.join("golden.safetensors")))
}

#[test]
fn truncated_cache_continues_as_if_the_rest_had_never_been() {
    for name in ["glm4_moe_lite-base", "qwen3-sliding"] {
        let (model, golden) = golden(name);
        let mut scratch = model.scratch(1).unwrap();
        let mut cache = KvCache::new(&model, 16).unwrap();
        let other: Vec<u32> = golden.tokens[..16].iter().rev().copied().collect();
        model.forward(&golden.tokens[..5], &mut cache, &mut scratch, Logits::None).unwrap();
        model.forward(&other[..9], &mut cache, &mut scratch, Logits::None).unwrap();
        cache.truncate(100);
        assert_eq!(cache.len(), 14);
        cache.truncate(5);
        let logits = model.forward(&golden.tokens[5..9], &mut cache, &mut scratch, Logits::Last).unwrap();
        let logits = marlin_ops::Device::read_f32(model.backend(), logits).unwrap();
        let vocab = model.config().vocab_size;
        let expected = &golden.logits[8 * vocab..9 * vocab];
        assert!(max_difference(&logits, expected) <= 1e-4 * golden.scale(), "{name}");
        assert_eq!(cache.len(), 9);
        cache.clear();
        assert!(cache.is_empty());
    }
}

#[test]
fn half_precision_caches_are_smaller_and_close() {
    for name in ["deepseek_v3-base", "llama-base"] {
        let dir = golden_folder(name);
        let golden = Golden::read(&dir.join("golden.safetensors"));
        let mut sizes = Vec::new();
        for (cache_dtype, tolerance) in [(DType::F32, 1e-4), (DType::F16, 3e-3), (DType::BF16, 3e-2)] {
            let config = ModelConfig::from_dir(&dir).unwrap();
            let options = LoadOptions { cache_dtype, ..LoadOptions::default() };
            let checkpoint = Checkpoint::open(&dir).unwrap();
            let model = Model::load(oracle(), &checkpoint, config, options).unwrap();
            let mut cache = KvCache::new(&model, golden.tokens.len()).unwrap();
            let mut scratch = model.scratch(8).unwrap();
            let logits = model.logits(&golden.tokens, &mut cache, &mut scratch).unwrap();
            let error = max_difference(&logits, &golden.logits) / golden.scale();
            assert!(error <= tolerance, "{name} {cache_dtype:?}: {error:.2e}");
            sizes.push(cache.size_in_bytes());
        }
        assert_eq!(sizes, [sizes[0], sizes[0] / 2, sizes[0] / 2]);
    }
}

#[test]
fn cache_sizes() {
    let (model, _) = golden("glm4_moe_lite-base");
    // 3 layers of 16 latent and 8 rope channels.
    assert_eq!(KvCache::new(&model, 10).unwrap().size_in_bytes(), 3 * 10 * (16 + 8) * 4);
}

#[test]
fn refused_calls_leave_the_cache_as_it_was() {
    let dir = golden_folder("qwen3_moe-base");
    let model = load(&oracle(), &dir, 4);
    let vocab = model.config().vocab_size as u32;
    let mut scratch = model.scratch(2).unwrap();
    let mut cache = KvCache::new(&model, 10).unwrap();
    model.forward(&[1, 2, 3], &mut cache, &mut scratch, Logits::Last).unwrap();
    let calls: [(&[u32], Logits, &str); 4] = [
        (&[], Logits::Last, "tokens are none"),
        // The bad id is in the second piece: the first has been through all layers.
        (&[1, 2, 3, 4, 5, vocab], Logits::Last, "vocabulary has"),
        (&[1; 8], Logits::None, "of 3 + 8 tokens exceeds the cache's 10"),
        (&[1; 3], Logits::All, "of 3 rows asked for, 2 are planned"),
    ];
    for (tokens, which, message) in calls {
        let error = model.forward(tokens, &mut cache, &mut scratch, which).unwrap_err();
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(cache.len(), 3);
    }
    let failing_sink = model.for_each_logits(&[1; 6], &mut cache, &mut scratch, |first, _| {
        if first < 4 { Ok(()) } else { Err(ModelError::request("sink", "is full")) }
    });
    assert!(failing_sink.unwrap_err().to_string().contains("sink is full"));
    assert_eq!(cache.len(), 3);
    let none = model.forward(&[1; 7], &mut cache, &mut scratch, Logits::None).unwrap();
    assert_eq!(none.dims(), [0, vocab as usize]);
    assert_eq!(cache.len(), cache.capacity());
}

#[test]
fn caches_of_other_models_and_bad_plans_are_refused() {
    let (latent, _) = golden("deepseek_v2-lite");
    let (dense, _) = golden("llama-base");
    for (model, other) in [(&latent, &dense), (&dense, &latent)] {
        let mut cache = KvCache::new(other, 4).unwrap();
        let mut scratch = model.scratch(1).unwrap();
        assert!(model.forward(&[1], &mut cache, &mut scratch, Logits::Last).is_err());
        assert!(cache.is_empty());
    }
    assert!(KvCache::new(&dense, 0).is_err());
    assert!(KvCache::new(&dense, dense.context() + 1).is_err());
    assert!(dense.scratch(0).is_err());
    assert!(dense.scratch(dense.chunk() + 1).is_err());

    let dir = golden_folder("llama-base");
    let longest = ModelConfig::from_dir(&dir).unwrap().max_position_embeddings;
    let defaults = LoadOptions::default();
    for (options, message) in [
        (LoadOptions { context: Some(0), ..defaults }, "context of 0"),
        (LoadOptions { context: Some(longest + 1), ..defaults }, "the model permits"),
        (LoadOptions { chunk: 0, ..defaults }, "chunk is 0"),
        (LoadOptions { cache_dtype: DType::I32, ..defaults }, "cache dtype is I32"),
    ] {
        let config = ModelConfig::from_dir(&dir).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        let error = Model::load(oracle(), &checkpoint, config, options).err().unwrap();
        assert!(error.to_string().contains(message), "{error}");
    }
}

/// A stored tensor: dtype, shape, little-endian bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// Copies a golden model into one file, with its tensors changed, and loads it.
fn load_changed(name: &str, change: impl FnOnce(&mut BTreeMap<String, Stored>)) -> Result<Model<Oracle>, ModelError> {
    let dir = golden_folder(name);
    let mut tensors = BTreeMap::new();
    for entry in std::fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        let file = path.file_name().unwrap().to_str().unwrap().to_owned();
        if !(file.starts_with("model") && file.ends_with(".safetensors")) {
            continue;
        }
        let bytes = std::fs::read(&path).unwrap();
        for (name, t) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            tensors.insert(name, (t.dtype(), t.shape().to_vec(), t.data().to_vec()));
        }
    }
    change(&mut tensors);
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(dir.join("config.json"), copy.path().join("config.json")).unwrap();
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).unwrap()))
        .collect::<Vec<_>>();
    let file = safetensors::serialize(views, None).unwrap();
    write(&copy.path().join("model.safetensors"), &file);
    try_load(&oracle(), copy.path(), 512)
}

fn write(path: &Path, bytes: &[u8]) {
    std::fs::write(path, bytes).unwrap();
}

fn refusal(name: &str, change: impl FnOnce(&mut BTreeMap<String, Stored>)) -> String {
    let error = load_changed(name, change).err().expect("the model must be refused");
    error.to_string()
}

fn f32_tensor(shape: &[usize]) -> Stored {
    let elements: usize = shape.iter().product();
    (Dtype::F32, shape.to_vec(), vec![0; 4 * elements])
}

#[test]
fn an_unchanged_copy_loads() {
    load_changed("llama-head_dim", |_| ()).unwrap();
}

#[test]
fn missing_tensors_are_named() {
    for name in [
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ] {
        let error = refusal("llama-head_dim", |tensors| {
            tensors.remove(name).unwrap();
        });
        assert!(error.contains(name) && error.contains("missing"), "{error}");
    }
    let bias = "model.layers.0.mlp.up_proj.bias";
    let error = refusal("llama-biases", |tensors| {
        tensors.remove(bias).unwrap();
    });
    assert!(error.contains(bias), "{error}");
}

#[test]
fn extra_tensors_are_named_with_their_file() {
    for name in [
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.9.input_layernorm.weight",
        "surprise",
    ] {
        let error = refusal("llama-head_dim", |tensors| {
            tensors.insert(name.to_owned(), f32_tensor(&[4]));
        });
        assert!(error.contains(name) && error.contains("model.safetensors"), "{error}");
        assert!(error.contains("not part of this architecture"), "{error}");
    }
    load_changed("llama-head_dim", |tensors| {
        let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
        tensors.insert(name.to_owned(), f32_tensor(&[4]));
    })
    .unwrap();
}

#[test]
fn misshapen_and_non_finite_tensors_are_named() {
    let name = "model.layers.0.mlp.down_proj.weight";
    let error = refusal("llama-head_dim", |tensors| {
        tensors.get_mut(name).unwrap().1.reverse();
    });
    assert!(error.contains(name) && error.contains("shape"), "{error}");
    let error = refusal("llama-head_dim", |tensors| {
        tensors.get_mut(name).unwrap().2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    assert!(error.contains(name) && error.contains("NaN"), "{error}");
}

#[test]
fn a_tied_model_uses_its_own_head_when_one_is_stored() {
    let name = "deepseek_v2-biases_tied";
    let tied = load_changed(name, |_| ()).unwrap();
    let headed = load_changed(name, |tensors| {
        let embedding = tensors["model.embed_tokens.weight"].clone();
        tensors.insert("lm_head.weight".to_owned(), f32_tensor(&embedding.1));
    })
    .unwrap();
    let last = |model: &Model<Oracle>| {
        let mut cache = KvCache::new(model, 3).unwrap();
        let mut scratch = model.scratch(3).unwrap();
        model.logits(&[1, 2, 3], &mut cache, &mut scratch).unwrap()
    };
    assert!(last(&tied).iter().any(|&v| v != 0.0));
    assert!(last(&headed).iter().all(|&v| v == 0.0));
}

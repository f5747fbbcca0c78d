//! The block-by-block calibration run against the forward pass and the golden logits, on the oracle.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::{Golden, golden_folder, golden_folders, max_difference};
use marlin_models::{ActivationObserver, CalibrationModel, Checkpoint, MlpConfig, ModelConfig, ModuleKind, Result};
use marlin_ops::oracle::Oracle;
use marlin_ops::{HostTensor, Weight};

/// Keeps every input: module -> (columns, values).
#[derive(Default)]
struct Inputs(BTreeMap<String, (usize, Vec<f32>)>);

impl ActivationObserver for Inputs {
    fn observe(&mut self, module: &str, rows: usize, columns: usize, values: &[f32]) -> Result<()> {
        assert_eq!(values.len(), rows * columns);
        assert!(rows > 0);
        let (known, seen) = self.0.entry(module.to_owned()).or_insert((columns, Vec::new()));
        assert_eq!(*known, columns);
        seen.extend_from_slice(values);
        Ok(())
    }
}

/// `x W^T` for `x` `[rows, columns]` and the weight that the checkpoint stores for `module`.
fn apply(weight: &[f32], x: &[f32], columns: usize) -> Vec<f32> {
    let dot = |row: &[f32], w: &[f32]| {
        let sum: f64 = row.iter().zip(w).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
        sum as f32
    };
    x.chunks_exact(columns).flat_map(|row| weight.chunks_exact(columns).map(move |w| dot(row, w))).collect()
}

/// The stored output head, or the embedding.
fn head(checkpoint: &Checkpoint) -> Vec<f32> {
    let name = match checkpoint.contains("lm_head.weight") {
        true => "lm_head.weight",
        false => "model.embed_tokens.weight",
    };
    checkpoint.tensor(name).unwrap().to_f32().unwrap()
}

/// The linear layers of layer `i` but router and routed experts, with their in_features.
fn expected_modules(config: &ModelConfig, i: usize) -> BTreeMap<String, usize> {
    let modules = config.linear_modules().into_iter();
    modules
        .filter(|m| m.layer == Some(i))
        .filter(|m| !matches!(m.kind, ModuleKind::Router | ModuleKind::Expert))
        .map(|m| (m.name, m.in_features))
        .collect()
}

fn check_layer_inputs(config: &ModelConfig, i: usize, tokens: usize, mut inputs: Inputs) {
    for (module, columns) in expected_modules(config, i) {
        let (found, values) = inputs.0.remove(&module).unwrap_or_else(|| panic!("no {module}"));
        assert_eq!((found, values.len()), (columns, tokens * columns), "{module}");
        assert!(values.iter().all(|v| v.is_finite()), "{module}");
    }
    let mut routed = BTreeMap::new();
    for (module, (columns, values)) in inputs.0 {
        let rest = module.strip_prefix(&format!("model.layers.{i}.mlp.experts."));
        let (expert, part) = rest.and_then(|r| r.split_once('.')).expect(&module);
        expert.parse::<usize>().expect(&module);
        *routed.entry((part.to_owned(), columns)).or_insert(0) += values.len() / columns;
    }
    let MlpConfig::Moe { intermediate, routing, .. } = config.layers[i].mlp else {
        assert!(routed.is_empty());
        return;
    };
    let rows = tokens * routing.top_k;
    let expected = [
        (("down_proj".to_owned(), intermediate), rows),
        (("gate_proj".to_owned(), config.hidden_size), rows),
        (("up_proj".to_owned(), config.hidden_size), rows),
    ];
    assert_eq!(routed.into_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn every_module_is_seen_and_the_head_input_gives_the_golden_logits() {
    for dir in golden_folders() {
        let golden = Golden::read(&dir.join("golden.safetensors"));
        let config = ModelConfig::from_dir(&dir).unwrap();
        let checkpoint = Checkpoint::open(&dir).unwrap();
        // A second sequence, a prefix of the first: its rows must come out as the first ones'.
        let tokens = golden.tokens.len();
        let sequences = [golden.tokens.clone(), golden.tokens[..5].to_vec()];
        let backend = Arc::new(Oracle::new());
        let mut model = CalibrationModel::new(backend, &checkpoint, &config, &sequences).unwrap();
        for i in 0..model.num_layers() {
            model.load_layer(i).unwrap();
            let mut inputs = Inputs::default();
            model.observe(&mut inputs).unwrap();
            let mut again = Inputs::default();
            model.observe(&mut again).unwrap();
            assert_eq!(inputs.0, again.0, "observing must not move the streams");
            check_layer_inputs(&config, i, tokens + 5, inputs);
            model.advance().unwrap();
        }
        let mut inputs = Inputs::default();
        model.observe_head(&mut inputs).unwrap();
        let (columns, x) = &inputs.0["lm_head"];
        let logits = apply(&head(&checkpoint), x, *columns);
        let (whole, prefix) = logits.split_at(golden.logits.len());
        let limit = 1e-4 * golden.scale();
        assert!(max_difference(whole, &golden.logits) <= limit, "{}", dir.display());
        let expected = &golden.logits[..prefix.len()];
        assert!(max_difference(prefix, expected) <= limit, "{}", dir.display());
    }
}

/// The latent that kv_b_proj sees is normalised: with a unit norm weight its rows have mean square 1.
#[test]
fn kv_b_proj_sees_the_normalised_latent() {
    let dir = golden_folder("glm4_moe_lite-base");
    let config = ModelConfig::from_dir(&dir).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let sequences = [vec![3, 1, 4, 1, 5, 9, 2, 6]];
    let backend = Arc::new(Oracle::new());
    let mut model = CalibrationModel::new(backend, &checkpoint, &config, &sequences).unwrap();
    model.load_layer(0).unwrap();
    let mut inputs = Inputs::default();
    model.observe(&mut inputs).unwrap();
    let gamma = checkpoint.vector("model.layers.0.self_attn.kv_a_layernorm.weight", 16).unwrap();
    let (columns, latent) = &inputs.0["model.layers.0.self_attn.kv_b_proj"];
    for row in latent.chunks_exact(*columns) {
        let squares = row.iter().zip(&gamma).map(|(c, g)| (c / g).powi(2));
        let mean = squares.sum::<f32>() / *columns as f32;
        assert!((mean - 1.0).abs() < 1e-3, "{mean}");
    }
}

/// With all output projections zero a layer changes nothing: the head then sees the normalised embeddings.
#[test]
fn replaced_weights_are_used_by_the_layers_after() {
    let dir = golden_folder("deepseek_v3-no_q_lora_tied");
    let config = ModelConfig::from_dir(&dir).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let tokens = vec![7, 0, 3, 5, 2];
    let backend = Arc::new(Oracle::new());
    let sequences = [tokens.clone()];
    let mut model = CalibrationModel::new(backend, &checkpoint, &config, &sequences).unwrap();
    let zeros = |n: usize, k: usize| Weight::dense(HostTensor::from_f32(&[n, k], &vec![0.0; n * k]).unwrap()).unwrap();
    for i in 0..model.num_layers() {
        model.load_layer(i).unwrap();
        let layer = format!("model.layers.{i}");
        for (module, columns) in expected_modules(&config, i) {
            if module.ends_with("o_proj") || module.ends_with("down_proj") {
                model.replace(&module, zeros(config.hidden_size, columns)).unwrap();
            }
        }
        if let MlpConfig::Moe { experts, intermediate, .. } = config.layers[i].mlp {
            // All experts: the others' rows are routed anew once attention adds nothing.
            for e in 0..experts {
                let module = format!("{layer}.mlp.experts.{e}.down_proj");
                model.replace(&module, zeros(config.hidden_size, intermediate)).unwrap();
            }
        }
        model.advance().unwrap();
    }
    let mut inputs = Inputs::default();
    model.observe_head(&mut inputs).unwrap();

    let hidden = config.hidden_size;
    let embedding = checkpoint.tensor("model.embed_tokens.weight").unwrap().to_f32().unwrap();
    let gamma = checkpoint.vector("model.norm.weight", hidden).unwrap();
    let mut expected = Vec::new();
    for &token in &tokens {
        let row = &embedding[token as usize * hidden..][..hidden];
        let mean = row.iter().map(|v| v * v).sum::<f32>() / hidden as f32;
        let scale = 1.0 / (mean + config.rms_norm_eps).sqrt();
        expected.extend(row.iter().zip(&gamma).map(|(v, g)| v * scale * g));
    }
    assert!(max_difference(&inputs.0["lm_head"].1, &expected) < 1e-5);
}

#[test]
fn wrong_use_is_refused() {
    let dir = golden_folder("qwen3_moe-base");
    let config = ModelConfig::from_dir(&dir).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let start =
        |sequences: &[Vec<u32>]| CalibrationModel::new(Arc::new(Oracle::new()), &checkpoint, &config, sequences);
    let too_long = vec![1; config.max_position_embeddings + 1];
    for sequences in [vec![], vec![vec![]], vec![vec![1], vec![]], vec![too_long]] {
        assert!(start(&sequences).is_err());
    }
    assert!(start(&[vec![config.vocab_size as u32]]).is_err());

    let mut model = start(&[vec![1, 2, 3]]).unwrap();
    let weight = |n: usize, k: usize| Weight::dense(HostTensor::from_f32(&[n, k], &vec![0.0; n * k]).unwrap()).unwrap();
    let o_proj = "model.layers.0.self_attn.o_proj";
    assert!(model.observe(&mut Inputs::default()).is_err());
    assert!(model.advance().is_err());
    assert!(model.replace(o_proj, weight(1, 1)).is_err());
    assert!(model.observe_head(&mut Inputs::default()).is_err());
    assert!(model.load_layer(1).is_err());
    model.load_layer(0).unwrap();
    for module in [
        "model.layers.1.self_attn.o_proj",
        "model.layers.0.self_attn.o_projection",
        "model.layers.0.mlp.gate",
        "model.layers.0.mlp.experts.999.up_proj",
    ] {
        let error = model.replace(module, weight(1, 1)).unwrap_err().to_string();
        assert!(error.contains(module), "{error}");
    }
    let error = model.replace(o_proj, weight(1, 1)).unwrap_err().to_string();
    assert!(error.contains("shape"), "{error}");
}

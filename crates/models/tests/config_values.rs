//! What is read from the golden configurations and from the published ones (operations.md section 12).

use std::path::Path;

use marlin_models::{AttentionConfig, LayerConfig, MlpConfig, ModelConfig};
use marlin_ops::moe::{GroupScore, Routing, Scoring};
use marlin_ops::rope::{Pairing, RopeScaling};
use serde_json::{Value, json};

fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).join("config.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn read(config: &Value) -> ModelConfig {
    ModelConfig::from_value(Path::new("config.json"), config).unwrap()
}

/// The golden config with fields replaced; null removes a field.
fn changed(name: &str, changes: Value) -> ModelConfig {
    let mut config = golden(name);
    for (field, value) in changes.as_object().unwrap() {
        let object = config.as_object_mut().unwrap();
        match value {
            Value::String(s) if s == "(absent)" => object.remove(field),
            value => object.insert(field.clone(), value.clone()),
        };
    }
    read(&config)
}

fn routing(layer: &LayerConfig) -> Routing {
    match layer.mlp {
        MlpConfig::Moe { routing, .. } => routing,
        MlpConfig::Dense { .. } => panic!("dense"),
    }
}

fn is_moe(config: &ModelConfig) -> Vec<bool> {
    let layers = config.layers.iter();
    layers.map(|l| matches!(l.mlp, MlpConfig::Moe { .. })).collect()
}

#[test]
fn every_golden_folder_reads() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut count = 0;
    for entry in std::fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap().path();
        if entry.is_dir() {
            ModelConfig::from_dir(&entry).unwrap();
            count += 1;
        }
    }
    assert!(count >= 24, "{count}");
}

#[test]
fn glm() {
    let config = read(&golden("glm4_moe_lite-base"));
    assert_eq!((config.num_layers, config.vocab_size, config.num_nextn_predict_layers), (3, 128, 1));
    assert_eq!((config.pairing, config.rms_norm_eps), (Pairing::Interleaved, 1e-5));
    let expected = AttentionConfig::Mla {
        heads: 4,
        q_lora_rank: Some(24),
        kv_lora_rank: 16,
        qk_nope_head_dim: 16,
        qk_rope_head_dim: 8,
        v_head_dim: 16,
        bias: false,
        latent_norm_eps: 1e-6,
        scale: 24f64.powf(-0.5) as f32,
    };
    assert_eq!(config.attention, expected);
    assert_eq!(config.layers[0].mlp, MlpConfig::Dense { intermediate: 40, bias: false });
    let expected = MlpConfig::Moe {
        experts: 8,
        intermediate: 16,
        shared_intermediate: Some(16),
        shared_bias: false,
        correction_bias: true,
        routing: Routing {
            top_k: 2,
            scoring: Scoring::Sigmoid,
            n_group: 1,
            topk_group: 1,
            group_score: GroupScore::TopTwoSum,
            norm_topk_prob: true,
            norm_eps: 1e-20,
            routed_scaling_factor: 1.8,
        },
    };
    assert_eq!(config.layers[1].mlp, expected);
    assert_eq!(config.eos_token_ids, [1]);
    assert_eq!((config.bos_token_id, config.pad_token_id), (Some(0), None));
}

#[test]
fn which_layers_have_experts() {
    let glm = "glm4_moe_lite-base";
    let absent = json!({"first_k_dense_replace": "(absent)"});
    assert_eq!(is_moe(&changed(glm, absent)), [false, true, true]);
    assert_eq!(is_moe(&changed(glm, json!({"first_k_dense_replace": 2}))), [false, false, true]);
    let types = json!({"mlp_layer_types": ["sparse", "dense", "sparse"]});
    assert_eq!(is_moe(&changed(glm, types)), [true, false, true]);
    let v3 = "deepseek_v3-base";
    assert_eq!(is_moe(&changed(v3, json!({"first_k_dense_replace": 0}))), [true; 3]);
    assert_eq!(is_moe(&changed(v3, json!({"first_k_dense_replace": "(absent)"}))), [false; 3]);
    assert_eq!(is_moe(&changed(v3, json!({"first_k_dense_replace": 99}))), [false; 3]);
    let v2 = changed("deepseek_v2-biases_tied", json!({"first_k_dense_replace": "(absent)"}));
    assert_eq!(is_moe(&v2), [true; 2]);
    let qwen = |changes| is_moe(&changed("qwen3_moe-base", changes));
    let steps = json!({"decoder_sparse_step": 2, "num_hidden_layers": 5, "mlp_only_layers": [3]});
    assert_eq!(qwen(steps), [false, true, false, false, false]);
    assert_eq!(qwen(json!({"num_experts": 0})), [false; 2]);
    let renamed = json!({"num_experts": "(absent)", "num_local_experts": 12, "mlp_only_layers": null});
    let config = changed("qwen3_moe-base", renamed);
    assert!(matches!(config.layers[0].mlp, MlpConfig::Moe { experts: 12, .. }));
}

#[test]
fn routers() {
    let v2 = read(&golden("deepseek_v2-biases_tied"));
    let MlpConfig::Moe { routing, shared_bias, correction_bias, .. } = v2.layers[0].mlp else { panic!("dense") };
    // The file says norm_topk_prob true; transformers ignores it.
    assert!(!routing.norm_topk_prob && shared_bias && !correction_bias);
    assert_eq!((routing.scoring, routing.n_group), (Scoring::Softmax, 1));
    assert_eq!(routing.routed_scaling_factor, 1.7);
    let groups = read(&golden("deepseek_v2-groups"));
    let layer = groups.layers.iter().find(|l| matches!(l.mlp, MlpConfig::Moe { .. })).unwrap();
    assert_eq!(self::routing(layer).group_score, GroupScore::Max);
    assert!(self::routing(layer).n_group > 1);
    let qwen = changed("qwen3_moe-base", json!({"norm_topk_prob": "(absent)"}));
    assert!(!self::routing(&qwen.layers[0]).norm_topk_prob);
    assert_eq!(self::routing(&qwen.layers[0]).norm_eps, 0.0);
    let v3 =
        changed("deepseek_v3-base", json!({"n_group": "(absent)", "topk_group": null, "norm_topk_prob": "(absent)"}));
    let r = self::routing(&v3.layers[2]);
    assert_eq!((r.n_group, r.topk_group, r.norm_topk_prob), (8, 4, true));
}

#[test]
fn attention_defaults() {
    let gqa = |config: &ModelConfig| match config.attention {
        AttentionConfig::Gqa { kv_heads, head_dim, .. } => (kv_heads, head_dim),
        AttentionConfig::Mla { .. } => panic!("MLA"),
    };
    let heads = |n: usize| {
        json!({"num_attention_heads": n, "hidden_size": n * 4, "num_key_value_heads": "(absent)",
        "head_dim": "(absent)"})
    };
    assert_eq!(gqa(&changed("llama-base", heads(8))), (8, 4));
    assert_eq!(gqa(&changed("qwen3-base", heads(64))), (32, 128));
    let null = json!({"num_key_value_heads": null, "head_dim": null});
    let qwen = golden("qwen3-base");
    let (hidden, heads) = (qwen["hidden_size"].as_u64().unwrap(), qwen["num_attention_heads"].as_u64().unwrap());
    assert_eq!(gqa(&changed("qwen3-base", null)), (heads as usize, (hidden / heads) as usize));
    let rank = |changes| match changed("glm4_moe_lite-base", changes).attention {
        AttentionConfig::Mla { q_lora_rank, .. } => q_lora_rank,
        AttentionConfig::Gqa { .. } => panic!("GQA"),
    };
    assert_eq!(rank(json!({"q_lora_rank": null})), None);
    assert_eq!(rank(json!({"q_lora_rank": "(absent)"})), Some(768));
    let biased = changed("llama-biases", json!({}));
    assert!(matches!(biased.attention, AttentionConfig::Gqa { qkv_bias: true, o_bias: true, qk_norm: false, .. }));
    assert!(matches!(biased.layers[0].mlp, MlpConfig::Dense { bias: true, .. }));
    let half = changed("deepseek_v3-base", json!({"rope_interleave": false}));
    assert_eq!(half.pairing, Pairing::Half);
    let v2 = changed("deepseek_v2-lite", json!({"rope_interleave": false}));
    assert_eq!(v2.pairing, Pairing::Interleaved);
}

#[test]
fn rope_precedence() {
    let rope = |changes| changed("qwen3-base", changes).rope;
    let both = json!({"rope_theta": 5.0, "rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0},
        "rope_parameters": {"rope_theta": 7.0, "rope_type": "linear", "factor": 3.0},
        "max_position_embeddings": 100});
    let found = rope(both);
    assert_eq!(found.theta, 5.0);
    let RopeScaling::Yarn { factor, original_max_position, beta_fast, beta_slow, truncate, .. } = found.scaling else {
        panic!("{found:?}")
    };
    assert_eq!((factor, original_max_position, beta_fast, beta_slow, truncate), (2.0, 100.0, 32.0, 1.0, true));
    let new = json!({"rope_theta": 5.0, "rope_scaling": {},
        "rope_parameters": {"rope_theta": 7.0, "rope_type": "linear", "factor": 3.0}});
    let found = rope(new);
    assert_eq!((found.theta, found.scaling), (7.0, RopeScaling::Linear { factor: 3.0 }));
    let none = json!({"rope_theta": "(absent)", "rope_scaling": null, "rope_parameters": "(absent)"});
    let found = rope(none);
    assert_eq!((found.theta, found.scaling), (10_000.0, RopeScaling::Default));
    let top = json!({"original_max_position_embeddings": 50, "max_position_embeddings": 100,
        "rope_scaling": {"type": "yarn", "factor": null, "beta_fast": 0, "beta_slow": null,
        "original_max_position_embeddings": 25}});
    let found = rope(top);
    let RopeScaling::Yarn { factor, original_max_position, beta_fast, .. } = found.scaling else { panic!("{found:?}") };
    assert_eq!((factor, original_max_position, beta_fast), (2.0, 50.0, 32.0));
}

#[test]
fn mla_softmax_scale() {
    let scale = |scaling: Value| match changed("deepseek_v3-base", json!({"rope_scaling": scaling})).attention {
        AttentionConfig::Mla { scale, .. } => f64::from(scale) * 32f64.sqrt(),
        AttentionConfig::Gqa { .. } => panic!("GQA"),
    };
    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-5, "{a} {b}");
    // operations.md section 12: V3 and V2.
    close(scale(json!({"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0})), 1.87385);
    close(scale(json!({"type": "yarn", "factor": 40, "mscale_all_dim": 0.707})), 1.58963);
    close(scale(json!({"type": "linear", "factor": 40, "mscale_all_dim": 1.0})), 1.87385);
    close(scale(json!({"type": "yarn", "factor": 40, "mscale": 1.0})), 1.0);
    close(scale(json!({"type": "yarn", "factor": 40, "mscale_all_dim": 0.0})), 1.0);
    close(scale(json!({"type": "default", "factor": 40, "mscale_all_dim": 1.0})), 1.0);
    close(scale(json!({"type": "yarn", "factor": 0.5, "mscale_all_dim": 1.0})), 1.0);
}

#[test]
fn windows() {
    let windows = |name: &str, changes| -> Vec<Option<usize>> {
        changed(name, changes).layers.iter().map(|l| l.window).collect()
    };
    let absent = "(absent)";
    let by_depth = json!({"use_sliding_window": true, "sliding_window": 9, "max_window_layers": 1,
        "num_hidden_layers": 3, "layer_types": absent});
    assert_eq!(windows("qwen3-base", by_depth), [None, Some(9), Some(9)]);
    let off = json!({"use_sliding_window": false, "sliding_window": 9, "max_window_layers": 0,
        "num_hidden_layers": 2, "layer_types": absent});
    assert_eq!(windows("qwen3-base", off), [None, None]);
    let typed = json!({"use_sliding_window": true, "sliding_window": absent, "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"]});
    assert_eq!(windows("qwen3-base", typed), [Some(4096), None]);
    let all = json!({"use_sliding_window": true, "sliding_window": 9, "max_window_layers": 2});
    assert_eq!(windows("qwen3_moe-base", all), [Some(9), Some(9)]);
}

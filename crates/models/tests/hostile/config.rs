use marlin_models::{ModelConfig, ModelError};

use super::*;

/// The golden configuration of that name.
fn golden(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).join("config.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn read(config: &Value) -> Result<ModelConfig, ModelError> {
    ModelConfig::from_value(Path::new("folder/config.json"), config)
}

/// `base` with `field` (dotted) set to `value` is refused with that field's name.
#[track_caller]
fn refused(base: &str, field: &str, value: Value, named: &str) {
    let mut config = golden(base);
    let mut at = &mut config;
    for part in field.split('.') {
        at = &mut at[part];
    }
    *at = value.clone();
    let Err(error) = read(&config) else {
        panic!("{base}: {field} = {value} was accepted");
    };
    assert_names(&error.to_string(), &["folder/config.json", named]);
}

const ALL: [&str; 6] =
    ["glm4_moe_lite-base", "qwen3-base", "qwen3_moe-base", "llama-base", "deepseek_v2-lite", "deepseek_v3-base"];

#[test]
fn impossible_dimensions_in_every_architecture() {
    let bad = [
        json!(0),
        json!(-1),
        json!(16.5),
        json!(32.0),
        json!("32"),
        json!(1u64 << 33),
        json!(u64::MAX),
        json!(1e300),
        json!([32]),
        json!(true),
    ];
    for base in ALL {
        let config = golden(base);
        for (field, value) in config.as_object().unwrap() {
            let other = [
                // Not dimensions, or 0 is fine.
                "bos_token_id",
                "eos_token_id",
                "pad_token_id",
                "first_k_dense_replace",
                "n_shared_experts",
                "max_window_layers",
                "num_nextn_predict_layers",
                // Not read.
                "sliding_window",
                "pretraining_tp",
                "moe_layer_freq",
                "ep_size",
                "qk_head_dim",
            ];
            let unused: &[&str] = match base {
                "deepseek_v2-lite" => &["head_dim", "n_group", "topk_group"],
                "deepseek_v3-base" => &["head_dim"],
                // All layers have experts.
                "qwen3_moe-base" => &["intermediate_size"],
                _ => &[],
            };
            let used = value.is_u64() && !other.contains(&field.as_str()) && !unused.contains(&field.as_str());
            if used && !field.starts_with("rope_theta") {
                // Qwen3-MoE without experts is a dense model.
                for value in bad.iter().filter(|&v| *field != "num_experts" || *v != json!(0)) {
                    refused(base, field, value.clone(), &format!("`{field}`"));
                }
            }
        }
        for field in ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"] {
            refused(base, field, Value::Null, &format!("`{field}` is missing"));
        }
        refused(base, "num_hidden_layers", json!(1025), "`num_hidden_layers`");
    }
}

#[test]
fn contradicting_dimensions() {
    refused("qwen3-base", "num_key_value_heads", json!(3), "`num_key_value_heads`");
    refused("qwen3-base", "head_dim", json!(15), "`head_dim` is 15, must be even");
    refused("qwen3-base", "head_dim", json!(1 << 23), "`head_dim`");
    refused("llama-base", "num_attention_heads", json!(5), "`num_attention_heads`");
    refused("glm4_moe_lite-base", "num_key_value_heads", json!(2), "`num_key_value_heads`");
    refused("glm4_moe_lite-base", "qk_rope_head_dim", json!(7), "`qk_rope_head_dim` is 7");
    refused("glm4_moe_lite-base", "num_experts_per_tok", json!(9), "`num_experts_per_tok` is 9");
    refused("glm4_moe_lite-base", "n_shared_experts", json!((1 << 24) - 1), "`n_shared_experts`");
    refused("deepseek_v3-base", "n_group", json!(3), "`n_group` is 3");
    refused("deepseek_v3-base", "n_group", json!(16), "`n_routed_experts`");
    refused("deepseek_v3-base", "topk_group", json!(5), "`topk_group` is 5");
    refused("deepseek_v3-base", "num_experts_per_tok", json!(9), "`num_experts_per_tok` is 9");
    refused("qwen3_moe-base", "num_experts_per_tok", json!(17), "`num_experts_per_tok` is 17");
    refused("qwen3_moe-base", "num_local_experts", json!(17), "`num_experts` is 16");
    refused("qwen3_moe-base", "mlp_only_layers", json!(["0"]), "`mlp_only_layers`");
    refused("qwen3-layer_types", "layer_types", json!(["full_attention"]), "`layer_types` has 1 entries");
    refused("glm4_moe_lite-base", "mlp_layer_types", json!(["dense", "sparse", "moe"]), "`mlp_layer_types`");
    refused("deepseek_v2-groups", "topk_method", json!("noaux"), "`topk_method`");
}

#[test]
fn unknown_or_unusable_values() {
    for base in ALL {
        refused(base, "hidden_act", json!("swiglu2"), "`hidden_act` `swiglu2`");
        refused(base, "rms_norm_eps", json!(0), "`rms_norm_eps`");
        refused(base, "rms_norm_eps", json!(-1e-6), "`rms_norm_eps`");
        refused(base, "rms_norm_eps", json!(1e-60), "`rms_norm_eps`");
        refused(base, "rms_norm_eps", json!("small"), "`rms_norm_eps`");
        refused(base, "tie_word_embeddings", json!("yes"), "`tie_word_embeddings`");
        refused(base, "eos_token_id", json!("end"), "`eos_token_id`");
        refused(base, "rope_scaling", json!({"type": "longrope"}), "`rope_scaling.rope_type` `longrope`");
        refused(base, "rope_scaling", json!({"type": "yarn"}), "`rope_scaling.factor` is missing");
        refused(base, "rope_scaling", json!({"type": "yarn", "factor": -4}), "`rope_scaling.factor`");
        refused(base, "rope_scaling", json!({"type": "linear", "factor": "2"}), "`rope_scaling.factor`");
        refused(base, "rope_scaling", json!({"rope_theta": 0, "type": "default"}), "`rope_scaling.rope_theta`");
        refused(base, "rope_scaling", json!({"partial_rotary_factor": 0.5}), "`partial_rotary_factor`");
        refused(
            base,
            "rope_scaling",
            json!({"full_attention": {"rope_type": "default"}}),
            "`rope_scaling.full_attention`",
        );
        refused(base, "rope_scaling", json!(4), "`rope_scaling`");
        refused(
            base,
            "rope_scaling",
            json!({"type": "yarn", "factor": 4, "rope_theta": 1, "original_max_position_embeddings": 4096}),
            "`rope_scaling` gives a rotary frequency",
        );
        let llama3 = json!({"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4});
        refused(base, "rope_scaling", llama3, "`rope_scaling.high_freq_factor` is 4");
    }
    refused("glm4_moe_lite-base", "routed_scaling_factor", json!(1e300), "`routed_scaling_factor`");
    refused("qwen3-sliding", "sliding_window", json!(0), "`sliding_window`");
}

#[test]
fn unknown_architecture_and_broken_json() {
    let error = read(&json!({"model_type": "mamba"})).unwrap_err();
    assert!(matches!(error, ModelError::UnknownArchitecture { .. }));
    assert_names(&error.to_string(), &["folder/config.json", "`mamba`", "glm4_moe_lite", "qwen3_moe", "llama"]);
    assert_names(&read(&json!({})).unwrap_err().to_string(), &["`model_type` is missing"]);
    assert_names(&read(&json!([1])).unwrap_err().to_string(), &["config.json", "not an object"]);
    let dir = tempfile::tempdir().unwrap();
    let error = ModelConfig::from_dir(dir.path()).unwrap_err().to_string();
    assert_names(&error, &["config.json", "not found"]);
    write(dir.path(), "config.json", b"{\"model_type\": ");
    let error = ModelConfig::from_dir(dir.path()).unwrap_err().to_string();
    assert_names(&error, &["config.json", "not valid JSON", "line 1"]);
}

#[test]
fn quantization_configs() {
    let refused = |value: Value, parts: &[&str]| {
        let mut config = golden("qwen3-base");
        config["quantization_config"] = value;
        assert_names(&read(&config).unwrap_err().to_string(), &["folder/config.json"]);
        assert_names(&read(&config).unwrap_err().to_string(), parts);
    };
    let native = |default: Value| json!({"quant_method": "metal_marlin", "format_version": 1, "default": default, "modules": {}, "ignore": []});
    refused(
        json!({"quant_method": "hqq", "bits": 4}),
        &["`quantization_config.quant_method` `hqq`", "not supported; supported: metal_marlin, exl3, gptq, awq"],
    );
    refused(json!({"bits": 4}), &["`quantization_config.quant_method` is missing"]);
    refused(
        json!({"quant_method": "metal_marlin", "format_version": 2}),
        &["`quantization_config.format_version` is 2"],
    );
    for (scheme, field) in [
        (json!({"format": "int5"}), "default.format` unknown weight format `int5`; valid formats: fp4_e2m1"),
        (json!({"format": 4}), "default.format`"),
        (json!({"group_size": 128}), "default.format`"),
        (json!({"format": "int4_s4", "group_size": 0}), "default.group_size`"),
        (json!({"format": "int4_s4", "group_size": 12}), "default.group_size`"),
        (json!({"format": "nvfp4", "group_size": 32}), "default.group_size`"),
        (json!({"format": "int4_s4", "bits": 3}), "default.bits` is 3"),
        (json!({"format": "int4_s4", "sym": false}), "default.sym` is false"),
        (json!({"format": "nvfp4", "scale_dtype": "f16"}), "default.scale_dtype`"),
        (json!({"format": "int4_s4", "sparsity": "2:4"}), "default.sparsity`"),
        (json!({"format": "int4_s4", "in_features": -1}), "default.in_features`"),
        (json!("int4"), "default`"),
    ] {
        refused(native(scheme), &[&format!("quantization_config.{field}")]);
    }
    let mut config = native(json!({"format": "int4_s4"}));
    config["ignore"] = json!(["re:("]);
    refused(config.clone(), &["`quantization_config.ignore`", "re:("]);
    config["ignore"] = json!([3]);
    refused(config.clone(), &["`quantization_config.ignore`"]);
    config["ignore"] = json!(["lm_head", "re:.*norm"]);
    config["modules"] =
        json!({"m": {"format": "int8", "sym": false, "group_size": -1, "out_features": 8}, "o": {"format": 1}});
    refused(config.clone(), &["modules.o.format`"]);
    config["modules"].as_object_mut().unwrap().remove("o");

    let mut whole = golden("qwen3-base");
    whole["quantization_config"] = config;
    let quantization = read(&whole).unwrap().quantization;
    assert!(quantization.is_ignored("lm_head") && quantization.is_ignored("a.norm.b"));
    assert!(!quantization.is_ignored("lm_head2"));
    let scheme = quantization.scheme("m", 8, 99).unwrap();
    assert_eq!((scheme.format.name(), scheme.group_size), ("int8_asym", 100));
    assert_eq!(quantization.scheme("n", 8, 99).unwrap().format.name(), "int4_s4");
    let error = quantization.scheme("m", 9, 99).unwrap_err().to_string();
    assert_names(&error, &["folder/config.json", "modules.m", "out_features"]);
}

#[test]
fn random_junk_never_panics() {
    // Every field of every architecture replaced by every kind of JSON value.
    let junk = [
        Value::Null,
        json!(""),
        json!({}),
        json!([]),
        json!([[]]),
        json!(-1),
        json!(1e308),
        json!(u64::MAX),
        json!({"type": {}}),
        json!(false),
    ];
    for base in ALL {
        let config = golden(base);
        for field in config.as_object().unwrap().keys() {
            for value in &junk {
                let mut changed = config.clone();
                changed[field] = value.clone();
                if let Err(error) = read(&changed) {
                    assert_names(&error.to_string(), &["folder/config.json"]);
                }
            }
        }
    }
}

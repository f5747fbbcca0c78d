//! Dimensions of published models (operations.md section 12) as their `config.json` spells them, and a tiny one of each
//! architecture.

use serde_json::{Value, json};

use crate::error::{ModelError, Result};

/// Names accepted by [`preset`].
pub(super) const NAMES: [&str; 14] = [
    "glm-4.7-flash",
    "qwen3-0.6b",
    "qwen3-4b",
    "qwen3-30b-a3b",
    "llama-3.2-1b",
    "llama-3.1-8b",
    "deepseek-v2-lite",
    "deepseek-v3",
    "tiny-glm-4.7-flash",
    "tiny-qwen3",
    "tiny-qwen3-moe",
    "tiny-llama",
    "tiny-deepseek-v2",
    "tiny-deepseek-v3",
];

/// The `config.json` of a preset.
pub(super) fn preset(name: &str) -> Result<Value> {
    Ok(match name {
        "glm-4.7-flash" => glm_4_7_flash(),
        "qwen3-0.6b" => qwen3([1024, 28, 16, 8, 3072]),
        "qwen3-4b" => qwen3([2560, 36, 32, 8, 9728]),
        "qwen3-30b-a3b" => qwen3_30b_a3b(),
        "llama-3.2-1b" => llama([2048, 16, 32, 8, 8192], 32.0, true),
        "llama-3.1-8b" => llama([4096, 32, 32, 8, 14_336], 8.0, false),
        "deepseek-v2-lite" => deepseek_v2_lite(),
        "deepseek-v3" => deepseek_v3(),
        "tiny-glm-4.7-flash" => with(with(glm_4_7_flash(), tiny_mla()), json!({"q_lora_rank": 64})),
        "tiny-qwen3" => with(qwen3([128, 2, 4, 2, 256]), tiny_gqa()),
        "tiny-qwen3-moe" => with(with(qwen3_30b_a3b(), tiny_gqa()), tiny_moe()),
        "tiny-llama" => with(llama([128, 2, 4, 2, 256], 8.0, false), tiny_gqa()),
        "tiny-deepseek-v2" => with(deepseek_v2_lite(), tiny_mla()),
        "tiny-deepseek-v3" => {
            let groups = json!({"q_lora_rank": 64, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1});
            with(with(deepseek_v3(), tiny_mla()), groups)
        }
        other => {
            let reason = format!("`{other}` is unknown; valid: {}", NAMES.join(", "));
            return Err(ModelError::request("model", reason));
        }
    })
}

/// `base` with the fields of `changes` replaced or added.
pub(super) fn with(mut base: Value, changes: Value) -> Value {
    if let (Value::Object(base), Value::Object(changes)) = (&mut base, changes) {
        base.extend(changes);
    }
    base
}

fn tiny_gqa() -> Value {
    json!({"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "intermediate_size": 256, "vocab_size": 512, "max_position_embeddings": 2048,
        "bos_token_id": 0, "eos_token_id": 1})
}

fn tiny_moe() -> Value {
    json!({"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128})
}

fn tiny_mla() -> Value {
    json!({"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32,
        "intermediate_size": 256, "vocab_size": 512, "max_position_embeddings": 2048, "n_routed_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 128, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": null})
}

fn qwen3([hidden, layers, heads, kv_heads, intermediate]: [usize; 5]) -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": false,
        "bos_token_id": 151_643, "eos_token_id": 151_645, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": intermediate, "max_position_embeddings": 40_960,
        "max_window_layers": layers, "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 1_000_000,
        "sliding_window": null, "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151_936,
    })
}

fn qwen3_30b_a3b() -> Value {
    json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": false,
        "bos_token_id": 151_643, "decoder_sparse_step": 1, "eos_token_id": 151_645, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40_960,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 1_000_000.0, "sliding_window": null,
        "tie_word_embeddings": false, "use_sliding_window": false, "vocab_size": 151_936,
    })
}

fn llama([hidden, layers, heads, kv_heads, intermediate]: [usize; 5], rope_factor: f64, tied: bool) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false,
        "bos_token_id": 128_000, "eos_token_id": 128_001, "head_dim": hidden / heads, "hidden_act": "silu",
        "hidden_size": hidden, "intermediate_size": intermediate, "max_position_embeddings": 131_072,
        "mlp_bias": false, "num_attention_heads": heads, "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads, "rms_norm_eps": 1e-5,
        "rope_scaling": {"factor": rope_factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500_000.0, "tie_word_embeddings": tied, "vocab_size": 128_256,
    })
}

fn glm_4_7_flash() -> Value {
    json!({
        "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite", "attention_bias": false,
        "eos_token_id": [154_820, 154_827, 154_829], "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 10_240, "kv_lora_rank": 512,
        "max_position_embeddings": 202_752, "moe_intermediate_size": 1536, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 20, "num_experts_per_tok": 4,
        "num_hidden_layers": 47, "num_key_value_heads": 20, "pad_token_id": 154_820, "partial_rotary_factor": 1.0,
        "q_lora_rank": 768, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-5,
        "rope_scaling": null, "rope_theta": 1_000_000, "routed_scaling_factor": 1.8, "tie_word_embeddings": false,
        "topk_group": 1, "topk_method": "noaux_tc", "v_head_dim": 256, "vocab_size": 154_880,
    })
}

fn deepseek_v2_lite() -> Value {
    json!({
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "attention_bias": false,
        "bos_token_id": 100_000, "eos_token_id": 100_001, "first_k_dense_replace": 1, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 10_944, "kv_lora_rank": 512,
        "max_position_embeddings": 163_840, "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64,
        "n_shared_experts": 2, "norm_topk_prob": false, "num_attention_heads": 16, "num_experts_per_tok": 6,
        "num_hidden_layers": 27, "num_key_value_heads": 16, "q_lora_rank": null, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10_000, "routed_scaling_factor": 1.0, "scoring_func": "softmax",
        "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128,
        "vocab_size": 102_400,
    })
}

fn deepseek_v3() -> Value {
    json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": false,
        "bos_token_id": 0, "eos_token_id": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
        "hidden_size": 7168, "intermediate_size": 18_432, "kv_lora_rank": 512,
        "max_position_embeddings": 163_840, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256,
        "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 61, "num_key_value_heads": 128, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10_000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
        "tie_word_embeddings": false, "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128,
        "vocab_size": 129_280,
    })
}

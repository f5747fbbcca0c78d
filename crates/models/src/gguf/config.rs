//! The `config.json` that a GGUF file's metadata stands for.

use std::collections::HashSet;

use serde_json::{Map, Value, json};

use super::metadata::{MetaValue, Metadata};
use super::reader::GgufModel;
use super::rope;
use crate::error::Result;

/// `general.architecture` values that are read.
const ARCHITECTURES: &str = "llama, qwen3, qwen3moe, deepseek2";
/// Vocabulary of GLM-4.7-Flash, whose files carry the architecture `deepseek2`.
const GLM_VOCABULARY: u64 = 154_880;
/// `expert_gating_func` of a softmax and of a sigmoid.
const GATING_SOFTMAX: u64 = 1;
const GATING_SIGMOID: u64 = 2;
/// More rows of a projection are taken for a damaged file.
const MAX_ROWS: u64 = 1 << 24;

/// Builds the value that [`crate::ModelConfig::from_value`] reads.
///
/// # Errors
/// An architecture that is not supported, a key that is missing or of the wrong kind, and what this project's
/// architectures cannot express (rotation of a part of a head, softmax gating with normalised weights, ...): each names
/// the key.
pub(crate) fn config_json(model: &GgufModel) -> Result<Value> {
    let metadata = model.metadata();
    let name = metadata.text("general.architecture")?;
    let Some(name) = name else {
        return Err(metadata.error("general.architecture", "is missing"));
    };
    let reader = Reader { model, metadata, arch: name };
    match name {
        "llama" => reader.llama(),
        "qwen3" => reader.qwen3(),
        "qwen3moe" => reader.qwen3moe(),
        "deepseek2" => reader.deepseek2(),
        other => {
            let reason = format!("`{other}` is not supported; supported: {ARCHITECTURES}");
            Err(metadata.error("general.architecture", reason))
        }
    }
}

/// Rows of the query and key projections.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct AttentionRows {
    /// Of all query heads.
    pub query: usize,
    /// Of all key heads, and of all value heads.
    pub key: usize,
    /// Of one head.
    pub head: usize,
    /// Each head's rows are stored for interleaved rotation.
    pub interleaved: bool,
}

/// The rows of grouped-query attention; `None` for other architectures.
///
/// # Errors
/// A key that is missing or that gives no even heads.
pub(crate) fn attention_rows(metadata: &Metadata<'_>) -> Result<Option<AttentionRows>> {
    let Some(arch @ ("llama" | "qwen3" | "qwen3moe")) = metadata.text("general.architecture")? else {
        return Ok(None);
    };
    let key = |name: &str| format!("{arch}.{name}");
    let heads = metadata.required_integer(&key("attention.head_count"))?;
    let kv_heads = metadata.integer(&key("attention.head_count_kv"))?.unwrap_or(heads);
    let head = match metadata.integer(&key("attention.key_length"))? {
        Some(length) => length,
        None => metadata.required_integer(&key("embedding_length"))?.checked_div(heads).unwrap_or(0),
    };
    let rows = |heads: u64| {
        let rows = heads.checked_mul(head).filter(|&rows| rows > 0 && rows <= MAX_ROWS && head.is_multiple_of(2));
        rows.map(|rows| rows as usize)
    };
    match (rows(heads), rows(kv_heads)) {
        (Some(query), Some(key)) => {
            Ok(Some(AttentionRows { query, key, head: head as usize, interleaved: arch == "llama" }))
        }
        _ => Err(metadata.error(
            &key("attention.head_count"),
            format!("gives {heads} query and {kv_heads} key heads of {head} rows, expected even heads"),
        )),
    }
}

/// `expert_count`, 0 counting as none.
///
/// # Errors
/// A value that is no whole number.
pub(crate) fn expert_count(metadata: &Metadata<'_>) -> Result<Option<u64>> {
    let Some(arch) = metadata.text("general.architecture")? else {
        return Ok(None);
    };
    Ok(metadata.integer(&format!("{arch}.expert_count"))?.filter(|&count| count > 0))
}

struct Reader<'a> {
    model: &'a GgufModel,
    metadata: Metadata<'a>,
    arch: &'a str,
}

impl Reader<'_> {
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.arch)
    }

    fn integer(&self, name: &str) -> Result<u64> {
        self.metadata.required_integer(&self.key(name))
    }

    fn optional_integer(&self, name: &str) -> Result<Option<u64>> {
        self.metadata.integer(&self.key(name))
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        self.metadata.number(&self.key(name))
    }

    fn refuse<T>(&self, name: &str, reason: String) -> Result<T> {
        Err(self.metadata.error(&self.key(name), reason))
    }

    fn has(&self, tensor: &str) -> bool {
        self.model.tensor(tensor).is_some()
    }

    /// Fields of every architecture.
    fn common(&self, model_type: &str) -> Result<Map<String, Value>> {
        let metadata = self.metadata;
        let Some((_, embedding)) = self.model.tensor("token_embd.weight") else {
            return Err(crate::ModelError::MissingTensor {
                path: metadata.path.to_owned(),
                tensor: "token_embd.weight".to_owned(),
            });
        };
        let Some(eps) = self.number("attention.layer_norm_rms_epsilon")? else {
            return self.refuse("attention.layer_norm_rms_epsilon", "is missing".to_owned());
        };
        let mut config = Map::new();
        let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
        set("model_type", json!(model_type));
        set("vocab_size", json!(embedding.shape[0]));
        set("hidden_size", json!(self.integer("embedding_length")?));
        set("num_hidden_layers", json!(self.layers()?));
        set("num_nextn_predict_layers", json!(self.predict_layers()?));
        set("num_attention_heads", json!(self.integer("attention.head_count")?));
        set("max_position_embeddings", json!(self.integer("context_length")?));
        // The file holds an f32; its shortest decimal is what was meant.
        set("rms_norm_eps", json!(shortest(eps)));
        set("tie_word_embeddings", json!(!self.has("output.weight")));
        set("rope_theta", json!(self.number("rope.freq_base")?.unwrap_or(10_000.0)));
        let end_keys = ["eos_token_id", "eot_token_id", "eom_token_id"].map(|id| format!("tokenizer.ggml.{id}"));
        let mut ends: Vec<u32> = Vec::new();
        for key in end_keys {
            ends.extend(metadata.token_id(&key)?.filter(|id| !ends.contains(id)));
        }
        set("eos_token_id", json!(ends));
        for (name, key) in [("bos_token_id", "bos_token_id"), ("pad_token_id", "padding_token_id")] {
            if let Some(id) = metadata.token_id(&format!("tokenizer.ggml.{key}"))? {
                set(name, json!(id));
            }
        }
        Ok(config)
    }

    /// Blocks, those for multi-token prediction not counted.
    fn layers(&self) -> Result<u64> {
        let (blocks, predict) = (self.integer("block_count")?, self.predict_layers()?);
        match blocks.checked_sub(predict) {
            Some(layers) => Ok(layers),
            None => self.refuse("nextn_predict_layers", format!("is {predict}, there are {blocks} blocks")),
        }
    }

    fn predict_layers(&self) -> Result<u64> {
        Ok(self.optional_integer("nextn_predict_layers")?.unwrap_or(0))
    }

    /// Heads of grouped-query attention and their rotation.
    fn gqa(&self, config: &mut Map<String, Value>) -> Result<()> {
        let heads = self.integer("attention.head_count")?;
        let kv_heads = self.optional_integer("attention.head_count_kv")?.unwrap_or(heads);
        let head_dim = match self.optional_integer("attention.key_length")? {
            Some(length) => length,
            None => match self.integer("embedding_length")?.checked_div(heads) {
                Some(length) => length,
                None => return self.refuse("attention.head_count", "is 0".to_owned()),
            },
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(length) = self.optional_integer(name)?.filter(|&length| length != head_dim) {
                return self.refuse(name, format!("is {length}; this architecture needs the head's width {head_dim}"));
            }
        }
        config.insert("num_key_value_heads".into(), json!(kv_heads));
        config.insert("head_dim".into(), json!(head_dim));
        config.insert("attention_bias".into(), json!(self.has("blk.0.attn_output.bias")));
        if let Some(scaling) = rope::scaling(self.model, self.arch, head_dim)? {
            config.insert("rope_scaling".into(), scaling);
        }
        Ok(())
    }

    fn llama(&self) -> Result<Value> {
        if let Some(experts) = self.optional_integer("expert_count")?.filter(|&experts| experts > 0) {
            return self
                .refuse("expert_count", format!("is {experts}; mixtures of this architecture are not supported"));
        }
        let mut config = self.common("llama")?;
        self.gqa(&mut config)?;
        config.insert("intermediate_size".into(), json!(self.integer("feed_forward_length")?));
        config.insert("mlp_bias".into(), json!(self.has("blk.0.ffn_down.bias")));
        Ok(Value::Object(config))
    }

    fn qwen3(&self) -> Result<Value> {
        let mut config = self.common("qwen3")?;
        self.gqa(&mut config)?;
        config.insert("intermediate_size".into(), json!(self.integer("feed_forward_length")?));
        Ok(Value::Object(config))
    }

    fn qwen3moe(&self) -> Result<Value> {
        let mut config = self.common("qwen3_moe")?;
        self.gqa(&mut config)?;
        let dense = self.dense_layers()?;
        // Only layers without experts have this width; files of models without such layers may leave it out.
        if let Some(width) = self.optional_integer("feed_forward_length")? {
            config.insert("intermediate_size".into(), json!(width));
        }
        config.insert("mlp_only_layers".into(), json!(dense));
        config.insert("num_experts".into(), json!(self.integer("expert_count")?));
        config.insert("num_experts_per_tok".into(), json!(self.integer("expert_used_count")?));
        config.insert("moe_intermediate_size".into(), json!(self.integer("expert_feed_forward_length")?));
        let normalised = self.metadata.boolean(&self.key("expert_weights_norm"))?.unwrap_or(true);
        config.insert("norm_topk_prob".into(), json!(normalised));
        Ok(Value::Object(config))
    }

    /// Layers without a router.
    fn dense_layers(&self) -> Result<Vec<u64>> {
        // More blocks than tensors cannot be: the count is bounded by the file.
        let layers = self.layers()?;
        if layers > self.model.tensors().count() as u64 {
            return self.refuse("block_count", format!("is {layers}, the file has fewer tensors"));
        }
        let names: HashSet<&str> = self.model.tensors().map(|(_, tensor)| tensor.name.as_str()).collect();
        Ok((0..layers).filter(|i| !names.contains(format!("blk.{i}.ffn_gate_inp.weight").as_str())).collect())
    }

    fn deepseek2(&self) -> Result<Value> {
        let model_type = self.deepseek_type()?;
        let mut config = self.common(model_type)?;
        let rotated = self.integer("rope.dimension_count")?;
        // Files with the key/value matrix split for the latent cache store the cache's widths under the plain keys.
        let or_plain = |mla: &str, plain: &str| match self.optional_integer(mla)? {
            Some(length) => Ok(length),
            None => self.integer(plain),
        };
        let key_length = or_plain("attention.key_length_mla", "attention.key_length")?;
        let value_length = or_plain("attention.value_length_mla", "attention.value_length")?;
        let Some(nope) = key_length.checked_sub(rotated) else {
            return self.refuse("rope.dimension_count", format!("is {rotated}, keys have {key_length} channels"));
        };
        let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
        set("q_lora_rank", json!(self.optional_integer("attention.q_lora_rank")?.filter(|&rank| rank > 0)));
        set("kv_lora_rank", json!(self.integer("attention.kv_lora_rank")?));
        set("qk_nope_head_dim", json!(nope));
        set("qk_rope_head_dim", json!(rotated));
        set("v_head_dim", json!(value_length));
        set("rope_interleave", json!(true));
        set("intermediate_size", json!(self.integer("feed_forward_length")?));
        if let Some(scaling) = rope::scaling(self.model, self.arch, rotated)? {
            set("rope_scaling", scaling);
        }
        let dense = self.optional_integer("leading_dense_block_count")?.unwrap_or(0);
        set("first_k_dense_replace", json!(dense));
        self.deepseek_experts(model_type, &mut config)?;
        Ok(Value::Object(config))
    }

    /// Which of three models the file holds: gating tells version 2 from 3, the vocabulary GLM-4.7-Flash.
    fn deepseek_type(&self) -> Result<&'static str> {
        let blocks = self.integer("block_count")?;
        let vocabulary = self.model.tensor("token_embd.weight").map_or(0, |(_, t)| t.shape[0] as u64);
        let glm = vocabulary == GLM_VOCABULARY && matches!(blocks, 47 | 48);
        let default = if glm { GATING_SIGMOID } else { GATING_SOFTMAX };
        match self.optional_integer("expert_gating_func")?.filter(|&gating| gating != 0).unwrap_or(default) {
            GATING_SIGMOID if glm => Ok("glm4_moe_lite"),
            GATING_SIGMOID => Ok("deepseek_v3"),
            GATING_SOFTMAX => Ok("deepseek_v2"),
            other => self.refuse("expert_gating_func", format!("is {other}, expected 1 (softmax) or 2 (sigmoid)")),
        }
    }

    fn deepseek_experts(&self, model_type: &str, config: &mut Map<String, Value>) -> Result<()> {
        // Older files of GLM-4.7-Flash leave the key out.
        let normalised =
            self.metadata.boolean(&self.key("expert_weights_norm"))?.unwrap_or(model_type == "glm4_moe_lite");
        let softmax = model_type == "deepseek_v2";
        if softmax && normalised {
            return self
                .refuse("expert_weights_norm", "is true with softmax gating, which is not supported".to_owned());
        }
        let groups = self.optional_integer("expert_group_count")?.filter(|&groups| groups > 0).unwrap_or(1);
        let used = self.optional_integer("expert_group_used_count")?.filter(|&used| used > 0).unwrap_or(groups);
        let mut set = |name: &str, value: Value| config.insert(name.to_owned(), value);
        set("n_routed_experts", json!(self.integer("expert_count")?));
        set("num_experts_per_tok", json!(self.integer("expert_used_count")?));
        set("moe_intermediate_size", json!(self.integer("expert_feed_forward_length")?));
        set("n_shared_experts", json!(self.optional_integer("expert_shared_count")?.unwrap_or(0)));
        set("n_group", json!(groups));
        set("topk_group", json!(used));
        set("topk_method", json!(if groups > 1 { "group_limited_greedy" } else { "greedy" }));
        set("norm_topk_prob", json!(normalised));
        let scale = self.number("expert_weights_scale")?.filter(|&scale| scale != 0.0).unwrap_or(1.0);
        set("routed_scaling_factor", json!(shortest(scale)));
        Ok(())
    }
}

/// The decimal that an f32 was written from: 1e-6 rather than 9.999999974752427e-7.
pub(super) fn shortest(value: f64) -> f64 {
    let single = value as f32;
    match f64::from(single) == value {
        true => single.to_string().parse().unwrap_or(value),
        false => value,
    }
}

/// The `generation_config.json` that the metadata stands for.
///
/// # Errors
/// A key that is no number.
pub(crate) fn generation_json(metadata: &Metadata<'_>) -> Result<Value> {
    let mut config = Map::new();
    for (name, key) in [
        ("temperature", "temp"),
        ("top_k", "top_k"),
        ("top_p", "top_p"),
        ("min_p", "min_p"),
        ("repetition_penalty", "penalty_repeat"),
    ] {
        let key = format!("general.sampling.{key}");
        let value = match metadata.get(&key) {
            None => continue,
            Some(MetaValue::Unsigned(value)) => json!(value),
            Some(_) => json!(metadata.number(&key)?.map(shortest)),
        };
        config.insert(name.to_owned(), value);
    }
    Ok(Value::Object(config))
}

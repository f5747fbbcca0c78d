//! `config.json` of the supported architectures: read in both spellings (published files and those that
//! transformers 5 writes), validated, and turned into what the forward pass needs.

mod architectures;
mod fields;
mod rope;

use std::path::{Path, PathBuf};

use marlin_ops::linear::Activation;
use marlin_ops::moe::Routing;
use marlin_ops::rope::{Pairing, RopeConfig};
use serde_json::Value;

use crate::QuantizationConfig;
use crate::error::{ModelError, Result};
pub(crate) use fields::{Fields, read_json};

/// A supported `model_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// GLM-4.7-Flash: MLA, sigmoid-routed experts with a shared one.
    Glm4MoeLite,
    /// Qwen3 dense: GQA with q/k norm.
    Qwen3,
    /// Qwen3 mixture of experts.
    Qwen3Moe,
    /// Llama 2 and 3.
    Llama,
    /// DeepSeek-V2 and V2-Lite: MLA, softmax-routed experts.
    DeepseekV2,
    /// DeepSeek-V3 and R1.
    DeepseekV3,
}

impl Architecture {
    /// Every architecture.
    pub const ALL: [Architecture; 6] = [
        Architecture::Glm4MoeLite,
        Architecture::Qwen3,
        Architecture::Qwen3Moe,
        Architecture::Llama,
        Architecture::DeepseekV2,
        Architecture::DeepseekV3,
    ];

    /// The `model_type` of `config.json`.
    pub const fn model_type(self) -> &'static str {
        match self {
            Architecture::Glm4MoeLite => "glm4_moe_lite",
            Architecture::Qwen3 => "qwen3",
            Architecture::Qwen3Moe => "qwen3_moe",
            Architecture::Llama => "llama",
            Architecture::DeepseekV2 => "deepseek_v2",
            Architecture::DeepseekV3 => "deepseek_v3",
        }
    }

    /// Every `model_type`, comma separated, for messages.
    pub fn name_list() -> String {
        Self::ALL.map(Self::model_type).join(", ")
    }
}

/// How a layer attends. The same for all layers of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum AttentionConfig {
    /// Grouped-query attention: query head h reads key/value head `h / (heads / kv_heads)`.
    Gqa {
        /// Query heads.
        heads: usize,
        /// Key and value heads; divides `heads`.
        kv_heads: usize,
        /// Channels of a head.
        head_dim: usize,
        /// RMSNorm of every query and key head (weights `q_norm`, `k_norm` `[head_dim]`) before RoPE.
        qk_norm: bool,
        /// q, k and v projections have biases.
        qkv_bias: bool,
        /// The output projection has a bias.
        o_bias: bool,
        /// Factor on the scores before softmax.
        scale: f32,
    },
    /// Multi-head latent attention (DeepSeek-V2 paper, section 2.1).
    Mla {
        /// Query heads.
        heads: usize,
        /// Width of the query latent; `None` for a direct `q_proj`.
        q_lora_rank: Option<usize>,
        /// Width of the cached key/value latent.
        kv_lora_rank: usize,
        /// Channels of a query or key head without position.
        qk_nope_head_dim: usize,
        /// Rotated channels, at the end of each query head; one shared key.
        qk_rope_head_dim: usize,
        /// Channels of a value head.
        v_head_dim: usize,
        /// `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj` have biases.
        bias: bool,
        /// Epsilon of `q_a_layernorm` and `kv_a_layernorm`: 1e-6 in every model, not the config's.
        latent_norm_eps: f32,
        /// Factor on the scores before softmax, YaRN's correction included.
        scale: f32,
    },
}

/// The feed-forward part of one layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum MlpConfig {
    /// One gated MLP.
    Dense {
        /// Width.
        intermediate: usize,
        /// gate, up and down have biases.
        bias: bool,
    },
    /// Routed experts, with an optional shared one that every token takes, unweighted.
    Moe {
        /// Routed experts.
        experts: usize,
        /// Width of each routed expert.
        intermediate: usize,
        /// Width of the shared expert.
        shared_intermediate: Option<usize>,
        /// The shared expert's gate, up and down have biases.
        shared_bias: bool,
        /// The router's rule.
        routing: Routing,
        /// The router has an `e_score_correction_bias` `[experts]`.
        correction_bias: bool,
    },
}

/// What differs from layer to layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerConfig {
    /// Keys visible to a query, itself included; `None` for all earlier ones.
    pub window: Option<usize>,
    /// Feed-forward part.
    pub mlp: MlpConfig,
}

/// A validated model configuration.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// The file it was read from, for messages.
    pub path: PathBuf,
    /// Architecture.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers, multi-token-prediction layers not counted.
    pub num_layers: usize,
    /// Rows of the embedding and of the output head.
    pub vocab_size: usize,
    /// Epsilon of all norms but MLA's latent ones.
    pub rms_norm_eps: f32,
    /// Longest context.
    pub max_position_embeddings: usize,
    /// The output head is the embedding matrix unless the files hold an `lm_head.weight`.
    pub tie_word_embeddings: bool,
    /// Rotary frequencies.
    pub rope: RopeConfig,
    /// Which channels RoPE pairs. Interleaved MLA stays interleaved in the cache: the scores are the same.
    pub pairing: Pairing,
    /// Attention of every layer.
    pub attention: AttentionConfig,
    /// One entry a layer.
    pub layers: Vec<LayerConfig>,
    /// Activation of the gate in every MLP.
    pub activation: Activation,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// Token that starts a text.
    pub bos_token_id: Option<u32>,
    /// Padding token.
    pub pad_token_id: Option<u32>,
    /// Multi-token-prediction layers that may follow the last layer in the files; not used.
    pub num_nextn_predict_layers: usize,
    /// Schemes of native quantized modules.
    pub quantization: QuantizationConfig,
}

impl ModelConfig {
    /// Reads `dir/config.json`, or the metadata of a GGUF file (see [`crate::Checkpoint::open`]).
    ///
    /// # Errors
    /// A missing or invalid file, an unknown `model_type` or activation, a missing, non-positive, non-integer or
    /// absurd dimension, dimensions that contradict each other: each names the file and the field.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let (path, value) = Self::json(dir)?;
        Self::from_value(&path, &value)
    }

    /// What [`ModelConfig::from_dir`] reads, with the file that it comes from.
    ///
    /// # Errors
    /// A missing file or one that is not valid.
    pub fn json(dir: &Path) -> Result<(PathBuf, Value)> {
        if let Some(file) = crate::gguf::find(dir)? {
            let json = crate::gguf::config_json(&file)?;
            return Ok((file, json));
        }
        let path = dir.join("config.json");
        let json = read_json(&path, "every model folder has one")?;
        Ok((path, json))
    }

    /// Reads a parsed `config.json`; `path` appears in errors.
    ///
    /// # Errors
    /// As [`ModelConfig::from_dir`].
    pub fn from_value(path: &Path, value: &Value) -> Result<Self> {
        let fields = Fields::new(path, value)?;
        let model_type = fields.string("model_type")?;
        let known = Architecture::ALL.into_iter().find(|a| a.model_type() == model_type);
        let architecture = known.ok_or_else(|| ModelError::UnknownArchitecture {
            path: path.to_owned(),
            model_type: model_type.to_owned(),
            known: Architecture::name_list(),
        })?;
        architectures::read(architecture, &fields)
    }
}

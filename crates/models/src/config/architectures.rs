//! What each architecture reads from its config, with the defaults of its transformers class where a published or a
//! saved config leaves a field out.

use marlin_ops::linear::Activation;
use marlin_ops::moe::{GroupScore, Routing, Scoring};
use marlin_ops::rope::Pairing;
use serde_json::Value;

use super::rope::{self, RopeFields};
use super::{Architecture, AttentionConfig, Fields, LayerConfig, MlpConfig, ModelConfig};
use crate::QuantizationConfig;
use crate::error::Result;

/// Largest width, head count, expert count and vocabulary that is not taken for a damaged file.
const MAX_DIMENSION: u64 = 1 << 24;
/// Largest number of layers.
const MAX_LAYERS: u64 = 1024;
/// Largest context.
const MAX_POSITIONS: u64 = 1 << 28;
/// Epsilon of MLA's latent norms: their class default, which no model overrides.
const LATENT_NORM_EPS: f32 = 1e-6;

/// Reads the config of `architecture`.
pub(super) fn read(architecture: Architecture, fields: &Fields<'_>) -> Result<ModelConfig> {
    let reader = Reader {
        architecture,
        fields,
        hidden_size: dimension(fields, "hidden_size")?,
        num_layers: fields.integer("num_hidden_layers", 1, MAX_LAYERS)?,
        heads: dimension(fields, "num_attention_heads")?,
    };
    reader.check_hidden_per_head()?;
    let max_positions = match (architecture, fields.get("max_position_embeddings")) {
        (Architecture::Llama, None) => 2048,
        _ => fields.integer("max_position_embeddings", 1, MAX_POSITIONS)?,
    };
    let (attention, rope) = reader.attention(max_positions)?;
    let windows = reader.windows()?;
    let layers = (0..reader.num_layers)
        .map(|i| Ok(LayerConfig { window: windows[i], mlp: reader.mlp(i)? }))
        .collect::<Result<_>>()?;
    Ok(ModelConfig {
        path: fields.path().to_owned(),
        architecture,
        hidden_size: reader.hidden_size,
        num_layers: reader.num_layers,
        vocab_size: dimension(fields, "vocab_size")?,
        rms_norm_eps: reader.rms_norm_eps()?,
        max_position_embeddings: max_positions,
        tie_word_embeddings: fields.boolean("tie_word_embeddings", false)?,
        rope: rope.config,
        pairing: reader.pairing()?,
        attention,
        layers,
        activation: activation(fields)?,
        eos_token_ids: fields.token_ids("eos_token_id")?,
        bos_token_id: fields.token_id("bos_token_id")?,
        pad_token_id: fields.token_id("pad_token_id")?,
        num_nextn_predict_layers: fields.optional_integer("num_nextn_predict_layers", 0, MAX_LAYERS)?.unwrap_or(0),
        quantization: QuantizationConfig::read(fields)?,
    })
}

fn dimension(fields: &Fields<'_>, name: &str) -> Result<usize> {
    fields.integer(name, 1, MAX_DIMENSION)
}

fn activation(fields: &Fields<'_>) -> Result<Activation> {
    Ok(match fields.optional_string("hidden_act")?.unwrap_or("silu") {
        "silu" | "swish" => Activation::Silu,
        "gelu" => Activation::GeluErf,
        "gelu_pytorch_tanh" | "gelu_new" => Activation::GeluTanh,
        "quick_gelu" => Activation::GeluQuick,
        "relu" => Activation::Relu,
        "relu2" => Activation::Relu2,
        "sigmoid" => Activation::Sigmoid,
        other => {
            let reason = format!(
                "`{other}` is not supported; supported: silu, swish, gelu, gelu_new, gelu_pytorch_tanh, quick_gelu, \
                 relu, relu2, sigmoid"
            );
            return Err(fields.error("hidden_act", reason));
        }
    })
}

/// The fields and the dimensions that others are checked against.
struct Reader<'a> {
    architecture: Architecture,
    fields: &'a Fields<'a>,
    hidden_size: usize,
    num_layers: usize,
    heads: usize,
}

impl Reader<'_> {
    fn is_mla(&self) -> bool {
        use Architecture::{DeepseekV2, DeepseekV3, Glm4MoeLite};
        matches!(self.architecture, Glm4MoeLite | DeepseekV2 | DeepseekV3)
    }

    fn dimension(&self, name: &str) -> Result<usize> {
        dimension(self.fields, name)
    }

    fn dimension_or(&self, name: &str, default: usize) -> Result<usize> {
        let given = self.fields.optional_integer(name, 1, MAX_DIMENSION)?;
        Ok(given.unwrap_or(default))
    }

    /// Llama and DeepSeek-V2 require whole heads in the hidden width even where it is not used.
    fn check_hidden_per_head(&self) -> Result<()> {
        use Architecture::{DeepseekV2, Llama};
        let required = matches!(self.architecture, Llama | DeepseekV2);
        if required && !self.hidden_size.is_multiple_of(self.heads) {
            let reason = format!("is {}, must divide hidden_size {}", self.heads, self.hidden_size);
            return Err(self.fields.error("num_attention_heads", reason));
        }
        Ok(())
    }

    fn rms_norm_eps(&self) -> Result<f32> {
        let default = match self.architecture {
            Architecture::Glm4MoeLite => 1e-5,
            _ => 1e-6,
        };
        let eps = self.fields.optional_positive("rms_norm_eps")?.unwrap_or(default);
        if eps >= 1.0 || eps as f32 <= 0.0 {
            let reason = format!("is {eps}, must be above 0 and below 1");
            return Err(self.fields.error("rms_norm_eps", reason));
        }
        Ok(eps as f32)
    }

    /// v2 rotates interleaved pairs always; v3 and GLM unless `rope_interleave` is false.
    fn pairing(&self) -> Result<Pairing> {
        use Architecture::{DeepseekV2, DeepseekV3, Glm4MoeLite};
        let interleaved = match self.architecture {
            DeepseekV2 => true,
            DeepseekV3 | Glm4MoeLite => self.fields.boolean("rope_interleave", true)?,
            _ => false,
        };
        Ok(match interleaved {
            true => Pairing::Interleaved,
            false => Pairing::Half,
        })
    }

    fn attention(&self, max_positions: usize) -> Result<(AttentionConfig, RopeFields)> {
        if self.is_mla() { self.mla(max_positions) } else { self.gqa(max_positions) }
    }

    fn gqa(&self, max_positions: usize) -> Result<(AttentionConfig, RopeFields)> {
        let f = self.fields;
        let per_head = || match self.hidden_size.is_multiple_of(self.heads) {
            true => Ok(self.hidden_size / self.heads),
            false => Err(f.error("head_dim", "is missing and hidden_size is not a multiple of the heads")),
        };
        let head_dim = match f.optional_integer("head_dim", 1, MAX_DIMENSION)? {
            Some(given) => given,
            // Qwen3's class default, unlike the others'.
            None if self.architecture == Architecture::Qwen3 && !f.is_null("head_dim") => 128,
            None => per_head()?,
        };
        if head_dim % 2 != 0 {
            return Err(f.error("head_dim", format!("is {head_dim}, must be even to be rotated")));
        }
        self.check_width("head_dim", self.heads, head_dim)?;
        let kv_heads = self.kv_heads()?;
        let bias = f.boolean("attention_bias", false)?;
        let attention = AttentionConfig::Gqa {
            heads: self.heads,
            kv_heads,
            head_dim,
            qk_norm: self.architecture != Architecture::Llama,
            qkv_bias: bias,
            o_bias: bias,
            scale: (head_dim as f64).powf(-0.5) as f32,
        };
        Ok((attention, rope::read(f, head_dim, max_positions)?))
    }

    fn kv_heads(&self) -> Result<usize> {
        const NAME: &str = "num_key_value_heads";
        let f = self.fields;
        let kv_heads = match f.optional_integer(NAME, 1, MAX_DIMENSION)? {
            Some(given) => given,
            None if f.is_null(NAME) || self.architecture == Architecture::Llama => self.heads,
            None if self.architecture == Architecture::Qwen3 => 32,
            None => return Err(f.error(NAME, "is missing")),
        };
        if !self.heads.is_multiple_of(kv_heads) {
            let reason = format!("is {kv_heads}, must divide num_attention_heads {}", self.heads);
            return Err(f.error(NAME, reason));
        }
        Ok(kv_heads)
    }

    fn mla(&self, max_positions: usize) -> Result<(AttentionConfig, RopeFields)> {
        let f = self.fields;
        let kv_heads = self.dimension_or("num_key_value_heads", self.heads)?;
        if kv_heads != self.heads {
            let reason = format!("is {kv_heads}, MLA needs num_attention_heads {}", self.heads);
            return Err(f.error("num_key_value_heads", reason));
        }
        // An omitted rank means the class default; only an explicit null means a direct q_proj.
        let q_lora_rank = match f.is_null("q_lora_rank") {
            true => None,
            false => Some(self.dimension_or(
                "q_lora_rank",
                if self.architecture == Architecture::Glm4MoeLite { 768 } else { 1536 },
            )?),
        };
        let (nope, rotated) = (self.dimension("qk_nope_head_dim")?, self.dimension("qk_rope_head_dim")?);
        let v_head_dim = self.dimension("v_head_dim")?;
        if rotated % 2 != 0 {
            return Err(f.error("qk_rope_head_dim", format!("is {rotated}, must be even to be rotated")));
        }
        self.check_width("qk_nope_head_dim", self.heads, nope + rotated)?;
        self.check_width("v_head_dim", self.heads, nope + v_head_dim)?;
        let rope = rope::read(f, rotated, max_positions)?;
        let attention = AttentionConfig::Mla {
            heads: self.heads,
            q_lora_rank,
            kv_lora_rank: self.dimension("kv_lora_rank")?,
            qk_nope_head_dim: nope,
            qk_rope_head_dim: rotated,
            v_head_dim,
            bias: f.boolean("attention_bias", false)?,
            latent_norm_eps: LATENT_NORM_EPS,
            scale: (((nope + rotated) as f64).powf(-0.5) * rope.mla_scale) as f32,
        };
        Ok((attention, rope))
    }

    fn check_width(&self, name: &str, heads: usize, width: usize) -> Result<()> {
        let product = heads.checked_mul(width);
        if product.is_some_and(|p| p as u64 <= MAX_DIMENSION) {
            return Ok(());
        }
        let reason = format!("gives {heads} heads of {width}, above {MAX_DIMENSION} channels");
        Err(self.fields.error(name, reason))
    }

    /// The sliding window of every layer.
    fn windows(&self) -> Result<Vec<Option<usize>>> {
        let f = self.fields;
        let slides = matches!(self.architecture, Architecture::Qwen3 | Architecture::Qwen3Moe);
        if !slides {
            return Ok(vec![None; self.num_layers]);
        }
        let in_use = f.boolean("use_sliding_window", false)? && !f.is_null("sliding_window");
        let window = match in_use {
            true => Some(f.optional_integer("sliding_window", 1, MAX_POSITIONS)?.unwrap_or(4096)),
            false => None,
        };
        if self.architecture == Architecture::Qwen3Moe {
            return Ok(vec![window; self.num_layers]);
        }
        if let Some(types) = self.layer_types("layer_types", "sliding_attention", "full_attention")? {
            if window.is_none() && types.contains(&true) {
                return Err(f.error("layer_types", "names sliding_attention, but no sliding window is in use"));
            }
            return Ok(types.iter().map(|&slides| window.filter(|_| slides)).collect());
        }
        let first = f.optional_integer("max_window_layers", 0, MAX_DIMENSION)?.unwrap_or(28);
        Ok((0..self.num_layers).map(|i| window.filter(|_| i >= first)).collect())
    }

    /// One entry a layer of a list that holds two names: true for `yes`.
    fn layer_types(&self, name: &str, yes: &str, no: &str) -> Result<Option<Vec<bool>>> {
        let Some(list) = self.fields.list(name)? else {
            return Ok(None);
        };
        if list.len() != self.num_layers {
            let reason = format!("has {} entries for {} layers", list.len(), self.num_layers);
            return Err(self.fields.error(name, reason));
        }
        let kind = |v: &Value| match v.as_str() {
            Some(v) if v == yes => Ok(true),
            Some(v) if v == no => Ok(false),
            _ => Err(self.fields.error(name, format!("holds {v}, expected \"{yes}\" or \"{no}\""))),
        };
        list.iter().map(kind).collect::<Result<_>>().map(Some)
    }

    fn mlp(&self, layer: usize) -> Result<MlpConfig> {
        if self.is_moe(layer)? {
            return self.moe();
        }
        let bias = match self.architecture {
            Architecture::Llama | Architecture::DeepseekV2 => self.fields.boolean("mlp_bias", false)?,
            _ => false,
        };
        Ok(MlpConfig::Dense { intermediate: self.dimension("intermediate_size")?, bias })
    }

    fn is_moe(&self, layer: usize) -> Result<bool> {
        let f = self.fields;
        let first_dense = |default| {
            let given = f.optional_integer("first_k_dense_replace", 0, MAX_DIMENSION)?;
            Ok(layer >= given.unwrap_or(default))
        };
        match self.architecture {
            Architecture::Qwen3 | Architecture::Llama => Ok(false),
            Architecture::DeepseekV2 => first_dense(0),
            Architecture::DeepseekV3 => first_dense(3),
            // transformers reads the list and ignores first_k_dense_replace, which published configs give instead.
            Architecture::Glm4MoeLite => match self.layer_types("mlp_layer_types", "sparse", "dense")? {
                Some(sparse) => Ok(sparse[layer]),
                None => first_dense(1),
            },
            Architecture::Qwen3Moe => {
                let mut dense = false;
                for index in f.list("mlp_only_layers")?.unwrap_or_default() {
                    match index.as_u64() {
                        Some(index) => dense |= index == layer as u64,
                        None => return Err(f.error("mlp_only_layers", format!("holds {index}, expected a layer"))),
                    }
                }
                let step = f.optional_integer("decoder_sparse_step", 1, MAX_DIMENSION)?.unwrap_or(1);
                Ok(!dense && self.qwen_experts()? > 0 && (layer + 1).is_multiple_of(step))
            }
        }
    }

    /// Published files say `num_experts`, transformers 5 `num_local_experts`.
    fn qwen_experts(&self) -> Result<usize> {
        let f = self.fields;
        let published = f.optional_integer("num_experts", 0, MAX_DIMENSION)?;
        let saved = f.optional_integer("num_local_experts", 0, MAX_DIMENSION)?;
        match (published, saved) {
            (Some(a), Some(b)) if a != b => {
                Err(f.error("num_experts", format!("is {a}, but num_local_experts is {b}")))
            }
            (a, b) => Ok(a.or(b).unwrap_or(128)),
        }
    }

    fn moe(&self) -> Result<MlpConfig> {
        let f = self.fields;
        let (experts_field, experts) = match self.architecture {
            Architecture::Qwen3Moe => ("num_experts", self.qwen_experts()?),
            _ => ("n_routed_experts", self.dimension("n_routed_experts")?),
        };
        let routing = self.routing()?;
        self.check_routing(experts_field, experts, &routing)?;
        let intermediate = self.dimension("moe_intermediate_size")?;
        let shared = match self.architecture {
            Architecture::Qwen3Moe => 0,
            _ if f.is_null("n_shared_experts") => 0,
            arch => {
                let default = if arch == Architecture::DeepseekV2 { 2 } else { 1 };
                f.optional_integer("n_shared_experts", 0, MAX_DIMENSION)?.unwrap_or(default)
            }
        };
        if (shared as u64).saturating_mul(intermediate as u64) > MAX_DIMENSION {
            let reason = format!("is {shared} of width {intermediate}, above {MAX_DIMENSION} together");
            return Err(f.error("n_shared_experts", reason));
        }
        Ok(MlpConfig::Moe {
            experts,
            intermediate,
            shared_intermediate: (shared > 0).then_some(shared * intermediate),
            shared_bias: self.architecture == Architecture::DeepseekV2 && f.boolean("mlp_bias", false)?,
            routing,
            correction_bias: matches!(self.architecture, Architecture::Glm4MoeLite | Architecture::DeepseekV3),
        })
    }

    fn routing(&self) -> Result<Routing> {
        let f = self.fields;
        let top_k = match (self.architecture, f.get("num_experts_per_tok")) {
            (Architecture::Qwen3Moe, None) => 8,
            _ => self.dimension("num_experts_per_tok")?,
        };
        let softmax = Routing {
            top_k,
            scoring: Scoring::Softmax,
            n_group: 1,
            topk_group: 1,
            group_score: GroupScore::Max,
            norm_topk_prob: false,
            norm_eps: 0.0,
            routed_scaling_factor: 1.0,
        };
        match self.architecture {
            Architecture::Qwen3Moe => Ok(Routing { norm_topk_prob: f.boolean("norm_topk_prob", false)?, ..softmax }),
            Architecture::DeepseekV2 => {
                let (n_group, topk_group) = match f.optional_string("topk_method")?.unwrap_or("greedy") {
                    "greedy" => (1, 1),
                    "group_limited_greedy" => (self.dimension("n_group")?, self.dimension("topk_group")?),
                    other => {
                        let reason = format!("`{other}` is not one of greedy, group_limited_greedy");
                        return Err(f.error("topk_method", reason));
                    }
                };
                // norm_topk_prob is not read: transformers ignores it for this architecture.
                Ok(Routing { n_group, topk_group, routed_scaling_factor: self.routed_scaling(1.0)?, ..softmax })
            }
            arch => {
                let glm = arch == Architecture::Glm4MoeLite;
                let (n_group, topk_group, scaling) = if glm { (1, 1, 1.8) } else { (8, 4, 2.5) };
                Ok(Routing {
                    top_k,
                    scoring: Scoring::Sigmoid,
                    n_group: self.dimension_or("n_group", n_group)?,
                    topk_group: self.dimension_or("topk_group", topk_group)?,
                    group_score: GroupScore::TopTwoSum,
                    norm_topk_prob: f.boolean("norm_topk_prob", true)?,
                    norm_eps: 1e-20,
                    routed_scaling_factor: self.routed_scaling(scaling)?,
                })
            }
        }
    }

    fn routed_scaling(&self, default: f64) -> Result<f32> {
        let name = "routed_scaling_factor";
        let scaling = self.fields.optional_positive(name)?.unwrap_or(default);
        match (scaling as f32).is_finite() {
            true => Ok(scaling as f32),
            false => Err(self.fields.error(name, format!("is {scaling}, beyond f32"))),
        }
    }

    fn check_routing(&self, experts_field: &str, experts: usize, routing: &Routing) -> Result<()> {
        let f = self.fields;
        let Routing { top_k, n_group, topk_group, group_score, .. } = *routing;
        if !experts.is_multiple_of(n_group) {
            return Err(f.error("n_group", format!("is {n_group}, must divide the {experts} experts")));
        }
        let per_group = experts / n_group;
        if group_score == GroupScore::TopTwoSum && per_group < 2 {
            let reason = format!("is {experts}, must give each of {n_group} groups two experts");
            return Err(f.error(experts_field, reason));
        }
        if topk_group > n_group {
            return Err(f.error("topk_group", format!("is {topk_group}, there are {n_group} groups")));
        }
        if top_k > topk_group * per_group {
            let reason = format!("is {top_k}, only {} experts can be chosen", topk_group * per_group);
            return Err(f.error("num_experts_per_tok", reason));
        }
        Ok(())
    }
}

//! Every tensor of an architecture by its published name: what quantizers and the synthesizer walk over.

use crate::checkpoint::Checkpoint;
use crate::config::{AttentionConfig, MlpConfig, ModelConfig};
use crate::error::Result;

/// What a linear module is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ModuleKind {
    /// `model.embed_tokens`, `[vocab, hidden]`.
    Embedding,
    /// `lm_head`, absent when tied.
    LmHead,
    /// A projection of an attention layer.
    Attention,
    /// gate, up or down of a dense layer.
    Mlp,
    /// `mlp.gate`, the router.
    Router,
    /// gate, up or down of a routed expert.
    Expert,
    /// gate, up or down of the shared expert.
    SharedExpert,
}

/// One linear module: tensor `{name}.weight` `[out_features, in_features]`, or `{name}.mm.*` when quantized.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearModule {
    /// Module path, for example `model.layers.3.mlp.experts.7.up_proj`.
    pub name: String,
    /// N.
    pub out_features: usize,
    /// K.
    pub in_features: usize,
    /// Whether `{name}.bias` `[out_features]` is stored.
    pub bias: bool,
    /// What it is part of.
    pub kind: ModuleKind,
    /// Layer index, `None` for the embedding and the output head.
    pub layer: Option<usize>,
}

/// One tensor that is a vector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VectorTensor {
    /// Full tensor name.
    pub name: String,
    /// Length.
    pub len: usize,
    /// A router's `e_score_correction_bias` (stored f32) rather than a norm's weight.
    pub correction_bias: bool,
}

impl ModelConfig {
    /// Every linear module, in forward order, routed experts by their per-expert names.
    pub fn linear_modules(&self) -> Vec<LinearModule> {
        let mut modules = Vec::new();
        let whole = |name: &str, kind| LinearModule {
            name: name.to_owned(),
            out_features: self.vocab_size,
            in_features: self.hidden_size,
            bias: false,
            kind,
            layer: None,
        };
        modules.push(whole("model.embed_tokens", ModuleKind::Embedding));
        for (i, layer) in self.layers.iter().enumerate() {
            let mut list = LayerModules { prefix: format!("model.layers.{i}."), layer: i, modules: &mut modules };
            list.attention(&self.attention, self.hidden_size);
            list.mlp(&layer.mlp, self.hidden_size);
        }
        if !self.tie_word_embeddings {
            modules.push(whole("lm_head", ModuleKind::LmHead));
        }
        modules
    }

    /// Every vector: norms and correction biases.
    pub fn vector_tensors(&self) -> Vec<VectorTensor> {
        let mut vectors = Vec::new();
        let mut push = |name: String, len, correction_bias| {
            vectors.push(VectorTensor { name, len, correction_bias });
        };
        for (i, layer) in self.layers.iter().enumerate() {
            let name = |suffix: &str| format!("model.layers.{i}.{suffix}");
            push(name("input_layernorm.weight"), self.hidden_size, false);
            match self.attention {
                AttentionConfig::Gqa { qk_norm: false, .. } => {}
                AttentionConfig::Gqa { head_dim, .. } => {
                    push(name("self_attn.q_norm.weight"), head_dim, false);
                    push(name("self_attn.k_norm.weight"), head_dim, false);
                }
                AttentionConfig::Mla { q_lora_rank, kv_lora_rank, .. } => {
                    if let Some(rank) = q_lora_rank {
                        push(name("self_attn.q_a_layernorm.weight"), rank, false);
                    }
                    push(name("self_attn.kv_a_layernorm.weight"), kv_lora_rank, false);
                }
            }
            push(name("post_attention_layernorm.weight"), self.hidden_size, false);
            if let MlpConfig::Moe { experts, correction_bias: true, .. } = layer.mlp {
                push(name("mlp.gate.e_score_correction_bias"), experts, true);
            }
        }
        push("model.norm.weight".to_owned(), self.hidden_size, false);
        vectors
    }
}

impl ModelConfig {
    /// Refuses tensors of `checkpoint` that nothing has read, but for what published checkpoints carry along: rotary
    /// frequencies (old Llama files) and multi-token-prediction layers after the last one.
    ///
    /// # Errors
    /// [`crate::ModelError::ExtraTensor`] for the first by name.
    pub fn check_no_extra_tensors(&self, checkpoint: &Checkpoint) -> Result<()> {
        checkpoint.check_all_used(|name| name.ends_with(".rotary_emb.inv_freq") || self.is_of_prediction_layer(name))
    }

    /// Whether a tensor, by name, belongs to a multi-token-prediction layer after the last one.
    pub fn is_of_prediction_layer(&self, tensor: &str) -> bool {
        let predict_layers = self.num_layers..self.num_layers + self.num_nextn_predict_layers;
        let layer = tensor
            .strip_prefix("model.layers.")
            .and_then(|rest| rest.split_once('.'))
            .and_then(|(index, _)| index.parse::<usize>().ok());
        layer.is_some_and(|layer| predict_layers.contains(&layer))
    }
}

/// Collects the modules of one layer.
struct LayerModules<'a> {
    prefix: String,
    layer: usize,
    modules: &'a mut Vec<LinearModule>,
}

impl LayerModules<'_> {
    fn push(&mut self, name: &str, out_features: usize, in_features: usize, bias: bool, kind: ModuleKind) {
        self.modules.push(LinearModule {
            name: format!("{}{name}", self.prefix),
            out_features,
            in_features,
            bias,
            kind,
            layer: Some(self.layer),
        });
    }

    fn attention(&mut self, attention: &AttentionConfig, hidden: usize) {
        let mut push = |name: &str, n, k, bias| {
            self.push(&format!("self_attn.{name}"), n, k, bias, ModuleKind::Attention);
        };
        match *attention {
            AttentionConfig::Gqa { heads, kv_heads, head_dim, qkv_bias, o_bias, .. } => {
                push("q_proj", heads * head_dim, hidden, qkv_bias);
                push("k_proj", kv_heads * head_dim, hidden, qkv_bias);
                push("v_proj", kv_heads * head_dim, hidden, qkv_bias);
                push("o_proj", hidden, heads * head_dim, o_bias);
            }
            AttentionConfig::Mla {
                heads,
                q_lora_rank,
                kv_lora_rank,
                qk_nope_head_dim,
                qk_rope_head_dim,
                v_head_dim,
                bias,
                ..
            } => {
                let q_width = heads * (qk_nope_head_dim + qk_rope_head_dim);
                match q_lora_rank {
                    None => push("q_proj", q_width, hidden, false),
                    Some(rank) => {
                        push("q_a_proj", rank, hidden, bias);
                        push("q_b_proj", q_width, rank, false);
                    }
                }
                push("kv_a_proj_with_mqa", kv_lora_rank + qk_rope_head_dim, hidden, bias);
                push("kv_b_proj", heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank, false);
                push("o_proj", hidden, heads * v_head_dim, bias);
            }
        }
    }

    fn mlp(&mut self, mlp: &MlpConfig, hidden: usize) {
        match *mlp {
            MlpConfig::Dense { intermediate, bias } => {
                self.gated("mlp", hidden, intermediate, bias, ModuleKind::Mlp);
            }
            MlpConfig::Moe { experts, intermediate, shared_intermediate, shared_bias, .. } => {
                self.push("mlp.gate", experts, hidden, false, ModuleKind::Router);
                for e in 0..experts {
                    let name = format!("mlp.experts.{e}");
                    self.gated(&name, hidden, intermediate, false, ModuleKind::Expert);
                }
                if let Some(width) = shared_intermediate {
                    let name = "mlp.shared_experts";
                    self.gated(name, hidden, width, shared_bias, ModuleKind::SharedExpert);
                }
            }
        }
    }

    fn gated(&mut self, name: &str, hidden: usize, intermediate: usize, bias: bool, kind: ModuleKind) {
        self.push(&format!("{name}.gate_proj"), intermediate, hidden, bias, kind);
        self.push(&format!("{name}.up_proj"), intermediate, hidden, bias, kind);
        self.push(&format!("{name}.down_proj"), hidden, intermediate, bias, kind);
    }
}

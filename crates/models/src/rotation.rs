//! The same model in rotated bases: orthonormal Hadamard matrices `H` on the way from one linear layer to the next,
//! folded into the weights on both sides, so that the model computes the same and nothing happens at run time.
//!
//! `H` is block-diagonal, of Sylvester's matrices divided by the root of their size: symmetric and its own inverse. With
//! `W [N, K]`, outputs that are rotated ask for `H W`, inputs for `W H`. Where a norm lies between, its weight `gamma`
//! moves into the linear layers that read it, `W diag(gamma) H`, and becomes 1: a norm without weight commutes with `H`.
//!
//! - residual stream: embeddings, `o_proj` and every `down_proj` write it; `lm_head` and all that follows a layer's
//!   norms, routers among it, read it;
//! - values: from `v_proj`, or the value rows of `kv_b_proj`, to `o_proj`, within each head;
//! - latents of multi-head latent attention: from `q_a_proj`, and `kv_a_proj_with_mqa` without its rotary rows, through
//!   their norms to `q_b_proj` and `kv_b_proj`.
//!
//! The input of `down_proj` stays as it is: a product with the gate precedes it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use marlin_formats::hadamard;

use crate::checkpoint::Checkpoint;
use crate::config::{AttentionConfig, ModelConfig};
use crate::error::{ModelError, Result};
use crate::modules::{LinearModule, ModuleKind};

/// The largest block of `H`; a narrower axis, or one that 128 does not divide, has the largest power of two that does.
const LARGEST_BLOCK: usize = 128;

/// What is folded into the weights of a model.
#[derive(Debug)]
pub(crate) struct Rotation {
    /// Linear layers by path.
    modules: BTreeMap<String, Fold>,
    /// Norms whose weights have moved, by tensor name.
    norms: BTreeSet<String>,
}

/// What is folded into one linear layer.
#[derive(Debug)]
struct Fold {
    /// `[K]`.
    gamma: Option<Arc<[f32]>>,
    input: Option<Basis>,
    output: Option<Basis>,
}

/// Where the folds of a linear layer come from.
struct Sides {
    /// The norm, by tensor name, whose output it reads.
    norm: Option<String>,
    input: Option<Basis>,
    output: Option<Basis>,
}

/// The rotated features of an axis: of every `period`, `len` from `start`, in blocks of `block`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Basis {
    period: usize,
    start: usize,
    len: usize,
    block: usize,
}

impl Basis {
    /// Every feature of an axis of units of `width`, none of whose blocks reaches into the next.
    fn whole(width: usize) -> Self {
        let block = block(width);
        Self { period: block, start: 0, len: block, block }
    }

    /// `len` features from `start` of every `period`.
    fn part(period: usize, start: usize, len: usize) -> Self {
        Self { period, start, len, block: block(len) }
    }

    /// Rotates the first axis of `values`, `[whole periods, stride]`.
    fn rotate(&self, values: &mut [f64], stride: usize) {
        for period in values.chunks_exact_mut(self.period * stride) {
            let rotated = &mut period[self.start * stride..][..self.len * stride];
            rotated.chunks_exact_mut(self.block * stride).for_each(|block| hadamard(block, stride));
        }
    }
}

/// The largest power of two that divides `width` and is not above [`LARGEST_BLOCK`].
fn block(width: usize) -> usize {
    1 << width.trailing_zeros().min(LARGEST_BLOCK.trailing_zeros())
}

impl Fold {
    /// Changes `weight`, `[N, K]` row-major. Sums are in f64.
    fn apply(&self, weight: &mut [f32], k: usize) {
        let rows = self.output.map_or(1, |basis| basis.period);
        let mut wide = vec![0.0; rows * k];
        for weight in weight.chunks_exact_mut(rows * k) {
            wide.iter_mut().zip(&*weight).for_each(|(wide, &w)| *wide = f64::from(w));
            if let Some(basis) = &self.output {
                basis.rotate(&mut wide, k);
            }
            for row in wide.chunks_exact_mut(k) {
                if let Some(gamma) = &self.gamma {
                    row.iter_mut().zip(gamma.iter()).for_each(|(w, &gamma)| *w *= f64::from(gamma));
                }
                if let Some(basis) = &self.input {
                    basis.rotate(row, 1);
                }
            }
            weight.iter_mut().zip(&wide).for_each(|(w, &wide)| *w = wide as f32);
        }
    }
}

impl Rotation {
    /// What is folded into the weights of `checkpoint`, whose `lm_head` is not tied in `config`.
    ///
    /// # Errors
    /// [`ModelError::Unrotatable`] for a linear layer or vector that none of the rules above covers; a norm that is
    /// missing or misshapen.
    pub(crate) fn new(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<Self> {
        let unknown = |tensor: String| ModelError::Unrotatable {
            path: config.path.clone(),
            tensor,
            architecture: config.architecture.model_type(),
        };
        let mut modules = BTreeMap::new();
        let mut gammas: BTreeMap<String, Arc<[f32]>> = BTreeMap::new();
        for module in config.linear_modules() {
            let Some(Sides { norm, input, output }) = sides(config, &module) else {
                return Err(unknown(format!("{}.weight", module.name)));
            };
            let gamma = match norm {
                None => None,
                Some(norm) => Some(match gammas.get(&norm) {
                    Some(gamma) => Arc::clone(gamma),
                    None => {
                        let gamma: Arc<[f32]> = checkpoint.vector(&norm, module.in_features)?.into();
                        gammas.entry(norm).or_insert(gamma).clone()
                    }
                }),
            };
            modules.insert(module.name, Fold { gamma, input, output });
        }
        let norms: BTreeSet<String> = gammas.into_keys().collect();
        // Query and key heads have norms of their own and stay as they are.
        let of_heads =
            |name: &str| name.ends_with(".self_attn.q_norm.weight") || name.ends_with(".self_attn.k_norm.weight");
        let mut vectors = config.vector_tensors().into_iter();
        match vectors.find(|v| !v.correction_bias && !of_heads(&v.name) && !norms.contains(&v.name)) {
            Some(vector) => Err(unknown(vector.name)),
            None => Ok(Self { modules, norms }),
        }
    }

    /// Whether a stored tensor, by name, has other values than the file's.
    pub(crate) fn changes(&self, tensor: &str) -> bool {
        let module = |suffix: &str| tensor.strip_suffix(suffix).and_then(|module| self.modules.get(module));
        self.norms.contains(tensor)
            || module(".weight").is_some()
            || module(".bias").is_some_and(|fold| fold.output.is_some())
    }

    /// Folds into `weight`, `[N, K]`, of a linear layer.
    pub(crate) fn fold_weight(&self, module: &str, weight: &mut [f32], in_features: usize) {
        if let Some(fold) = self.modules.get(module) {
            fold.apply(weight, in_features);
        }
    }

    /// Folds into the weight of a norm or into a bias.
    pub(crate) fn fold_vector(&self, tensor: &str, values: &mut [f32]) {
        if self.norms.contains(tensor) {
            values.fill(1.0);
        }
        let module = tensor.strip_suffix(".bias").and_then(|module| self.modules.get(module));
        if let Some(output @ Some(_)) = module.map(|fold| fold.output) {
            Fold { gamma: None, input: None, output }.apply(values, 1);
        }
    }
}

/// The bases on both sides of a linear layer; `None` for one that is not known.
fn sides(config: &ModelConfig, module: &LinearModule) -> Option<Sides> {
    let stream = Some(Basis::whole(config.hidden_size));
    let reads = |norm: &str| Sides { norm: Some(norm.to_owned()), input: stream, output: None };
    match (module.kind, module.layer, module.name.rsplit('.').next()?) {
        // A row of the table is what reaches the stream.
        (ModuleKind::Embedding, None, _) => Some(Sides { norm: None, input: stream, output: None }),
        (ModuleKind::LmHead, None, _) => Some(reads("model.norm.weight")),
        (ModuleKind::Attention, Some(layer), name) => attention(config, &format!("model.layers.{layer}"), name, stream),
        (ModuleKind::Router, Some(layer), _)
        | (ModuleKind::Mlp | ModuleKind::Expert | ModuleKind::SharedExpert, Some(layer), "gate_proj" | "up_proj") => {
            Some(reads(&format!("model.layers.{layer}.post_attention_layernorm.weight")))
        }
        (ModuleKind::Mlp | ModuleKind::Expert | ModuleKind::SharedExpert, Some(_), "down_proj") => {
            Some(Sides { norm: None, input: None, output: stream })
        }
        _ => None,
    }
}

/// [`sides`] of a projection of the attention of the layer `prefix`.
fn attention(config: &ModelConfig, prefix: &str, name: &str, stream: Option<Basis>) -> Option<Sides> {
    let norm = |name: &str| Some(format!("{prefix}.{name}.weight"));
    let reads = |output| Some(Sides { norm: norm("input_layernorm"), input: stream, output });
    let writes = |width| Some(Sides { norm: None, input: Some(Basis::whole(width)), output: stream });
    match (config.attention, name) {
        (AttentionConfig::Gqa { .. }, "q_proj" | "k_proj") => reads(None),
        (AttentionConfig::Gqa { head_dim, .. }, "v_proj") => reads(Some(Basis::whole(head_dim))),
        (AttentionConfig::Gqa { head_dim, .. }, "o_proj") => writes(head_dim),
        (AttentionConfig::Mla { q_lora_rank: None, .. }, "q_proj") => reads(None),
        (AttentionConfig::Mla { q_lora_rank: Some(rank), .. }, "q_a_proj") => reads(Some(Basis::whole(rank))),
        (AttentionConfig::Mla { q_lora_rank: Some(rank), .. }, "q_b_proj") => {
            Some(Sides { norm: norm("self_attn.q_a_layernorm"), input: Some(Basis::whole(rank)), output: None })
        }
        (AttentionConfig::Mla { kv_lora_rank, qk_rope_head_dim, .. }, "kv_a_proj_with_mqa") => {
            reads(Some(Basis::part(kv_lora_rank + qk_rope_head_dim, 0, kv_lora_rank)))
        }
        (AttentionConfig::Mla { kv_lora_rank, qk_nope_head_dim, v_head_dim, .. }, "kv_b_proj") => Some(Sides {
            norm: norm("self_attn.kv_a_layernorm"),
            input: Some(Basis::whole(kv_lora_rank)),
            output: Some(Basis::part(qk_nope_head_dim + v_head_dim, qk_nope_head_dim, v_head_dim)),
        }),
        (AttentionConfig::Mla { v_head_dim, .. }, "o_proj") => writes(v_head_dim),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde_json::json;

    use super::*;

    fn qwen3() -> ModelConfig {
        let value = json!({
            "model_type": "qwen3", "hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 24, "intermediate_size": 40, "vocab_size": 10, "rms_norm_eps": 1e-6,
            "max_position_embeddings": 64
        });
        ModelConfig::from_value(Path::new("config.json"), &value).unwrap()
    }

    #[test]
    fn blocks_divide_the_width() {
        let found = [1, 2, 24, 33, 96, 128, 192, 256, 2880, 7168].map(block);
        assert_eq!(found, [1, 2, 8, 1, 32, 128, 64, 128, 64, 128]);
    }

    #[test]
    fn the_transform_is_the_orthonormal_hadamard_matrix() {
        for (size, stride) in [(1, 3), (2, 1), (8, 1), (32, 5), (128, 2)] {
            for column in 0..size {
                let mut values = vec![0.0; size * stride];
                values[column * stride..][..stride].fill(3.0);
                hadamard(&mut values, stride);
                for (i, value) in values.iter().enumerate() {
                    let sign = if ((i / stride) & column).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
                    assert!((value - sign * 3.0 / (size as f64).sqrt()).abs() < 1e-14, "{size} {column} {i}");
                }
                hadamard(&mut values, stride);
                assert!(
                    values
                        .iter()
                        .enumerate()
                        .all(|(i, v)| (v - if i / stride == column { 3.0 } else { 0.0 }).abs() < 1e-13)
                );
            }
        }
    }

    #[test]
    fn only_the_named_features_of_a_period_move() {
        let basis = Basis::part(7, 2, 4);
        let mut values: Vec<f64> = (0..14).map(f64::from).collect();
        basis.rotate(&mut values, 1);
        for (i, value) in values.iter().enumerate().filter(|(i, _)| !(2..6).contains(&(i % 7))) {
            assert_eq!(*value, i as f64);
        }
        assert_eq!(values[2..6], [7.0, -1.0, -2.0, 0.0]);
        assert_eq!(values[9..13], [21.0, -1.0, -2.0, 0.0]);
    }

    #[test]
    fn an_unknown_projection_has_no_sides() {
        let config = qwen3();
        for mut module in config.linear_modules() {
            assert!(sides(&config, &module).is_some(), "{}", module.name);
            if matches!(module.kind, ModuleKind::Attention | ModuleKind::Mlp) {
                module.name.push_str("_of_another_model");
                assert!(sides(&config, &module).is_none(), "{}", module.name);
            }
        }
    }
}

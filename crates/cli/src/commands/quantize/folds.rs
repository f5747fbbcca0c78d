//! Where AWQ may fold its channel scales.

use std::collections::HashMap;

use marlin_models::{AttentionConfig, MlpConfig, ModelConfig};
use marlin_quantize::{Assignment, Fold, Module, Previous, Role};

/// The folds of a model, those without a quantized linear layer among their readers left out:
/// - a layer's norms into everything that reads them, the router and all experts among it;
/// - `up_proj` into `down_proj`, through the product with the gate;
/// - `v_proj` into `o_proj`, where every query head has its own values;
/// - the norms of the latents of multi-head latent attention into the projections out of them.
pub(super) fn folds(config: &ModelConfig, assignments: &[Assignment]) -> Vec<Fold> {
    let modules: HashMap<&str, &Assignment> = assignments.iter().map(|a| (a.module.name.as_str(), a)).collect();
    let biased = config.linear_modules().into_iter().filter(|module| module.bias).map(|module| module.name);
    let mut list = List { modules, biased: biased.collect(), layer: 0, folds: Vec::new() };
    for (layer, block) in config.layers.iter().enumerate() {
        list.layer = layer;
        list.attention(&config.attention);
        list.mlp(&block.mlp);
    }
    list.folds
}

struct List<'a> {
    modules: HashMap<&'a str, &'a Assignment>,
    /// Modules with a bias.
    biased: std::collections::HashSet<String>,
    layer: usize,
    folds: Vec<Fold>,
}

impl List<'_> {
    fn attention(&mut self, attention: &AttentionConfig) {
        let part = |name: &str| format!("self_attn.{name}");
        match attention {
            AttentionConfig::Gqa { heads, kv_heads, .. } => {
                self.norm("input_layernorm", &["q_proj", "k_proj", "v_proj"].map(part));
                if heads == kv_heads {
                    self.linear(&part("v_proj"), &part("o_proj"));
                }
            }
            AttentionConfig::Mla { q_lora_rank, .. } => {
                let query = if q_lora_rank.is_some() { "q_a_proj" } else { "q_proj" };
                self.norm("input_layernorm", &[query, "kv_a_proj_with_mqa"].map(part));
                if q_lora_rank.is_some() {
                    self.norm("self_attn.q_a_layernorm", &[part("q_b_proj")]);
                }
                self.norm("self_attn.kv_a_layernorm", &[part("kv_b_proj")]);
            }
        }
    }

    fn mlp(&mut self, mlp: &MlpConfig) {
        let mlps: Vec<String> = match mlp {
            MlpConfig::Dense { .. } => vec!["mlp".to_owned()],
            MlpConfig::Moe { experts, shared_intermediate, .. } => {
                let shared = shared_intermediate.map(|_| "mlp.shared_experts".to_owned());
                (0..*experts).map(|e| format!("mlp.experts.{e}")).chain(shared).collect()
            }
        };
        let mut readers: Vec<String> =
            mlps.iter().flat_map(|mlp| ["gate_proj", "up_proj"].map(|part| format!("{mlp}.{part}"))).collect();
        if let MlpConfig::Moe { .. } = mlp {
            readers.push("mlp.gate".to_owned());
        }
        self.norm("post_attention_layernorm", &readers);
        for mlp in mlps {
            self.linear(&format!("{mlp}.up_proj"), &format!("{mlp}.down_proj"));
        }
    }

    fn norm(&mut self, norm: &str, readers: &[String]) {
        let tensor = format!("model.layers.{}.{norm}.weight", self.layer);
        self.push(Previous::Norm { tensor }, readers);
    }

    fn linear(&mut self, previous: &str, reader: &str) {
        if let Some(module) = self.module(previous) {
            let bias = self.biased.contains(&module.name);
            self.push(Previous::Linear { module, bias }, &[reader.to_owned()]);
        }
    }

    fn push(&mut self, previous: Previous, readers: &[String]) {
        let found: Option<Vec<Module>> = readers.iter().map(|reader| self.module(reader)).collect();
        let Some(readers) = found else { return };
        let is_quantized = |reader: &Module| self.modules[reader.name.as_str()].target.is_some();
        if readers.iter().any(|reader| reader.role == Role::Linear && is_quantized(reader)) {
            self.folds.push(Fold { layer: self.layer, previous, readers });
        }
    }

    /// A module of the layer.
    fn module(&self, name: &str) -> Option<Module> {
        let name = format!("model.layers.{}.{name}", self.layer);
        self.modules.get(name.as_str()).map(|assignment| assignment.module.clone())
    }
}

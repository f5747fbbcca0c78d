//! What becomes of each module, as a native or as an EXL3 folder.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use marlin_formats::Scheme;
use marlin_formats::exl3::Codebook;
use marlin_models::QuantizationConfig;
use marlin_quantize::exl3::{BitGroup, allocate_bits};
use marlin_quantize::{Assignment, Module, Pattern, Plan, Role, Target};
use serde_json::{Map, Value, json};

use super::output::Stored;

/// What the written folder is.
pub(super) enum Recipe {
    /// A folder of this project's own formats.
    Native(Plan),
    /// The same with formats by measured sensitivity where the plan's default stands.
    Mixed { plan: Plan, candidates: Vec<Scheme>, bits: f64 },
    /// A folder that ExLlamaV3 reads.
    Exl3(Exl3Recipe),
}

/// How an EXL3 folder is made.
pub(super) struct Exl3Recipe {
    /// Average bits of the decoder's linear layers.
    pub(super) bits: f64,
    /// Bits of `lm_head`, 16 as stored.
    pub(super) head_bits: u32,
    pub(super) codebook: Codebook,
    pub(super) ignore: Vec<Pattern>,
    /// Calibration sequences and tokens of the longest, once they are known.
    pub(super) calibration: (usize, usize),
}

impl Recipe {
    /// Decides about every module.
    pub(super) fn resolve(&self, modules: &[Module], layers: usize) -> Result<Vec<Assignment>> {
        match self {
            Self::Native(plan) | Self::Mixed { plan, .. } => Ok(plan.resolve(modules)?),
            Self::Exl3(recipe) => recipe.resolve(modules, layers),
        }
    }

    /// The `quantization_config` of config.json, and the contents of `quantization_config.json` beside it, if any.
    pub(super) fn config(&self, assignments: &[Assignment], stored: &[Stored]) -> Result<(Value, Option<Value>)> {
        match self {
            Self::Native(plan) | Self::Mixed { plan, .. } => Ok((native_config(plan, assignments)?, None)),
            Self::Exl3(recipe) => {
                let config = recipe.config(assignments);
                let mut full = config.clone();
                full.insert("tensor_storage".to_owned(), recipe.tensor_storage(assignments, stored));
                Ok((Value::Object(config), Some(Value::Object(full))))
            }
        }
    }
}

fn native_config(plan: &Plan, assignments: &[Assignment]) -> Result<Value> {
    let mut modules: BTreeMap<String, Scheme> = BTreeMap::new();
    let mut ignore = Vec::new();
    for assignment in assignments {
        let name = &assignment.module.name;
        match assignment.scheme() {
            None => ignore.push(name.clone()),
            Some(scheme) if scheme != plan.default => {
                modules.insert(name.clone(), scheme);
            }
            Some(_) => {}
        }
    }
    Ok(QuantizationConfig::new(plan.default, modules, &ignore)?.to_json())
}

impl Exl3Recipe {
    fn resolve(&self, modules: &[Module], layers: usize) -> Result<Vec<Assignment>> {
        if let Some(ignore) = self.ignore.iter().find(|ignore| !modules.iter().any(|m| ignore.matches(&m.name))) {
            bail!("ignore pattern `{ignore}` matches no weight matrix of the model");
        }
        let bits = self.allocate(modules, layers)?;
        let target = |module: &Module| {
            let bits = match module.role {
                _ if self.ignore.iter().any(|ignore| ignore.matches(&module.name)) => return None,
                Role::LmHead => Some(self.head_bits).filter(|&bits| bits <= 8),
                _ => bits.get(&group(module)?).copied(),
            };
            Some(Target::Exl3 { codebook: self.codebook, bits: bits? })
        };
        let assign = |module: &Module| Assignment { module: module.clone(), target: target(module), by_default: false };
        Ok(modules.iter().map(assign).collect())
    }

    /// Bits of each group of projections.
    fn allocate(&self, modules: &[Module], layers: usize) -> Result<BTreeMap<Group, u32>> {
        let mut weights: BTreeMap<Group, u64> = BTreeMap::new();
        for module in modules {
            if let Some(group) = group(module).filter(|_| !self.ignore.iter().any(|i| i.matches(&module.name))) {
                *weights.entry(group).or_default() += module.weights() as u64;
            }
        }
        if weights.is_empty() {
            bail!("--ignore leaves no linear layer to quantize");
        }
        let groups: Vec<BitGroup> = weights
            .iter()
            .map(|(&Group { layer, kind }, &weights)| BitGroup { weights, priority: kind as u32, layer })
            .collect();
        let bits = allocate_bits(&groups, layers, self.bits)?;
        Ok(weights.into_keys().zip(bits).collect())
    }

    /// What ExLlamaV3 stores about a model. `bits` is the average over the decoder's linear layers.
    fn config(&self, assignments: &[Assignment]) -> Map<String, Value> {
        let decoder = assignments.iter().filter(|a| a.module.role == Role::Linear);
        let (bits, weights) = decoder
            .filter_map(|a| Some((a.target?.code_bits(), a.module.weights())))
            .fold((0.0, 0.0), |sum, (b, w)| (sum.0 + f64::from(b) * w as f64, sum.1 + w as f64));
        let mut config = Map::new();
        config.insert("quant_method".to_owned(), json!("exl3"));
        config.insert("version".to_owned(), json!(env!("CARGO_PKG_VERSION")));
        config.insert("bits".to_owned(), json!((bits / weights * 1e4).round() / 1e4));
        config.insert("head_bits".to_owned(), json!(self.head_bits));
        let (rows, columns) = self.calibration;
        config.insert("calibration".to_owned(), json!({"rows": rows, "cols": columns}));
        config.insert("out_scales".to_owned(), json!("always"));
        config.insert("codebook".to_owned(), json!(self.codebook.name()));
        config
    }

    /// Every stored tensor by module.
    fn tensor_storage(&self, assignments: &[Assignment], stored: &[Stored]) -> Value {
        let mut modules: Map<String, Value> = Map::new();
        for Stored { name, dtype, dims, bytes } in stored {
            let module = name.rsplit_once('.').map_or(name.as_str(), |(module, _)| module);
            let entry = modules.entry(module.to_owned()).or_insert_with(|| json!({"stored_tensors": {}}));
            entry["stored_tensors"][name] =
                json!({"shape": dims, "n_bytes": bytes, "dtype": format!("torch.{}", torch_name(*dtype))});
        }
        for Assignment { module, target, .. } in assignments {
            let (Some(Target::Exl3 { codebook, bits }), Some(entry)) = (target, modules.get_mut(&module.name)) else {
                continue;
            };
            entry["quant_format"] = json!("exl3");
            entry["bits_per_weight"] = json!(bits);
            if let Codebook::Mcg | Codebook::Mul1 = codebook {
                entry[format!("{}_multiplier", codebook.name())] = json!(codebook.multiplier());
            }
        }
        Value::Object(modules)
    }
}

/// PyTorch's name of an element type.
fn torch_name(dtype: marlin_formats::DType) -> String {
    use marlin_formats::DType;
    match dtype {
        DType::F32 => "float32".to_owned(),
        DType::F16 => "float16".to_owned(),
        DType::BF16 => "bfloat16".to_owned(),
        DType::I32 => "int32".to_owned(),
        DType::I16 => "int16".to_owned(),
        other => other.name().to_lowercase(),
    }
}

/// Projections of one layer that have the same bit rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Group {
    layer: usize,
    kind: Kind,
}

/// What a group of projections does; the last are the first to get more bits: those that all tokens pass and that are
/// small.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    ExpertGateUp,
    ExpertDown,
    GateUp,
    Down,
    AttentionOutput,
    AttentionInput,
}

/// The group of a module, `None` when EXL3 folders store it as it is: everything but the decoder's linear layers, and
/// `kv_b_proj` of multi-head latent attention, whose halves readers fold into their neighbours.
fn group(module: &Module) -> Option<Group> {
    let layer = module.layer.filter(|_| module.role == Role::Linear)?;
    let expert = module.name.contains(".experts.");
    let kind = match (module.name.rsplit('.').next()?, expert) {
        ("kv_b_proj", _) => return None,
        ("o_proj", _) => Kind::AttentionOutput,
        ("gate_proj" | "up_proj", true) => Kind::ExpertGateUp,
        ("down_proj", true) => Kind::ExpertDown,
        ("gate_proj" | "up_proj", false) => Kind::GateUp,
        ("down_proj", false) => Kind::Down,
        _ => Kind::AttentionInput,
    };
    Some(Group { layer, kind })
}

//! The model to be quantized.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use marlin_formats::DType;
use marlin_models::{Checkpoint, ModelConfig};
use marlin_ops::HostTensor;
use marlin_quantize::{Fingerprint, ModelSource, Module, Role, SourceError};
use serde_json::Value;

use crate::bundled;

/// The model to be quantized.
pub(super) struct Input {
    pub(super) dir: PathBuf,
    pub(super) config_json: Value,
    pub(super) config: ModelConfig,
    pub(super) checkpoint: Checkpoint,
    pub(super) modules: Vec<Module>,
    /// Modules stored as a slice of a fused expert tensor.
    pub(super) slices: HashMap<String, Slice>,
}

/// Consecutive elements of a stored tensor.
pub(super) struct Slice {
    pub(super) tensor: String,
    start: usize,
}

impl Input {
    /// Opens a dense model folder and checks that every tensor of its architecture is there, and no other.
    pub(super) fn open(dir: &Path) -> Result<Self> {
        let dir = &bundled::model_dir(Some(dir))?;
        if dir.is_file() {
            bail!("{}: only model folders can be quantized", dir.display());
        }
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        let config_json: Value =
            serde_json::from_str(&text).with_context(|| format!("{}: not valid JSON", path.display()))?;
        let config = ModelConfig::from_value(&path, &config_json)?;
        if config_json.get("quantization_config").is_some_and(|value| !value.is_null()) {
            bail!("{}: the model is quantized already", dir.display());
        }
        let checkpoint = Checkpoint::open(dir)?;
        let mut input =
            Self { dir: dir.to_owned(), config_json, config, checkpoint, modules: Vec::new(), slices: HashMap::new() };
        input.list_modules()?;
        for vector in input.config.vector_tensors() {
            input.checkpoint.dense(&vector.name, &[vector.len])?;
        }
        for module in input.config.linear_modules().iter().filter(|module| module.bias) {
            input.checkpoint.vector(&format!("{}.bias", module.name), module.out_features)?;
        }
        input.config.check_no_extra_tensors(&input.checkpoint)?;
        Ok(input)
    }

    /// Lists the token embeddings as an output head of their own, if the model has none.
    pub(super) fn add_tied_head(&mut self) {
        if self.modules.iter().any(|module| module.role == Role::LmHead) {
            return;
        }
        let (n, k) = (self.config.vocab_size, self.config.hidden_size);
        self.modules.push(Module::new("lm_head", n, k, self.config.num_layers));
        let tensor = "model.embed_tokens.weight".to_owned();
        self.slices.insert("lm_head".to_owned(), Slice { tensor, start: 0 });
    }

    /// From now on the model is read in rotated bases (see [`Checkpoint::rotate`]), with an output head of its own and
    /// without prediction layers, which the rotation does not reach.
    pub(super) fn rotate(&mut self) -> Result<()> {
        self.add_tied_head();
        Ok(self.checkpoint.rotate(&mut self.config)?)
    }

    /// The config.json of what is written, but for its quantization.
    pub(super) fn written_config(&self) -> Value {
        let mut config = self.config_json.clone();
        if self.checkpoint.is_rotated() {
            config["tie_word_embeddings"] = false.into();
            if let Some(layers) = config.get_mut("num_nextn_predict_layers") {
                *layers = 0.into();
            }
        }
        config
    }

    /// Whether a stored tensor has no place in what is written.
    pub(super) fn is_left_out(&self, tensor: &str) -> bool {
        self.checkpoint.is_rotated() && self.config.is_of_prediction_layer(tensor)
    }

    /// Whether a stored tensor is only read in slices.
    pub(super) fn is_fused(&self, tensor: &str) -> bool {
        let whole = |module: &Module| tensor.strip_suffix(".weight") == Some(&module.name);
        self.slices.values().any(|slice| slice.tensor == tensor) && !self.modules.iter().any(whole)
    }

    /// A hash of the names, sizes and times of change of the files that hold the weights.
    pub(super) fn files_hash(&self) -> Result<String> {
        let files: BTreeSet<&Path> =
            self.checkpoint.names().filter_map(|name| Some(self.checkpoint.get(name)?.file)).collect();
        let mut text = self.config_json.to_string();
        for file in files {
            let metadata = std::fs::metadata(file).with_context(|| format!("{}", file.display()))?;
            let changed = metadata.modified().with_context(|| format!("{}", file.display()))?;
            text.push_str(&format!("{:?} {} {changed:?}\n", file.file_name(), metadata.len()));
        }
        Ok(Fingerprint::hash(text.as_bytes()))
    }

    /// Lists the weight matrices, each with where it is stored.
    fn list_modules(&mut self) -> Result<()> {
        let (layers, vocab, hidden) = (self.config.num_layers, self.config.vocab_size, self.config.hidden_size);
        let linear = self.config.linear_modules();
        let mut shapes: Vec<(String, usize, usize)> =
            linear.into_iter().map(|m| (m.name, m.out_features, m.in_features)).collect();
        let has_head = shapes.iter().any(|(name, ..)| name == "lm_head");
        if !has_head && self.checkpoint.contains("lm_head.weight") {
            shapes.push(("lm_head".to_owned(), vocab, hidden));
        }
        for (name, n, k) in shapes {
            if let Some(slice) = self.fused_slice(&name, n, k)? {
                self.slices.insert(name.clone(), slice);
            } else {
                self.check_shape(&format!("{name}.weight"), &[n, k])?;
            }
            self.modules.push(Module::new(name, n, k, layers));
        }
        Ok(())
    }

    /// Where a routed expert's projection lies in the fused tensors `gate_up_proj [E, 2I, H]` (gate rows first) and
    /// `down_proj [E, H, I]`, if the checkpoint has them.
    fn fused_slice(&self, name: &str, n: usize, k: usize) -> Result<Option<Slice>> {
        let Some((prefix, rest)) = name.split_once(".mlp.experts.") else {
            return Ok(None);
        };
        let fused = |tensor: &str| format!("{prefix}.mlp.experts.{tensor}");
        if !self.checkpoint.contains(&fused("gate_up_proj")) {
            return Ok(None);
        }
        let Some((Ok(expert), projection)) =
            rest.split_once('.').map(|(e, projection)| (e.parse::<usize>(), projection))
        else {
            return Ok(None);
        };
        let (tensor, index, parts) = match projection {
            "gate_proj" => (fused("gate_up_proj"), 2 * expert, 2),
            "up_proj" => (fused("gate_up_proj"), 2 * expert + 1, 2),
            _ => (fused("down_proj"), expert, 1),
        };
        let experts = self.checkpoint.get(&tensor).and_then(|stored| stored.shape.first().copied()).unwrap_or(0);
        let expected = [experts.max(expert + 1), parts * n, k];
        self.check_shape(&tensor, &expected)?;
        Ok(Some(Slice { tensor, start: index * n * k }))
    }

    /// Checks that a tensor is there with these dimensions; its values are looked at when they are quantized.
    fn check_shape(&self, tensor: &str, dims: &[usize]) -> Result<()> {
        if self.checkpoint.tensor(tensor)?.dims() != dims {
            self.checkpoint.dense(tensor, dims)?;
        }
        Ok(())
    }

    /// The weight of a module that is not quantized, as it is written: in rotated bases rounded to the stored type again,
    /// but for routers, which are small and choose.
    pub(super) fn plain_weight(&self, module: &Module) -> Result<HostTensor> {
        let stored = self.stored_weight(module)?;
        if !self.checkpoint.is_rotated() {
            return Ok(stored);
        }
        let values = self.checkpoint.fold(&module.name, module.in_features, stored.to_f32()?)?;
        let dtype = if module.role == Role::Router { DType::F32 } else { stored.dtype() };
        if let Some(index) = values.iter().position(|value| dtype == DType::F16 && value.abs() >= 65520.0) {
            bail!(
                "tensor `{}.weight`: element {index} is {} in its rotated basis, beyond f16",
                module.name,
                values[index]
            );
        }
        Ok(HostTensor::from_f32_as(dtype, stored.dims(), &values)?)
    }

    /// The stored weight of a module.
    pub(super) fn stored_weight(&self, module: &Module) -> Result<HostTensor> {
        let dims = [module.out_features, module.in_features];
        let Some(slice) = self.slices.get(&module.name) else {
            return Ok(self.checkpoint.dense(&format!("{}.weight", module.name), &dims)?);
        };
        let whole = self.checkpoint.tensor(&slice.tensor)?;
        let size = whole.dtype().size_in_bytes();
        let bytes = &whole.bytes()[slice.start * size..][..module.weights() * size];
        Ok(HostTensor::new(whole.dtype(), &dims, Arc::new(bytes.to_vec()), 0)?)
    }

    /// Lets go of the mapped pages of a module's weight.
    pub(super) fn release(&self, module: &Module) -> Result<()> {
        match self.slices.get(&module.name) {
            Some(slice) => self.checkpoint.release(&slice.tensor)?,
            None => self.checkpoint.release(&format!("{}.weight", module.name))?,
        }
        Ok(())
    }
}

/// Reads weights for the quantizer.
pub(super) struct Source<'a>(pub(super) &'a Input);

impl ModelSource for Source<'_> {
    fn weight(&self, module: &Module) -> Result<Vec<f32>, SourceError> {
        let values = self.0.stored_weight(module)?.to_f32()?;
        self.0.release(module)?;
        Ok(self.0.checkpoint.fold(&module.name, module.in_features, values)?)
    }

    fn vector(&self, tensor: &str, len: usize) -> Result<Vec<f32>, SourceError> {
        Ok(self.0.checkpoint.vector(tensor, len)?)
    }
}

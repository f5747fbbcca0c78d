//! Random weights in a real architecture, for benchmarks and tests of speed and memory.

mod presets;
mod random;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use half::f16;
use marlin_formats::exl3::{Codebook, HADAMARD, tile};
use marlin_formats::{DType, Format, Scheme};
use serde_json::{Value, json};

use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::modules::{LinearModule, ModuleKind};
use crate::quantization::QuantizationConfig;
use crate::writer::{WriteSummary, Writer};
use random::{RandomMatrix, Words};

/// How the output head (or the tied embedding, which is the head) is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HeadFormat {
    /// As the other linear layers: most engines that run quantized models quantize the output matrix too, and it is a
    /// large part of a small model.
    #[default]
    Same,
    /// In the plain dtype.
    Plain,
    /// In a format of its own, with its default group size.
    Native(Format),
}

/// Random trellis codes instead of a native format: every linear layer but routers, and an untied head, is EXL3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SynthTrellis {
    /// Bits a weight, 1 to 8.
    pub bits: u32,
    /// How states become values.
    pub codebook: Codebook,
}

/// What [`synth`] makes of a preset. `None` keeps the preset's value.
#[derive(Clone, Debug)]
pub struct SynthOptions {
    /// Format of the linear layers; `None` for plain weights, or for `trellis`. Norms, routers and an untied embedding stay plain.
    pub format: Option<Format>,
    /// EXL3 instead of a format and a group size; a tied head stays plain then, as embeddings are looked up by rows.
    pub trellis: Option<SynthTrellis>,
    /// Group size along K; the format's default when absent.
    pub group_size: Option<usize>,
    /// The output head.
    pub head: HeadFormat,
    /// F32, F16 or BF16, of everything plain.
    pub dtype: DType,
    /// Seed of all values.
    pub seed: u64,
    /// `num_hidden_layers`.
    pub layers: Option<usize>,
    /// `hidden_size`.
    pub hidden_size: Option<usize>,
    /// `intermediate_size`.
    pub intermediate_size: Option<usize>,
    /// `num_experts` or `n_routed_experts`.
    pub experts: Option<usize>,
    /// `vocab_size`; special token ids beyond it are left out.
    pub vocab_size: Option<usize>,
    /// `max_position_embeddings`.
    pub context: Option<usize>,
    /// A folder whose tokenizer and chat template are copied.
    pub tokenizer_from: Option<PathBuf>,
}

impl Default for SynthOptions {
    fn default() -> Self {
        Self {
            format: None,
            trellis: None,
            group_size: None,
            head: HeadFormat::Same,
            dtype: DType::BF16,
            seed: 0,
            layers: None,
            hidden_size: None,
            intermediate_size: None,
            experts: None,
            vocab_size: None,
            context: None,
            tokenizer_from: None,
        }
    }
}

/// Names of the presets.
pub fn synth_presets() -> &'static [&'static str] {
    &presets::NAMES
}

/// The configuration of a preset as published.
///
/// # Errors
/// An unknown preset; the message lists them.
pub fn synth_config(name: &str) -> Result<ModelConfig> {
    ModelConfig::from_value(Path::new(name), &presets::preset(name)?)
}

/// Writes the folder `out` with random weights in the shape of preset `name`: zero-mean weights of deviation
/// `1 / sqrt(in_features)` (quantized ones as random codes with scales to match), norms of ones. Values depend on the
/// seed alone. Memory stays small: tensors stream. `progress(done, total)` is called after every tensor's module.
///
/// # Errors
/// An unknown preset, a dimension that the architecture refuses, a group size that the format refuses, EXL3 of other
/// than 1 to 8 bits or beside another format, an existing `out`, or an I/O error; nothing is left behind.
pub fn synth(
    name: &str,
    options: &SynthOptions,
    out: &Path,
    mut progress: impl FnMut(usize, usize),
) -> Result<WriteSummary> {
    if !matches!(options.dtype, DType::F32 | DType::F16 | DType::BF16) {
        let reason = format!("{} is not F32, F16 or BF16", options.dtype.name());
        return Err(ModelError::request("dtype", reason));
    }
    let mut json = configure(presets::preset(name)?, options);
    let config = ModelConfig::from_value(&out.join("config.json"), &json)?;
    let modules = config.linear_modules();
    let plan = Plan::new(&config, options, &modules)?;
    if let (Some(quantization), Value::Object(fields)) = (&plan.quantization, &mut json) {
        fields.insert("quantization_config".into(), quantization.clone());
    }
    let vectors = config.vector_tensors();
    let total = modules.len() + vectors.len();
    let mut synthesizer = Synthesizer { writer: Writer::create(out)?, options, tensor: 0 };
    if let Some(from) = &options.tokenizer_from {
        synthesizer.writer.copy_assets(from)?;
    }
    for (i, module) in modules.iter().enumerate() {
        synthesizer.linear(module, plan.storage(module))?;
        progress(i + 1, total);
    }
    for (i, vector) in vectors.iter().enumerate() {
        synthesizer.vector(&vector.name, vector.len, vector.correction_bias)?;
        progress(modules.len() + i + 1, total);
    }
    synthesizer.writer.finish(&json)
}

/// The preset with the options' dimensions.
fn configure(mut config: Value, options: &SynthOptions) -> Value {
    let experts = match config["model_type"].as_str() {
        Some("qwen3_moe") => "num_experts",
        _ => "n_routed_experts",
    };
    let overrides = [
        ("num_hidden_layers", options.layers),
        ("hidden_size", options.hidden_size),
        ("intermediate_size", options.intermediate_size),
        ("vocab_size", options.vocab_size),
        ("max_position_embeddings", options.context),
        (experts, options.experts),
    ];
    for (name, value) in overrides {
        if let Some(value) = value {
            config = presets::with(config, json!({ name: value }));
        }
    }
    // A smaller vocabulary has no room for the published special tokens.
    let vocab = config["vocab_size"].as_u64().unwrap_or(0);
    for name in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        let ids = match &config[name] {
            Value::Array(ids) => ids.clone(),
            one => vec![one.clone()],
        };
        if ids.iter().any(|id| id.as_u64().is_some_and(|id| id >= vocab)) {
            config = presets::with(config, json!({ name: null }));
        }
    }
    let dtype = match options.dtype {
        DType::F32 => "float32",
        DType::F16 => "float16",
        _ => "bfloat16",
    };
    presets::with(config, json!({"torch_dtype": dtype, "use_cache": true}))
}

/// How a linear module is stored, if not plain.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Storage {
    Native(Scheme),
    Trellis(SynthTrellis),
}

/// Which module gets which storage.
struct Plan {
    /// `quantization_config`.
    quantization: Option<Value>,
    body: Option<Storage>,
    head: Option<Storage>,
    tied: bool,
}

impl Plan {
    fn new(config: &ModelConfig, options: &SynthOptions, modules: &[LinearModule]) -> Result<Self> {
        let mut plan = Self { quantization: None, body: None, head: None, tied: config.tie_word_embeddings };
        match options.trellis {
            Some(trellis) => plan.choose_trellis(options, trellis)?,
            None => plan.choose_format(options, modules)?,
        }
        Ok(plan)
    }

    fn choose_trellis(&mut self, options: &SynthOptions, trellis: SynthTrellis) -> Result<()> {
        let SynthTrellis { bits, codebook } = trellis;
        if !(1..=8).contains(&bits) {
            return Err(ModelError::request("bits", format!("{bits} is not 1 to 8")));
        }
        if options.format.is_some() || options.group_size.is_some() {
            return Err(ModelError::request("format", "EXL3 has no other format and no groups"));
        }
        self.body = Some(Storage::Trellis(trellis));
        self.head = match options.head {
            HeadFormat::Same => self.body,
            HeadFormat::Plain => None,
            HeadFormat::Native(format) => {
                return Err(ModelError::request("lm_head", format!("{format} cannot stand beside EXL3")));
            }
        };
        let head_bits = if self.head.is_some() && !self.tied { bits } else { 16 };
        self.quantization = Some(json!({
            "quant_method": "exl3", "version": env!("CARGO_PKG_VERSION"), "bits": f64::from(bits), "head_bits": head_bits,
            "codebook": codebook.name(),
        }));
        Ok(())
    }

    fn choose_format(&mut self, options: &SynthOptions, modules: &[LinearModule]) -> Result<()> {
        let request = |e: marlin_formats::FormatError| ModelError::request("group size", e.to_string());
        let body = match (options.format, options.group_size) {
            (None, _) => None,
            (Some(format), None) => Some(Scheme::with_default_group(format)),
            (Some(format), Some(size)) => Some(Scheme::new(format, size).map_err(request)?),
        };
        let head = match options.head {
            HeadFormat::Same => body,
            HeadFormat::Plain => None,
            HeadFormat::Native(format) => Some(Scheme::with_default_group(format)),
        };
        (self.body, self.head) = (body.map(Storage::Native), head.map(Storage::Native));
        let Some(default) = body.or(head) else {
            return Ok(());
        };
        // Routers by a pattern, since there may be dozens; everything else plain by name.
        let mut ignore = Vec::new();
        let mut overrides = BTreeMap::new();
        for module in modules {
            match self.storage(module) {
                None if module.kind == ModuleKind::Router => {
                    let routers = r"re:model\.layers\.\d+\.mlp\.gate$";
                    if !ignore.iter().any(|i| i == routers) {
                        ignore.push(routers.to_owned());
                    }
                }
                None => ignore.push(module.name.clone()),
                Some(Storage::Native(scheme)) if scheme != default => {
                    overrides.insert(module.name.clone(), scheme);
                }
                Some(_) => {}
            }
        }
        self.quantization = Some(QuantizationConfig::new(default, overrides, &ignore)?.to_json());
        Ok(())
    }

    fn storage(&self, module: &LinearModule) -> Option<Storage> {
        match module.kind {
            ModuleKind::Router => None,
            // Rows of a trellis cannot be looked up one by one.
            ModuleKind::Embedding if self.tied => self.head.filter(|storage| matches!(storage, Storage::Native(_))),
            ModuleKind::Embedding => None,
            ModuleKind::LmHead => self.head,
            _ => self.body,
        }
    }
}

/// Writes random tensors; each has its own number in the random streams.
struct Synthesizer<'a> {
    writer: Writer,
    options: &'a SynthOptions,
    tensor: u32,
}

impl Synthesizer<'_> {
    fn linear(&mut self, module: &LinearModule, storage: Option<Storage>) -> Result<()> {
        let (n, k) = (module.out_features, module.in_features);
        let deviation = (k as f32).sqrt().recip();
        match storage {
            Some(Storage::Native(scheme)) => self.matrix(&module.name, &RandomMatrix::new(scheme, n, k, deviation))?,
            Some(Storage::Trellis(trellis)) => self.trellis(&module.name, trellis, n, k, deviation)?,
            None => self.normal(&format!("{}.weight", module.name), &[n, k], deviation)?,
        }
        match module.bias {
            true => self.normal(&format!("{}.bias", module.name), &[n], 0.02),
            false => Ok(()),
        }
    }

    fn matrix(&mut self, module: &str, matrix: &RandomMatrix) -> Result<()> {
        let (codes, scales) = (self.words(0), self.words(1));
        let name = |suffix: &str| format!("{module}.mm.{suffix}");
        let (writer, group_dims) = (&mut self.writer, matrix.group_dims());
        writer.tensor_with(&name("q"), DType::U32, &matrix.code_dims(), |sink| matrix.write_codes(sink, &codes))?;
        let scale_dtype = matrix.scale_dtype();
        writer.tensor_with(&name("s"), scale_dtype, &group_dims, |sink| matrix.write_scales(sink, &scales))?;
        if let Some(zero) = matrix.zeros() {
            let zeros = zero.repeat(group_dims.iter().product());
            writer.tensor(&name("z"), scale_dtype, &group_dims, &zeros)?;
        }
        for (suffix, value) in matrix.supers() {
            let dims = matrix.super_dims();
            writer.tensor(&name(suffix), DType::F16, &dims, &value.repeat(dims.iter().product()))?;
        }
        if let Some(scale) = matrix.tensor_scale() {
            writer.tensor(&name("gs"), DType::F32, &[1], &scale.to_le_bytes())?;
        }
        self.tensor += 1;
        Ok(())
    }

    /// Every word is a valid one.
    fn trellis(&mut self, module: &str, trellis: SynthTrellis, n: usize, k: usize, deviation: f32) -> Result<()> {
        let SynthTrellis { bits, codebook } = trellis;
        let name = |suffix: &str| format!("{module}.{suffix}");
        let [k, n] = [k, n].map(|size| size.next_multiple_of(HADAMARD));
        let dims = [k / tile::SIDE, n / tile::SIDE, tile::words(bits)];
        let (words, count) = (self.words(0), dims.iter().product::<usize>() / 2);
        let writer = &mut self.writer;
        writer.tensor(
            &name("suh"),
            DType::F16,
            &[k],
            &f16::from_f32(deviation / codebook.deviation()).to_le_bytes().repeat(k),
        )?;
        writer.tensor(&name("svh"), DType::F16, &[n], &f16::ONE.to_le_bytes().repeat(n))?;
        writer.tensor_with(&name("trellis"), DType::I16, &dims, |sink| {
            words.write(sink, count, |_, word| word.to_le_bytes())
        })?;
        if codebook != Codebook::ThreeInst {
            writer.tensor(&name(codebook.name()), DType::I32, &[], &codebook.multiplier().to_le_bytes())?;
        }
        self.tensor += 1;
        Ok(())
    }

    fn normal(&mut self, name: &str, dims: &[usize], deviation: f32) -> Result<()> {
        let words = self.words(0);
        let (dtype, count) = (self.options.dtype, dims.iter().product());
        self.writer
            .tensor_with(name, dtype, dims, |sink| random::write_normal(sink, &words, dtype, count, deviation))?;
        self.tensor += 1;
        Ok(())
    }

    /// Norms are ones; a correction bias is small and f32, as published ones are.
    fn vector(&mut self, name: &str, len: usize, correction_bias: bool) -> Result<()> {
        let (words, dtype) = (self.words(0), self.options.dtype);
        self.tensor += 1;
        if correction_bias {
            return self.writer.tensor_with(name, DType::F32, &[len], |sink| {
                random::write_normal(sink, &words, DType::F32, len, 0.01)
            });
        }
        self.writer.tensor_with(name, dtype, &[len], |sink: &mut dyn Write| {
            let ones = match dtype {
                DType::F32 => 1f32.to_le_bytes().repeat(len),
                DType::F16 => f16::ONE.to_le_bytes().repeat(len),
                _ => half::bf16::ONE.to_le_bytes().repeat(len),
            };
            sink.write_all(&ones)
        })
    }

    fn words(&self, part: u32) -> Words {
        Words::new(self.options.seed, self.tensor, part)
    }
}

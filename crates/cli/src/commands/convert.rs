//! `marlin convert`: any checkpoint that is read, in our safetensors layout.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use marlin_formats::{DType, Format, QuantizedMatrix, Scheme};
use marlin_models::{
    Checkpoint, LinearModule, MlpConfig, ModelConfig, ModuleKind, QuantizationConfig, WriteSummary, Writer,
};
use marlin_ops::{HostTensor, Weight, WeightData};
use serde_json::Value;

use crate::bundled;

#[cfg(test)]
mod tests;

/// Arguments of `marlin convert`.
#[derive(Args)]
pub struct ConvertArgs {
    /// Model to read: plain or quantized, by this project or another
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Folder to write; it must not exist
    #[arg(value_name = "OUT")]
    output: PathBuf,
    /// native: each module in the format that holds it exactly, EXL3 as stored; f32, bf16 or f16: dequantize; or a weight
    /// format: dequantize and round to nearest (embeddings, lm_head and routers stay in their exact form, EXL3 becomes f16)
    #[arg(long, value_name = "F", value_parser = target)]
    to: Target,
    /// Weights along K that share a scale, with a weight format [default: the format's own]
    #[arg(long, value_name = "G", value_parser = crate::args::at_least_one)]
    group: Option<usize>,
}

/// `--to`.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Target {
    Native,
    Dense(DType),
    Format(Format),
}

fn target(text: &str) -> Result<Target, String> {
    Ok(match text {
        "native" => Target::Native,
        "f32" => Target::Dense(DType::F32),
        "bf16" => Target::Dense(DType::BF16),
        "f16" => Target::Dense(DType::F16),
        name => match name.parse::<Format>() {
            Ok(format) if format.can_encode() => Target::Format(format),
            Ok(format) => return Err(format!("weights cannot be rounded to {format}, which is only imported")),
            Err(error) => return Err(format!("{error}; or native, f32, bf16, f16")),
        },
    })
}

/// Converts IN to OUT.
pub fn run(args: ConvertArgs) -> Result<()> {
    let start = Instant::now();
    let scheme = match (args.to, args.group) {
        (Target::Format(format), group) => Some(Scheme::new(format, group.unwrap_or(format.default_group_size()))?),
        (_, None) => None,
        (_, Some(_)) => bail!("--group needs a weight format: --to int4, for example"),
    };
    let dir = bundled::model_dir(Some(&args.input))?;
    let (path, json) = ModelConfig::json(&dir)?;
    let config = ModelConfig::from_value(&path, &json)?;
    let checkpoint = Checkpoint::open(&dir)?;
    let mut conversion = Conversion {
        checkpoint: &checkpoint,
        config: &config,
        to: args.to,
        as_stored: args.to == Target::Native && config.quantization.method() == Some("exl3"),
        scheme,
        writer: Writer::create(&args.output)?,
        schemes: BTreeMap::new(),
        plain: Vec::new(),
        undeclared_biases: false,
        forms: BTreeMap::new(),
    };
    conversion.write_modules()?;
    conversion.write_vectors()?;
    config.check_no_extra_tensors(&checkpoint)?;
    if conversion.as_stored {
        conversion.copy_stored(&dir)?;
    }
    for warning in checkpoint.take_warnings() {
        eprintln!("warning: {warning}");
    }
    let forms = std::mem::take(&mut conversion.forms);
    let written = conversion.finish(&dir, json)?;
    report(&args.output, args.to, &forms, &written, start)
}

/// Modules in one form.
#[derive(Default)]
struct Form {
    modules: usize,
    weights: u64,
    bytes: u64,
}

/// A folder being written.
struct Conversion<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    to: Target,
    /// Every tensor is checked and copied: EXL3, whose tensors are native ones too.
    as_stored: bool,
    /// Of `Target::Format`.
    scheme: Option<Scheme>,
    writer: Writer,
    /// Schemes of the quantized modules written.
    schemes: BTreeMap<String, Scheme>,
    /// Modules written as `.weight`.
    plain: Vec<String>,
    /// Whether any of these got a bias that config.json does not declare.
    undeclared_biases: bool,
    forms: BTreeMap<&'static str, Form>,
}

impl Conversion<'_> {
    fn write_modules(&mut self) -> Result<()> {
        let (checkpoint, config) = (self.checkpoint, self.config);
        let mut modules = config.linear_modules();
        let has_head = modules.iter().any(|module| module.kind == ModuleKind::LmHead);
        if !has_head && checkpoint.has_module("lm_head") {
            // A tied model may store a head of its own, shaped like the embedding.
            let (name, kind) = ("lm_head".to_owned(), ModuleKind::LmHead);
            let head = modules.first().map(|embedding| LinearModule { name, kind, ..embedding.clone() });
            modules.extend(head);
        }
        let progress = super::progress_bar(modules.len() as u64, "modules");
        let mut stacked_layers = HashSet::new();
        for module in &modules {
            progress.inc(1);
            let single = module.kind != ModuleKind::Expert || checkpoint.has_module(&module.name);
            match module.layer {
                Some(layer) if !single => {
                    if stacked_layers.insert(layer) {
                        self.write_stack(layer)?;
                    }
                }
                _ => {
                    let (n, k) = (module.out_features, module.in_features);
                    let weight = checkpoint.weight(&config.quantization, &module.name, n, k, module.bias)?;
                    self.write(&module.name, module.kind, module.bias, weight)?;
                    checkpoint.release_prefix(&format!("{}.", module.name))?;
                }
            }
        }
        progress.finish_and_clear();
        Ok(())
    }

    /// Experts that are stored along a leading axis, each projection as a module of its own.
    fn write_stack(&mut self, layer: usize) -> Result<()> {
        let MlpConfig::Moe { experts, intermediate, .. } = self.config.layers[layer].mlp else { return Ok(()) };
        let prefix = format!("model.layers.{layer}.mlp.experts");
        let (quantization, hidden) = (&self.config.quantization, self.config.hidden_size);
        let stack = self.checkpoint.experts(quantization, &prefix, experts, hidden, intermediate)?;
        for (e, expert) in stack.into_iter().enumerate() {
            for (name, weight) in [("gate_proj", expert.gate), ("up_proj", expert.up), ("down_proj", expert.down)] {
                self.write(&format!("{prefix}.{e}.{name}"), ModuleKind::Expert, false, weight)?;
            }
        }
        Ok(self.checkpoint.release_prefix(&prefix)?)
    }

    /// Writes one module; `declared` says whether the config gives it a bias.
    fn write(&mut self, name: &str, kind: ModuleKind, declared: bool, weight: Weight) -> Result<()> {
        let (n, k) = (weight.out_features(), weight.in_features());
        let weight = self.convert(name, kind, weight)?;
        let form = self.forms.entry(weight.format_name()).or_default();
        form.modules += 1;
        form.weights += (n * k) as u64;
        form.bytes += Weight { bias: None, ..weight.clone() }.size_in_bytes() as u64;
        if self.as_stored {
            return Ok(());
        }
        if let Some(bias) = weight.bias.as_ref().filter(|bias| declared || bias.iter().any(|&b| b != 0.0)) {
            if !declared && matches!(weight.data, WeightData::Dense(_)) {
                if let Target::Dense(_) = self.to {
                    bail!(
                        "{name}: has a bias that config.json does not declare, which a plain model folder cannot hold; \
                         --to native keeps it"
                    );
                }
                self.undeclared_biases = true;
            }
            self.writer.host_tensor(&format!("{name}.bias"), &HostTensor::from_f32(&[n], bias)?)?;
        }
        match &weight.data {
            WeightData::Quantized(matrix) => {
                self.schemes.insert(name.to_owned(), matrix.scheme);
                self.writer.matrix(name, matrix, weight.input_order.as_ref())?;
            }
            WeightData::Exl3(_) => bail!("{name}: is EXL3, which a folder of other formats cannot hold"),
            WeightData::Grid(_) => bail!("{name}: has grid codes, which a native folder cannot hold"),
            WeightData::Dense(values) => {
                self.plain.push(name.to_owned());
                self.writer.host_tensor(&format!("{name}.weight"), values)?;
            }
        }
        Ok(())
    }

    /// The weight in the form asked for.
    fn convert(&self, name: &str, kind: ModuleKind, weight: Weight) -> Result<Weight> {
        let dims = [weight.out_features(), weight.in_features()];
        let kept = matches!(kind, ModuleKind::Embedding | ModuleKind::LmHead | ModuleKind::Router);
        let data = match (self.to, self.scheme, &weight.data) {
            (Target::Native, ..) => return Ok(weight),
            (Target::Format(_), Some(scheme), data) if !kept => match data {
                WeightData::Quantized(matrix) if matrix.scheme == scheme => return Ok(weight),
                _ => {
                    let matrix = QuantizedMatrix::encode(scheme, &weight.to_f32()?, dims[0], dims[1]);
                    WeightData::Quantized(matrix.with_context(|| name.to_owned())?)
                }
            },
            // What its own runtime computes with.
            (Target::Format(_), _, WeightData::Exl3(_)) => dense(name, &weight, DType::F16)?,
            (Target::Format(_), ..) => return Ok(weight),
            (Target::Dense(dtype), _, WeightData::Dense(values)) if values.dtype() == dtype => return Ok(weight),
            (Target::Dense(dtype), ..) => dense(name, &weight, dtype)?,
        };
        Ok(Weight { data, bias: weight.bias, input_order: None })
    }

    /// Copies every tensor that the model reads, and what lies beside EXL3 weights.
    fn copy_stored(&mut self, dir: &Path) -> Result<()> {
        let checkpoint = self.checkpoint;
        let unused: HashSet<&str> = checkpoint.unused().map(|(name, _)| name).collect();
        for name in checkpoint.names().filter(|name| !unused.contains(name)) {
            self.writer.host_tensor(name, &checkpoint.tensor(name)?)?;
            checkpoint.release(name)?;
        }
        let beside = dir.join("quantization_config.json");
        if beside.exists() {
            let contents = std::fs::read(&beside).with_context(|| beside.display().to_string())?;
            self.writer.file("quantization_config.json", &contents)?;
        }
        Ok(())
    }

    /// Norms and correction biases, as stored.
    fn write_vectors(&mut self) -> Result<()> {
        for vector in self.config.vector_tensors() {
            let values = self.checkpoint.dense(&vector.name, &[vector.len])?;
            if !self.as_stored {
                self.writer.host_tensor(&vector.name, &values)?;
            }
        }
        Ok(())
    }

    /// Writes the configuration and the tokenizer and gives the folder its name.
    fn finish(mut self, dir: &Path, mut config: Value) -> Result<WriteSummary> {
        let Value::Object(fields) = &mut config else {
            bail!("{}: config.json is not an object", dir.display());
        };
        if !self.as_stored {
            for name in ["quantization_config", "quantization"] {
                fields.remove(name);
            }
        }
        if let Target::Dense(dtype) = self.to {
            let name = match dtype {
                DType::F32 => "float32",
                DType::F16 => "float16",
                _ => "bfloat16",
            };
            let field = if fields.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            fields.insert(field.to_owned(), name.into());
        }
        // A folder that says it is native may hold such biases; its default need not name a module.
        let unused = self.undeclared_biases.then(|| Scheme::with_default_group(Format::Int4S4));
        if let Some(default) = most_frequent(self.schemes.values()).or(unused) {
            let others = self.schemes.iter().filter(|(_, scheme)| **scheme != default);
            let others = others.map(|(name, scheme)| (name.clone(), *scheme)).collect();
            let quantization = QuantizationConfig::new(default, others, &self.plain)?;
            fields.insert("quantization_config".to_owned(), quantization.to_json());
        }
        self.writer.copy_assets(dir)?;
        Ok(self.writer.finish(&config)?)
    }
}

/// A weight rounded to a float dtype.
fn dense(name: &str, weight: &Weight, dtype: DType) -> Result<WeightData> {
    let dims = [weight.out_features(), weight.in_features()];
    let values = weight.to_f32()?;
    let rounded = HostTensor::from_f32_as(dtype, &dims, &values)?;
    if let Some(at) = rounded.to_f32()?.iter().position(|v| !v.is_finite()) {
        bail!("{name}: {} at [{}, {}] is beyond {}", values[at], at / dims[1], at % dims[1], dtype.name());
    }
    Ok(WeightData::Dense(rounded))
}

/// The scheme that most modules have; of equals the one whose name comes first.
fn most_frequent<'a>(schemes: impl Iterator<Item = &'a Scheme>) -> Option<Scheme> {
    let mut counts: BTreeMap<(Format, usize), usize> = BTreeMap::new();
    for scheme in schemes {
        *counts.entry((scheme.format, scheme.group_size)).or_default() += 1;
    }
    let best =
        counts.iter().max_by_key(|((format, group), count)| (**count, std::cmp::Reverse((format.name(), *group))));
    best.map(|((format, group_size), _)| Scheme { format: *format, group_size: *group_size })
}

/// What was written, and whether it is what was read.
fn report(
    output: &Path,
    to: Target,
    forms: &BTreeMap<&'static str, Form>,
    written: &WriteSummary,
    start: Instant,
) -> Result<()> {
    for (name, form) in forms {
        let bits = 8.0 * form.bytes as f64 / form.weights as f64;
        print_line!("{name:<16} {:>6} modules at {bits:.3} bits per weight", form.modules);
    }
    let how = match to {
        Target::Native => "every weight exactly as stored, or as the source computes it where dense".to_owned(),
        Target::Dense(DType::F32) => "dequantized".to_owned(),
        Target::Dense(dtype) => format!("dequantized and rounded to {}", dtype.name().to_lowercase()),
        Target::Format(format) => format!("dequantized and rounded to the nearest {format}"),
    };
    let (megabytes, seconds) = (written.bytes as f64 / 1e6, start.elapsed().as_secs_f64());
    print_line!("{}: {how}, {megabytes:.1} MB in all, {seconds:.1} s", output.display());
    Ok(())
}

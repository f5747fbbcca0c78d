//! `marlin quantize`: a quantized copy of a model folder.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, ValueEnum};
use marlin_formats::{DType, Format, QuantizedMatrix, Scheme};
use marlin_models::{Checkpoint, ModelConfig, QuantizationConfig, Tokenizer, WriteSummary, Writer};
use marlin_ops::HostTensor;
use marlin_quantize::{
    Assignment, Calibration, Event, GptqOptions, Method, ModelSink, ModelSource, Module, Override, Pattern, Plan,
    ScaleSearch, Settings, SourceError, Summary, parse_scheme, quantize_model,
};
use serde_json::Value;

use crate::args::{DeviceArgs, DeviceKind, format_names};
use crate::bundled;
use crate::calibration::{ModelCalibration, read_sequences};
use crate::device::{self, with_device};

#[cfg(test)]
mod tests;

/// Arguments of `marlin quantize`.
#[derive(Args)]
pub struct QuantizeArgs {
    /// Model folder with bf16, f16 or f32 weights
    #[arg(value_name = "IN")]
    input: PathBuf,
    /// Folder to write; it must not exist
    #[arg(value_name = "OUT")]
    output: PathBuf,
    #[arg(long, value_name = "F", value_parser = format_choice)]
    #[arg(help = format!("Weight format: {}; or int, nf or fp with --bits", format_names(&Format::ENCODABLE)))]
    format: FormatChoice,
    /// Bits of one weight, to choose among the int, nf or fp formats
    #[arg(long, value_name = "B")]
    bits: Option<u32>,
    /// Weights along K that share a scale [default: the format's own, mostly 128]
    #[arg(long, value_name = "G", value_parser = crate::args::at_least_one, allow_negative_numbers = true)]
    group: Option<usize>,
    /// How weights become codes [default: gptq with --calibration, else rtn]
    #[arg(long, value_enum)]
    method: Option<MethodName>,
    /// UTF-8 text to calibrate on
    #[arg(long, value_name = "TEXT")]
    calibration: Option<PathBuf>,
    /// Tokens of the calibration text to use
    #[arg(long, value_name = "N", default_value_t = 32768, value_parser = crate::args::at_least_one)]
    calibration_tokens: usize,
    /// Tokens of one calibration sequence
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = crate::args::at_least_one)]
    context: usize,
    /// Eliminate along K instead of by descending activation size
    #[arg(long, requires = "calibration")]
    no_act_order: bool,
    /// Part of the Hessian's mean diagonal that is added to it [default: 0.01]
    #[arg(long, value_name = "D", requires = "calibration", value_parser = damping)]
    damping: Option<f64>,
    /// How group scales are chosen [default: mse for gptq, range for rtn]
    #[arg(long, value_enum, value_name = "S")]
    scale_search: Option<SearchName>,
    /// Quantize the token embeddings too, to FORMAT[:GROUP] [default: as stored]
    #[arg(long, value_name = "F", value_parser = parse_scheme)]
    embeddings: Option<Scheme>,
    /// Quantize lm_head too, to FORMAT[:GROUP] [default: as stored]
    #[arg(long, value_name = "F", value_parser = parse_scheme)]
    lm_head: Option<Scheme>,
    /// Leave matching modules as stored; `*` stands for any characters
    #[arg(long, value_name = "PATTERN")]
    ignore: Vec<Pattern>,
    /// Another format for matching modules: PATTERN=FORMAT[:GROUP]; the last match counts. Only an exact path reaches
    /// routers, embeddings and lm_head
    #[arg(long = "override", value_name = "PATTERN=F")]
    overrides: Vec<Override>,
    /// Device that runs the calibration
    #[arg(long, value_enum, default_value = "auto")]
    device: DeviceKind,
}

/// `--method`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum MethodName {
    /// Round to nearest
    Rtn,
    /// Sequential elimination against calibration activations
    Gptq,
}

/// `--scale-search`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum SearchName {
    /// The largest weight of a group maps to the end of the grid
    Range,
    /// The scale with the smallest squared error
    Mse,
}

impl From<SearchName> for ScaleSearch {
    fn from(name: SearchName) -> Self {
        match name {
            SearchName::Range => Self::Range,
            SearchName::Mse => Self::Mse,
        }
    }
}

/// `--format`: a format, or a family that `--bits` chooses from.
#[derive(Clone, Debug)]
enum FormatChoice {
    Format(Format),
    Family { name: String, members: &'static [Format] },
}

/// The formats that `--bits` chooses from, by family.
const FAMILIES: [(&str, &[Format]); 3] = [
    ("int", &[Format::Int2, Format::Int3, Format::Int4S4, Format::Int8]),
    ("nf", &[Format::Nf2, Format::Nf3, Format::Nf4]),
    ("fp", &[Format::Fp4E2m1, Format::Fp8E4m3]),
];

fn format_choice(text: &str) -> Result<FormatChoice, String> {
    if let Some((name, members)) = FAMILIES.iter().find(|(name, _)| *name == text) {
        return Ok(FormatChoice::Family { name: (*name).to_owned(), members });
    }
    text.parse().map(FormatChoice::Format).map_err(|error| format!("{error}; or int, nf, fp with --bits"))
}

fn damping(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(value) if (0.0..=1.0).contains(&value) => Ok(value),
        _ => Err("must be in [0, 1]".into()),
    }
}

impl FormatChoice {
    /// The one format that the choice and `--bits` agree on.
    fn resolve(&self, bits: Option<u32>) -> Result<Format> {
        match (self, bits) {
            (Self::Format(format), None) => Ok(*format),
            (Self::Format(format), Some(bits)) if format.code_bits() == bits => Ok(*format),
            (Self::Format(format), Some(bits)) => {
                bail!("--format {format} has {} bits, not --bits {bits}", format.code_bits())
            }
            (Self::Family { name, members }, bits) => {
                let found = members.iter().find(|format| Some(format.code_bits()) == bits);
                found.copied().ok_or_else(|| {
                    let valid: Vec<String> = members.iter().map(|format| format.code_bits().to_string()).collect();
                    anyhow!("--format {name} needs --bits, one of {}", valid.join(", "))
                })
            }
        }
    }
}

/// Quantizes IN to OUT.
pub fn run(args: QuantizeArgs) -> Result<()> {
    let start = Instant::now();
    let plan = args.plan()?;
    let method = args.method()?;
    let device = device::open(&DeviceArgs { device: args.device, device_index: None, exact: true, threads: None })?;
    let input = Input::open(&args.input)?;
    let assignments = plan.resolve(&input.modules)?;
    let mut output = Output::create(&args.output)?;
    let sequences = match (method, &args.calibration) {
        (Method::Gptq(_), Some(text)) => {
            let tokenizer = Tokenizer::from_dir(&args.input)?;
            let context = args.context.min(input.config.max_position_embeddings);
            read_sequences(text, &tokenizer, args.calibration_tokens, context)?
        }
        _ => Vec::new(),
    };
    let mut calibration: Option<Box<dyn Calibration + '_>> = match method {
        Method::Rtn(_) => None,
        Method::Gptq(_) => Some(with_device!(device, |backend| {
            Box::new(ModelCalibration::new(backend, &input.checkpoint, &input.config, &sequences)?)
        })),
    };
    let calibration = calibration.as_mut().map(|model| &mut **model as &mut dyn Calibration);
    let (summary, written) = write_model(&input, &assignments, method, calibration, &mut output)
        .and_then(|summary| Ok((summary, output.finish(&input, &plan, &assignments)?)))?;
    warn(&summary);
    print_line!("{}", summary_line(&args.output, &plan, method, &summary, &written, start));
    Ok(())
}

impl QuantizeArgs {
    fn plan(&self) -> Result<Plan> {
        let format = self.format.resolve(self.bits)?;
        let group_size = self.group.unwrap_or(format.default_group_size());
        Ok(Plan {
            default: Scheme::new(format, group_size)?,
            embeddings: self.embeddings,
            lm_head: self.lm_head,
            ignore: self.ignore.clone(),
            overrides: self.overrides.clone(),
        })
    }

    fn method(&self) -> Result<Method> {
        match (self.method, &self.calibration) {
            (None | Some(MethodName::Gptq), Some(_)) => {
                let default = GptqOptions::default();
                Ok(Method::Gptq(GptqOptions {
                    damping: self.damping.unwrap_or(default.damping),
                    act_order: !self.no_act_order,
                    scale_search: self.scale_search.map_or(default.scale_search, Into::into),
                    ..default
                }))
            }
            (Some(MethodName::Gptq), None) => {
                bail!("--method gptq needs calibration text: add --calibration TEXT")
            }
            (Some(MethodName::Rtn), Some(_)) => {
                bail!("--method rtn does not use calibration text: leave out --calibration")
            }
            (None | Some(MethodName::Rtn), None) => {
                Ok(Method::Rtn(self.scale_search.map_or(ScaleSearch::Range, Into::into)))
            }
        }
    }
}

/// The model to be quantized.
struct Input {
    dir: PathBuf,
    config_json: Value,
    config: ModelConfig,
    checkpoint: Checkpoint,
    modules: Vec<Module>,
    /// Modules stored as a slice of a fused expert tensor.
    slices: HashMap<String, Slice>,
}

/// Consecutive elements of a stored tensor.
struct Slice {
    tensor: String,
    start: usize,
}

impl Input {
    /// Opens a dense model folder and checks that every tensor of its architecture is there, and no other.
    fn open(dir: &Path) -> Result<Self> {
        let dir = &bundled::model_dir(Some(dir))?;
        if dir.is_file() {
            bail!("{}: only model folders can be quantized", dir.display());
        }
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).with_context(|| format!("{}", path.display()))?;
        let config_json: Value =
            serde_json::from_str(&text).with_context(|| format!("{}: not valid JSON", path.display()))?;
        let config = ModelConfig::from_value(&path, &config_json)?;
        if !config.quantization.is_empty() {
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

    /// The stored weight of a module.
    fn stored_weight(&self, module: &Module) -> Result<HostTensor> {
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
    fn release(&self, module: &Module) -> Result<()> {
        match self.slices.get(&module.name) {
            Some(slice) => self.checkpoint.release(&slice.tensor)?,
            None => self.checkpoint.release(&format!("{}.weight", module.name))?,
        }
        Ok(())
    }
}

/// Reads weights for the quantizer.
struct Source<'a>(&'a Input);

impl ModelSource for Source<'_> {
    fn weight(&mut self, module: &Module) -> Result<Vec<f32>, SourceError> {
        let values = self.0.stored_weight(module)?.to_f32()?;
        self.0.release(module)?;
        Ok(values)
    }
}

/// The folder being written.
struct Output(Writer);

impl Output {
    fn create(path: &Path) -> Result<Self> {
        Ok(Self(Writer::create(path)?))
    }

    /// Copies every tensor that is not quantized, as stored; fused experts become one tensor a projection.
    fn copy_plain(&mut self, input: &Input, assignments: &[Assignment]) -> Result<()> {
        let by_weight: HashMap<String, &Assignment> =
            assignments.iter().map(|a| (format!("{}.weight", a.module.name), a)).collect();
        let fused: HashSet<&str> = input.slices.values().map(|slice| slice.tensor.as_str()).collect();
        for name in input.checkpoint.names() {
            let quantized = by_weight.get(name).is_some_and(|a| a.scheme.is_some());
            let Some(info) = input.checkpoint.get(name) else { continue };
            if quantized || fused.contains(name) {
                continue;
            }
            let tensor = match info.dtype {
                DType::F32 | DType::F16 | DType::BF16 => input.checkpoint.dense(name, info.shape)?,
                _ => input.checkpoint.tensor(name)?,
            };
            self.0.host_tensor(name, &tensor)?;
            input.checkpoint.release(name)?;
        }
        for Assignment { module, scheme } in assignments {
            if scheme.is_none() && input.slices.contains_key(&module.name) {
                let tensor = input.stored_weight(module)?;
                self.0.host_tensor(&format!("{}.weight", module.name), &tensor)?;
                input.release(module)?;
            }
        }
        Ok(())
    }

    /// Writes the configuration and the tokenizer and gives the folder its name.
    fn finish(mut self, input: &Input, plan: &Plan, assignments: &[Assignment]) -> Result<WriteSummary> {
        let mut modules = BTreeMap::new();
        let mut ignore = Vec::new();
        for Assignment { module, scheme } in assignments {
            match scheme {
                None => ignore.push(module.name.clone()),
                Some(scheme) if *scheme != plan.default => {
                    modules.insert(module.name.clone(), *scheme);
                }
                Some(_) => {}
            }
        }
        let quantization = QuantizationConfig::new(plan.default, modules, &ignore)?;
        let mut config = input.config_json.clone();
        match &mut config {
            Value::Object(object) => {
                object.insert("quantization_config".to_owned(), quantization.to_json());
            }
            _ => bail!("{}: config.json is not an object", input.dir.display()),
        }
        self.0.copy_assets(&input.dir)?;
        Ok(self.0.finish(&config)?)
    }
}

impl ModelSink for Output {
    fn write(&mut self, module: &Module, matrix: &QuantizedMatrix) -> Result<(), SourceError> {
        Ok(self.0.matrix(&module.name, matrix)?)
    }
}

/// Copies what stays and quantizes the rest, with a progress bar on a terminal.
fn write_model(
    input: &Input,
    assignments: &[Assignment],
    method: Method,
    calibration: Option<&mut dyn Calibration>,
    output: &mut Output,
) -> Result<Summary> {
    output.copy_plain(input, assignments)?;
    let total = assignments.iter().filter(|a| a.scheme.is_some()).count();
    let progress = super::progress_bar(total as u64, "modules");
    let summary =
        quantize_model(Settings { assignments, method }, &mut Source(input), calibration, output, &mut |event| {
            match event {
                Event::Calibrating { layer, layers } => {
                    progress.set_message(format!("calibrating layer {} of {layers}", layer + 1));
                }
                Event::Quantized { module } => {
                    progress.inc(1);
                    progress.set_message(module.name.clone());
                }
            }
        });
    progress.finish_and_clear();
    Ok(summary?)
}

/// What a user should know about modules that calibration served badly, on stderr.
fn warn(summary: &Summary) {
    for name in &summary.without_rows {
        eprintln!("warning: no calibration token reached {name}; it was rounded to nearest");
    }
    if let Some((name, rows)) = summary.few_rows.iter().min_by_key(|(_, rows)| *rows) {
        let count = summary.few_rows.len();
        eprintln!(
            "warning: {count} modules saw fewer calibration tokens than an eighth of their inputs \
             ({name}: {rows}); more calibration text would help"
        );
    }
    for (name, damping) in &summary.damped {
        eprintln!("warning: {name} needed damping {damping}");
    }
}

fn summary_line(
    output: &Path,
    plan: &Plan,
    method: Method,
    summary: &Summary,
    written: &WriteSummary,
    start: Instant,
) -> String {
    let method = match method {
        Method::Rtn(_) => "rtn",
        Method::Gptq(_) => "gptq",
    };
    format!(
        "{}: {} group {} ({method}), {} modules at {:.3} bits per weight, {:.1} MB in all, {:.1} s",
        output.display(),
        plan.default.format,
        plan.default.group_size,
        summary.modules,
        summary.bits_per_weight(),
        written.bytes as f64 / 1e6,
        start.elapsed().as_secs_f64()
    )
}

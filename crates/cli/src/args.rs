//! Arguments that several commands share. A value out of range is wrong usage (exit status 2).

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use marlin_formats::exl3::Codebook;
use marlin_formats::{DType, Format};
use marlin_ops::sampling::{LogitsProcess, SampleFilter};

/// Which device runs the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceKind {
    /// An NVIDIA GPU, else another GPU that is not software, else the CPU (with --threads always)
    Auto,
    /// The CPU
    Cpu,
    /// Apple GPUs
    Metal,
    /// NVIDIA GPUs
    Cuda,
    /// Any Vulkan device
    Vulkan,
}

/// Device and numeric mode.
#[derive(Args, Clone, Debug)]
pub struct DeviceArgs {
    /// Device to run on
    #[arg(long, value_enum, default_value = "auto")]
    pub device: DeviceKind,
    /// Number of the device among those of its kind, as `marlin devices` lists them [default: the best]
    #[arg(long, value_name = "N")]
    pub device_index: Option<usize>,
    /// Multiply decoded weights with f32 activations instead of int8 ones, on NVIDIA GPUs EXL3 weights instead of f16 ones, and
    /// f32 keys and values as they are
    #[arg(long)]
    pub exact: bool,
    /// CPU threads [default: all cores]
    #[arg(long, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,
}

/// Element type of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CacheType {
    /// 32-bit floats
    F32,
    /// 16-bit floats
    F16,
    /// bfloat16
    Bf16,
}

impl From<CacheType> for DType {
    fn from(value: CacheType) -> Self {
        match value {
            CacheType::F32 => Self::F32,
            CacheType::F16 => Self::F16,
            CacheType::Bf16 => Self::BF16,
        }
    }
}

/// Which model to load and how much context to plan for.
#[derive(Args, Clone, Debug)]
pub struct ModelArgs {
    /// Model folder (config.json, safetensors, tokenizer.json) or GGUF file [default: the bundled story model]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Tokens of context to plan for [default: the model's own limit, at most 4096]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub context: Option<usize>,
    /// Element type of the KV cache
    #[arg(long, value_enum, default_value = "f16")]
    pub kv: CacheType,
}

/// How the next token is chosen.
#[derive(Args, Clone, Debug)]
pub struct SamplingArgs {
    /// Stop after this many tokens
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = at_least_one, allow_negative_numbers = true)]
    pub max_tokens: usize,
    /// 0 chooses the most likely token [default: the model's generation_config.json, else 0.7]
    #[arg(long, value_name = "T", value_parser = temperature, allow_negative_numbers = true)]
    pub temperature: Option<f32>,
    /// Keep the K most likely tokens
    #[arg(long, value_name = "K", value_parser = at_least_one, allow_negative_numbers = true)]
    pub top_k: Option<usize>,
    /// Keep the most likely tokens with this total probability, in (0, 1]
    #[arg(long, value_name = "P", value_parser = positive_probability, allow_negative_numbers = true)]
    pub top_p: Option<f32>,
    /// Keep tokens at least this likely relative to the best, in [0, 1]
    #[arg(long, value_name = "P", value_parser = probability, allow_negative_numbers = true)]
    pub min_p: Option<f32>,
    /// Keep the locally typical tokens with this total probability, in (0, 1)
    #[arg(long, value_name = "P", value_parser = open_probability, allow_negative_numbers = true)]
    pub typical: Option<f32>,
    /// Divide the logits of tokens already seen by this factor
    #[arg(long, value_name = "R", default_value_t = 1.0, value_parser = positive, allow_negative_numbers = true)]
    pub repetition_penalty: f32,
    /// Subtract this from generated tokens' logits for each occurrence
    #[arg(long, value_name = "A", default_value_t = 0.0, value_parser = finite, allow_hyphen_values = true)]
    pub frequency_penalty: f32,
    /// Subtract this once from generated tokens' logits
    #[arg(long, value_name = "A", default_value_t = 0.0, value_parser = finite, allow_hyphen_values = true)]
    pub presence_penalty: f32,
    /// Seed of the random draws [default: from the clock, shown at the end]
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
}

impl SamplingArgs {
    /// The filters of [`marlin_ops::SamplingOps::sample`].
    pub fn filter(&self) -> SampleFilter {
        SampleFilter { top_k: self.top_k, top_p: self.top_p, min_p: self.min_p, typical: self.typical }
    }

    /// Penalties and temperature; `temperature` must be above 0.
    pub fn process(&self, temperature: f32) -> LogitsProcess {
        LogitsProcess {
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            temperature,
        }
    }
}

/// The names of weight formats, for help texts.
pub fn format_names(formats: &[Format]) -> String {
    formats.iter().map(|format| format.name()).collect::<Vec<_>>().join(", ")
}

/// A whole number above 0.
pub fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(n) => Ok(n),
        Err(_) => Err("must be a whole number, at least 1".into()),
    }
}

/// More threads than this are a typing error; starting them would take minutes.
const MAX_THREADS: usize = 1024;

/// A number of CPU threads.
pub fn threads(text: &str) -> Result<usize, String> {
    match at_least_one(text)? {
        n if n <= MAX_THREADS => Ok(n),
        _ => Err(format!("must be at most {MAX_THREADS}")),
    }
}

/// A finite number.
fn finite(text: &str) -> Result<f32, String> {
    match text.parse::<f32>() {
        Ok(v) if v.is_finite() => Ok(v),
        _ => Err("must be a finite number".into()),
    }
}

fn checked(text: &str, ok: impl Fn(f32) -> bool, expected: &str) -> Result<f32, String> {
    finite(text).and_then(|v| if ok(v) { Ok(v) } else { Err(format!("must be {expected}")) })
}

fn positive(text: &str) -> Result<f32, String> {
    checked(text, |v| v > 0.0, "above 0")
}

fn temperature(text: &str) -> Result<f32, String> {
    checked(text, |v| v >= 0.0, "0 (greedy) or above")
}

fn positive_probability(text: &str) -> Result<f32, String> {
    checked(text, |v| v > 0.0 && v <= 1.0, "in (0, 1]")
}

fn probability(text: &str) -> Result<f32, String> {
    checked(text, |v| (0.0..=1.0).contains(&v), "in [0, 1]")
}

fn open_probability(text: &str) -> Result<f32, String> {
    checked(text, |v| v > 0.0 && v < 1.0, "in (0, 1)")
}

/// `--codebook`.
pub fn codebook(text: &str) -> Result<Codebook, String> {
    Codebook::from_name(text).ok_or_else(|| {
        let names = Codebook::ALL.map(Codebook::name);
        format!("must be one of {}", names.join(", "))
    })
}

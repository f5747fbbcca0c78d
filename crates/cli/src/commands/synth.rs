//! `marlin synth`: random weights in a real architecture.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use marlin_formats::exl3::Codebook;
use marlin_formats::{DType, Format};
use marlin_models::{HeadFormat, SynthOptions, SynthTrellis, synth, synth_presets};

use super::progress_bar;
use crate::args::{at_least_one, codebook, format_names};

/// Type of the weights that are not quantized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum PlainType {
    /// 32-bit floats
    F32,
    /// 16-bit floats
    F16,
    /// bfloat16
    Bf16,
}

/// Arguments of `marlin synth`.
#[derive(Args)]
pub struct SynthArgs {
    #[arg(help = format!("Architecture: {}", synth_presets().join(", ")))]
    arch: String,
    /// Folder to write; it must not exist
    out: PathBuf,
    #[arg(long, value_name = "F", value_parser = linear_format)]
    #[arg(help = format!("Format of the linear layers: exl3, {} [default: plain weights]", format_names(&Format::ALL)))]
    format: Option<LinearFormat>,
    /// EXL3: bits a weight, 1 to 8
    #[arg(long, value_name = "B", value_parser = clap::value_parser!(u32).range(1..=8))]
    bits: Option<u32>,
    /// EXL3: how states become values: mul1, mcg or 3inst [default: mul1]
    #[arg(long, value_name = "C", value_parser = codebook)]
    codebook: Option<Codebook>,
    /// Weights along the input that share a scale [default: the format's own]
    #[arg(long, value_name = "G", value_parser = at_least_one)]
    group: Option<usize>,
    /// Format of the output head: plain, or a format [default: that of the linear layers; plain if EXL3 and tied]
    #[arg(long, value_name = "F", value_parser = head_format)]
    lm_head: Option<HeadFormat>,
    /// Type of the weights that are not quantized
    #[arg(long, value_enum, default_value = "bf16")]
    dtype: PlainType,
    /// Number of layers
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    layers: Option<usize>,
    /// Model width
    #[arg(long, value_name = "H", value_parser = at_least_one)]
    hidden: Option<usize>,
    /// Width of the dense layers' hidden vector
    #[arg(long, value_name = "I", value_parser = at_least_one)]
    intermediate: Option<usize>,
    /// Routed experts per layer
    #[arg(long, value_name = "E", value_parser = at_least_one)]
    experts: Option<usize>,
    /// Vocabulary size
    #[arg(long, value_name = "V", value_parser = at_least_one)]
    vocab: Option<usize>,
    /// Longest context of the model
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    context: Option<usize>,
    /// Model folder whose tokenizer is copied
    #[arg(long, value_name = "DIR")]
    tokenizer: Option<PathBuf>,
    /// Seed of all values
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
}

/// Writes the model folder.
pub fn run(args: SynthArgs) -> Result<()> {
    if !synth_presets().contains(&args.arch.as_str()) {
        bail!("unknown architecture `{}`; known: {}", args.arch, synth_presets().join(", "));
    }
    let (format, trellis) = match (args.format, args.bits, args.codebook) {
        (Some(LinearFormat::Exl3), Some(bits), codebook) => {
            (None, Some(SynthTrellis { bits, codebook: codebook.unwrap_or(Codebook::Mul1) }))
        }
        (Some(LinearFormat::Exl3), None, _) => bail!("--format exl3 needs --bits"),
        (_, Some(_), _) | (_, _, Some(_)) => bail!("--bits and --codebook belong to --format exl3"),
        (Some(LinearFormat::Native(format)), ..) => (Some(format), None),
        (None, ..) => (None, None),
    };
    let options = SynthOptions {
        format,
        trellis,
        group_size: args.group,
        head: args.lm_head.unwrap_or_default(),
        dtype: match args.dtype {
            PlainType::F32 => DType::F32,
            PlainType::F16 => DType::F16,
            PlainType::Bf16 => DType::BF16,
        },
        seed: args.seed,
        layers: args.layers,
        hidden_size: args.hidden,
        intermediate_size: args.intermediate,
        experts: args.experts,
        vocab_size: args.vocab,
        context: args.context,
        tokenizer_from: args.tokenizer,
    };
    let progress = progress_bar(0, "modules");
    let summary = synth(&args.arch, &options, &args.out, |done, total| {
        progress.set_length(total as u64);
        progress.set_position(done as u64);
    })?;
    progress.finish_and_clear();
    print_line!("{}: {} tensors, {:.1} MB", args.out.display(), summary.tensors, summary.bytes as f64 / 1e6);
    Ok(())
}

/// `--format`.
#[derive(Clone, Copy, Debug)]
enum LinearFormat {
    Native(Format),
    Exl3,
}

fn linear_format(text: &str) -> Result<LinearFormat, marlin_formats::FormatError> {
    match text {
        "exl3" => Ok(LinearFormat::Exl3),
        name => name.parse().map(LinearFormat::Native),
    }
}

fn head_format(text: &str) -> Result<HeadFormat, marlin_formats::FormatError> {
    match text {
        "plain" => Ok(HeadFormat::Plain),
        name => name.parse().map(HeadFormat::Native),
    }
}

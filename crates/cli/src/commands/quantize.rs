//! `marlin quantize`: a quantized copy of a model folder.
//!
//! Finished parts wait in `OUT.partial`; a run that is killed is taken up there by the next one with the same arguments.

mod choice;
mod folds;
mod input;
mod job;
mod output;
mod recipe;
mod report;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use clap::{Args, ValueEnum};
use marlin_formats::exl3::Codebook;
use marlin_formats::{Format, Scheme};
use marlin_models::{ModelError, Tokenizer};
use marlin_ops::Device;
use marlin_quantize::exl3::Exl3Options;
use marlin_quantize::{
    Assignment, AwqOptions, Calibration, Fingerprint, GptqOptions, Method, Override, Pattern, Plan, ScaleSearch,
    Staging, StagingError, parse_scheme,
};

use crate::args::{DeviceArgs, DeviceKind, format_names};
use crate::calibration::{ModelCalibration, read_sequences};
use crate::device::{self, with_device};
use choice::{Choice, FormatChoice, format_choice};
use input::Input;
use job::{Job, leave};
use recipe::{Exl3Recipe, Recipe};

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
    #[arg(help = format!("Weight format: {}; or int, nf, fp or exl3 with --bits", format_names(&Format::ENCODABLE)))]
    format: FormatChoice,
    /// Bits of one weight, to choose among the int, nf or fp formats, a fraction for a mixture by measured sensitivity;
    /// for exl3 their average, from 1 to 8
    #[arg(long, value_name = "B", value_parser = choice::bits, allow_negative_numbers = true)]
    bits: Option<f64>,
    /// Weights along K that share a scale [default: the format's own, mostly 128]
    #[arg(long, value_name = "G", value_parser = crate::args::at_least_one, allow_negative_numbers = true)]
    group: Option<usize>,
    /// How weights become codes; exl3 has its own [default: gptq with --calibration, else rtn]
    #[arg(long, value_enum)]
    method: Option<MethodName>,
    /// UTF-8 text to calibrate on
    #[arg(long, value_name = "TEXT")]
    calibration: Option<PathBuf>,
    /// Tokens of the calibration text to use [default: 32768]
    #[arg(long, value_name = "N", requires = "calibration", value_parser = crate::args::at_least_one)]
    calibration_tokens: Option<usize>,
    /// Tokens of one calibration sequence [default: 512]
    #[arg(long, value_name = "N", requires = "calibration", value_parser = crate::args::at_least_one)]
    context: Option<usize>,
    /// Eliminate along K instead of by descending activation size
    #[arg(long, requires = "calibration")]
    no_act_order: bool,
    /// Part of the Hessian's mean diagonal that is added to it [default: 0.01, exl3 0.025]
    #[arg(long, value_name = "D", requires = "calibration", value_parser = choice::damping)]
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
    /// EXL3: bits of lm_head, 16 for as stored [default: 6]
    #[arg(long, value_name = "B", value_parser = choice::head_bits)]
    head_bits: Option<u32>,
    /// EXL3: how states become values: mul1, mcg or 3inst [default: mul1]
    #[arg(long, value_name = "C", value_parser = crate::args::codebook)]
    codebook: Option<Codebook>,
    /// EXL3: seed of the random signs [default: 0]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Show which format each part of a mixture got
    #[arg(long)]
    verbose: bool,
    /// Discard what an interrupted run has finished instead of going on from there
    #[arg(long)]
    restart: bool,
    /// Device that runs the calibration and, if it is a GPU, the search for EXL3 codes
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
    /// Channel scales against the size of the calibration activations, folded into the operations before
    Awq,
    /// GPTQ of the model in rotated bases: blocks of a Hadamard matrix, folded into the weights on both sides. Meant for
    /// fp4, nvfp4 and mxfp4. A tied lm_head becomes a matrix of its own; prediction layers are left out
    MrGptq,
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

/// Quantizes IN to OUT.
pub fn run(args: QuantizeArgs) -> Result<()> {
    let start = Instant::now();
    let mut recipe = args.recipe()?;
    let method = args.method(&recipe)?;
    let device = device::open(&DeviceArgs { device: args.device, device_index: None, exact: true, threads: None })?;
    let mut input = Input::open(&args.input)?;
    if matches!(&recipe, Recipe::Exl3(recipe) if recipe.head_bits <= 8) {
        input.add_tied_head();
    }
    let rotated = args.method == Some(MethodName::MrGptq);
    if rotated {
        input.rotate()?;
    }
    let assignments = recipe.resolve(&input.modules, input.config.num_layers)?;
    let sequences = args.sequences(&input)?;
    if let Recipe::Exl3(recipe) = &mut recipe {
        recipe.calibration = (sequences.len(), sequences.iter().map(Vec::len).max().unwrap_or(0));
    }
    let folds = if let Method::Awq(_) = method { folds::folds(&input.config, &assignments) } else { Vec::new() };
    let device_name = with_device!(&device, |backend| backend.name());
    let fingerprint = args.fingerprint(&input, method, &assignments, &sequences, device_name)?;
    let Some(staging) = args.staging(&fingerprint)? else {
        print_line!("{}: complete already", args.output.display());
        return Ok(());
    };
    let calibrate = || -> Result<Option<Box<dyn Calibration + '_>>> {
        Ok(match method {
            Method::Rtn(_) => None,
            _ => Some(with_device!(&device, |backend| {
                let backend = std::sync::Arc::clone(backend);
                Box::new(ModelCalibration::new(backend, &input.checkpoint, &input.config, &sequences)?)
            })),
        })
    };
    let (input, recipe, output) = (&input, &recipe, args.output.as_path());
    let search = with_device!(&device, |backend| backend.path_search());
    let mut job = Job { input, recipe, assignments, folds, method, search, output, calibrate: &calibrate };
    let (summary, written, mixture) = job.run(staging)?;
    report::warn(&summary);
    if let Some(mixture) = &mixture {
        report::mixture(mixture, args.verbose)?;
    }
    print_line!("{}", report::summary_line(&args.output, recipe, (method, rotated), &summary, &written, start));
    Ok(())
}

impl QuantizeArgs {
    fn recipe(&self) -> Result<Recipe> {
        let choice = self.format.resolve(self.bits)?;
        let exl3_only = [
            ("--head-bits", self.head_bits.is_some()),
            ("--codebook", self.codebook.is_some()),
            ("--seed", self.seed.is_some()),
        ];
        let never_exl3 = [
            ("--group", self.group.is_some()),
            ("--method", self.method.is_some()),
            ("--scale-search", self.scale_search.is_some()),
            ("--no-act-order", self.no_act_order),
            ("--embeddings", self.embeddings.is_some()),
            ("--lm-head", self.lm_head.is_some()),
            ("--override", !self.overrides.is_empty()),
        ];
        let given = |options: &[(&'static str, bool)]| options.iter().find(|(_, given)| *given).map(|(name, _)| *name);
        let (format, mixture) = match choice {
            Choice::Exl3 { .. } => (None, None),
            Choice::Format(format) => (Some(format), None),
            Choice::Mixed { members, bits } => {
                let below = members.iter().rev().find(|format| f64::from(format.code_bits()) < bits);
                (below.copied(), Some((members, bits)))
            }
        };
        if self.verbose && mixture.is_none() {
            bail!("--verbose shows the formats of a mixture: it needs a fraction of --bits, such as 3.5");
        }
        match (choice, format) {
            (Choice::Format(_) | Choice::Mixed { .. }, Some(format)) => {
                if let Some(option) = given(&exl3_only) {
                    bail!("{option} is an option of --format exl3");
                }
                let group_size = self.group.unwrap_or(format.default_group_size());
                let plan = Plan {
                    default: Scheme::new(format, group_size)?,
                    embeddings: self.embeddings,
                    lm_head: self.lm_head,
                    ignore: self.ignore.clone(),
                    overrides: self.overrides.clone(),
                };
                Ok(match mixture {
                    None => Recipe::Native(plan),
                    Some((members, bits)) => {
                        let candidates = members
                            .iter()
                            .map(|&format| Scheme::new(format, self.group.unwrap_or(format.default_group_size())));
                        Recipe::Mixed { plan, candidates: candidates.collect::<Result<_, _>>()?, bits }
                    }
                })
            }
            (Choice::Exl3 { bits }, _) => {
                if let Some(option) = given(&never_exl3) {
                    bail!("{option} cannot be used with --format exl3");
                }
                Ok(Recipe::Exl3(Exl3Recipe {
                    bits,
                    head_bits: self.head_bits.unwrap_or(6),
                    codebook: self.codebook.unwrap_or(Codebook::Mul1),
                    ignore: self.ignore.clone(),
                    calibration: (0, 0),
                }))
            }
            (_, None) => bail!("--bits leaves no format of the family"),
        }
    }

    fn method(&self, recipe: &Recipe) -> Result<Method> {
        match (recipe, self.method, &self.calibration) {
            (Recipe::Exl3(_), _, None) => bail!("--format exl3 needs calibration text: add --calibration TEXT"),
            (Recipe::Exl3(_), _, Some(_)) => {
                let default = Exl3Options::default();
                Ok(Method::Exl3(Exl3Options {
                    sigma: self.damping.unwrap_or(default.sigma),
                    seed: self.seed.unwrap_or(default.seed),
                    ..default
                }))
            }
            (Recipe::Mixed { .. }, _, None) => {
                bail!("a fraction of --bits is a mixture by measured sensitivity: add --calibration TEXT")
            }
            (_, Some(MethodName::Awq), Some(_)) => {
                if self.no_act_order || self.damping.is_some() {
                    bail!("--no-act-order and --damping are options of --method gptq and mr-gptq");
                }
                let default = AwqOptions::default();
                Ok(Method::Awq(AwqOptions {
                    scale_search: self.scale_search.map_or(default.scale_search, Into::into),
                    ..default
                }))
            }
            (_, Some(MethodName::Awq), None) => bail!("--method awq needs calibration text: add --calibration TEXT"),
            (_, None | Some(MethodName::Gptq | MethodName::MrGptq), Some(_)) => {
                let default = GptqOptions::default();
                Ok(Method::Gptq(GptqOptions {
                    damping: self.damping.unwrap_or(default.damping),
                    act_order: !self.no_act_order,
                    scale_search: self.scale_search.map_or(default.scale_search, Into::into),
                    ..default
                }))
            }
            (_, Some(MethodName::Gptq), None) => {
                bail!("--method gptq needs calibration text: add --calibration TEXT")
            }
            (_, Some(MethodName::MrGptq), None) => {
                bail!("--method mr-gptq needs calibration text: add --calibration TEXT")
            }
            (_, Some(MethodName::Rtn), Some(_)) => {
                bail!("--method rtn does not use calibration text: leave out --calibration")
            }
            (_, None | Some(MethodName::Rtn), None) => {
                Ok(Method::Rtn(self.scale_search.map_or(ScaleSearch::Range, Into::into)))
            }
        }
    }

    /// The calibration text in sequences of tokens; none without calibration.
    fn sequences(&self, input: &Input) -> Result<Vec<Vec<u32>>> {
        let Some(text) = &self.calibration else {
            return Ok(Vec::new());
        };
        let tokenizer = Tokenizer::from_dir(&self.input)?;
        let context = self.context.unwrap_or(512).min(input.config.max_position_embeddings);
        read_sequences(text, &tokenizer, self.calibration_tokens.unwrap_or(32768), context)
    }

    /// Everything the written folder depends on.
    fn fingerprint(
        &self,
        input: &Input,
        method: Method,
        assignments: &[Assignment],
        sequences: &[Vec<u32>],
        device: &str,
    ) -> Result<Fingerprint> {
        let mut job = Fingerprint::default();
        let mut add = |name: &str, value: String| job.add(name, value);
        add("program version", env!("CARGO_PKG_VERSION").to_owned());
        add("IN", std::fs::canonicalize(&self.input).unwrap_or(self.input.clone()).display().to_string());
        add("contents of IN", input.files_hash()?);
        let bases = if input.checkpoint.is_rotated() { "rotated " } else { "" };
        add("method", format!("{bases}{method:?}"));
        add("formats by module", {
            let line = |a: &Assignment| format!("{} {:?} {}\n", a.module.name, a.target, a.by_default);
            Fingerprint::hash(assignments.iter().map(line).collect::<String>().as_bytes())
        });
        let mut option = |name: &str, value: Option<String>| value.map(|value| job.add(name, value));
        option("--format", Some(self.format.to_string()));
        option("--bits", self.bits.map(|bits| bits.to_string()));
        option("--group", self.group.map(|group| group.to_string()));
        option("--head-bits", self.head_bits.map(|bits| bits.to_string()));
        option("--ignore", words(&self.ignore));
        if let Some(text) = &self.calibration {
            option("--calibration", Some(text.display().to_string()));
            let ids: Vec<u8> = sequences
                .iter()
                .flat_map(|ids| ids.iter().chain([&u32::MAX]))
                .flat_map(|id| id.to_le_bytes())
                .collect();
            option("calibration tokens", Some(Fingerprint::hash(&ids)));
            option("device", Some(device.to_owned()));
        }
        Ok(job)
    }

    /// Takes up or starts the job; `None` when it is complete but for the removal of its staging folder.
    fn staging(&self, fingerprint: &Fingerprint) -> Result<Option<Staging>> {
        let exists = || ModelError::OutputExists { path: self.output.clone() };
        let Some(dir) = Staging::dir_of(&self.output) else {
            bail!("output folder: {} has no name", self.output.display());
        };
        let complete = std::fs::symlink_metadata(&self.output).is_ok();
        if complete && (self.restart || std::fs::symlink_metadata(&dir).is_err()) {
            return Err(exists().into());
        }
        if self.restart {
            Staging::discard(&dir)?;
        }
        let staging = Staging::open(&dir, fingerprint).map_err(|error| match error {
            _ if complete => anyhow!(exists()),
            StagingError::OtherJob { .. } | StagingError::Damaged { .. } => {
                anyhow!("{error}; repeat that job's arguments to go on with it, or add --restart to discard it")
            }
            error => error.into(),
        })?;
        match complete {
            false => Ok(Some(staging)),
            true if staging.is_published(&self.output)? => {
                staging.remove()?;
                Ok(None)
            }
            true => {
                leave(staging)?;
                Err(exists().into())
            }
        }
    }
}

fn words<T: ToString>(values: &[T]) -> Option<String> {
    let words: Vec<String> = values.iter().map(ToString::to_string).collect();
    (!words.is_empty()).then(|| words.join(" "))
}

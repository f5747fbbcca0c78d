//! `marlin perplexity`: how well a model predicts a text.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;
use marlin_formats::DType;
use marlin_models::Tokenizer;
use marlin_ops::Backend;
use serde_json::json;

use crate::args::{CacheType, DeviceArgs};
use crate::bundled;
use crate::device::on_device;
use crate::session::Session;

/// Arguments of `marlin perplexity`.
#[derive(Args)]
pub struct PerplexityArgs {
    /// Model folder [default: the bundled story model]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// UTF-8 text to score
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens per window; windows do not overlap and the first token of each is not scored
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = crate::args::at_least_one)]
    context: usize,
    /// Stop after this many windows
    #[arg(long, value_name = "N", value_parser = crate::args::at_least_one)]
    windows: Option<usize>,
    /// Element type of the KV cache
    #[arg(long, value_enum, default_value = "f32")]
    kv: CacheType,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Scores the text in contiguous windows.
pub fn run(args: PerplexityArgs) -> Result<()> {
    on_device!(&args.device, |backend| run_on(backend, args))
}

fn run_on<B: Backend>(backend: Arc<B>, args: PerplexityArgs) -> Result<()> {
    if args.context < 2 {
        bail!("--context {} leaves nothing to score: use at least 2", args.context);
    }
    let text = std::fs::read_to_string(&args.text).with_context(|| format!("{}", args.text.display()))?;
    let dir = bundled::model_dir(args.model.as_deref())?;
    let ids = Tokenizer::from_dir(&dir)?.encode(&text, false)?;
    if ids.len() < 2 {
        bail!("{}: {} tokens, at least 2 are needed", args.text.display(), ids.len());
    }
    let mut session = Session::open_with(backend, &dir, Some(args.context), DType::from(args.kv))?;
    let windows: Vec<&[u32]> =
        ids.chunks(args.context).filter(|window| window.len() > 1).take(args.windows.unwrap_or(usize::MAX)).collect();
    let progress = super::progress_bar(windows.len() as u64, "windows");
    let (mut total, mut scored) = (0.0f64, 0usize);
    for window in windows {
        total += session.negative_log_likelihood(window)?;
        scored += window.len() - 1;
        progress.inc(1);
    }
    progress.finish_and_clear();
    let mean = total / scored as f64;
    let perplexity = mean.exp();
    if args.json {
        let result = json!({ "perplexity": perplexity, "nll_per_token": mean, "tokens": scored });
        print_line!("{result}");
    } else {
        print_line!("perplexity {perplexity:.4} ({mean:.5} nats per token, {scored} tokens)");
    }
    Ok(())
}

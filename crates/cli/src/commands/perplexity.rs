//! `marlin perplexity`: how well a model predicts a text.

use std::path::{Path, PathBuf};
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
    /// Model folder or GGUF file [default: the bundled story model]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Folder of a model to compare with, such as the one before quantization: adds the mean KL divergence of the
    /// predictions from its, and how often both find the same token likeliest. Holds one window of its logits in memory
    #[arg(long, value_name = "DIR")]
    reference: Option<PathBuf>,
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
    let mut session = Session::open_with(backend.clone(), &dir, Some(args.context), DType::from(args.kv))?;
    let mut reference = match &args.reference {
        Some(dir) => Some(Reference::open(backend, dir, &args, session.model().config().vocab_size)?),
        None => None,
    };
    let windows: Vec<&[u32]> =
        ids.chunks(args.context).filter(|window| window.len() > 1).take(args.windows.unwrap_or(usize::MAX)).collect();
    let progress = super::progress_bar(windows.len() as u64, "windows");
    let mut score = Score::default();
    for window in windows {
        if let Some(reference) = &mut reference {
            reference.predict(window)?;
        }
        session.each_prediction(window, |i, logits| {
            let log_probabilities = log_softmax(logits);
            score.tokens += 1;
            score.negative_log_likelihood -= log_probabilities[window[i + 1] as usize];
            if let Some(reference) = &reference {
                score.compare(&log_probabilities, reference.row(i));
            }
        })?;
        progress.inc(1);
    }
    progress.finish_and_clear();
    if !score.negative_log_likelihood.is_finite() {
        bail!("the model gives a token of the text no probability at all");
    }
    score.print(reference.is_some(), args.json)
}

/// Sums over all scored tokens.
#[derive(Default)]
struct Score {
    tokens: usize,
    negative_log_likelihood: f64,
    /// `sum_id p(id) (ln p(id) - ln q(id))`, p of the reference.
    divergence: f64,
    /// Tokens where both models find the same one likeliest.
    same_top: usize,
}

impl Score {
    /// Adds one token's predictions, as logarithms of probabilities.
    fn compare(&mut self, found: &[f64], reference: &[f64]) {
        // The terms of impossible tokens are 0.
        let terms = reference.iter().zip(found).filter(|(p, _)| **p > f64::NEG_INFINITY);
        self.divergence += terms.map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        self.same_top += usize::from(argmax(found) == argmax(reference));
    }

    fn print(&self, compared: bool, as_json: bool) -> Result<()> {
        let tokens = self.tokens as f64;
        let mean = self.negative_log_likelihood / tokens;
        let (divergence, agreement) = (self.divergence / tokens, self.same_top as f64 / tokens);
        if as_json {
            let mut result = json!({ "perplexity": mean.exp(), "nll_per_token": mean, "tokens": self.tokens });
            if compared {
                result["kl_divergence"] = json!(divergence);
                result["top1_agreement"] = json!(agreement);
            }
            print_line!("{result}");
            return Ok(());
        }
        print_line!("perplexity {:.4} ({mean:.5} nats per token, {} tokens)", mean.exp(), self.tokens);
        if compared {
            print_line!(
                "KL divergence {divergence:.6} nats per token, same likeliest token {:.2} %",
                100.0 * agreement
            );
        }
        Ok(())
    }
}

/// The model that predictions are compared with.
struct Reference<B: Backend> {
    session: Session<B>,
    vocab: usize,
    /// Logarithms of probabilities of one window, `[tokens - 1, vocab]`.
    rows: Vec<f64>,
}

impl<B: Backend> Reference<B> {
    fn open(backend: Arc<B>, dir: &Path, args: &PerplexityArgs, vocab: usize) -> Result<Self> {
        let dir = bundled::model_dir(Some(dir))?;
        let session = Session::open_with(backend, &dir, Some(args.context), DType::from(args.kv))?;
        let own = session.model().config().vocab_size;
        if own != vocab {
            bail!("{}: a vocabulary of {own} tokens cannot be compared with one of {vocab}", dir.display());
        }
        Ok(Self { session, vocab, rows: Vec::new() })
    }

    fn predict(&mut self, window: &[u32]) -> Result<()> {
        let rows = &mut self.rows;
        rows.clear();
        self.session.each_prediction(window, |_, logits| rows.extend(log_softmax(logits)))
    }

    fn row(&self, i: usize) -> &[f64] {
        &self.rows[i * self.vocab..][..self.vocab]
    }
}

/// `ln softmax(logits)` in f64.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&v| (f64::from(v) - max).exp()).sum();
    logits.iter().map(|&v| f64::from(v) - max - sum.ln()).collect()
}

/// The first of the largest values.
fn argmax(values: &[f64]) -> usize {
    let mut best = 0;
    for (i, v) in values.iter().enumerate() {
        if *v > values[best] {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_softmax_of_a_known_row() {
        let row = log_softmax(&[0.0, 2f32.ln(), f32::NEG_INFINITY]);
        assert!((row[1] + 1.5f64.ln()).abs() < 1e-7);
        assert!((row[0] + 3f64.ln()).abs() < 1e-7);
        assert_eq!(row[2], f64::NEG_INFINITY);
    }

    #[test]
    fn divergence_of_known_distributions() {
        let ln = |values: [f64; 3]| values.map(f64::ln);
        let mut score = Score::default();
        score.compare(&ln([0.25, 0.5, 0.25]), &ln([0.5, 0.5, 0.0]));
        assert!((score.divergence - 0.5 * 2f64.ln()).abs() < 1e-12);
        assert_eq!(score.same_top, 0, "the first of equal values counts");
        score.compare(&ln([0.2, 0.5, 0.3]), &ln([0.2, 0.5, 0.3]));
        assert!((score.divergence - 0.5 * 2f64.ln()).abs() < 1e-12);
        assert_eq!(score.same_top, 1);
    }
}

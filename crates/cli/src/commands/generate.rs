//! `marlin generate`: continue a text.

use std::io::{IsTerminal, Read, Write};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;
use marlin_models::{GenerationConfig, Tokenizer};
use marlin_ops::Backend;
use serde_json::json;

use crate::args::{DeviceArgs, ModelArgs, SamplingArgs};
use crate::bundled;
use crate::device::on_device;
use crate::session::{Sampler, Session, tokens_per_second};

/// Arguments of `marlin generate`.
#[derive(Args)]
pub struct GenerateArgs {
    /// Text to continue [default: standard input]
    prompt: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object instead of the text
    #[arg(long)]
    json: bool,
}

/// Continues the prompt, printing text as it comes.
pub fn run(args: GenerateArgs) -> Result<()> {
    on_device!(&args.device, |backend| run_on(backend, args))
}

fn run_on<B: Backend>(backend: Arc<B>, args: GenerateArgs) -> Result<()> {
    let prompt = read_prompt(args.prompt)?;
    let dir = bundled::model_dir(args.model.model.as_deref())?;
    let tokenizer = Tokenizer::from_dir(&dir)?;
    let ids = tokenizer.encode(&prompt, true)?;
    if ids.is_empty() {
        bail!("the prompt is empty: give some text to continue");
    }
    let mut session = Session::open(backend.clone(), &dir, &args.model)?;
    session.check_prompt(&ids)?;
    let defaults = GenerationConfig::from_dir(&dir)?;
    let eos = defaults.eos_token_ids(session.model().config()).to_vec();
    let sampler = Sampler::new(&args.sampling, &defaults, eos);

    let mut decoder = tokenizer.stream(true);
    let mut text = String::new();
    let mut stdout = std::io::stdout();
    let stream = !args.json;
    if stream {
        write!(stdout, "{prompt}")?;
        stdout.flush()?;
    }
    let mut emit = |piece: &str| -> Result<()> {
        text.push_str(piece);
        if stream {
            write!(stdout, "{piece}")?;
            stdout.flush()?;
        }
        Ok(())
    };
    let generation = session.generate(&ids, &sampler, |id| emit(&decoder.push(id)?))?;
    emit(&decoder.finish()?)?;

    let prefill = tokens_per_second(generation.prefill_tokens, generation.prefill_time);
    let decode = tokens_per_second(generation.decode_tokens, generation.decode_time);
    if args.json {
        let result = json!({
            "text": text,
            "prompt_tokens": ids.len(),
            "generated_tokens": generation.tokens.len(),
            "finish_reason": generation.finish_reason.name(),
            "prefill_tokens_per_s": prefill,
            "decode_tokens_per_s": decode,
            "model": dir.display().to_string(),
            "device": backend.name(),
            "seed": sampler.seed,
        });
        print_line!("{result}");
    } else {
        print_line!();
        eprintln!(
            "\n[{} prompt tokens at {prefill:.0} tokens/s, {} generated at {decode:.0} tokens/s, {}, seed {}]",
            ids.len(),
            generation.tokens.len(),
            backend.name(),
            sampler.seed,
        );
    }
    Ok(())
}

/// The argument, or standard input when it is not a terminal.
fn read_prompt(argument: Option<String>) -> Result<String> {
    let prompt = match argument {
        Some(prompt) => prompt,
        None if std::io::stdin().is_terminal() => {
            bail!("no prompt: give it as an argument or on standard input")
        }
        None => {
            let mut bytes = Vec::new();
            std::io::stdin().read_to_end(&mut bytes).context("standard input")?;
            let text = String::from_utf8(bytes).context("standard input is not UTF-8")?;
            text.strip_suffix('\n').unwrap_or(&text).to_owned()
        }
    };
    if prompt.is_empty() {
        bail!("the prompt is empty: give some text to continue");
    }
    Ok(prompt)
}

//! `marlin chat`: a conversation on the terminal.

use std::io::{BufRead, IsTerminal, Write};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;
use marlin_models::{ChatTemplate, GenerationConfig, Message, Tokenizer};
use marlin_ops::Backend;

use crate::args::{DeviceArgs, ModelArgs, SamplingArgs};
use crate::bundled;
use crate::device::on_device;
use crate::session::{Sampler, Session, tokens_per_second};

/// Arguments of `marlin chat`.
#[derive(Args)]
pub struct ChatArgs {
    /// Instructions that stand before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Reads messages line by line and streams the answers; `/new` starts over, end of input leaves.
pub fn run(args: ChatArgs) -> Result<()> {
    on_device!(&args.device, |backend| run_on(backend, args))
}

fn run_on<B: Backend>(backend: Arc<B>, args: ChatArgs) -> Result<()> {
    let dir = bundled::model_dir(args.model.model.as_deref())?;
    let tokenizer = Tokenizer::from_dir(&dir)?;
    let Some(template) = ChatTemplate::from_dir(&dir)? else {
        bail!("{}: the model has no chat template; use `marlin generate`", dir.display());
    };
    let mut session = Session::open(backend, &dir, &args.model)?;
    let defaults = GenerationConfig::from_dir(&dir)?;
    let eos = defaults.eos_token_ids(session.model().config()).to_vec();
    let sampler = Sampler::new(&args.sampling, &defaults, eos);

    let interactive = std::io::stdin().is_terminal();
    if interactive {
        eprintln!("One message a line; /new starts over, /exit or Ctrl-D leaves.");
    }
    let system = || args.system.iter().map(|text| Message::new("system", text));
    let mut messages: Vec<Message> = system().collect();
    let mut cached: Vec<u32> = Vec::new();
    let mut lines = std::io::stdin().lock().lines();
    loop {
        if interactive {
            eprint!("> ");
        }
        let Some(line) = lines.next() else { break };
        let line = line.context("standard input")?;
        match line.trim() {
            "" => continue,
            "/exit" => break,
            "/new" => {
                messages = system().collect();
                continue;
            }
            text => messages.push(Message::new("user", text)),
        }
        let ids = tokenizer.encode(&template.render(&messages, true, &serde_json::Map::new())?, false)?;
        let context = session.model().context();
        if ids.len() >= context {
            let problem = format!("the conversation has {} tokens, the context holds {context}", ids.len());
            if !interactive {
                bail!(problem);
            }
            eprintln!("{problem}: say less, or start over with /new");
            messages.pop();
            continue;
        }
        // Keep what the cache already holds of this conversation; the last token must be fed to get its logits.
        let shared = cached.iter().zip(&ids).take_while(|(a, b)| a == b).count();
        session.truncate(shared.min(ids.len() - 1));

        let mut decoder = tokenizer.stream(true);
        let mut answer = String::new();
        let mut stdout = std::io::stdout();
        let mut emit = |piece: &str| -> Result<()> {
            answer.push_str(piece);
            write!(stdout, "{piece}")?;
            Ok(stdout.flush()?)
        };
        let generation = session.generate(&ids, &sampler, |id| emit(&decoder.push(id)?))?;
        emit(&decoder.finish()?)?;
        print_line!();
        if interactive {
            let decode = tokens_per_second(generation.decode_tokens, generation.decode_time);
            eprintln!("[{} tokens at {decode:.0} tokens/s]", generation.tokens.len());
        }
        cached = ids;
        cached.extend(&generation.tokens);
        cached.truncate(session.cached());
        messages.push(Message::new("assistant", answer.trim()));
    }
    Ok(())
}

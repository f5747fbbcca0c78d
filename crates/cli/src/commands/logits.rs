//! `marlin logits`: the logits of given tokens, for comparison with other implementations.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;
use marlin_formats::DType;
use marlin_ops::Backend;
use safetensors::tensor::TensorView;

use crate::args::{CacheType, DeviceArgs};
use crate::bundled;
use crate::device::on_device;
use crate::session::Session;

/// Arguments of `marlin logits`.
#[derive(Args)]
pub struct LogitsArgs {
    /// Model folder or GGUF file [default: the bundled story model]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Token ids, separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true)]
    tokens: Vec<u32>,
    /// Safetensors file to write: tensor `logits`, F32 [tokens, vocab]
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Element type of the KV cache
    #[arg(long, value_enum, default_value = "f32")]
    kv: CacheType,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Runs the tokens through the model and writes every row of logits.
pub fn run(args: LogitsArgs) -> Result<()> {
    on_device!(&args.device, |backend| run_on(backend, args))
}

fn run_on<B: Backend>(backend: Arc<B>, args: LogitsArgs) -> Result<()> {
    let dir = bundled::model_dir(args.model.as_deref())?;
    let context = Some(args.tokens.len());
    let mut session = Session::open_with(backend, &dir, context, DType::from(args.kv))?;
    let vocab = session.model().config().vocab_size;
    if let Some(id) = args.tokens.iter().find(|&&id| id as usize >= vocab) {
        bail!("--tokens: {id} is outside the vocabulary of {vocab}");
    }
    let logits = session.all_logits(&args.tokens)?;
    let bytes: Vec<u8> = logits.iter().flat_map(|v| v.to_le_bytes()).collect();
    let view = TensorView::new(safetensors::Dtype::F32, vec![args.tokens.len(), vocab], &bytes)?;
    let file = safetensors::serialize([("logits", view)], None)?;
    write_whole(&args.output, &file).with_context(|| format!("{}", args.output.display()))
}

/// Writes the file, and removes what was written of it when that fails (the disk is full).
fn write_whole(path: &Path, contents: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    let written = file.write_all(contents);
    if written.is_err() && file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        std::fs::remove_file(path)?;
    }
    written
}

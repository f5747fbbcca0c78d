//! `marlin bench`: tokens per second of prefill and decode, and peak memory.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use marlin_formats::DType;
use marlin_ops::Device;
use serde_json::json;

use crate::args::{CacheType, DeviceArgs, at_least_one};
use crate::session::{Session, tokens_per_second};
use crate::{bundled, device, usage};

/// Arguments of `marlin bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// Model folder [default: the bundled story model]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,
    /// Tokens of the prefill
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = at_least_one)]
    prompt_tokens: usize,
    /// Tokens decoded one at a time after it
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_one)]
    gen_tokens: usize,
    /// Sequences at once; only 1 today
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    batch: usize,
    /// Element type of the KV cache
    #[arg(long, value_enum, default_value = "f16")]
    kv: CacheType,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Times one prefill and one decode after a short warm-up.
pub fn run(args: BenchArgs) -> Result<()> {
    if args.batch != 1 {
        bail!("--batch {}: only one sequence at a time is supported", args.batch);
    }
    let backend = device::open(&args.device)?;
    let dir = bundled::model_dir(args.model.as_deref())?;
    let start = Instant::now();
    let context = Some(args.prompt_tokens + args.gen_tokens);
    let mut session = Session::open_with(backend.clone(), &dir, context, DType::from(args.kv))?;
    let load_time = start.elapsed();

    // Any ids do: speed does not depend on the text, expert choice aside.
    let vocab = session.model().config().vocab_size as u32;
    let id = |i: usize| (i as u32).wrapping_mul(2_654_435_761) % vocab;
    let prompt: Vec<u32> = (0..args.prompt_tokens).map(id).collect();
    session.feed(&prompt[..prompt.len().min(8)])?;
    session.feed(&prompt[..1])?;
    session.truncate(0);

    let start = Instant::now();
    session.feed(&prompt)?;
    let prefill_time = start.elapsed();
    let start = Instant::now();
    for i in 0..args.gen_tokens {
        session.feed(&[id(args.prompt_tokens + i)])?;
    }
    let decode_time = start.elapsed();

    let prefill = tokens_per_second(args.prompt_tokens, prefill_time);
    let decode = tokens_per_second(args.gen_tokens, decode_time);
    let weights_bytes = session.model().size_in_bytes();
    let peak = usage::peak_rss_bytes();
    if args.json {
        let result = json!({
            "model": dir.display().to_string(),
            "device": backend.name(),
            "prompt_tokens": args.prompt_tokens,
            "gen_tokens": args.gen_tokens,
            "batch": args.batch,
            "prefill_tokens_per_s": prefill,
            "decode_tokens_per_s": decode,
            "load_s": load_time.as_secs_f64(),
            "peak_rss_bytes": peak,
            "weights_bytes": weights_bytes,
            "kv_cache_bytes": session.cache_bytes(),
            "exact": args.device.exact,
        });
        print_line!("{result}");
        return Ok(());
    }
    let mib = |bytes: f64| bytes / (1024.0 * 1024.0);
    print_line!("model    {} on {}", dir.display(), backend.name());
    print_line!("load     {:.2} s", load_time.as_secs_f64());
    print_line!("prefill  {prefill:.1} tokens/s ({} tokens)", args.prompt_tokens);
    print_line!("decode   {decode:.1} tokens/s ({} tokens)", args.gen_tokens);
    print_line!(
        "memory   {:.1} MiB weights, {:.1} MiB cache, {} peak",
        mib(weights_bytes as f64),
        mib(session.cache_bytes() as f64),
        peak.map_or("unknown".into(), |bytes| format!("{:.1} MiB", mib(bytes as f64))),
    );
    Ok(())
}

//! `marlin bench`: tokens per second of prefill and decode, bytes read per token, and peak memory.

#[cfg(feature = "gpu")]
mod gpu;
mod interleaved;
mod profile;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use marlin_cpu::{Cpu, Pages};
use marlin_formats::DType;
use marlin_ops::profile::{Profiler, Roofline};
use marlin_ops::{Backend, Device};
use serde_json::json;

use self::interleaved::{Interleaved, Turn};
use self::profile::{PhaseProfile, bytes_read};
use crate::args::{CacheType, DeviceArgs, at_least_one};
use crate::device::{self, Opened};
use crate::session::{Session, tokens_per_second};
use crate::{bundled, usage};

/// Arguments of `marlin bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// Model folder or GGUF file [default: the bundled story model]
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
    /// Run everything once more and show the time, bytes and FLOPs of each operation; on the CPU only
    #[arg(long)]
    profile: bool,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// The same prefill and decode as often as asked for.
struct Workload<B: Backend> {
    backend: Arc<B>,
    session: Session<B>,
    prompt: Vec<u32>,
    /// Decoded one at a time.
    continuation: Vec<u32>,
}

impl<B: Backend> Workload<B> {
    /// Any ids do: speed does not depend on the text, expert choice aside.
    fn new(backend: Arc<B>, session: Session<B>, args: &BenchArgs) -> Self {
        let vocab = session.model().config().vocab_size as u32;
        let id = |i: usize| (i as u32).wrapping_mul(2_654_435_761) % vocab;
        let prompt = (0..args.prompt_tokens).map(id).collect();
        let continuation = (args.prompt_tokens..args.prompt_tokens + args.gen_tokens).map(id).collect();
        Self { backend, session, prompt, continuation }
    }

    /// A short prompt and one token.
    fn warm_up(&mut self) -> Result<()> {
        self.session.feed(&self.prompt[..self.prompt.len().min(8)])?;
        self.session.feed(&self.prompt[..1])
    }

    /// The time of the prompt in an empty context.
    fn prefill(&mut self) -> Result<Duration> {
        self.session.truncate(0);
        let start = Instant::now();
        self.session.feed(&self.prompt)?;
        Ok(start.elapsed())
    }

    /// The time of the tokens after the prompt.
    fn decode(&mut self) -> Result<Duration> {
        self.decode_some(0..self.continuation.len())
    }

    /// The time of some of them; the cache must hold those before.
    fn decode_some(&mut self, tokens: Range<usize>) -> Result<Duration> {
        self.session.truncate(self.prompt.len() + tokens.start);
        let start = Instant::now();
        for token in &self.continuation[tokens] {
            self.session.feed(std::slice::from_ref(token))?;
        }
        Ok(start.elapsed())
    }

    fn profiler(&self) -> Result<&Profiler> {
        let profiler = self.backend.profiler();
        profiler.with_context(|| format!("{} keeps no record of its operations", self.backend.name()))
    }

    /// Bytes of weights and KV cache that a token of [`Workload::decode`], which must have run, reads: the mean of the
    /// first and the last one, since the cache grows by the same amount with each.
    fn bytes_per_token(&mut self) -> Result<f64> {
        let mut total = 0;
        for i in [self.continuation.len() - 1, 0] {
            self.session.truncate(self.prompt.len() + i);
            self.profiler()?.start();
            self.session.feed(&self.continuation[i..=i])?;
            total += bytes_read(&self.profiler()?.take());
        }
        Ok(total as f64 / 2.0)
    }

    /// Both phases on record.
    fn profile(&mut self) -> Result<[PhaseProfile; 2]> {
        self.profiler()?.start();
        let time = self.prefill()?;
        let records = self.profiler()?.take();
        let prefill = PhaseProfile::new("prefill", self.prompt.len(), time, records);
        self.profiler()?.start();
        let time = self.decode()?;
        let records = self.profiler()?.take();
        Ok([prefill, PhaseProfile::new("decode", self.continuation.len(), time, records)])
    }
}

impl Workload<Cpu> {
    /// [`Workload::decode`] once more, in turn with plain reads.
    fn decode_and_read(&mut self, bytes_per_token: f64) -> Result<Interleaved> {
        let backend = self.backend.clone();
        let (turn, total) = (Turn::new(bytes_per_token), self.continuation.len());
        let rounds = total.div_ceil(turn.tokens);
        let reads = [backend.plain_reads(Pages::Huge)?, backend.plain_reads(Pages::Small)?];
        Interleaved::measure(turn, rounds, bytes_per_token, &reads, |round| {
            let start = round * turn.tokens;
            let tokens = start..total.min(start + turn.tokens);
            Ok((tokens.len(), self.decode_some(tokens)?))
        })
    }
}

/// What a run measured.
struct Report {
    model: String,
    device: &'static str,
    load_time: Duration,
    prefill_tokens_per_s: f64,
    decode_tokens_per_s: f64,
    weights_bytes: usize,
    kv_cache_bytes: usize,
    peak_rss_bytes: Option<u64>,
    bytes_per_token: f64,
    interleaved: Interleaved,
    roofline: Roofline,
    profile: Option<[PhaseProfile; 2]>,
}

/// Times one prefill and one decode after a short warm-up.
pub fn run(args: BenchArgs) -> Result<()> {
    if args.batch != 1 {
        bail!("--batch {}: only one sequence at a time is supported", args.batch);
    }
    match device::open(&args.device)? {
        Opened::Cpu(backend) => {
            let report = measure(backend, &args)?;
            if args.json { report.print_json(&args) } else { report.print(&args) }
        }
        #[cfg(all(feature = "gpu", target_os = "macos"))]
        Opened::Metal(backend) => gpu::run(backend, &args),
        #[cfg(feature = "cuda")]
        Opened::Cuda(backend) => gpu::run(backend, &args),
        #[cfg(all(feature = "gpu", not(target_os = "macos")))]
        Opened::Vulkan(backend) => gpu::run(backend, &args),
    }
}

fn measure(backend: Arc<Cpu>, args: &BenchArgs) -> Result<Report> {
    let dir = bundled::model_dir(args.model.as_deref())?;
    let start = Instant::now();
    let context = Some(args.prompt_tokens + args.gen_tokens);
    let session = Session::open_with(backend.clone(), &dir, context, DType::from(args.kv))?;
    let load_time = start.elapsed();

    let mut workload = Workload::new(backend.clone(), session, args);
    workload.warm_up()?;
    let (prefill_time, decode_time) = (workload.prefill()?, workload.decode()?);
    // What follows takes memory of its own.
    let peak_rss_bytes = usage::peak_rss_bytes();
    let bytes_per_token = workload.bytes_per_token()?;
    let interleaved = workload.decode_and_read(bytes_per_token)?;
    let profile = if args.profile { Some(workload.profile()?) } else { None };
    let (weights_bytes, kv_cache_bytes) = (workload.session.model().size_in_bytes(), workload.session.cache_bytes());
    drop(workload);
    Ok(Report {
        model: dir.display().to_string(),
        device: backend.name(),
        load_time,
        prefill_tokens_per_s: tokens_per_second(args.prompt_tokens, prefill_time),
        decode_tokens_per_s: tokens_per_second(args.gen_tokens, decode_time),
        weights_bytes,
        kv_cache_bytes,
        peak_rss_bytes,
        bytes_per_token,
        interleaved,
        roofline: backend.roofline()?,
        profile,
    })
}

impl Report {
    /// Bytes of weights and KV cache read per second of the decode.
    fn achieved_bytes_per_s(&self) -> f64 {
        self.bytes_per_token * self.decode_tokens_per_s
    }

    fn print_json(&self, args: &BenchArgs) -> Result<()> {
        let mut result = json!({
            "model": self.model,
            "device": self.device,
            "prompt_tokens": args.prompt_tokens,
            "gen_tokens": args.gen_tokens,
            "batch": args.batch,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            "decode_tokens_per_s": self.decode_tokens_per_s,
            "bytes_per_token": self.bytes_per_token,
            "achieved_bytes_per_s": self.achieved_bytes_per_s(),
            "read_bandwidth_bytes_per_s": self.roofline.read_bytes_per_s,
            "share_of_plain_reads": self.interleaved.to_json(),
            "load_s": self.load_time.as_secs_f64(),
            "peak_rss_bytes": self.peak_rss_bytes,
            "weights_bytes": self.weights_bytes,
            "kv_cache_bytes": self.kv_cache_bytes,
            "exact": args.device.exact,
        });
        if let Some(phases) = &self.profile {
            result["profile"] = profile::to_json(phases, &self.roofline);
        }
        print_line!("{result}");
        Ok(())
    }

    fn print(&self, args: &BenchArgs) -> Result<()> {
        let mib = |bytes: f64| bytes / (1024.0 * 1024.0);
        print_line!("model    {} on {}", self.model, self.device);
        print_line!("load     {:.2} s", self.load_time.as_secs_f64());
        print_line!("prefill  {:.1} tokens/s ({} tokens)", self.prefill_tokens_per_s, args.prompt_tokens);
        print_line!("decode   {:.1} tokens/s ({} tokens)", self.decode_tokens_per_s, args.gen_tokens);
        print_line!(
            "reads    {:.1} MB per decoded token, {:.1} GB/s; plain reads at best {:.1} GB/s afterwards",
            self.bytes_per_token / 1e6,
            self.achieved_bytes_per_s() / 1e9,
            self.roofline.read_bytes_per_s / 1e9,
        );
        self.interleaved.print()?;
        print_line!(
            "memory   {:.1} MiB weights, {:.1} MiB cache, {} peak",
            mib(self.weights_bytes as f64),
            mib(self.kv_cache_bytes as f64),
            self.peak_rss_bytes.map_or("unknown".into(), |bytes| format!("{:.1} MiB", mib(bytes as f64))),
        );
        match &self.profile {
            Some(phases) => profile::print(phases, &self.roofline),
            None => Ok(()),
        }
    }
}

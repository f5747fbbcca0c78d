//! `marlin bench` on a GPU: tokens are read back one at a time, as in generation, and launches have a price of their own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use marlin_formats::DType;
use marlin_gpu::{Measured, Traffic};
use serde_json::{Value, json};

use super::{BenchArgs, Workload};
use crate::session::{Session, tokens_per_second};
use crate::{bundled, usage};

/// Decodes of the continuation; the median counts.
const DECODES: usize = 3;

/// A decode of the whole continuation.
struct Decode {
    /// Whether the step was recorded and replayed.
    graphs: bool,
    tokens: usize,
    time: Duration,
    /// Of the whole decode.
    traffic: Traffic,
}

impl Decode {
    fn per_token(&self, count: u64) -> f64 {
        count as f64 / self.tokens as f64
    }

    /// Everything that a token takes, over the kernels that it takes.
    fn microseconds_per_launch(&self) -> f64 {
        1e6 * self.time.as_secs_f64() / self.traffic.launches as f64
    }

    fn to_json(&self) -> Value {
        json!({
            "graphs": self.graphs,
            "tokens_per_s": tokens_per_second(self.tokens, self.time),
            "launches_per_token": self.per_token(self.traffic.launches),
            "microseconds_per_launch": self.microseconds_per_launch(),
            "replays": self.traffic.replays,
            "writes_per_token": self.per_token(self.traffic.writes),
            "written_bytes_per_token": self.per_token(self.traffic.written_bytes),
            "reads_per_token": self.per_token(self.traffic.reads),
            "read_bytes_per_token": self.per_token(self.traffic.read_bytes),
        })
    }

    fn print(&self) -> Result<()> {
        print_line!(
            "decode   {:.1} tokens/s {} graphs: {:.1} launches per token, {:.2} us each with all that is around them",
            tokens_per_second(self.tokens, self.time),
            if self.graphs { "with" } else { "without" },
            self.per_token(self.traffic.launches),
            self.microseconds_per_launch(),
        );
        Ok(())
    }
}

/// What a run measured.
struct Report {
    model: String,
    device: &'static str,
    load_time: Duration,
    prefill_time: Duration,
    /// The usual way first.
    decodes: Vec<Decode>,
    bytes_per_token: f64,
    copy_bytes_per_s: f64,
    weights_bytes: usize,
    kv_cache_bytes: usize,
    peak_rss_bytes: Option<u64>,
}

impl<B: Measured> Workload<B> {
    /// The time of the prompt, waiting for the device.
    fn prefill_and_wait(&mut self) -> Result<Duration> {
        let start = Instant::now();
        self.prefill()?;
        self.backend.synchronize()?;
        Ok(start.elapsed())
    }

    /// The continuation after the prompt, each token followed by a choice that is read back.
    fn decode_and_choose(&mut self, graphs: bool) -> Result<Decode> {
        self.session.truncate(self.prompt.len());
        self.backend.synchronize()?;
        let before = self.backend.traffic();
        let start = Instant::now();
        for token in &self.continuation {
            self.session.feed(std::slice::from_ref(token))?;
            self.session.choose_likeliest()?;
        }
        let time = start.elapsed();
        let traffic = self.backend.traffic().since(&before);
        Ok(Decode { graphs, tokens: self.continuation.len(), time, traffic })
    }

    /// The median of some decodes, after one that compiles kernels and records steps.
    fn median_decode(&mut self, graphs: bool) -> Result<Decode> {
        self.decode_and_choose(graphs)?;
        let mut decodes = (0..DECODES).map(|_| self.decode_and_choose(graphs)).collect::<Result<Vec<_>>>()?;
        decodes.sort_by_key(|decode| decode.time);
        Ok(decodes.swap_remove(DECODES / 2))
    }
}

/// Times prefill and decode.
pub fn run<B: Measured>(backend: Arc<B>, args: &BenchArgs) -> Result<()> {
    if args.profile {
        bail!("--profile measures the CPU: use it with --device cpu");
    }
    let report = measure(backend, args)?;
    if args.json { report.print_json(args) } else { report.print(args) }
}

fn measure<B: Measured>(backend: Arc<B>, args: &BenchArgs) -> Result<Report> {
    let dir = bundled::model_dir(args.model.as_deref())?;
    let start = Instant::now();
    let context = Some(args.prompt_tokens + args.gen_tokens);
    let session = Session::open_with(backend.clone(), &dir, context, DType::from(args.kv))?;
    let load_time = start.elapsed();

    let mut workload = Workload::new(backend.clone(), session, args);
    // Kernels compile when they first run.
    workload.prefill_and_wait()?;
    let prefill_time = workload.prefill_and_wait()?;
    let mut decodes = Vec::new();
    if backend.use_graphs(true) {
        decodes.push(workload.median_decode(true)?);
    }
    backend.use_graphs(false);
    decodes.push(workload.median_decode(false)?);
    let peak_rss_bytes = usage::peak_rss_bytes();
    let bytes_per_token = workload.bytes_per_token()?;
    let (weights_bytes, kv_cache_bytes) = (workload.session.model().size_in_bytes(), workload.session.cache_bytes());
    drop(workload);
    Ok(Report {
        model: dir.display().to_string(),
        device: backend.name(),
        load_time,
        prefill_time,
        decodes,
        bytes_per_token,
        copy_bytes_per_s: backend.copy_bytes_per_s()?,
        weights_bytes,
        kv_cache_bytes,
        peak_rss_bytes,
    })
}

impl Report {
    /// Bytes of weights and KV cache read per second of the decode.
    fn achieved_bytes_per_s(&self) -> f64 {
        let usual = &self.decodes[0];
        self.bytes_per_token * tokens_per_second(usual.tokens, usual.time)
    }

    fn print_json(&self, args: &BenchArgs) -> Result<()> {
        let usual = &self.decodes[0];
        let result = json!({
            "model": self.model,
            "device": self.device,
            "prompt_tokens": args.prompt_tokens,
            "gen_tokens": args.gen_tokens,
            "batch": args.batch,
            "prefill_tokens_per_s": tokens_per_second(args.prompt_tokens, self.prefill_time),
            "decode_tokens_per_s": tokens_per_second(usual.tokens, usual.time),
            "decodes": self.decodes.iter().map(Decode::to_json).collect::<Vec<_>>(),
            "bytes_per_token": self.bytes_per_token,
            "achieved_bytes_per_s": self.achieved_bytes_per_s(),
            "copy_bandwidth_bytes_per_s": self.copy_bytes_per_s,
            "load_s": self.load_time.as_secs_f64(),
            "peak_rss_bytes": self.peak_rss_bytes,
            "weights_bytes": self.weights_bytes,
            "kv_cache_bytes": self.kv_cache_bytes,
        });
        print_line!("{result}");
        Ok(())
    }

    fn print(&self, args: &BenchArgs) -> Result<()> {
        let mib = |bytes: f64| bytes / (1024.0 * 1024.0);
        print_line!("model    {} on {}", self.model, self.device);
        print_line!("load     {:.2} s", self.load_time.as_secs_f64());
        let prefill = tokens_per_second(args.prompt_tokens, self.prefill_time);
        print_line!("prefill  {prefill:.1} tokens/s ({} tokens)", args.prompt_tokens);
        self.decodes.iter().try_for_each(Decode::print)?;
        let usual = &self.decodes[0];
        print_line!(
            "copies   {:.1} writes of {:.0} bytes and {:.1} reads of {:.0} bytes per token, between host and device",
            usual.per_token(usual.traffic.writes),
            usual.per_token(usual.traffic.written_bytes),
            usual.per_token(usual.traffic.reads),
            usual.per_token(usual.traffic.read_bytes),
        );
        print_line!(
            "reads    {:.1} MB per decoded token, {:.1} GB/s; plain copies read and write {:.1} GB/s",
            self.bytes_per_token / 1e6,
            self.achieved_bytes_per_s() / 1e9,
            self.copy_bytes_per_s / 1e9,
        );
        print_line!(
            "memory   {:.1} MiB weights, {:.1} MiB cache, {} peak on the host",
            mib(self.weights_bytes as f64),
            mib(self.kv_cache_bytes as f64),
            self.peak_rss_bytes.map_or("unknown".into(), |bytes| format!("{:.1} MiB", mib(bytes as f64))),
        );
        Ok(())
    }
}

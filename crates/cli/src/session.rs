//! One conversation with one model: prefill, decode, choose the next token.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use marlin_formats::DType;
use marlin_models::{Checkpoint, GenerationConfig, KvCache, LoadOptions, Logits, Model, ModelConfig, Scratch};
use marlin_ops::sampling::{LogitsProcess, LogitsProcessArgs, SampleArgs, SampleFilter};
use marlin_ops::{Backend, Tensor};

use crate::args::{ModelArgs, SamplingArgs};

/// Temperature when neither the command line nor the model names one.
const DEFAULT_TEMPERATURE: f32 = 0.7;

/// Rows whose logits are computed at once when all are wanted: a vocabulary of 150,000 takes 600 KB a row.
const LOGIT_ROWS: usize = 32;

/// A loaded model with its cache and planned memory.
pub struct Session<B: Backend> {
    backend: Arc<B>,
    model: Model<B>,
    cache: KvCache<B>,
    scratch: Scratch<B>,
    /// `[1, V]`: the logits that the next token is chosen from.
    row: Tensor<B>,
    /// `[1]`: the chosen id.
    id: Tensor<B>,
}

/// How tokens are chosen and when to stop.
pub struct Sampler {
    /// None for greedy.
    process: Option<LogitsProcess>,
    greedy_penalties: Option<LogitsProcess>,
    filter: SampleFilter,
    /// Key of the random draws.
    pub seed: u64,
    max_tokens: usize,
    eos: Vec<u32>,
}

impl Sampler {
    /// Combines the command line with the model's generation_config.json.
    pub fn new(args: &SamplingArgs, defaults: &GenerationConfig, eos: Vec<u32>) -> Self {
        let wished = match defaults.do_sample {
            Some(false) => Some(0.0),
            _ => defaults.temperature,
        };
        let temperature = args.temperature.or(wished).unwrap_or(DEFAULT_TEMPERATURE);
        let seed = args.seed.unwrap_or_else(clock_seed);
        let mut filter = args.filter();
        filter.top_k = filter.top_k.or(defaults.top_k.filter(|&k| k > 0));
        filter.top_p = filter.top_p.or(defaults.top_p);
        filter.min_p = filter.min_p.or(defaults.min_p);
        let unscaled = args.process(1.0);
        Self {
            process: (temperature > 0.0).then(|| args.process(temperature)),
            greedy_penalties: (unscaled != LogitsProcess::default()).then_some(unscaled),
            filter,
            seed,
            max_tokens: args.max_tokens,
            eos,
        }
    }
}

/// A seed that differs from run to run; it is shown, so that a run can be repeated.
fn clock_seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    u64::from(now.map_or(0, |d| d.subsec_nanos() ^ d.as_secs() as u32))
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-text token.
    Stop,
    /// The token limit or the end of the context.
    Length,
}

impl FinishReason {
    /// The name used by the OpenAI API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What a generation did.
pub struct Generation {
    /// Generated ids, without the end-of-text token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens processed by the prefill.
    pub prefill_tokens: usize,
    /// Time of the prefill.
    pub prefill_time: Duration,
    /// Tokens processed one at a time.
    pub decode_tokens: usize,
    /// Time of those, choosing included.
    pub decode_time: Duration,
}

/// `tokens / time`, or 0 when nothing ran.
pub fn tokens_per_second(tokens: usize, time: Duration) -> f64 {
    if tokens == 0 { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}

impl<B: Backend> Session<B> {
    /// Loads the model in `dir`.
    pub fn open(backend: Arc<B>, dir: &Path, args: &ModelArgs) -> Result<Self> {
        Self::open_with(backend, dir, args.context, args.kv.into())
    }

    /// Loads the model in `dir` for a context of `context` tokens.
    pub fn open_with(backend: Arc<B>, dir: &Path, context: Option<usize>, cache_dtype: DType) -> Result<Self> {
        let config = ModelConfig::from_dir(dir)?;
        let checkpoint = Checkpoint::open(dir)?;
        let options = LoadOptions { context, cache_dtype, ..LoadOptions::default() };
        let model = Model::load(backend.clone(), &checkpoint, config, options)?;
        checkpoint.take_warnings().iter().for_each(|warning| eprintln!("warning: {warning}"));
        let cache = KvCache::new(&model, model.context())?;
        let scratch = model.scratch(LOGIT_ROWS.min(model.chunk()))?;
        let row = backend.zeros(DType::F32, &[1, model.config().vocab_size])?;
        let id = backend.zeros(DType::U32, &[1])?;
        Ok(Self { backend, model, cache, scratch, row, id })
    }

    /// The model.
    pub fn model(&self) -> &Model<B> {
        &self.model
    }

    /// Tokens in the cache.
    pub fn cached(&self) -> usize {
        self.cache.len()
    }

    /// Allocated size of the cache.
    pub fn cache_bytes(&self) -> usize {
        self.cache.size_in_bytes()
    }

    /// Forgets all but the first `tokens` tokens.
    pub fn truncate(&mut self, tokens: usize) {
        self.cache.truncate(tokens);
    }

    /// Processes `tokens` and leaves the logits of the last one to choose from.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        let logits = self.model.forward(tokens, &mut self.cache, &mut self.scratch, Logits::Last)?;
        self.backend.copy_rows(logits, 0, 1, &mut self.row)?;
        Ok(())
    }

    /// Chooses the next token. `step` counts the tokens generated before it.
    pub fn choose(&mut self, sampler: &Sampler, prompt: &[u32], generated: &[u32]) -> Result<u32> {
        let process = sampler.process.as_ref().or(sampler.greedy_penalties.as_ref());
        if let Some(process) = process {
            let logits = &mut self.row;
            self.backend.process_logits(LogitsProcessArgs { logits, prompt, generated, process })?;
        }
        if sampler.process.is_some() {
            self.backend.sample(SampleArgs {
                logits: &self.row,
                filter: &sampler.filter,
                seed: sampler.seed,
                rows: &[0],
                steps: &[generated.len() as u32],
                ids: &mut self.id,
            })?;
            self.chosen()
        } else {
            self.choose_likeliest()
        }
    }

    /// Chooses the most likely token.
    pub fn choose_likeliest(&mut self) -> Result<u32> {
        self.backend.argmax(&self.row, &mut self.id)?;
        self.chosen()
    }

    fn chosen(&self) -> Result<u32> {
        match self.backend.read_u32(&self.id)?[..] {
            [id] => Ok(id),
            _ => bail!("the sampler returned no token"),
        }
    }

    /// An error unless the prompt fits the context and the vocabulary.
    pub fn check_prompt(&self, prompt: &[u32]) -> Result<()> {
        let (context, limit) = (self.model.context(), self.model.config().max_position_embeddings);
        if prompt.len() > context {
            let hint = if context < limit { format!("; --context permits up to {limit}") } else { String::new() };
            bail!("the prompt has {} tokens, the context holds {context}{hint}", prompt.len());
        }
        let vocab = self.model.config().vocab_size;
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= vocab) {
            bail!(
                "token {id} of the prompt is outside the model's vocabulary of {vocab}: tokenizer.json is of another model"
            );
        }
        Ok(())
    }

    /// Continues `prompt`, of which the first `self.cached()` tokens are in the cache already. `on_token` sees each
    /// token as it is chosen.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        sampler: &Sampler,
        mut on_token: impl FnMut(u32) -> Result<()>,
    ) -> Result<Generation> {
        self.check_prompt(prompt)?;
        let context = self.model.context();
        let new = &prompt[self.cached()..];
        let start = Instant::now();
        self.feed(new)?;
        let prefill_time = start.elapsed();

        let start = Instant::now();
        let mut tokens = Vec::with_capacity(sampler.max_tokens.min(context));
        let mut decode_tokens = 0;
        let finish_reason = loop {
            let id = self.choose(sampler, prompt, &tokens)?;
            if sampler.eos.contains(&id) {
                break FinishReason::Stop;
            }
            tokens.push(id);
            on_token(id)?;
            if tokens.len() == sampler.max_tokens || self.cached() == context {
                break FinishReason::Length;
            }
            self.feed(&[id])?;
            decode_tokens += 1;
        };
        Ok(Generation {
            tokens,
            finish_reason,
            prefill_tokens: new.len(),
            prefill_time,
            decode_tokens,
            decode_time: start.elapsed(),
        })
    }

    /// Logits of every token of a fresh sequence, `[tokens, vocab]`.
    pub fn all_logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>> {
        self.cache.clear();
        Ok(self.model.logits(tokens, &mut self.cache, &mut self.scratch)?)
    }

    /// Calls `visit(i, logits)` for each token `i` of a fresh sequence but the last; the logits predict token `i + 1`.
    pub fn each_prediction(&mut self, tokens: &[u32], mut visit: impl FnMut(usize, &[f32])) -> Result<()> {
        self.cache.clear();
        let vocab = self.model.config().vocab_size;
        let mut finite = true;
        self.model.for_each_logits(tokens, &mut self.cache, &mut self.scratch, |first, logits| {
            let rows = self.backend.read_f32(logits)?;
            for (i, row) in (first..tokens.len() - 1).zip(rows.chunks_exact(vocab)) {
                // Tokens may be impossible, but nothing else.
                finite &= row.iter().all(|v| *v < f32::INFINITY);
                visit(i, row);
            }
            Ok(())
        })?;
        if !finite {
            bail!("the model's logits are not finite");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates() {
        assert_eq!(tokens_per_second(0, Duration::ZERO), 0.0);
        assert_eq!(tokens_per_second(10, Duration::from_secs(2)), 5.0);
    }
}

//! A decoder-only transformer on a backend: loading and the forward pass.

use std::sync::Arc;

use marlin_formats::DType;
use marlin_ops::linear::EmbeddingArgs;
use marlin_ops::norm::RmsNormArgs;
use marlin_ops::rope::RopeTable;
use marlin_ops::{Backend, Linear, Tensor};

use crate::cache::{KvCache, cache_mismatch, next_id};
use crate::checkpoint::Checkpoint;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::layers::{DecoderLayer, ExpertForm, Pass, project};
use crate::loader::Loader;
use crate::observe::Probe;
use crate::scratch::Scratch;

/// What [`Model::load`] plans for.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// Most tokens of a sequence (rope table, cache capacity); by default `max_position_embeddings`, but 4096 at most.
    pub context: Option<usize>,
    /// Most rows of one pass: longer prompts go through the layers in pieces of this many tokens.
    pub chunk: usize,
    /// F32, F16 or BF16: type of the values in a [`KvCache`].
    pub cache_dtype: DType,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { context: None, chunk: 512, cache_dtype: DType::F16 }
    }
}

/// Context when none is asked for and the model permits more.
const DEFAULT_CONTEXT: usize = 4096;

/// Which rows of a forward pass give logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// None: the result has 0 rows.
    None,
    /// The last token.
    Last,
    /// Every token, at most [`Scratch::logit_rows`].
    All,
}

/// A loaded model. Activations are f32. It holds no state of a sequence: that is the [`KvCache`].
pub struct Model<B: Backend> {
    backend: Arc<B>,
    /// Tells it from every other.
    id: u64,
    config: ModelConfig,
    embedding: Linear<B>,
    layers: Vec<DecoderLayer<B>>,
    norm: Tensor<B>,
    /// None: the embedding is the output head.
    lm_head: Option<Linear<B>>,
    rope: RopeTable<B>,
    context: usize,
    chunk: usize,
    cache_dtype: DType,
    size_in_bytes: usize,
}

impl<B: Backend> Model<B> {
    /// Prepares all weights of `checkpoint`, largest first, each released from the mapped file once repacked: peak
    /// memory is the prepared weights plus the largest tensor (or the experts of one layer).
    ///
    /// # Errors
    /// A missing, extra or misshapen tensor, or one with a NaN or infinity: names file and tensor. A context of 0 or
    /// beyond `max_position_embeddings`, a chunk of 0, a cache dtype that is no float.
    pub fn load(backend: Arc<B>, checkpoint: &Checkpoint, config: ModelConfig, options: LoadOptions) -> Result<Self> {
        let context = check_options(&options, config.max_position_embeddings)?;
        let mut loader = Loader::new(&*backend, checkpoint, &config);
        let embedding = loader.embedding()?;
        let lm_head = loader.lm_head()?;
        let layers = (0..config.num_layers)
            .map(|i| DecoderLayer::load(&mut loader, &config, i, ExpertForm::Stack))
            .collect::<Result<Vec<_>>>()?;
        let norm = loader.final_norm()?;
        config.check_no_extra_tensors(checkpoint)?;
        let size_in_bytes = loader.size_in_bytes();
        Ok(Self {
            embedding,
            layers,
            norm,
            lm_head,
            rope: RopeTable::new(&*backend, &config.rope, context)?,
            context,
            chunk: options.chunk.min(context),
            cache_dtype: options.cache_dtype,
            size_in_bytes,
            id: next_id(),
            backend,
            config,
        })
    }

    /// The device.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// The configuration it was loaded with.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Most tokens of a sequence.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Most rows of one pass.
    pub fn chunk(&self) -> usize {
        self.chunk
    }

    /// Type of the values in a [`KvCache`].
    pub fn cache_dtype(&self) -> DType {
        self.cache_dtype
    }

    /// Stored bytes of all weights: codes, scales, dense values.
    pub fn size_in_bytes(&self) -> usize {
        self.size_in_bytes
    }

    /// Working memory for forward passes that give logits for at most `logit_rows` rows at a time (1 for generation).
    ///
    /// # Errors
    /// `logit_rows` of 0 or beyond [`Model::chunk`]; the device's own (out of memory).
    pub fn scratch(&self, logit_rows: usize) -> Result<Scratch<B>> {
        Scratch::plan(self.backend(), &self.config, self.chunk, logit_rows)
    }

    /// Appends `tokens` to `cache` and returns the logits asked for, `[0, 1 or tokens, vocab]` f32. More tokens than
    /// [`Model::chunk`] are taken in pieces. Nothing is allocated on the device.
    ///
    /// # Errors
    /// No token, more than the cache has room for, an id outside the vocabulary; [`Logits::All`] for more rows than
    /// planned ([`Model::for_each_logits`] has no such limit). The cache is then as before.
    pub fn forward<'s>(
        &self,
        tokens: &[u32],
        cache: &mut KvCache<B>,
        scratch: &'s mut Scratch<B>,
        which: Logits,
    ) -> Result<&'s Tensor<B>> {
        if which == Logits::All && tokens.len() > scratch.logit_rows() {
            let planned = scratch.logit_rows();
            let reason = format!("of {} rows asked for, {planned} are planned", tokens.len());
            return Err(ModelError::request("logits", reason));
        }
        if let (&[token], Logits::Last | Logits::All) = (tokens, which) {
            self.decode(token, cache, scratch)?;
            return Ok(&scratch.logits);
        }
        self.append(tokens, cache, scratch, |start, scratch| {
            let rows = scratch.hidden.rows();
            let is_last_piece = start + rows == tokens.len();
            let (first, count) = match which {
                _ if !is_last_piece => return Ok(()),
                Logits::None => (rows, 0),
                Logits::Last => (rows - 1, 1),
                Logits::All => (0, rows),
            };
            self.head(scratch, first, count)
        })?;
        Ok(&scratch.logits)
    }

    /// Appends `tokens` to `cache` and hands the logits of all of them to `sink`, in order, [`Scratch::logit_rows`] at
    /// a time: `sink(index of the first token, [rows, vocab])`.
    ///
    /// # Errors
    /// As [`Model::forward`], and whatever `sink` raises. The cache is then as before.
    pub fn for_each_logits(
        &self,
        tokens: &[u32],
        cache: &mut KvCache<B>,
        scratch: &mut Scratch<B>,
        mut sink: impl FnMut(usize, &Tensor<B>) -> Result<()>,
    ) -> Result<()> {
        self.append(tokens, cache, scratch, |start, scratch| {
            let rows = scratch.hidden.rows();
            for first in (0..rows).step_by(scratch.logit_rows()) {
                let count = scratch.logit_rows().min(rows - first);
                self.head(scratch, first, count)?;
                sink(start + first, &scratch.logits)?;
            }
            Ok(())
        })
    }

    /// Appends `tokens` to `cache` and reads the logits of all of them, `[tokens, vocab]` row-major.
    ///
    /// # Errors
    /// As [`Model::forward`].
    pub fn logits(&self, tokens: &[u32], cache: &mut KvCache<B>, scratch: &mut Scratch<B>) -> Result<Vec<f32>> {
        let mut all = Vec::new();
        self.for_each_logits(tokens, cache, scratch, |_, logits| {
            all.extend(self.backend.read_f32(logits)?);
            Ok(())
        })?;
        Ok(all)
    }

    /// [`Model::forward`] of one token with its logits: the step that a device may record and repeat.
    fn decode(&self, token: u32, cache: &mut KvCache<B>, scratch: &mut Scratch<B>) -> Result<()> {
        self.check_append(1, cache)?;
        let position = cache.len();
        self.write_input(&[token], position, scratch)?;
        // A repeated step leaves shapes alone.
        scratch.logits.reshape(&[1, self.config.vocab_size])?;
        let key = [self.id, cache.id];
        let mut recording = scratch.recording.take().filter(|(of, _)| *of == key).map(|(_, recording)| recording);
        let outcome = self.backend.run_step(position, &mut recording, || {
            self.run_layers(position, 1, cache, scratch)?;
            self.head(scratch, 0, 1)
        });
        scratch.recording = recording.map(|recording| (key, recording));
        outcome?;
        cache.advance(1);
        Ok(())
    }

    /// An error unless `count` more tokens fit `cache`, which must be of this model.
    fn check_append(&self, count: usize, cache: &KvCache<B>) -> Result<()> {
        cache.check_room(count)?;
        if cache.layers.len() == self.layers.len() { Ok(()) } else { Err(cache_mismatch()) }
    }

    /// Runs the layers over `tokens` piece by piece; after each piece, whose first token has index `start` here,
    /// `then(start, scratch)` finds its residual stream in `scratch.hidden`. On failure the cache is as before.
    fn append(
        &self,
        tokens: &[u32],
        cache: &mut KvCache<B>,
        scratch: &mut Scratch<B>,
        mut then: impl FnMut(usize, &mut Scratch<B>) -> Result<()>,
    ) -> Result<()> {
        if tokens.is_empty() {
            return Err(ModelError::request("tokens", "are none: at least one is needed"));
        }
        self.check_append(tokens.len(), cache)?;
        let before = cache.len();
        let chunk = scratch.chunk();
        let mut pieces = tokens.chunks(chunk).enumerate();
        let outcome = pieces.try_for_each(|(i, piece)| {
            self.append_piece(piece, cache, scratch)?;
            then(i * chunk, scratch)
        });
        if outcome.is_err() {
            cache.truncate(before);
        }
        outcome
    }

    /// Embedding and all layers for at most `chunk` tokens.
    fn append_piece(&self, tokens: &[u32], cache: &mut KvCache<B>, scratch: &mut Scratch<B>) -> Result<()> {
        self.write_input(tokens, cache.len(), scratch)?;
        self.run_layers(cache.len(), tokens.len(), cache, scratch)?;
        cache.advance(tokens.len());
        Ok(())
    }

    /// Sends the ids and positions of the tokens from position `start` on.
    fn write_input(&self, tokens: &[u32], start: usize, scratch: &mut Scratch<B>) -> Result<()> {
        scratch.ids.reshape(&[tokens.len()])?;
        self.backend.write_u32(tokens, &mut scratch.ids)?;
        scratch.set_positions(self.backend(), start, tokens.len())
    }

    /// Embedding and all layers for `rows` tokens from position `start` on, which [`Model::write_input`] has sent.
    fn run_layers(&self, start: usize, rows: usize, cache: &mut KvCache<B>, scratch: &mut Scratch<B>) -> Result<()> {
        let backend = self.backend();
        scratch.hidden.reshape(&[rows, self.config.hidden_size])?;
        backend.embedding(EmbeddingArgs { ids: &scratch.ids, table: &self.embedding, out: &mut scratch.hidden })?;
        let pass = Pass { backend, rope: &self.rope, pairing: self.config.pairing, start, rows };
        for (layer, layer_cache) in self.layers.iter().zip(&mut cache.layers) {
            layer.forward(&pass, scratch, layer_cache, &mut Probe::none())?;
        }
        Ok(())
    }

    /// `scratch.logits` of `count` rows of the residual stream, from `first`.
    fn head(&self, scratch: &mut Scratch<B>, first: usize, count: usize) -> Result<()> {
        let dims = [count, self.config.hidden_size];
        scratch.head_hidden.reshape(&dims)?;
        scratch.head_normed.reshape(&dims)?;
        self.backend.copy_rows(&scratch.hidden, first, count, &mut scratch.head_hidden)?;
        self.backend.rms_norm(RmsNormArgs {
            x: &scratch.head_hidden,
            residual: None,
            gamma: Some(&self.norm),
            gamma_offset: 0.0,
            eps: self.config.rms_norm_eps,
            out: &mut scratch.head_normed,
        })?;
        let lm_head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        project(self.backend(), &scratch.head_normed, lm_head, &mut scratch.logits)
    }
}

/// The context to plan for.
fn check_options(options: &LoadOptions, longest: usize) -> Result<usize> {
    let context = options.context.unwrap_or(longest.min(DEFAULT_CONTEXT));
    if context == 0 || context > longest {
        let reason = format!("of {context} tokens asked for, the model permits 1..={longest}");
        return Err(ModelError::request("context", reason));
    }
    if options.chunk == 0 {
        return Err(ModelError::request("chunk", "is 0, must be at least 1"));
    }
    if !matches!(options.cache_dtype, DType::F32 | DType::F16 | DType::BF16) {
        let reason = format!("is {}, must be F32, F16 or BF16", options.cache_dtype.name());
        return Err(ModelError::request("cache dtype", reason));
    }
    Ok(context)
}

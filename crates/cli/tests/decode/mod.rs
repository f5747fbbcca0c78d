//! Decoding the bundled INT4 model on a GPU, token by token.

#![allow(dead_code)] // Each test binary uses its own part.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use marlin_formats::DType;
use marlin_gpu::{Measured, Traffic};
use marlin_models::{KvCache, Logits, Model, Scratch};
use marlin_ops::sampling::{LogitsProcess, LogitsProcessArgs, SampleArgs, SampleFilter};
use marlin_ops::{Backend, Tensor};

use crate::golden;

/// The model, below the working directory if it is there: a built test may run on another machine.
fn bundled() -> PathBuf {
    let near = Path::new("models/marlin-stories-int4");
    let far = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/marlin-stories-int4");
    if near.exists() { near.to_owned() } else { far }
}

/// A model between two tokens.
pub struct Decoding<B: Backend> {
    model: Model<B>,
    cache: KvCache<B>,
    scratch: Scratch<B>,
    row: Tensor<B>,
    id: Tensor<B>,
}

impl<B: Backend> Decoding<B> {
    /// After the prompt `1 2 3`, in an empty context of `capacity` tokens.
    pub fn new(backend: &Arc<B>, capacity: usize) -> Self {
        let model = golden::load(backend, &bundled(), 16);
        let mut cache = KvCache::new(&model, capacity).unwrap();
        let mut scratch = model.scratch(1).unwrap();
        model.forward(&[1, 2], &mut cache, &mut scratch, Logits::None).unwrap();
        let row = backend.zeros(DType::F32, &[1, model.config().vocab_size]).unwrap();
        let id = backend.zeros(DType::U32, &[1]).unwrap();
        Self { model, cache, scratch, row, id }
    }

    /// Feeds a token and keeps its logits on the device.
    fn feed(&mut self, token: u32) {
        let logits = self.model.forward(&[token], &mut self.cache, &mut self.scratch, Logits::Last).unwrap();
        self.model.backend().copy_rows(logits, 0, 1, &mut self.row).unwrap();
    }

    /// The most likely token after `token`.
    pub fn greedy(&mut self, token: u32) -> u32 {
        self.feed(token);
        self.model.backend().argmax(&self.row, &mut self.id).unwrap();
        self.model.backend().read_u32(&self.id).unwrap()[0]
    }

    /// A token drawn after `token`, the `step`-th of the text.
    pub fn sampled(&mut self, token: u32, step: u32) -> u32 {
        self.feed(token);
        let backend = self.model.backend();
        let (logits, process) = (&mut self.row, &LogitsProcess { temperature: 0.7, ..LogitsProcess::default() });
        backend.process_logits(LogitsProcessArgs { logits, prompt: &[1, 2, 3], generated: &[4; 9], process }).unwrap();
        let filter = &SampleFilter { top_k: Some(40), top_p: Some(0.9), ..SampleFilter::NONE };
        let (rows, steps, ids) = (&[0][..], &[step][..], &mut self.id);
        backend.sample(SampleArgs { logits: &self.row, filter, seed: 1, rows, steps, ids }).unwrap();
        backend.read_u32(&self.id).unwrap()[0]
    }

    /// Bits of the logits after `token`.
    pub fn logit_bits(&mut self, token: u32) -> Vec<u32> {
        self.feed(token);
        self.model.backend().read_f32(&self.row).unwrap().into_iter().map(f32::to_bits).collect()
    }
}

/// A token goes to the device with its position and its number of keys, and one comes back: nothing else travels.
pub fn one_small_read_a_token<B: Measured>(backend: &Arc<B>) {
    let mut decoding = Decoding::new(backend, 64);
    let mut token = decoding.greedy(3);
    for step in 0..24 {
        let is_greedy = step < 12;
        let before = backend.traffic();
        token = if is_greedy { decoding.greedy(token) } else { decoding.sampled(token, step) };
        let Traffic { launches, writes, written_bytes, reads, read_bytes, .. } = backend.traffic().since(&before);
        assert_eq!((reads, read_bytes), (1, 4), "token {step}");
        // A draw takes a random word besides.
        let words = if is_greedy { 4 } else { 5 };
        assert_eq!((writes, written_bytes), (words, 4 * words), "token {step}");
        assert!(launches > 20, "token {step}: {launches} launches");
    }
}

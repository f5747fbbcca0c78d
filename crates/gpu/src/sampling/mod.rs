//! Sampling: argmax, logits processing, filtered draws.

mod argmax;
mod bins;
mod draw;
mod order;
mod process;
mod softmax;
mod survivors;
mod wide;

use cubecl::prelude::*;
use marlin_ops::rng::{Stream, random_word};
use marlin_ops::sampling::{LogitsProcessArgs, SampleArgs};
use marlin_ops::{Result, SamplingOps, Tensor};

use crate::Gpu;

impl<R: Runtime> SamplingOps for Gpu<R> {
    fn run_argmax(&self, logits: &Tensor<Self>, ids: &mut Tensor<Self>) -> Result<()> {
        argmax::launch(self, logits, ids)
    }

    fn run_process_logits(&self, args: LogitsProcessArgs<'_, Self>) -> Result<()> {
        process::launch(self, args)
    }

    fn run_sample(&self, args: SampleArgs<'_, Self>) -> Result<()> {
        let word = |(&row, &step): (&u32, &u32)| random_word(args.seed, Stream::Categorical, row, step, 0);
        let words: Vec<u32> = args.rows.iter().zip(args.steps).map(word).collect();
        draw::launch(self, args.logits, args.filter, &words, args.ids)
    }
}

//! Sampling: argmax, logits processing, filtered draws.

mod argmax;
mod bins;
mod categorical;
mod draw;
mod gumbel;
mod order;
mod process;
mod softmax;
mod survivors;
mod wide;

use cubecl::prelude::*;
use marlin_ops::rng::{Stream, random_word};
use marlin_ops::sampling::{DrawArgs, LogitsProcessArgs, SampleArgs};
use marlin_ops::{Result, SamplingOps, Tensor};

use crate::Gpu;
use crate::fault::Fault;

impl<R: Runtime> SamplingOps for Gpu<R> {
    fn run_argmax(&self, logits: &Tensor<Self>, ids: &mut Tensor<Self>) -> Result<()> {
        argmax::launch(self, logits, ids, [Fault::ArgmaxLogit, Fault::ArgmaxEmpty])
    }

    fn run_process_logits(&self, args: LogitsProcessArgs<'_, Self>) -> Result<()> {
        process::launch(self, args)
    }

    fn run_sample(&self, args: SampleArgs<'_, Self>) -> Result<()> {
        let word = |(&row, &step): (&u32, &u32)| random_word(args.seed, Stream::Categorical, row, step, 0);
        let words: Vec<u32> = args.rows.iter().zip(args.steps).map(word).collect();
        draw::launch(self, args.logits, args.filter, &words, args.ids)
    }

    fn run_sample_categorical(&self, args: DrawArgs<'_, Self>) -> Result<()> {
        let word = |(&row, &step): (&u32, &u32)| random_word(args.seed, Stream::Categorical, row, step, 0);
        let words: Vec<u32> = args.rows.iter().zip(args.steps).map(word).collect();
        categorical::launch(self, &args, &words)
    }

    fn run_sample_gumbel(&self, args: DrawArgs<'_, Self>) -> Result<()> {
        gumbel::launch(self, args)
    }
}

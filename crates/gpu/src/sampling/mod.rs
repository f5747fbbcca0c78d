//! Sampling.

use cubecl::prelude::*;
use marlin_ops::sampling::{LogitsProcessArgs, SampleArgs};
use marlin_ops::{Result, SamplingOps, Tensor};

use crate::Gpu;

impl<R: Runtime> SamplingOps for Gpu<R> {
    fn run_argmax(&self, _logits: &Tensor<Self>, _ids: &mut Tensor<Self>) -> Result<()> {
        Err(self.unsupported("argmax"))
    }

    fn run_process_logits(&self, _args: LogitsProcessArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("process_logits"))
    }

    fn run_sample(&self, _args: SampleArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("sample"))
    }
}

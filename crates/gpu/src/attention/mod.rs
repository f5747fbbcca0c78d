//! Attention.

use cubecl::prelude::*;
use marlin_ops::attention::{AttentionArgs, KvWriteArgs, MlaAttentionArgs};
use marlin_ops::{AttentionOps, Result};

use crate::Gpu;

impl<R: Runtime> AttentionOps for Gpu<R> {
    fn run_attention(&self, _args: AttentionArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("attention"))
    }

    fn run_kv_write(&self, _args: KvWriteArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("kv_write"))
    }

    fn run_mla_prefill(&self, _args: MlaAttentionArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("mla_prefill"))
    }

    fn run_mla_decode(&self, _args: MlaAttentionArgs<'_, Self>) -> Result<()> {
        Err(self.unsupported("mla_decode"))
    }
}

//! Attention over contiguous caches, and multi-head latent attention.

mod attend;
mod flash;
mod join;
mod latent;
mod paged;
mod project;
mod reduce;
mod rotated;
mod rows;
mod tensor;
mod tile;
mod write;

use cubecl::prelude::*;
use marlin_ops::attention::{
    AttentionArgs, EmptyRow, KvWriteArgs, MlaAttentionArgs, PagedAttentionArgs, PagedWriteArgs, SplitReduceArgs, Window,
};
use marlin_ops::{AttentionOps, OpError, PagedAttentionOps, Result};

use crate::Gpu;
use attend::{Attend, Source};
pub(crate) use tensor::has_modes;
pub use tile::AttentionKernel;

/// Keys before or after every position.
const ALL_KEYS: i32 = 1 << 30;

/// Keys visible before and after a query's position.
fn visible(causal: bool, window: Window) -> (i32, i32) {
    let bounded = |keys: usize| i32::try_from(keys).unwrap_or(ALL_KEYS).min(ALL_KEYS);
    let (left, right) = match window {
        Window::None => (ALL_KEYS, ALL_KEYS),
        Window::Left(width) => (bounded(width - 1), 0),
        Window::Symmetric { left, right } => (bounded(left), bounded(right)),
    };
    (left, if causal { 0 } else { right })
}

impl<R: Runtime> Gpu<R> {
    /// [`AttentionOps::attention`] by a kernel of the caller's choice, for measurements and audits; arguments must be
    /// those that `attention` accepts.
    ///
    /// # Errors
    /// A value error naming `kernel` if this device has no such kernel.
    pub fn attention_with(&self, args: AttentionArgs<'_, Self>, kernel: AttentionKernel) -> Result<()> {
        const OP: &str = "attention";
        self.check_kernel(OP, kernel)?;
        self.attend(OP, args, Some(kernel))
    }

    /// [`PagedAttentionOps::paged_attention`] by a kernel of the caller's choice; see [`Gpu::attention_with`].
    ///
    /// # Errors
    /// A value error naming `kernel` if this device has no such kernel.
    pub fn paged_attention_with(&self, args: PagedAttentionArgs<'_, Self>, kernel: AttentionKernel) -> Result<()> {
        self.check_kernel("paged_attention", kernel)?;
        paged::attention(self, args, Some(kernel))
    }

    fn check_kernel(&self, operation: &'static str, kernel: AttentionKernel) -> Result<()> {
        let shared_memory = self.properties().hardware.max_shared_memory_size;
        kernel.defect(shared_memory).map_or(Ok(()), |defect| Err(OpError::value(operation, "kernel", defect)))
    }

    fn attend(
        &self,
        operation: &'static str,
        args: AttentionArgs<'_, Self>,
        kernel: Option<AttentionKernel>,
    ) -> Result<()> {
        let &[batch, queries, heads, head_dim] = args.q.dims() else {
            unreachable!("q was checked to have 4 dimensions")
        };
        let (kv_heads, capacity) = (args.k.dims()[1], args.k.dims()[2]);
        let value_dim = args.v.columns();
        let (left, right) = visible(args.causal, args.window);
        let attend = Attend {
            q: args.q,
            keys: Source::floats(args.k, head_dim, head_dim),
            values: Source::floats(args.v, value_dim, value_dim),
            kv_len: args.kv_len,
            batch,
            queries,
            heads,
            first_head: 0,
            kv_heads,
            group: heads / kv_heads,
            capacity,
            table: None,
            left,
            right,
            scale: args.scale,
            softcap: args.softcap,
            mask: args.mask,
            sinks: args.sinks,
            empty_is_error: args.empty_row == EmptyRow::Error,
            kernel,
            out: args.out,
        };
        attend.run(operation, self)
    }
}

impl<R: Runtime> AttentionOps for Gpu<R> {
    fn run_attention(&self, args: AttentionArgs<'_, Self>) -> Result<()> {
        self.attend("attention", args, None)
    }

    fn run_kv_write(&self, args: KvWriteArgs<'_, Self>) -> Result<()> {
        write::kv_write(self, args)
    }

    fn run_mla_prefill(&self, args: MlaAttentionArgs<'_, Self>) -> Result<()> {
        latent::prefill(self, args, None)
    }

    fn run_mla_decode(&self, args: MlaAttentionArgs<'_, Self>) -> Result<()> {
        latent::decode(self, args, None)
    }

    fn run_attention_split_reduce(&self, args: SplitReduceArgs<'_, Self>) -> Result<()> {
        reduce::launch(self, &args)
    }
}

impl<R: Runtime> PagedAttentionOps for Gpu<R> {
    fn run_paged_write(&self, args: PagedWriteArgs<'_, Self>) -> Result<()> {
        paged::write(self, args)
    }

    fn run_paged_attention(&self, args: PagedAttentionArgs<'_, Self>) -> Result<()> {
        paged::attention(self, args, None)
    }
}

//! Attention over contiguous caches, and multi-head latent attention.

mod flash;
mod mla;
mod paged;
mod reduce;
mod single_query;

use std::sync::atomic::{AtomicUsize, Ordering};

use marlin_ops::attention::{
    AttentionArgs, EmptyRow, KvWriteArgs, MlaAttentionArgs, SplitReduceArgs, Window, empty_row_error, visible_keys,
};
use marlin_ops::{AttentionOps, Result};

use self::flash::{CacheRows, Ending, Flash, MAX_ROWS, Query, padded};
use self::single_query::{MAX_HEADS, SingleQuery, is_key_width};
use crate::Cpu;
use crate::buffer::{Floats, FloatsMut, f32s, f32s_mut, optional_f32s};
use crate::simd::LANES;

/// Rows (queries times heads of a group) of one task.
const ROW_BLOCK: usize = 64;

/// The lowest row that saw no key.
struct EmptyRows(AtomicUsize);

impl EmptyRows {
    fn new() -> Self {
        Self(AtomicUsize::new(usize::MAX))
    }

    fn record(&self, row: usize) {
        self.0.fetch_min(row, Ordering::Relaxed);
    }

    /// The error for the first empty row of `[B, Sq, H]`.
    fn check(&self, queries: usize, heads: usize) -> Result<()> {
        match self.0.load(Ordering::Relaxed) {
            usize::MAX => Ok(()),
            row => {
                let (b, i, h) = (row / heads / queries, row / heads % queries, row % heads);
                Err(empty_row_error(b, h, i))
            }
        }
    }
}

/// Dimensions of one call and the tensors behind it.
struct Attention<'a> {
    q: &'a [f32],
    keys: Floats<'a>,
    values: Floats<'a>,
    mask: Option<(&'a [f32], [usize; 4])>,
    sinks: Option<&'a [f32]>,
    kv_len: &'a [usize],
    queries: usize,
    heads: usize,
    kv_heads: usize,
    capacity: usize,
    head_dim: usize,
    value_dim: usize,
    scale: f32,
    causal: bool,
    window: Window,
    softcap: Option<f32>,
}

impl<'a> Attention<'a> {
    /// Query heads that share a kv head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Queries of one task.
    fn block(&self) -> usize {
        (ROW_BLOCK / self.group()).max(1)
    }

    /// Tasks per (sequence, kv head).
    fn blocks(&self) -> usize {
        self.queries.div_ceil(self.block())
    }

    /// Multiplications at most, those of one query counted eightfold: they wait for the cache.
    fn work(&self) -> usize {
        let keys: usize = self.kv_len.iter().sum();
        keys * self.queries.max(8) * self.heads * (self.head_dim + self.value_dim)
    }

    /// Query `i` of head `h` in sequence `b`.
    fn query(&self, b: usize, h: usize, i: usize) -> Query<'a> {
        let kv_len = self.kv_len[b];
        // Fewer keys than queries only where positions do not matter: no causality, no window.
        let p = (i + kv_len).saturating_sub(self.queries);
        let (first, end) = visible_keys(p, kv_len, self.causal, self.window);
        let mask = self.mask.map(|(mask, [batch, heads, queries, keys])| {
            let b = if batch == 1 { 0 } else { b };
            let h = if heads == 1 { 0 } else { h };
            &mask[((b * heads + h) * queries + i) * keys..][..keys]
        });
        Query { first, end, mask, sink: self.sinks.map(|sinks| sinks[h]) }
    }

    /// Whether [`Attention::run_single`] applies.
    fn is_single(&self) -> bool {
        let whole_vectors = self.value_dim > 0 && self.value_dim.is_multiple_of(LANES);
        self.queries == 1 && self.group() <= MAX_HEADS && is_key_width(self.head_dim) && whole_vectors
    }

    /// Task `task` of `[B, Hkv]` with one query; `out` is `[group, value_dim]`. Threads take `stretch` tasks in a row.
    fn run_single(&self, cpu: &Cpu, task: usize, stretch: usize, out: &mut [f32], empty: &EmptyRows) {
        let (group, b) = (self.group(), task / self.kv_heads);
        let first_head = task % self.kv_heads * group;
        let mut heads = [Query::EMPTY; MAX_HEADS];
        for (g, head) in heads[..group].iter_mut().enumerate() {
            *head = self.query(b, first_head + g, 0);
        }
        let rows_of =
            |data: Floats<'a>, width| CacheRows { data, start: task * self.capacity * width, stride: width, width };
        let is_last = (task + 1).is_multiple_of(stretch) || task + 1 == self.kv_len.len() * self.kv_heads;
        let mut seen = [false; MAX_HEADS];
        cpu.level.run(SingleQuery {
            q: &self.q[task * group * self.head_dim..][..group * self.head_dim],
            heads: &heads[..group],
            keys: rows_of(self.keys, self.head_dim),
            values: rows_of(self.values, self.value_dim),
            scale: self.scale,
            softcap: self.softcap,
            is_cold: task.is_multiple_of(stretch),
            next_group: (!is_last).then_some(self.capacity),
            out,
            seen: &mut seen[..group],
        });
        for (g, seen) in seen[..group].iter().enumerate() {
            if !seen {
                empty.record(task * group + g);
            }
        }
    }

    /// Task `task` of `[B, Hkv, blocks]`; `out` is `[block, group, value_dim padded]`.
    fn run(&self, cpu: &Cpu, task: usize, out: &mut [f32], empty: &EmptyRows) {
        let (group, blocks) = (self.group(), self.blocks());
        let (b, kv_head) = (task / blocks / self.kv_heads, task / blocks % self.kv_heads);
        let first = task % blocks * self.block();
        let count = self.block().min(self.queries - first);
        let rows = count * group;
        let (width, value_width) = (padded(self.head_dim), padded(self.value_dim));
        let row_id = |r: usize| {
            let (i, h) = (first + r / group, kv_head * group + r % group);
            (i, h, (b * self.queries + i) * self.heads + h)
        };
        let mut q = cpu.workspace.floats.take(rows * width);
        for (r, row) in q.chunks_exact_mut(width).enumerate() {
            let source = &self.q[row_id(r).2 * self.head_dim..][..self.head_dim];
            row[..self.head_dim].copy_from_slice(source);
            row[self.head_dim..].fill(0.0);
        }
        let mut queries = [Query::EMPTY; MAX_ROWS];
        let mut seen = [false; MAX_ROWS];
        let scratch_len = Flash::scratch_len(width, value_width, MAX_ROWS.min(rows));
        let mut scratch = cpu.workspace.floats.take(scratch_len);
        let cache_row = (b * self.kv_heads + kv_head) * self.capacity;
        let rows_of =
            |data: Floats<'a>, dim: usize| CacheRows { data, start: cache_row * dim, stride: dim, width: dim };
        // More than MAX_ROWS only when a single query has so many heads in its group.
        for start in (0..rows).step_by(MAX_ROWS) {
            let part = start..rows.min(start + MAX_ROWS);
            let queries = &mut queries[..part.len()];
            for (query, r) in queries.iter_mut().zip(part.clone()) {
                let (i, h, _) = row_id(r);
                *query = self.query(b, h, i);
            }
            cpu.level.run(Flash {
                q: &q[part.start * width..part.end * width],
                queries,
                keys: &[rows_of(self.keys, self.head_dim)],
                values: rows_of(self.values, self.value_dim),
                scale: self.scale,
                softcap: self.softcap,
                scratch: &mut scratch,
                out: &mut out[part.start * value_width..part.end * value_width],
                ending: Ending::Divided { seen: &mut seen[..part.len()] },
            });
            for (seen, r) in seen.iter().zip(part) {
                if !seen {
                    empty.record(row_id(r).2);
                }
            }
        }
    }
}

impl Query<'_> {
    const EMPTY: Self = Self { first: 0, end: 0, mask: None, sink: None };
}

impl AttentionOps for Cpu {
    fn run_attention(&self, args: AttentionArgs<'_, Self>) -> Result<()> {
        const OP: &str = "attention";
        let (q, k) = (args.q.dims(), args.k.dims());
        let mask = match args.mask {
            Some(mask) => {
                let mut dims = [0; 4];
                dims.copy_from_slice(mask.dims());
                Some((f32s(OP, "mask", mask)?, dims))
            }
            None => None,
        };
        let call = Attention {
            q: f32s(OP, "q", args.q)?,
            keys: Floats::of(OP, "k", args.k)?,
            values: Floats::of(OP, "v", args.v)?,
            mask,
            sinks: optional_f32s(OP, "sinks", args.sinks)?,
            kv_len: args.kv_len,
            queries: q[1],
            heads: q[2],
            kv_heads: k[1],
            capacity: k[2],
            head_dim: q[3],
            value_dim: args.v.columns(),
            scale: args.scale,
            causal: args.causal,
            window: args.window,
            softcap: args.softcap,
        };
        let out = f32s_mut(OP, "out", args.out)?;
        let empty = EmptyRows::new();
        if call.is_single() {
            let stretch = (q[0] * call.kv_heads).div_ceil(self.threads());
            self.pool.for_chunks_of(call.work(), out, call.group() * call.value_dim, |task, out| {
                call.run_single(self, task, stretch, out, &empty);
            });
            return match args.empty_row {
                EmptyRow::Error => empty.check(call.queries, call.heads),
                EmptyRow::Zero => Ok(()),
            };
        }
        let width = padded(call.value_dim);
        let task_len = call.block() * call.group() * width;
        let tasks = q[0] * call.kv_heads * call.blocks();
        let mut blocks = self.workspace.floats.take(tasks * task_len);
        self.pool.for_chunks_of(call.work(), &mut blocks, task_len, |task, out| {
            call.run(self, task, out, &empty);
        });
        if args.empty_row == EmptyRow::Error {
            empty.check(call.queries, call.heads)?;
        }
        if call.value_dim == 0 {
            return Ok(());
        }
        self.for_rows(out, call.heads * call.value_dim, |row, out| {
            let (b, i) = (row / call.queries, row % call.queries);
            for (h, out) in out.chunks_exact_mut(call.value_dim).enumerate() {
                let (kv_head, g) = (h / call.group(), h % call.group());
                let task = (b * call.kv_heads + kv_head) * call.blocks() + i / call.block();
                let at = task * task_len + (i % call.block() * call.group() + g) * width;
                out.copy_from_slice(&blocks[at..at + call.value_dim]);
            }
        });
        Ok(())
    }

    fn run_kv_write(&self, args: KvWriteArgs<'_, Self>) -> Result<()> {
        const OP: &str = "kv_write";
        for (name, rows, cache) in [("k", args.k, args.k_cache), ("v", args.v, args.v_cache)] {
            let (heads, width) = (rows.dims()[1], rows.dims()[2]);
            let capacity = cache.dims()[2];
            let source = f32s(OP, name, rows)?;
            let mut cache = FloatsMut::of(OP, name, cache)?;
            for (i, row) in source.chunks_exact(width.max(1)).enumerate() {
                let (t, h) = (i / heads, i % heads);
                let slot = (args.sequence * heads + h) * capacity + args.start + t;
                cache.store(slot * width, row);
            }
        }
        Ok(())
    }

    fn run_mla_prefill(&self, args: MlaAttentionArgs<'_, Self>) -> Result<()> {
        mla::Mla::new("mla_prefill", self, args)?.prefill()
    }

    fn run_mla_decode(&self, args: MlaAttentionArgs<'_, Self>) -> Result<()> {
        mla::Mla::new("mla_decode", self, args)?.decode()
    }

    fn run_attention_split_reduce(&self, args: SplitReduceArgs<'_, Self>) -> Result<()> {
        reduce::attention_split_reduce(self, args)
    }
}

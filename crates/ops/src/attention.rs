//! Attention over contiguous caches, and multi-head latent attention (operations.md sections 3 and 4:
//! attention_fused, attention_decode, attention_split_reduce, kv_cache_write, mla_attention_prefill, mla_attention_decode).
//!
//! Query i of a sequence has the absolute position `p = i + kv_len - Sq` (bottom-right alignment), so chunked prefill
//! and decode are the same operation.

mod kv_format;
mod paged;
mod reduce;

pub use kv_format::KvFormat;
pub use paged::{
    KvPages, PADDING, PagedAttentionArgs, PagedAttentionOps, PagedWriteArgs, block_error, unstorable_error,
};
pub use reduce::{SplitReduceArgs, empty_partitions_error};

use crate::profile::{self, Arithmetic, Cost, Operation};
use crate::{Device, Linear, OpError, Result, Tensor, check};

const FAMILY: &str = "attention";

/// Which keys around the query's position are visible, besides causality.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Window {
    /// All keys.
    None,
    /// `p - w < j <= p`.
    Left(usize),
    /// `p - left <= j <= p + right`.
    Symmetric {
        /// Keys before the query.
        left: usize,
        /// Keys after the query.
        right: usize,
    },
}

/// What a query without any visible key gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmptyRow {
    /// An error.
    Error,
    /// A row of zeros (padded batches).
    Zero,
}

/// `s_ij = scale (q_i . k_j)`; `s = softcap tanh(s / softcap)`; `s += mask`; softmax over visible j, the sink joining
/// the denominator; `out = sum_j p_ij v_j`. Hq is a multiple of Hkv; query head h reads kv head `h / (Hq/Hkv)`.
pub struct AttentionArgs<'a, D: Device> {
    /// `[B, Sq, Hq, D]`.
    pub q: &'a Tensor<D>,
    /// `[B, Hkv, capacity, D]`, F32, F16 or BF16.
    pub k: &'a Tensor<D>,
    /// `[B, Hkv, capacity, Dv]`, dtype of `k`.
    pub v: &'a Tensor<D>,
    /// Valid keys of each sequence, `[B]`.
    pub kv_len: &'a [usize],
    /// Usually `D^-1/2`.
    pub scale: f32,
    /// Hide keys after the query's position.
    pub causal: bool,
    /// Hide keys outside a window.
    pub window: Window,
    /// Above 0 when present.
    pub softcap: Option<f32>,
    /// Additive, `[B or 1, Hq or 1, Sq, Sk]` F32 with Sk = the largest `kv_len`; -inf hides a key.
    pub mask: Option<&'a Tensor<D>>,
    /// `[Hq]` logits that take probability and add no value (GPT-OSS).
    pub sinks: Option<&'a Tensor<D>>,
    /// Queries without a visible key.
    pub empty_row: EmptyRow,
    /// `[B, Sq, Hq, Dv]`.
    pub out: &'a mut Tensor<D>,
}

/// Appends K and V rows of one sequence to a cache at `start`; each value is rounded once to the cache dtype.
pub struct KvWriteArgs<'a, D: Device> {
    /// `[T, Hkv, D]`, after RoPE.
    pub k: &'a Tensor<D>,
    /// `[T, Hkv, Dv]`.
    pub v: &'a Tensor<D>,
    /// `[B, Hkv, capacity, D]`.
    pub k_cache: &'a mut Tensor<D>,
    /// `[B, Hkv, capacity, Dv]`.
    pub v_cache: &'a mut Tensor<D>,
    /// Which sequence.
    pub sequence: usize,
    /// Cache row of token 0.
    pub start: usize,
}

/// Multi-head latent attention over a cache of rows `[c (r) | k_pe (R)]`. Head h of `kv_b` has `n` key rows then `v`
/// value rows: `k_h = [kv_b_key c | k_pe]`, `v_h = kv_b_value c`. Always causal. No bias in `kv_b`.
pub struct MlaAttentionArgs<'a, D: Device> {
    /// `[B, Sq, H, n + R]`, rotated.
    pub q: &'a Tensor<D>,
    /// `[B, capacity, r + R]`.
    pub cache: &'a Tensor<D>,
    /// Valid rows of each sequence, `[B]`.
    pub kv_len: &'a [usize],
    /// `[H (n + v), r]`, rows in the order of channels.
    pub kv_b: &'a Linear<D>,
    /// n, `qk_nope_head_dim`.
    pub nope_head_dim: usize,
    /// R, `qk_rope_head_dim`.
    pub rope_head_dim: usize,
    /// `(n + R)^-1/2`, times mscale^2 under YaRN with `mscale_all_dim`.
    pub scale: f32,
    /// `[B, Sq, H, v]`.
    pub out: &'a mut Tensor<D>,
}

/// Dimensions of a checked [`MlaAttentionArgs`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MlaDims {
    /// Sequences.
    pub batch: usize,
    /// Queries per sequence.
    pub queries: usize,
    /// Heads.
    pub heads: usize,
    /// n.
    pub nope: usize,
    /// R.
    pub rope: usize,
    /// v.
    pub value: usize,
    /// r.
    pub rank: usize,
    /// Cache rows per sequence.
    pub capacity: usize,
}

impl<D: Device> MlaAttentionArgs<'_, D> {
    /// The dimensions; meaningful after the checks of [`AttentionOps`].
    pub fn dims(&self) -> MlaDims {
        let (q, out, cache) = (self.q.dims(), self.out.dims(), self.cache.dims());
        MlaDims {
            batch: q[0],
            queries: q[1],
            heads: q[2],
            nope: self.nope_head_dim,
            rope: self.rope_head_dim,
            value: out[3],
            rank: self.kv_b.in_features(),
            capacity: cache[1],
        }
    }

    fn check(&self, operation: &'static str) -> Result<()> {
        let &[batch, queries, heads, head_dim] = self.q.dims() else {
            return Err(OpError::shape(operation, "q", self.q.dims(), "[B, Sq, H, n + R]"));
        };
        let rope = self.rope_head_dim;
        if self.nope_head_dim + rope != head_dim {
            let expected = format!("[.., {} + {rope}]", self.nope_head_dim);
            return Err(OpError::shape(operation, "q", self.q.dims(), expected));
        }
        let &[out_batch, out_queries, out_heads, value] = self.out.dims() else {
            return Err(OpError::shape(operation, "out", self.out.dims(), "[B, Sq, H, v]"));
        };
        if [out_batch, out_queries, out_heads] != [batch, queries, heads] {
            let expected = format!("[{batch}, {queries}, {heads}, v]");
            return Err(OpError::shape(operation, "out", self.out.dims(), expected));
        }
        self.kv_b.check_channel_order(operation, "kv_b")?;
        let kv_b = [self.kv_b.out_features(), self.kv_b.in_features()];
        if kv_b[0] != heads * (self.nope_head_dim + value) {
            let expected = format!("[{heads} * ({} + {value}), r]", self.nope_head_dim);
            return Err(OpError::shape(operation, "kv_b", &kv_b, expected));
        }
        let capacity = match *self.cache.dims() {
            [b, capacity, width] if b == batch && width == kv_b[1] + rope => capacity,
            _ => {
                let expected = format!("[{batch}, capacity, {} + {rope}]", kv_b[1]);
                return Err(OpError::shape(operation, "cache", self.cache.dims(), expected));
            }
        };
        for (name, tensor) in [("q", self.q), ("cache", self.cache), ("out", &*self.out)] {
            check::float(operation, name, tensor)?;
        }
        check::finite(operation, "scale", self.scale)?;
        check_kv_len(operation, self.kv_len, batch, queries, capacity, true)
    }
}

impl<D: Device> AttentionArgs<'_, D> {
    fn cost(&self) -> Cost {
        let (queries, q_heads, kv_heads) = (self.q.dims()[1], self.q.dims()[2], self.k.dims()[1]);
        let widths = self.q.columns() + self.v.columns();
        let (mut pairs, mut keys) = (0, 0);
        for &kv_len in self.kv_len {
            let range = |i: usize| visible_keys((i + kv_len).saturating_sub(queries), kv_len, self.causal, self.window);
            pairs += (0..queries).map(range).map(|(first, end)| end - first).sum::<usize>();
            // Both ends grow with the query.
            keys += range(queries - 1).1 - range(0).0;
        }
        let cost = Cost::default()
            .add_flops(Arithmetic::F32, 2 * q_heads * pairs * widths)
            .add_cache(keys * kv_heads * widths * self.k.dtype().size_in_bytes())
            .add_weights(self.sinks.map_or(0, |sinks| sinks.size_in_bytes()))
            .add_activations(&[self.q, self.out]);
        self.mask.map_or(cost, |mask| cost.add_activations(&[mask]))
    }
}

impl<D: Device> KvWriteArgs<'_, D> {
    fn cost(&self) -> Cost {
        let mut cost = Cost::default().add_activations(&[self.k, self.v]);
        let written = (self.k.elements() + self.v.elements()) * self.k_cache.dtype().size_in_bytes();
        cost.activation_bytes += written as u64;
        cost
    }
}

impl<D: Device> MlaAttentionArgs<'_, D> {
    /// `kv_b` is applied to the cache rows or, absorbed, to the queries.
    fn cost(&self, absorbed: bool) -> Cost {
        let MlaDims { batch, queries, heads, nope, rope, value, rank, .. } = self.dims();
        let keys: usize = self.kv_len.iter().sum();
        // Query i sees all keys but the `queries - 1 - i` last.
        let pairs = queries * keys - batch * (queries * (queries - 1) / 2);
        let (rows, width) = if absorbed { (batch * queries, 2 * rank + rope) } else { (keys, nope + rope + value) };
        let flops = 2 * heads * (rows * rank * (nope + value) + pairs * width);
        Cost::default()
            .add_flops(Arithmetic::F32, flops)
            .add_cache(keys * (rank + rope) * self.cache.dtype().size_in_bytes())
            .add_weights(self.kv_b.size_in_bytes())
            .add_activations(&[self.q, self.out])
    }
}

/// The attention family.
pub trait AttentionOps: Device {
    /// Body of [`AttentionOps::attention`]; arguments are checked.
    fn run_attention(&self, args: AttentionArgs<'_, Self>) -> Result<()>;

    /// Body of [`AttentionOps::kv_write`]; arguments are checked.
    fn run_kv_write(&self, args: KvWriteArgs<'_, Self>) -> Result<()>;

    /// Body of [`AttentionOps::mla_prefill`]; arguments are checked.
    fn run_mla_prefill(&self, args: MlaAttentionArgs<'_, Self>) -> Result<()>;

    /// Body of [`AttentionOps::mla_decode`]; arguments are checked.
    fn run_mla_decode(&self, args: MlaAttentionArgs<'_, Self>) -> Result<()>;

    /// Body of [`AttentionOps::attention_split_reduce`]; arguments are checked. Rows without a key are the backend's
    /// error ([`empty_partitions_error`]).
    fn run_attention_split_reduce(&self, args: SplitReduceArgs<'_, Self>) -> Result<()>;

    /// Attention of new queries over a cache that already holds their keys: prefill, chunked prefill and decode.
    fn attention(&self, args: AttentionArgs<'_, Self>) -> Result<()> {
        check_attention(&args)?;
        if args.q.elements() == 0 {
            return Ok(());
        }
        profile::run(self, Operation::new(FAMILY, "attention"), args, AttentionArgs::cost, Self::run_attention)
    }

    /// Appends rows to a cache.
    fn kv_write(&self, args: KvWriteArgs<'_, Self>) -> Result<()> {
        const OP: &str = "kv_write";
        for (name, rows, cache) in [("k_cache", args.k, &*args.k_cache), ("v_cache", args.v, &*args.v_cache)] {
            check::float(OP, name, cache)?;
            check::float(OP, "k or v", rows)?;
            let &[tokens, heads, head_dim] = rows.dims() else {
                return Err(OpError::shape(OP, "k or v", rows.dims(), "[T, Hkv, D]"));
            };
            let fits = match *cache.dims() {
                [sequences, h, capacity, d] => {
                    h == heads
                        && d == head_dim
                        && args.sequence < sequences
                        && args.start.checked_add(tokens).is_some_and(|end| end <= capacity)
                }
                _ => false,
            };
            if !fits {
                let expected = format!(
                    "[sequences > {}, {heads}, capacity >= {} + {tokens}, {head_dim}]",
                    args.sequence, args.start
                );
                return Err(OpError::shape(OP, name, cache.dims(), expected));
            }
        }
        if args.k.dims()[0] != args.v.dims()[0] {
            return Err(OpError::shape(OP, "v", args.v.dims(), "as many tokens as `k`"));
        }
        if args.k.dims()[0] == 0 {
            return Ok(());
        }
        profile::run(self, Operation::new(FAMILY, OP), args, KvWriteArgs::cost, Self::run_kv_write)
    }

    /// MLA with keys and values expanded from the latent rows; for many queries.
    fn mla_prefill(&self, args: MlaAttentionArgs<'_, Self>) -> Result<()> {
        const OP: &str = "mla_prefill";
        args.check(OP)?;
        if args.q.elements() == 0 {
            return Ok(());
        }
        let operation = Operation::new(FAMILY, OP).with_weights(args.kv_b.format_name());
        profile::run(self, operation, args, |args| args.cost(false), Self::run_mla_prefill)
    }

    /// MLA in the absorbed form on the compressed cache; for few queries. Equal to [`AttentionOps::mla_prefill`].
    fn mla_decode(&self, args: MlaAttentionArgs<'_, Self>) -> Result<()> {
        const OP: &str = "mla_decode";
        args.check(OP)?;
        if args.q.elements() == 0 {
            return Ok(());
        }
        let operation = Operation::new(FAMILY, OP).with_weights(args.kv_b.format_name());
        profile::run(self, operation, args, |args| args.cost(true), Self::run_mla_decode)
    }

    /// Joins the partial sums of an attention whose keys were split.
    fn attention_split_reduce(&self, args: SplitReduceArgs<'_, Self>) -> Result<()> {
        args.check()?;
        if args.out.elements() == 0 {
            return Ok(());
        }
        let operation = Operation::new(FAMILY, reduce::OP);
        profile::run(self, operation, args, SplitReduceArgs::cost, Self::run_attention_split_reduce)
    }
}

/// The error of a query without a visible key.
pub fn empty_row_error(batch: usize, head: usize, query: usize) -> OpError {
    let reason = format!("[{batch}, {query}, {head}] sees no key");
    OpError::value("attention", "q", reason)
}

/// First and one past the last key visible to the query at absolute position `p` (mask aside).
pub fn visible_keys(p: usize, kv_len: usize, causal: bool, window: Window) -> (usize, usize) {
    let (first, mut end) = match window {
        Window::None => (0, kv_len),
        Window::Left(w) => ((p + 1).saturating_sub(w), (p + 1).min(kv_len)),
        Window::Symmetric { left, right } => {
            (p.saturating_sub(left), p.saturating_add(right).saturating_add(1).min(kv_len))
        }
    };
    if causal {
        end = end.min(p + 1);
    }
    (first.min(end), end)
}

fn check_attention<D: Device>(args: &AttentionArgs<'_, D>) -> Result<()> {
    const OP: &str = "attention";
    let &[batch, queries, q_heads, head_dim] = args.q.dims() else {
        return Err(OpError::shape(OP, "q", args.q.dims(), "[B, Sq, Hq, D]"));
    };
    let &[k_batch, kv_heads, capacity, k_dim] = args.k.dims() else {
        return Err(OpError::shape(OP, "k", args.k.dims(), "[B, Hkv, capacity, D]"));
    };
    if k_batch != batch || k_dim != head_dim {
        let expected = format!("[{batch}, Hkv, capacity, {head_dim}]");
        return Err(OpError::shape(OP, "k", args.k.dims(), expected));
    }
    if kv_heads == 0 || q_heads % kv_heads != 0 {
        let expected = format!("Hkv that divides Hq = {q_heads}");
        return Err(OpError::shape(OP, "k", args.k.dims(), expected));
    }
    let value_dim = args.v.columns();
    check::dims(OP, "v", args.v, &[batch, kv_heads, capacity, value_dim])?;
    check::dims(OP, "out", args.out, &[batch, queries, q_heads, value_dim])?;
    for (name, tensor) in [("q", args.q), ("k", args.k), ("v", args.v), ("out", &*args.out)] {
        check::float(OP, name, tensor)?;
    }
    check::dtype(OP, "v", args.v, args.k.dtype())?;
    check::finite(OP, "scale", args.scale)?;
    if let Some(softcap) = args.softcap {
        check::positive(OP, "softcap", softcap)?;
    }
    if args.window == Window::Left(0) {
        return Err(OpError::value(OP, "window", "is 0: no key would be visible"));
    }
    if let Some(sinks) = args.sinks {
        check::dims(OP, "sinks", sinks, &[q_heads])?;
        check::float(OP, "sinks", sinks)?;
    }
    // Positions are counted back from the last key: with a window, a query before key 0 has no meaning.
    let positioned = args.causal || args.window != Window::None;
    check_kv_len(OP, args.kv_len, batch, queries, capacity, positioned)?;
    if let Some(mask) = args.mask {
        check::dtype(OP, "mask", mask, marlin_formats::DType::F32)?;
        let keys = args.kv_len.iter().copied().max().unwrap_or(0);
        let fits = match *mask.dims() {
            [b, h, q, k] => (b == batch || b == 1) && (h == q_heads || h == 1) && q == queries && k == keys,
            _ => false,
        };
        if !fits {
            let expected = format!("[{batch} or 1, {q_heads} or 1, {queries}, {keys}]");
            return Err(OpError::shape(OP, "mask", mask.dims(), expected));
        }
    }
    Ok(())
}

/// Each sequence has at least one key, at most `capacity`, and (when queries have positions) at least as many keys as
/// queries.
fn check_kv_len(
    operation: &'static str,
    kv_len: &[usize],
    batch: usize,
    queries: usize,
    capacity: usize,
    positioned: bool,
) -> Result<()> {
    if kv_len.len() != batch {
        return Err(OpError::shape(operation, "kv_len", &[kv_len.len()], format!("[{batch}]")));
    }
    for (b, &len) in kv_len.iter().enumerate() {
        let least = if positioned { queries.max(1) } else { 1 };
        if len < least || len > capacity {
            let reason = format!("[{b}] is {len}, must be in {least}..={capacity}");
            return Err(OpError::value(operation, "kv_len", reason));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use marlin_formats::DType;

    use super::*;
    use crate::oracle::Oracle;
    use crate::{HostTensor, Weight};

    #[test]
    fn costs_count_visible_pairs_and_the_rows_behind_them() {
        let zeros = |dtype, dims: &[usize]| Oracle::new().zeros(dtype, dims).unwrap();
        let (q, mut out) = (zeros(DType::F32, &[2, 3, 4, 8]), zeros(DType::F32, &[2, 3, 4, 6]));
        let (k, v) = (zeros(DType::F16, &[2, 2, 16, 8]), zeros(DType::F16, &[2, 2, 16, 6]));
        let mut cost = |causal, window| {
            let (kv_len, scale, empty_row) = (&[3, 10][..], 1.0, EmptyRow::Error);
            let (softcap, mask, sinks, out) = (None, None, None, &mut out);
            AttentionArgs { q: &q, k: &k, v: &v, kv_len, scale, causal, window, softcap, mask, sinks, empty_row, out }
                .cost()
        };
        let activation_bytes = 4 * 2 * 3 * 4 * (8 + 6);
        let expected = |pairs: u64, keys: u64| Cost {
            f32_flops: 2 * 4 * pairs * (8 + 6),
            cache_bytes: 2 * 2 * keys * (8 + 6),
            activation_bytes,
            ..Cost::default()
        };
        // Positions 0, 1, 2 of three keys, then 7, 8, 9 of ten.
        assert_eq!(cost(true, Window::None), expected(1 + 2 + 3 + 8 + 9 + 10, 3 + 10));
        assert_eq!(cost(false, Window::None), expected(3 * 3 + 3 * 10, 3 + 10));
        assert_eq!(cost(true, Window::Left(2)), expected(1 + 2 + 2 + 2 + 2 + 2, 3 + 4));
        assert_eq!(cost(false, Window::Symmetric { left: 1, right: 1 }), expected(2 + 3 + 2 + 3 + 3 + 2, 3 + 4));
    }

    #[test]
    fn costs_of_both_forms_of_latent_attention() {
        let zeros = |dtype, dims: &[usize]| Oracle::new().zeros(dtype, dims).unwrap();
        // H 2, n 4, R 2, v 3, r 5; two queries after three rows.
        let kv_b = Weight::dense(HostTensor::from_f32(&[14, 5], &[0.0; 70]).unwrap()).unwrap();
        let args = MlaAttentionArgs {
            q: &zeros(DType::F32, &[1, 2, 2, 6]),
            cache: &zeros(DType::BF16, &[1, 8, 7]),
            kv_len: &[5],
            kv_b: &Linear::new(&Oracle::new(), kv_b).unwrap(),
            nope_head_dim: 4,
            rope_head_dim: 2,
            scale: 1.0,
            out: &mut zeros(DType::F32, &[1, 2, 2, 3]),
        };
        let expected = |f32_flops| Cost {
            f32_flops,
            cache_bytes: 5 * 7 * 2,
            weight_bytes: 70 * 4,
            activation_bytes: 4 * 2 * 2 * (6 + 3),
            ..Cost::default()
        };
        // Nine pairs: 4 + 5 visible rows.
        assert_eq!(args.cost(false), expected(2 * 2 * (5 * 5 * 7 + 9 * 9)));
        assert_eq!(args.cost(true), expected(2 * 2 * (2 * 5 * 7 + 9 * 12)));
    }

    #[test]
    fn visibility() {
        assert_eq!(visible_keys(5, 10, true, Window::None), (0, 6));
        assert_eq!(visible_keys(5, 10, false, Window::None), (0, 10));
        assert_eq!(visible_keys(5, 10, true, Window::Left(2)), (4, 6));
        assert_eq!(visible_keys(5, 10, false, Window::Left(1)), (5, 6));
        assert_eq!(visible_keys(5, 10, true, Window::Left(100)), (0, 6));
        let window = Window::Symmetric { left: 2, right: 3 };
        assert_eq!(visible_keys(5, 10, false, window), (3, 9));
        assert_eq!(visible_keys(5, 10, true, window), (3, 6));
        assert_eq!(visible_keys(9, 10, false, window), (7, 10));
    }
}

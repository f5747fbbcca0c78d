//! Multi-head latent attention over rows `[c (r) | k_pe (R)]`.
//!
//! Decode is absorbed: queries are multiplied by the key part of `kv_b`, attend to the cache rows themselves as one key
//! head of width r + R whose values are c, and the sums are multiplied by the value part. Prefill expands keys and
//! values, a number of heads at a time, and is an ordinary attention then.

use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::attention::{MlaAttentionArgs, MlaDims};
use marlin_ops::{Result, Tensor};

use super::ALL_KEYS;
use super::attend::{Attend, Source};
use super::project::{AbsorbConfig, ExpandConfig, VALUE_COLUMNS, absorb, absorb_units, expand, value};
use super::rotated;
use super::rows::{Codes, Rows};
use super::tile::AttentionKernel;
use crate::Gpu;
use crate::element::Storage;
use crate::launch::{cubes, units};
use crate::weight::GpuWeight;

/// Most bytes of expanded keys and values at once.
const EXPANDED_BYTES: usize = 256 << 20;

/// Keys and columns of an expanded tile.
const EXPAND_ROWS: usize = 32;
const EXPAND_COLUMNS: usize = 64;

/// The attention that both forms end in.
struct Core<'a, R: Runtime> {
    dims: MlaDims,
    q: &'a Tensor<Gpu<R>>,
    keys: Source<'a, R>,
    values: Source<'a, R>,
    kv_len: &'a [usize],
    capacity: usize,
    /// First head, key heads, and query heads of each.
    heads: [usize; 3],
    scale: f32,
    kernel: Option<AttentionKernel>,
    out: &'a Tensor<Gpu<R>>,
}

impl<R: Runtime> Core<'_, R> {
    fn run(self, operation: &'static str, gpu: &Gpu<R>) -> Result<()> {
        let [first_head, kv_heads, group] = self.heads;
        let attend = Attend {
            q: self.q,
            keys: self.keys,
            values: self.values,
            kv_len: self.kv_len,
            batch: self.dims.batch,
            queries: self.dims.queries,
            heads: self.dims.heads,
            first_head,
            kv_heads,
            group,
            capacity: self.capacity,
            table: None,
            left: ALL_KEYS,
            right: 0,
            scale: self.scale,
            softcap: None,
            mask: None,
            sinks: None,
            empty_is_error: true,
            kernel: self.kernel,
            out: self.out,
        };
        attend.run(operation, gpu)
    }
}

/// The absorbed form.
pub(super) fn decode<R: Runtime>(
    gpu: &Gpu<R>,
    args: MlaAttentionArgs<'_, Gpu<R>>,
    kernel: Option<AttentionKernel>,
) -> Result<()> {
    const OP: &str = "mla_decode";
    let d = args.dims();
    if d.value == 0 {
        return Ok(());
    }
    let rows = d.batch * d.queries * d.heads;
    let width = d.rank + d.rope;
    let absorbed = gpu.scratch(OP, DType::F32, &[rows, width])?;
    let trellis = args.kv_b.data().decoder.is_trellis();
    if trellis {
        rotated::absorb(gpu, &args, &absorbed)?;
    } else {
        launch_absorb(gpu, args.kv_b.data(), &Heads::of_queries(d), args.q, &absorbed);
    }
    let sums = gpu.scratch(OP, DType::F32, &[rows, d.rank])?;
    let core = Core {
        dims: d,
        q: &absorbed,
        keys: Source::floats(args.cache, width, width),
        values: Source::floats(args.cache, width, d.rank),
        kv_len: args.kv_len,
        capacity: d.capacity,
        heads: [0, 1, d.heads],
        scale: args.scale,
        kernel,
        out: &sums,
    };
    core.run(OP, gpu)?;
    if trellis {
        return rotated::value(gpu, &args, &sums);
    }
    launch_value(gpu, args.kv_b.data(), &Heads::of_values(d), &sums, args.out);
    Ok(())
}

/// The expanded form.
pub(super) fn prefill<R: Runtime>(
    gpu: &Gpu<R>,
    args: MlaAttentionArgs<'_, Gpu<R>>,
    kernel: Option<AttentionKernel>,
) -> Result<()> {
    const OP: &str = "mla_prefill";
    let d = args.dims();
    if d.value == 0 {
        return Ok(());
    }
    let longest = args.kv_len.iter().copied().max().unwrap_or(0);
    let (key_width, one_head) = (d.nope + d.rope, d.batch * longest * (d.nope + d.rope + d.value) * 4);
    let at_once = (EXPANDED_BYTES / one_head.max(1)).clamp(1, d.heads);
    let keys = gpu.scratch(OP, DType::F32, &[d.batch, at_once, longest, key_width])?;
    let values = gpu.scratch(OP, DType::F32, &[d.batch, at_once, longest, d.value])?;
    let lengths = gpu.length_words(OP, args.kv_len)?;
    let unfolded = rotated::unfolded(gpu, &args)?;
    let weight = unfolded.as_ref().unwrap_or(args.kv_b.data());
    for first in (0..d.heads).step_by(at_once) {
        let count = at_once.min(d.heads - first);
        launch_expand(gpu, &args, weight, &lengths, first..first + count, longest, [&keys, &values]);
        let core = Core {
            dims: d,
            q: args.q,
            keys: Source::floats(&keys, key_width, key_width),
            values: Source::floats(&values, d.value, d.value),
            kv_len: args.kv_len,
            capacity: longest,
            heads: [first, count, 1],
            scale: args.scale,
            kernel,
            out: args.out,
        };
        core.run(OP, gpu)?;
    }
    Ok(())
}

/// Rows of queries, and the part of each head's columns of `kv_b` that they meet.
pub(super) struct Heads {
    /// Rows of all heads, and heads.
    pub(super) rows: usize,
    pub(super) heads: usize,
    /// Columns of a head, and of these the first and the number of those of the part.
    pub(super) of_head: usize,
    pub(super) offset: usize,
    pub(super) count: usize,
    /// Values of a row behind those of the part.
    pub(super) rope: usize,
}

impl Heads {
    /// The key columns, which queries meet.
    pub(super) fn of_queries(d: MlaDims) -> Self {
        let (rows, of_head) = (d.batch * d.queries, d.nope + d.value);
        Self { rows, heads: d.heads, of_head, offset: 0, count: d.nope, rope: d.rope }
    }

    /// The value columns, which sums meet.
    pub(super) fn of_values(d: MlaDims) -> Self {
        Self { offset: d.nope, count: d.value, rope: 0, ..Self::of_queries(d) }
    }
}

/// `[rows, n + R]` to `[rows, r + R]`.
pub(super) fn launch_absorb<R: Runtime>(
    gpu: &Gpu<R>,
    weight: &GpuWeight,
    heads: &Heads,
    q: &Tensor<Gpu<R>>,
    absorbed: &Tensor<Gpu<R>>,
) {
    let config = AbsorbConfig { q: Storage::of(q.dtype()), decoder: weight.decoder };
    let blocks = weight.units().div_ceil(absorb_units());
    // SAFETY: q and `absorbed` hold rows * H rows of n + R and r + R, the weight its padded columns of padded r features.
    unsafe {
        absorb::launch_unchecked::<R>(
            gpu.client(),
            cubes(heads.rows * heads.heads * blocks),
            units(),
            q.buffer().arg(q.elements()),
            weight.words.arg(weight.word_count),
            weight.scales.arg(weight.scale_count),
            weight.zeros.arg(weight.zero_count),
            weight.table.arg(weight.table_len),
            absorbed.buffer().arg(absorbed.elements()),
            heads.rows as u32,
            heads.heads as u32,
            heads.of_head as u32,
            weight.padded_out() as u32,
            heads.count as u32,
            heads.rope as u32,
            weight.padded_in() as u32,
            blocks as u32,
            config,
            [config.q.elem(), weight.decoder.scale_elem()],
        );
    }
}

/// `[rows, r]` to `[rows, v]`.
pub(super) fn launch_value<R: Runtime>(
    gpu: &Gpu<R>,
    weight: &GpuWeight,
    heads: &Heads,
    sums: &Tensor<Gpu<R>>,
    out: &Tensor<Gpu<R>>,
) {
    let storage = Storage::of(out.dtype());
    let blocks = heads.count.div_ceil(VALUE_COLUMNS);
    // SAFETY: `sums` and out hold rows * H rows of r and v, the weight its padded columns of padded r features.
    unsafe {
        value::launch_unchecked::<R>(
            gpu.client(),
            cubes(heads.rows * heads.heads * blocks),
            units(),
            sums.buffer().arg(sums.elements()),
            weight.words.arg(weight.word_count),
            weight.scales.arg(weight.scale_count),
            weight.zeros.arg(weight.zero_count),
            weight.table.arg(weight.table_len),
            out.buffer().arg(out.elements()),
            heads.rows as u32,
            heads.heads as u32,
            heads.of_head as u32,
            heads.offset as u32,
            weight.padded_out() as u32,
            heads.count as u32,
            weight.padded_in() as u32,
            blocks as u32,
            weight.decoder,
            storage,
            [weight.decoder.scale_elem(), storage.elem()],
        );
    }
}

/// Keys `[B, heads, longest, n + R]` and values `[B, heads, longest, v]` of a range of heads.
fn launch_expand<R: Runtime>(
    gpu: &Gpu<R>,
    args: &MlaAttentionArgs<'_, Gpu<R>>,
    weight: &GpuWeight,
    lengths: &crate::Buffer,
    heads: std::ops::Range<usize>,
    longest: usize,
    [keys, values]: [&Tensor<Gpu<R>>; 2],
) {
    let d = args.dims();
    let cache = Rows::by_words(Codes::of(args.cache.dtype()));
    let config = ExpandConfig { cache, decoder: weight.decoder, rows: EXPAND_ROWS, columns: EXPAND_COLUMNS };
    let row_blocks = longest.div_ceil(EXPAND_ROWS);
    let column_blocks = (d.nope + d.value).div_ceil(EXPAND_COLUMNS);
    // SAFETY: the cache holds B * capacity rows of r + R, the weight H (n + v) columns of r features, keys and values at
    // least `longest` rows for each of the heads.
    unsafe {
        expand::launch_unchecked::<R>(
            gpu.client(),
            cubes(d.batch * heads.len() * row_blocks * column_blocks),
            units(),
            1,
            args.cache.buffer().arg(args.cache.elements().div_ceil(cache.codes.per_word())),
            lengths.arg(d.batch),
            weight.words.arg(weight.word_count),
            weight.scales.arg(weight.scale_count),
            weight.zeros.arg(weight.zero_count),
            weight.table.arg(weight.table_len),
            keys.buffer().arg(keys.elements()),
            values.buffer().arg(values.elements()),
            d.batch as u32,
            heads.start as u32,
            heads.len() as u32,
            d.heads as u32,
            d.nope as u32,
            d.rope as u32,
            d.value as u32,
            d.rank as u32,
            d.capacity as u32,
            longest as u32,
            config,
            weight.decoder.scale_elem(),
        );
    }
}

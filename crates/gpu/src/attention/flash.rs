//! Attention with an online softmax (Milakov & Gimelshein 2018; FlashAttention, Dao et al. 2022): prefill and decode in
//! one kernel.
//!
//! The rows of a cube are the query heads that share a key head, of consecutive queries: they read each key once. A
//! cube walks over its keys a tile at a time: scores, their softmax, sums of values in registers. With few rows the keys
//! are split over cubes, and [`super::join`] adds their sums up in the order of the keys. On devices whose fragments
//! are known, products are those of [`super::tensor`] for the rows that it takes.

use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::rows::{Four, Rows, four_of, load_eight, scale_value, sum_of};
use super::tensor::{self, Fragments};
use super::tile::AttentionKernel;
use crate::element::{Storage, load, store};
use crate::fault::{Fault, record};
use crate::launch::UNITS;
use crate::math::exp;
use crate::reduce::max_of;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) struct FlashConfig {
    pub(super) q: Rows,
    pub(super) k: Rows,
    pub(super) v: Rows,
    pub(super) sinks: Option<Storage>,
    pub(super) out: Storage,
    pub(super) kernel: AttentionKernel,
    /// Chunks of a row of values.
    pub(super) value_chunks: usize,
    /// Units that work on one row of scores; at most a plane.
    pub(super) lanes: usize,
    /// An additive mask.
    pub(super) mask: bool,
    /// A bound on scores.
    pub(super) softcap: bool,
    /// Rows lie in the blocks of a table.
    pub(super) paged: bool,
    /// How tensor cores multiply, where they do.
    pub(super) tensor: Option<Fragments>,
}

impl FlashConfig {
    const fn on_tensor_cores(self) -> bool {
        self.tensor.is_some()
    }

    const fn fragments(self) -> Fragments {
        match self.tensor {
            Some(fragments) => fragments,
            None => unreachable!(),
        }
    }
}

/// Shapes and options of a call.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
pub(super) struct Geometry {
    pub(super) batch: u32,
    pub(super) queries: u32,
    /// Heads of a row of `q` and of `out`.
    pub(super) heads: u32,
    /// The first of them that belongs to this call.
    pub(super) first_head: u32,
    pub(super) kv_heads: u32,
    /// Query heads of a key head.
    pub(super) group: u32,
    pub(super) head_dim: u32,
    pub(super) value_dim: u32,
    /// Rows of a sequence, or of a block, and head in the cache.
    pub(super) capacity: u32,
    /// Entries of the table for a sequence, and blocks.
    pub(super) table_width: u32,
    pub(super) pages: u32,
    /// Distance of rows of keys and of values.
    pub(super) k_stride: u32,
    pub(super) v_stride: u32,
    /// Blocks of rows.
    pub(super) blocks: u32,
    /// Keys visible before and after a query's position.
    pub(super) left: i32,
    pub(super) right: i32,
    pub(super) scale: f32,
    pub(super) softcap: f32,
    pub(super) mask_batch: u32,
    pub(super) mask_head: u32,
    pub(super) mask_keys: u32,
    /// 1 where a row without keys is an error.
    pub(super) empty_is_error: u32,
}

/// A hidden key; less than any score.
pub(super) const HIDDEN: f32 = f32::NEG_INFINITY;
/// What only [`HIDDEN`] is below.
pub(super) const LEAST: f32 = -3.402_823_4e38;

/// The cube's part of the work.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Part {
    b: usize,
    kv_head: usize,
    pub(super) split: usize,
    /// First row, and one past the last of the sequence and key head.
    pub(super) first_row: usize,
    pub(super) rows: usize,
    /// Position of query 0.
    pub(super) offset: i32,
    /// Keys.
    pub(super) start: usize,
    pub(super) end: usize,
}

#[cube]
fn part_of(g: &Geometry, kv_len: &[u32], #[comptime] t: AttentionKernel) -> Part {
    let splits = comptime!(t.splits);
    let q_tile = comptime!(t.q_tile);
    let split = CUBE_POS % splits;
    let rest = CUBE_POS / splits;
    let blocks = g.blocks as usize;
    // The last queries first: with causality they take longest.
    let block = blocks - 1 - rest % blocks;
    let kv_head = (rest / blocks) % g.kv_heads as usize;
    let b = rest / blocks / g.kv_heads as usize;
    let len = i32::cast_from(kv_len[b]);
    let offset = len - i32::cast_from(g.queries);
    let rows = (g.queries * g.group) as usize;
    let first_row = block * q_tile;
    let past = first_row + q_tile;
    let last_row = select(past < rows, past, rows) - 1;
    let low = at_least_zero(i32::cast_from((first_row / g.group as usize) as u32) + offset - g.left);
    let high = i32::cast_from((last_row / g.group as usize) as u32) + offset + g.right + 1i32;
    let high = at_least_zero(select(high < len, high, len)) as usize;
    let low = low as usize;
    let keys = select(low < high, high - low, 0usize.runtime());
    let per_split = keys.div_ceil(comptime!(t.kv_tile)).div_ceil(splits) * comptime!(t.kv_tile);
    let start = low + split * per_split;
    let end = start + per_split;
    let high = low + keys;
    let end = select(end < high, end, high);
    Part { b, kv_head, split, first_row, rows, offset, start, end }
}

#[cube]
fn at_least_zero(x: i32) -> u32 {
    u32::cast_from(select(x < 0i32, 0i32.runtime(), x))
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn flash<Q: Size, K: Size, V: Size, S: Numeric, O: Numeric, F: Float>(
    q: &[Vector<u32, Q>],
    k: &[Vector<u32, K>],
    v: &[Vector<u32, V>],
    k_scales: &[u16],
    v_scales: &[u16],
    table: &[u32],
    kv_len: &[u32],
    mask: &[f32],
    sinks: &[S],
    out: &mut [O],
    sums: &mut [f32],
    faults: &mut [Atomic<u32>],
    g: Geometry,
    #[comptime] c: FlashConfig,
    #[define(S, O, F)] _elements: [ElemType; 3],
) {
    let t = comptime!(c.kernel);
    let cubes = (g.batch * g.kv_heads * g.blocks) as usize * comptime!(t.splits);
    if CUBE_POS < cubes {
        let p = part_of(&g, kv_len, t);
        if comptime!(c.paged) {
            check_blocks(table, faults, &g, &p);
        }
        if comptime!(c.on_tensor_cores()) {
            let f = comptime!(c.fragments());
            tensor::attend::<Q, K, V, S, O, F>(q, k, v, table, mask, sinks, out, sums, faults, &g, &p, c, f);
        } else {
            attend::<Q, K, V, S, O>(q, k, v, k_scales, v_scales, table, mask, sinks, out, sums, faults, &g, &p, c);
        }
    }
}

/// Computes the part `p` of the attention.
#[cube]
#[allow(clippy::too_many_arguments)]
fn attend<Q: Size, K: Size, V: Size, S: Numeric, O: Numeric>(
    q: &[Vector<u32, Q>],
    k: &[Vector<u32, K>],
    v: &[Vector<u32, V>],
    k_scales: &[u16],
    v_scales: &[u16],
    table: &[u32],
    mask: &[f32],
    sinks: &[S],
    out: &mut [O],
    sums: &mut [f32],
    faults: &mut [Atomic<u32>],
    g: &Geometry,
    p: &Part,
    #[comptime] c: FlashConfig,
) {
    let t = comptime!(c.kernel);
    // Queries, then keys or values.
    let mut tile = Shared::<[Four]>::new_slice(comptime!((t.q_tile + t.kv_tile) * t.pitch()));
    let mut scores = Shared::<[f32]>::new_slice(comptime!(t.q_tile * t.score_pitch()));
    // By row, on the sums so far.
    let mut factors = Shared::<[f32]>::new_slice(comptime!(t.q_tile));
    let mut sum = Array::<Four>::new(comptime!(c.value_chunks * t.unit_rows()));
    #[unroll]
    for i in 0..comptime!(c.value_chunks * t.unit_rows()) {
        sum[i] = Four::new(0.0f32);
    }
    let mut running = Array::<f32>::new(2usize);
    running[0] = HIDDEN;
    running[1] = 0.0;
    let mut first = p.start;
    while first < p.end {
        score_tile::<Q, K>(q, k, k_scales, table, mask, &mut tile, &mut scores, g, p, first, c);
        sync_cube();
        soften(v_scales, table, &mut scores, &mut factors, &mut running, g, p, first, c);
        sync_cube();
        add_values::<V>(v, table, &mut tile, &scores, &factors, &mut sum, g, p, first, c);
        first += comptime!(t.kv_tile);
    }
    let row = UNIT_POS as usize / comptime!(c.lanes);
    let first_of_row = UNIT_POS as usize % comptime!(c.lanes) == 0 && row < comptime!(t.q_tile);
    if first_of_row && p.first_row + row < p.rows {
        let at = query_row(g, p, p.first_row + row);
        factors[row] = close_row::<S>(sinks, sums, faults, at, running[0], running[1], true, g, p.split, c);
    }
    finish::<O>(out, &mut tile, &factors, &sum, g, p, c);
}

/// Records entries of the table that name no block.
#[cube]
fn check_blocks(table: &[u32], faults: &mut [Atomic<u32>], g: &Geometry, p: &Part) {
    let size = g.capacity as usize;
    let none = u32::MAX.runtime();
    let mut bad = u32::MAX.runtime();
    let mut entry = p.start / size + UNIT_POS as usize;
    while entry * size < p.end {
        let at = p.b * g.table_width as usize + entry;
        if table[at] >= g.pages && bad == none {
            bad = u32::cast_from(at);
        }
        entry += CUBE_DIM as usize;
    }
    // Behind the loop: the software device goes astray after atomics within one.
    if bad != none {
        record(faults, Fault::BlockId, bad as usize);
    }
}

/// The row of key `j` in the cache.
#[cube]
pub(super) fn cache_row(table: &[u32], g: &Geometry, p: &Part, j: usize, #[comptime] paged: bool) -> usize {
    let capacity = g.capacity as usize;
    if comptime!(paged) {
        let block = table[p.b * g.table_width as usize + j / capacity];
        // One that does not exist has been recorded.
        let block = select(block < g.pages, block, 0u32.runtime()) as usize;
        (block * g.kv_heads as usize + p.kv_head) * capacity + j % capacity
    } else {
        (p.b * g.kv_heads as usize + p.kv_head) * capacity + j
    }
}

/// Places of the row's head in a query: `(b Sq + i) H + h`.
#[cube]
pub(super) fn query_row(g: &Geometry, p: &Part, row: usize) -> usize {
    let head = g.first_head as usize + p.kv_head * g.group as usize + row % g.group as usize;
    (p.b * g.queries as usize + row / g.group as usize) * g.heads as usize + head
}

/// A chunk of the queries.
#[cube]
fn load_queries<Q: Size>(
    q: &[Vector<u32, Q>],
    tile: &mut Shared<[Four]>,
    g: &Geometry,
    p: &Part,
    column: usize,
    #[comptime] c: FlashConfig,
) {
    let eights = comptime!(c.kernel.chunk / 8);
    let mut i = UNIT_POS as usize;
    while i < comptime!(c.kernel.q_tile * c.kernel.chunk / 8) {
        let row = i / eights;
        let eight = i % eights;
        let mut width = 0usize.runtime();
        let mut start = 0usize.runtime();
        if p.first_row + row < p.rows {
            width = g.head_dim as usize;
            start = query_row(g, p, p.first_row + row) * width;
        }
        let values = load_eight::<Q>(q, start, column + eight * 8, width, c.q);
        let at = row * comptime!(c.kernel.pitch()) + eight * 2;
        tile[at] = four_of(&values, 0usize);
        tile[at + 1] = four_of(&values, 4usize);
        i += UNITS as usize;
    }
}

/// A chunk of the keys, or of the values, of the tile that starts at key `first`.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load_cache<N: Size>(
    data: &[Vector<u32, N>],
    table: &[u32],
    tile: &mut Shared<[Four]>,
    g: &Geometry,
    p: &Part,
    first: usize,
    column: usize,
    width: u32,
    stride: u32,
    #[comptime] rows: Rows,
    #[comptime] c: FlashConfig,
) {
    let t = comptime!(c.kernel);
    let eights = comptime!(t.chunk / 8);
    let mut i = UNIT_POS as usize;
    while i < comptime!(t.kv_tile * t.chunk / 8) {
        let row = i / eights;
        let eight = i % eights;
        let mut used = 0usize.runtime();
        let mut start = 0usize.runtime();
        // Rows beyond the last key may hold anything.
        if first + row < p.end {
            // Quantized rows fill their last word.
            used = if comptime!(rows.codes.is_quantized()) { stride as usize } else { width as usize };
            start = cache_row(table, g, p, first + row, c.paged) * stride as usize;
        }
        let values = load_eight::<N>(data, start, column + eight * 8, used, rows);
        let at = (comptime!(t.q_tile) + row) * comptime!(t.pitch()) + eight * 2;
        tile[at] = four_of(&values, 0usize);
        tile[at + 1] = four_of(&values, 4usize);
        i += UNITS as usize;
    }
}

/// Scores of a tile of keys, [`HIDDEN`] where the row does not see the key.
#[cube]
#[allow(clippy::too_many_arguments)]
fn score_tile<Q: Size, K: Size>(
    q: &[Vector<u32, Q>],
    k: &[Vector<u32, K>],
    k_scales: &[u16],
    table: &[u32],
    mask: &[f32],
    tile: &mut Shared<[Four]>,
    scores: &mut Shared<[f32]>,
    g: &Geometry,
    p: &Part,
    first: usize,
    #[comptime] c: FlashConfig,
) {
    let t = comptime!(c.kernel);
    let (rows, keys) = comptime!((t.unit_rows(), t.unit_keys()));
    let lanes = comptime!(t.kv_tile / t.unit_keys());
    let lane = UNIT_POS as usize % lanes;
    let row = UNIT_POS as usize / lanes * rows;
    let mut dots = Array::<Four>::new(comptime!(rows * keys));
    #[unroll]
    for i in 0..comptime!(rows * keys) {
        dots[i] = Four::new(0.0f32);
    }
    let mut column = 0usize.runtime();
    while column < g.head_dim as usize {
        sync_cube();
        load_queries::<Q>(q, tile, g, p, column, c);
        load_cache::<K>(k, table, tile, g, p, first, column, g.head_dim, g.k_stride, c.k, c);
        sync_cube();
        for d in 0..comptime!(t.quads()) {
            let mut key = Array::<Four>::new(keys);
            #[unroll]
            for x in 0..keys {
                key[x] = tile[(comptime!(t.q_tile + x * lanes) + lane) * comptime!(t.pitch()) + d];
            }
            #[unroll]
            for y in 0..rows {
                let query = tile[(row + y) * comptime!(t.pitch()) + d];
                #[unroll]
                for x in 0..keys {
                    dots[comptime!(y * keys + x)] += query * key[x];
                }
            }
        }
        column += comptime!(t.chunk);
    }
    #[unroll]
    for y in 0..rows {
        #[unroll]
        for x in 0..keys {
            let at = lane + comptime!(x * lanes);
            let mut dot = sum_of(dots[comptime!(y * keys + x)]);
            if comptime!(c.k.codes.is_quantized()) {
                dot *= row_scale(k_scales, table, g, p, first + at, c.paged);
            }
            scores[(row + y) * comptime!(t.score_pitch()) + at] =
                score(dot, mask, g, p, p.first_row + row + y, first + at, c);
        }
    }
}

/// The scale of the row of key `j`; 0 behind the last key.
#[cube]
fn row_scale(scales: &[u16], table: &[u32], g: &Geometry, p: &Part, j: usize, #[comptime] paged: bool) -> f32 {
    let mut scale = f32::new(0.0);
    if j < p.end {
        scale = scale_value(scales[cache_row(table, g, p, j, paged)]);
    }
    scale
}

/// The score of key `j` for row `row`.
#[cube]
fn score(dot: f32, mask: &[f32], g: &Geometry, p: &Part, row: usize, j: usize, #[comptime] c: FlashConfig) -> f32 {
    let mut s = HIDDEN.runtime();
    if row < p.rows && j < p.end {
        let position = i32::cast_from((row / g.group as usize) as u32) + p.offset;
        let key = i32::cast_from(j as u32);
        if key >= position - g.left && key <= position + g.right {
            s = bounded_and_masked(dot * g.scale, mask, g, p, row, j, c);
        }
    }
    s
}

/// A visible score, bounded and with its mask.
#[cube]
pub(super) fn bounded_and_masked(
    s: f32,
    mask: &[f32],
    g: &Geometry,
    p: &Part,
    row: usize,
    j: usize,
    #[comptime] c: FlashConfig,
) -> f32 {
    let mut s = s;
    if comptime!(c.softcap) {
        s = g.softcap * tanh(s / g.softcap);
    }
    if comptime!(c.mask) {
        let head = g.first_head as usize + p.kv_head * g.group as usize + row % g.group as usize;
        let plane = p.b * g.mask_batch as usize + head * g.mask_head as usize;
        s += mask[(plane * g.queries as usize + row / g.group as usize) * g.mask_keys as usize + j];
    }
    s
}

/// tanh within 2 ulp (Cephes, tanhf).
#[cube]
fn tanh(x: f32) -> f32 {
    let size = f32::abs(x);
    let z = x * x;
    let mut series = f32::new(-5.704_988_7e-3);
    series = series * z + 2.063_908_8e-2f32;
    series = series * z - 5.373_971_5e-2f32;
    series = series * z + 1.333_144_2e-1f32;
    series = series * z - 3.333_328_2e-1f32;
    let small = series * z * x + x;
    let large = 1.0f32 - 2.0f32 / (exp(2.0f32 * size) + 1.0f32);
    let large = select(x < 0.0f32, -large, large);
    select(size < 0.625f32, small, large)
}

/// Scores to probabilities relative to the row's running maximum, times the scales of the values; the running maximum
/// and sum of the unit's row.
#[cube]
#[allow(clippy::too_many_arguments)]
fn soften(
    v_scales: &[u16],
    table: &[u32],
    scores: &mut Shared<[f32]>,
    factors: &mut Shared<[f32]>,
    running: &mut Array<f32>,
    g: &Geometry,
    p: &Part,
    first: usize,
    #[comptime] c: FlashConfig,
) {
    let t = comptime!(c.kernel);
    let lanes = comptime!(c.lanes);
    let lane = UNIT_POS as usize % lanes;
    let row = UNIT_POS as usize / lanes;
    // All units shuffle; those without a row change nothing.
    let active = row < comptime!(t.q_tile);
    let start = select(active, row, 0usize.runtime()) * comptime!(t.score_pitch()) + lane;
    let mut max = HIDDEN.runtime();
    for i in 0..comptime!(t.kv_tile / lanes) {
        max = max_of(max, scores[start + i * lanes]);
    }
    #[unroll]
    for step in 0..comptime!(lanes.ilog2()) {
        max = max_of(max, plane_shuffle_xor(max, comptime!(1u32 << step)));
    }
    let old = running[0];
    let max = max_of(old, max);
    let base = select(max < LEAST, 0.0f32.runtime(), max);
    let factor = exp(old - base);
    let mut sum = f32::new(0.0);
    if active {
        for i in 0..comptime!(t.kv_tile / lanes) {
            let mut weight = exp(scores[start + i * lanes] - base);
            sum += weight;
            if comptime!(c.v.codes.is_quantized()) {
                weight *= row_scale(v_scales, table, g, p, first + lane + i * lanes, c.paged);
            }
            scores[start + i * lanes] = weight;
        }
    }
    #[unroll]
    for step in 0..comptime!(lanes.ilog2()) {
        sum += plane_shuffle_xor(sum, comptime!(1u32 << step));
    }
    running[0] = max;
    running[1] = running[1] * factor + sum;
    if active && lane == 0 {
        factors[row] = factor;
    }
}

/// Adds the tile's values, weighted.
#[cube]
#[allow(clippy::too_many_arguments)]
fn add_values<V: Size>(
    v: &[Vector<u32, V>],
    table: &[u32],
    tile: &mut Shared<[Four]>,
    scores: &Shared<[f32]>,
    factors: &Shared<[f32]>,
    sum: &mut Array<Four>,
    g: &Geometry,
    p: &Part,
    first: usize,
    #[comptime] c: FlashConfig,
) {
    let t = comptime!(c.kernel);
    let rows = comptime!(t.unit_rows());
    let keys = comptime!(t.kv_tile / t.slices());
    let quad = UNIT_POS as usize % comptime!(t.quads());
    let rest = UNIT_POS as usize / comptime!(t.quads());
    let row = rest % comptime!(t.row_groups()) * rows;
    let slice = rest / comptime!(t.row_groups()) * keys;
    #[unroll]
    for chunk in 0..comptime!(c.value_chunks) {
        if comptime!(chunk > 0) {
            sync_cube();
        }
        let column = comptime!(chunk * t.chunk);
        load_cache::<V>(v, table, tile, g, p, first, column.runtime(), g.value_dim, g.v_stride, c.v, c);
        sync_cube();
        #[unroll]
        for y in 0..rows {
            sum[comptime!(chunk * rows + y)] *= Four::new(factors[row + y]);
        }
        for j in 0..keys {
            let value = tile[(comptime!(t.q_tile) + slice + j) * comptime!(t.pitch()) + quad];
            #[unroll]
            for y in 0..rows {
                let weight = scores[(row + y) * comptime!(t.score_pitch()) + slice + j];
                sum[comptime!(chunk * rows + y)] += Four::new(weight) * value;
            }
        }
    }
}

/// The factor on the sums of row `at`, which are complete or, with splits, a part: then its largest score and the weight
/// of its keys relative to that go to `sums`. One unit of the row `writes`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn close_row<S: Numeric>(
    sinks: &[S],
    sums: &mut [f32],
    faults: &mut [Atomic<u32>],
    at: usize,
    max: f32,
    weight: f32,
    writes: bool,
    g: &Geometry,
    split: usize,
    #[comptime] c: FlashConfig,
) -> f32 {
    let mut factor = f32::new(1.0);
    if comptime!(c.kernel.splits > 1) {
        if writes {
            let at = (at * comptime!(c.kernel.splits) + split) * 2;
            sums[at] = max;
            sums[at + 1] = weight;
        }
    } else {
        let head = at % g.heads as usize;
        factor = last_factor::<S>(sinks, head, max, weight, c.sinks);
        if writes && g.empty_is_error == 1 && is_empty::<S>(sinks, head, weight, c.sinks) {
            record(faults, Fault::EmptyRow, at);
        }
    }
    factor
}

/// Joins the slices and writes rows of `out`, or of partial sums.
#[cube]
fn finish<O: Numeric>(
    out: &mut [O],
    tile: &mut Shared<[Four]>,
    factors: &Shared<[f32]>,
    sum: &Array<Four>,
    g: &Geometry,
    p: &Part,
    #[comptime] c: FlashConfig,
) {
    let t = comptime!(c.kernel);
    let rows = comptime!(t.unit_rows());
    let quads = comptime!(t.quads());
    let quad = UNIT_POS as usize % quads;
    let place = UNIT_POS as usize / quads * rows;
    #[unroll]
    for chunk in 0..comptime!(c.value_chunks) {
        sync_cube();
        #[unroll]
        for y in 0..rows {
            tile[(place + y) * quads + quad] = sum[comptime!(chunk * rows + y)];
        }
        sync_cube();
        let mut i = UNIT_POS as usize;
        while i < comptime!(t.q_tile * t.quads()) {
            let row = i / quads;
            let mut total = tile[i];
            for slice in 1..comptime!(t.slices()) {
                total += tile[slice * comptime!(t.q_tile * t.quads()) + i];
            }
            if p.first_row + row < p.rows {
                let column = comptime!(chunk * t.chunk) + i % quads * 4;
                let at = query_row(g, p, p.first_row + row) * comptime!(t.splits) + p.split;
                let start = at * g.value_dim as usize;
                #[unroll]
                for x in 0..4usize {
                    if column + x < g.value_dim as usize {
                        store::<O>(out, start + column + x, total.extract(x) * factors[row], c.out);
                    }
                }
            }
            i += UNITS as usize;
        }
    }
}

/// What the sums relative to `max` are multiplied by: 1 over the denominator, which the sink joins; 0 without any key.
#[cube]
pub(super) fn last_factor<S: Numeric>(
    sinks: &[S],
    head: usize,
    max: f32,
    weight: f32,
    #[comptime] storage: Option<Storage>,
) -> f32 {
    let mut numerator = f32::new(1.0);
    let mut denominator = weight;
    if comptime!(storage.is_some()) {
        let sink = load::<S>(sinks, head, comptime!(storage.unwrap_or(Storage::F32)));
        let base = max_of(max, sink);
        let base = select(base < LEAST, 0.0f32.runtime(), base);
        numerator = exp(max - base);
        denominator = weight * numerator + exp(sink - base);
    }
    select(denominator == 0.0f32, 0.0f32.runtime(), numerator / denominator)
}

/// Whether a row saw no key and has no sink.
#[cube]
pub(super) fn is_empty<S: Numeric>(
    sinks: &[S],
    head: usize,
    weight: f32,
    #[comptime] storage: Option<Storage>,
) -> bool {
    let mut empty = weight == 0.0f32;
    if comptime!(storage.is_some()) {
        empty = empty && load::<S>(sinks, head, comptime!(storage.unwrap_or(Storage::F32))) < LEAST;
    }
    empty
}

//! The attention of [`super::flash`] with products of tensor cores (`m16n8k16`).
//!
//! A plane has sixteen rows: of few, a cube is one plane, and the keys are split. Keys and values of 16 bits are operands as
//! they are, queries and probabilities the sum of two: f16 keep 2^-22 of a value, bf16 2^-17, as in linear layers of f32. Where
//! queries and results have the type of the cache, one operand stands for a query and for a probability. f32 keys and values are
//! sums of two bf16; the exact mode leaves them to the other kernel. With infinite keys or values, results may be NaN. Scores leave the products as the next products take probabilities: they stay in registers.
//!
//! The order in which a product sums is free: lane `4 g + t` takes columns `8 t .. 8 t + 8` of 32 of a row, one load of
//! 16 bytes, for two products. Values are transposed on their way into registers (`ldmatrix`).

mod products;
mod stage;

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

use super::flash::{FlashConfig, Geometry, HIDDEN, LEAST, Part, bounded_and_masked, close_row, query_row};
use super::rows::Codes;
use super::tile::AttentionKernel;
use crate::Gpu;
use crate::element::store;
use crate::linear::exl3::rotate::LANES;
use crate::linear::tensor::{SHARED_BESIDE, has_fragments};
use crate::reduce::max_of;
use products::{add_values, multiply_blocks, multiply_keys, push_operands, query_operands};
use stage::{load_keys, stage_keys, stage_queries, store_value, value_words};

/// Rows of a plane.
const ROWS: usize = 16;
/// Columns of a step: a lane has eight of them.
const STEP: usize = 32;
/// Planes of a cube of more rows than one plane has.
const PLANES: usize = 4;

/// Fewest columns of keys and of values: those of a product. Of narrower rows, steps are mostly padding.
const LEAST_COLUMNS: usize = 16;
/// Most columns of keys and of values: those whose sums stay in registers.
const MOST_COLUMNS: usize = 256;
/// The same where a tile of keys and one of values, of one operand each, are in registers too.
const MOST_COLUMNS_ALONE: usize = 128;

/// Keys that are worth a split.
pub(super) const LEAST_KEYS: usize = 128;

/// What probabilities are multiplied by, so that what is left of small ones is no subnormal f16.
const LIFT: f32 = 32_768.0;

/// What rows of keys and values are, and how products take them.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) struct Fragments {
    /// Planes of a cube.
    planes: usize,
    /// bf16, or f16.
    bf16: bool,
    /// Operands whose sum a key or value is.
    cache_parts: usize,
    /// Operands whose sum a query or probability is.
    row_parts: usize,
    /// Steps of a row of queries and keys.
    key_steps: usize,
    /// Steps of a row of values.
    value_steps: usize,
}

impl Fragments {
    /// Those for so many rows of queries, of `head_dim`, and of results, and for keys and values, with their kernel; if the device
    /// has them.
    pub(super) fn new<R: Runtime>(
        gpu: &Gpu<R>,
        io: [Codes; 2],
        cache: [Codes; 2],
        dims: [usize; 2],
        rows: usize,
    ) -> Option<(Self, AttentionKernel)> {
        let fragments = Self::of(io, cache, dims, rows).filter(|f| f.cache_parts == 1 || !gpu.is_exact())?;
        let kernel = fragments.kernel();
        let shared = fragments.shared_bytes(kernel) + SHARED_BESIDE;
        let fits = shared <= gpu.properties().hardware.max_shared_memory_size;
        (fits && has_products(gpu, fragments.elem())).then_some((fragments, kernel))
    }

    /// The same on any device.
    fn of(io: [Codes; 2], cache: [Codes; 2], [head_dim, value_dim]: [usize; 2], rows: usize) -> Option<Self> {
        let (bf16, cache_parts) = match cache {
            [Codes::F16, Codes::F16] => (false, 1),
            [Codes::BF16, Codes::BF16] => (true, 1),
            [Codes::F32, Codes::F32] => (true, 2),
            _ => return None,
        };
        let planes = if rows <= ROWS { 1 } else { PLANES };
        let row_parts = if cache_parts == 1 && io == [cache[0]; 2] { 1 } else { 2 };
        let widest = head_dim.max(value_dim);
        let too_many = if planes == 1 { cache_parts > 1 || widest > MOST_COLUMNS_ALONE } else { widest > MOST_COLUMNS };
        if head_dim.min(value_dim) < LEAST_COLUMNS || too_many {
            return None;
        }
        let [key_steps, value_steps] = [head_dim, value_dim].map(|columns| columns.div_ceil(STEP));
        Some(Self { planes, bf16, cache_parts, row_parts, key_steps, value_steps })
    }

    /// The type of operands.
    pub(super) fn elem(self) -> ElemType {
        ElemType::Float(if self.bf16 { FloatKind::BF16 } else { FloatKind::F16 })
    }

    /// Rows of a cube.
    const fn rows(self) -> usize {
        self.planes * ROWS
    }

    /// Units of a cube.
    pub(super) const fn units(self) -> usize {
        self.planes * LANES
    }

    /// Cubes that keep a core busy.
    pub(super) const fn cubes_per_processor(self) -> usize {
        8 / self.planes
    }

    /// Keys at once: as many as leave a core room for several cubes.
    fn kernel(self) -> AttentionKernel {
        let wide = self.cache_parts > 1 || self.key_steps > 4 || self.value_steps > 4;
        let kv_tile = match (self.planes, wide) {
            (1, _) => 16,
            (_, true) => 32,
            (_, false) => 64,
        };
        AttentionKernel { q_tile: self.rows(), kv_tile, chunk: STEP, splits: 1 }
    }

    /// Vectors of a row of queries or keys in shared memory.
    const fn key_pitch(self) -> usize {
        4 * self.key_steps
    }

    /// Those of a row of values; odd, so that eight rows lie in different banks.
    const fn value_pitch(self) -> usize {
        4 * self.value_steps + 1
    }

    const fn query_vectors(self) -> usize {
        self.row_parts * self.rows() * self.key_pitch()
    }

    const fn key_vectors(self, t: AttentionKernel) -> usize {
        // A plane alone has them in registers.
        if self.planes == 1 { 0 } else { self.cache_parts * t.kv_tile * self.key_pitch() }
    }

    const fn value_vectors(self, t: AttentionKernel) -> usize {
        self.cache_parts * t.kv_tile * self.value_pitch()
    }

    /// Vectors of a tile of values that a unit has.
    const fn own_values(self, t: AttentionKernel) -> usize {
        self.cache_parts * t.kv_tile * 4 * self.value_steps / self.units()
    }

    fn shared_bytes(self, t: AttentionKernel) -> usize {
        (self.query_vectors() + self.key_vectors(t) + self.value_vectors(t)) * 16 + self.rows() * 4
    }
}

/// Whether the device multiplies such operands and loads them transposed.
fn has_products<R: Runtime>(gpu: &Gpu<R>, elem: ElemType) -> bool {
    has_fragments(gpu, elem) && gpu.properties().features.matmul.ldmatrix.contains(&elem.into())
}

/// Whether attention over f32 keys and values depends on the mode.
pub(crate) fn has_modes<R: Runtime>(gpu: &Gpu<R>) -> bool {
    has_products(gpu, ElemType::Float(FloatKind::BF16))
}

/// Eight values of 16 bits.
type Words = Vector<u32, Const<4>>;
/// Two values of an operand.
type Pair<F> = Vector<F, Const<2>>;
/// Sums of a lane: a row's two neighbouring columns, and those of the eighth row after it.
type Sums = Sequence<Array<Vector<f32, Const<2>>>>;

/// What a lane knows of its two rows.
#[derive(CubeType)]
struct LaneRows {
    /// Scores are products times this.
    scale: Array<f32>,
    /// First and last key that they see.
    low: Array<i32>,
    high: Array<i32>,
    /// Largest score so far, and the sum of probabilities relative to it.
    max: Array<f32>,
    weight: Array<f32>,
    /// What the sums so far are multiplied by.
    factor: Array<f32>,
}

/// Computes the part `p` of the attention.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn attend<Q: Size, K: Size, V: Size, S: Numeric, O: Numeric, F: Float>(
    q: &[Vector<u32, Q>],
    k: &[Vector<u32, K>],
    v: &[Vector<u32, V>],
    table: &[u32],
    mask: &[f32],
    sinks: &[S],
    out: &mut [O],
    sums: &mut [f32],
    faults: &mut [Atomic<u32>],
    g: &Geometry,
    p: &Part,
    #[comptime] c: FlashConfig,
    #[comptime] f: Fragments,
) {
    let mut queries = Shared::<[Words]>::new_aligned_slice(comptime!(f.query_vectors()), 16usize);
    let mut inverses = Shared::<[f32]>::new_slice(comptime!(f.rows()));
    stage_queries::<Q, F>(q, &mut queries, &mut inverses, g, p, c.q, f);
    sync_plane();
    let mut rows = lane_rows(&inverses, g, p);
    let mut total = zeros(comptime!(4 * f.value_steps));
    if comptime!(f.planes == 1) {
        walk_alone::<K, V, F>(k, v, table, mask, &queries, &mut rows, &mut total, g, p, c, f);
    } else {
        walk::<K, V, F>(k, v, table, mask, &queries, &mut rows, &mut total, g, p, c, f);
    }
    finish::<S, O>(sinks, out, sums, faults, &total, &rows, g, p, c, f);
}

/// Goes over the keys, which the planes of the cube share.
#[cube]
#[allow(clippy::too_many_arguments)]
fn walk<K: Size, V: Size, F: Float>(
    k: &[Vector<u32, K>],
    v: &[Vector<u32, V>],
    table: &[u32],
    mask: &[f32],
    queries: &Shared<[Words]>,
    rows: &mut LaneRows,
    total: &mut Sums,
    g: &Geometry,
    p: &Part,
    #[comptime] c: FlashConfig,
    #[comptime] f: Fragments,
) {
    let t = comptime!(c.kernel);
    let mut keys = Shared::<[Words]>::new_aligned_slice(comptime!(f.key_vectors(t)), 16usize);
    let mut values = Shared::<[Vector<F, Const<8>>]>::new_aligned_slice(comptime!(f.value_vectors(t)), 16usize);
    let mut first = p.start;
    while first < p.end {
        sync_cube();
        stage_keys::<K, F>(k, table, &mut keys, g, p, first, c, f);
        #[unroll]
        for i in 0..comptime!(f.own_values(t)) {
            store_value::<F>(&mut values, value_words::<V, F>(v, table, g, p, first, i, c, f), i, c, f);
        }
        sync_cube();
        let mut scores = zeros(comptime!(t.kv_tile / 8));
        multiply_keys::<F>(queries, &keys, &mut scores, c, f);
        soften(&mut scores, mask, rows, g, p, first, c);
        add_values::<F>(&values, &scores, total, rows, c, f);
        first += comptime!(t.kv_tile);
    }
}

/// Goes over the keys of a plane that shares them with none: they go straight into registers, as operands. The next tile is
/// loaded while this one is multiplied.
#[cube]
#[allow(clippy::too_many_arguments)]
fn walk_alone<K: Size, V: Size, F: Float>(
    k: &[Vector<u32, K>],
    v: &[Vector<u32, V>],
    table: &[u32],
    mask: &[f32],
    queries: &Shared<[Words]>,
    rows: &mut LaneRows,
    total: &mut Sums,
    g: &Geometry,
    p: &Part,
    #[comptime] c: FlashConfig,
    #[comptime] f: Fragments,
) {
    let t = comptime!(c.kernel);
    let blocks = comptime!(t.kv_tile / 8);
    let mut values = Shared::<[Vector<F, Const<8>>]>::new_aligned_slice(comptime!(f.value_vectors(t)), 16usize);
    let mut next_keys = Array::<Words>::new(comptime!(blocks * f.key_steps));
    let mut next_values = Array::<Words>::new(comptime!(f.own_values(t)));
    load_keys::<K, F>(k, table, &mut next_keys, g, p, p.start, c, f);
    #[unroll]
    for i in 0..comptime!(f.own_values(t)) {
        next_values[i] = value_words::<V, F>(v, table, g, p, p.start, i, c, f);
    }
    let mut first = p.start;
    while first < p.end {
        let next = first + comptime!(t.kv_tile);
        let mut scores = zeros(blocks);
        #[unroll]
        for step in 0..comptime!(f.key_steps) {
            let lefts = query_operands::<F>(queries, step, f);
            let mut rights = Sequence::<Array<Pair<F>>>::new();
            #[unroll]
            for j in 0..blocks {
                push_operands::<F>(&mut rights, next_keys[comptime!(j * f.key_steps + step)]);
            }
            multiply_blocks::<F>(&lefts, &rights, &mut scores, 0usize, blocks, f);
        }
        load_keys::<K, F>(k, table, &mut next_keys, g, p, next, c, f);
        soften(&mut scores, mask, rows, g, p, first, c);
        // All lanes have read the tile before.
        sync_plane();
        #[unroll]
        for i in 0..comptime!(f.own_values(t)) {
            store_value::<F>(&mut values, next_values[i], i, c, f);
            next_values[i] = value_words::<V, F>(v, table, g, p, next, i, c, f);
        }
        sync_plane();
        add_values::<F>(&values, &scores, total, rows, c, f);
        first = next;
    }
}

#[cube]
fn zeros(#[comptime] count: usize) -> Sums {
    let mut sums = Sequence::<Array<Vector<f32, Const<2>>>>::new();
    #[unroll]
    for _i in 0..count {
        let mut zero = Array::<Vector<f32, Const<2>>>::new(2usize);
        zero[0] = Vector::<f32, Const<2>>::new(0.0);
        zero[1] = Vector::<f32, Const<2>>::new(0.0);
        sums.push(zero);
    }
    sums
}

/// The lane's first row in the cube; the other is eight behind.
#[cube]
fn lane_row() -> usize {
    let unit = UNIT_POS as usize;
    unit / LANES * ROWS + unit % LANES / 4usize
}

/// The lane's rows before the first key.
#[cube]
fn lane_rows(inverses: &Shared<[f32]>, g: &Geometry, p: &Part) -> LaneRows {
    let mut scale = Array::<f32>::new(2usize);
    let mut low = Array::<i32>::new(2usize);
    let mut high = Array::<i32>::new(2usize);
    let mut max = Array::<f32>::new(2usize);
    let mut weight = Array::<f32>::new(2usize);
    let mut factor = Array::<f32>::new(2usize);
    let last = i32::cast_from(p.end as u32) - 1i32;
    #[unroll]
    for half in 0..2usize {
        let row = lane_row() + comptime!(8 * half);
        let at = p.first_row + row;
        let position = i32::cast_from((at / g.group as usize) as u32) + p.offset;
        let behind = position + g.right;
        scale[half] = inverses[row] * g.scale;
        low[half] = position - g.left;
        // Rows behind the last see nothing.
        high[half] = select(at < p.rows, select(behind < last, behind, last), -1i32);
        max[half] = HIDDEN;
        weight[half] = 0.0;
        factor[half] = 1.0;
    }
    LaneRows { scale, low, high, max, weight, factor }
}

/// Products to scores to probabilities relative to the running maxima of their rows, which go on.
#[cube]
fn soften(
    scores: &mut Sums,
    mask: &[f32],
    rows: &mut LaneRows,
    g: &Geometry,
    p: &Part,
    first: usize,
    #[comptime] c: FlashConfig,
) {
    let blocks = comptime!(c.kernel.kv_tile / 8);
    let column = first + UNIT_POS as usize % 4usize * 2usize;
    #[unroll]
    for half in 0..2usize {
        let row = p.first_row + lane_row() + comptime!(8 * half);
        let mut max = HIDDEN.runtime();
        #[unroll]
        for j in 0..blocks {
            let block = scores.index_mut(j);
            let mut two = block[half];
            #[unroll]
            for i in 0..2usize {
                let key = column + comptime!(8 * j + i);
                let at = i32::cast_from(key as u32);
                let mut s = HIDDEN.runtime();
                let visible = at >= rows.low[half] && at <= rows.high[half];
                let dot = two.extract(i) * rows.scale[half];
                if comptime!(c.mask) {
                    if visible {
                        s = bounded_and_masked(dot, mask, g, p, row, key, c);
                    }
                } else {
                    s = select(visible, bounded_and_masked(dot, mask, g, p, row, key, c), s);
                }
                max = max_of(max, s);
                two.insert(i, s);
            }
            block[half] = two;
        }
        max = max_of(max, plane_shuffle_xor(max, 1u32));
        max = max_of(max, plane_shuffle_xor(max, 2u32));
        let max = max_of(rows.max[half], max);
        let base = select(max < LEAST, 0.0f32.runtime(), max);
        let factor = f32::exp(rows.max[half] - base);
        let mut sum = f32::new(0.0);
        #[unroll]
        for j in 0..blocks {
            let block = scores.index_mut(j);
            let mut two = block[half];
            #[unroll]
            for i in 0..2usize {
                let weight = f32::exp(two.extract(i) - base);
                sum += weight;
                two.insert(i, weight);
            }
            block[half] = two;
        }
        sum += plane_shuffle_xor(sum, 1u32);
        sum += plane_shuffle_xor(sum, 2u32);
        rows.max[half] = max;
        rows.weight[half] = rows.weight[half] * factor + sum;
        rows.factor[half] = factor;
    }
}

/// Writes the lane's part of its rows of `out`, or of partial sums.
#[cube]
#[allow(clippy::too_many_arguments)]
fn finish<S: Numeric, O: Numeric>(
    sinks: &[S],
    out: &mut [O],
    sums: &mut [f32],
    faults: &mut [Atomic<u32>],
    total: &Sums,
    rows: &LaneRows,
    g: &Geometry,
    p: &Part,
    #[comptime] c: FlashConfig,
    #[comptime] f: Fragments,
) {
    let splits = comptime!(c.kernel.splits);
    let place = UNIT_POS as usize % 4usize;
    #[unroll]
    for half in 0..2usize {
        let row = p.first_row + lane_row() + comptime!(8 * half);
        if row < p.rows {
            let at = query_row(g, p, row);
            let (max, weight) = (rows.max[half], rows.weight[half]);
            let factor = close_row::<S>(sinks, sums, faults, at, max, weight, place == 0, g, p.split, c);
            let factor = factor * comptime!(if f.bf16 { 1.0 } else { 1.0 / LIFT });
            let start = (at * splits + p.split) * g.value_dim as usize;
            #[unroll]
            for j in 0..comptime!(4 * f.value_steps) {
                let block = total.index(j);
                let pair = block[half];
                #[unroll]
                for i in 0..2usize {
                    let column = place * 2usize + comptime!(8 * j + i);
                    if column < g.value_dim as usize {
                        store::<O>(out, start + column, pair.extract(i) * factor, c.out);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::tensor::SHARED;

    #[test]
    fn tiles_divide_among_units_and_fit() {
        for rows in [1, ROWS, ROWS + 1, 500] {
            for cache in [Codes::F16, Codes::BF16, Codes::F32] {
                for dims in [[16, 16], [64, 64], [96, 80], [128, 128], [192, 128], [64, 192], [256, 256]] {
                    let Some(f) = Fragments::of([Codes::F32; 2], [cache; 2], dims, rows) else {
                        let wide = dims.into_iter().any(|columns| columns > 128);
                        assert!(rows <= ROWS && (cache == Codes::F32 || wide), "{rows} {cache:?} {dims:?}");
                        continue;
                    };
                    let kernel = f.kernel();
                    assert_eq!(kernel.q_tile, 16 * f.planes);
                    for vectors in [4 * f.key_steps, 4 * f.value_steps] {
                        assert!((kernel.kv_tile * vectors).is_multiple_of(f.units()), "{f:?}");
                    }
                    let used = f.shared_bytes(kernel) + SHARED_BESIDE;
                    // Of 128 columns of 16 bits, three cubes fit the most recent devices.
                    let wide = cache == Codes::F32 || dims.into_iter().any(|columns| columns > 128);
                    assert!(used <= if wide { SHARED[3] } else { SHARED[3] / 3 }, "{f:?}: {used}");
                }
            }
        }
        let of = |io, cache, dims| Fragments::of(io, cache, dims, 500);
        assert_eq!(of([Codes::F32; 2], [Codes::F16, Codes::BF16], [64, 64]), None);
        assert_eq!(of([Codes::F32; 2], [Codes::Fp8; 2], [64, 64]), None);
        for dims in [[576, 512], [64, 8], [8, 64]] {
            assert_eq!(of([Codes::F32; 2], [Codes::F16; 2], dims), None);
        }
        let parts = |io, cache| of(io, [cache; 2], [64, 64]).map(|f| f.row_parts);
        assert_eq!(parts([Codes::F16; 2], Codes::F16), Some(1));
        assert_eq!(parts([Codes::BF16; 2], Codes::F16), Some(2));
        assert_eq!(parts([Codes::F16, Codes::F32], Codes::F16), Some(2));
    }
}

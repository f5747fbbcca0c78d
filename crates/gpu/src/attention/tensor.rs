//! The attention of [`super::flash`] with products of tensor cores (`m16n8k16`).
//!
//! A plane has sixteen rows: of few, a cube is one plane, and the keys are split. Keys and values of 16 bits are operands as
//! they are, queries and probabilities the sum of two, so that sums keep what f32 sums would. Queries that have the type of the
//! cache are one operand, and so are their probabilities. The exact mode has no more than that; beside it, probabilities of
//! f16 values are one operand and f32 keys and values sums of two bf16, which lose 2^-17.
//! Scores leave the products as the next products take probabilities: they stay in registers.
//!
//! The order in which a product sums is free: lane `4 g + t` takes columns `8 t .. 8 t + 8` of 32 of a row, one load of
//! 16 bytes, for two products. Values are transposed on their way into registers (`ldmatrix`).

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::ir::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;

use super::flash::{FlashConfig, Geometry, HIDDEN, LEAST, Part, bounded_and_masked, cache_row, close_row, query_row};
use super::rows::{Codes, Rows, load_eight};
use super::tile::AttentionKernel;
use crate::Gpu;
use crate::element::store;
use crate::halves::{inverse, pair, power, rest};
use crate::linear::exl3::rotate::has_planes;
use crate::reduce::max_of;

/// Rows of a plane.
const ROWS: usize = 16;
/// Columns of a step: a lane has eight of them.
const STEP: usize = 32;
/// Lanes of a plane.
const LANES: usize = 32;

/// Planes of a cube of more rows than one plane has.
const PLANES: usize = 4;

/// Widest rows whose sums stay in registers.
const MOST_COLUMNS: usize = 256;

/// The exponent of a row's largest query times its power of two.
const TOP: u32 = 14;
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
    /// Operands whose sum a query is.
    query_parts: usize,
    /// The same of probabilities.
    weight_parts: usize,
    /// Steps of a row of queries and keys.
    key_steps: usize,
    /// Steps of a row of values.
    value_steps: usize,
}

impl Fragments {
    /// Those for such rows of queries, keys and values, if the device has them.
    pub(super) fn new<R: Runtime>(
        gpu: &Gpu<R>,
        q: Codes,
        cache: [Codes; 2],
        [head_dim, value_dim]: [usize; 2],
        rows: usize,
    ) -> Option<(Self, AttentionKernel)> {
        let (bf16, cache_parts) = match cache {
            [Codes::F16, Codes::F16] => (false, 1),
            [Codes::BF16, Codes::BF16] => (true, 1),
            [Codes::F32, Codes::F32] if !gpu.is_exact() => (true, 2),
            _ => return None,
        };
        let planes = if rows <= ROWS { 1 } else { PLANES };
        // A plane alone holds a tile of keys and one of values beside its sums.
        let few = planes == 1 && (cache_parts > 1 || head_dim.max(value_dim) > MOST_COLUMNS / 2);
        if few || head_dim == 0 || head_dim > MOST_COLUMNS || value_dim > MOST_COLUMNS {
            return None;
        }
        let [key_steps, value_steps] = [head_dim, value_dim].map(|columns| columns.div_ceil(STEP));
        let same = cache_parts == 1 && q == cache[0];
        let query_parts = if same { 1 } else { 2 };
        let weight_parts = if same || (!bf16 && !gpu.is_exact()) { 1 } else { 2 };
        let fragments = Self { planes, bf16, cache_parts, query_parts, weight_parts, key_steps, value_steps };
        let kernel = fragments.kernel();
        let fits = fragments.shared_bytes(kernel) <= gpu.properties().hardware.max_shared_memory_size;
        (fits && has_products(gpu, fragments.elem())).then_some((fragments, kernel))
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

    /// Fewest keys of a split: enough for the loads ahead.
    pub(super) const fn least_keys(self) -> usize {
        128
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
        self.query_parts * self.rows() * self.key_pitch()
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
    let (ab, cd) = (elem.into(), ElemType::Float(FloatKind::F32).into());
    let config = MmaConfig { a_type: ab, b_type: ab, cd_type: cd, m: 16, n: 8, k: 16 };
    let matmul = &gpu.properties().features.matmul;
    has_planes(gpu) && matmul.mma.contains(&config) && matmul.ldmatrix.contains(&ab)
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

/// Loads a lane's words of a tile of keys: [block of eight keys, step].
#[cube]
#[allow(clippy::too_many_arguments)]
fn load_keys<K: Size, F: Float>(
    k: &[Vector<u32, K>],
    table: &[u32],
    words: &mut Array<Words>,
    g: &Geometry,
    p: &Part,
    first: usize,
    #[comptime] c: FlashConfig,
    #[comptime] f: Fragments,
) {
    let lane = UNIT_POS as usize % LANES;
    #[unroll]
    for j in 0..comptime!(c.kernel.kv_tile / 8) {
        let key = first + comptime!(8 * j) + lane / 4usize;
        let mut width = 0usize.runtime();
        let mut start = 0usize.runtime();
        if key < p.end {
            width = g.head_dim as usize;
            start = cache_row(table, g, p, key, c.paged) * g.k_stride as usize;
        }
        #[unroll]
        for step in 0..comptime!(f.key_steps) {
            let column = lane % 4usize * 8usize + comptime!(step * STEP);
            words[comptime!(j * f.key_steps + step)] = load_words::<K, F>(k, start, column, width, 0usize, c.k);
        }
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

/// Where vector `column` of a row of queries or keys lies: neighbouring rows in different banks.
#[cube]
fn place(row: usize, column: usize, #[comptime] f: Fragments) -> usize {
    let pitch = comptime!(f.key_pitch());
    if comptime!(pitch.is_multiple_of(8)) {
        row * pitch + (column ^ (row % 2usize * 4usize))
    } else {
        row * pitch + column
    }
}

/// What an operand leaves of a value; 0 of what is not finite.
#[cube]
fn finite_rest<F: Float>(value: f32) -> f32 {
    let near = f32::cast_from(F::cast_from(value));
    select(f32::abs(near) < f32::INFINITY, value - near, 0.0f32.runtime())
}

/// Part `part` of eight values.
#[cube]
fn words_of<F: Float>(values: &Array<f32>, #[comptime] part: usize) -> Words {
    let mut out = Words::empty();
    #[unroll]
    for i in 0..4usize {
        let (a, b) = (values[comptime!(2 * i)], values[comptime!(2 * i + 1)]);
        let word =
            if comptime!(part == 0) { pair::<F>(a, b) } else { pair::<F>(finite_rest::<F>(a), finite_rest::<F>(b)) };
        out.insert(i, u32::reinterpret(word));
    }
    out
}

/// Puts the plane's own rows of queries into shared memory: times a power of two where operands are f16, whose range is
/// small, and one over it beside them.
#[cube]
fn stage_queries<Q: Size, F: Float>(
    q: &[Vector<u32, Q>],
    queries: &mut Shared<[Words]>,
    inverses: &mut Shared<[f32]>,
    g: &Geometry,
    p: &Part,
    #[comptime] layout: Rows,
    #[comptime] f: Fragments,
) {
    let unit = UNIT_POS as usize;
    // Two lanes a row.
    let row = unit / 2usize;
    let mut width = 0usize.runtime();
    let mut start = 0usize.runtime();
    if p.first_row + row < p.rows {
        width = g.head_dim as usize;
        start = query_row(g, p, p.first_row + row) * width;
    }
    let mut factor = f32::new(1.0);
    if comptime!(!f.bf16) {
        let mut largest = f32::new(0.0);
        #[unroll]
        for i in 0..comptime!(2 * f.key_steps) {
            let column = unit % 2usize + comptime!(2 * i);
            let values = load_eight::<Q>(q, start, column * 8usize, width, layout);
            #[unroll]
            for j in 0..8usize {
                largest = max_of(largest, f32::abs(values[j]));
            }
        }
        factor = power(max_of(largest, plane_shuffle_xor(largest, 1u32)), TOP);
    }
    #[unroll]
    for i in 0..comptime!(2 * f.key_steps) {
        let column = unit % 2usize + comptime!(2 * i);
        let mut values = load_eight::<Q>(q, start, column * 8usize, width, layout);
        #[unroll]
        for j in 0..8usize {
            values[j] *= factor;
        }
        #[unroll]
        for part in 0..comptime!(f.query_parts) {
            let at = place(comptime!(part * f.rows()) + row, column, f);
            queries[at] = words_of::<F>(&values, part);
        }
    }
    if unit % 2usize == 0usize {
        inverses[row] = inverse(factor);
    }
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

/// Eight values of a row, as part `part` of an operand's.
#[cube]
fn load_words<N: Size, F: Float>(
    data: &[Vector<u32, N>],
    start: usize,
    column: usize,
    width: usize,
    #[comptime] part: usize,
    #[comptime] rows: Rows,
) -> Words {
    let mut out = Words::new(0u32);
    if comptime!(rows.line == 4 && rows.codes.bits() == 16) {
        if column < width {
            let line = data[(start + column) / 8usize];
            #[unroll]
            for i in 0..4usize {
                out.insert(i, line.extract(i));
            }
        }
    } else {
        out = words_of::<F>(&load_eight::<N>(data, start, column, width, rows), part);
    }
    out
}

/// Puts a tile of keys into shared memory, 0 behind the last.
#[cube]
#[allow(clippy::too_many_arguments)]
fn stage_keys<K: Size, F: Float>(
    k: &[Vector<u32, K>],
    table: &[u32],
    keys: &mut Shared<[Words]>,
    g: &Geometry,
    p: &Part,
    first: usize,
    #[comptime] c: FlashConfig,
    #[comptime] f: Fragments,
) {
    let tile = comptime!(c.kernel.kv_tile);
    #[unroll]
    for i in 0..comptime!(tile * f.key_pitch() / f.units()) {
        let at = UNIT_POS as usize + comptime!(i * f.units());
        let (row, column) = (at / comptime!(f.key_pitch()), at % comptime!(f.key_pitch()));
        let mut width = 0usize.runtime();
        let mut start = 0usize.runtime();
        if first + row < p.end {
            width = g.head_dim as usize;
            start = cache_row(table, g, p, first + row, c.paged) * g.k_stride as usize;
        }
        #[unroll]
        for part in 0..comptime!(f.cache_parts) {
            let words = load_words::<K, F>(k, start, column * 8usize, width, part, c.k);
            keys[place(comptime!(part * tile) + row, column, f)] = words;
        }
    }
}

/// Vector `i` of a unit's of a tile of values, [part, row, column]; 0 behind the last key.
#[cube]
#[allow(clippy::too_many_arguments)]
fn value_words<V: Size, F: Float>(
    v: &[Vector<u32, V>],
    table: &[u32],
    g: &Geometry,
    p: &Part,
    first: usize,
    #[comptime] i: usize,
    #[comptime] c: FlashConfig,
    #[comptime] f: Fragments,
) -> Words {
    let columns = comptime!(4 * f.value_steps);
    let each = comptime!(f.own_values(c.kernel) / f.cache_parts);
    let at = UNIT_POS as usize + comptime!(i % each * f.units());
    let (row, column) = (at / columns, at % columns);
    let mut width = 0usize.runtime();
    let mut start = 0usize.runtime();
    if first + row < p.end {
        width = g.value_dim as usize;
        start = cache_row(table, g, p, first + row, c.paged) * g.v_stride as usize;
    }
    load_words::<V, F>(v, start, column * 8usize, width, comptime!(i / each), c.v)
}

/// Puts it into shared memory.
#[cube]
fn store_value<F: Float>(
    values: &mut Shared<[Vector<F, Const<8>>]>,
    words: Words,
    #[comptime] i: usize,
    #[comptime] c: FlashConfig,
    #[comptime] f: Fragments,
) {
    let columns = comptime!(4 * f.value_steps);
    let each = comptime!(f.own_values(c.kernel) / f.cache_parts);
    let at = UNIT_POS as usize + comptime!(i % each * f.units());
    let row = comptime!(i / each * c.kernel.kv_tile) + at / columns;
    values[row * comptime!(f.value_pitch()) + at % columns] = Vector::<F, Const<8>>::reinterpret(words);
}

/// The operands of the plane's queries in a step: [part, half of the step].
#[cube]
fn query_operands<F: Float>(
    queries: &Shared<[Words]>,
    #[comptime] step: usize,
    #[comptime] f: Fragments,
) -> Sequence<Array<Pair<F>>> {
    let row = lane_row();
    let column = UNIT_POS as usize % 4usize + comptime!(4 * step);
    let mut out = Sequence::<Array<Pair<F>>>::new();
    #[unroll]
    for part in 0..comptime!(f.query_parts) {
        let near = queries[place(comptime!(part * f.rows()) + row, column, f)];
        let far = queries[place(comptime!(part * f.rows() + 8) + row, column, f)];
        #[unroll]
        for u in 0..2usize {
            let mut operand = Array::<Pair<F>>::new(4usize);
            operand[0] = Pair::<F>::reinterpret(near.extract(comptime!(2 * u)));
            operand[1] = Pair::<F>::reinterpret(far.extract(comptime!(2 * u)));
            operand[2] = Pair::<F>::reinterpret(near.extract(comptime!(2 * u + 1)));
            operand[3] = Pair::<F>::reinterpret(far.extract(comptime!(2 * u + 1)));
            out.push(operand);
        }
    }
    out
}

/// Adds the operands of a lane's words of eight keys: [half of the step].
#[cube]
fn push_operands<F: Float>(operands: &mut Sequence<Array<Pair<F>>>, words: Words) {
    #[unroll]
    for u in 0..2usize {
        let mut operand = Array::<Pair<F>>::new(2usize);
        operand[0] = Pair::<F>::reinterpret(words.extract(comptime!(2 * u)));
        operand[1] = Pair::<F>::reinterpret(words.extract(comptime!(2 * u + 1)));
        operands.push(operand);
    }
}

/// Adds the products of a step with `blocks` blocks of eight keys, [block, part, half of the step], to their scores, the
/// first of which is `first`. Blocks take turns, so that products that add to the same sum are apart.
#[cube]
fn multiply_blocks<F: Float>(
    lefts: &Sequence<Array<Pair<F>>>,
    rights: &Sequence<Array<Pair<F>>>,
    scores: &mut Sums,
    #[comptime] first: usize,
    #[comptime] blocks: usize,
    #[comptime] f: Fragments,
) {
    let mma = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    #[unroll]
    for u in 0..2usize {
        #[unroll]
        for a in 0..comptime!(f.query_parts) {
            #[unroll]
            for b in 0..comptime!(f.cache_parts) {
                // The product of two rests is less than what is lost anyway.
                if comptime!(a + b < 2) {
                    #[unroll]
                    for j in 0..blocks {
                        let left = lefts.index(comptime!(2 * a + u));
                        let right = rights.index(comptime!((j * f.cache_parts + b) * 2 + u));
                        mma.execute_inplace(left, right, scores.index_mut(comptime!(first + j)));
                    }
                }
            }
        }
    }
}

/// Products of the plane's queries and all keys of the tile, added to `scores`.
#[cube]
fn multiply_keys<F: Float>(
    queries: &Shared<[Words]>,
    keys: &Shared<[Words]>,
    scores: &mut Sums,
    #[comptime] c: FlashConfig,
    #[comptime] f: Fragments,
) {
    let tile = comptime!(c.kernel.kv_tile);
    let lane = UNIT_POS as usize % LANES;
    #[unroll]
    for step in 0..comptime!(f.key_steps) {
        let lefts = query_operands::<F>(queries, step, f);
        let column = lane % 4usize + comptime!(4 * step);
        #[unroll]
        for four in 0..comptime!(tile / 32) {
            let mut rights = Sequence::<Array<Pair<F>>>::new();
            #[unroll]
            for j in 0..4usize {
                #[unroll]
                for part in 0..comptime!(f.cache_parts) {
                    let key = comptime!(part * tile + 32 * four + 8 * j) + lane / 4usize;
                    push_operands::<F>(&mut rights, keys[place(key, column, f)]);
                }
            }
            multiply_blocks::<F>(&lefts, &rights, scores, comptime!(4 * four), 4usize, f);
        }
    }
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

/// The operands of the probabilities: [part, sixteen keys].
#[cube]
fn weights<F: Float>(scores: &Sums, #[comptime] c: FlashConfig, #[comptime] f: Fragments) -> Sequence<Array<Pair<F>>> {
    let lift = comptime!(if f.bf16 { 1.0 } else { LIFT });
    let mut out = Sequence::<Array<Pair<F>>>::new();
    #[unroll]
    for part in 0..comptime!(f.weight_parts) {
        #[unroll]
        for sixteen in 0..comptime!(c.kernel.kv_tile / 16) {
            let mut operand = Array::<Pair<F>>::new(4usize);
            #[unroll]
            for i in 0..4usize {
                let block = scores.index(comptime!(2 * sixteen + i / 2));
                let two = block[comptime!(i % 2)] * Vector::<f32, Const<2>>::new(lift);
                let (a, b) = (two.extract(0usize), two.extract(1usize));
                operand[i] = if comptime!(part == 0) { pair::<F>(a, b) } else { pair::<F>(rest::<F>(a), rest::<F>(b)) };
            }
            out.push(operand);
        }
    }
    out
}

/// Adds the tile's values, weighted. The products of a tile begin at 0 and are added in f32: tensor cores cut off what
/// they add to a sum.
#[cube]
fn add_values<F: Float>(
    values: &Shared<[Vector<F, Const<8>>]>,
    scores: &Sums,
    total: &mut Sums,
    rows: &mut LaneRows,
    #[comptime] c: FlashConfig,
    #[comptime] f: Fragments,
) {
    let mma = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    let tile = comptime!(c.kernel.kv_tile);
    let lefts = weights::<F>(scores, c, f);
    let lane = UNIT_POS as usize % LANES;
    // Addresses of four matrices of eight keys and eight columns: two of keys, then those of the next columns.
    let key = lane % 16usize;
    let column = lane / 16usize;
    #[unroll]
    for step in 0..comptime!(f.value_steps) {
        let mut fresh = zeros(4usize);
        #[unroll]
        for sixteen in 0..comptime!(tile / 16) {
            #[unroll]
            for b in 0..comptime!(f.cache_parts) {
                // [block of eight columns]
                let mut rights = Sequence::<Array<Pair<F>>>::new();
                #[unroll]
                for two in 0..2usize {
                    let at = (comptime!(b * tile + 16 * sixteen) + key) * comptime!(f.value_pitch())
                        + column
                        + comptime!(4 * step + 2 * two);
                    let matrices = mma.load_matrix::<Vector<F, Const<8>>, Const<2>>(
                        &values[at..at + 1],
                        MatrixIdent::B,
                        4usize,
                        true,
                    );
                    #[unroll]
                    for i in 0..2usize {
                        let mut right = Array::<Pair<F>>::new(2usize);
                        right[0] = matrices[comptime!(2 * i)];
                        right[1] = matrices[comptime!(2 * i + 1)];
                        rights.push(right);
                    }
                }
                #[unroll]
                for a in 0..comptime!(f.weight_parts) {
                    if comptime!(a + b < 2) {
                        #[unroll]
                        for j in 0..4usize {
                            let left = lefts.index(comptime!(a * (tile / 16) + sixteen));
                            mma.execute_inplace(left, rights.index(j), fresh.index_mut(j));
                        }
                    }
                }
            }
        }
        #[unroll]
        for j in 0..4usize {
            let sum = total.index_mut(comptime!(4 * step + j));
            let new = fresh.index(j);
            #[unroll]
            for half in 0..2usize {
                sum[half] = fma(sum[half], Vector::<f32, Const<2>>::new(rows.factor[half]), new[half]);
            }
        }
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
    let lane = UNIT_POS as usize % 4usize;
    #[unroll]
    for half in 0..2usize {
        let row = p.first_row + lane_row() + comptime!(8 * half);
        if row < p.rows {
            let at = query_row(g, p, row);
            let (max, weight) = (rows.max[half], rows.weight[half]);
            let factor = close_row::<S>(sinks, sums, faults, at, max, weight, lane == 0, g, p.split, c);
            let factor = factor * comptime!(if f.bf16 { 1.0 } else { 1.0 / LIFT });
            let start = (at * splits + p.split) * g.value_dim as usize;
            #[unroll]
            for j in 0..comptime!(4 * f.value_steps) {
                let block = total.index(j);
                let pair = block[half];
                #[unroll]
                for i in 0..2usize {
                    let column = lane * 2usize + comptime!(8 * j + i);
                    if column < g.value_dim as usize {
                        store::<O>(out, start + column, pair.extract(i) * factor, c.out);
                    }
                }
            }
        }
    }
}

//! Queries, keys and values on their way to the products: as words of two operands each, in shared memory or registers.

use cubecl::prelude::*;

use super::{Fragments, STEP, Words};
use crate::attention::flash::{FlashConfig, Geometry, Part, cache_row, query_row};
use crate::attention::rows::{Rows, load_eight};
use crate::halves::{TOP, finite_rest, inverse, pair, power};
use crate::linear::exl3::rotate::LANES;
use crate::reduce::max_of;

/// Loads a lane's words of a tile of keys: [block of eight keys, step].
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn load_keys<K: Size, F: Float>(
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
        let cached = row_of_key(table, g, p, key, g.head_dim, g.k_stride, c.paged);
        #[unroll]
        for step in 0..comptime!(f.key_steps) {
            let column = lane % 4usize * 8usize + comptime!(step * STEP);
            words[comptime!(j * f.key_steps + step)] = load_words::<K, F>(k, &cached, column, 0usize, c.k);
        }
    }
}

/// Where vector `column` of a row of queries or keys lies: neighbouring rows in different banks.
#[cube]
pub(super) fn place(row: usize, column: usize, #[comptime] f: Fragments) -> usize {
    let pitch = comptime!(f.key_pitch());
    if comptime!(pitch.is_multiple_of(8)) {
        row * pitch + (column ^ (row % 2usize * 4usize))
    } else {
        row * pitch + column
    }
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
pub(super) fn stage_queries<Q: Size, F: Float>(
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
        for part in 0..comptime!(f.row_parts) {
            let at = place(comptime!(part * f.rows()) + row, column, f);
            queries[at] = words_of::<F>(&values, part);
        }
    }
    if unit % 2usize == 0usize {
        inverses[row] = inverse(factor);
    }
}

/// Where a row of the cache begins, and how wide it is: 0 behind the last key, where rows may hold anything.
#[derive(CubeType)]
struct CacheRow {
    start: usize,
    width: usize,
}

#[cube]
fn row_of_key(
    table: &[u32],
    g: &Geometry,
    p: &Part,
    key: usize,
    width: u32,
    stride: u32,
    #[comptime] paged: bool,
) -> CacheRow {
    let mut row = CacheRow { start: 0usize.runtime(), width: 0usize.runtime() };
    if key < p.end {
        row.width = width as usize;
        row.start = cache_row(table, g, p, key, paged) * stride as usize;
    }
    row
}

/// Eight values of a row as operands: their part `part`.
#[cube]
fn load_words<N: Size, F: Float>(
    data: &[Vector<u32, N>],
    row: &CacheRow,
    column: usize,
    #[comptime] part: usize,
    #[comptime] rows: Rows,
) -> Words {
    let mut out = Words::new(0u32);
    if comptime!(rows.line == 4 && rows.codes.bits() == 16) {
        if column < row.width {
            let line = data[(row.start + column) / 8usize];
            #[unroll]
            for i in 0..4usize {
                out.insert(i, line.extract(i));
            }
        }
    } else {
        out = words_of::<F>(&load_eight::<N>(data, row.start, column, row.width, rows), part);
    }
    out
}

/// Puts a tile of keys into shared memory, 0 behind the last.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn stage_keys<K: Size, F: Float>(
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
        let cached = row_of_key(table, g, p, first + row, g.head_dim, g.k_stride, c.paged);
        #[unroll]
        for part in 0..comptime!(f.cache_parts) {
            let words = load_words::<K, F>(k, &cached, column * 8usize, part, c.k);
            keys[place(comptime!(part * tile) + row, column, f)] = words;
        }
    }
}

/// Vector `i` of a unit's of a tile of values, [part, row, column]; 0 behind the last key.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn value_words<V: Size, F: Float>(
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
    let cached = row_of_key(table, g, p, first + row, g.value_dim, g.v_stride, c.paged);
    load_words::<V, F>(v, &cached, column * 8usize, comptime!(i / each), c.v)
}

/// Puts vector `i` of a unit's of a tile of values into shared memory.
#[cube]
pub(super) fn store_value<F: Float>(
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

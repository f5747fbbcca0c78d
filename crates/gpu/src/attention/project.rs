//! `kv_b` applied to queries, to sums and to cache rows. Head h has the columns `h (n + v)..`: n of keys, v of values.
//!
//! [`absorb`] and [`value`] see an EXL3 `kv_b` between its rotations: queries, sums and results are rotated (`rotated`),
//! and the columns of a head are whole spans of 128.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_formats::exl3::HADAMARD;

use super::rows::{Rows, load_eight, load_one};
use crate::decode::{Decoder, decode_unit, group_scale, group_zero, weight_of};
use crate::element::{Storage, load, store};
use crate::launch::UNITS;

/// Parts of the n key rows of a head, of which each unit of [`absorb`] sums one.
const ABSORB_SLICES: usize = 8;

/// Columns of values of a cube of [`value`].
pub(super) const VALUE_COLUMNS: usize = 32;
/// Parts of the r latent values, of which each unit of [`value`] sums one.
const VALUE_SLICES: usize = UNITS as usize / VALUE_COLUMNS;

/// Latent values of a step of [`expand`]; a whole number of units of every format.
const EXPAND_FEATURES: usize = 32;

/// What [`absorb`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) struct AbsorbConfig {
    pub(super) q: Storage,
    pub(super) decoder: Decoder,
}

/// A head's columns begin at a multiple of this.
const fn span(decoder: Decoder) -> usize {
    if decoder.is_trellis() { HADAMARD } else { 1 }
}

/// Weight units of a cube of [`absorb`].
pub(super) const fn absorb_units() -> usize {
    UNITS as usize / ABSORB_SLICES
}

/// The weights of a unit of column `n`, 0 beyond feature `rank`.
#[cube]
#[allow(clippy::too_many_arguments)]
fn weights<S: Numeric>(
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    unit: usize,
    n: usize,
    columns: usize,
    #[comptime] d: Decoder,
) -> Array<f32> {
    let mut out = decode_unit(words, table, 0usize, unit, n, columns, d);
    if comptime!(d.group_size > 0) {
        let group = unit * comptime!(d.unit()) / comptime!(d.group_size);
        let scale = group_scale::<S>(scales, table, group * columns + n, d);
        let zero = group_zero::<S>(zeros, group * columns + n, d);
        #[unroll]
        for i in 0..comptime!(d.unit()) {
            out[i] = weight_of(out[i], scale, zero, d);
        }
    }
    out
}

/// `out[row] = [sum_n q_n U_n (r) | q_pe]` for rows of queries and heads; a head has `of_head` of all `columns`. A cube has a row and [`absorb_units`] units.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn absorb<Q: Numeric, S: Numeric>(
    q: &[Q],
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    out: &mut [f32],
    rows: u32,
    heads: u32,
    of_head: u32,
    columns: u32,
    nope: u32,
    rope: u32,
    rank: u32,
    blocks: u32,
    #[comptime] c: AbsorbConfig,
    #[define(Q, S)] _elements: [ElemType; 2],
) {
    if CUBE_POS < (rows * heads * blocks) as usize {
        let unit_len = comptime!(c.decoder.unit());
        let cube_len = comptime!(absorb_units() * c.decoder.unit());
        let block = CUBE_POS % blocks as usize;
        let row = CUBE_POS / blocks as usize;
        let columns = columns as usize;
        let first = row % heads as usize * of_head as usize / comptime!(span(c.decoder)) * comptime!(span(c.decoder));
        let count = select(first + nope as usize > columns, columns - first, nope as usize);
        let q_start = row * (nope + rope) as usize;
        let out_start = row * (rank + rope) as usize;
        // Neighbours read neighbouring columns.
        let slice = UNIT_POS as usize % ABSORB_SLICES;
        let place = UNIT_POS as usize / ABSORB_SLICES;
        let unit = block * comptime!(absorb_units()) + place;
        let mut sum = Array::<f32>::new(unit_len);
        #[unroll]
        for i in 0..unit_len {
            sum[i] = 0.0;
        }
        if unit * unit_len < rank as usize {
            let mut n = slice;
            while n < count {
                let w = weights::<S>(words, scales, zeros, table, unit, first + n, columns, c.decoder);
                let x = load::<Q>(q, q_start + n, c.q);
                #[unroll]
                for i in 0..unit_len {
                    sum[i] += x * w[i];
                }
                n += ABSORB_SLICES;
            }
        }
        let mut partial = Shared::<[f32]>::new_slice(comptime!(UNITS as usize * c.decoder.unit()));
        #[unroll]
        for i in 0..unit_len {
            partial[slice * cube_len + place * unit_len + i] = sum[i];
        }
        sync_cube();
        let mut i = UNIT_POS as usize;
        while i < cube_len {
            let mut total = partial[i];
            for slice in 1..ABSORB_SLICES {
                total += partial[slice * cube_len + i];
            }
            if block * cube_len + i < rank as usize {
                out[out_start + block * cube_len + i] = total;
            }
            i += UNITS as usize;
        }
        let mut i = UNIT_POS as usize;
        while block == 0 && i < rope as usize {
            out[out_start + rank as usize + i] = load::<Q>(q, q_start + nope as usize + i, c.q);
            i += UNITS as usize;
        }
    }
}

/// `out[row] = V sums[row]` for rows of queries and heads; V begins `offset` columns after its head does. A cube has a row and [`VALUE_COLUMNS`] columns.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn value<S: Numeric, O: Numeric>(
    sums: &[f32],
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    out: &mut [O],
    rows: u32,
    heads: u32,
    of_head: u32,
    offset: u32,
    columns: u32,
    value: u32,
    rank: u32,
    blocks: u32,
    #[comptime] d: Decoder,
    #[comptime] storage: Storage,
    #[define(S, O)] _elements: [ElemType; 2],
) {
    if CUBE_POS < (rows * heads * blocks) as usize {
        let block = CUBE_POS % blocks as usize;
        let row = CUBE_POS / blocks as usize;
        let columns = columns as usize;
        let rank = rank as usize;
        let lane = UNIT_POS as usize % VALUE_COLUMNS;
        let column = block * VALUE_COLUMNS + lane;
        let first = row % heads as usize * of_head as usize + offset as usize;
        let n = first / comptime!(span(d)) * comptime!(span(d)) + column;
        let mut sum = f32::new(0.0);
        if column < value as usize && n < columns {
            let mut unit = UNIT_POS as usize / VALUE_COLUMNS;
            while unit * comptime!(d.unit()) < rank {
                let w = weights::<S>(words, scales, zeros, table, unit, n, columns, d);
                let first = unit * comptime!(d.unit());
                #[unroll]
                for i in 0..comptime!(d.unit()) {
                    // The last unit of an odd rank has a feature that does not exist.
                    if first + i < rank {
                        sum += w[i] * sums[row * rank + first + i];
                    }
                }
                unit += VALUE_SLICES;
            }
        }
        let mut partial = Shared::<[f32]>::new_slice(UNITS as usize);
        partial[UNIT_POS as usize] = sum;
        sync_cube();
        if (UNIT_POS as usize) < VALUE_COLUMNS && column < value as usize {
            let mut total = sum;
            for slice in 1..VALUE_SLICES {
                total += partial[slice * VALUE_COLUMNS + lane];
            }
            store::<O>(out, row * value as usize + column, total, storage);
        }
    }
}

/// What [`expand`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) struct ExpandConfig {
    /// By words.
    pub(super) cache: Rows,
    pub(super) decoder: Decoder,
    /// Cache rows and columns of `kv_b` of a cube.
    pub(super) rows: usize,
    pub(super) columns: usize,
}

/// `keys[b, h, j] = [U_h c_j | k_pe_j]` and `values[b, h, j] = V_h c_j` for `count` heads from `first_head` on. A cube
/// has a tile of cache rows and columns of one head; each unit 4 by 4 of them.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn expand<N: Size, S: Numeric>(
    cache: &[Vector<u32, N>],
    kv_len: &[u32],
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    keys: &mut [f32],
    values: &mut [f32],
    batch: u32,
    first_head: u32,
    count: u32,
    heads: u32,
    nope: u32,
    rope: u32,
    value: u32,
    rank: u32,
    capacity: u32,
    longest: u32,
    #[comptime] c: ExpandConfig,
    #[define(S)] _element: ElemType,
) {
    let row_blocks = (longest as usize).div_ceil(c.rows);
    let column_blocks = ((nope + value) as usize).div_ceil(c.columns);
    if CUBE_POS < batch as usize * count as usize * row_blocks * column_blocks {
        let column_block = CUBE_POS % column_blocks;
        let rest = CUBE_POS / column_blocks;
        let row_block = rest % row_blocks;
        let head = rest / row_blocks % count as usize;
        let b = rest / row_blocks / count as usize;
        let first_row = row_block * c.rows;
        let len = kv_len[b] as usize;
        let rank = rank as usize;
        let width = rank + rope as usize;
        let of_head = (nope + value) as usize;
        let first_column = column_block * c.columns;
        let all_columns = heads as usize * of_head;
        let mut rows = Shared::<[f32]>::new_slice(comptime!(c.rows * (EXPAND_FEATURES + 1)));
        let mut weight = Shared::<[f32]>::new_slice(comptime!(EXPAND_FEATURES * c.columns));
        let lanes = comptime!(c.columns / 4);
        let lane = UNIT_POS as usize % lanes;
        let group = UNIT_POS as usize / lanes * 4;
        let mut sum = Array::<f32>::new(16usize);
        #[unroll]
        for i in 0..16usize {
            sum[i] = 0.0;
        }
        let mut feature = 0usize.runtime();
        while feature < rank {
            sync_cube();
            load_latent::<N>(
                cache,
                &mut rows,
                (b * capacity as usize + first_row) * width,
                len,
                first_row,
                feature,
                rank,
                width,
                c,
            );
            let mut i = UNIT_POS as usize;
            while i < comptime!(EXPAND_FEATURES / c.decoder.unit() * c.columns) {
                let column = i % c.columns;
                let unit = i / c.columns;
                let first = unit * comptime!(c.decoder.unit());
                let mut w = Array::<f32>::new(comptime!(c.decoder.unit()));
                #[unroll]
                for x in 0..comptime!(c.decoder.unit()) {
                    w[x] = 0.0;
                }
                if first_column + column < of_head && feature + first < rank {
                    let n = (first_head as usize + head) * of_head + first_column + column;
                    let unit = (feature + first) / comptime!(c.decoder.unit());
                    let read = weights::<S>(words, scales, zeros, table, unit, n, all_columns, c.decoder);
                    #[unroll]
                    for x in 0..comptime!(c.decoder.unit()) {
                        w[x] = read[x];
                    }
                }
                #[unroll]
                for x in 0..comptime!(c.decoder.unit()) {
                    weight[(first + x) * c.columns + column] = w[x];
                }
                i += UNITS as usize;
            }
            sync_cube();
            for k in 0..EXPAND_FEATURES {
                let mut w = Array::<f32>::new(4usize);
                #[unroll]
                for x in 0..4usize {
                    w[x] = weight[k * c.columns + lane + comptime!(x * (c.columns / 4))];
                }
                #[unroll]
                for y in 0..4usize {
                    let latent = rows[(group + y) * comptime!(EXPAND_FEATURES + 1) + k];
                    #[unroll]
                    for x in 0..4usize {
                        sum[comptime!(y * 4 + x)] += latent * w[x];
                    }
                }
            }
            feature += EXPAND_FEATURES;
        }
        let first_out = (b * count as usize + head) * longest as usize + first_row;
        let key_width = (nope + rope) as usize;
        #[unroll]
        for y in 0..4usize {
            #[unroll]
            for x in 0..4usize {
                let column = first_column + lane + comptime!(x * (c.columns / 4));
                let row = first_out + group + y;
                if first_row + group + y < len && column < of_head {
                    if column < nope as usize {
                        keys[row * key_width + column] = sum[comptime!(y * 4 + x)];
                    } else {
                        values[row * value as usize + column - nope as usize] = sum[comptime!(y * 4 + x)];
                    }
                }
            }
        }
        let mut i = UNIT_POS as usize;
        while column_block == 0 && i < c.rows * rope as usize {
            let row = i / rope as usize;
            let column = i % rope as usize;
            if first_row + row < len {
                let at = (b * capacity as usize + first_row + row) * width + rank + column;
                keys[(first_out + row) * key_width + nope as usize + column] = load_one::<N>(cache, at, c.cache);
            }
            i += UNITS as usize;
        }
    }
}

/// Features `feature..` of the tile's cache rows, 0 beyond the last row and feature.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load_latent<N: Size>(
    cache: &[Vector<u32, N>],
    rows: &mut Shared<[f32]>,
    start: usize,
    len: usize,
    first_row: usize,
    feature: usize,
    rank: usize,
    width: usize,
    #[comptime] c: ExpandConfig,
) {
    let eights = comptime!(EXPAND_FEATURES / 8);
    let mut i = UNIT_POS as usize;
    while i < comptime!(c.rows * (EXPAND_FEATURES / 8)) {
        let row = i / eights;
        let eight = i % eights;
        let used = select(first_row + row < len, rank, 0usize.runtime());
        let at = select(first_row + row < len, start + row * width, 0usize.runtime());
        let read = load_eight::<N>(cache, at, feature + eight * 8, used, c.cache);
        #[unroll]
        for x in 0..8usize {
            rows[row * comptime!(EXPAND_FEATURES + 1) + eight * 8 + x] = read[x];
        }
        i += UNITS as usize;
    }
}

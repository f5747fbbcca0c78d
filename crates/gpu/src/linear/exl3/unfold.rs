//! Weights with both rotations applied: for embeddings and for weights as matrices. A cube computes 128 input features of
//! one output feature from the 128 x 128 weights between the rotations.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use half::f16;
use marlin_formats::exl3::HADAMARD;
use marlin_ops::{Result, Tensor};

use super::rotate::{LANES, NORM, has_planes, transform};
use crate::Gpu;
use crate::decode::Trellis;
use crate::decode::exl3::{SIDE, pair_position, pair_state, pair_words, value};
use crate::element::{Storage, store};
use crate::fault::{self, Fault};
use crate::launch::{UNITS, cubes, units};
use crate::weight::GpuWeight;

/// What [`unfold_rows`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct UnfoldConfig {
    trellis: Trellis,
    out: Storage,
    /// Output features are listed; otherwise they are neighbours.
    listed: bool,
    /// `out[k, row]` instead of `out[row, k]`.
    transposed: bool,
    planes: bool,
}

/// `out[row, k]` of output feature `ids[row]` or `first + row`; an id that is no output feature is a fault and writes
/// nothing. A cube has 128 features of a row.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn unfold_rows<O: Numeric>(
    ids: &[u32],
    words: &[u32],
    table: &[f32],
    suh: &[f16],
    svh: &[f16],
    out: &mut [O],
    faults: &mut [Atomic<u32>],
    rows: u32,
    first: u32,
    k: u32,
    n: u32,
    blocks: u32,
    tile_columns: u32,
    #[comptime] c: UnfoldConfig,
    #[define(O)] _element: ElemType,
) {
    let (rows, k, n, blocks) = (rows as usize, k as usize, n as usize, blocks as usize);
    let (row, block) = (CUBE_POS / blocks, CUBE_POS % blocks);
    let mut column_sums = Shared::<[f32]>::new_slice(2 * HADAMARD);
    if row < rows {
        let mut column = first as usize + row;
        if comptime!(c.listed) {
            column = ids[row] as usize;
            if column >= n && block == 0usize && UNIT_POS == 0 {
                fault::record(faults, Fault::EmbeddingId, row);
            }
        }
        if column < n {
            // Each unit adds up one pair of columns of one tile, with the signs of the output feature; there are 64 pairs
            // in each of 8 tile rows, so a unit has four of them.
            let unit = UNIT_POS as usize;
            let (pair, lane_k) = (unit % 64usize, unit / 64usize);
            let tile_column = column / HADAMARD * comptime!(HADAMARD / SIDE) + pair / 8usize;
            let near = pair / 8usize * SIDE + pair % 8usize;
            let signed = column % HADAMARD;
            let sign = sign_of(signed, near);
            let far_sign = sign_of(signed, near + 8usize);
            let mut feature = Array::<f32>::new(4usize);
            #[unroll]
            for i in 0..4usize {
                feature[i] = f32::new(0.0);
            }
            let mut products = Shared::<[f32]>::new_slice(comptime!(SIDE * UNITS as usize));
            for step in 0..4usize {
                let tile_row = block * comptime!(HADAMARD / SIDE) + step * 2usize + lane_k;
                let tile = tile_row * tile_columns as usize + tile_column;
                let loaded = pair_words(words, tile * comptime!(c.trellis.tile_words()), pair % 8usize, c.trellis);
                #[unroll]
                for r in 0..SIDE {
                    let p = comptime!(pair_position(r));
                    let a = value(pair_state(&loaded, p, c.trellis), table, c.trellis.codebook);
                    let b = value(pair_state(&loaded, comptime!(p + 4), c.trellis), table, c.trellis.codebook);
                    products[comptime!(r * UNITS as usize) + unit] = a * sign + b * far_sign;
                }
                sync_cube();
                // 32 rows of 64 sums.
                if unit < 32usize {
                    let at = unit % SIDE * comptime!(UNITS as usize) + unit / SIDE * 64usize;
                    let mut sum = f32::new(0.0);
                    for i in 0..64usize {
                        sum += products[at + i];
                    }
                    column_sums[step * 32usize + unit] = sum;
                }
                sync_cube();
            }
            let lane = unit % LANES;
            #[unroll]
            for i in 0..4usize {
                feature[i] = column_sums[lane * 4usize + i];
            }
            transform(&mut feature, c.planes);
            if unit < LANES {
                let scale = f32::cast_from(svh[column]) * comptime!(NORM * NORM);
                #[unroll]
                for i in 0..4usize {
                    let at = block * HADAMARD + lane * 4usize + i;
                    if at < k {
                        let weight = feature[i] * f32::cast_from(suh[at]) * scale;
                        if comptime!(c.transposed) {
                            store::<O>(out, at * rows + row, weight, c.out);
                        } else {
                            store::<O>(out, row * k + at, weight, c.out);
                        }
                    }
                }
            }
        }
    }
}

/// An element of the Hadamard matrix of order 128.
#[cube]
fn sign_of(row: usize, column: usize) -> f32 {
    select(((row & column) as u32).count_ones() & 1u32 == 0u32, f32::new(1.0), f32::new(-1.0))
}

/// The output features to unfold.
pub(crate) enum Rows<'a, R: Runtime> {
    /// From this one on.
    From(usize),
    /// `[rows]` u32.
    Listed(&'a Tensor<Gpu<R>>),
}

/// Where they go.
pub(crate) struct Unfolded<'a, R: Runtime> {
    pub(crate) out: &'a Tensor<Gpu<R>>,
    pub(crate) rows: usize,
    /// `[K, rows]` instead of `[rows, K]`.
    pub(crate) transposed: bool,
}

/// Enqueues the kernel.
pub(crate) fn unfold<R: Runtime>(
    gpu: &Gpu<R>,
    weight: &GpuWeight,
    trellis: Trellis,
    features: &Rows<'_, R>,
    to: &Unfolded<'_, R>,
) -> Result<()> {
    let out = Storage::of(to.out.dtype());
    let (ids, first, listed) = match features {
        Rows::From(first) => (gpu.unread(), *first, false),
        Rows::Listed(ids) => (ids.buffer().arg(ids.elements()), 0, true),
    };
    let config = UnfoldConfig { trellis, out, listed, transposed: to.transposed, planes: has_planes(gpu) };
    let blocks = weight.padded_in() / HADAMARD;
    // SAFETY: the buffers hold what the weight says, out rows * K elements; ids are compared with N, features with K.
    unsafe {
        unfold_rows::launch_unchecked::<R>(
            gpu.client(),
            cubes(to.rows * blocks),
            units(),
            ids,
            weight.words.arg(weight.word_count),
            weight.table.arg(weight.table_len),
            weight.scales.arg(weight.scale_count),
            weight.zeros.arg(weight.zero_count),
            to.out.buffer().arg(to.out.elements()),
            gpu.faults(),
            to.rows as u32,
            first as u32,
            weight.in_features as u32,
            weight.out_features as u32,
            blocks as u32,
            (weight.padded_out() / SIDE) as u32,
            config,
            out.elem(),
        );
    }
    Ok(())
}

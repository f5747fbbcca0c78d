//! More than a few rotated f16 rows on tensor cores (`m16n8k16` of planes of 32): a cube stages its rows in shared memory,
//! while every plane has 32 columns of its own, whose words it loads and decodes. So many rows that their weights would be
//! decoded again and again multiply operands that were decoded before.

use std::ops::Range;

use cubecl::prelude::*;
use half::f16;
use marlin_formats::DType;
use marlin_formats::exl3::HADAMARD;
use marlin_ops::{Result, Tensor};

use super::check_shared;
use super::fragment::{Constants, Lane, decode_lane, lane_word, new_lane};
use crate::decode::Trellis;
use crate::decode::exl3::SIDE;
use crate::linear::exl3::rotate::{self, Channels, LANES};
use crate::linear::operands::Product;
use crate::linear::tensor::stage::{Stage, first_vectors, load_x, multiply_step, rows_from, store_x, zero_sums};
use crate::linear::{grid, limit};
use crate::{Buffer, Gpu};

/// Input features of a step: two rows of tiles.
const STEP: usize = 2 * SIDE;
/// Output features of a plane: two columns of tiles.
const PLANE_COLUMNS: usize = 2 * SIDE;
/// Neighbouring tiles that a plane decodes, and planes of a cube of [`decode_tiles`]: both divide the tiles of a block.
const DECODED: usize = HADAMARD / SIDE;
/// Most rows whose weights are decoded where they are multiplied.
const MOST_DECODING: usize = 256;
/// Most decoded weights at a time: 256 MiB.
const MOST_DECODED: usize = 1 << 27;

/// Operands of columns of tiles from `first_tile_column` on, `[tile row, tile column, lane]`; a vector is a lane's part of a
/// tile.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn decode_tiles(
    words: &[u32],
    out: &mut [Vector<u32, Const<4>>],
    first_tile_column: u32,
    chunk_tile_columns: u32,
    tile_columns: u32,
    constants: Constants,
    #[comptime] t: Trellis,
) {
    let unit = UNIT_POS_X as usize;
    let runs = chunk_tile_columns as usize / DECODED;
    let run = CUBE_POS * DECODED + UNIT_POS_Y as usize;
    let (tile_row, column) = (run / runs, run % runs * DECODED);
    let tile = tile_row * tile_columns as usize + first_tile_column as usize + column;
    let lane = new_lane(&constants, t);
    let count = comptime!(t.lane_words());
    let mut loaded = Array::<u32>::new(comptime!(DECODED * t.lane_words()));
    #[unroll]
    for i in 0..count {
        let word = lane_word(unit, i, t);
        #[unroll]
        for j in 0..DECODED {
            loaded[comptime!(j * count + i)] = words[(tile + j) * comptime!(t.tile_words()) + word];
        }
    }
    #[unroll]
    for j in 0..DECODED {
        let values = decode_lane(&loaded, &lane, comptime!(j * count), t);
        let mut vector = Vector::<u32, Const<4>>::empty();
        #[unroll]
        for r in 0..4usize {
            vector.insert(r, u32::reinterpret(values[r]));
        }
        out[(tile_row * chunk_tile_columns as usize + column + j) * LANES + unit] = vector;
    }
}

/// What [`multiply_rows`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct TileConfig {
    /// Blocks of 8 rows of a cube, an even number.
    row_blocks: usize,
    /// Planes of a cube, side by side.
    planes: usize,
    /// Steps in shared memory at a time: 2 or 4. There are two such stages.
    steps: usize,
    trellis: Trellis,
    /// Weights were decoded by [`decode_tiles`]; otherwise they come as words.
    decoded: bool,
}

impl TileConfig {
    const fn rows(self) -> usize {
        8 * self.row_blocks
    }

    const fn columns(self) -> usize {
        PLANE_COLUMNS * self.planes
    }

    /// Words of a tile, or vectors of its operands.
    const fn tile_stride(self) -> usize {
        if self.decoded { LANES } else { self.trellis.tile_words() }
    }

    /// Words that a lane has of a tile.
    const fn lane_words(self) -> usize {
        if self.decoded { 4 } else { self.trellis.lane_words() }
    }

    /// How rows of x lie in shared memory.
    const fn stage(self) -> Stage {
        Stage { rows: self.rows(), parts: 1, steps: self.steps, units: LANES * self.planes, paired: false }
    }

    const fn shared_bytes(self) -> usize {
        2 * self.stage().vectors() * 16
    }
}

/// `partials [slice, m, n]` of output features from `first_column` on; cubes `[rows, columns, slices]`. x is `[m, k]` in the
/// order of [`Channels::FragmentPairs`]. Weights have `tile_columns` of tiles: all words, or the operands of these columns.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn multiply_rows(
    words: &[u32],
    operands: &[Vector<u32, Const<4>>],
    x: &[Vector<u32, Const<4>>],
    partials: &mut [f32],
    m: u32,
    k: u32,
    n: u32,
    first_column: u32,
    tile_columns: u32,
    slices: u32,
    constants: Constants,
    #[comptime] c: TileConfig,
) {
    let unit = UNIT_POS_X as usize;
    let (g, t) = (unit / 4, unit % 4);
    let plane = UNIT_POS_Y as usize;
    let stager = plane * LANES + unit;
    let lane = new_lane(&constants, c.trellis);
    let pair = CUBE_POS_Y as usize * comptime!(c.planes) + plane;
    let row_stride = tile_columns as usize * comptime!(c.tile_stride());
    let places = tile_places(unit, pair, c);
    let all = k as usize / comptime!(STEP * c.steps);
    let slice = CUBE_POS_Z as usize;
    let first = slice * all / slices as usize;
    let stages = (slice + 1) * all / slices as usize;
    let mut shared = Shared::<[Vector<u32, Const<4>>]>::new_aligned_slice(comptime!(2 * c.stage().vectors()), 16usize);
    let mut sums = zero_sums(c.row_blocks);
    let rows = rows_from(stager, CUBE_POS_X as usize * comptime!(c.rows()), m as usize, comptime!(c.stage()));
    let rows = first_vectors(stager, &rows, m, k, comptime!(c.stage()));
    let mut xv = Array::<Vector<u32, Const<4>>>::new(comptime!(c.stage().own()));
    let mut w = Array::<u32>::new(comptime!(4 * c.steps * c.lane_words()));
    #[unroll]
    for step in 0..comptime!(c.steps) {
        load_tiles(words, operands, &mut w, &places, first, row_stride, step, c);
        load_x(x, &mut xv, &rows, first, step, comptime!(c.stage()));
        store_x(&mut shared, &xv, 0usize, stager, step, comptime!(c.stage()));
    }
    sync_cube();
    let mut buffer = 0usize.runtime();
    for stage in first..stages {
        // The last turn loads its own stage again.
        let next = select(stage + 1 < stages, stage + 1, stage);
        #[unroll]
        for step in 0..comptime!(c.steps) {
            load_x(x, &mut xv, &rows, next, step, comptime!(c.stage()));
            let weights = step_operands(&w, &lane, step, c);
            load_tiles(words, operands, &mut w, &places, next, row_stride, step, c);
            let from = buffer * comptime!(c.stage().vectors()) + comptime!(4 * c.rows() * step) + g * 4 + t;
            multiply_step::<f16>(&shared, &mut sums, &weights, from, c.row_blocks);
            store_x(&mut shared, &xv, buffer ^ 1, stager, step, comptime!(c.stage()));
        }
        sync_cube();
        buffer ^= 1;
    }
    let row0 = CUBE_POS_X as usize * comptime!(c.rows()) + t * 2;
    let column0 = first_column as usize + pair * PLANE_COLUMNS + g;
    #[unroll]
    for i in 0..comptime!(2 * c.row_blocks) {
        let sum = sums.index(i);
        #[unroll]
        for e in 0..2usize {
            let row = row0 + comptime!(i / 2 * 8) + e;
            if row < m as usize {
                #[unroll]
                for half in 0..2usize {
                    let column = column0 + comptime!(i % 2 * SIDE + half * 8);
                    partials[(slice * m as usize + row) * n as usize + column] = sum[half].extract(e);
                }
            }
        }
    }
}

/// Where a lane reads in a row of tiles: each of its words of the first of two tiles, or the operands.
#[cube]
fn tile_places(unit: usize, pair: usize, #[comptime] c: TileConfig) -> Array<usize> {
    let count = comptime!(if c.decoded { 1 } else { c.trellis.lane_words() });
    let mut places = Array::<usize>::new(count);
    #[unroll]
    for i in 0..count {
        let own = if comptime!(c.decoded) { unit } else { lane_word(unit, i, c.trellis) };
        places[i] = pair * comptime!(2 * c.tile_stride()) + own;
    }
    places
}

/// Loads a lane's words of a step: [tile row, tile column, word].
#[cube]
#[allow(clippy::too_many_arguments)]
fn load_tiles(
    words: &[u32],
    operands: &[Vector<u32, Const<4>>],
    w: &mut Array<u32>,
    places: &Array<usize>,
    stage: usize,
    row_stride: usize,
    #[comptime] step: usize,
    #[comptime] c: TileConfig,
) {
    #[unroll]
    for r in 0..2usize {
        let row = (stage * comptime!(2 * c.steps) + comptime!(2 * step + r)) * row_stride;
        #[unroll]
        for j in 0..2usize {
            let first = comptime!((4 * step + 2 * r + j) * c.lane_words());
            if comptime!(c.decoded) {
                let vector = operands[row + places[0] + comptime!(j * c.tile_stride())];
                #[unroll]
                for i in 0..4usize {
                    w[comptime!(first + i)] = vector.extract(i);
                }
            } else {
                #[unroll]
                for i in 0..comptime!(c.lane_words()) {
                    w[comptime!(first + i)] = words[row + places[i] + comptime!(j * c.tile_stride())];
                }
            }
        }
    }
}

/// The operands of a step: [tile column, tile row].
#[cube]
fn step_operands(
    w: &Array<u32>,
    lane: &Lane,
    #[comptime] step: usize,
    #[comptime] c: TileConfig,
) -> Sequence<Array<Vector<f16, Const<2>>>> {
    let mut weights = Sequence::<Array<Vector<f16, Const<2>>>>::new();
    #[unroll]
    for i in 0..4usize {
        let first = comptime!((4 * step + i % 2 * 2 + i / 2) * c.lane_words());
        if comptime!(c.decoded) {
            let mut operand = Array::<Vector<f16, Const<2>>>::new(4usize);
            #[unroll]
            for r in 0..4usize {
                operand[r] = Vector::<f16, Const<2>>::reinterpret(w[comptime!(first + r)]);
            }
            weights.push(operand);
        } else {
            weights.push(decode_lane(w, lane, first, c.trellis));
        }
    }
    weights
}

/// Shape of a launch.
pub(in crate::linear::exl3) struct Plan {
    config: TileConfig,
    /// Slices of K.
    pub(in crate::linear::exl3) slices: usize,
    /// Columns that are decoded at a time, or all.
    pub(in crate::linear::exl3) columns: usize,
}

impl Plan {
    /// Tiles as tall as there are rows, and slices of K that fill the device; by what was measured on an H200.
    pub(in crate::linear::exl3) fn new<R: Runtime>(gpu: &Gpu<R>, product: &Product<'_, R>, trellis: Trellis) -> Self {
        let (m, n, k) = (product.x.rows(), product.weight.padded_out(), product.weight.padded_in());
        let cores = gpu.properties().hardware.num_streaming_multiprocessors.map_or(128, |cores| cores as usize);
        let decoded = m > MOST_DECODING;
        // Resident are as many cubes as the registers of a core allow.
        let (row_blocks, planes, steps, resident) = match m {
            0..=16 => (2, 2, 2, 12),
            17..=32 => (4, 4, 2, 4),
            33..=64 => (8, 4, 2, 3),
            _ if decoded && n.is_multiple_of(8 * PLANE_COLUMNS) => (16, 8, 4, 1),
            _ => (16, 4, 2, 2),
        };
        let config = TileConfig { row_blocks, planes, steps, trellis, decoded };
        let fitting = (MOST_DECODED / k / config.columns()).max(1) * config.columns();
        let columns = if decoded { fitting.min(n) } else { n };
        let cubes = m.div_ceil(config.rows()) * (columns / config.columns());
        let slices = (resident * cores / cubes.max(1)).clamp(1, (k / 512).clamp(1, 16));
        Self { config, slices, columns }
    }
}

/// Enqueues the product with a trellis; `factors` are the row factors of its norm.
pub(super) fn launch<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    trellis: Trellis,
    factors: Option<&Buffer>,
) -> Result<()> {
    let (operation, weight) = (product.operation, product.weight);
    let (m, k) = (product.x.rows(), weight.padded_in());
    let plan = Plan::new(gpu, product, trellis);
    let rotated = gpu.scratch(operation, DType::F16, &[m, k])?;
    let partials = gpu.scratch(operation, DType::F32, &[plan.slices, m, weight.padded_out()])?;
    rotate::input(gpu, product, factors, Channels::FragmentPairs, &rotated);
    multiply(gpu, product, &plan, &rotated, &partials)?;
    rotate::output(gpu, product, &partials, plan.slices);
    Ok(())
}

/// Enqueues the product of rows rotated in the order of [`Channels::FragmentPairs`] into `partials [slices, M, N padded]`.
pub(in crate::linear::exl3) fn multiply<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    plan: &Plan,
    rotated: &Tensor<Gpu<R>>,
    partials: &Tensor<Gpu<R>>,
) -> Result<()> {
    check_shared(gpu, product.operation, plan.config.shared_bytes())?;
    if u32::try_from(partials.elements()).is_err() {
        let what = format!("{} partial sums, which have indices of 32 bits,", partials.elements());
        return Err(limit(gpu, product.operation, what));
    }
    let (n, k) = (product.weight.padded_out(), product.weight.padded_in());
    if !plan.config.decoded {
        return multiply_columns(gpu, product, plan, 0..n, None, rotated, partials);
    }
    let decoded = gpu.scratch(product.operation, DType::F16, &[plan.columns, k])?;
    for first in (0..n).step_by(plan.columns) {
        let columns = first..n.min(first + plan.columns);
        decode(gpu, product, plan.config.trellis, columns.clone(), &decoded)?;
        multiply_columns(gpu, product, plan, columns, Some(&decoded), rotated, partials)?;
    }
    Ok(())
}

/// Enqueues [`decode_tiles`] of whole blocks of columns.
fn decode<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    trellis: Trellis,
    columns: Range<usize>,
    decoded: &Tensor<Gpu<R>>,
) -> Result<()> {
    let weight = product.weight;
    let (tile_rows, tile_columns) = (weight.padded_in() / SIDE, columns.len() / SIDE);
    let count = grid(gpu, product.operation, [tile_columns / DECODED, tile_rows / DECODED, 1])?;
    // SAFETY: the words hold all tiles, `decoded` a vector for each lane of these; cubes are as many as whole runs.
    unsafe {
        decode_tiles::launch_unchecked::<R>(
            gpu.client(),
            count,
            CubeDim::new_2d(LANES as u32, DECODED as u32),
            weight.words_arg(1),
            decoded.buffer().arg(decoded.elements() / 8),
            (columns.start / SIDE) as u32,
            tile_columns as u32,
            (weight.padded_out() / SIDE) as u32,
            trellis.constants(),
            trellis,
        );
    }
    Ok(())
}

/// Enqueues [`multiply_rows`] of columns that were decoded, or of all by their words.
fn multiply_columns<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    plan: &Plan,
    columns: Range<usize>,
    decoded: Option<&Tensor<Gpu<R>>>,
    rotated: &Tensor<Gpu<R>>,
    partials: &Tensor<Gpu<R>>,
) -> Result<()> {
    let config = plan.config;
    let (m, n, k) = (product.x.rows(), product.weight.padded_out(), product.weight.padded_in());
    let cubes = [m.div_ceil(config.rows()), columns.len() / config.columns(), plan.slices];
    let count = grid(gpu, product.operation, cubes)?;
    // SAFETY: the buffers hold what they are named for; columns are a multiple of a cube's and K of a stage, rows are
    // compared with m.
    unsafe {
        multiply_rows::launch_unchecked::<R>(
            gpu.client(),
            count,
            CubeDim::new_2d(LANES as u32, config.planes as u32),
            product.weight.words_arg(1),
            decoded.map_or_else(|| gpu.unread(), |decoded| decoded.buffer().arg(decoded.elements() / 8)),
            rotated.buffer().arg(rotated.elements() / 8),
            partials.buffer().arg(partials.elements()),
            m as u32,
            k as u32,
            n as u32,
            columns.start as u32,
            (columns.len() / SIDE) as u32,
            plan.slices as u32,
            config.trellis.constants(),
            config,
        );
    }
    Ok(())
}

//! More than a few rotated rows on tensor cores (`m16n8k16` of planes of 32): a cube stages its rows in shared memory,
//! while every plane has 32 columns of its own, whose words it loads and decodes. So many rows that their weights would be
//! decoded again and again multiply operands that were decoded before.

use std::ops::Range;

use cubecl::prelude::*;
use half::f16;
use marlin_formats::DType;
use marlin_formats::exl3::HADAMARD;
use marlin_ops::{Result, Tensor};

use super::fragment::{Constants, Lane, decode_lane, lane_word, new_lane};
use super::parts::Parts;
use super::{check_shared, operands};
use crate::decode::Trellis;
use crate::decode::exl3::SIDE;
use crate::linear::exl3::rotate::{self, Channels, LANES};
use crate::linear::operands::Product;
use crate::linear::tensor::ExpertRows;
use crate::linear::tensor::experts::{Share, share};
use crate::linear::tensor::stage::{Stage, first_vectors, load_x, multiply_step, rows_from, store_x, zero_sums};
use crate::linear::{grid, limit};
use crate::weight::GpuWeight;
use crate::{Buffer, Gpu};

/// Input features of a step: two rows of tiles.
const STEP: usize = 2 * SIDE;
/// Output features of a plane: two columns of tiles.
const PLANE_COLUMNS: usize = 2 * SIDE;
/// Neighbouring tiles that a plane decodes, and planes of a cube of [`decode_tiles`]: both divide the tiles of a block.
const DECODED: usize = HADAMARD / SIDE;
/// Input features whose products tensor cores add up before the sum is put away.
const RUN: usize = 512;
/// Most rows, times their parts, whose weights are decoded where they are multiplied.
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
    /// f16 values that a value of x is the sum of. With two, sums keep the precision of f32.
    parts: usize,
    /// Rows are sorted by the expert whose weight they meet.
    experts: bool,
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

    /// Places that a lane reads in a row of tiles.
    const fn places(self) -> usize {
        if self.decoded { 1 } else { self.trellis.lane_words() }
    }

    /// How rows of x lie in shared memory.
    const fn stage(self) -> Stage {
        Stage { rows: self.rows(), parts: self.parts, steps: self.steps, units: LANES * self.planes, paired: false }
    }

    /// Sums are put away now and then: tensor cores cut off what they add up, always towards 0.
    const fn exact(self) -> bool {
        self.parts > 1
    }

    /// Stages of a run of sums.
    const fn run(self) -> usize {
        RUN / (STEP * self.steps)
    }

    const fn shared_bytes(self) -> usize {
        2 * self.stage().vectors() * 16
    }
}

/// `partials [slice, m, n]` of output features from `first_column` on; cubes `[rows, columns, slices]`, of experts tiles of rows
/// of one expert. x is `[parts, m, k]` in the order of [`Channels::FragmentPairs`]. Weights have `tile_columns` of tiles: all
/// words, or the operands of these columns.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn multiply_rows(
    words: &[u32],
    operands: &[Vector<u32, Const<4>>],
    x: &[Vector<u32, Const<4>>],
    tiles: &[u32],
    offsets: &[u32],
    places: &[u32],
    partials: &mut [f32],
    m: u32,
    k: u32,
    n: u32,
    first_column: u32,
    tile_columns: u32,
    slices: u32,
    experts: u32,
    first_place: u32,
    constants: Constants,
    #[comptime] c: TileConfig,
) {
    let share = share(tiles, offsets, places, m, experts, first_place, comptime!(c.rows()), c.experts);
    // Only of experts: with places known at run time, other products had been 8 % slower.
    if comptime!(c.experts) {
        if share.first >= share.end {
            terminate!();
        }
    }
    let unit = UNIT_POS_X as usize;
    let (g, t) = (unit / 4, unit % 4);
    let plane = UNIT_POS_Y as usize;
    let stager = plane * LANES + unit;
    let lane = new_lane(&constants, c.trellis);
    let pair = CUBE_POS_Y as usize * comptime!(c.planes) + plane;
    let row_stride = tile_columns as usize * comptime!(c.tile_stride());
    let tile_places = tile_places(unit, pair, &share, k as usize / SIDE * row_stride, c);
    let all = k as usize / comptime!(STEP * c.steps);
    let slice = CUBE_POS_Z as usize;
    let first = slice * all / slices as usize;
    let stages = (slice + 1) * all / slices as usize;
    let mut shared = Shared::<[Vector<u32, Const<4>>]>::new_aligned_slice(comptime!(2 * c.stage().vectors()), 16usize);
    let mut sums = zero_sums(c.row_blocks);
    let mut earlier = zero_sums(comptime!(if c.exact() { c.row_blocks } else { 0 }));
    let rows = rows_from(stager, share.first, share.end, comptime!(c.stage()));
    let rows = first_vectors(stager, &rows, m, k, comptime!(c.stage()));
    let mut xv = Array::<Vector<u32, Const<4>>>::new(comptime!(c.stage().own()));
    let mut w = Array::<u32>::new(comptime!(4 * c.steps * c.lane_words()));
    #[unroll]
    for step in 0..comptime!(c.steps) {
        load_tiles(words, operands, &mut w, &tile_places, first, row_stride, step, c);
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
            load_tiles(words, operands, &mut w, &tile_places, next, row_stride, step, c);
            let from = buffer * comptime!(c.stage().vectors()) + comptime!(c.stage().step_vectors() * step) + g * 4 + t;
            #[unroll]
            for part in 0..comptime!(c.parts) {
                let from = from + comptime!(4 * c.rows() * part);
                multiply_step::<f16>(&shared, &mut sums, &weights, from, c.row_blocks);
            }
            store_x(&mut shared, &xv, buffer ^ 1, stager, step, comptime!(c.stage()));
        }
        if comptime!(c.exact()) {
            if (stage - first) % comptime!(c.run()) == comptime!(c.run() - 1) {
                put_away(&mut earlier, &mut sums, c.row_blocks);
            }
        }
        sync_cube();
        buffer ^= 1;
    }
    if comptime!(c.exact()) {
        put_away(&mut earlier, &mut sums, c.row_blocks);
        write_sums(&earlier, partials, &share, slice, first_column as usize + pair * PLANE_COLUMNS, m, n, c);
    } else {
        write_sums(&sums, partials, &share, slice, first_column as usize + pair * PLANE_COLUMNS, m, n, c);
    }
}

/// Writes a plane's sums of a slice, whose columns are those from `first_column` on.
#[cube]
#[allow(clippy::too_many_arguments)]
fn write_sums(
    sums: &Sequence<Array<Vector<f32, Const<2>>>>,
    partials: &mut [f32],
    share: &Share,
    slice: usize,
    first_column: usize,
    m: u32,
    n: u32,
    #[comptime] c: TileConfig,
) {
    let (g, t) = (UNIT_POS_X as usize / 4, UNIT_POS_X as usize % 4);
    let row0 = share.first + t * 2;
    let column0 = first_column + g;
    #[unroll]
    for i in 0..comptime!(2 * c.row_blocks) {
        let sum = sums.index(i);
        #[unroll]
        for e in 0..2usize {
            let row = row0 + comptime!(i / 2 * 8) + e;
            if row < share.end {
                #[unroll]
                for half in 0..2usize {
                    let column = column0 + comptime!(i % 2 * SIDE + half * 8);
                    partials[(slice * m as usize + row) * n as usize + column] = sum[half].extract(e);
                }
            }
        }
    }
}

/// Adds `sums` to `earlier` ones, rounded to nearest, and begins again.
#[cube]
fn put_away(
    earlier: &mut Sequence<Array<Vector<f32, Const<2>>>>,
    sums: &mut Sequence<Array<Vector<f32, Const<2>>>>,
    #[comptime] row_blocks: usize,
) {
    #[unroll]
    for i in 0..comptime!(2 * row_blocks) {
        let sum = sums.index_mut(i);
        let total = earlier.index_mut(i);
        #[unroll]
        for half in 0..2usize {
            total[half] = total[half] + sum[half];
            sum[half] = Vector::<f32, Const<2>>::new(0.0);
        }
    }
}

/// Where a lane reads in a row of tiles: each of its words of the first of two tiles, or the operands. A weight has `stride` of
/// these.
#[cube]
fn tile_places(unit: usize, pair: usize, share: &Share, stride: usize, #[comptime] c: TileConfig) -> Array<usize> {
    let mut places = Array::<usize>::new(comptime!(c.places()));
    #[unroll]
    for i in 0..comptime!(c.places()) {
        let own = if comptime!(c.decoded) { unit } else { lane_word(unit, i, c.trellis) };
        places[i] = pair * comptime!(2 * c.tile_stride()) + own;
        if comptime!(c.experts) {
            places[i] += share.place * stride;
        }
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
        let parts = Parts::of(gpu, product.x.dtype()).count();
        let decoded = m * parts > MOST_DECODING;
        let wide = decoded && n.is_multiple_of(8 * PLANE_COLUMNS);
        // Resident are as many cubes as the registers of a core allow. Sums of two kinds leave them for half the rows.
        let (row_blocks, planes, steps, resident) = match (m, parts) {
            (0..=16, _) => (2, 2, 2, 12),
            (17..=32, _) => (4, 4, 2, 4),
            (33..=64, 1) => (8, 4, 2, 3),
            (_, 1) if wide => (16, 8, 4, 1),
            (_, 1) => (16, 4, 2, 2),
            _ if wide => (8, 8, 2, 1),
            _ => (8, 4, 2, 2),
        };
        let config = TileConfig { row_blocks, planes, steps, trellis, decoded, parts, experts: false };
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
    let plan = Plan::new(gpu, product, trellis);
    let (rotated, inverses) = operands(gpu, product, factors, Channels::FragmentPairs)?;
    let partials = gpu.scratch(operation, DType::F32, &[plan.slices, product.x.rows(), weight.padded_out()])?;
    multiply(gpu, product, &plan, &rotated, &partials)?;
    rotate::output(gpu, product, &partials, plan.slices, inverses.as_ref());
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
    let (n, k) = (product.weight.padded_out(), product.weight.padded_in());
    let job = Job {
        operation: product.operation,
        weight: product.weight,
        config: plan.config,
        slices: plan.slices,
        x: rotated,
        out: partials,
        experts: None,
    };
    if !plan.config.decoded {
        return job.launch(gpu, 0..n, None);
    }
    let decoded = gpu.scratch(product.operation, DType::F16, &[plan.columns, k])?;
    for first in (0..n).step_by(plan.columns) {
        let columns = first..n.min(first + plan.columns);
        decode(gpu, product, plan.config.trellis, columns.clone(), &decoded)?;
        job.launch(gpu, columns, Some(&decoded))?;
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

/// Most rows of a tile of one expert.
pub(crate) const MOST_EXPERT_ROWS: usize = 64;

/// The shape for tiles of so many rows of one expert.
fn expert_config(tile_rows: usize, trellis: Trellis, parts: Parts) -> Option<TileConfig> {
    let row_blocks = match tile_rows {
        32 => 4,
        MOST_EXPERT_ROWS => 8,
        _ => return None,
    };
    let parts = parts.count();
    Some(TileConfig { row_blocks, planes: 4, steps: 2, trellis, decoded: false, parts, experts: true })
}

/// Enqueues the product of sorted rows `[parts, rows, K padded]` of f16 with the weights of a bank into `out [rows, N padded]`.
#[allow(clippy::too_many_arguments)]
pub(super) fn multiply_experts<R: Runtime>(
    gpu: &Gpu<R>,
    operation: &'static str,
    (weight, trellis): (&GpuWeight, Trellis),
    tile_rows: usize,
    parts: Parts,
    x: &Tensor<Gpu<R>>,
    rows: &ExpertRows<'_, R>,
    out: &Tensor<Gpu<R>>,
) -> Result<()> {
    let config = expert_config(tile_rows, trellis, parts).ok_or_else(|| {
        limit(gpu, operation, format!("exl3 weights by tiles of {tile_rows} rows (32 or {MOST_EXPERT_ROWS})"))
    })?;
    check_shared(gpu, operation, config.shared_bytes())?;
    if u32::try_from(weight.word_count).is_err() {
        let what = format!("{} words of experts, which have indices of 32 bits,", weight.word_count);
        return Err(limit(gpu, operation, what));
    }
    Job { operation, weight, config, slices: 1, x, out, experts: Some(rows) }.launch(gpu, 0..weight.padded_out(), None)
}

/// A launch of [`multiply_rows`].
struct Job<'a, R: Runtime> {
    operation: &'static str,
    weight: &'a GpuWeight,
    config: TileConfig,
    slices: usize,
    /// `[parts, M, K padded]`.
    x: &'a Tensor<Gpu<R>>,
    /// `[slices, M, N padded]`.
    out: &'a Tensor<Gpu<R>>,
    experts: Option<&'a ExpertRows<'a, R>>,
}

impl<R: Runtime> Job<'_, R> {
    /// Enqueues the kernel for columns that were decoded, or for all by their words.
    fn launch(&self, gpu: &Gpu<R>, columns: Range<usize>, decoded: Option<&Tensor<Gpu<R>>>) -> Result<()> {
        if u32::try_from(self.out.elements()).is_err() {
            let what = format!("{} partial sums, which have indices of 32 bits,", self.out.elements());
            return Err(limit(gpu, self.operation, what));
        }
        let (config, rows) = (self.config, self.experts);
        let (n, k) = (self.weight.padded_out(), self.weight.padded_in());
        let m = self.x.elements() / (config.parts * k);
        let tiles = rows.map_or(m.div_ceil(config.rows()), |rows| rows.tile_count);
        let count = grid(gpu, self.operation, [tiles, columns.len() / config.columns(), self.slices])?;
        let all = |tensor: &Tensor<Gpu<R>>| tensor.buffer().arg(tensor.elements());
        let unread = || gpu.unread();
        // SAFETY: the buffers hold what they are named for; columns are a multiple of a cube's and K of a stage, rows are
        // compared with m, or lie within the offsets of an expert whose place is within the bank.
        unsafe {
            multiply_rows::launch_unchecked::<R>(
                gpu.client(),
                count,
                CubeDim::new_2d(LANES as u32, config.planes as u32),
                self.weight.words_arg(1),
                decoded.map_or_else(unread, |decoded| decoded.buffer().arg(decoded.elements() / 8)),
                self.x.buffer().arg(self.x.elements() / 8),
                rows.map_or_else(unread, |rows| all(rows.tiles)),
                rows.map_or_else(unread, |rows| all(rows.offsets)),
                rows.map_or_else(unread, |rows| rows.places.arg(3 * rows.experts)),
                all(self.out),
                m as u32,
                k as u32,
                n as u32,
                columns.start as u32,
                (columns.len() / SIDE) as u32,
                self.slices as u32,
                rows.map_or(0, |rows| rows.experts) as u32,
                rows.map_or(0, |rows| rows.first_place) as u32,
                config.trellis.constants(),
                config,
            );
        }
        Ok(())
    }
}

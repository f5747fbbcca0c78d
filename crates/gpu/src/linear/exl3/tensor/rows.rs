//! Products of few rotated rows with tiles on tensor cores (`m16n8k16` of planes of 32) with f32 sums. Each plane decodes
//! eight neighbouring tiles of its tile rows straight into operands; rows pass through shared memory, where one or two of
//! them are also rotated. [`bytes`](super::bytes) has another kernel for these two where the codebook is mul1, unless they are
//! split.

use cubecl::cmma::MmaDefinition;
use cubecl::ir::{ElemType, UIntKind};
use cubecl::prelude::*;
use half::f16;
use marlin_formats::DType;
use marlin_formats::exl3::HADAMARD;
use marlin_ops::{Result, Tensor};

use super::assigned::{Arguments, AssignedRows, Origin, origin};
use super::fragment::{Constants, Lane, decode_lane, lane_word, new_lane};
use super::parts::Parts;
use super::{bytes, check_shared, operands};
use crate::decode::Trellis;
use crate::decode::exl3::SIDE;
use crate::halves::{TOP, inverse, power};
use crate::linear::exl3::rotate::{self, Channels, LANES, NORM, first_channel, high_words, low_words, transform};
use crate::linear::grid;
use crate::linear::operands::{Input, Product, load_input};
use crate::linear::tensor::SHARED_BESIDE;
use crate::reduce::{cube_max, max_of};
use crate::{Buffer, Gpu};

/// Tile rows of a Hadamard block.
pub(super) const BLOCK_ROWS: usize = HADAMARD / SIDE;

/// Rows that are rotated where they are multiplied: more would be rotated too often.
const ROTATED_ROWS: usize = 2;

/// Most rows: those of a product.
pub(in crate::linear::exl3) const MOST_ROWS: usize = 8;

/// Neighbouring tiles of a plane, and of a cube.
pub(super) const TILES: usize = 8;

/// Most tile rows of a slice.
const MOST_STAGED: usize = 64;

/// Columns of a cube.
pub(super) const WIDTH: usize = TILES * SIDE;

/// Pairs of sums that a lane holds: [tile, half of the tile's columns].
pub(super) const SUMS: usize = 2 * TILES;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct RowsConfig {
    trellis: Trellis,
    /// Rows of x in shared memory: 1, 2, 4 or 8.
    rows: usize,
    /// Tile rows of x in shared memory: those of a slice, whole Hadamard blocks.
    stage: usize,
    /// Planes of a cube, which take turns along K.
    planes: usize,
    /// Tile rows that a plane loads at once.
    depth: usize,
    /// Slices are whole turns of all planes.
    even: bool,
    parts: Parts,
    /// x as it comes, to be rotated; otherwise it was.
    raw: Option<Input>,
    /// Cubes have one row each, with the weight of its expert.
    experts: bool,
}

impl RowsConfig {
    /// Vectors of a row in shared memory; the last ones put neighbouring rows into different banks.
    const fn row_stride(&self) -> usize {
        self.stage * 4 + 4
    }

    /// Rows have powers that are found here.
    const fn scales(&self) -> bool {
        self.raw.is_some() && self.parts.scaled()
    }

    /// Vectors of x in shared memory: [part, row], with room for f32 values that are to be scaled.
    const fn staged(&self) -> usize {
        let parts = if self.scales() { 2 } else { self.parts.count() };
        parts * self.rows * self.row_stride()
    }

    /// Words of a plane's tiles that a lane loads at once.
    const fn words(&self) -> usize {
        self.depth * TILES * self.trellis.lane_words()
    }

    const fn shared_bytes(&self) -> usize {
        let units = self.planes * LANES;
        let largest = if self.scales() { self.rows * units * 4 } else { 0 };
        self.staged() * 8 + units * SUMS * 8 + largest
    }

    /// The same with fewer planes where a cube has only so much shared memory.
    fn within(self, shared_bytes: usize) -> Self {
        let fewer = |config: &Self| (config.planes > 4).then_some(Self { planes: config.planes / 2, ..*config });
        let fits = |config: &Self| config.shared_bytes() + SHARED_BESIDE <= shared_bytes;
        std::iter::successors(Some(self), fewer).find(fits).unwrap_or(self)
    }
}

/// `partials [slice, m, 16 tile_columns]` of m rows; cubes `[columns, slices]`, of experts `[columns, slices, m]`. x is `[m, k]`,
/// or `[parts, m, k]` in the order of [`Channels::Fragment`] after the rotation; of experts it has a row for `slots` of m. Slices
/// have `slice_rows` tile rows, whole Hadamard blocks.
#[cube(launch_unchecked, address_type = "u64")]
#[allow(clippy::too_many_arguments)]
fn multiply_tiles<X: Numeric, G: Numeric>(
    words: &[u32],
    x: &[X],
    gamma: &[G],
    row_factors: &[f32],
    rotated: &[Vector<u32, Const<2>>],
    suh: &[f16],
    ids: &[u32],
    places: &[u32],
    partials: &mut [f32],
    m: u32,
    slots: u32,
    experts: u32,
    projection: u32,
    k: u32,
    tile_rows: u32,
    tile_columns: u32,
    slice_rows: u32,
    gamma_offset: f32,
    constants: Constants,
    #[comptime] c: RowsConfig,
    #[define(X, G)] _elements: [ElemType; 2],
) {
    let unit = UNIT_POS_X as usize;
    let plane = UNIT_POS_Y as usize;
    let origin = origin(ids, places, m as usize, slots, experts, projection, c.experts);
    if comptime!(c.experts) {
        if origin.place == u32::MAX {
            terminate!();
        }
    }
    let k = k as usize;
    let (tile_rows, tile_columns) = (tile_rows as usize, tile_columns as usize);
    let begin = CUBE_POS_Y as usize * slice_rows as usize;
    let mut end = begin + slice_rows as usize;
    end = select(end < tile_rows, end, tile_rows);
    let lane = new_lane(&constants, c.trellis);
    let tile_words = comptime!(c.trellis.tile_words());
    let mut lane_words = Array::<usize>::new(3usize);
    #[unroll]
    for i in 0..3usize {
        lane_words[i] = lane_word(unit, i, c.trellis) + CUBE_POS_X as usize * comptime!(TILES * c.trellis.tile_words());
        if comptime!(c.experts) {
            lane_words[i] += origin.place as usize * tile_rows * tile_columns * tile_words;
        }
    }
    let mut stage = Shared::<[Vector<u32, Const<2>>]>::new_aligned_slice(comptime!(c.staged()), 16usize);
    let mut products = Sequence::<Array<Vector<f32, Const<2>>>>::new();
    #[unroll]
    for _i in 0..TILES {
        let mut zero = Array::<Vector<f32, Const<2>>>::new(2usize);
        zero[0] = Vector::<f32, Const<2>>::new(0.0);
        zero[1] = Vector::<f32, Const<2>>::new(0.0);
        products.push(zero);
    }
    let mut loaded = Array::<u32>::new(comptime!(c.words()));
    #[unroll]
    for d in 0..comptime!(c.depth) {
        let at = begin + plane + comptime!(d * c.planes);
        load_words(words, &lane_words, &mut loaded, at, end, tile_columns, d, c);
    }
    let factors = stage_rows::<X, G>(
        x,
        gamma,
        row_factors,
        rotated,
        suh,
        &mut stage,
        &origin,
        begin,
        end,
        k,
        tile_rows,
        gamma_offset,
        c,
    );
    sync_cube();
    if comptime!(c.even) {
        // Words have indices of 32 bits; only the sum with the address has 64.
        let hop = (tile_columns * tile_words * comptime!(c.planes)) as u32;
        let mut next = Array::<u32>::new(3usize);
        #[unroll]
        for i in 0..3usize {
            next[i] = (lane_words[i] + (begin + plane) * (tile_columns * tile_words)) as u32
                + hop * comptime!(c.depth as u32);
        }
        let mut at = UNIT_POS_Y;
        for _turn in 1..slice_rows / comptime!((c.planes * c.depth) as u32) {
            #[unroll]
            for d in 0..comptime!(c.depth) {
                multiply_row(&loaded, &stage, &mut products, at as usize, &lane, d, c);
                load_next(words, &mut next, &mut loaded, hop, d, c);
                at += comptime!(c.planes as u32);
            }
        }
        #[unroll]
        for d in 0..comptime!(c.depth) {
            multiply_row(&loaded, &stage, &mut products, at as usize, &lane, d, c);
            at += comptime!(c.planes as u32);
        }
    } else {
        let mut tile_row = begin + plane;
        while tile_row < end {
            #[unroll]
            for d in 0..comptime!(c.depth) {
                let at = tile_row + comptime!(d * c.planes);
                if at < end {
                    multiply_row(&loaded, &stage, &mut products, at - begin, &lane, d, c);
                }
                load_words(
                    words,
                    &lane_words,
                    &mut loaded,
                    at + comptime!(c.depth * c.planes),
                    end,
                    tile_columns,
                    d,
                    c,
                );
            }
            tile_row += comptime!(c.depth * c.planes);
        }
    }
    sync_cube();
    let mut shared = Shared::<[Vector<f32, Const<2>>]>::new_slice(comptime!(c.planes * SUMS * LANES));
    #[unroll]
    for i in 0..SUMS {
        shared[(plane * SUMS + i) * LANES + unit] = products.index(comptime!(i / 2))[comptime!(i % 2)];
    }
    sync_cube();
    write_sums(&shared, &factors, partials, &origin, tile_columns * SIDE, c);
}

/// Loads a lane's words of a tile row, the `d`th of those loaded; a tile row from `end` on is another.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load_words(
    words: &[u32],
    lane_words: &Array<usize>,
    loaded: &mut Array<u32>,
    tile_row: usize,
    end: usize,
    tile_columns: usize,
    #[comptime] d: usize,
    #[comptime] c: RowsConfig,
) {
    let count = comptime!(c.trellis.lane_words());
    let tile_words = comptime!(c.trellis.tile_words());
    let row = select(tile_row < end, tile_row, end - 1usize) * (tile_columns * tile_words);
    #[unroll]
    for i in 0..count {
        let first = row + lane_words[i];
        #[unroll]
        for tile in 0..TILES {
            loaded[comptime!((d * TILES + tile) * count + i)] = words[first + comptime!(tile * c.trellis.tile_words())];
        }
    }
}

/// Loads a lane's words at `next`, for the `d`th tile row of those loaded, and moves on by `hop` words.
#[cube]
fn load_next(
    words: &[u32],
    next: &mut Array<u32>,
    loaded: &mut Array<u32>,
    hop: u32,
    #[comptime] d: usize,
    #[comptime] c: RowsConfig,
) {
    let count = comptime!(c.trellis.lane_words());
    #[unroll]
    for i in 0..count {
        let first = next[i] as usize;
        #[unroll]
        for tile in 0..TILES {
            loaded[comptime!((d * TILES + tile) * count + i)] = words[first + comptime!(tile * c.trellis.tile_words())];
        }
        next[i] += hop;
    }
}

/// Puts tile rows `begin` to `end` of x into shared memory; the factors of the sums of rows that are scaled here.
#[cube]
#[allow(clippy::too_many_arguments)]
fn stage_rows<X: Numeric, G: Numeric>(
    x: &[X],
    gamma: &[G],
    row_factors: &[f32],
    rotated: &[Vector<u32, Const<2>>],
    suh: &[f16],
    stage: &mut Shared<[Vector<u32, Const<2>>]>,
    origin: &Origin,
    begin: usize,
    end: usize,
    k: usize,
    tile_rows: usize,
    gamma_offset: f32,
    #[comptime] c: RowsConfig,
) -> Array<f32> {
    let mut largest = Array::<f32>::new(comptime!(c.rows));
    #[unroll]
    for r in 0..comptime!(c.rows) {
        largest[r] = f32::new(0.0);
    }
    let mut task = UNIT_POS_Y as usize;
    let blocks = (end - begin) / BLOCK_ROWS;
    while task < blocks * comptime!(c.rows) {
        let (row, block) = (task % comptime!(c.rows), task / comptime!(c.rows));
        if comptime!(c.raw.is_some()) {
            let first = (begin + block * BLOCK_ROWS) * SIDE;
            let input = comptime!(c.raw.unwrap());
            let mut first_suh = 0usize;
            if comptime!(c.experts) {
                first_suh = origin.place as usize * tile_rows * SIDE;
            }
            let mut values = load_raw::<X, G>(
                x,
                gamma,
                row_factors,
                suh,
                origin.x + row,
                first_suh,
                first,
                origin.x_rows,
                k,
                gamma_offset,
                input,
            );
            transform(&mut values, true);
            stage_raw(&values, stage, &mut largest, row, block, c);
        } else {
            let first = begin + block * BLOCK_ROWS;
            stage_rotated(rotated, stage, row, block, first, origin.rows, tile_rows, c);
        }
        task += comptime!(c.planes);
    }
    if comptime!(c.scales()) {
        scale_staged(stage, &mut largest, blocks, c);
    }
    largest
}

/// A lane's values of a block of a row, to be rotated; the block's features are those from `first` on, and the weight's `suh`
/// begin at `first_suh`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn load_raw<X: Numeric, G: Numeric>(
    x: &[X],
    gamma: &[G],
    row_factors: &[f32],
    suh: &[f16],
    row: usize,
    first_suh: usize,
    first: usize,
    m: usize,
    k: usize,
    gamma_offset: f32,
    #[comptime] input: Input,
) -> Array<f32> {
    let first = first + first_channel(UNIT_POS_X as usize, Channels::Fragment);
    let mut factor = f32::new(NORM);
    if comptime!(input.gamma.is_some()) {
        factor *= row_factors[select(row < m, row, 0usize)];
    }
    let mut values = Array::<f32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        let feature = first + comptime!(Channels::Fragment.offset(i));
        let inside = row < m && feature < k;
        let at = select(inside, row * k + feature, 0usize);
        let value = load_input::<X, G>(x, gamma, at, select(inside, feature, 0usize), gamma_offset, input);
        // suh has all of K padded.
        values[i] = select(inside, value * f32::cast_from(suh[first_suh + feature]) * factor, f32::new(0.0));
    }
    values
}

/// Puts a lane's rotated values into shared memory: as f16, or, if they are to be scaled, as f32 where two parts would be.
#[cube]
fn stage_raw(
    values: &Array<f32>,
    stage: &mut Shared<[Vector<u32, Const<2>>]>,
    largest: &mut Array<f32>,
    row: usize,
    block: usize,
    #[comptime] c: RowsConfig,
) {
    let to = row * comptime!(c.row_stride()) + block * LANES + UNIT_POS_X as usize;
    if comptime!(!c.scales()) {
        stage[to] = high_words(values);
    } else {
        let mut words = Vector::<u32, Const<2>>::empty();
        words.insert(0usize, u32::reinterpret(values[0]));
        words.insert(1usize, u32::reinterpret(values[1]));
        stage[to] = words;
        words.insert(0usize, u32::reinterpret(values[2]));
        words.insert(1usize, u32::reinterpret(values[3]));
        stage[to + comptime!(c.rows * c.row_stride())] = words;
        #[unroll]
        for r in 0..comptime!(c.rows) {
            #[unroll]
            for i in 0..4usize {
                let value = select(row == r, f32::abs(values[i]), f32::new(0.0));
                largest[r] = max_of(largest[r], value);
            }
        }
    }
}

/// Makes the values of [`stage_raw`] f16, each row times a power of two; `largest` are their largest values of this unit, and
/// one over these powers afterwards.
#[cube]
fn scale_staged(
    stage: &mut Shared<[Vector<u32, Const<2>>]>,
    largest: &mut Array<f32>,
    blocks: usize,
    #[comptime] c: RowsConfig,
) {
    let mut powers = Array::<f32>::new(comptime!(c.rows));
    #[unroll]
    for r in 0..comptime!(c.rows) {
        powers[r] = power(cube_max(largest[r], comptime!(LANES * c.planes)), TOP);
        largest[r] = inverse(powers[r]);
    }
    let mut task = UNIT_POS_Y as usize;
    while task < blocks * comptime!(c.rows) {
        let (row, block) = (task % comptime!(c.rows), task / comptime!(c.rows));
        let mut factor = powers[0];
        #[unroll]
        for r in 1..comptime!(c.rows) {
            factor = select(row == r, powers[r], factor);
        }
        // A lane's own.
        let at = row * comptime!(c.row_stride()) + block * LANES + UNIT_POS_X as usize;
        let low = stage[at];
        let high = stage[at + comptime!(c.rows * c.row_stride())];
        let mut values = Array::<f32>::new(4usize);
        #[unroll]
        for i in 0..2usize {
            values[i] = f32::reinterpret(low.extract(i)) * factor;
            values[comptime!(2 + i)] = f32::reinterpret(high.extract(i)) * factor;
        }
        stage[at] = high_words(&values);
        if comptime!(c.parts.count() == 2) {
            stage[at + comptime!(c.rows * c.row_stride())] = low_words(&values);
        }
        task += comptime!(c.planes);
    }
}

/// Copies a block of a rotated row, whose tile rows are those from `first` on, into shared memory.
#[cube]
#[allow(clippy::too_many_arguments)]
fn stage_rotated(
    rotated: &[Vector<u32, Const<2>>],
    stage: &mut Shared<[Vector<u32, Const<2>>]>,
    row: usize,
    block: usize,
    first: usize,
    m: usize,
    tile_rows: usize,
    #[comptime] c: RowsConfig,
) {
    let lane = UNIT_POS_X as usize;
    // Rows beyond the last are computed from the last and not written.
    let known = select(row < m, row, m - 1usize);
    #[unroll]
    for part in 0..comptime!(c.parts.count()) {
        let words = rotated[((part * m + known) * tile_rows + first) * 4usize + lane];
        stage[(part * comptime!(c.rows) + row) * comptime!(c.row_stride()) + block * LANES + lane] = words;
    }
}

/// Adds the products of one tile row, the `d`th of those loaded; `at` is its place in shared memory.
#[cube]
#[allow(clippy::too_many_arguments)]
fn multiply_row(
    loaded: &Array<u32>,
    stage: &Shared<[Vector<u32, Const<2>>]>,
    products: &mut Sequence<Array<Vector<f32, Const<2>>>>,
    at: usize,
    lane: &Lane,
    #[comptime] d: usize,
    #[comptime] c: RowsConfig,
) {
    let mma = MmaDefinition::<f16, f16, f32>::new(16usize, 8usize, 16usize);
    let (g, t) = (UNIT_POS_X as usize / 4usize, UNIT_POS_X as usize % 4usize);
    let mut inputs = Sequence::<Array<Vector<f16, Const<2>>>>::new();
    #[unroll]
    for part in 0..comptime!(c.parts.count()) {
        let row = comptime!(part * c.rows) + g % comptime!(c.rows);
        let words = stage[row * comptime!(c.row_stride()) + at * 4usize + t];
        let mut input = Array::<Vector<f16, Const<2>>>::new(2usize);
        input[0] = Vector::<f16, Const<2>>::reinterpret(words.extract(0usize));
        input[1] = Vector::<f16, Const<2>>::reinterpret(words.extract(1usize));
        inputs.push(input);
    }
    // Two are decoded before the first is multiplied: products wait for what tensor cores decode. More take registers.
    #[unroll]
    for two in 0..comptime!(TILES / 2) {
        let mut weights = Sequence::<Array<Vector<f16, Const<2>>>>::new();
        #[unroll]
        for i in 0..2usize {
            let first = comptime!((d * TILES + 2 * two + i) * c.trellis.lane_words());
            weights.push(decode_lane(loaded, lane, first, c.trellis));
        }
        #[unroll]
        for part in 0..comptime!(c.parts.count()) {
            #[unroll]
            for i in 0..2usize {
                let product = products.index_mut(comptime!(2 * two + i));
                mma.execute_inplace(weights.index(i), inputs.index(part), product);
            }
        }
    }
}

/// Adds the planes' sums up in order and writes them, of rows that were scaled here times `factors`.
#[cube]
fn write_sums(
    shared: &Shared<[Vector<f32, Const<2>>]>,
    factors: &Array<f32>,
    partials: &mut [f32],
    origin: &Origin,
    n: usize,
    #[comptime] c: RowsConfig,
) {
    let m = if comptime!(c.experts) { 1usize.runtime() } else { origin.rows };
    let mut slot = UNIT_POS as usize;
    while slot < m.div_ceil(2usize) * WIDTH {
        let (pair, column) = (slot / WIDTH, slot % WIDTH);
        let (tile, half, g) = (column / SIDE, column / 8usize % 2usize, column % 8usize);
        let at = (tile * 2usize + half) * LANES + g * 4usize + pair;
        let mut sum = Vector::<f32, Const<2>>::new(0.0);
        #[unroll]
        for plane in 0..comptime!(c.planes) {
            sum += shared[at + comptime!(plane * SUMS * LANES)];
        }
        #[unroll]
        for e in 0..2usize {
            let row = pair * 2usize + e;
            if row < m {
                let mut value = sum.extract(e);
                if comptime!(c.scales()) {
                    // One or two rows: those of the first pair.
                    value *= factors[comptime!(if e < c.rows { e } else { 0 })];
                }
                let to = CUBE_POS_Y as usize * origin.rows + origin.row + row;
                partials[to * n + CUBE_POS_X as usize * WIDTH + column] = value;
            }
        }
        slot += comptime!(LANES * c.planes);
    }
}

/// Shape of a launch.
pub(in crate::linear::exl3) struct Plan {
    config: RowsConfig,
    /// Slices of K.
    pub(in crate::linear::exl3) slices: usize,
}

impl Plan {
    /// For a product's rows.
    pub(in crate::linear::exl3) fn new<R: Runtime>(gpu: &Gpu<R>, product: &Product<'_, R>, trellis: Trellis) -> Self {
        Self::of(gpu, product, trellis, Parts::of(gpu, product.x.dtype()), None)
    }

    /// For so many rows with a weight each, of which the product's is the size of one.
    pub(super) fn of_experts<R: Runtime>(
        gpu: &Gpu<R>,
        product: &Product<'_, R>,
        trellis: Trellis,
        parts: Parts,
        assignments: usize,
    ) -> Self {
        Self::of(gpu, product, trellis, parts, Some(assignments))
    }

    /// Slices and planes that fill the device evenly with about 28 planes a core.
    fn of<R: Runtime>(
        gpu: &Gpu<R>,
        product: &Product<'_, R>,
        trellis: Trellis,
        parts: Parts,
        assignments: Option<usize>,
    ) -> Self {
        let m = if assignments.is_some() { 1 } else { product.x.rows() };
        let tile_rows = product.weight.padded_in() / SIDE;
        let cores = gpu.properties().hardware.num_streaming_multiprocessors.map_or(128, |cores| cores as usize);
        // More words of a tile take the registers of a second row of tiles.
        let depth = if trellis.lane_words() == 2 { 2 } else { 1 };
        let cubes = product.weight.padded_out() / WIDTH * assignments.unwrap_or(1);
        // The turns of the busiest core; a cube costs it about as much as six tile rows beside its own.
        let turns = |slice: &usize| (cubes * tile_rows.div_ceil(*slice)).div_ceil(cores) * (slice.min(&tile_rows) + 6);
        let lengths = (1..=MOST_STAGED / BLOCK_ROWS).map(|blocks| blocks * BLOCK_ROWS);
        let stage = lengths.rev().min_by_key(turns).unwrap_or(MOST_STAGED);
        let slices = tile_rows.div_ceil(stage);
        let resident = (cubes * slices).div_ceil(cores).max(1);
        let planes = 1 << (28 / resident).clamp(4, 16).ilog2();
        let (rows, experts) = (m.next_power_of_two(), assignments.is_some());
        let raw = (m <= ROTATED_ROWS).then(|| product.input());
        let config = RowsConfig { trellis, rows, stage, planes, depth, even: false, parts, raw, experts };
        let config = config.within(gpu.properties().hardware.max_shared_memory_size);
        let even = tile_rows.is_multiple_of(stage) && stage.is_multiple_of(config.planes * depth);
        Self { config: RowsConfig { even, ..config }, slices }
    }

    /// Whether x is to be rotated before.
    pub(in crate::linear::exl3) fn takes_rotated(&self) -> bool {
        self.config.raw.is_none()
    }
}

/// Enqueues the product with a trellis; `factors` are the row factors of its norm.
pub(super) fn launch<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    trellis: Trellis,
    factors: Option<&Buffer>,
) -> Result<()> {
    if product.x.rows() <= bytes::MOST_ROWS && bytes::takes(trellis, Parts::of(gpu, product.x.dtype())) {
        return bytes::launch(gpu, product, trellis, factors);
    }
    let plan = Plan::new(gpu, product, trellis);
    let dims = [plan.slices, product.x.rows(), product.weight.padded_out()];
    let partials = gpu.scratch(product.operation, DType::F32, &dims)?;
    if plan.takes_rotated() {
        let (rotated, inverses) = operands(gpu, product, factors, Channels::Fragment)?;
        multiply(gpu, product, &plan, Rows::Rotated(&rotated), &partials)?;
        rotate::output(gpu, product, &partials, plan.slices, inverses.as_ref());
    } else {
        multiply(gpu, product, &plan, Rows::Raw(factors), &partials)?;
        rotate::output(gpu, product, &partials, plan.slices, None);
    }
    Ok(())
}

/// The rows of a product as the plan takes them.
pub(in crate::linear::exl3) enum Rows<'a, R: Runtime> {
    /// As they come, with the row factors of their norm.
    Raw(Option<&'a Buffer>),
    /// `[parts, M, K padded]` f16.
    Rotated(&'a Tensor<Gpu<R>>),
    /// As they come, with the weights of their experts.
    Assigned(&'a AssignedRows<'a, R>),
}

/// Enqueues the product into `partials [slices, M, N padded]`.
pub(in crate::linear::exl3) fn multiply<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    plan: &Plan,
    rows: Rows<'_, R>,
    partials: &Tensor<Gpu<R>>,
) -> Result<()> {
    check_shared(gpu, product.operation, plan.config.shared_bytes())?;
    let (weight, config) = (product.weight, plan.config);
    let (k, n) = (weight.padded_in(), weight.padded_out());
    let assigned = if let Rows::Assigned(assigned) = rows { Some(assigned) } else { None };
    let x_rows = product.x.rows();
    let arguments = Arguments::new(gpu, x_rows, assigned);
    let cubes = [n / WIDTH, plan.slices, assigned.map_or(1, |assigned| assigned.ids.elements())];
    let count = grid(gpu, product.operation, cubes)?;
    let [x_element, gamma_element, ..] = product.elements();
    let unread = || gpu.unread();
    let (x, gamma, factors, rotated, elements) = match rows {
        Rows::Raw(factors) => {
            let factors = factors.map_or_else(unread, |factors| factors.arg(x_rows));
            (product.x_arg(), product.gamma_arg(gpu), factors, unread(), [x_element, gamma_element])
        }
        Rows::Assigned(_) => (product.x_arg(), unread(), unread(), unread(), [x_element, gamma_element]),
        Rows::Rotated(rotated) => {
            let rotated = rotated.buffer().arg(rotated.elements() / 4);
            (unread(), unread(), unread(), rotated, [ElemType::UInt(UIntKind::U32); 2])
        }
    };
    // SAFETY: x holds its rows of k, suh K padded, gamma and the factors k and one a row where they are read, the words all tiles,
    // `partials` what it says and `rotated` the parts of m rows of K padded; tile rows are compared with those of the slice
    // and of K, rows and features with m and k. Of experts, the words and suh are those of all places in the bank, ids hold
    // an expert for each of m sums, x a row for `slots` of them, places [3, experts].
    unsafe {
        multiply_tiles::launch_unchecked::<R>(
            gpu.client(),
            count,
            CubeDim::new_2d(LANES as u32, config.planes as u32),
            weight.words_arg(1),
            x,
            gamma,
            factors,
            rotated,
            weight.scales_arg(1),
            arguments.ids,
            arguments.places,
            partials.buffer().arg(partials.elements()),
            arguments.m,
            arguments.slots,
            arguments.experts,
            arguments.projection,
            weight.in_features as u32,
            (k / SIDE) as u32,
            (n / SIDE) as u32,
            config.stage as u32,
            product.norm_scalars().0,
            config.trellis.constants(),
            config,
            elements,
        );
    }
    Ok(())
}

#[cfg(test)]
mod choice {
    use marlin_formats::exl3::Codebook;

    use super::*;
    use crate::element::Storage;
    use crate::linear::tensor::SHARED;

    #[test]
    fn cubes_fit_their_device() {
        let trellis = Trellis { bits: 3, codebook: Codebook::Mcg };
        for shared in SHARED {
            for (rows, parts, planes) in [1, 2, 4, 8].into_iter().flat_map(|rows| {
                [Parts::Plain, Parts::Scaled, Parts::Split]
                    .into_iter()
                    .flat_map(move |parts| [4, 8, 16].map(|planes| (rows, parts, planes)))
            }) {
                let raw = (rows <= ROTATED_ROWS).then_some(Input { x: Storage::F32, gamma: None });
                let config = RowsConfig {
                    trellis,
                    rows,
                    stage: MOST_STAGED,
                    planes,
                    depth: 2,
                    even: true,
                    parts,
                    raw,
                    experts: false,
                };
                let chosen = config.within(shared);
                let used = chosen.shared_bytes() + SHARED_BESIDE;
                assert!(used <= shared, "{rows} rows of {parts:?} parts by {planes} planes: {used} of {shared}");
                // The most recent ones have room for what was measured.
                assert!(shared < SHARED[2] || chosen == config, "{chosen:?}");
            }
        }
    }
}

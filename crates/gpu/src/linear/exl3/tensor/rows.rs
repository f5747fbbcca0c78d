//! Products of few rotated f16 rows with tiles on tensor cores (`m16n8k16` of planes of 32) with f32 sums. Each plane decodes
//! eight neighbouring tiles of its tile rows straight into operands; rows pass through shared memory, where one or two of
//! them are also rotated.

use cubecl::cmma::MmaDefinition;
use cubecl::ir::{ElemType, UIntKind};
use cubecl::prelude::*;
use half::f16;
use marlin_formats::DType;
use marlin_formats::exl3::HADAMARD;
use marlin_ops::{Result, Tensor};

use super::check_shared;
use super::fragment::{Constants, Lane, decode_lane, lane_word, new_lane};
use crate::decode::Trellis;
use crate::decode::exl3::SIDE;
use crate::element::{Storage, load};
use crate::linear::exl3::rotate::{self, Channels, LANES, NORM, first_channel, pair, transform};
use crate::linear::grid;
use crate::linear::operands::Product;
use crate::{Buffer, Gpu};

/// Tile rows of a Hadamard block.
const BLOCK_ROWS: usize = HADAMARD / SIDE;

/// Rows that are rotated where they are multiplied: more would be rotated too often.
const ROTATED_ROWS: usize = 2;

/// Most rows: those of a product.
pub(in crate::linear::exl3) const MOST_ROWS: usize = 8;

/// Neighbouring tiles of a plane, and of a cube.
const TILES: usize = 8;

/// Most tile rows of a slice.
const MOST_STAGED: usize = 64;

/// Columns of a cube.
const WIDTH: usize = TILES * SIDE;

/// Pairs of sums that a lane holds: [tile, half of the tile's columns].
const SUMS: usize = 2 * TILES;

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
    /// x as it comes, to be rotated; otherwise it was.
    rotated: Option<Storage>,
}

impl RowsConfig {
    /// Vectors of a row in shared memory; the last ones put neighbouring rows into different banks.
    const fn row_stride(&self) -> usize {
        self.stage * 4 + 4
    }

    /// Words of a plane's tiles that a lane loads at once.
    const fn words(&self) -> usize {
        self.depth * TILES * self.trellis.lane_words()
    }

    const fn shared_bytes(&self) -> usize {
        self.rows * self.row_stride() * 8 + self.planes * SUMS * LANES * 8
    }
}

/// `partials [slice, m, 16 tile_columns]` of m rows; cubes `[columns, slices]`. x is `[m, k]`, or in the order of
/// [`Channels::Fragment`] after the rotation. Slices have `slice_rows` tile rows, whole Hadamard blocks.
#[cube(launch_unchecked, address_type = "u64")]
#[allow(clippy::too_many_arguments)]
fn multiply_tiles<X: Numeric>(
    words: &[u32],
    x: &[X],
    rotated: &[Vector<u32, Const<2>>],
    suh: &[f16],
    partials: &mut [f32],
    m: u32,
    k: u32,
    tile_rows: u32,
    tile_columns: u32,
    slice_rows: u32,
    constants: Constants,
    #[comptime] c: RowsConfig,
    #[define(X)] _element: ElemType,
) {
    let unit = UNIT_POS_X as usize;
    let plane = UNIT_POS_Y as usize;
    let (m, k) = (m as usize, k as usize);
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
    }
    let mut stage = Shared::<[Vector<u32, Const<2>>]>::new_aligned_slice(comptime!(c.rows * c.row_stride()), 16usize);
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
    stage_rows::<X>(x, rotated, suh, &mut stage, begin, end, m, k, tile_rows, c);
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
    write_sums(&shared, partials, m, tile_columns * SIDE, c);
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

/// Puts tile rows `begin` to `end` of x into shared memory.
#[cube]
#[allow(clippy::too_many_arguments)]
fn stage_rows<X: Numeric>(
    x: &[X],
    rotated: &[Vector<u32, Const<2>>],
    suh: &[f16],
    stage: &mut Shared<[Vector<u32, Const<2>>]>,
    begin: usize,
    end: usize,
    m: usize,
    k: usize,
    tile_rows: usize,
    #[comptime] c: RowsConfig,
) {
    let lane = UNIT_POS_X as usize;
    let blocks = (end - begin) / BLOCK_ROWS;
    let mut task = UNIT_POS_Y as usize;
    while task < blocks * comptime!(c.rows) {
        let (row, block) = (task / blocks, task % blocks);
        let mut words = Vector::<u32, Const<2>>::new(0u32);
        if comptime!(c.rotated.is_some()) {
            let storage = comptime!(c.rotated.unwrap_or(Storage::F32));
            let first = (begin + block * BLOCK_ROWS) * SIDE + first_channel(lane, Channels::Fragment);
            let mut values = Array::<f32>::new(4usize);
            #[unroll]
            for i in 0..4usize {
                let feature = first + comptime!(Channels::Fragment.offset(i));
                let inside = row < m && feature < k;
                let value = load::<X>(x, select(inside, row * k + feature, 0usize), storage);
                // suh has all of K padded.
                values[i] = select(inside, value * f32::cast_from(suh[feature]) * NORM, f32::new(0.0));
            }
            transform(&mut values, true);
            words.insert(0usize, pair(values[0], values[1]));
            words.insert(1usize, pair(values[2], values[3]));
        } else {
            // Rows beyond the last are computed from the last and not written.
            let known = select(row < m, row, m - 1usize);
            words = rotated[(known * tile_rows + begin + block * BLOCK_ROWS) * 4usize + lane];
        }
        stage[row * comptime!(c.row_stride()) + block * LANES + lane] = words;
        task += comptime!(c.planes);
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
    let words = stage[g % comptime!(c.rows) * comptime!(c.row_stride()) + at * 4usize + t];
    let mut input = Array::<Vector<f16, Const<2>>>::new(2usize);
    input[0] = Vector::<f16, Const<2>>::reinterpret(words.extract(0usize));
    input[1] = Vector::<f16, Const<2>>::reinterpret(words.extract(1usize));
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
        for i in 0..2usize {
            mma.execute_inplace(weights.index(i), &input, products.index_mut(comptime!(2 * two + i)));
        }
    }
}

/// Adds the planes' sums up in order and writes them.
#[cube]
fn write_sums(
    shared: &Shared<[Vector<f32, Const<2>>]>,
    partials: &mut [f32],
    m: usize,
    n: usize,
    #[comptime] c: RowsConfig,
) {
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
                partials[(CUBE_POS_Y as usize * m + row) * n + CUBE_POS_X as usize * WIDTH + column] = sum.extract(e);
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
    /// Slices and planes that fill the device evenly with about 28 planes a core.
    pub(in crate::linear::exl3) fn new<R: Runtime>(gpu: &Gpu<R>, product: &Product<'_, R>, trellis: Trellis) -> Self {
        let m = product.x.rows();
        let tile_rows = product.weight.padded_in() / SIDE;
        let cores = gpu.properties().hardware.num_streaming_multiprocessors.map_or(128, |cores| cores as usize);
        // More words of a tile take the registers of a second row of tiles.
        let depth = if trellis.lane_words() == 2 { 2 } else { 1 };
        let cubes = product.weight.padded_out() / WIDTH;
        // The turns of the busiest core; a cube costs it about as much as six tile rows beside its own.
        let turns = |slice: &usize| (cubes * tile_rows.div_ceil(*slice)).div_ceil(cores) * (slice.min(&tile_rows) + 6);
        let lengths = (1..=MOST_STAGED / BLOCK_ROWS).map(|blocks| blocks * BLOCK_ROWS);
        let stage = lengths.rev().min_by_key(turns).unwrap_or(MOST_STAGED);
        let slices = tile_rows.div_ceil(stage);
        let resident = (cubes * slices).div_ceil(cores).max(1);
        let planes = 1 << (28 / resident).clamp(4, 16).ilog2();
        let even = tile_rows.is_multiple_of(stage) && stage.is_multiple_of(planes * depth);
        let raw = m <= ROTATED_ROWS && product.norm.is_none();
        let rotated = raw.then(|| Storage::of(product.x.dtype()));
        let config = RowsConfig { trellis, rows: m.next_power_of_two(), stage, planes, depth, even, rotated };
        Self { config, slices }
    }

    /// Whether x is to be rotated before.
    pub(in crate::linear::exl3) fn takes_rotated(&self) -> bool {
        self.config.rotated.is_none()
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
    let partials = gpu.scratch(operation, DType::F32, &[plan.slices, m, weight.padded_out()])?;
    if plan.takes_rotated() {
        let rotated = gpu.scratch(operation, DType::F16, &[m, k])?;
        rotate::input(gpu, product, factors, Channels::Fragment, &rotated);
        multiply(gpu, product, &plan, Some(&rotated), &partials)?;
    } else {
        multiply(gpu, product, &plan, None, &partials)?;
    }
    rotate::output(gpu, product, &partials, plan.slices);
    Ok(())
}

/// Enqueues the product into `partials [slices, M, N padded]`; `rotated` is x after the rotation if the plan takes it.
pub(in crate::linear::exl3) fn multiply<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    plan: &Plan,
    rotated: Option<&Tensor<Gpu<R>>>,
    partials: &Tensor<Gpu<R>>,
) -> Result<()> {
    check_shared(gpu, product.operation, plan.config.shared_bytes())?;
    let (m, weight, config) = (product.x.rows(), product.weight, plan.config);
    let (k, n) = (weight.padded_in(), weight.padded_out());
    let cubes = [n / WIDTH, plan.slices, 1];
    let count = grid(gpu, product.operation, cubes)?;
    let (x, element) = match config.rotated {
        Some(storage) => (product.x_arg(), storage.elem()),
        None => (gpu.unread(), ElemType::UInt(UIntKind::U32)),
    };
    // SAFETY: x holds m rows of k, suh K padded, the words all tiles, `partials` what it says and `rotated` m rows of K
    // padded; tile rows are compared with those of the slice and of K, rows and features with m and k.
    unsafe {
        multiply_tiles::launch_unchecked::<R>(
            gpu.client(),
            count,
            CubeDim::new_2d(LANES as u32, config.planes as u32),
            weight.words_arg(1),
            x,
            rotated.map_or_else(|| gpu.unread(), |rotated| rotated.buffer().arg(rotated.elements() / 4)),
            weight.scales_arg(1),
            partials.buffer().arg(partials.elements()),
            m as u32,
            weight.in_features as u32,
            (k / SIDE) as u32,
            (n / SIDE) as u32,
            config.stage as u32,
            config.trellis.constants(),
            config,
            element,
        );
    }
    Ok(())
}

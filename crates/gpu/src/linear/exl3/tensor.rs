//! Products of rotated f16 rows with tiles on tensor cores (`m16n8k16` of planes of 32) with f32 sums. Each plane decodes
//! four or eight neighbouring tiles of its tile rows straight into operands; rows pass through shared memory, where few of
//! them are also rotated.

use cubecl::cmma::MmaDefinition;
use cubecl::ir::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind, IntKind, UIntKind};
use cubecl::prelude::*;
use half::f16;
use marlin_formats::DType;
use marlin_formats::exl3::HADAMARD;
use marlin_ops::{Result, Tensor};

use super::fragment::{Lane, decode_lane, first_bit, selector};
use super::rotate::{self, Channels, LANES, NORM, first_channel, pair, transform};
use crate::decode::Trellis;
use crate::decode::exl3::{KEPT, SIDE};
use crate::element::{Storage, load};
use crate::linear::operands::Product;
use crate::{Buffer, Gpu};

/// Tile rows of a Hadamard block.
const BLOCK_ROWS: usize = HADAMARD / SIDE;

/// Rows that are rotated where they are multiplied: more would be rotated too often.
const ROTATED_ROWS: usize = 2;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct TensorConfig {
    trellis: Trellis,
    /// Rows of x in shared memory: 1, 2, 4, 8, 16 or 32.
    rows: usize,
    /// Tile rows of x in shared memory, whole Hadamard blocks.
    stage: usize,
    /// Planes of a cube, which take turns along K.
    planes: usize,
    /// Neighbouring tiles of a plane: 4 or 8.
    tiles: usize,
    /// Tile rows that a plane loads at once.
    depth: usize,
    /// Slices are whole turns of all planes and lie in shared memory at once.
    even: bool,
    /// x as it comes, to be rotated; otherwise it was.
    rotated: Option<Storage>,
}

impl TensorConfig {
    /// Blocks of 8 rows of x.
    const fn row_blocks(&self) -> usize {
        self.rows.div_ceil(8)
    }

    /// Columns of a cube.
    const fn width(&self) -> usize {
        self.tiles * SIDE
    }

    /// Vectors of a row in shared memory; the last ones put neighbouring rows into different banks.
    const fn row_stride(&self) -> usize {
        self.stage * 4 + 4
    }

    /// Words of a plane's tiles that a lane loads at once.
    const fn words(&self) -> usize {
        self.depth * self.tiles * self.trellis.lane_words()
    }

    /// Pairs of sums that a lane holds: [tile, row block, half of the tile's columns].
    const fn sums(&self) -> usize {
        self.tiles * self.row_blocks() * 2
    }

    const fn shared_bytes(&self) -> usize {
        self.rows * self.row_stride() * 8 + self.planes * self.sums() * LANES * 8
    }
}

/// `partials [slice, m, 16 tile_columns]` of m rows; cubes `[columns, slices, groups of rows]`. x is `[m, k]`, or in the
/// order of [`Channels::Fragment`] after the rotation. Slices have `slice_rows` tile rows, whole Hadamard blocks.
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
    kept: u32,
    power1: u32,
    power2: u32,
    power3: u32,
    power4: u32,
    power5: u32,
    power6: u32,
    power7: u32,
    #[comptime] c: TensorConfig,
    #[define(X)] _element: ElemType,
) {
    let unit = UNIT_POS_X as usize;
    let plane = UNIT_POS_Y as usize;
    let (m, k) = (m as usize, k as usize);
    let (tile_rows, tile_columns) = (tile_rows as usize, tile_columns as usize);
    let first_row = CUBE_POS_Z as usize * comptime!(c.rows);
    let begin = CUBE_POS_Y as usize * slice_rows as usize;
    let mut end = begin + slice_rows as usize;
    end = select(end < tile_rows, end, tile_rows);
    let bit = first_bit(unit, c.trellis);
    let mut powers = Array::<u32>::new(7usize);
    powers[0] = power1;
    powers[1] = power2;
    powers[2] = power3;
    powers[3] = power4;
    powers[4] = power5;
    powers[5] = power6;
    powers[6] = power7;
    let selector = selector(UNIT_POS_X, c.trellis.codebook);
    let lane = Lane { offset: (bit % 32usize) as u32, kept, selector, powers };
    let tile_words = comptime!(c.trellis.tile_words());
    // The words of a lane follow each other cyclically.
    let mut lane_words = Array::<usize>::new(3usize);
    #[unroll]
    for i in 0..3usize {
        lane_words[i] =
            (bit / 32usize + i) % tile_words + CUBE_POS_X as usize * comptime!(c.tiles * c.trellis.tile_words());
    }
    let mut stage = Shared::<[Vector<u32, Const<2>>]>::new_aligned_slice(comptime!(c.rows * c.row_stride()), 16usize);
    let mut products = Sequence::<Array<Vector<f32, Const<2>>>>::new();
    #[unroll]
    for _i in 0..comptime!(c.tiles * c.row_blocks()) {
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
    if comptime!(c.even) {
        stage_rows::<X>(x, rotated, suh, &mut stage, first_row, begin, end, m, k, tile_rows, c);
        sync_cube();
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
        sync_cube();
    } else {
        let mut chunk = begin;
        while chunk < end {
            let chunk_end = select(chunk + c.stage < end, chunk + c.stage, end);
            stage_rows::<X>(x, rotated, suh, &mut stage, first_row, chunk, chunk_end, m, k, tile_rows, c);
            sync_cube();
            let mut tile_row = chunk + plane;
            while tile_row < chunk_end {
                #[unroll]
                for d in 0..comptime!(c.depth) {
                    let at = tile_row + comptime!(d * c.planes);
                    if at < chunk_end {
                        multiply_row(&loaded, &stage, &mut products, at - chunk, &lane, d, c);
                    }
                    // The next chunk goes on where this one ends: its rows are whole turns of all planes.
                    let next = at + comptime!(c.depth * c.planes);
                    load_words(words, &lane_words, &mut loaded, next, end, tile_columns, d, c);
                }
                tile_row += comptime!(c.depth * c.planes);
            }
            sync_cube();
            chunk += c.stage;
        }
    }
    let mut shared = Shared::<[Vector<f32, Const<2>>]>::new_slice(comptime!(c.planes * c.sums() * LANES));
    #[unroll]
    for i in 0..comptime!(c.sums()) {
        shared[(plane * comptime!(c.sums()) + i) * LANES + unit] = products.index(comptime!(i / 2))[comptime!(i % 2)];
    }
    sync_cube();
    write_sums(&shared, partials, first_row, m, tile_columns * SIDE, c);
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
    #[comptime] c: TensorConfig,
) {
    let count = comptime!(c.trellis.lane_words());
    let tile_words = comptime!(c.trellis.tile_words());
    let row = select(tile_row < end, tile_row, end - 1usize) * (tile_columns * tile_words);
    #[unroll]
    for i in 0..count {
        let first = row + lane_words[i];
        #[unroll]
        for tile in 0..comptime!(c.tiles) {
            loaded[comptime!((d * c.tiles + tile) * count + i)] =
                words[first + comptime!(tile * c.trellis.tile_words())];
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
    #[comptime] c: TensorConfig,
) {
    let count = comptime!(c.trellis.lane_words());
    #[unroll]
    for i in 0..count {
        let first = next[i] as usize;
        #[unroll]
        for tile in 0..comptime!(c.tiles) {
            loaded[comptime!((d * c.tiles + tile) * count + i)] =
                words[first + comptime!(tile * c.trellis.tile_words())];
        }
        next[i] += hop;
    }
}

/// Puts tile rows `chunk` to `chunk_end` of the cube's rows into shared memory.
#[cube]
#[allow(clippy::too_many_arguments)]
fn stage_rows<X: Numeric>(
    x: &[X],
    rotated: &[Vector<u32, Const<2>>],
    suh: &[f16],
    stage: &mut Shared<[Vector<u32, Const<2>>]>,
    first_row: usize,
    chunk: usize,
    chunk_end: usize,
    m: usize,
    k: usize,
    tile_rows: usize,
    #[comptime] c: TensorConfig,
) {
    let lane = UNIT_POS_X as usize;
    let blocks = (chunk_end - chunk) / BLOCK_ROWS;
    let mut task = UNIT_POS_Y as usize;
    while task < blocks * comptime!(c.rows) {
        let (r, block) = (task / blocks, task % blocks);
        let row = first_row + r;
        let mut words = Vector::<u32, Const<2>>::new(0u32);
        if comptime!(c.rotated.is_some()) {
            let storage = comptime!(c.rotated.unwrap_or(Storage::F32));
            let first = (chunk + block * BLOCK_ROWS) * SIDE + first_channel(lane, Channels::Fragment);
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
            let row = select(row < m, row, m - 1usize);
            words = rotated[(row * tile_rows + chunk + block * BLOCK_ROWS) * 4usize + lane];
        }
        stage[r * comptime!(c.row_stride()) + block * LANES + lane] = words;
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
    #[comptime] c: TensorConfig,
) {
    let mma = MmaDefinition::<f16, f16, f32>::new(16usize, 8usize, 16usize);
    let (g, t) = (UNIT_POS_X as usize / 4usize, UNIT_POS_X as usize % 4usize);
    let mut inputs = Sequence::<Array<Vector<f16, Const<2>>>>::new();
    #[unroll]
    for b in 0..comptime!(c.row_blocks()) {
        let row = comptime!(8 * b) + g % comptime!(c.rows);
        let words = stage[row * comptime!(c.row_stride()) + at * 4usize + t];
        let mut input = Array::<Vector<f16, Const<2>>>::new(2usize);
        input[0] = Vector::<f16, Const<2>>::reinterpret(words.extract(0usize));
        input[1] = Vector::<f16, Const<2>>::reinterpret(words.extract(1usize));
        inputs.push(input);
    }
    // Two are decoded before the first is multiplied: products wait for what tensor cores decode. More take registers.
    #[unroll]
    for two in 0..comptime!(c.tiles / 2) {
        let mut weights = Sequence::<Array<Vector<f16, Const<2>>>>::new();
        #[unroll]
        for i in 0..2usize {
            let first = comptime!((d * c.tiles + 2 * two + i) * c.trellis.lane_words());
            weights.push(decode_lane(loaded, lane, first, c.trellis));
        }
        #[unroll]
        for i in 0..2usize {
            #[unroll]
            for b in 0..comptime!(c.row_blocks()) {
                let product = products.index_mut(comptime!((2 * two + i) * c.row_blocks() + b));
                mma.execute_inplace(weights.index(i), inputs.index(b), product);
            }
        }
    }
}

/// Adds the planes' sums up in order and writes them.
#[cube]
fn write_sums(
    shared: &Shared<[Vector<f32, Const<2>>]>,
    partials: &mut [f32],
    first_row: usize,
    m: usize,
    n: usize,
    #[comptime] c: TensorConfig,
) {
    let left = m - first_row;
    let rows = select(left < comptime!(c.rows), left, comptime!(c.rows).runtime());
    let mut slot = UNIT_POS as usize;
    let width = comptime!(c.width());
    while slot < rows.div_ceil(2usize) * width {
        let (pair, column) = (slot / width, slot % width);
        let (tile, half, g) = (column / SIDE, column / 8usize % 2usize, column % 8usize);
        let product = tile * comptime!(c.row_blocks()) + pair / 4usize;
        let at = (product * 2usize + half) * LANES + g * 4usize + pair % 4usize;
        let mut sum = Vector::<f32, Const<2>>::new(0.0);
        #[unroll]
        for plane in 0..comptime!(c.planes) {
            sum += shared[at + comptime!(plane * c.sums() * LANES)];
        }
        #[unroll]
        for e in 0..2usize {
            let row = first_row + pair * 2usize + e;
            if row < m {
                partials[(CUBE_POS_Y as usize * m + row) * n + CUBE_POS_X as usize * width + column] = sum.extract(e);
            }
        }
        slot += comptime!(LANES * c.planes);
    }
}

/// Whether the device multiplies such fragments.
pub(super) fn available<R: Runtime>(gpu: &Gpu<R>) -> bool {
    let config = |ab: ElemType, cd: ElemType, k: u32| MmaConfig {
        a_type: ab.into(),
        b_type: ab.into(),
        cd_type: cd.into(),
        m: 16,
        n: 8,
        k,
    };
    let products = config(ElemType::Float(FloatKind::F16), ElemType::Float(FloatKind::F32), 16);
    let sums = config(ElemType::UInt(UIntKind::U8), ElemType::Int(IntKind::I32), 32);
    let known = &gpu.properties().features.matmul.mma;
    rotate::has_planes(gpu) && known.contains(&products) && known.contains(&sums)
}

/// A launch: what the kernel is compiled for, and the tile rows of a slice.
pub(super) struct Plan {
    config: TensorConfig,
    slice_rows: usize,
    pub(super) slices: usize,
}

impl Plan {
    /// Slices and planes that fill the device evenly with about 28 planes a core.
    pub(super) fn new<R: Runtime>(gpu: &Gpu<R>, product: &Product<'_, R>, trellis: Trellis) -> Self {
        let m = product.x.rows();
        let rows = m.next_power_of_two().min(32);
        let tile_rows = product.weight.padded_in() / SIDE;
        let cores = gpu.properties().hardware.num_streaming_multiprocessors.map_or(128, |cores| cores as usize);
        // More rows have more sums than there are registers for eight tiles, or for two rows of tiles at once.
        let tiles = if rows <= 16 { 8 } else { 4 };
        let depth = if trellis.lane_words() == 2 && rows <= 8 { 2 } else { 1 };
        let cubes = product.weight.padded_out() / (tiles * SIDE) * m.div_ceil(rows);
        let stage = (1024 / rows).clamp(32, 64);
        // The turns of the busiest core; a cube costs it about as much as six tile rows beside its own.
        let turns = |slice: &usize| (cubes * tile_rows.div_ceil(*slice)).div_ceil(cores) * (slice.min(&tile_rows) + 6);
        let lengths =
            (1..=stage / BLOCK_ROWS).map(|blocks| blocks * BLOCK_ROWS).chain([tile_rows.next_multiple_of(stage)]);
        let slice_rows = lengths.rev().filter(|&slice| slice <= stage || m > 16).min_by_key(turns).unwrap_or(stage);
        let slices = tile_rows.div_ceil(slice_rows);
        let resident = (cubes * slices).div_ceil(cores).max(1);
        let most = 16 / rows.div_ceil(8);
        let planes = 1 << (28 / resident).clamp(4, most.max(4)).ilog2();
        let even =
            slice_rows <= stage && tile_rows.is_multiple_of(slice_rows) && slice_rows.is_multiple_of(planes * depth);
        let raw = m <= ROTATED_ROWS && product.norm.is_none();
        let rotated = raw.then(|| Storage::of(product.x.dtype()));
        let stage = stage.min(slice_rows);
        let config = TensorConfig { trellis, rows, stage, planes, tiles, depth, even, rotated };
        Self { config, slice_rows, slices }
    }

    /// Whether x is to be rotated before.
    pub(super) fn takes_rotated(&self) -> bool {
        self.config.rotated.is_none()
    }

    /// Why the plan cannot be launched.
    fn limit<R: Runtime>(&self, gpu: &Gpu<R>) -> Option<String> {
        let (bytes, most) = (self.config.shared_bytes(), gpu.properties().hardware.max_shared_memory_size);
        (bytes > most).then(|| format!("{bytes} bytes of shared memory where there are {most}"))
    }
}

/// Enqueues the product into `partials [slices, M, N padded]`; `rotated` is x after the rotation if the plan takes it.
pub(super) fn launch<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    plan: &Plan,
    rotated: Option<&Buffer>,
    partials: &Tensor<Gpu<R>>,
) -> Result<()> {
    if let Some(what) = plan.limit(gpu) {
        return Err(crate::linear::limit(gpu, product.operation, what));
    }
    let (m, weight, config) = (product.x.rows(), product.weight, plan.config);
    let (k, n) = (weight.padded_in(), weight.padded_out());
    let cubes = [n / config.width(), plan.slices, m.div_ceil(config.rows)];
    let count = crate::linear::grid(gpu, product.operation, cubes)?;
    let (x, element) = match config.rotated {
        Some(storage) => (product.x_arg(), storage.elem()),
        None => (gpu.unread(), ElemType::UInt(UIntKind::U32)),
    };
    let [p1, p2, p3, p4, p5, p6, p7] = config.trellis.powers();
    // SAFETY: x holds m rows of k, suh K padded, the words all tiles, `partials` what it says and `rotated` m rows of K
    // padded; tile rows are compared with those of the slice and of K, rows and features with m and k.
    unsafe {
        multiply_tiles::launch_unchecked::<R>(
            gpu.client(),
            count,
            CubeDim::new_2d(LANES as u32, config.planes as u32),
            weight.words_arg(1),
            x,
            rotated.map_or_else(|| gpu.unread(), |buffer| buffer.arg(m * k / 4)),
            weight.scales_arg(1),
            partials.buffer().arg(partials.elements()),
            m as u32,
            weight.in_features as u32,
            (k / SIDE) as u32,
            (n / SIDE) as u32,
            plan.slice_rows as u32,
            KEPT,
            p1,
            p2,
            p3,
            p4,
            p5,
            p6,
            p7,
            config,
            element,
        );
    }
    Ok(())
}

/// The dtype of activations that the kernel takes: others would lose range or precision as f16.
pub(super) const fn takes(dtype: DType) -> bool {
    matches!(dtype, DType::F16)
}

//! One or two rows with codebook mul1, whose values are linear in the sums of a state's four bytes but for their last
//! rounding, to f16. The bytes go into products as they are, so that nothing decodes them further: each is multiplied with
//! the same value of x, a whole number of 23 bits times a power of two of its row and Hadamard block, in three signed bytes.
//! Sums over a block are exact. Values that are not rounded lie within half an ulp of those that are, 1.8e-4 of a value in the
//! mean; x keeps all but 2^-22 of the largest value of its block. The constant part is finite for |x suh| up to 8e35.
//!
//! A fragment of `m16n8k32` has for each lane and register one state of its column of weights, and for the 8-column operand
//! one byte of x four times. Its columns are `[row, digit]`, three digits and an unused place for each row. A plane rotates
//! the block that it multiplies, so that planes wait for each other only when their sums are added up.
//!
//! The few rows of experts that decoded tokens chose are multiplied in the same way, each alone.

use cubecl::cmma::MmaDefinition;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use half::f16;
use marlin_formats::DType;
use marlin_formats::exl3::{Codebook, HADAMARD};
use marlin_ops::{Result, Tensor};

use super::assigned::{Arguments, AssignedRows, Origin, origin};
use super::check_shared;
use super::fragment::{Constants, Lane, align, lane_bytes, lane_word, new_lane};
use super::parts::Parts;
use super::rows::{BLOCK_ROWS, SUMS, TILES, WIDTH, load_raw};
use crate::decode::Trellis;
use crate::decode::exl3::SIDE;
use crate::halves::{inverse, power};
use crate::linear::exl3::rotate::{self, LANES, transform};
use crate::linear::grid;
use crate::linear::operands::{Input, Product};
use crate::{Buffer, Gpu};

/// Planes of a cube, each with a Hadamard block.
const PLANES: usize = 4;

/// Signed bytes of a value of x, the lowest first.
const DIGITS: usize = 3;

/// Columns of a row among the eight of the operand.
const COLUMNS: usize = 4;

/// Most rows: those that have columns.
pub(super) const MOST_ROWS: usize = 8 / COLUMNS;

/// Vectors of a block in shared memory by pair of values and digit; the last ones put digits of one row into different banks.
const BLOCK_STRIDE: usize = 4 * BLOCK_ROWS + 4;

/// The exponent of a block's largest value times its power of two: digits hold whole numbers up to 0x7f7f7f.
const TOP: u32 = 21;

// Sums over a block are f32 exactly.
const _: () = assert!(HADAMARD * 4 * 255 * 128 < 1 << 24);

/// Blocks whose largest value has a lower biased exponent are lifted by [`LIFT`] first: powers end at 2^126, too few for them.
const LOW: u32 = 64;

/// What lifts them.
const LIFT: f32 = 4_294_967_296.0;

/// What whole numbers are divided by before they are scaled, so that scales of the largest blocks are finite, and those of blocks
/// down to 2^-117 normal: smaller ones lose up to 2^-15.
const LOWERED: f32 = 1_048_576.0;

/// What f32 add to round to whole numbers: 3 * 2^22.
const ROUNDING: f32 = 12_582_912.0;

/// Added to a whole number, it makes its digits bytes without a sign, each 128 more.
const SIGNLESS: u32 = 0x0080_8080;

/// What byte sum 0 stands for.
const ZERO: f32 = Codebook::MUL1_MIDDLE - 510.0 * Codebook::MUL1_STEP;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct BytesConfig {
    trellis: Trellis,
    /// Rows of a cube.
    rows: usize,
    input: Input,
    /// Cubes have an assignment each, with the weight of its expert.
    experts: bool,
}

impl BytesConfig {
    /// Vectors of a plane's block in shared memory: [pair of values, digit, row].
    const fn staged(&self) -> usize {
        2 * DIGITS * self.rows * BLOCK_STRIDE
    }

    const fn shared_bytes(&self) -> usize {
        PLANES * (self.staged() * 8 + SUMS * LANES * 8 + self.rows * 8)
    }
}

/// `partials [slice, rows, 16 tile_columns]` of x `[rows, k]`; cubes `[columns, slices]`, of experts
/// `[columns, slices, assignments]`. Slices have [`PLANES`] Hadamard blocks.
#[cube(launch_unchecked, address_type = "u64")]
#[allow(clippy::too_many_arguments)]
fn multiply_bytes<X: Numeric, G: Numeric>(
    words: &[u32],
    x: &[X],
    gamma: &[G],
    row_factors: &[f32],
    suh: &[f16],
    ids: &[u32],
    places: &[u32],
    partials: &mut [f32],
    m: u32,
    slots: u32,
    experts: u32,
    projection: u32,
    k: u32,
    blocks: u32,
    tile_columns: u32,
    gamma_offset: f32,
    constants: Constants,
    #[comptime] c: BytesConfig,
    #[define(X, G)] _elements: [ElemType; 2],
) {
    let m = if comptime!(c.experts) { m as usize } else { c.rows.runtime() };
    let origin = origin(ids, places, m, slots, experts, projection, c.experts);
    if comptime!(c.experts) {
        if origin.place == u32::MAX {
            terminate!();
        }
    }
    let unit = UNIT_POS_X as usize;
    let plane = UNIT_POS_Y as usize;
    let mut stage = Shared::<[Vector<u32, Const<2>>]>::new_slice(comptime!(PLANES * c.staged()));
    let mut shared = Shared::<[Vector<i32, Const<2>>]>::new_slice(comptime!(PLANES * SUMS * LANES));
    let mut scales = Shared::<[Vector<f32, Const<2>>]>::new_slice(comptime!(PLANES * c.rows));
    let mut products = Sequence::<Array<Vector<i32, Const<2>>>>::new();
    #[unroll]
    for _i in 0..TILES {
        let mut zero = Array::<Vector<i32, Const<2>>>::new(2usize);
        zero[0] = Vector::<i32, Const<2>>::new(0i32);
        zero[1] = Vector::<i32, Const<2>>::new(0i32);
        products.push(zero);
    }
    let block = CUBE_POS_Y as usize * PLANES + plane;
    if block < blocks as usize {
        let lane = new_lane(&constants, c.trellis);
        // Words have indices of 32 bits; only the sum with the address has 64.
        let hop = tile_columns * comptime!(c.trellis.tile_words() as u32);
        let mut tile_row = (block * BLOCK_ROWS) as u32;
        if comptime!(c.experts) {
            tile_row += origin.place * blocks * comptime!(BLOCK_ROWS as u32);
        }
        let first = tile_row * hop + CUBE_POS_X * comptime!((TILES * c.trellis.tile_words()) as u32);
        let mut next = Array::<u32>::new(comptime!(c.trellis.lane_words()));
        #[unroll]
        for i in 0..comptime!(c.trellis.lane_words()) {
            next[i] = first + lane_word(unit, i, c.trellis) as u32;
        }
        let mut loaded = Array::<u32>::new(comptime!(TILES * c.trellis.lane_words()));
        #[unroll]
        for tile in 0..TILES {
            load_tile(words, &next, &mut loaded, tile, c.trellis);
        }
        let own = plane * comptime!(c.staged());
        let mut first_suh = 0usize;
        if comptime!(c.experts) {
            first_suh = (origin.place * blocks) as usize * HADAMARD;
        }
        stage_rows::<X, G>(
            x,
            gamma,
            row_factors,
            suh,
            &mut stage,
            &mut scales,
            &origin,
            first_suh,
            block,
            k as usize,
            gamma_offset,
            c,
        );
        sync_plane();
        // The unused column has a digit again.
        let digit = select(unit / 4usize % COLUMNS < DIGITS, unit / 4usize % COLUMNS, 0usize);
        let row = unit / 4usize / COLUMNS % comptime!(c.rows);
        let mut at = own + (digit * comptime!(c.rows) + row) * BLOCK_STRIDE + unit % 4usize;
        for _row in 1..comptime!(BLOCK_ROWS as u32).runtime() {
            #[unroll]
            for i in 0..comptime!(c.trellis.lane_words()) {
                next[i] += hop;
            }
            multiply_row(words, &next, &mut loaded, &stage, &mut products, at, &lane, true, c);
            at += 4usize;
        }
        multiply_row(words, &next, &mut loaded, &stage, &mut products, at, &lane, false, c);
    } else if unit == 0 {
        #[unroll]
        for row in 0..comptime!(c.rows) {
            scales[plane * comptime!(c.rows) + row] = Vector::<f32, Const<2>>::new(0.0);
        }
    }
    #[unroll]
    for i in 0..SUMS {
        shared[(plane * SUMS + i) * LANES + unit] = products.index(comptime!(i / 2))[comptime!(i % 2)];
    }
    sync_cube();
    write_sums(&shared, &scales, partials, &origin, tile_columns as usize * SIDE, c);
}

/// Rotates a block of each row and puts it and its scales into the shared memory of the plane.
#[cube]
#[allow(clippy::too_many_arguments)]
fn stage_rows<X: Numeric, G: Numeric>(
    x: &[X],
    gamma: &[G],
    row_factors: &[f32],
    suh: &[f16],
    stage: &mut Shared<[Vector<u32, Const<2>>]>,
    scales: &mut Shared<[Vector<f32, Const<2>>]>,
    origin: &Origin,
    first_suh: usize,
    block: usize,
    k: usize,
    gamma_offset: f32,
    #[comptime] c: BytesConfig,
) {
    let plane = UNIT_POS_Y as usize;
    #[unroll]
    for row in 0..comptime!(c.rows) {
        let mut values = load_raw::<X, G>(
            x,
            gamma,
            row_factors,
            suh,
            origin.x + row,
            first_suh,
            block * HADAMARD,
            origin.x_rows,
            k,
            gamma_offset,
            c.input,
        );
        // The first value alone adds up over a transform.
        let sum = values[0] * comptime!(HADAMARD as f32 * ZERO);
        transform(&mut values, true);
        let factor = stage_block(&values, stage, plane * comptime!(c.staged()) + row * BLOCK_STRIDE, c);
        if UNIT_POS_X == 0 {
            let mut scale = Vector::<f32, Const<2>>::empty();
            scale.insert(0usize, factor * Codebook::MUL1_STEP);
            scale.insert(1usize, sum);
            scales[plane * comptime!(c.rows) + row] = scale;
        }
    }
}

/// Loads a lane's words of a tile of the row whose first are `next`.
#[cube]
fn load_tile(
    words: &[u32],
    next: &Array<u32>,
    loaded: &mut Array<u32>,
    #[comptime] tile: usize,
    #[comptime] t: Trellis,
) {
    #[unroll]
    for i in 0..comptime!(t.lane_words()) {
        loaded[comptime!(tile * t.lane_words() + i)] = words[next[i] as usize + comptime!(tile * t.tile_words())];
    }
}

/// Puts a lane's four values times a power of two, rounded to whole numbers, into shared memory. [`LOWERED`] over the power; NaN
/// if a value of the block is not finite.
#[cube]
fn stage_block(
    values: &Array<f32>,
    stage: &mut Shared<[Vector<u32, Const<2>>]>,
    first: usize,
    #[comptime] c: BytesConfig,
) -> f32 {
    // Words of magnitudes order as they do, NaN above all others.
    let mut largest = 0u32;
    #[unroll]
    for i in 0..4usize {
        let word = u32::reinterpret(values[i]) & 0x7fff_ffffu32;
        largest = select(word > largest, word, largest);
    }
    #[unroll]
    for bit in 0..5u32 {
        let word = plane_shuffle_xor(largest, comptime!(1u32 << bit));
        largest = select(word > largest, word, largest);
    }
    let low = largest < comptime!(LOW << 23);
    let lift = select(low, f32::new(LIFT), f32::new(1.0));
    let power = power(f32::reinterpret(largest) * lift, TOP);
    #[unroll]
    for pair in 0..2usize {
        let mut digits = Array::<u32>::new(2usize);
        #[unroll]
        for i in 0..2usize {
            let whole = u32::reinterpret(values[comptime!(2 * pair + i)] * lift * power + ROUNDING);
            digits[i] = (whole + comptime!(SIGNLESS.wrapping_sub(ROUNDING.to_bits()))) ^ SIGNLESS;
        }
        #[unroll]
        for digit in 0..DIGITS {
            let mut four = Vector::<u32, Const<2>>::empty();
            #[unroll]
            for i in 0..2usize {
                four.insert(i, ((digits[i] >> comptime!(8 * digit as u32)) & 0xffu32) * 0x0101_0101u32);
            }
            stage[first + comptime!((pair * DIGITS + digit) * c.rows * BLOCK_STRIDE) + UNIT_POS_X as usize] = four;
        }
    }
    let lowered = select(low, f32::new(LOWERED / LIFT), f32::new(LOWERED));
    select(largest < 0x7f80_0000u32, inverse(power) * lowered, f32::NAN.runtime())
}

/// Adds the products of a tile row, whose x are `at` in shared memory, and loads those of the next one if there is one.
#[cube]
#[allow(clippy::too_many_arguments)]
fn multiply_row(
    words: &[u32],
    next: &Array<u32>,
    loaded: &mut Array<u32>,
    stage: &Shared<[Vector<u32, Const<2>>]>,
    products: &mut Sequence<Array<Vector<i32, Const<2>>>>,
    at: usize,
    lane: &Lane,
    #[comptime] loads: bool,
    #[comptime] c: BytesConfig,
) {
    let mma = MmaDefinition::<u8, i8, i32>::new(16usize, 8usize, 32usize);
    let mut inputs = Sequence::<Array<Vector<i8, Const<4>>>>::new();
    #[unroll]
    for pair in 0..2usize {
        let four = stage[at + comptime!(pair * DIGITS * c.rows * BLOCK_STRIDE)];
        let mut input = Array::<Vector<i8, Const<4>>>::new(2usize);
        input[0] = Vector::<i8, Const<4>>::reinterpret(four.extract(0usize));
        input[1] = Vector::<i8, Const<4>>::reinterpret(four.extract(1usize));
        inputs.push(input);
    }
    let mut aligned = Sequence::<Array<u32>>::new();
    #[unroll]
    for tile in 0..TILES {
        let mut own = Array::<u32>::new(comptime!(c.trellis.lane_words()));
        #[unroll]
        for i in 0..comptime!(c.trellis.lane_words()) {
            own[i] = loaded[comptime!(tile * c.trellis.lane_words() + i)];
        }
        aligned.push(align(&own, lane, 0usize, c.trellis));
    }
    if comptime!(loads) {
        #[unroll]
        for tile in 0..TILES {
            load_tile(words, next, loaded, tile, c.trellis);
        }
        // Loads are not to move down.
        sync_plane();
    }
    #[unroll]
    for tile in 0..TILES {
        #[unroll]
        for pair in 0..2usize {
            let weights = lane_bytes(aligned.index(tile), lane, pair, c.trellis);
            mma.execute_inplace(&weights, inputs.index(pair), products.index_mut(tile));
        }
    }
}

/// Adds the planes' sums up and writes what they stand for; `scales` are what byte sums of whole numbers count, and the
/// constant part, by plane and row.
#[cube]
fn write_sums(
    shared: &Shared<[Vector<i32, Const<2>>]>,
    scales: &Shared<[Vector<f32, Const<2>>]>,
    partials: &mut [f32],
    origin: &Origin,
    n: usize,
    #[comptime] c: BytesConfig,
) {
    let mut sum = UNIT_POS as usize;
    while sum < comptime!(c.rows * WIDTH) {
        let (row, column) = (sum / WIDTH, sum % WIDTH);
        let (tile, half, g) = (column / SIDE, column / 8usize % 2usize, column % 8usize);
        // A row's columns are those of two lanes.
        let from = (tile * 2usize + half) * LANES + g * 4usize + row * 2usize;
        let mut value = f32::new(0.0);
        #[unroll]
        for plane in 0..PLANES {
            let low = shared[from + comptime!(plane * SUMS * LANES)];
            let high = shared[from + comptime!(plane * SUMS * LANES + 1)];
            let whole = f32::cast_from(low.extract(0usize)) * comptime!(1.0 / LOWERED)
                + f32::cast_from(low.extract(1usize)) * comptime!(256.0 / LOWERED)
                + f32::cast_from(high.extract(0usize)) * comptime!(65_536.0 / LOWERED);
            let scale = scales[row + comptime!(plane * c.rows)];
            value += whole * scale.extract(0usize) + scale.extract(1usize);
        }
        let at = (CUBE_POS_Y as usize * origin.rows + origin.row + row) * n + CUBE_POS_X as usize * WIDTH;
        partials[at + column] = value;
        sum += comptime!(LANES * PLANES);
    }
}

/// Whether the kernel takes such rows: not those that are split, whose products need the rounded values of weights.
pub(super) fn takes(trellis: Trellis, parts: Parts) -> bool {
    trellis.codebook == Codebook::Mul1 && parts != Parts::Split
}

/// Enqueues the product of at most [`MOST_ROWS`] rows with a trellis; `factors` are the row factors of its norm.
pub(super) fn launch<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    trellis: Trellis,
    factors: Option<&Buffer>,
) -> Result<()> {
    let partials = multiply(gpu, product, trellis, factors, None)?;
    rotate::output(gpu, product, &partials, partials.rows() / product.x.rows(), None);
    Ok(())
}

/// Enqueues the product into `[slices, rows, N padded]`, still to be rotated; with `assigned`, of as many rows with the weights
/// of their experts.
pub(super) fn multiply<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    trellis: Trellis,
    factors: Option<&Buffer>,
    assigned: Option<&AssignedRows<'_, R>>,
) -> Result<Tensor<Gpu<R>>> {
    let (x_rows, weight, experts) = (product.x.rows(), product.weight, assigned.is_some());
    let config = BytesConfig { trellis, rows: if experts { 1 } else { x_rows }, input: product.input(), experts };
    check_shared(gpu, product.operation, config.shared_bytes())?;
    let (blocks, n) = (weight.padded_in() / HADAMARD, weight.padded_out());
    let slices = blocks.div_ceil(PLANES);
    let arguments = Arguments::new(gpu, x_rows, assigned);
    let m = arguments.m as usize;
    let partials = gpu.scratch(product.operation, DType::F32, &[slices, m, n])?;
    let count = grid(gpu, product.operation, [n / WIDTH, slices, m / config.rows])?;
    let [x_element, gamma_element, ..] = product.elements();
    // SAFETY: x holds the rows of k, gamma and the factors k and the rows where they are read; features are compared with k.
    // suh and the words hold all blocks, with which planes compare theirs, of all places in a bank; ids hold an expert for each
    // of m rows, places [3, experts]. N padded is a multiple of a cube's columns, so `partials` hold all sums.
    unsafe {
        multiply_bytes::launch_unchecked::<R>(
            gpu.client(),
            count,
            CubeDim::new_2d(LANES as u32, PLANES as u32),
            weight.words_arg(1),
            product.x_arg(),
            product.gamma_arg(gpu),
            factors.map_or_else(|| gpu.unread(), |factors| factors.arg(x_rows)),
            weight.scales_arg(1),
            arguments.ids,
            arguments.places,
            partials.buffer().arg(partials.elements()),
            arguments.m,
            arguments.slots,
            arguments.experts,
            arguments.projection,
            weight.in_features as u32,
            blocks as u32,
            (n / SIDE) as u32,
            product.norm_scalars().0,
            trellis.constants(),
            config,
            [x_element, gamma_element],
        );
    }
    Ok(partials)
}

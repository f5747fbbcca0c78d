//! Products of a few rotated rows with tiles, on any device: a unit decodes columns `g` and `g + 8` of a tile straight
//! to registers, from words of their own and the one before these.

use cubecl::prelude::*;
use marlin_formats::exl3::HADAMARD;
use marlin_ops::{Result, Tensor};

use crate::decode::Trellis;
use crate::decode::exl3::{SIDE, pair_position, pair_state, pair_words, value};
use crate::linear::operands::Product;
use crate::{Buffer, Gpu};

/// Most rows that share one pass over the weights.
pub(super) const MOST_ROWS: usize = 8;

/// Pairs of columns of a block of 128.
const PAIRS: usize = HADAMARD / 2;

/// Units of a cube along K.
const LANES_K: usize = 4;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct RowsConfig {
    trellis: Trellis,
    rows: usize,
}

/// `partials [slice, m, 128 cubes]` of x `[m, 16 tile_rows]`; cubes `[blocks of N, groups of rows, slices]`, slice s of S
/// has the tile rows from `floor(s T / S)`.
#[cube(launch_unchecked)]
fn multiply_pairs(
    x: &[Vector<f32, Const<4>>],
    words: &[u32],
    table: &[f32],
    partials: &mut [f32],
    m: u32,
    tile_rows: u32,
    tile_columns: u32,
    slices: u32,
    #[comptime] c: RowsConfig,
) {
    let (m, tile_rows, tile_columns, slices) = (m as usize, tile_rows as usize, tile_columns as usize, slices as usize);
    let rows = comptime!(c.rows);
    let pair = UNIT_POS as usize % PAIRS;
    let lane_k = UNIT_POS as usize / PAIRS;
    let slice = CUBE_POS_Z as usize;
    let first_row = CUBE_POS_Y as usize * rows;
    let tile_column = CUBE_POS_X as usize * comptime!(HADAMARD / SIDE) + pair / 8usize;
    let last = (slice + 1usize) * tile_rows / slices;
    let mut sums = Array::<f32>::new(comptime!(2 * c.rows));
    #[unroll]
    for i in 0..comptime!(2 * c.rows) {
        sums[i] = f32::new(0.0);
    }
    let mut tile_row = slice * tile_rows / slices + lane_k;
    while tile_row < last {
        let tile = tile_row * tile_columns + tile_column;
        let loaded = pair_words(words, tile * comptime!(c.trellis.tile_words()), pair % 8usize, c.trellis);
        #[unroll]
        for q in 0..4usize {
            let mut values = Array::<Vector<f32, Const<4>>>::new(rows);
            #[unroll]
            for r in 0..rows {
                // Rows beyond the last are computed from the last and not written.
                let row = select(first_row + r < m, first_row + r, m - 1usize);
                values[r] = x[(row * tile_rows + tile_row) * 4usize + q];
            }
            #[unroll]
            for i in 0..4usize {
                let p = comptime!(pair_position(4 * q + i));
                let near = value(pair_state(&loaded, p, c.trellis), table, c.trellis.codebook);
                let far = value(pair_state(&loaded, comptime!(p + 4), c.trellis), table, c.trellis.codebook);
                #[unroll]
                for r in 0..rows {
                    sums[comptime!(2 * r)] += near * values[r].extract(i);
                    sums[comptime!(2 * r + 1)] += far * values[r].extract(i);
                }
            }
        }
        tile_row += LANES_K;
    }
    let mut handed_over = Shared::<[f32]>::new_slice(comptime!(LANES_K * 2 * c.rows * PAIRS));
    #[unroll]
    for i in 0..comptime!(2 * c.rows) {
        handed_over[(lane_k * comptime!(2 * c.rows) + i) * PAIRS + pair] = sums[i];
    }
    sync_cube();
    #[unroll]
    for i in 0..comptime!((2 * c.rows).div_ceil(LANES_K)) {
        let which = comptime!(i * LANES_K) + lane_k;
        let row = first_row + which / 2usize;
        if which < comptime!(2 * c.rows) && row < m {
            let mut sum = f32::new(0.0);
            #[unroll]
            for lane in 0..LANES_K {
                sum += handed_over[(comptime!(lane * 2 * c.rows) + which) * PAIRS + pair];
            }
            let column = tile_column * SIDE + which % 2usize * 8usize + pair % 8usize;
            partials[(slice * m + row) * (tile_columns * SIDE) + column] = sum;
        }
    }
}

/// How many slices of K fill a device.
pub(super) fn slices<R: Runtime>(gpu: &Gpu<R>, product: &Product<'_, R>) -> usize {
    const CORES: usize = 32;
    let cores = gpu.properties().hardware.num_streaming_multiprocessors.map_or(CORES, |cores| cores as usize);
    let weight = product.weight;
    let cubes = weight.padded_out() / HADAMARD * product.x.rows().div_ceil(MOST_ROWS);
    // Of at least 8 tile rows for each lane along K.
    let most = weight.padded_in() / SIDE / (8 * LANES_K);
    (4 * cores).div_ceil(cubes).clamp(1, most.clamp(1, 16))
}

/// Enqueues the product of `x [M, K padded]`, f32, into `partials [slices, M, N padded]`.
pub(super) fn launch<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    trellis: Trellis,
    x: &Buffer,
    partials: &Tensor<Gpu<R>>,
    slices: usize,
) -> Result<()> {
    let (m, weight) = (product.x.rows(), product.weight);
    let (k, n) = (weight.padded_in(), weight.padded_out());
    let config = RowsConfig { trellis, rows: m.next_power_of_two().min(MOST_ROWS) };
    let count = crate::linear::grid(gpu, product.operation, [n / HADAMARD, m.div_ceil(config.rows), slices])?;
    // SAFETY: x holds m rows of K padded, the words the tiles of K and N padded, `partials` what it says; whole tiles and
    // blocks lie within, and rows are compared with m.
    unsafe {
        multiply_pairs::launch_unchecked::<R>(
            gpu.client(),
            count,
            CubeDim::new_1d((PAIRS * LANES_K) as u32),
            x.arg(m * k / 4),
            weight.words_arg(1),
            weight.table_arg(),
            partials.buffer().arg(partials.elements()),
            m as u32,
            (k / SIDE) as u32,
            (n / SIDE) as u32,
            slices as u32,
            config,
        );
    }
    Ok(())
}

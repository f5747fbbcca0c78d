//! Products whose tiles do not fill the device evenly: all (tile, step of K) pairs lie in a row, tile by tile, and every
//! worker has an equal stretch of it (stream-K, Osama et al. 2023). A tile that is one worker's own is finished at once;
//! the others are written as partial sums and added afterwards in ascending order of K.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::Result;

use super::epilogue::finish;
use super::matrix::finish_tile;
use super::operands::Product;
use super::tile::{Tile, TileConfig, clear, multiply};
use crate::{Buffer, Gpu};

/// First position of worker `w` of `workers`: `floor(w total / workers)`, without a large product.
#[cube]
fn first_of(w: usize, total: usize, workers: usize) -> usize {
    w * (total / workers) + w * (total % workers) / workers
}

/// Tiles of one worker a cube; `partials[worker, 2, product, tile_m, tile_n]`: the stretch at the worker's start, and
/// that at its end.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn stream_k<X: Numeric, G: Numeric, S: Numeric, H: Numeric, O: Numeric, A: Float>(
    x: &[X],
    gamma: &[G],
    row_factors: &[f32],
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    bias: &[f32],
    up_words: &[u32],
    up_scales: &[S],
    up_zeros: &[S],
    up_table: &[f32],
    up_bias: &[f32],
    residual: &[H],
    out: &mut [O],
    partials: &mut [f32],
    m: u32,
    n: u32,
    k: u32,
    group: u32,
    workers: u32,
    flags: u32,
    out_scale: f32,
    gamma_offset: f32,
    #[comptime] c: TileConfig,
    #[define(X, G, S, H, O, A)] _elements: [ElemType; 6],
) {
    let (m, n, k, workers) = (m as usize, n as usize, k as usize, workers as usize);
    let mut x_tile = Shared::<[A]>::new_slice(comptime!(c.tile.stages * c.x_stage()));
    let mut w_tile = Shared::<[A]>::new_slice(comptime!(c.tile.stages * c.w_stage()));
    let mut sums = Array::<A>::new(comptime!(c.sums()));
    let steps = k.div_ceil(comptime!(c.tile.k));
    let tiles_n = n.div_ceil(comptime!(c.tile.n));
    let total = steps * tiles_n * m.div_ceil(comptime!(c.tile.m));
    let worker = CUBE_POS_X as usize;
    let start = first_of(worker, total, workers);
    let end = first_of(worker + 1, total, workers);
    let first_tile = start / steps;
    let after = select(end > start, end.div_ceil(steps), first_tile);
    for tile in first_tile..after {
        let from = select(start > tile * steps, start - tile * steps, 0usize);
        let to = select(end < (tile + 1) * steps, end - tile * steps, steps);
        let m0 = tile / tiles_n * comptime!(c.tile.m);
        let n0 = tile % tiles_n * comptime!(c.tile.n);
        clear::<A>(&mut sums, c);
        multiply::<X, G, S, A>(
            x,
            gamma,
            row_factors,
            words,
            scales,
            zeros,
            table,
            up_words,
            up_scales,
            up_zeros,
            up_table,
            &mut x_tile,
            &mut w_tile,
            &mut sums,
            m0,
            n0,
            from,
            to,
            m,
            n,
            k,
            group,
            gamma_offset,
            c,
        );
        if to - from == steps {
            finish_tile::<H, O, A>(&sums, bias, up_bias, residual, out, m0, n0, m, n, flags, out_scale, c);
        } else {
            let slot = worker * 2 + select(tile == first_tile, 0usize, 1usize);
            write_partial::<A>(&sums, partials, slot, c);
        }
    }
}

/// Writes a tile's sums, `[product, tile_m, tile_n]`.
#[cube]
fn write_partial<A: Float>(sums: &Array<A>, partials: &mut [f32], slot: usize, #[comptime] c: TileConfig) {
    let lane_n = UNIT_POS as usize % comptime!(c.lanes_n());
    let lane_m = UNIT_POS as usize / comptime!(c.lanes_n());
    #[unroll]
    for p in 0..comptime!(c.products()) {
        let first = (slot * comptime!(c.products()) + p) * comptime!(c.tile.m);
        #[unroll]
        for i in 0..comptime!(c.unit_m) {
            #[unroll]
            for j in 0..comptime!(c.unit_n) {
                let row = first + lane_m * comptime!(c.unit_m) + i;
                partials[row * comptime!(c.tile.n) + lane_n + comptime!(j * c.lanes_n())] =
                    f32::cast_from(sums[comptime!((p * c.unit_m + i) * c.unit_n + j)]);
            }
        }
    }
}

/// Adds the partial sums of the tiles that several workers share, one tile a cube, and finishes them.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn fix_up<H: Numeric, O: Numeric>(
    partials: &[f32],
    bias: &[f32],
    up_bias: &[f32],
    residual: &[H],
    out: &mut [O],
    m: u32,
    n: u32,
    steps: u32,
    tiles: u32,
    workers: u32,
    flags: u32,
    out_scale: f32,
    #[comptime] c: TileConfig,
    #[define(H, O)] _elements: [ElemType; 2],
) {
    let (m, n, steps) = (m as usize, n as usize, steps as usize);
    let (tiles, workers) = (tiles as usize, workers as usize);
    let tile = CUBE_POS;
    if tile < tiles {
        let total = steps * tiles;
        let (begin, finish_at) = (tile * steps, (tile + 1) * steps);
        // The workers of the tile: the last that begins at or before it, to the last that begins within it.
        let mut first = 0usize.runtime();
        let mut last = 0usize.runtime();
        for w in 0..workers {
            let start = first_of(w, total, workers);
            first = select(start <= begin, w, first);
            last = select(start < finish_at, w, last);
        }
        // That of a single worker is finished.
        let whole = first == last;
        let tiles_n = n.div_ceil(comptime!(c.tile.n));
        let m0 = tile / tiles_n * comptime!(c.tile.m);
        let n0 = tile % tiles_n * comptime!(c.tile.n);
        let elements = select(whole, 0usize, comptime!(c.tile.m * c.tile.n));
        for e in range_stepped(UNIT_POS as usize, elements, comptime!(c.tile.units)) {
            let row = m0 + e / comptime!(c.tile.n);
            let column = n0 + e % comptime!(c.tile.n);
            if row < m && column < n {
                let mut sum = f32::new(0.0);
                let mut up = f32::new(0.0);
                for w in first..(last + 1) {
                    let start = first_of(w, total, workers);
                    let slot = w * 2 + select(start / steps == tile, 0usize, 1usize);
                    let at = slot * comptime!(c.products() * c.tile.m * c.tile.n) + e;
                    // A worker without steps has written nothing.
                    let wrote = start < first_of(w + 1, total, workers);
                    sum += select(wrote, partials[at], f32::new(0.0));
                    if comptime!(c.epilogue.gated) {
                        up += select(wrote, partials[at + comptime!(c.tile.m * c.tile.n)], f32::new(0.0));
                    }
                }
                let at = row * n + column;
                finish::<H, O>(sum, up, bias, up_bias, residual, out, at, column, flags, out_scale, c.epilogue);
            }
        }
    }
}

/// Launches both kernels; `row_factors` are those of the input norm.
pub(super) fn launch<R: Runtime>(
    gpu: &Gpu<R>,
    tile: Tile,
    workers: usize,
    product: &Product<'_, R>,
    row_factors: Option<&Buffer>,
) -> Result<()> {
    let operation = product.operation;
    // The square of the workers must fit a word.
    if !(1..=65_535).contains(&workers) {
        return Err(super::limit(gpu, operation, format!("{workers} workers (1 to 65535)")));
    }
    let [m, n, k] = product.shape();
    if k == 0 {
        return super::matrix::launch(gpu, tile, product, row_factors);
    }
    let config = TileConfig::new(gpu, tile, product)?;
    let (steps, tiles) = (k.div_ceil(tile.k), n.div_ceil(tile.n) * m.div_ceil(tile.m));
    if u32::try_from(steps * tiles).is_err() {
        return Err(super::limit(gpu, operation, format!("{tiles} tiles of {steps} steps")));
    }
    let partials = gpu.scratch(operation, DType::F32, &[workers, 2, config.products(), tile.m * tile.n])?;
    let (weight, up, (_, group)) = (product.weight, product.up_or_weight(), product.grouping());
    let [x, g, s, h, o] = product.elements();
    // SAFETY: every buffer holds what its shape says; the kernels compare rows, columns and features with M, N and K,
    // and a worker has at most two tiles that are not its own.
    unsafe {
        stream_k::launch_unchecked::<R>(
            gpu.client(),
            CubeCount::Static(workers as u32, 1, 1),
            CubeDim::new_1d(tile.units as u32),
            product.x_arg(),
            product.gamma_arg(gpu),
            row_factors.map_or_else(|| gpu.unread(), |buffer| buffer.arg(m)),
            weight.words_arg(1),
            weight.scales_arg(1),
            weight.zeros_arg(1),
            weight.table_arg(),
            weight.bias_arg(gpu),
            up.words_arg(1),
            up.scales_arg(1),
            up.zeros_arg(1),
            up.table_arg(),
            up.bias_arg(gpu),
            product.residual_arg(gpu),
            product.out_arg(),
            partials.buffer().arg(partials.elements()),
            m as u32,
            n as u32,
            k as u32,
            group,
            workers as u32,
            product.flags(),
            product.out_scale,
            product.norm_scalars().0,
            config,
            [x, g, s, h, o, config.elem()],
        );
        fix_up::launch_unchecked::<R>(
            gpu.client(),
            crate::launch::cubes(tiles),
            CubeDim::new_1d(tile.units as u32),
            partials.buffer().arg(partials.elements()),
            weight.bias_arg(gpu),
            up.bias_arg(gpu),
            product.residual_arg(gpu),
            product.out_arg(),
            m as u32,
            n as u32,
            steps as u32,
            tiles as u32,
            workers as u32,
            product.flags(),
            product.out_scale,
            config,
            [h, o],
        );
    }
    Ok(())
}

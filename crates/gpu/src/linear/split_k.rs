//! Products with few tiles and a long K: every tile is computed in slices of K, which are added afterwards in ascending
//! order.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::{Result, Tensor};

use super::epilogue::{Epilogue, finish};
use super::operands::Product;
use super::tile::{Tile, TileConfig, clear, multiply};
use crate::launch::{cubes_for, units};
use crate::{Buffer, Gpu};

/// `partials[slice, product, m, n]`; cubes `[tiles of N, tiles of M, slices]`, slice s of S has the tiles of K from
/// `floor(s T / S)`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn split_k<X: Numeric, G: Numeric, S: Numeric, A: Float>(
    x: &[X],
    gamma: &[G],
    row_factors: &[f32],
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    up_words: &[u32],
    up_scales: &[S],
    up_zeros: &[S],
    up_table: &[f32],
    partials: &mut [f32],
    m: u32,
    n: u32,
    k: u32,
    group: u32,
    splits: u32,
    gamma_offset: f32,
    #[comptime] c: TileConfig,
    #[define(X, G, S, A)] _elements: [ElemType; 4],
) {
    let (m, n, k, splits) = (m as usize, n as usize, k as usize, splits as usize);
    let mut x_tile = Shared::<[A]>::new_slice(comptime!(c.tile.stages * c.x_stage()));
    let mut w_tile = Shared::<[A]>::new_slice(comptime!(c.tile.stages * c.w_stage()));
    let mut sums = Array::<A>::new(comptime!(c.sums()));
    clear::<A>(&mut sums, c);
    let slice = CUBE_POS_Z as usize;
    let m0 = CUBE_POS_Y as usize * comptime!(c.tile.m);
    let n0 = CUBE_POS_X as usize * comptime!(c.tile.n);
    let steps = k.div_ceil(comptime!(c.tile.k));
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
        slice * steps / splits,
        (slice + 1) * steps / splits,
        m,
        n,
        k,
        group,
        gamma_offset,
        c,
    );
    let lane_n = UNIT_POS as usize % comptime!(c.lanes_n());
    let lane_m = UNIT_POS as usize / comptime!(c.lanes_n());
    #[unroll]
    for p in 0..comptime!(c.products()) {
        let first = (slice * comptime!(c.products()) + p) * m;
        #[unroll]
        for i in 0..comptime!(c.unit_m) {
            let row = m0 + lane_m * comptime!(c.unit_m) + i;
            #[unroll]
            for j in 0..comptime!(c.unit_n) {
                let column = n0 + lane_n + comptime!(j * c.lanes_n());
                if row < m && column < n {
                    partials[(first + row) * n + column] =
                        f32::cast_from(sums[comptime!((p * c.unit_m + i) * c.unit_n + j)]);
                }
            }
        }
    }
}

/// `out[m, n]` of the sums over the slices, as [`finish`] defines it.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn reduce_slices<H: Numeric, O: Numeric>(
    partials: &[f32],
    bias: &[f32],
    up_bias: &[f32],
    residual: &[H],
    out: &mut [O],
    count: u32,
    n: u32,
    splits: u32,
    flags: u32,
    out_scale: f32,
    #[comptime] e: Epilogue,
    #[define(H, O)] _elements: [ElemType; 2],
) {
    let (at, count) = (ABSOLUTE_POS, count as usize);
    if at < count {
        let products = comptime!(if e.gated { 2usize } else { 1 });
        let mut sum = f32::new(0.0);
        let mut up = f32::new(0.0);
        for slice in 0..splits as usize {
            sum += partials[slice * products * count + at];
            if comptime!(e.gated) {
                up += partials[(slice * products + 1usize) * count + at];
            }
        }
        finish::<H, O>(sum, up, bias, up_bias, residual, out, at, at % n as usize, flags, out_scale, e);
    }
}

/// Launches both kernels; `row_factors` are those of the input norm.
pub(super) fn launch<R: Runtime>(
    gpu: &Gpu<R>,
    tile: Tile,
    splits: usize,
    product: &Product<'_, R>,
    row_factors: Option<&Buffer>,
) -> Result<()> {
    let operation = product.operation;
    if !(1..=64).contains(&splits) {
        return Err(super::limit(gpu, operation, format!("{splits} slices of K (1 to 64)")));
    }
    let config = TileConfig::new(gpu, tile, product)?;
    let [m, n, k] = product.shape();
    let count = super::grid(gpu, operation, [n.div_ceil(tile.n), m.div_ceil(tile.m), splits])?;
    let partials = gpu.scratch(operation, DType::F32, &[splits, config.products(), m, n])?;
    let (weight, up, (_, group)) = (product.weight, product.up_or_weight(), product.grouping());
    let [x, g, s, _, _] = product.elements();
    // SAFETY: every buffer holds what its shape says; the kernel compares rows, columns and features with M, N and K.
    unsafe {
        split_k::launch_unchecked::<R>(
            gpu.client(),
            count,
            CubeDim::new_1d(tile.units as u32),
            product.x_arg(),
            product.gamma_arg(gpu),
            row_factors.map_or_else(|| gpu.unread(), |buffer| buffer.arg(m)),
            weight.words_arg(1),
            weight.scales_arg(1),
            weight.zeros_arg(1),
            weight.table_arg(),
            up.words_arg(1),
            up.scales_arg(1),
            up.zeros_arg(1),
            up.table_arg(),
            partials.buffer().arg(partials.elements()),
            m as u32,
            n as u32,
            k as u32,
            group,
            splits as u32,
            product.norm_scalars().0,
            config,
            [x, g, s, config.elem()],
        );
    }
    add_slices(gpu, product, &partials, splits);
    Ok(())
}

/// Launches the kernel that adds partial sums `[slices, products, M, N]` and finishes the product.
pub(super) fn add_slices<R: Runtime>(gpu: &Gpu<R>, product: &Product<'_, R>, partials: &Tensor<Gpu<R>>, slices: usize) {
    let [m, n, _] = product.shape();
    let [_, _, _, h, o] = product.elements();
    // SAFETY: every buffer holds what its shape says; the kernel compares its position with M N.
    unsafe {
        reduce_slices::launch_unchecked::<R>(
            gpu.client(),
            cubes_for(m * n),
            units(),
            partials.buffer().arg(partials.elements()),
            product.weight.bias_arg(gpu),
            product.up_or_weight().bias_arg(gpu),
            product.residual_arg(gpu),
            product.out_arg(),
            (m * n) as u32,
            n as u32,
            slices as u32,
            product.flags(),
            product.out_scale,
            product.epilogue(),
            [h, o],
        );
    }
}

//! Products with many rows: one cube a tile of the output.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::Result;

use super::epilogue::finish;
use super::operands::Product;
use super::tile::{Tile, TileConfig, clear, multiply};
use crate::{Buffer, Gpu};

/// `out[m, n]` as [`finish`] defines it; cubes `[tiles of N, tiles of M]`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn matrix<X: Numeric, G: Numeric, S: Numeric, H: Numeric, O: Numeric, A: Float>(
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
    m: u32,
    n: u32,
    k: u32,
    group: u32,
    flags: u32,
    out_scale: f32,
    gamma_offset: f32,
    #[comptime] c: TileConfig,
    #[define(X, G, S, H, O, A)] _elements: [ElemType; 6],
) {
    let (m, n, k) = (m as usize, n as usize, k as usize);
    let mut x_tile = Shared::<[A]>::new_slice(comptime!(c.tile.stages * c.x_stage()));
    let mut w_tile = Shared::<[A]>::new_slice(comptime!(c.tile.stages * c.w_stage()));
    let mut sums = Array::<A>::new(comptime!(c.sums()));
    clear::<A>(&mut sums, c);
    let m0 = CUBE_POS_Y as usize * comptime!(c.tile.m);
    let n0 = CUBE_POS_X as usize * comptime!(c.tile.n);
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
        0usize.runtime(),
        k.div_ceil(comptime!(c.tile.k)),
        m,
        n,
        k,
        group,
        gamma_offset,
        c,
    );
    finish_tile::<H, O, A>(&sums, bias, up_bias, residual, out, m0, n0, m, n, flags, out_scale, c);
}

/// The epilogue of a whole tile.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn finish_tile<H: Numeric, O: Numeric, A: Float>(
    sums: &Array<A>,
    bias: &[f32],
    up_bias: &[f32],
    residual: &[H],
    out: &mut [O],
    m0: usize,
    n0: usize,
    m: usize,
    n: usize,
    flags: u32,
    out_scale: f32,
    #[comptime] c: TileConfig,
) {
    let lane_n = UNIT_POS as usize % comptime!(c.lanes_n());
    let lane_m = UNIT_POS as usize / comptime!(c.lanes_n());
    #[unroll]
    for i in 0..comptime!(c.unit_m) {
        let row = m0 + lane_m * comptime!(c.unit_m) + i;
        #[unroll]
        for j in 0..comptime!(c.unit_n) {
            let column = n0 + lane_n + comptime!(j * c.lanes_n());
            if row < m && column < n {
                let sum = f32::cast_from(sums[comptime!(i * c.unit_n + j)]);
                let mut up = f32::new(0.0);
                if comptime!(c.epilogue.gated) {
                    up = f32::cast_from(sums[comptime!((c.unit_m + i) * c.unit_n + j)]);
                }
                let at = row * n + column;
                finish::<H, O>(sum, up, bias, up_bias, residual, out, at, column, flags, out_scale, c.epilogue);
            }
        }
    }
}

/// Launches the kernel; `row_factors` are those of the input norm.
pub(super) fn launch<R: Runtime>(
    gpu: &Gpu<R>,
    tile: Tile,
    product: &Product<'_, R>,
    row_factors: Option<&Buffer>,
) -> Result<()> {
    let config = TileConfig::new(gpu, tile, product)?;
    let [m, n, k] = product.shape();
    let count = super::grid(gpu, product.operation, [n.div_ceil(tile.n), m.div_ceil(tile.m), 1])?;
    let (weight, up, (_, group)) = (product.weight, product.up_or_weight(), product.grouping());
    let [x, g, s, h, o] = product.elements();
    // SAFETY: every buffer holds what its shape says; the kernel compares rows, columns and features with M, N and K.
    unsafe {
        matrix::launch_unchecked::<R>(
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
            weight.bias_arg(gpu),
            up.words_arg(1),
            up.scales_arg(1),
            up.zeros_arg(1),
            up.table_arg(),
            up.bias_arg(gpu),
            product.residual_arg(gpu),
            product.out_arg(),
            m as u32,
            n as u32,
            k as u32,
            group,
            product.flags(),
            product.out_scale,
            product.norm_scalars().0,
            config,
            [x, g, s, h, o, config.elem()],
        );
    }
    Ok(())
}

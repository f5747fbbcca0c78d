//! The product of a tile of rows and a tile of columns over a range of K, for all matrix kernels: both operands pass
//! through shared memory, the weights decoded, and every unit keeps a block of sums in registers.

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use marlin_ops::Result;

use super::epilogue::Epilogue;
use super::limit;
use super::operands::{Grouping, Input, Product, group_of, load_input};
use crate::Gpu;
use crate::decode::{Decoder, decode_unit, group_scale, group_zero, weight_of};

/// The type of the operands in shared memory and of the running sums.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum Accumulate {
    /// Weights and activations exactly as stored, sums in f32.
    F32,
    /// Everything in f16: half the shared memory. Sums are those of a tile of K, then of the tiles.
    F16,
}

/// A tile of a matrix kernel.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct Tile {
    /// Rows.
    pub m: usize,
    /// Columns.
    pub n: usize,
    /// Input features in shared memory at a time: a multiple of the weights' unit.
    pub k: usize,
    /// Units of a cube.
    pub units: usize,
    /// Tiles of K in shared memory: while one is multiplied, the next ones are loaded. 1 to 4.
    pub stages: usize,
    /// Arithmetic.
    pub accumulate: Accumulate,
}

/// What a matrix kernel is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) struct TileConfig {
    pub(super) tile: Tile,
    pub(super) input: Input,
    pub(super) decoder: Decoder,
    pub(super) grouping: Grouping,
    pub(super) epilogue: Epilogue,
    /// Rows and columns of a unit.
    pub(super) unit_m: usize,
    pub(super) unit_n: usize,
}

impl TileConfig {
    pub(super) const fn products(&self) -> usize {
        if self.epilogue.gated { 2 } else { 1 }
    }

    /// Sums of a unit.
    pub(super) const fn sums(&self) -> usize {
        self.products() * self.unit_m * self.unit_n
    }

    /// Units along N.
    pub(super) const fn lanes_n(&self) -> usize {
        self.tile.n / self.unit_n
    }

    /// Elements of one stage of each operand.
    pub(super) const fn x_stage(&self) -> usize {
        self.tile.m * self.tile.k
    }

    pub(super) const fn w_stage(&self) -> usize {
        self.products() * self.tile.k * self.tile.n
    }

    /// The element type in shared memory.
    pub(super) fn elem(&self) -> ElemType {
        match self.tile.accumulate {
            Accumulate::F32 => ElemType::Float(FloatKind::F32),
            Accumulate::F16 => ElemType::Float(FloatKind::F16),
        }
    }

    /// Whether a tile can be launched for a product, compiled how.
    pub(super) fn new<R: Runtime>(gpu: &Gpu<R>, tile: Tile, product: &Product<'_, R>) -> Result<Self> {
        let (input, epilogue, (grouping, _)) = (product.input(), product.epilogue(), product.grouping());
        let decoder = product.weight.kernel_decoder();
        Self::checked(gpu, product.operation, tile, input, decoder, grouping, epilogue)
    }

    /// As [`TileConfig::new`] for operands of this kind.
    pub(super) fn checked<R: Runtime>(
        gpu: &Gpu<R>,
        operation: &'static str,
        tile: Tile,
        input: Input,
        decoder: Decoder,
        grouping: Grouping,
        epilogue: Epilogue,
    ) -> Result<Self> {
        let refuse = |what: String| Err(limit(gpu, operation, what));
        let Tile { m, n, k, units, stages, .. } = tile;
        let (unit_m, unit_n) = match unit_block(tile) {
            Some(block) => block,
            None => return refuse(format!("a tile of {m} x {n} on {units} units")),
        };
        let unit = decoder.unit().max(4);
        if k == 0 || !k.is_multiple_of(unit) {
            return refuse(format!("a tile of {k} input features, which is no multiple of {unit},"));
        }
        if !(1..=4).contains(&stages) {
            return refuse(format!("{stages} stages (1 to 4)"));
        }
        let config = Self { tile, input, decoder, grouping, epilogue, unit_m, unit_n };
        let element = if tile.accumulate == Accumulate::F16 { 2 } else { 4 };
        let shared = stages * (config.x_stage() + config.w_stage()) * element;
        let hardware = &gpu.properties().hardware;
        if shared > hardware.max_shared_memory_size {
            let most = hardware.max_shared_memory_size;
            return refuse(format!("{shared} bytes of shared memory where there are {most}"));
        }
        if units > hardware.max_units_per_cube as usize {
            return refuse(format!("{units} units a cube where {} are allowed", hardware.max_units_per_cube));
        }
        Ok(config)
    }
}

/// Rows and columns of a unit: about square, at most 8 x 16.
fn unit_block(tile: Tile) -> Option<(usize, usize)> {
    let Tile { m, n, units, .. } = tile;
    if units == 0 || m == 0 || n == 0 || !(m * n).is_multiple_of(units) {
        return None;
    }
    let sums = m * n / units;
    let fits = |&(rows, columns): &(usize, usize)| {
        rows * columns == sums && m.is_multiple_of(rows) && n.is_multiple_of(columns) && rows <= 8 && columns <= 16
    };
    let blocks = (1..=sums).filter(|rows| sums.is_multiple_of(*rows)).map(|rows| (rows, sums / rows));
    blocks.filter(fits).min_by_key(|(rows, columns)| rows.abs_diff(*columns))
}

/// Adds `x[m0.., k] W[k, n0..]` over the tiles of K from `first` to `last` to `sums`: for each product `unit_m x unit_n`,
/// row `m0 + lane_m unit_m + i`, column `n0 + lane_n + j lanes_n`.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn multiply<X: Numeric, G: Numeric, S: Numeric, A: Float>(
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
    x_tile: &mut Shared<[A]>,
    w_tile: &mut Shared<[A]>,
    sums: &mut Array<A>,
    m0: usize,
    n0: usize,
    first: usize,
    last: usize,
    m: usize,
    n: usize,
    k: usize,
    group: u32,
    gamma_offset: f32,
    #[comptime] c: TileConfig,
) {
    // Tiles that are loaded before the first one is multiplied.
    let ahead = comptime!(c.tile.stages - 1);
    #[unroll]
    for i in 0..ahead {
        load::<X, G, S, A>(
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
            x_tile,
            w_tile,
            i,
            m0,
            n0,
            first + i,
            m,
            n,
            k,
            group,
            gamma_offset,
            c,
        );
    }
    if comptime!(ahead > 0) {
        sync_cube();
    }
    for step in first..last {
        // The last loads lie beyond `last` and are not multiplied; without them software Vulkan cannot compile the loop.
        let next = step + ahead;
        let stage = (next - first) % comptime!(c.tile.stages);
        load::<X, G, S, A>(
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
            x_tile,
            w_tile,
            stage,
            m0,
            n0,
            next,
            m,
            n,
            k,
            group,
            gamma_offset,
            c,
        );
        if comptime!(ahead == 0) {
            sync_cube();
        }
        let stage = (step - first) % comptime!(c.tile.stages);
        if comptime!(c.tile.accumulate == Accumulate::F16) {
            // In one sum the error of f16 grows with the root of K.
            let mut tile_sums = Array::<A>::new(comptime!(c.sums()));
            clear::<A>(&mut tile_sums, c);
            add_tile::<A>(x_tile, w_tile, &mut tile_sums, stage, c);
            #[unroll]
            for i in 0..comptime!(c.sums()) {
                sums[i] += tile_sums[i];
            }
        } else {
            add_tile::<A>(x_tile, w_tile, sums, stage, c);
        }
        sync_cube();
    }
}

/// Loads tile `step` of K of all operands into a stage.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load<X: Numeric, G: Numeric, S: Numeric, A: Float>(
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
    x_tile: &mut Shared<[A]>,
    w_tile: &mut Shared<[A]>,
    stage: usize,
    m0: usize,
    n0: usize,
    step: usize,
    m: usize,
    n: usize,
    k: usize,
    group: u32,
    gamma_offset: f32,
    #[comptime] c: TileConfig,
) {
    load_rows::<X, G, A>(x, gamma, row_factors, x_tile, stage, m0, step, m, k, gamma_offset, c);
    let at = stage * comptime!(c.w_stage());
    load_weights::<S, A>(words, scales, zeros, table, w_tile, at, n0, step, n, k, group, c);
    if comptime!(c.epilogue.gated) {
        let second = at + comptime!(c.tile.k * c.tile.n);
        load_weights::<S, A>(up_words, up_scales, up_zeros, up_table, w_tile, second, n0, step, n, k, group, c);
    }
}

/// Loads a tile of activations as `[k, m]`, 0 outside the matrix.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load_rows<X: Numeric, G: Numeric, A: Float>(
    x: &[X],
    gamma: &[G],
    row_factors: &[f32],
    x_tile: &mut Shared<[A]>,
    stage: usize,
    m0: usize,
    step: usize,
    m: usize,
    k: usize,
    gamma_offset: f32,
    #[comptime] c: TileConfig,
) {
    let k0 = step * comptime!(c.tile.k);
    let first = stage * comptime!(c.x_stage());
    for i in 0..comptime!((c.x_stage() / 4).div_ceil(c.tile.units)) {
        let e = i * comptime!(c.tile.units) + UNIT_POS as usize;
        if e < comptime!(c.x_stage() / 4) {
            // Neighbours take neighbouring rows, whose sums lie side by side.
            let row = e % comptime!(c.tile.m);
            let quad = e / comptime!(c.tile.m) * 4usize;
            let inside = m0 + row < m;
            let mut factor = f32::new(1.0);
            if comptime!(c.input.gamma.is_some()) {
                factor = row_factors[select(inside, m0 + row, 0usize)];
            }
            #[unroll]
            for i in 0..4usize {
                let feature = k0 + quad + i;
                let inside = inside && feature < k;
                let at = select(inside, (m0 + row) * k + feature, 0usize);
                let value = load_input::<X, G>(x, gamma, at, select(inside, feature, 0usize), gamma_offset, c.input);
                let value = select(inside, value * factor, f32::new(0.0));
                x_tile[first + (quad + i) * comptime!(c.tile.m) + row] = A::cast_from(value);
            }
        }
    }
}

/// Loads tile `step` of K of the weights as `[k, n]`, decoded, 0 outside the matrix.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load_weights<S: Numeric, A: Float>(
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    w_tile: &mut Shared<[A]>,
    at: usize,
    n0: usize,
    step: usize,
    n: usize,
    k: usize,
    group: u32,
    #[comptime] c: TileConfig,
) {
    let codes = comptime!(c.decoder.unit());
    let units = comptime!(c.tile.k / c.decoder.unit() * c.tile.n);
    for i in 0..comptime!(units.div_ceil(c.tile.units)) {
        let e = i * comptime!(c.tile.units) + UNIT_POS as usize;
        if e < units {
            let row = e / comptime!(c.tile.n);
            let unit = step * comptime!(c.tile.k / c.decoder.unit()) + row;
            let inside = n0 + e % comptime!(c.tile.n) < n && unit * codes < k;
            let column = select(inside, n0 + e % comptime!(c.tile.n), 0usize);
            let valid = select(inside, unit, 0usize);
            let levels = decode_unit(words, table, 0usize.runtime(), valid, column, n, c.decoder);
            let at_group = group_of(valid, group, c.grouping) * n + column;
            let scale = group_scale::<S>(scales, table, at_group, c.decoder);
            let zero = group_zero::<S>(zeros, at_group, c.decoder);
            let first = at + row * comptime!(c.decoder.unit() * c.tile.n) + e % comptime!(c.tile.n);
            #[unroll]
            for i in 0..codes {
                // Codes beyond K are 0, and meet activations that are.
                let w = weight_of(levels[i], scale, zero, c.decoder);
                w_tile[first + comptime!(i * c.tile.n)] = A::cast_from(select(inside, w, f32::new(0.0)));
            }
        }
    }
}

/// Adds the product of one stage.
#[cube]
pub(super) fn add_tile<A: Float>(
    x_tile: &mut Shared<[A]>,
    w_tile: &mut Shared<[A]>,
    sums: &mut Array<A>,
    stage: usize,
    #[comptime] c: TileConfig,
) {
    let lane_n = UNIT_POS as usize % comptime!(c.lanes_n());
    let lane_m = UNIT_POS as usize / comptime!(c.lanes_n());
    let x_first = stage * comptime!(c.x_stage()) + lane_m * comptime!(c.unit_m);
    let w_first = stage * comptime!(c.w_stage()) + lane_n;
    for feature in 0..comptime!(c.tile.k) {
        let mut values = Array::<A>::new(comptime!(c.unit_m));
        #[unroll]
        for i in 0..comptime!(c.unit_m) {
            values[i] = x_tile[x_first + feature * comptime!(c.tile.m) + i];
        }
        #[unroll]
        for p in 0..comptime!(c.products()) {
            #[unroll]
            for j in 0..comptime!(c.unit_n) {
                let at = feature * comptime!(c.tile.n) + comptime!(p * c.tile.k * c.tile.n + j * c.lanes_n());
                let w = w_tile[w_first + at];
                #[unroll]
                for i in 0..comptime!(c.unit_m) {
                    sums[comptime!((p * c.unit_m + i) * c.unit_n + j)] += values[i] * w;
                }
            }
        }
    }
}

/// Sets all sums to 0.
#[cube]
pub(super) fn clear<A: Float>(sums: &mut Array<A>, #[comptime] c: TileConfig) {
    #[unroll]
    for i in 0..comptime!(c.sums()) {
        sums[i] = A::cast_from(f32::new(0.0));
    }
}

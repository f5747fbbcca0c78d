//! Many tokens: rows sorted by expert, one cube for each tile of rows of one expert and stretch of columns. The tile's
//! rows and the decoded weights pass through shared memory.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::linear::Activation;
use marlin_ops::{Device, OpError, Result, Tensor};

use super::dot::{Place, expert_scale, place};
use super::experts::Operands;
use super::mlp::{Call, ExpertKernel, OP};
use crate::Gpu;
use crate::decode::{Decoder, decode_unit, group_zero, weight_of};
use crate::element::{Storage, load};
use crate::launch::cubes;
use crate::math::activate;

/// Units of a cube.
const UNITS: usize = 128;

/// Shared memory that all devices have.
const SHARED_BYTES: usize = 32 * 1024;

/// What [`expert_tiles`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct Config {
    x: Storage,
    first: Decoder,
    /// Of the weight whose product the first, activated, is multiplied with.
    second: Option<Decoder>,
    bias: [bool; 2],
    activation: Activation,
    /// x has a row for each token, not for each sorted assignment.
    gather: bool,
    rows: usize,
    columns: usize,
    depth: usize,
}

impl Config {
    fn second(self) -> Decoder {
        self.second.unwrap_or(self.first)
    }

    /// Units along the rows of a tile.
    fn unit_rows(self) -> usize {
        self.rows.min((4 * UNITS / self.columns).max(1))
    }

    fn unit_columns(self) -> usize {
        UNITS / self.unit_rows()
    }

    /// Rows and columns of a unit.
    fn micro_rows(self) -> usize {
        self.rows / self.unit_rows()
    }

    fn micro_columns(self) -> usize {
        self.columns / self.unit_columns()
    }

    /// Elements of the second weight's tile.
    fn second_tile(self) -> usize {
        if self.second.is_some() { self.depth * self.columns } else { 1 }
    }

    /// What the tile shape breaks, if anything.
    fn limit(self) -> Option<String> {
        let Self { rows, columns, depth, .. } = self;
        let powers = rows.is_power_of_two() && columns.is_power_of_two() && depth.is_power_of_two();
        if !powers || self.unit_columns() > columns {
            return Some(format!("tiles of {rows} x {columns} x {depth}: powers of two, columns {UNITS} / rows"));
        }
        let bytes = 4 * (rows * (depth + 1) + depth * columns + self.second_tile() + rows);
        (bytes > SHARED_BYTES).then(|| format!("tiles in {bytes} bytes of shared memory, at most {SHARED_BYTES}"))
    }
}

/// Decodes `depth` features from `feature` on of the columns from `column` on; 0 beyond the weight's edges.
#[cube]
#[allow(clippy::too_many_arguments)]
fn decode_tile<S: Numeric>(
    tile: &mut [f32],
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    place: &Place,
    feature: usize,
    column: usize,
    columns: usize,
    #[comptime] c: Config,
    #[comptime] d: Decoder,
) {
    let mut task = UNIT_POS as usize;
    // Of a unit deeper than the tile a part is kept.
    let deeper = comptime!(d.unit() > c.depth);
    while task < comptime!((c.depth / d.unit()).max(1) * c.columns) {
        let lane = task % c.columns;
        let part = task / c.columns;
        let unit = feature / comptime!(d.unit()) + part;
        let n = column + lane;
        let to = part * comptime!(d.unit() * c.columns) + lane;
        if unit < place.units && n < columns {
            let mut at = place.scales;
            if comptime!(d.group_size > 0) {
                at += unit / comptime!(d.group_size / d.unit()) * columns + n;
            }
            let mut zero = f32::new(0.0);
            if comptime!(d.zeros || d.offsets) {
                zero = group_zero::<S>(zeros, at, d);
            }
            let scale = expert_scale::<S>(scales, table, at, place.table, d);
            let levels = decode_unit(words, table, place.words, unit, n, columns, d);
            #[unroll]
            for j in 0..comptime!(d.unit()) {
                let known = unit * comptime!(d.unit()) + j < place.features;
                let weight = select(known, weight_of(levels[j], scale, zero, d), f32::new(0.0));
                if comptime!(!deeper) {
                    tile[to + comptime!(j * c.columns)] = weight;
                } else if feature % comptime!(d.unit()) == comptime!(j / c.depth * c.depth) {
                    tile[to + comptime!(j % c.depth * c.columns)] = weight;
                }
            }
        } else {
            #[unroll]
            for j in 0..comptime!(d.unit().min(c.depth)) {
                tile[to + comptime!(j * c.columns)] = 0.0f32;
            }
        }
        task += UNITS;
    }
}

/// Adds the product of the tiles to `sums [micro rows, micro columns]`.
#[cube]
fn multiply_tile(rows: &[f32], tile: &[f32], sums: &mut Array<f32>, #[comptime] c: Config) {
    let lane = UNIT_POS as usize % comptime!(c.unit_columns());
    let first = UNIT_POS as usize / comptime!(c.unit_columns());
    let (m, n) = comptime!((c.micro_rows(), c.micro_columns()));
    for k in 0..c.depth {
        let mut w = Array::<f32>::new(n);
        #[unroll]
        for j in 0..n {
            w[j] = tile[k * c.columns + lane + comptime!(j * c.unit_columns())];
        }
        #[unroll]
        for i in 0..m {
            let x = rows[(first + comptime!(i * c.unit_rows())) * comptime!(c.depth + 1) + k];
            #[unroll]
            for j in 0..n {
                sums[comptime!(i * n + j)] += x * w[j];
            }
        }
    }
}

/// `out [T k, N]` in sorted order: `act(x W1 + b1) * (x W2 + b2)`, or `act(x W1 + b1)`, with the weights of the row's expert.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn expert_tiles<X: Numeric, S: Numeric, Q: Numeric>(
    x: &[X],
    tiles: &[u32],
    offsets: &[u32],
    permutation: &[u32],
    places: &[u32],
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    bias: &[f32],
    words2: &[u32],
    scales2: &[Q],
    zeros2: &[Q],
    table2: &[f32],
    bias2: &[f32],
    out: &mut [f32],
    tile_count: u32,
    slots: u32,
    experts: u32,
    first_place: u32,
    features: u32,
    columns: u32,
    #[comptime] c: Config,
    #[define(X, S, Q)] _elements: [ElemType; 3],
) {
    let mut rows = Shared::<[f32]>::new_slice(comptime!(c.rows * (c.depth + 1)));
    let mut tile = Shared::<[f32]>::new_slice(comptime!(c.depth * c.columns));
    let mut tile2 = Shared::<[f32]>::new_slice(comptime!(c.second_tile()));
    let mut sources = Shared::<[u32]>::new_slice(comptime!(c.rows));
    let columns = columns as usize;
    let features = features as usize;
    let stretches = columns.div_ceil(c.columns);
    let which = CUBE_POS / stretches;
    let mut expert = u32::MAX.runtime();
    if which < tile_count as usize {
        expert = tiles[2usize * which];
    }
    let mut at = u32::MAX.runtime();
    let mut at2 = 0u32.runtime();
    if expert < experts {
        at = places[(first_place * experts + expert) as usize];
        if comptime!(c.second.is_some()) {
            at2 = places[((first_place + 1u32) * experts + expert) as usize];
        }
    }
    if at != u32::MAX {
        let unit = UNIT_POS as usize;
        let first = tiles[2usize * which + 1usize] as usize;
        let mut count = offsets[expert as usize + 1usize] as usize - first;
        if count > c.rows {
            count = comptime!(c.rows).runtime();
        }
        let column = CUBE_POS % stretches * c.columns;
        let weight = place(at, features, columns, c.first);
        let weight2 = place(at2, features, columns, comptime!(c.second()));
        if unit < count {
            sources[unit] = (first + unit) as u32;
            if comptime!(c.gather) {
                sources[unit] = permutation[first + unit] / slots;
            }
        }
        sync_cube();
        let mut sums = Array::<f32>::new(comptime!(c.micro_rows() * c.micro_columns()));
        let mut sums2 = Array::<f32>::new(comptime!(c.micro_rows() * c.micro_columns()));
        #[unroll]
        for i in 0..comptime!(c.micro_rows() * c.micro_columns()) {
            sums[i] = 0.0f32;
            sums2[i] = 0.0f32;
        }
        let mut feature = 0usize.runtime();
        while feature < features {
            let mut i = unit;
            while i < comptime!(c.rows * c.depth) {
                let k = feature + i % c.depth;
                let mut value = f32::new(0.0);
                if i / c.depth < count && k < features {
                    value = load::<X>(x, sources[i / c.depth] as usize * features + k, c.x);
                }
                rows[i / c.depth * comptime!(c.depth + 1) + i % c.depth] = value;
                i += UNITS;
            }
            decode_tile::<S>(&mut tile, words, scales, zeros, table, &weight, feature, column, columns, c, c.first);
            if comptime!(c.second.is_some()) {
                let d = comptime!(c.second());
                decode_tile::<Q>(&mut tile2, words2, scales2, zeros2, table2, &weight2, feature, column, columns, c, d);
            }
            sync_cube();
            multiply_tile(&rows, &tile, &mut sums, c);
            if comptime!(c.second.is_some()) {
                multiply_tile(&rows, &tile2, &mut sums2, c);
            }
            sync_cube();
            feature += c.depth;
        }
        #[unroll]
        for i in 0..comptime!(c.micro_rows()) {
            let r = unit / comptime!(c.unit_columns()) + comptime!(i * c.unit_rows());
            #[unroll]
            for j in 0..comptime!(c.micro_columns()) {
                let n = column + unit % comptime!(c.unit_columns()) + comptime!(j * c.unit_columns());
                if r < count && n < columns {
                    let mut y = sums[comptime!(i * c.micro_columns() + j)];
                    if comptime!(c.bias[0]) {
                        y += bias[at as usize * columns + n];
                    }
                    y = activate(y, c.activation);
                    if comptime!(c.second.is_some()) {
                        let mut up = sums2[comptime!(i * c.micro_columns() + j)];
                        if comptime!(c.bias[1]) {
                            up += bias2[at2 as usize * columns + n];
                        }
                        y *= up;
                    }
                    out[(first + r) * columns + n] = y;
                }
            }
        }
    }
}

/// Rows sorted by expert, and their tiles.
pub(super) struct SortedRows<'a, R: Runtime> {
    pub(super) tiles: &'a Tensor<Gpu<R>>,
    pub(super) tile_count: usize,
    pub(super) offsets: &'a Tensor<Gpu<R>>,
    pub(super) permutation: &'a Tensor<Gpu<R>>,
}

impl<R: Runtime> Call<'_, R> {
    /// Launches [`expert_tiles`]: `out [T k, N]`; with `slots`, x has a row for so many assignments and not for each.
    pub(super) fn tiles(
        &self,
        gpu: &Gpu<R>,
        sorted: &SortedRows<'_, R>,
        slots: Option<usize>,
        out: &Tensor<Gpu<R>>,
        kernel: &ExpertKernel,
    ) -> Result<()> {
        let config = Config {
            x: Storage::of(self.x.dtype()),
            first: self.first.weight.decoder,
            second: self.second.map(|bank| bank.weight.decoder),
            bias: [self.first.weight.bias.is_some(), self.second.is_some_and(|bank| bank.weight.bias.is_some())],
            activation: self.activation,
            gather: slots.is_some(),
            rows: kernel.tile_m,
            columns: kernel.tile_n,
            depth: kernel.tile_k,
        };
        if let Some(what) = config.limit() {
            return Err(OpError::Unsupported { operation: OP, backend: gpu.name(), what });
        }
        let second = self.second.map_or_else(|| Operands::unread(gpu), |bank| bank.operands(gpu));
        let first = self.first.operands(gpu);
        // SAFETY: banks hold their experts' weights of features times columns, places [3, E], out a row of columns for
        // each sorted row, x one of features for each or for each token; tiles lie within their expert's rows, and
        // those of experts that are not in the banks are passed over.
        unsafe {
            expert_tiles::launch_unchecked::<R>(
                gpu.client(),
                cubes(sorted.tile_count * self.columns.div_ceil(config.columns)),
                CubeDim::new_1d(UNITS as u32),
                self.x.buffer().arg(self.x.elements()),
                sorted.tiles.buffer().arg(sorted.tiles.elements()),
                sorted.offsets.buffer().arg(sorted.offsets.elements()),
                sorted.permutation.buffer().arg(sorted.permutation.elements()),
                self.group.places.arg(3 * self.experts),
                first.words,
                first.scales,
                first.zeros,
                first.table,
                first.bias,
                second.words,
                second.scales,
                second.zeros,
                second.table,
                second.bias,
                out.buffer().arg(out.elements()),
                sorted.tile_count as u32,
                slots.unwrap_or(1) as u32,
                self.experts as u32,
                self.first_place as u32,
                self.features as u32,
                self.columns as u32,
                config,
                [config.x.elem(), first.scale_elem, second.scale_elem],
            );
        }
        Ok(())
    }
}

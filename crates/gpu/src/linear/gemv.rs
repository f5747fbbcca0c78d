//! Products with few rows: units along N read whole vectors of words, the lanes along K share the input features out
//! block by block, and their sums are added in a fixed order. The activations of a chunk of K lie in shared memory as
//! f32, and the row factor of an input norm is found on the way.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::{Device, Result};

use super::epilogue::{Epilogue, finish};
use super::operands::{Grouping, Input, Product, group_of};
use super::{limit, operands::load_input};
use crate::Gpu;
use crate::decode::{Decoder, PADDED, block_level, stored_scale, summand};
use crate::element::load;

/// Shape of the kernel for few rows.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct Gemv {
    /// Rows that share one pass over the weights.
    pub rows: usize,
    /// Output columns of a unit.
    pub columns: usize,
    /// Units along N.
    pub lanes_n: usize,
    /// Units along K, each with a share of every chunk.
    pub lanes_k: usize,
}

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct GemvConfig {
    shape: Gemv,
    input: Input,
    decoder: Decoder,
    grouping: Grouping,
    epilogue: Epilogue,
    /// Columns of a vector load.
    width: usize,
    /// Units of a block: of one group, at most [`PADDED`] features.
    depth: usize,
    /// Spell the steps of a block out; compilers of shader languages do that themselves, and take long if it was done.
    unroll: bool,
    /// Input features in shared memory at a time.
    chunk: usize,
}

/// Values of a vector of activations.
const QUAD: usize = 4;

impl GemvConfig {
    const fn block(&self) -> usize {
        self.depth * self.decoder.unit()
    }

    /// Units that fill at least one quad.
    const fn span(&self) -> usize {
        if self.decoder.unit() < QUAD { QUAD / self.decoder.unit() } else { 1 }
    }

    /// Input features of a step.
    const fn step(&self) -> usize {
        self.span() * self.decoder.unit()
    }

    /// Quads of one row of a chunk: one in nine is left free, so that neighbouring blocks lie in different banks.
    const fn slots(&self) -> usize {
        self.chunk / QUAD + self.chunk / (QUAD * 8)
    }

    const fn products(&self) -> usize {
        if self.epilogue.gated { 2 } else { 1 }
    }

    const fn vectors(&self) -> usize {
        self.shape.columns / self.width
    }

    /// Output columns of a cube.
    const fn cube_columns(&self) -> usize {
        self.shape.lanes_n * self.shape.columns
    }

    const fn units(&self) -> usize {
        self.shape.lanes_n * self.shape.lanes_k
    }

    /// Sums that the lanes hand over.
    const fn handed_over(&self) -> usize {
        self.products() * self.shape.rows * self.shape.lanes_k * self.cube_columns()
    }

    /// The order of the slices in memory is the compiler's, so each counts in multiples of the largest alignment.
    const fn shared_bytes(&self) -> usize {
        let squares = if self.input.gamma.is_some() { self.units() } else { 1 };
        let (handed_over, squares) = (self.handed_over() * 4, squares * 4);
        self.shape.rows * self.slots() * 16 + handed_over.next_multiple_of(16) + squares.next_multiple_of(16)
    }
}

/// `out[m, n]` as [`finish`] defines it.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn gemv<X: Numeric, G: Numeric, S: Numeric, H: Numeric, O: Numeric, V: Size>(
    x: &[X],
    gamma: &[G],
    words: &[Vector<u32, V>],
    scales: &[Vector<S, V>],
    zeros: &[Vector<S, V>],
    table: &[f32],
    bias: &[f32],
    up_words: &[Vector<u32, V>],
    up_scales: &[Vector<S, V>],
    up_zeros: &[Vector<S, V>],
    up_table: &[f32],
    up_bias: &[f32],
    residual: &[H],
    out: &mut [O],
    m: u32,
    vectors: u32,
    k: u32,
    group: u32,
    flags: u32,
    out_scale: f32,
    gamma_offset: f32,
    eps: f32,
    #[comptime] c: GemvConfig,
    #[define(X, G, S, H, O)] _elements: [ElemType; 5],
) {
    let m = m as usize;
    let k = k as usize;
    let vectors = vectors as usize;
    let lane_n = UNIT_POS as usize % comptime!(c.shape.lanes_n);
    let lane_k = UNIT_POS as usize / comptime!(c.shape.lanes_n);
    let first_row = CUBE_POS_Y as usize * comptime!(c.shape.rows);
    let first_vector = CUBE_POS_X as usize * comptime!(c.shape.lanes_n * c.vectors());
    let per_product = comptime!(c.shape.rows * c.shape.columns);
    let mut stage = Shared::<[Vector<f32, Const<4>>]>::new_slice(comptime!(c.shape.rows * c.slots()));
    let mut sums = Array::<f32>::new(comptime!(c.products() * c.shape.rows * c.shape.columns));
    #[unroll]
    for i in 0..comptime!(c.products() * c.shape.rows * c.shape.columns) {
        sums[i] = f32::new(0.0);
    }
    let mut squares = f32::new(0.0);
    for chunk in 0..k.div_ceil(comptime!(c.chunk)) {
        let start = chunk * comptime!(c.chunk);
        squares += stage_rows::<X, G>(x, gamma, &mut stage, first_row, m, start, k, gamma_offset, c);
        sync_cube();
        #[unroll]
        for v in 0..comptime!(c.vectors()) {
            let column = first_vector + v * comptime!(c.shape.lanes_n) + lane_n;
            add_chunk::<S, V>(
                words,
                scales,
                zeros,
                table,
                &stage,
                &mut sums,
                start,
                lane_k,
                column,
                vectors,
                k,
                group,
                comptime!(v * c.width),
                c,
            );
            if comptime!(c.epilogue.gated) {
                add_chunk::<S, V>(
                    up_words,
                    up_scales,
                    up_zeros,
                    up_table,
                    &stage,
                    &mut sums,
                    start,
                    lane_k,
                    column,
                    vectors,
                    k,
                    group,
                    comptime!(per_product + v * c.width),
                    c,
                );
            }
        }
        // The chunk may be written again.
        sync_cube();
    }
    let columns = comptime!(c.cube_columns());
    let mut handed_over = Shared::<[f32]>::new_slice(comptime!(c.handed_over()));
    #[unroll]
    for pr in 0..comptime!(c.products() * c.shape.rows) {
        #[unroll]
        for i in 0..comptime!(c.shape.columns) {
            let column =
                (comptime!(i / c.width * c.shape.lanes_n) + lane_n) * comptime!(c.width) + comptime!(i % c.width);
            handed_over[(comptime!(pr * c.shape.lanes_k) + lane_k) * columns + column] =
                sums[comptime!(pr * c.shape.columns + i)];
        }
    }
    let mut row_squares = Shared::<[f32]>::new_slice(comptime!(if c.input.gamma.is_some() { c.units() } else { 1 }));
    if comptime!(c.input.gamma.is_some()) {
        row_squares[UNIT_POS as usize] = squares;
        add_squares(&mut row_squares, c);
    }
    sync_cube();
    for i in 0..comptime!((c.shape.rows * c.cube_columns()).div_ceil(c.units())) {
        let e = i * comptime!(c.units()) + UNIT_POS as usize;
        let r = e / columns;
        let column = e % columns;
        let n = first_vector * comptime!(c.width) + column;
        if r < comptime!(c.shape.rows) && first_row + r < m && n < vectors * comptime!(c.width) {
            let mut factor = f32::new(1.0);
            if comptime!(c.input.gamma.is_some()) {
                let mean = row_squares[r * comptime!(c.units() / c.shape.rows)] / f32::cast_from(k as u32);
                factor = 1.0f32 / f32::sqrt(mean + eps);
            }
            let sum = lanes_sum(&handed_over, r, column, c) * factor;
            let mut up = f32::new(0.0);
            if comptime!(c.epilogue.gated) {
                up = lanes_sum(&handed_over, comptime!(c.shape.rows) + r, column, c) * factor;
            }
            let at = (first_row + r) * (vectors * comptime!(c.width)) + n;
            finish::<H, O>(sum, up, bias, up_bias, residual, out, at, n, flags, out_scale, c.epilogue);
        }
    }
}

/// Adds the shares of a row's sum of squares, which lie side by side, to the first of them.
#[cube]
fn add_squares(row_squares: &mut Shared<[f32]>, #[comptime] c: GemvConfig) {
    let shares = comptime!(c.units() / c.shape.rows);
    let own = UNIT_POS as usize % shares;
    let mut left = shares.runtime();
    while left > 1 {
        let half = left.div_ceil(2usize);
        sync_cube();
        if own < left - half {
            let other = row_squares[UNIT_POS as usize + half];
            row_squares[UNIT_POS as usize] += other;
        }
        left = half;
    }
}

/// The sum over the lanes along K, in ascending order.
#[cube]
fn lanes_sum(handed_over: &Shared<[f32]>, row: usize, column: usize, #[comptime] c: GemvConfig) -> f32 {
    let mut sum = f32::new(0.0);
    for lane in 0..comptime!(c.shape.lanes_k) {
        sum += handed_over[(row * comptime!(c.shape.lanes_k) + lane) * comptime!(c.cube_columns()) + column];
    }
    sum
}

/// Puts a chunk of every row into shared memory, 0 outside the matrix. Equal numbers of units have a row each; returns
/// the unit's share of the sum of its squares.
#[cube]
#[allow(clippy::too_many_arguments)]
fn stage_rows<X: Numeric, G: Numeric>(
    x: &[X],
    gamma: &[G],
    stage: &mut Shared<[Vector<f32, Const<4>>]>,
    first_row: usize,
    m: usize,
    start: usize,
    k: usize,
    gamma_offset: f32,
    #[comptime] c: GemvConfig,
) -> f32 {
    let shares = comptime!(c.units() / c.shape.rows);
    let r = UNIT_POS as usize / shares;
    let row = first_row + r;
    let mut squares = f32::new(0.0);
    for i in 0..comptime!((c.chunk / QUAD).div_ceil(c.units() / c.shape.rows)) {
        let quad = i * shares + UNIT_POS as usize % shares;
        if quad < comptime!(c.chunk / QUAD) {
            let mut values = Vector::<f32, Const<4>>::new(f32::new(0.0));
            #[unroll]
            for i in 0..4usize {
                let feature = start + quad * 4usize + i;
                let inside = row < m && feature < k;
                let at = select(inside, row * k + feature, 0usize);
                let feature = select(inside, feature, 0usize);
                if comptime!(c.input.gamma.is_some()) {
                    let value = select(inside, load::<X>(x, at, c.input.x), f32::new(0.0));
                    squares += value * value;
                }
                let value = load_input::<X, G>(x, gamma, at, feature, gamma_offset, c.input);
                values.insert(i, select(inside, value, f32::new(0.0)));
            }
            stage[r * comptime!(c.slots()) + quad + quad / 8usize] = values;
        }
    }
    squares
}

/// Adds the lane's blocks of a chunk to the sums of a vector of columns from `first_sum`.
#[cube]
#[allow(clippy::too_many_arguments)]
fn add_chunk<S: Numeric, V: Size>(
    words: &[Vector<u32, V>],
    scales: &[Vector<S, V>],
    zeros: &[Vector<S, V>],
    table: &[f32],
    stage: &Shared<[Vector<f32, Const<4>>]>,
    sums: &mut Array<f32>,
    start: usize,
    lane_k: usize,
    column: usize,
    vectors: usize,
    k: usize,
    group: u32,
    #[comptime] first_sum: usize,
    #[comptime] c: GemvConfig,
) {
    // No blocks for a column beyond N.
    let first = start / comptime!(c.block());
    let all = k.div_ceil(comptime!(c.block()));
    let last = first + comptime!(c.chunk / c.block());
    let last = select(all < last, all, last);
    let last = select(column < vectors, last, 0usize);
    for block in range_stepped(first + lane_k, last, comptime!(c.shape.lanes_k)) {
        let unit = block * comptime!(c.depth);
        let at_group = group_of(unit, group, c.grouping) * vectors + column;
        let mut partial = Array::<f32>::new(comptime!(c.shape.rows * c.width));
        #[unroll]
        for i in 0..comptime!(c.shape.rows * c.width) {
            partial[i] = f32::new(0.0);
        }
        let mut zero = Vector::<S, V>::new(S::from_int(0));
        if comptime!(c.decoder.zeros || c.decoder.offsets) {
            zero = zeros[at_group];
        }
        let mut early = Vector::<S, V>::new(S::from_int(0));
        if comptime!(c.decoder.offsets) {
            early = scales[at_group];
        }
        let first_quad = (unit * comptime!(c.decoder.unit()) - start) / 4usize;
        #[unroll(c.unroll)]
        for step in 0..comptime!(c.depth / c.span()) {
            let word = (unit + step * comptime!(c.span())) * comptime!(c.decoder.words());
            let quad = first_quad + step * comptime!(c.step() / QUAD);
            add_step::<S, V>(words, table, stage, &mut partial, early, zero, word, quad, column, vectors, c);
        }
        #[unroll]
        for lane in 0..comptime!(c.width) {
            let mut scale = f32::new(1.0);
            if comptime!(c.grouping != Grouping::None && !c.decoder.offsets) {
                scale = stored_scale::<S>(scales[at_group].extract(lane), table, c.decoder);
            }
            #[unroll]
            for r in 0..comptime!(c.shape.rows) {
                sums[comptime!(first_sum + r * c.shape.columns + lane)] +=
                    partial[comptime!(r * c.width + lane)] * scale;
            }
        }
    }
}

/// Adds the products of at least a quad of input features, whole units, before scaling; with offsets, which leave no
/// common factor, after it.
#[cube]
#[allow(clippy::too_many_arguments)]
fn add_step<S: Numeric, V: Size>(
    words: &[Vector<u32, V>],
    table: &[f32],
    stage: &Shared<[Vector<f32, Const<4>>]>,
    partial: &mut Array<f32>,
    scale: Vector<S, V>,
    zero: Vector<S, V>,
    word: usize,
    first_quad: usize,
    column: usize,
    vectors: usize,
    #[comptime] c: GemvConfig,
) {
    let rows = comptime!(c.shape.rows);
    let mut loaded = Array::<Vector<u32, V>>::new(comptime!(c.span() * c.decoder.words()));
    #[unroll]
    for i in 0..comptime!(c.span() * c.decoder.words()) {
        loaded[i] = words[(word + i) * vectors + column];
    }
    #[unroll]
    for q in 0..comptime!(c.step() / QUAD) {
        let quad = first_quad + q;
        let slot = quad + quad / 8usize;
        let mut values = Array::<Vector<f32, Const<4>>>::new(rows);
        #[unroll]
        for r in 0..rows {
            values[r] = stage[comptime!(r * c.slots()) + slot];
        }
        #[unroll]
        for lane in 0..comptime!(c.width) {
            #[unroll]
            for i in 0..4usize {
                let mut w = block_level::<V>(&loaded, table, comptime!(q * QUAD + i), lane, c.decoder);
                if comptime!(c.decoder.zeros || c.decoder.offsets) {
                    let (scale, zero) = (f32::cast_from(scale.extract(lane)), f32::cast_from(zero.extract(lane)));
                    w = summand(w, scale, zero, c.decoder);
                }
                #[unroll]
                for r in 0..rows {
                    partial[comptime!(r * c.width + lane)] += w * values[r].extract(i);
                }
            }
        }
    }
}

/// Whether a shape can be launched for a product, compiled how.
fn configure<R: Runtime>(gpu: &Gpu<R>, shape: Gemv, product: &Product<'_, R>) -> Result<GemvConfig> {
    let refuse = |what: String| Err(limit(gpu, product.operation, what));
    let [_, n, _] = product.shape();
    if !matches!(shape.columns, 1 | 2 | 4) || !(1..=16).contains(&shape.rows) {
        return refuse(format!("{} columns of {} rows a unit (1, 2 or 4 and 1 to 16)", shape.columns, shape.rows));
    }
    let width = (1..=shape.columns).rev().find(|width| shape.columns % width == 0 && n % width == 0).unwrap_or(1);
    let decoder = product.weight.kernel_decoder();
    let (grouping, _) = product.grouping();
    let (unit, group) = (decoder.unit(), product.weight.decoder.group_size);
    let fits = |depth: &usize| depth * unit <= PADDED && (group == 0 || (group / unit).is_multiple_of(*depth));
    let depth = [16, 8, 4, 2, 1].into_iter().find(fits).unwrap_or(1);
    let (input, epilogue) = (product.input(), product.epilogue());
    let chunk = (4096 / shape.rows.next_power_of_two()).max(PADDED);
    let chunk = chunk / (depth * unit) * (depth * unit);
    let mut config =
        GemvConfig { shape, input, decoder, grouping, epilogue, width, depth, unroll: gpu.name() == "cuda", chunk };
    let hardware = &gpu.properties().hardware;
    let most = hardware.max_shared_memory_size;
    while config.shared_bytes() > most && config.chunk > 2 * PADDED {
        config.chunk = (config.chunk / 2).next_multiple_of(config.block());
    }
    if config.shared_bytes() > most {
        return refuse(format!("{} bytes of shared memory where there are {most}", config.shared_bytes()));
    }
    let units = config.units();
    if !units.is_multiple_of(shape.rows) {
        return refuse(format!("{} rows on {units} units", shape.rows));
    }
    if units == 0 || units > hardware.max_units_per_cube as usize {
        return refuse(format!("{units} units a cube where {} are allowed", hardware.max_units_per_cube));
    }
    Ok(config)
}

/// Launches the kernel.
pub(super) fn launch<R: Runtime>(gpu: &Gpu<R>, shape: Gemv, product: &Product<'_, R>) -> Result<()> {
    let config = configure(gpu, shape, product)?;
    let [m, n, k] = product.shape();
    let (width, (_, group)) = (config.width, product.grouping());
    let count = super::grid(gpu, product.operation, [n.div_ceil(config.cube_columns()), m.div_ceil(shape.rows), 1])?;
    let (weight, up) = (product.weight, product.up_or_weight());
    let (gamma_offset, eps) = product.norm_scalars();
    // SAFETY: every buffer holds what its shape says; the kernel compares rows, columns and features with M, N and K.
    unsafe {
        gemv::launch_unchecked::<R>(
            gpu.client(),
            count,
            CubeDim::new_1d(config.units() as u32),
            width,
            product.x_arg(),
            product.gamma_arg(gpu),
            weight.words_arg(width),
            weight.scales_arg(width),
            weight.zeros_arg(width),
            weight.table_arg(),
            weight.bias_arg(gpu),
            up.words_arg(width),
            up.scales_arg(width),
            up.zeros_arg(width),
            up.table_arg(),
            up.bias_arg(gpu),
            product.residual_arg(gpu),
            product.out_arg(),
            m as u32,
            (n / width) as u32,
            k as u32,
            group,
            product.flags(),
            product.out_scale,
            gamma_offset,
            eps,
            config,
            product.elements(),
        );
    }
    Ok(())
}

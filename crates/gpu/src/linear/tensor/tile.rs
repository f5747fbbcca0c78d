//! Many rows: a cube stages its rows of x in shared memory, permuted, while every plane decodes the weights of its own 32
//! columns in registers.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use half::{bf16, f16};
use marlin_ops::{Result, Tensor};

use super::experts::{Share, share};
use super::fragment::{Code, Operand, decode_word, double_zeros, widen_scales};
use super::stage::{Stage, first_vectors, load_x, multiply_step, rows_from, store_x, zero_sums};
use super::{Call, STEP, Target};
use crate::Gpu;
use crate::element::{Storage, bf16_bits, widen};
use crate::linear::epilogue::{Epilogue, flags, result};
use crate::linear::{grid, limit};

/// Shape of the tensor-core kernel for any number of rows.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct TensorTile {
    /// Blocks of 8 rows that a plane computes; an even multiple of `planes_n`.
    pub row_blocks: usize,
    /// Planes of a cube along M.
    pub planes_m: usize,
    /// Planes along N, 32 columns each.
    pub planes_n: usize,
    /// Planes along K, whose sums are added in shared memory.
    pub planes_k: usize,
    /// Steps of 32 input features in shared memory at a time: 1, 2 or 4. There are two such stages.
    pub steps: usize,
    /// Keep the sums in units of the current group's scale, in half the registers, instead of beside the group's.
    pub rescale: bool,
    /// Slices of K, added by a second kernel: 1 to 64.
    pub slices: usize,
}

impl TensorTile {
    /// Rows of a cube.
    pub(super) const fn rows(self) -> usize {
        8 * self.row_blocks * self.planes_m
    }

    /// Columns of a cube.
    pub(super) const fn columns(self) -> usize {
        32 * self.planes_n
    }

    /// Planes of a cube.
    const fn planes(self) -> usize {
        self.planes_m * self.planes_n * self.planes_k
    }

    /// Pairs of sums that the parts of K but the first hand over.
    const fn handed_over(self) -> usize {
        (self.planes_k - 1) * self.planes_m * self.planes_n * self.row_blocks * 4 * 32
    }

    /// Shared memory of the kernel for x in so many parts.
    pub(super) const fn shared_bytes(self, parts: usize) -> usize {
        let stage_vectors = 4 * self.rows() * parts * self.steps;
        2 * self.planes_k * stage_vectors * 16 + self.handed_over() * 8
    }
}

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct TileConfig {
    code: Code,
    operand: Operand,
    /// Parts whose sum x is.
    parts: usize,
    /// With one slice: kernels of more are the same.
    tile: TensorTile,
    /// A group may begin at every step, not only with a stage.
    short_groups: bool,
    rows_of: RowsOf,
    epilogue: Epilogue,
}

/// Whose rows a cube computes.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
enum RowsOf {
    /// All, of one weight.
    One,
    /// Those of an expert; x has a row for each.
    Expert,
    /// Those of an expert; x has a row for `slots` of them.
    Gathered,
}

impl TileConfig {
    /// How rows of x lie in shared memory, for each part of K.
    const fn stage(self) -> Stage {
        let units = 32 * self.tile.planes_m * self.tile.planes_n;
        Stage { rows: self.tile.rows(), parts: self.parts, steps: self.tile.steps, units, paired: true }
    }

    /// Scale vectors of a stage that a lane holds.
    const fn scales(self) -> usize {
        if self.short_groups { self.tile.steps } else { 1 }
    }
}

/// Operands as of [`super::rows`], x in [`TileConfig::parts`] parts, weights of experts one behind the other. A cube of 32 by
/// `planes` computes `rows` rows of `32 planes_n` columns of a slice of K. Groups have `2^group_shift` steps.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn multiply_tile<F: Float, H: Numeric, O: Numeric>(
    words: &[Vector<u32, Const<4>>],
    scales: &[Vector<u32, Const<2>>],
    zeros: &[Vector<u32, Const<2>>],
    x: &[Vector<u32, Const<4>>],
    bias: &[Vector<f32, Const<4>>],
    residual: &[Vector<H, Const<4>>],
    tiles: &[u32],
    offsets: &[u32],
    permutation: &[u32],
    places: &[u32],
    out: &mut [Vector<O, Const<4>>],
    m: u32,
    k: u32,
    n: u32,
    slices: u32,
    groups: u32,
    group_shift: u32,
    experts: u32,
    first_place: u32,
    slots: u32,
    magic: u32,
    flags: u32,
    out_scale: f32,
    #[comptime] c: TileConfig,
    #[define(H, O)] _elements: [ElemType; 2],
) {
    let sorted = comptime!(c.rows_of != RowsOf::One);
    let share = share(tiles, offsets, places, m, experts, first_place, comptime!(c.tile.rows()), sorted);
    if share.first >= share.end {
        terminate!();
    }
    let lane = UNIT_POS_X as usize;
    let (g, t) = (lane / 4, lane % 4);
    let part = UNIT_POS_Y as usize / comptime!(c.tile.planes_m * c.tile.planes_n);
    let plane = UNIT_POS_Y as usize % comptime!(c.tile.planes_m * c.tile.planes_n);
    let plane_m = plane / comptime!(c.tile.planes_n);
    let quads = n as usize / 4;
    let column = (CUBE_POS_Y as usize * comptime!(c.tile.planes_n) + plane % comptime!(c.tile.planes_n)) * 8 + g;
    let word_column = share.place * (k as usize / 8) * quads + column;
    let scale_column = share.place * groups as usize * quads + column;
    let stager = plane * 32 + lane;
    let all = k as usize / comptime!(STEP * c.tile.steps);
    let slice = CUBE_POS_Z as usize;
    let first = slice * all / slices as usize;
    let stages = (slice + 1) * all / slices as usize;

    let vectors = comptime!(2 * c.tile.planes_k * c.stage().vectors());
    let mut shared = Shared::<[Vector<u32, Const<4>>]>::new_aligned_slice(vectors, 16usize);
    let mut sums = zero_sums(c.tile.row_blocks);
    let mut totals = zero_sums(c.tile.row_blocks);
    let mut scale = Array::<f32>::new(4usize);
    let mut dead = Array::<bool>::new(4usize);
    #[unroll]
    for j in 0..4usize {
        scale[j] = 1.0;
        dead[j] = false;
    }
    let mut zero = Vector::<u32, Const<2>>::new(0u32);
    let mut group = u32::MAX.runtime() as usize;

    let rows = sources(stager, permutation, &share, slots, c);
    let rows = first_vectors(stager, &rows, m, k, comptime!(c.stage()));
    let mut xv = Array::<Vector<u32, Const<4>>>::new(comptime!(c.stage().own()));
    let mut w = Array::<Vector<u32, Const<4>>>::new(comptime!(c.tile.steps));
    let mut s = Array::<Vector<u32, Const<2>>>::new(comptime!(c.scales()));
    let mut z = Array::<Vector<u32, Const<2>>>::new(comptime!(c.scales()));
    let mut stage = first + part;
    // A part without work loads what another needs.
    let loaded = select(stage < stages, stage, first);
    #[unroll]
    for step in 0..comptime!(c.tile.steps) {
        w[step] = words[((loaded * comptime!(c.tile.steps) + step) * 4 + t) * quads + word_column];
        load_scales(scales, zeros, &mut s, &mut z, loaded, step, group_shift, quads, scale_column, c);
        load_x(x, &mut xv, &rows, loaded, step, comptime!(c.stage()));
        store_x(&mut shared, &xv, part * 2, stager, step, comptime!(c.stage()));
    }
    sync_cube();
    let mut buffer = part * 2;
    for _turn in 0..(stages - first).div_ceil(comptime!(c.tile.planes_k)) {
        let after = stage + comptime!(c.tile.planes_k);
        let other = buffer ^ 1;
        // Parts of K may have one stage more than others, but all take part in every barrier.
        if stage < stages {
            // The last turn loads its own stage again.
            let next = select(after < stages, after, stage);
            #[unroll]
            for step in 0..comptime!(c.tile.steps) {
                load_x(x, &mut xv, &rows, next, step, comptime!(c.stage()));
                if comptime!(step == 0 || c.short_groups) {
                    let now = (stage * comptime!(c.tile.steps) + step) >> group_shift as usize;
                    if now != group {
                        let i = comptime!(if c.short_groups { step } else { 0 });
                        begin_group(&mut sums, &mut totals, &mut scale, &mut dead, s[i], c);
                        zero = z[i];
                        group = now;
                    }
                }
                let weights = operands::<F>(w[step], &dead, zero, magic, c);
                w[step] = words[((next * comptime!(c.tile.steps) + step) * 4 + t) * quads + word_column];
                load_scales(scales, zeros, &mut s, &mut z, next, step, group_shift, quads, scale_column, c);
                let row = plane_m * comptime!(8 * c.tile.row_blocks) + g;
                let from = buffer * comptime!(c.stage().vectors()) + comptime!(c.stage().step_vectors() * step);
                #[unroll]
                for x_part in 0..comptime!(c.parts) {
                    let from = from + comptime!(4 * c.tile.rows() * x_part) + row * 4 + t;
                    multiply_step::<F>(&shared, &mut sums, &weights, from, c.tile.row_blocks);
                }
                store_x(&mut shared, &xv, other, stager, step, comptime!(c.stage()));
            }
        }
        sync_cube();
        buffer = other;
        stage = after;
    }
    end_groups(&mut sums, &totals, &scale, c);
    add_parts(&mut sums, plane, part, lane, c);
    if part == 0 {
        let row0 = share.first + plane_m * comptime!(8 * c.tile.row_blocks) + t * 2;
        let bias_column = share.place * quads + column;
        write_tile::<H, O>(
            &sums,
            bias,
            residual,
            out,
            row0,
            share.end,
            column,
            bias_column,
            m,
            quads,
            flags,
            out_scale,
            c,
        );
    }
}

/// The rows of x that a unit's vectors belong to.
#[cube]
fn sources(stager: usize, permutation: &[u32], share: &Share, slots: u32, #[comptime] c: TileConfig) -> Array<usize> {
    let mut rows = rows_from(stager, share.first, share.end, comptime!(c.stage()));
    if comptime!(c.rows_of == RowsOf::Gathered) {
        #[unroll]
        for i in 0..comptime!(c.stage().own()) {
            rows[i] = (permutation[rows[i]] / slots) as usize;
        }
    }
    rows
}

/// Loads a lane's scales of a step, if they may be others than the step's before.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load_scales(
    scales: &[Vector<u32, Const<2>>],
    zeros: &[Vector<u32, Const<2>>],
    s: &mut Array<Vector<u32, Const<2>>>,
    z: &mut Array<Vector<u32, Const<2>>>,
    stage: usize,
    #[comptime] step: usize,
    group_shift: u32,
    quads: usize,
    column: usize,
    #[comptime] c: TileConfig,
) {
    if comptime!(step == 0 || c.short_groups) {
        let at = ((stage * comptime!(c.tile.steps) + step) >> group_shift as usize) * quads + column;
        s[step] = scales[at];
        if comptime!(c.code == Code::Int4Zero) {
            z[step] = zeros[at];
        } else {
            z[step] = Vector::<u32, Const<2>>::new(0u32);
        }
    }
}

/// Ends a group and begins the next.
#[cube]
fn begin_group(
    sums: &mut Sequence<Array<Vector<f32, Const<2>>>>,
    totals: &mut Sequence<Array<Vector<f32, Const<2>>>>,
    scale: &mut Array<f32>,
    dead: &mut Array<bool>,
    raw: Vector<u32, Const<2>>,
    #[comptime] c: TileConfig,
) {
    let next = widen_scales::<Const<2>>(raw, 4usize);
    let mut factor = Array::<f32>::new(4usize);
    #[unroll]
    for j in 0..4usize {
        if comptime!(c.tile.rescale) {
            // A scale of 0 cannot be a unit: the group's codes are taken as 0 instead.
            dead[j] = next[j] == 0.0f32;
            let unit = select(dead[j], scale[j], next[j]);
            factor[j] = scale[j] / unit;
            scale[j] = unit;
        } else {
            factor[j] = scale[j];
            scale[j] = next[j];
        }
    }
    #[unroll]
    for i in 0..comptime!(2 * c.tile.row_blocks) {
        let sum = sums.index_mut(i);
        let total = totals.index_mut(i);
        #[unroll]
        for half in 0..2usize {
            let by = Vector::<f32, Const<2>>::new(factor[comptime!(i % 2 * 2 + half)]);
            if comptime!(c.tile.rescale) {
                sum[half] = sum[half] * by;
            } else {
                total[half] = fma(sum[half], by, total[half]);
                sum[half] = Vector::<f32, Const<2>>::new(0.0);
            }
        }
    }
}

/// Leaves the scaled results in `sums`.
#[cube]
fn end_groups(
    sums: &mut Sequence<Array<Vector<f32, Const<2>>>>,
    totals: &Sequence<Array<Vector<f32, Const<2>>>>,
    scale: &Array<f32>,
    #[comptime] c: TileConfig,
) {
    #[unroll]
    for i in 0..comptime!(2 * c.tile.row_blocks) {
        let sum = sums.index_mut(i);
        let total = totals.index(i);
        #[unroll]
        for half in 0..2usize {
            let by = Vector::<f32, Const<2>>::new(scale[comptime!(i % 2 * 2 + half)]);
            if comptime!(c.tile.rescale) {
                sum[half] = sum[half] * by;
            } else {
                sum[half] = fma(sum[half], by, total[half]);
            }
            sum[half] = sum[half] * Vector::<f32, Const<2>>::new(comptime!(c.operand.factor(c.code)));
        }
    }
}

/// The operands of a step made of a lane's words: [two columns, half of the step].
#[cube]
fn operands<F: Float>(
    words: Vector<u32, Const<4>>,
    dead: &Array<bool>,
    zero: Vector<u32, Const<2>>,
    magic: u32,
    #[comptime] c: TileConfig,
) -> Sequence<Array<Vector<F, Const<2>>>> {
    let zeros = double_zeros::<Const<2>>(zero, 4usize);
    let mut weights = Sequence::<Array<Vector<F, Const<2>>>>::new();
    #[unroll]
    for h in 0..2usize {
        let (l, r) = comptime!((2 * h, 2 * h + 1));
        let low = live_word::<F>(words, zeros[l], dead[l], magic, l, c);
        let high = live_word::<F>(words, zeros[r], dead[r], magic, r, c);
        #[unroll]
        for u in 0..2usize {
            let mut operand = Array::<Vector<F, Const<2>>>::new(4usize);
            operand[0] = low[comptime!(2 * u)];
            operand[1] = high[comptime!(2 * u)];
            operand[2] = low[comptime!(2 * u + 1)];
            operand[3] = high[comptime!(2 * u + 1)];
            weights.push(operand);
        }
    }
    weights
}

/// The pairs of column `j` of a lane's words, all 0 where the group's scale is.
#[cube]
fn live_word<F: Float>(
    words: Vector<u32, Const<4>>,
    zero: u32,
    dead: bool,
    magic: u32,
    #[comptime] j: usize,
    #[comptime] c: TileConfig,
) -> Array<Vector<F, Const<2>>> {
    let word = words.extract(j);
    if comptime!(!c.tile.rescale) {
        decode_word::<F>(word, zero, magic, c.code, c.operand)
    } else {
        let neutral = comptime!(if c.code == Code::Int4 { 0x8888_8888u32 } else { 0 }).runtime();
        decode_word::<F>(select(dead, neutral, word), select(dead, 0u32, zero), magic, c.code, c.operand)
    }
}

/// Adds the sums of all parts of K to those of the first, in order.
#[cube]
fn add_parts(
    sums: &mut Sequence<Array<Vector<f32, Const<2>>>>,
    plane: usize,
    part: usize,
    lane: usize,
    #[comptime] c: TileConfig,
) {
    if comptime!(c.tile.planes_k > 1) {
        let mut shared = Shared::<[Vector<f32, Const<2>>]>::new_slice(comptime!(c.tile.handed_over()));
        let slots = comptime!(c.tile.row_blocks * 4);
        if part > 0 {
            let at = (plane + (part - 1) * comptime!(c.tile.planes_m * c.tile.planes_n)) * slots * 32 + lane;
            #[unroll]
            for i in 0..comptime!(2 * c.tile.row_blocks) {
                let sum = sums.index(i);
                #[unroll]
                for half in 0..2usize {
                    shared[at + comptime!((2 * i + half) * 32)] = sum[half];
                }
            }
        }
        sync_cube();
        if part == 0 {
            #[unroll]
            for other in 0..comptime!(c.tile.planes_k - 1) {
                let at = (plane + comptime!(other * c.tile.planes_m * c.tile.planes_n)) * slots * 32 + lane;
                #[unroll]
                for i in 0..comptime!(2 * c.tile.row_blocks) {
                    let sum = sums.index_mut(i);
                    #[unroll]
                    for half in 0..2usize {
                        sum[half] = sum[half] + shared[at + comptime!((2 * i + half) * 32)];
                    }
                }
            }
        }
    }
}

/// Writes a lane's four columns of two rows of each row block.
#[cube]
#[allow(clippy::too_many_arguments)]
fn write_tile<H: Numeric, O: Numeric>(
    sums: &Sequence<Array<Vector<f32, Const<2>>>>,
    bias: &[Vector<f32, Const<4>>],
    residual: &[Vector<H, Const<4>>],
    out: &mut [Vector<O, Const<4>>],
    row0: usize,
    end: usize,
    column: usize,
    bias_column: usize,
    m: u32,
    quads: usize,
    flags: u32,
    out_scale: f32,
    #[comptime] c: TileConfig,
) {
    let mut biases = Vector::<f32, Const<4>>::new(0.0);
    if (flags & flags::BIAS) != 0u32 {
        biases = bias[bias_column];
    }
    #[unroll]
    for b in 0..comptime!(c.tile.row_blocks) {
        #[unroll]
        for e in 0..2usize {
            let row = row0 + comptime!(8 * b + e);
            if row < end {
                let at = (CUBE_POS_Z as usize * m as usize + row) * quads + column;
                let mut others = Vector::<f32, Const<4>>::new(0.0);
                let mut previous = Vector::<f32, Const<4>>::new(0.0);
                if (flags & (flags::ADD | flags::MULTIPLY)) != 0u32 {
                    others = widen_quad::<H>(residual[at], c.epilogue.residual);
                }
                if comptime!(c.epilogue.in_place) {
                    previous = widen_quad::<O>(out[at], c.epilogue.out);
                }
                let mut written = Vector::<O, Const<4>>::empty();
                #[unroll]
                for j in 0..4usize {
                    let sum = sums.index(comptime!(2 * b + j / 2))[comptime!(j % 2)].extract(e);
                    let (bias, other, previous) = (biases.extract(j), others.extract(j), previous.extract(j));
                    let value = result(sum, sum, bias, bias, other, previous, flags, out_scale, c.epilogue);
                    written.insert(j, nearest::<O>(value, c.epilogue.out));
                }
                out[at] = written;
            }
        }
    }
}

#[cube]
fn widen_quad<E: Numeric>(quad: Vector<E, Const<4>>, #[comptime] storage: Storage) -> Vector<f32, Const<4>> {
    let mut values = Vector::<f32, Const<4>>::empty();
    #[unroll]
    for j in 0..4usize {
        values.insert(j, widen::<E>(quad.extract(j), storage));
    }
    values
}

/// A value as an element. Devices with tensor cores round to f16 correctly.
#[cube]
fn nearest<E: Numeric>(value: f32, #[comptime] storage: Storage) -> E {
    if comptime!(storage == Storage::BF16) { E::cast_from(bf16_bits(value)) } else { E::cast_from(value) }
}

/// Whether a shape can be launched for a call, compiled how.
fn configure<R: Runtime>(gpu: &Gpu<R>, tile: TensorTile, call: &Call, target: &Target<'_, R>) -> Result<TileConfig> {
    let refuse = |what: String| Err(limit(gpu, target.product.operation, what));
    let [_, n, _] = target.product.shape();
    let TensorTile { row_blocks, planes_n, steps, .. } = tile;
    let (hardware, planes) = (&gpu.properties().hardware, tile.planes());
    if planes == 0 || 32 * planes > hardware.max_units_per_cube as usize {
        return refuse(format!("{planes} planes of 32 where {} units are allowed", hardware.max_units_per_cube));
    }
    if row_blocks == 0 || !row_blocks.is_multiple_of(2) || !row_blocks.is_multiple_of(planes_n) {
        return refuse(format!("{row_blocks} row blocks of 8 (even multiples of {planes_n} planes along N)"));
    }
    if !n.is_multiple_of(tile.columns()) || !matches!(steps, 1 | 2 | 4) {
        return refuse(format!("{steps} steps (1, 2 or 4) of {} columns where N is {n}", tile.columns()));
    }
    let config = TileConfig {
        code: call.code,
        operand: call.operand,
        parts: call.parts,
        tile: TensorTile { slices: 1, ..tile },
        short_groups: call.group_shift < steps.ilog2(),
        rows_of: target.experts.map_or(RowsOf::One, |rows| match rows.slots {
            None => RowsOf::Expert,
            Some(_) => RowsOf::Gathered,
        }),
        epilogue: target.epilogue,
    };
    let (shared, most) = (tile.shared_bytes(call.parts) + super::SHARED_BESIDE, hardware.max_shared_memory_size);
    if shared > most {
        return refuse(format!("{shared} bytes of shared memory where there are {most}"));
    }
    Ok(config)
}

/// Launches the kernel.
pub(super) fn launch<R: Runtime>(gpu: &Gpu<R>, tile: TensorTile, call: &Call, target: &Target<'_, R>) -> Result<()> {
    let config = configure(gpu, tile, call, target)?;
    let product = target.product;
    let [m, n, k] = product.shape();
    let rows = target.experts;
    let tiles = rows.map_or(m.div_ceil(tile.rows()), |rows| rows.tile_count);
    let count = grid(gpu, product.operation, [tiles, n / tile.columns(), tile.slices])?;
    let unread = || gpu.unread();
    let all = |tensor: &Tensor<Gpu<R>>| tensor.buffer().arg(tensor.elements());
    let launch = match call.operand {
        Operand::F16 => multiply_tile::launch_unchecked::<f16, R>,
        Operand::BF16 => multiply_tile::launch_unchecked::<bf16, R>,
    };
    // SAFETY: N is a multiple of the cube's columns and K of a stage, so vectors lie within the operands, whose sizes were
    // checked; rows are compared with M, or lie within the offsets of an expert whose place is within the bank, and the
    // permutation holds numbers below `slots` times the rows of x.
    unsafe {
        launch(
            gpu.client(),
            count,
            CubeDim::new_2d(32, tile.planes() as u32),
            product.weight.words_arg(4),
            product.weight.scales_arg(4),
            product.weight.zeros_arg(4),
            target.x.arg(call.parts * product.x.elements() / 8),
            product.weight.bias_arg(gpu),
            product.residual_arg(gpu),
            rows.map_or_else(unread, |rows| all(rows.tiles)),
            rows.map_or_else(unread, |rows| all(rows.offsets)),
            rows.map_or_else(unread, |rows| all(rows.permutation)),
            rows.map_or_else(unread, |rows| rows.places.arg(3 * rows.experts)),
            target.out.buffer().arg(target.out.elements() / 4),
            m as u32,
            k as u32,
            n as u32,
            tile.slices as u32,
            k.div_ceil(product.weight.decoder.group_size.max(1)) as u32,
            call.group_shift,
            rows.map_or(0, |rows| rows.experts) as u32,
            rows.map_or(0, |rows| rows.first_place) as u32,
            rows.and_then(|rows| rows.slots).unwrap_or(1) as u32,
            call.operand.magic(call.code),
            target.flags,
            target.out_scale,
            config,
            [target.epilogue.residual.elem(), target.epilogue.out.elem()],
        );
    }
    Ok(())
}

//! Batches of products whose matrices lie at strides: one cube a tile of one matrix of the output.

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::linear::{BatchStrides, BatchedShape, BatchedWeight, GemmBatchedArgs};
use marlin_ops::{Result, Tensor};

use super::epilogue::Epilogue;
use super::operands::{Grouping, Input};
use super::tile::{Accumulate, Tile, TileConfig, add_tile, clear};
use super::{grid, limit};
use crate::decode::{Decoder, decode_unit, group_scale, group_zero, weight_of};
use crate::element::{Storage, load, store};
use crate::math::activate;
use crate::{Buffer, Gpu};

const OP: &str = "gemm_batched";

/// How weights lie.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
enum Weights {
    Dense(Storage),
    /// Codes in the words of [`Decoder`].
    Packed,
}

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct Config {
    tile: TileConfig,
    weights: Weights,
}

/// Places of one matrix of each operand, and sizes.
#[derive(CubeType, Clone, Copy)]
struct Place {
    a: usize,
    a_row: usize,
    w: usize,
    /// Dense: from one feature, and from one column, to the next. Packed: from one row of words to the next.
    w_feature: usize,
    w_column: usize,
    scales: usize,
    scales_row: usize,
    zeros: usize,
    zeros_row: usize,
    m: usize,
    n: usize,
    k: usize,
    group: u32,
}

/// Numbers of the kernel's table of strides, in elements.
mod stride {
    pub(super) const A: usize = 0;
    pub(super) const W: usize = 3;
    pub(super) const SCALES: usize = 7;
    pub(super) const ZEROS: usize = 10;
    pub(super) const OUT: usize = 13;
    pub(super) const COUNT: usize = 16;
}

/// Cubes `[tiles of N, tiles of M, B H]`. `strides` as [`stride`] numbers them: batch, head and row of each operand,
/// for `W` also the column.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn batched<X: Numeric, W: Numeric, S: Numeric, O: Numeric, A: Float>(
    a: &[X],
    dense: &[W],
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    strides: &[u32],
    rows: &[u32],
    out: &mut [O],
    heads: u32,
    weight_heads: u32,
    n: u32,
    k: u32,
    group: u32,
    alpha: f32,
    #[comptime] c: Config,
    #[define(X, W, S, O, A)] _elements: [ElemType; 5],
) {
    let t = comptime!(c.tile);
    let mut x_tile = Shared::<[A]>::new_slice(comptime!(t.tile.stages * t.x_stage()));
    let mut w_tile = Shared::<[A]>::new_slice(comptime!(t.tile.stages * t.w_stage()));
    let mut sums = Array::<A>::new(comptime!(t.sums()));
    clear::<A>(&mut sums, t);
    let heads = heads as usize;
    let b = CUBE_POS_Z as usize / heads;
    let head = CUBE_POS_Z as usize % heads;
    let weight_head = head / (heads / weight_heads as usize);
    let p = Place {
        a: start(strides, stride::A, b, head),
        a_row: strides[comptime!(stride::A + 2)] as usize,
        w: start(strides, stride::W, b, weight_head),
        w_feature: strides[comptime!(stride::W + 2)] as usize,
        w_column: strides[comptime!(stride::W + 3)] as usize,
        scales: start(strides, stride::SCALES, b, weight_head),
        scales_row: strides[comptime!(stride::SCALES + 2)] as usize,
        zeros: start(strides, stride::ZEROS, b, weight_head),
        zeros_row: strides[comptime!(stride::ZEROS + 2)] as usize,
        m: rows[b] as usize,
        n: n as usize,
        k: k as usize,
        group,
    };
    let m0 = CUBE_POS_Y as usize * comptime!(t.tile.m);
    let n0 = CUBE_POS_X as usize * comptime!(t.tile.n);
    let steps = p.k.div_ceil(comptime!(t.tile.k));
    let ahead = comptime!(t.tile.stages - 1);
    #[unroll]
    for i in 0..ahead {
        load_a::<X, A>(a, &mut x_tile, i, m0, i, &p, c);
        load_w::<W, S, A>(dense, words, scales, zeros, table, &mut w_tile, i, n0, i, &p, c);
    }
    if comptime!(ahead > 0) {
        sync_cube();
    }
    for step in 0..steps {
        // Those of the last steps lie beyond K and are not multiplied.
        let next = step + ahead;
        let to = next % comptime!(t.tile.stages);
        load_a::<X, A>(a, &mut x_tile, to, m0, next, &p, c);
        load_w::<W, S, A>(dense, words, scales, zeros, table, &mut w_tile, to, n0, next, &p, c);
        if comptime!(ahead == 0) {
            sync_cube();
        }
        add_tile::<A>(&mut x_tile, &mut w_tile, &mut sums, step % comptime!(t.tile.stages), t);
        sync_cube();
    }
    let first = start(strides, stride::OUT, b, head);
    let out_row = strides[comptime!(stride::OUT + 2)] as usize;
    let lane_n = UNIT_POS as usize % comptime!(t.lanes_n());
    let lane_m = UNIT_POS as usize / comptime!(t.lanes_n());
    #[unroll]
    for i in 0..comptime!(t.unit_m) {
        let row = m0 + lane_m * comptime!(t.unit_m) + i;
        #[unroll]
        for j in 0..comptime!(t.unit_n) {
            let column = n0 + lane_n + comptime!(j * t.lanes_n());
            if row < p.m && column < p.n {
                let sum = f32::cast_from(sums[comptime!(i * t.unit_n + j)]);
                let value = activate(alpha * sum, t.epilogue.activation);
                store::<O>(out, first + row * out_row + column, value, t.epilogue.out);
            }
        }
    }
}

/// The first element of a matrix; `first` is the number of the operand's batch stride.
#[cube]
fn start(strides: &[u32], #[comptime] first: usize, b: usize, head: usize) -> usize {
    b * strides[first] as usize + head * strides[comptime!(first + 1)] as usize
}

/// Loads tile `step` of K of the left operand as `[k, m]`, 0 outside the matrix.
#[cube]
fn load_a<X: Numeric, A: Float>(
    a: &[X],
    x_tile: &mut Shared<[A]>,
    stage: usize,
    m0: usize,
    step: usize,
    p: &Place,
    #[comptime] c: Config,
) {
    let t = comptime!(c.tile);
    let k0 = step * comptime!(t.tile.k);
    let first = stage * comptime!(t.x_stage());
    for i in 0..comptime!(t.x_stage().div_ceil(t.tile.units)) {
        let e = i * comptime!(t.tile.units) + UNIT_POS as usize;
        if e < comptime!(t.x_stage()) {
            let row = m0 + e % comptime!(t.tile.m);
            let feature = k0 + e / comptime!(t.tile.m);
            let inside = row < p.m && feature < p.k;
            let at = select(inside, p.a + row * p.a_row + feature, 0usize);
            let value = load::<X>(a, at, t.input.x);
            x_tile[first + e] = A::cast_from(select(inside, value, f32::new(0.0)));
        }
    }
}

/// Loads tile `step` of K of the weights as `[k, n]`, decoded, 0 outside the matrix.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load_w<W: Numeric, S: Numeric, A: Float>(
    dense: &[W],
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    w_tile: &mut Shared<[A]>,
    stage: usize,
    n0: usize,
    step: usize,
    p: &Place,
    #[comptime] c: Config,
) {
    let t = comptime!(c.tile);
    let first = stage * comptime!(t.w_stage());
    match comptime!(c.weights) {
        Weights::Dense(storage) => {
            for i in 0..comptime!(t.w_stage().div_ceil(t.tile.units)) {
                let e = i * comptime!(t.tile.units) + UNIT_POS as usize;
                if e < comptime!(t.w_stage()) {
                    let column = n0 + e % comptime!(t.tile.n);
                    let feature = step * comptime!(t.tile.k) + e / comptime!(t.tile.n);
                    let inside = column < p.n && feature < p.k;
                    let at = select(inside, p.w + feature * p.w_feature + column * p.w_column, 0usize);
                    let value = load::<W>(dense, at, storage);
                    w_tile[first + e] = A::cast_from(select(inside, value, f32::new(0.0)));
                }
            }
        }
        Weights::Packed => {
            let codes = comptime!(t.decoder.unit());
            let units = comptime!(t.tile.k / t.decoder.unit() * t.tile.n);
            for i in 0..comptime!(units.div_ceil(t.tile.units)) {
                let e = i * comptime!(t.tile.units) + UNIT_POS as usize;
                if e < units {
                    let row = e / comptime!(t.tile.n);
                    let unit = step * comptime!(t.tile.k / t.decoder.unit()) + row;
                    let inside = n0 + e % comptime!(t.tile.n) < p.n && unit * codes < p.k;
                    let column = select(inside, n0 + e % comptime!(t.tile.n), 0usize);
                    let valid = select(inside, unit, 0usize);
                    let levels = decode_unit(words, table, p.w, valid, column, p.w_feature, t.decoder);
                    let at_group = valid / p.group as usize;
                    let scale_at = p.scales + at_group * p.scales_row + column;
                    let scale = group_scale::<S>(scales, table, scale_at, t.decoder);
                    let zero = group_zero::<S>(zeros, p.zeros + at_group * p.zeros_row + column, t.decoder);
                    let at = first + row * comptime!(t.decoder.unit() * t.tile.n) + e % comptime!(t.tile.n);
                    #[unroll]
                    for i in 0..codes {
                        // Codes beyond K mean nothing, and an infinite scale must not turn them into NaN.
                        let known = inside && valid * codes + i < p.k;
                        let w = weight_of(levels[i], scale, zero, t.decoder);
                        w_tile[at + comptime!(i * t.tile.n)] = A::cast_from(select(known, w, f32::new(0.0)));
                    }
                }
            }
        }
    }
}

/// The tile for this many rows.
fn choose(m: usize) -> Tile {
    let m = match m {
        0..=16 => 16,
        17..=32 => 32,
        _ => 64,
    };
    Tile { m, n: 64, k: 32, units: 128, stages: 1, accumulate: Accumulate::F32 }
}

/// The weights as arguments: what is dense, words, scales, zeros and table, and their strides.
struct Operands<R: Runtime> {
    weights: Weights,
    decoder: Decoder,
    dense: BufferArg<R>,
    words: BufferArg<R>,
    scales: BufferArg<R>,
    zeros: BufferArg<R>,
    table: BufferArg<R>,
    elements: [ElemType; 2],
    /// Units of a group.
    group: usize,
    /// Elements of the largest tensor.
    largest: usize,
    /// From [`stride::W`] to before [`stride::OUT`].
    strides: Vec<usize>,
}

/// Batch, head and row; a stride that is not used because there is one matrix, or one row, is 0.
fn used(strides: &BatchStrides, batch: usize, heads: usize, rows: usize) -> [usize; 3] {
    let keep = |stride, count| if count > 1 { stride } else { 0 };
    [keep(strides.batch, batch), keep(strides.head, heads), keep(strides.row, rows)]
}

fn arg<R: Runtime>(tensor: &Tensor<Gpu<R>>) -> BufferArg<R> {
    tensor.buffer().arg(tensor.elements())
}

impl<R: Runtime> Operands<R> {
    fn new(gpu: &Gpu<R>, weight: &BatchedWeight<'_, Gpu<R>>, shape: &BatchedShape, table: &Buffer) -> Self {
        let BatchedShape { batch, weight_heads: heads, n, k, .. } = *shape;
        let elem = |kind| ElemType::Float(kind);
        match weight {
            BatchedWeight::Dense { values, transposed } => {
                let storage = Storage::of(values.tensor.dtype());
                let [b, h, row] = used(&values.strides, batch, heads, if *transposed { n } else { k });
                let (feature, column) = if *transposed { (1, row) } else { (row, 1) };
                Self {
                    weights: Weights::Dense(storage),
                    decoder: Decoder::dense(DType::F32),
                    dense: arg(values.tensor),
                    words: gpu.unread(),
                    scales: gpu.unread(),
                    zeros: gpu.unread(),
                    table: gpu.unread(),
                    elements: [storage.elem(), elem(FloatKind::F32)],
                    group: 1,
                    largest: values.tensor.elements(),
                    strides: vec![b, h, feature, column, 0, 0, 0, 0, 0, 0],
                }
            }
            BatchedWeight::Quantized { scheme, codes, scales, zeros } => {
                let decoder = Decoder::quantized(*scheme);
                let groups = scheme.groups(k);
                let mut strides = used(&codes.strides, batch, heads, scheme.code_rows(k)).to_vec();
                strides.push(1);
                strides.extend(used(&scales.strides, batch, heads, groups));
                strides.extend(zeros.as_ref().map_or([0; 3], |zeros| used(&zeros.strides, batch, heads, groups)));
                Self {
                    weights: Weights::Packed,
                    decoder: decoder.ungrouped(),
                    dense: gpu.unread(),
                    words: arg(codes.tensor),
                    scales: arg(scales.tensor),
                    zeros: zeros.as_ref().map_or_else(|| gpu.unread(), |zeros| arg(zeros.tensor)),
                    table: table.arg(16),
                    elements: [elem(FloatKind::F32), decoder.scale_elem()],
                    group: scheme.group_size / decoder.unit(),
                    largest: codes.tensor.elements().max(scales.tensor.elements()),
                    strides,
                }
            }
        }
    }
}

/// Enqueues a batch of products; `tile` is chosen by the number of rows where none is given.
pub(super) fn launch<R: Runtime>(gpu: &Gpu<R>, tile: Option<Tile>, args: &GemmBatchedArgs<'_, Gpu<R>>) -> Result<()> {
    let shape = args.shape;
    let BatchedShape { batch, heads, m, n, k, .. } = shape;
    let tile = tile.unwrap_or_else(|| choose(m));
    let levels: Vec<f32> = match &args.weight {
        BatchedWeight::Quantized { scheme, .. } => (0..16).map(|code| scheme.format.value(code, 0.0)).collect(),
        BatchedWeight::Dense { .. } => vec![0.0; 16],
    };
    let table = gpu.create_f32(OP, &levels)?;
    let operands = Operands::new(gpu, &args.weight, &shape, &table);
    let (x, out) = (Storage::of(args.a.tensor.dtype()), Storage::of(args.out.dtype()));
    let epilogue = Epilogue { activation: args.activation, gated: false, in_place: false, residual: Storage::F32, out };
    let input = Input { x, gamma: None };
    let tile = TileConfig::checked(gpu, OP, tile, input, operands.decoder, Grouping::Divide, epilogue)?;
    let mut strides = used(&args.a.strides, batch, heads, m).to_vec();
    strides.extend(&operands.strides);
    strides.extend(used(&args.out_strides, batch, heads, m));
    debug_assert_eq!(strides.len(), stride::COUNT);
    // Matrices lie within their tensors, as checked: indices fit 32 bits where the numbers of elements do.
    let largest = [args.a.tensor.elements(), args.out.elements(), operands.largest].into_iter().max();
    if largest > Some(u32::MAX as usize) {
        return Err(limit(gpu, OP, format!("a tensor of {largest:?} elements, at most {},", u32::MAX)));
    }
    let strides: Vec<u32> = strides.into_iter().map(|stride| stride as u32).collect();
    let rows: Vec<u32> = (0..batch).map(|b| args.rows_of(b) as u32).collect();
    let (strides, rows) = (gpu.create_u32(OP, &strides)?, gpu.create_u32(OP, &rows)?);
    let shape_of = tile.tile;
    let count = grid(gpu, OP, [n.div_ceil(shape_of.n), m.div_ceil(shape_of.m), batch * heads])?;
    let [w, s] = operands.elements;
    // SAFETY: every matrix lies within its buffer, as checked; the kernel compares rows, columns and features with M, N
    // and K, strides hold 16 elements and rows one an entry.
    unsafe {
        batched::launch_unchecked::<R>(
            gpu.client(),
            count,
            CubeDim::new_1d(shape_of.units as u32),
            arg(args.a.tensor),
            operands.dense,
            operands.words,
            operands.scales,
            operands.zeros,
            operands.table,
            strides.arg(stride::COUNT),
            rows.arg(batch),
            arg(args.out),
            heads as u32,
            shape.weight_heads as u32,
            n as u32,
            k as u32,
            operands.group as u32,
            args.alpha,
            Config { tile, weights: operands.weights },
            [x.elem(), w, s, out.elem(), tile.elem()],
        );
    }
    Ok(())
}

impl<R: Runtime> Gpu<R> {
    /// [`marlin_ops::LinearOps::gemm_batched`] by a tile of the caller's choice.
    ///
    /// # Errors
    /// As the operation; an unsupported error that names the limit where the kernel cannot have this shape.
    pub fn gemm_batched_with(&self, tile: Tile, args: GemmBatchedArgs<'_, Self>) -> Result<()> {
        args.check()?;
        if args.shape.is_empty() {
            return Ok(());
        }
        launch(self, Some(tile), &args)
    }
}

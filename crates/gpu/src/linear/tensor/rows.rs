//! Few rows: each plane reads its own part of the weights once and straight into registers; the planes of a cube share K
//! and add their sums up in shared memory.

use cubecl::cmma::MmaDefinition;
use cubecl::ir::ElemType;
use cubecl::prelude::*;
use half::{bf16, f16};
use marlin_ops::Result;

use super::fragment::{Code, Operand, decode_word, double_zeros, pair_up, widen_scales};
use super::{Call, STEP, Target};
use crate::Gpu;
use crate::linear::epilogue::{Epilogue, finish};
use crate::linear::{grid, limit};

/// Input features that a plane takes at a time: four steps.
pub(super) const BLOCK: usize = 4 * STEP;

/// Vectors of 8 input features of a block.
const BLOCK_VECTORS: usize = BLOCK / 8;

/// Most rows.
pub(super) const MOST_ROWS: usize = 16;

/// Shape of the tensor-core kernel for at most 16 rows.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct TensorRows {
    /// Neighbouring columns that a unit reads at a time: 2 or 4. Eight units side by side make a tile.
    pub columns: usize,
    /// Tiles that a cube computes.
    pub tiles: usize,
    /// Planes of a cube, which take turns along K.
    pub planes: usize,
    /// The next block's weights are loaded before this one is multiplied.
    pub prefetch: bool,
    /// A single row of x lies in shared memory; without, units read x as they need it.
    pub staged: bool,
    /// Slices of K, added by a second kernel: 1 to 64.
    pub slices: usize,
}

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct RowsConfig {
    code: Code,
    operand: Operand,
    /// Blocks of 8 rows of x.
    row_blocks: usize,
    columns: usize,
    tiles: usize,
    planes: usize,
    /// Steps that share a scale within a block: 1, 2 or 4.
    group_steps: usize,
    prefetch: bool,
    /// Vectors of shared memory for a single row of x.
    staged: usize,
    epilogue: Epilogue,
}

impl RowsConfig {
    /// Columns of a cube.
    const fn width(self) -> usize {
        8 * self.columns * self.tiles
    }

    /// Words of a block that a lane holds, as vectors: [step, tile].
    const fn words(self) -> usize {
        4 * self.tiles
    }

    /// Vectors of x of a block that a lane holds: [step, row block].
    const fn inputs(self) -> usize {
        4 * self.row_blocks
    }

    /// Scale vectors of a block that a lane holds: [group, tile].
    const fn scales(self) -> usize {
        4 / self.group_steps * self.tiles
    }

    /// Products of two columns and 8 rows: [tile, row block, two columns].
    const fn products(self) -> usize {
        self.tiles * self.row_blocks * self.columns / 2
    }

    /// Pairs of sums that a lane holds: [product, column].
    const fn sums(self) -> usize {
        2 * self.products()
    }

    const fn shared_bytes(self) -> usize {
        (if self.staged > 0 { self.staged } else { 1 }) * 16 + self.planes * self.sums() * 32 * 8
    }
}

/// `words` `[K/8, N]`, `scales` and `zeros` `[G, N]` f16, x `[M, K]`, M at most 8 `row_blocks`; `out` as [`finish`] defines
/// it, one after the other for each slice of K. A cube of 32 by `planes` computes all rows of `width` columns of a slice.
/// Groups have `2^wide` blocks where they have one or more.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn multiply_rows<F: Float, W: Size, S: Size, H: Numeric, O: Numeric>(
    words: &[Vector<u32, W>],
    scales: &[Vector<u32, S>],
    zeros: &[Vector<u32, S>],
    x: &[Vector<u32, Const<4>>],
    bias: &[f32],
    residual: &[H],
    out: &mut [O],
    m: u32,
    k: u32,
    n: u32,
    slices: u32,
    wide: u32,
    magic: u32,
    flags: u32,
    out_scale: f32,
    #[comptime] c: RowsConfig,
    #[define(H, O)] _elements: [ElemType; 2],
) {
    let lane = UNIT_POS_X as usize;
    let plane = UNIT_POS_Y as usize;
    let all = k as usize / BLOCK;
    let slice = CUBE_POS_Y as usize;
    let first = slice * all / slices as usize;
    let blocks = (slice + 1) * all / slices as usize;
    let mut sums = Array::<Vector<f32, Const<2>>>::new(comptime!(c.sums()));
    #[unroll]
    for i in 0..comptime!(c.sums()) {
        sums[i] = Vector::<f32, Const<2>>::new(0.0);
    }
    let mut w = Array::<Vector<u32, W>>::new(comptime!(c.words()));
    let mut s = Array::<Vector<u32, S>>::new(comptime!(c.scales()));
    let mut z = Array::<Vector<u32, S>>::new(comptime!(c.scales()));
    let mut block = first + plane;
    if comptime!(c.prefetch) {
        // A plane without work loads what another needs.
        load_weights(words, scales, zeros, &mut w, &mut s, &mut z, select(block < blocks, block, first), n, wide, c);
    }
    let vectors = comptime!(if c.staged > 0 { c.staged } else { 1 });
    let mut staged = Shared::<[Vector<u32, Const<4>>]>::new_aligned_slice(vectors, 16usize);
    if comptime!(c.staged > 0) {
        let mut i = UNIT_POS as usize;
        while i < k as usize / 8 {
            staged[i] = pair_up(x[i]);
            i += comptime!(32 * c.planes);
        }
        sync_cube();
    }
    while block < blocks {
        let next = block + comptime!(c.planes);
        let mut xv = Array::<Vector<u32, Const<4>>>::new(comptime!(c.inputs()));
        if comptime!(!c.prefetch) {
            load_weights(words, scales, zeros, &mut w, &mut s, &mut z, block, n, wide, c);
        }
        load_inputs(x, &staged, &mut xv, block, m, k, c);
        if comptime!(c.prefetch) {
            let mut next_w = Array::<Vector<u32, W>>::new(comptime!(c.words()));
            let mut next_s = Array::<Vector<u32, S>>::new(comptime!(c.scales()));
            let mut next_z = Array::<Vector<u32, S>>::new(comptime!(c.scales()));
            // The last turn loads its own block again, so that every register is defined.
            let from = select(next < blocks, next, block);
            load_weights(words, scales, zeros, &mut next_w, &mut next_s, &mut next_z, from, n, wide, c);
            multiply_block::<F, W, S>(&w, &xv, &s, &z, &mut sums, magic, c);
            #[unroll]
            for i in 0..comptime!(c.words()) {
                w[i] = next_w[i];
            }
            #[unroll]
            for i in 0..comptime!(c.scales()) {
                s[i] = next_s[i];
                z[i] = next_z[i];
            }
        } else {
            let magic = after_loads::<W, S>(magic, &w, &s, c);
            multiply_block::<F, W, S>(&w, &xv, &s, &z, &mut sums, magic, c);
        }
        block = next;
    }
    let mut shared = Shared::<[Vector<f32, Const<2>>]>::new_slice(comptime!(c.planes * c.sums() * 32));
    #[unroll]
    for i in 0..comptime!(c.sums()) {
        shared[(plane * comptime!(c.sums()) + i) * 32 + lane] = sums[i];
    }
    sync_cube();
    write_rows::<H, O>(&shared, bias, residual, out, m, n, flags, out_scale, c);
}

/// Loads a lane's words and scales of a block.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load_weights<W: Size, S: Size>(
    words: &[Vector<u32, W>],
    scales: &[Vector<u32, S>],
    zeros: &[Vector<u32, S>],
    w: &mut Array<Vector<u32, W>>,
    s: &mut Array<Vector<u32, S>>,
    z: &mut Array<Vector<u32, S>>,
    block: usize,
    n: u32,
    wide: u32,
    #[comptime] c: RowsConfig,
) {
    let (g, t) = (UNIT_POS_X as usize / 4, UNIT_POS_X as usize % 4);
    let stride = n as usize / comptime!(c.columns);
    let column = CUBE_POS_X as usize * comptime!(8 * c.tiles) + g;
    let first = (block * BLOCK_VECTORS + t) * stride + column;
    #[unroll]
    for step in 0..4usize {
        #[unroll]
        for i in 0..comptime!(c.tiles) {
            w[comptime!(step * c.tiles + i)] = words[first + comptime!(4 * step) * stride + comptime!(8 * i)];
        }
    }
    #[unroll]
    for q in 0..comptime!(4 / c.group_steps) {
        let mut group = block * comptime!(4 / c.group_steps) + q;
        if comptime!(c.group_steps == 4) {
            group = block >> wide as usize;
        }
        #[unroll]
        for i in 0..comptime!(c.tiles) {
            let at = group * stride + column + comptime!(8 * i);
            s[comptime!(q * c.tiles + i)] = scales[at];
            if comptime!(c.code == Code::Int4Zero) {
                z[comptime!(q * c.tiles + i)] = zeros[at];
            } else {
                z[comptime!(q * c.tiles + i)] = Vector::<u32, S>::new(0u32);
            }
        }
    }
}

/// `magic`, but known only after a block's words and scales: otherwise the compiler sinks the loads of E2M1 weights to where
/// each is decoded, and they wait for one another.
#[cube]
fn after_loads<W: Size, S: Size>(
    magic: u32,
    w: &Array<Vector<u32, W>>,
    s: &Array<Vector<u32, S>>,
    #[comptime] c: RowsConfig,
) -> u32 {
    let mut after = magic;
    // With more rows, registers would spill.
    if comptime!(c.code == Code::Fp4 && c.row_blocks == 1) {
        let mut any = w[0].extract(0usize);
        #[unroll]
        for i in 1..comptime!(c.words()) {
            any |= w[i].extract(0usize);
        }
        #[unroll]
        for i in 0..comptime!(c.scales()) {
            any |= s[i].extract(0usize);
        }
        // Nothing is added: the last bit of `magic` is 0.
        after = magic | (any & (magic << 31u32));
    }
    after
}

/// Loads a lane's x of a block: eight features of one row for each step and row block.
#[cube]
fn load_inputs(
    x: &[Vector<u32, Const<4>>],
    staged: &Shared<[Vector<u32, Const<4>>]>,
    xv: &mut Array<Vector<u32, Const<4>>>,
    block: usize,
    m: u32,
    k: u32,
    #[comptime] c: RowsConfig,
) {
    let (g, t) = (UNIT_POS_X as usize / 4, UNIT_POS_X as usize % 4);
    let first = block * BLOCK_VECTORS + t;
    if comptime!(c.staged > 0) {
        #[unroll]
        for step in 0..4usize {
            xv[step] = staged[first + comptime!(4 * step)];
        }
    } else {
        #[unroll]
        for b in 0..comptime!(c.row_blocks) {
            // Rows beyond the last are computed from the last and not written.
            let wanted = g + comptime!(8 * b);
            let last = m as usize - 1;
            let row = select(wanted < last, wanted, last) * (k as usize / 8);
            #[unroll]
            for step in 0..4usize {
                xv[comptime!(step * c.row_blocks + b)] = x[row + first + comptime!(4 * step)];
            }
        }
    }
}

/// Adds the products of a block to the sums, each group's scaled in f32.
#[cube]
fn multiply_block<F: Float, W: Size, S: Size>(
    w: &Array<Vector<u32, W>>,
    xv: &Array<Vector<u32, Const<4>>>,
    s: &Array<Vector<u32, S>>,
    z: &Array<Vector<u32, S>>,
    sums: &mut Array<Vector<f32, Const<2>>>,
    magic: u32,
    #[comptime] c: RowsConfig,
) {
    let mma = MmaDefinition::<F, F, f32>::new(16usize, 8usize, 16usize);
    let halves = comptime!(c.columns / 2);
    #[unroll]
    for q in 0..comptime!(4 / c.group_steps) {
        let mut products = Sequence::<Array<Vector<f32, Const<2>>>>::new();
        #[unroll]
        for _i in 0..comptime!(c.products()) {
            let mut zero = Array::<Vector<f32, Const<2>>>::new(2usize);
            zero[0] = Vector::<f32, Const<2>>::new(0.0);
            zero[1] = Vector::<f32, Const<2>>::new(0.0);
            products.push(zero);
        }
        #[unroll]
        for step in 0..comptime!(c.group_steps) {
            let at = comptime!(q * c.group_steps + step);
            let inputs = operands::<F>(xv, at, c);
            #[unroll]
            for i in 0..comptime!(c.tiles) {
                let word = w[comptime!(at * c.tiles + i)];
                let zero = double_zeros::<S>(z[comptime!(q * c.tiles + i)], c.columns);
                #[unroll]
                for h in 0..halves {
                    let (l, r) = comptime!((2 * h, 2 * h + 1));
                    let low = decode_word::<F>(word.extract(l), zero[l], magic, c.code, c.operand);
                    let high = decode_word::<F>(word.extract(r), zero[r], magic, c.code, c.operand);
                    #[unroll]
                    for u in 0..2usize {
                        let mut weights = Array::<Vector<F, Const<2>>>::new(4usize);
                        weights[0] = low[comptime!(2 * u)];
                        weights[1] = high[comptime!(2 * u)];
                        weights[2] = low[comptime!(2 * u + 1)];
                        weights[3] = high[comptime!(2 * u + 1)];
                        #[unroll]
                        for b in 0..comptime!(c.row_blocks) {
                            let product = products.index_mut(comptime!((i * c.row_blocks + b) * halves + h));
                            mma.execute_inplace(&weights, inputs.index(comptime!(b * 2 + u)), product);
                        }
                    }
                }
            }
        }
        #[unroll]
        for i in 0..comptime!(c.tiles) {
            let scale = widen_scales::<S>(s[comptime!(q * c.tiles + i)], c.columns);
            #[unroll]
            for b in 0..comptime!(c.row_blocks) {
                #[unroll]
                for j in 0..comptime!(c.columns) {
                    let product = products.index(comptime!((i * c.row_blocks + b) * halves + j / 2));
                    let at = comptime!((i * c.row_blocks + b) * c.columns + j);
                    sums[at] = fma(product[comptime!(j % 2)], Vector::<f32, Const<2>>::new(scale[j]), sums[at]);
                }
            }
        }
    }
}

/// The operands of a step made of x: [row block, half of the step].
#[cube]
fn operands<F: Float>(
    xv: &Array<Vector<u32, Const<4>>>,
    #[comptime] step: usize,
    #[comptime] c: RowsConfig,
) -> Sequence<Array<Vector<F, Const<2>>>> {
    let mut inputs = Sequence::<Array<Vector<F, Const<2>>>>::new();
    #[unroll]
    for b in 0..comptime!(c.row_blocks) {
        let mut pairs = xv[comptime!(step * c.row_blocks + b)];
        if comptime!(c.staged == 0) {
            pairs = pair_up(pairs);
        }
        #[unroll]
        for u in 0..2usize {
            let mut input = Array::<Vector<F, Const<2>>>::new(2usize);
            input[0] = Vector::<F, Const<2>>::reinterpret(pairs.extract(comptime!(2 * u)));
            input[1] = Vector::<F, Const<2>>::reinterpret(pairs.extract(comptime!(2 * u + 1)));
            inputs.push(input);
        }
    }
    inputs
}

/// Adds the planes' sums up in order and writes the cube's columns.
#[cube]
#[allow(clippy::too_many_arguments)]
fn write_rows<H: Numeric, O: Numeric>(
    shared: &Shared<[Vector<f32, Const<2>>]>,
    bias: &[f32],
    residual: &[H],
    out: &mut [O],
    m: u32,
    n: u32,
    flags: u32,
    out_scale: f32,
    #[comptime] c: RowsConfig,
) {
    let mut slot = UNIT_POS as usize;
    let first_row = CUBE_POS_Y as usize * m as usize;
    while slot < (m as usize).div_ceil(2) * comptime!(c.width()) {
        let (pair, column) = (slot / comptime!(c.width()), slot % comptime!(c.width()));
        let (i, j) = (column / comptime!(8 * c.columns), column % comptime!(c.columns));
        let g = column / comptime!(c.columns) % 8;
        let at = ((i * comptime!(c.row_blocks) + pair / 4) * comptime!(c.columns) + j) * 32 + g * 4 + pair % 4;
        let mut sum = Vector::<f32, Const<2>>::new(0.0);
        #[unroll]
        for plane in 0..comptime!(c.planes) {
            sum += shared[at + comptime!(plane * c.sums() * 32)];
        }
        let n0 = CUBE_POS_X as usize * comptime!(c.width()) + column;
        #[unroll]
        for e in 0..2usize {
            let row = pair * 2 + e;
            if row < m as usize {
                let sum = sum.extract(e) * comptime!(c.operand.factor(c.code));
                let index = (first_row + row) * n as usize + n0;
                finish::<H, O>(sum, sum, bias, bias, residual, out, index, n0, flags, out_scale, c.epilogue);
            }
        }
        slot += comptime!(32 * c.planes);
    }
}

/// Whether a shape can be launched for a call, compiled how.
fn configure<R: Runtime>(gpu: &Gpu<R>, shape: TensorRows, call: &Call, target: &Target<'_, R>) -> Result<RowsConfig> {
    let refuse = |what: String| Err(limit(gpu, target.product.operation, what));
    let [m, n, k] = target.product.shape();
    let TensorRows { columns, tiles, planes, prefetch, staged, .. } = shape;
    if call.parts != 1 {
        return refuse("f32 activations by the kernel of few rows on tensor cores".into());
    }
    if m > MOST_ROWS || !matches!(columns, 2 | 4) || tiles == 0 || !n.is_multiple_of(8 * columns * tiles) {
        return refuse(format!("{m} x {n} outputs in {tiles} tiles of 8 x {columns} columns and {MOST_ROWS} rows"));
    }
    let config = RowsConfig {
        code: call.code,
        operand: call.operand,
        row_blocks: m.div_ceil(8),
        columns,
        tiles,
        planes,
        group_steps: 1 << call.group_shift.min(2),
        prefetch,
        staged: if staged && m == 1 { (k / 8).next_power_of_two() } else { 0 },
        epilogue: target.epilogue,
    };
    let hardware = &gpu.properties().hardware;
    let (shared, most) = (config.shared_bytes() + super::SHARED_BESIDE, hardware.max_shared_memory_size);
    if shared > most {
        return refuse(format!("{shared} bytes of shared memory where there are {most}"));
    }
    if planes == 0 || 32 * planes > hardware.max_units_per_cube as usize {
        return refuse(format!("{planes} planes of 32 where {} units are allowed", hardware.max_units_per_cube));
    }
    Ok(config)
}

/// Launches the kernel.
pub(super) fn launch<R: Runtime>(gpu: &Gpu<R>, shape: TensorRows, call: &Call, target: &Target<'_, R>) -> Result<()> {
    let config = configure(gpu, shape, call, target)?;
    let product = target.product;
    let [m, n, k] = product.shape();
    let count = grid(gpu, product.operation, [n / config.width(), shape.slices, 1])?;
    let launch = match call.operand {
        Operand::F16 => multiply_rows::launch_unchecked::<f16, R>,
        Operand::BF16 => multiply_rows::launch_unchecked::<bf16, R>,
    };
    // SAFETY: N is a multiple of the cube's columns and K of a block, so vectors lie within the operands, whose sizes were
    // checked; rows are compared with M.
    unsafe {
        launch(
            gpu.client(),
            count,
            CubeDim::new_2d(32, config.planes as u32),
            config.columns,
            config.columns / 2,
            product.weight.words_arg(config.columns),
            product.weight.scales_arg(config.columns),
            product.weight.zeros_arg(config.columns),
            target.x.arg(product.x.elements() / 8),
            product.weight.bias_arg(gpu),
            product.residual_arg(gpu),
            target.out.buffer().arg(target.out.elements()),
            m as u32,
            k as u32,
            n as u32,
            shape.slices as u32,
            call.group_shift.saturating_sub(2),
            call.operand.magic(call.code),
            target.flags,
            target.out_scale,
            config,
            [target.epilogue.residual.elem(), target.epilogue.out.elem()],
        );
    }
    Ok(())
}

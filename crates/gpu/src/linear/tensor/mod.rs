//! Products of 16-bit or f32 activations and 4-bit weights on tensor cores whose fragments are known (`m16n8k16` of planes of 32),
//! with f32 sums and the weights as they are stored. Codes enter the products exactly (their differences with zero points
//! are rounded once) and groups are scaled in f32.

pub(super) mod experts;
mod fragment;
mod rows;
pub(super) mod split;
pub(super) mod stage;
#[cfg(all(test, feature = "cuda"))]
mod tests;
mod tile;

use cubecl::ir::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_formats::pack::Layout;
use marlin_ops::linear::Activation;
use marlin_ops::{Result, Tensor};

use super::epilogue::Epilogue;
use super::exl3::rotate::has_planes;
use super::operands::{Prepared, Product};
use super::{LinearKernel, limit, split_k};
use crate::decode::{Codes, Decoder, Levels, Scale};
use crate::element::Storage;
use crate::{Buffer, Gpu};
pub(crate) use experts::{ExpertProduct, ExpertRows, MOST_TILE_ROWS, shape as expert_shape};
use fragment::{Code, Operand};
pub use rows::TensorRows;
use rows::{BLOCK, MOST_ROWS};
pub use tile::TensorTile;

/// Input features of a step: four words of a column.
const STEP: usize = 32;

/// Rows of f32 that other kernels multiply as fast.
const FEW_F32_ROWS: usize = 4;

/// Shared memory that the compiler may take beside what a kernel asks for.
pub(crate) const SHARED_BESIDE: usize = 4096;

/// What the devices of compute capability 7.5, 8.6 to 12.0, 8.0 and 9.0 have.
#[cfg(test)]
pub(crate) const SHARED: [usize; 4] = [64 << 10, 99 << 10, 163 << 10, 227 << 10];

/// A kernel of this module.
#[derive(Clone, Copy)]
pub(super) enum Shape {
    Rows(TensorRows),
    Tile(TensorTile),
}

/// What the kernels must know of a product.
#[derive(Clone, Copy)]
struct Call {
    code: Code,
    operand: Operand,
    /// Parts whose sum x is.
    parts: usize,
    /// Binary logarithm of the steps of a group; 31 if there is one group.
    group_shift: u32,
}

/// Where a kernel writes, and how: the product's output, or the partial sums of slices of K.
struct Target<'a, R: Runtime> {
    product: &'a Product<'a, R>,
    /// Where its weight is that of many experts.
    experts: Option<&'a ExpertRows<'a, R>>,
    /// `[parts, M, K]`.
    x: &'a Buffer,
    out: &'a Tensor<Gpu<R>>,
    epilogue: Epilogue,
    flags: u32,
    out_scale: f32,
}

impl Call {
    /// What stands against the kernels, if something does.
    fn new<R: Runtime>(gpu: &Gpu<R>, product: &Product<'_, R>) -> std::result::Result<Self, &'static str> {
        if product.norm.is_some() && product.x.dtype() != DType::F32 {
            return Err("an input norm of 16-bit activations on tensor cores");
        }
        if product.up.is_some() {
            return Err("a gated product on tensor cores");
        }
        let [_, n, k] = product.shape();
        Self::of(gpu, product.x.dtype(), product.weight.decoder, [n, k], product.out.dtype())
    }

    /// The same of a product without a norm or a second weight.
    fn of<R: Runtime>(
        gpu: &Gpu<R>,
        x: DType,
        decoder: Decoder,
        [n, k]: [usize; 2],
        out: DType,
    ) -> std::result::Result<Self, &'static str> {
        let (operand, parts) = match x {
            DType::F16 => (Operand::F16, 1),
            DType::BF16 => (Operand::BF16, 1),
            _ => (Operand::BF16, split::PARTS),
        };
        if !has_fragments(gpu, operand.elem()) {
            return Err("m16n8k16 products of planes of 32 units");
        }
        let code = code_of(decoder).ok_or("weights on tensor cores but int4 and E2M1 with f16 scales")?;
        if code == Code::Int4Zero && (x == DType::F32 || out == DType::F32) {
            return Err("zero points of f32 activations or results on tensor cores, which round them");
        }
        if k == 0 || !k.is_multiple_of(BLOCK) || !n.is_multiple_of(32) {
            return Err("N that is no multiple of 32 or K that is none of 128 on tensor cores");
        }
        let group_size = decoder.group_size;
        let group_shift = match group_size / STEP {
            _ if group_size >= k => 31,
            steps if group_size.is_multiple_of(STEP) && steps.is_power_of_two() => steps.ilog2(),
            _ => return Err("groups of other sizes than 32, 64, 128 ... on tensor cores"),
        };
        Ok(Self { code, operand, parts, group_shift })
    }
}

/// Whether the device multiplies fragments of such operands, to sums of f32.
pub(crate) fn has_fragments<R: Runtime>(gpu: &Gpu<R>, operand: ElemType) -> bool {
    let (ab, cd) = (operand.into(), ElemType::Float(FloatKind::F32).into());
    let config = MmaConfig { a_type: ab, b_type: ab, cd_type: cd, m: 16, n: 8, k: 16 };
    has_planes(gpu) && gpu.properties().features.matmul.mma.contains(&config)
}

/// The code of a weight that the kernels read.
fn code_of(decoder: Decoder) -> Option<Code> {
    if decoder.codes != Codes::Packed(Layout::Bits4) || decoder.scale != Scale::F16 {
        return None;
    }
    match (decoder.levels, decoder.zeros) {
        (Levels::Minus { half: 16 }, false) => Some(Code::Int4),
        (Levels::Minus { half: 0 }, true) => Some(Code::Int4Zero),
        (Levels::Fp4, false) => Some(Code::Fp4),
        _ => None,
    }
}

/// Launches a kernel, and the one that adds slices of K.
pub(super) fn launch<R: Runtime>(
    gpu: &Gpu<R>,
    shape: Shape,
    product: &Product<'_, R>,
    prepared: &mut Prepared<R>,
) -> Result<()> {
    let operation = product.operation;
    let call = Call::new(gpu, product).map_err(|what| limit(gpu, operation, what.into()))?;
    let slices = match shape {
        Shape::Rows(rows) => rows.slices,
        Shape::Tile(tile) => tile.slices,
    };
    let x = rows_of_parts(gpu, &call, product, prepared)?;
    let run = |target: Target<'_, R>| match shape {
        Shape::Rows(rows) => rows::launch(gpu, rows, &call, &target),
        Shape::Tile(tile) => tile::launch(gpu, tile, &call, &target),
    };
    match slices {
        1 => {
            let (epilogue, flags, out_scale) = (product.epilogue(), product.flags(), product.out_scale);
            run(Target { product, experts: None, x: &x, out: product.out, epilogue, flags, out_scale })
        }
        2..=64 => {
            let [m, n, _] = product.shape();
            let partials = gpu.scratch(operation, DType::F32, &[slices, 1, m, n])?;
            let (activation, residual) = (Activation::None, product.epilogue().residual);
            let epilogue = Epilogue { activation, gated: false, in_place: false, residual, out: Storage::F32 };
            run(Target { product, experts: None, x: &x, out: &partials, epilogue, flags: 0, out_scale: 1.0 })?;
            split_k::add_slices(gpu, product, &partials, slices);
            Ok(())
        }
        _ => Err(limit(gpu, operation, format!("{slices} slices of K (1 to 64)"))),
    }
}

/// x as the kernels take it.
fn rows_of_parts<R: Runtime>(
    gpu: &Gpu<R>,
    call: &Call,
    product: &Product<'_, R>,
    prepared: &mut Prepared<R>,
) -> Result<Buffer> {
    match call.parts {
        1 => Ok(product.x.buffer().clone()),
        _ => prepared.parts(gpu, product),
    }
}

/// The kernel for a product that suits, by what was measured on an H200.
pub(super) fn select<R: Runtime>(gpu: &Gpu<R>, product: &Product<'_, R>) -> Option<LinearKernel> {
    let call = Call::new(gpu, product).ok()?;
    let [m, n, k] = product.shape();
    let cores = gpu.properties().hardware.num_streaming_multiprocessors.map_or(128, |cores| cores as usize);
    match (call.parts, m) {
        (1, 0..=MOST_ROWS) => Some(LinearKernel::TensorRows(few_rows(cores, m, n, k))),
        (split::PARTS, 0..=FEW_F32_ROWS) => None,
        (parts, _) => tile(gpu, cores, parts, [m, n, k]).map(LinearKernel::TensorTile),
    }
}

/// Whether [`select`] has a kernel for many rows, which takes results of this type too.
pub(super) fn takes_many_rows<R: Runtime>(gpu: &Gpu<R>, product: &Product<'_, R>, out: DType) -> bool {
    let [_, n, k] = product.shape();
    Call::of(gpu, product.x.dtype(), product.weight.decoder, [n, k], out).is_ok()
        && matches!(select(gpu, product), Some(LinearKernel::TensorTile(_)))
}

/// 32 planes a core in all, and two tiles where rows of x are read as often as weights.
fn few_rows(cores: usize, m: usize, n: usize, k: usize) -> TensorRows {
    let wide = m > 8 && n.is_multiple_of(64) && n / 64 >= cores;
    let blocks = k / BLOCK;
    let wanted = (32 * cores / (n / 32)).max(1);
    let planes = if m > 8 {
        // So that all planes have as many turns.
        let even = |planes: &usize| blocks.is_multiple_of(*planes);
        (8..=wanted.clamp(8, 28)).rev().find(even).unwrap_or(8)
    } else {
        let least = if m <= 1 && k < 8192 { 4 } else { 8 };
        1 << wanted.clamp(least, 32).ilog2()
    };
    let (tiles, planes) = if wide { (2, 8) } else { (1, planes) };
    let planes = planes.min(blocks.next_power_of_two());
    // A longer row would take shared memory from other cubes.
    TensorRows { columns: 4, tiles, planes, prefetch: false, staged: m == 1 && k <= 16_384, slices: 1 }
}

/// Tall tiles while they, or slices of K, fill the device, otherwise lower ones.
fn tile<R: Runtime>(gpu: &Gpu<R>, cores: usize, parts: usize, [m, n, k]: [usize; 3]) -> Option<TensorTile> {
    let tile = tile_of(gpu.properties().hardware.max_shared_memory_size, parts, m, n)?;
    let cubes = m.div_ceil(tile.rows()) * n / tile.columns();
    Some(TensorTile { slices: slices(cores, cubes, k), ..tile })
}

/// A tile for so many rows, of at most 128, if the device has the shared memory.
fn tile_of(shared_bytes: usize, parts: usize, rows: usize, n: usize) -> Option<TensorTile> {
    let fits = |planes: &usize| n.is_multiple_of(32 * planes);
    let planes_n = [8, 4, 2, 1].into_iter().find(fits).unwrap_or(1);
    let tile = |steps| {
        if rows <= 64 {
            let (row_blocks, planes_n) = (if rows <= 32 { 4 } else { 8 }, planes_n.min(4));
            TensorTile { row_blocks, planes_m: 1, planes_n, planes_k: 2, steps, rescale: false, slices: 1 }
        } else {
            TensorTile { row_blocks: 16, planes_m: 1, planes_n, planes_k: 1, steps, rescale: true, slices: 1 }
        }
    };
    let most = 4 / parts;
    [4, 2, 1]
        .into_iter()
        .filter(|&steps| steps <= most)
        .map(tile)
        .find(|tile| tile.shared_bytes(parts) + SHARED_BESIDE <= shared_bytes)
}

/// Slices of K that give every core a cube, of at least 8 stages of 128 features each.
fn slices(cores: usize, cubes: usize, k: usize) -> usize {
    (cores / cubes.max(1)).clamp(1, (k / (8 * BLOCK)).clamp(1, 8))
}

#[cfg(test)]
mod choice {
    use super::{SHARED, SHARED_BESIDE, tile_of};

    #[test]
    fn tiles_fit_their_device() {
        for rows in [1, 32, 33, 64, 65, 500] {
            for parts in [1, 2] {
                for n in [32, 64, 128, 256, 14_336] {
                    for shared in SHARED {
                        let tile = tile_of(shared, parts, rows, n);
                        let what = format!("{rows} rows in {parts} parts, N={n}, {shared} bytes: {tile:?}");
                        // Everything but 64 KiB has room for every tile.
                        assert!(tile.is_some() || shared == SHARED[0], "{what}");
                        let used = tile.map_or(0, |tile| tile.shared_bytes(parts) + SHARED_BESIDE);
                        assert!(used <= shared, "{what}: {used}");
                    }
                }
            }
        }
        // The most recent ones have room for what was measured.
        let [f16, f32] = [1, 2].map(|parts| tile_of(SHARED[3], parts, 64, 4096).map(|tile| tile.steps));
        assert_eq!((f16, f32), (Some(4), Some(2)));
        assert!(tile_of(1 << 10, 1, 1, 32).is_none());
    }
}

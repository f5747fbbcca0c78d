//! The launches of the GPU backend.

use marlin_formats::DType;
use marlin_gpu::{Accumulate, ExpertStrategy, Gemv, Gpu, Runtime, Tile};
use marlin_ops::attention::{AttentionArgs, PagedAttentionArgs};
use marlin_ops::linear::{GatedUpArgs, LinearArgs};
use marlin_ops::moe::ExpertMlpArgs;
use marlin_ops::{Result, Tensor};

use super::variants::{AttentionKernel, ExpertKernel, LinearKernel, MatrixTile, Variants};

/// A GPU with every kernel that can be chosen by hand.
#[derive(Clone, Copy, Debug, Default)]
pub struct GpuVariants;

/// Shared memory that every device has. Tiles hold f32, so that shapes of the collection, whose tiles are f16, may need
/// fewer stages or inputs to fit.
const SHARED_BYTES: usize = 32 * 1024;

/// The tile for this many products at once.
fn tile(tile: MatrixTile, products: usize) -> Tile {
    let MatrixTile { m, n, k, units, mut stages, accumulate } = tile;
    let (accumulate, size) = if accumulate == DType::F16 { (Accumulate::F16, 2) } else { (Accumulate::F32, 4) };
    while stages > 1 && stages * (m + products * n) * k * size > SHARED_BYTES {
        stages -= 1;
    }
    Tile { m, n, k, units, stages, accumulate }
}

/// Experts by tiles of rows, with as many inputs as fit beside the rows, both weights and the rows' sources.
fn grouped(m: usize, n: usize, mut k: usize) -> marlin_gpu::ExpertKernel {
    while 4 * (m * (k + 1) + 2 * k * n + m) > SHARED_BYTES {
        k /= 2;
    }
    marlin_gpu::ExpertKernel { strategy: ExpertStrategy::Grouped, tile_m: m, tile_n: n, tile_k: k }
}

/// The backend's kernel for this many products at once.
fn linear(kernel: LinearKernel, products: usize) -> marlin_gpu::LinearKernel {
    match kernel {
        LinearKernel::Gemv { rows, columns, lanes } => {
            marlin_gpu::LinearKernel::Gemv(Gemv { rows, columns, lanes_n: lanes, lanes_k: 1 })
        }
        LinearKernel::Matrix(shape) => marlin_gpu::LinearKernel::Matrix(tile(shape, products)),
        LinearKernel::SplitK { tile: shape, slices } => {
            marlin_gpu::LinearKernel::SplitK { tile: tile(shape, products), splits: slices }
        }
        LinearKernel::StreamK { tile: shape, workers } => {
            marlin_gpu::LinearKernel::StreamK { tile: tile(shape, products), workers }
        }
    }
}

/// Units of an attention workgroup; each has a part of the scores of at most four queries.
const ATTENTION_UNITS: usize = 128;

/// The backend's kernel: tiles are powers of two with work for every unit.
fn attention(kernel: AttentionKernel) -> marlin_gpu::AttentionKernel {
    let q_tile = kernel.q_tile.next_power_of_two();
    let least = ATTENTION_UNITS * q_tile.min(4) / q_tile;
    let kv_tile = kernel.kv_tile.next_power_of_two().max(least);
    let chunk = if kv_tile > 64 || q_tile > 16 { 32 } else { 64 };
    marlin_gpu::AttentionKernel { q_tile, kv_tile, chunk, splits: kernel.splits }
}

impl<R: Runtime> Variants<Gpu<R>> for GpuVariants {
    const GPU: bool = true;

    fn linear(&self, gpu: &Gpu<R>, kernel: LinearKernel, args: LinearArgs<'_, Gpu<R>>) -> Result<()> {
        gpu.linear_with(linear(kernel, 1), args)
    }

    fn gated_up(&self, gpu: &Gpu<R>, kernel: LinearKernel, args: GatedUpArgs<'_, Gpu<R>>) -> Result<()> {
        gpu.gated_up_with(linear(kernel, 2), args)
    }

    fn attention(&self, gpu: &Gpu<R>, kernel: AttentionKernel, args: AttentionArgs<'_, Gpu<R>>) -> Result<()> {
        gpu.attention_with(args, attention(kernel))
    }

    fn paged_attention(
        &self,
        gpu: &Gpu<R>,
        kernel: AttentionKernel,
        args: PagedAttentionArgs<'_, Gpu<R>>,
    ) -> Result<()> {
        gpu.paged_attention_with(args, attention(kernel))
    }

    fn expert_mlp(&self, gpu: &Gpu<R>, kernel: ExpertKernel, args: ExpertMlpArgs<'_, Gpu<R>>) -> Result<()> {
        let kernel = match kernel {
            ExpertKernel::Parallel => marlin_gpu::ExpertKernel::PARALLEL,
            ExpertKernel::Fused => marlin_gpu::ExpertKernel::FUSED,
            ExpertKernel::Grouped { m, n, k } => grouped(m, n, k),
        };
        gpu.moe_expert_mlp_with(args, &kernel)
    }

    fn convert_toward_zero(&self, gpu: &Gpu<R>, x: &Tensor<Gpu<R>>, out: &mut Tensor<Gpu<R>>) -> Result<()> {
        gpu.convert_toward_zero(x, out)
    }

    fn softmax(&self, gpu: &Gpu<R>, x: &Tensor<Gpu<R>>, out: &mut Tensor<Gpu<R>>) -> Result<()> {
        gpu.softmax(x, out)
    }
}

//! Products of rotated rows with tiles on tensor cores whose fragments are known (`m16n8k16` of planes of 32), with f32 sums.
//! Rows are f16, or sums of two f16 ([`parts`]). One or two rows may be whole numbers of three [`bytes`], with i32 sums. Only
//! sums of two keep the precision of f32: they are for devices in the exact mode.

pub(super) mod assigned;
mod bytes;
pub(super) mod experts;
mod fragment;
mod parts;
pub(super) mod rows;
pub(super) mod tile;

use cubecl::ir::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind, IntKind, UIntKind};
use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::{Result, Tensor};

use crate::decode::Trellis;
use crate::linear::exl3::rotate::{self, Channels};
use crate::linear::limit;
use crate::linear::operands::Product;
use crate::{Buffer, Gpu};
use parts::Parts;

/// Launches the product with a trellis, rotations and all; `factors` are the row factors of its norm.
pub(super) fn launch<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    trellis: Trellis,
    factors: Option<&Buffer>,
) -> Result<()> {
    match product.x.rows() {
        0..=rows::MOST_ROWS => rows::launch(gpu, product, trellis, factors),
        _ => tile::launch(gpu, product, trellis, factors),
    }
}

/// x, rotated as operands `[parts, M, K padded]` f16, and what the products of its rows are multiplied with.
type Operands<R> = (Tensor<Gpu<R>>, Option<Buffer>);

/// Enqueues the rotation of x.
fn operands<R: Runtime>(
    gpu: &Gpu<R>,
    product: &Product<'_, R>,
    factors: Option<&Buffer>,
    channels: Channels,
) -> Result<Operands<R>> {
    let dims = [product.x.rows(), product.weight.padded_in()];
    let parts = Parts::of(gpu, product.x.dtype());
    if !parts.scaled() {
        let rotated = gpu.scratch(product.operation, DType::F16, &dims)?;
        rotate::input(gpu, product, factors, channels, &rotated);
        return Ok((rotated, None));
    }
    let rotated = gpu.scratch(product.operation, DType::F32, &dims)?;
    rotate::input(gpu, product, factors, Channels::Neighbours, &rotated);
    let (operands, inverses) = parts::split(gpu, product.operation, &rotated, parts, channels)?;
    Ok((operands, Some(inverses)))
}

/// Whether the device multiplies such fragments.
pub(crate) fn available<R: Runtime>(gpu: &Gpu<R>) -> bool {
    let config = |a: ElemType, b: ElemType, cd: ElemType, k: u32| MmaConfig {
        a_type: a.into(),
        b_type: b.into(),
        cd_type: cd.into(),
        m: 16,
        n: 8,
        k,
    };
    let half = ElemType::Float(FloatKind::F16);
    let (byte, signed) = (ElemType::UInt(UIntKind::U8), ElemType::Int(IntKind::I8));
    let sum = ElemType::Int(IntKind::I32);
    let configs = [
        config(half, half, ElemType::Float(FloatKind::F32), 16),
        config(byte, byte, sum, 32),
        config(byte, signed, sum, 32),
    ];
    let known = &gpu.properties().features.matmul.mma;
    rotate::has_planes(gpu) && configs.iter().all(|config| known.contains(config))
}

/// Checks that the device has so much shared memory.
fn check_shared<R: Runtime>(gpu: &Gpu<R>, operation: &'static str, bytes: usize) -> Result<()> {
    match gpu.properties().hardware.max_shared_memory_size {
        most if bytes > most => {
            Err(limit(gpu, operation, format!("{bytes} bytes of shared memory where there are {most}")))
        }
        _ => Ok(()),
    }
}

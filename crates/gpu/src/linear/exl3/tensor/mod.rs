//! Products of rotated f16 rows with tiles on tensor cores whose fragments are known (`m16n8k16` of planes of 32), with f32
//! sums.

mod fragment;
pub(super) mod rows;
pub(super) mod tile;

use cubecl::ir::features::MmaConfig;
use cubecl::ir::{ElemType, FloatKind, IntKind, UIntKind};
use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::Result;

use crate::decode::Trellis;
use crate::linear::exl3::rotate;
use crate::linear::limit;
use crate::linear::operands::Product;
use crate::{Buffer, Gpu};

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

/// Whether the device multiplies such fragments.
pub(super) fn available<R: Runtime>(gpu: &Gpu<R>) -> bool {
    let config = |ab: ElemType, cd: ElemType, k: u32| MmaConfig {
        a_type: ab.into(),
        b_type: ab.into(),
        cd_type: cd.into(),
        m: 16,
        n: 8,
        k,
    };
    let products = config(ElemType::Float(FloatKind::F16), ElemType::Float(FloatKind::F32), 16);
    let sums = config(ElemType::UInt(UIntKind::U8), ElemType::Int(IntKind::I32), 32);
    let known = &gpu.properties().features.matmul.mma;
    rotate::has_planes(gpu) && known.contains(&products) && known.contains(&sums)
}

/// The dtype of activations that the kernel takes: others would lose range or precision as f16.
pub(super) const fn takes(dtype: DType) -> bool {
    matches!(dtype, DType::F16)
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

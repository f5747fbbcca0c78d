//! Rows sorted by expert, each times the trellis weight of its expert: [`super::tile`] with tiles of rows of one expert.

use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::{Result, Tensor};

use super::parts::{self, Parts};
use super::{available, tile};
use crate::linear::exl3::rotate::Channels;
use crate::linear::limit;
use crate::linear::tensor::ExpertRows;
use crate::weight::GpuWeight;
use crate::{Buffer, Gpu};

/// Enqueues the product of rotated f32 rows `x [rows, K padded]` with the weights of a bank, one behind the other with N and
/// K of one: `[rows, N padded]`, and `[rows]` by which to multiply it. Rows of experts without a place are not written.
///
/// # Errors
/// An unsupported error that names the limit where the kernel cannot have this shape.
pub(crate) fn multiply<R: Runtime>(
    gpu: &Gpu<R>,
    operation: &'static str,
    weight: &GpuWeight,
    tile_rows: usize,
    x: &Tensor<Gpu<R>>,
    rows: &ExpertRows<'_, R>,
) -> Result<(Tensor<Gpu<R>>, Buffer)> {
    if !available(gpu) {
        return Err(limit(gpu, operation, "exl3 experts by m16n8k16 products of planes of 32 units".into()));
    }
    let trellis = weight.trellis().ok_or_else(|| limit(gpu, operation, "a weight that is not exl3 as exl3".into()))?;
    let out = gpu.scratch(operation, DType::F32, &[x.rows(), weight.padded_out()])?;
    let parts = Parts::of(gpu, x.dtype());
    let (x, inverses) = parts::split(gpu, operation, x, parts, Channels::FragmentPairs)?;
    tile::multiply_experts(gpu, operation, (weight, trellis), tile_rows, parts, &x, rows, &out)?;
    Ok((out, inverses))
}

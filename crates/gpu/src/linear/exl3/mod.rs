//! EXL3 weights: rows are rotated, multiplied with the decoded tiles and rotated back.
//!
//! Products of 16-bit activations run on tensor cores where fragments are known, on all other devices a kernel of its own
//! takes few rows and the matrix kernels more; these have f32 operands.

mod fragment;
pub(crate) mod rotate;
mod rows;
mod tensor;
#[cfg(all(test, any(feature = "vulkan", feature = "cuda")))]
mod tests;
mod unfold;

use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::linear::Activation;
use marlin_ops::{Result, Tensor};

use super::operands::{Combine, Product};
use super::tile::{Accumulate, Tile};
use super::{LinearKernel, limit, row_factors};
use crate::decode::{Codes, Trellis};
use crate::weight::GpuWeight;
use crate::{Buffer, Gpu};
use rotate::Channels;
pub(crate) use unfold::{Rows, Unfolded, unfold};

impl GpuWeight {
    /// The trellis of an EXL3 weight.
    pub(crate) fn trellis(&self) -> Option<Trellis> {
        match self.decoder.codes {
            Codes::Trellis(trellis) => Some(trellis),
            _ => None,
        }
    }

    /// The weight between the rotations.
    fn inner(&self) -> Self {
        Self {
            in_features: self.padded_in(),
            out_features: self.padded_out(),
            decoder: self.decoder,
            words: self.words.clone(),
            word_count: self.word_count,
            scales: self.scales.clone(),
            scale_count: self.scale_count,
            zeros: self.zeros.clone(),
            zero_count: self.zero_count,
            table: self.table.clone(),
            table_len: self.table_len,
            bias: None,
        }
    }
}

/// Launches a product with an EXL3 weight; `row_factors` are those of its norm if they are known.
pub(super) fn multiply<R: Runtime>(
    gpu: &Gpu<R>,
    kernel: Option<LinearKernel>,
    product: &Product<'_, R>,
    trellis: Trellis,
    known: Option<&Buffer>,
) -> Result<()> {
    let factors = match (known, &product.norm) {
        (Some(known), _) => Some(known.clone()),
        (None, Some(norm)) => Some(row_factors::launch(gpu, product.operation, product.x, norm)?),
        (None, None) => None,
    };
    let operation = product.operation;
    let (m, k, n) = (product.x.rows(), product.weight.padded_in(), product.weight.padded_out());
    let on_tensor_cores = tensor::takes(product.x.dtype()) && tensor::available(gpu);
    let wanted = match kernel {
        None => on_tensor_cores,
        Some(LinearKernel::TensorRows(_) | LinearKernel::TensorTile(_)) if !on_tensor_cores => {
            return Err(limit(gpu, operation, "f32 activations or a device without m16n8k16 products".into()));
        }
        Some(kernel) => matches!(kernel, LinearKernel::TensorRows(_) | LinearKernel::TensorTile(_)),
    };
    if wanted {
        let plan = tensor::Plan::new(gpu, product, trellis);
        let partials = gpu.scratch(operation, DType::F32, &[plan.slices, m, n])?;
        let rotated = match plan.takes_rotated() {
            true => Some(gpu.scratch(operation, DType::F16, &[m, k])?),
            false => None,
        };
        if let Some(rotated) = &rotated {
            rotate::input(gpu, product, factors.as_ref(), Channels::Fragment, rotated);
        }
        tensor::launch(gpu, product, &plan, rotated.as_ref().map(Tensor::buffer), &partials)?;
        rotate::output(gpu, product, &partials, plan.slices);
        return Ok(());
    }
    let x = gpu.scratch(operation, DType::F32, &[m, k])?;
    rotate::input(gpu, product, factors.as_ref(), Channels::Neighbours, &x);
    match kernel {
        Some(LinearKernel::Gemv(_)) => few_rows(gpu, product, trellis, &x),
        None if m <= rows::MOST_ROWS => few_rows(gpu, product, trellis, &x),
        kernel => {
            let (weight, out) = (product.weight.inner(), gpu.scratch(operation, DType::F32, &[1, m, n])?);
            let tile = Tile { m: 32, n: 64, k: 32, units: 128, stages: 1, accumulate: Accumulate::F32 };
            let inner = Product {
                operation,
                x: &x,
                norm: None,
                weight: &weight,
                up: None,
                activation: Activation::None,
                out_scale: 1.0,
                combine: Combine::Nothing,
                out: &out,
            };
            gpu.launch_kernel(kernel.unwrap_or(LinearKernel::Matrix(tile)), &inner, None)?;
            rotate::output(gpu, product, &out, 1);
            Ok(())
        }
    }
}

/// The kernel for few rows of f32, `x` after the rotation.
fn few_rows<R: Runtime>(gpu: &Gpu<R>, product: &Product<'_, R>, trellis: Trellis, x: &Tensor<Gpu<R>>) -> Result<()> {
    let slices = rows::slices(gpu, product);
    let dims = [slices, product.x.rows(), product.weight.padded_out()];
    let partials = gpu.scratch(product.operation, DType::F32, &dims)?;
    rows::launch(gpu, product, trellis, x.buffer(), &partials, slices)?;
    rotate::output(gpu, product, &partials, slices);
    Ok(())
}

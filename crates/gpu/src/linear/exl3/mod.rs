//! EXL3 weights: rows are rotated, multiplied with the decoded tiles and rotated back.
//!
//! Products run on tensor cores where fragments are known, f32 and bf16 activations as f16 or, in the exact mode, as sums of two.
//! On other devices they have f32 operands: a kernel of the format takes few rows and the matrix kernels more.

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

use super::operands::{Combine, Prepared, Product};
use super::tile::{Accumulate, Tile};
use super::{LinearKernel, limit};
use crate::Gpu;
use crate::decode::{Codes, Trellis};
use crate::weight::GpuWeight;
use rotate::Channels;
pub(crate) use tensor::assigned::{AssignedRows, multiply as multiply_assigned};
pub(crate) use tensor::available as tensor_cores;
pub(crate) use tensor::experts::multiply as multiply_experts;
pub(crate) use tensor::tile::MOST_EXPERT_ROWS;
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
            input_order: None,
        }
    }
}

/// Launches a product with an EXL3 weight.
pub(super) fn multiply<R: Runtime>(
    gpu: &Gpu<R>,
    kernel: Option<LinearKernel>,
    product: &Product<'_, R>,
    trellis: Trellis,
    prepared: &mut Prepared<R>,
) -> Result<()> {
    let operation = product.operation;
    if let Some(kernel @ (LinearKernel::Gemv(_) | LinearKernel::TensorRows(_) | LinearKernel::TensorTile(_))) = kernel {
        return Err(limit(gpu, operation, format!("an exl3 weight by {kernel:?}")));
    }
    let factors = prepared.row_factors(gpu, product)?;
    if matches!(kernel, None | Some(LinearKernel::Trellis)) && tensor::available(gpu) {
        return tensor::launch(gpu, product, trellis, factors);
    }
    let (m, k, n) = (product.x.rows(), product.weight.padded_in(), product.weight.padded_out());
    let x = gpu.scratch(operation, DType::F32, &[m, k])?;
    rotate::input(gpu, product, factors, Channels::Neighbours, &x);
    match kernel {
        Some(LinearKernel::Trellis) => few_rows(gpu, product, trellis, &x),
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
            gpu.launch_kernel(kernel.unwrap_or(LinearKernel::Matrix(tile)), &inner, &mut Prepared::default())?;
            rotate::output(gpu, product, &out, 1, None);
            Ok(())
        }
    }
}

/// The kernel for few rows of f32, where there are no tensor cores; `x` after the rotation.
fn few_rows<R: Runtime>(gpu: &Gpu<R>, product: &Product<'_, R>, trellis: Trellis, x: &Tensor<Gpu<R>>) -> Result<()> {
    let slices = rows::slices(gpu, product);
    let dims = [slices, product.x.rows(), product.weight.padded_out()];
    let partials = gpu.scratch(product.operation, DType::F32, &dims)?;
    rows::launch(gpu, product, trellis, x.buffer(), &partials, slices)?;
    rotate::output(gpu, product, &partials, slices, None);
    Ok(())
}

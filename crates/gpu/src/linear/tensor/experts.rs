//! Rows sorted by expert, each times the weight of its expert: [`super::tile`] with tiles of rows of one expert.

use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::linear::Activation;
use marlin_ops::{Result, Tensor};

use super::{Call, Target, TensorTile, rows_of_parts, tile};
use crate::decode::Decoder;
use crate::linear::limit;
use crate::linear::operands::{Combine, Prepared, Product};
use crate::weight::GpuWeight;
use crate::{Buffer, Gpu};

/// Rows sorted by the expert whose weight they meet.
pub(crate) struct ExpertRows<'a, R: Runtime> {
    /// `[tile_count, 2]`: expert and first row of each tile; another number than that of an expert where there is none.
    pub(crate) tiles: &'a Tensor<Gpu<R>>,
    pub(crate) tile_count: usize,
    /// `[E + 1]`: where the rows of each expert begin.
    pub(crate) offsets: &'a Tensor<Gpu<R>>,
    /// Row i belongs to row `permutation[i] / slots` of x.
    pub(crate) permutation: &'a Tensor<Gpu<R>>,
    /// x has a row for so many rows, otherwise a row for each, in their order.
    pub(crate) slots: Option<usize>,
    /// `[3, E]`: the places of the experts' weights in the bank, [`u32::MAX`] for experts that are not there.
    pub(crate) places: &'a Buffer,
    /// Row of `places`.
    pub(crate) first_place: usize,
    pub(crate) experts: usize,
}

/// `out [rows, N] = act(x W + b)`, times another tensor if there is one.
pub(crate) struct ExpertProduct<'a, R: Runtime> {
    pub(crate) operation: &'static str,
    pub(crate) x: &'a Tensor<Gpu<R>>,
    /// The weights of all experts of a bank, one behind the other, with N, K and decoder of one.
    pub(crate) weight: &'a GpuWeight,
    pub(crate) activation: Activation,
    pub(crate) factor: Option<&'a Tensor<Gpu<R>>>,
    pub(crate) out: &'a Tensor<Gpu<R>>,
}

impl<R: Runtime> ExpertProduct<'_, R> {
    /// Launches the kernel, which writes the rows of experts that have a place. `prepared` may be shared with products of
    /// the same x.
    ///
    /// # Errors
    /// An unsupported error that names the limit where the kernel cannot have this shape.
    pub(crate) fn launch(
        &self,
        gpu: &Gpu<R>,
        shape: TensorTile,
        rows: &ExpertRows<'_, R>,
        prepared: &mut Prepared,
    ) -> Result<()> {
        let product = Product {
            operation: self.operation,
            x: self.x,
            norm: None,
            weight: self.weight,
            up: None,
            activation: self.activation,
            out_scale: 1.0,
            combine: self.factor.map_or(Combine::Nothing, Combine::Multiply),
            out: self.out,
        };
        let call = Call::new(gpu, &product).map_err(|what| limit(gpu, self.operation, what.into()))?;
        let x = rows_of_parts(gpu, &call, &product, prepared)?;
        let (epilogue, flags) = (product.epilogue(), product.flags());
        let target =
            Target { product: &product, experts: Some(rows), x: &x, out: self.out, epilogue, flags, out_scale: 1.0 };
        tile::launch(gpu, shape, &call, &target)
    }
}

/// The kernel's shape for tiles of 32, 64 or 128 rows, if it takes such weights `[N, K]` and activations.
pub(crate) fn shape<R: Runtime>(
    gpu: &Gpu<R>,
    tile_rows: usize,
    x: DType,
    decoder: Decoder,
    [n, k]: [usize; 2],
) -> Option<TensorTile> {
    let call = Call::of(gpu, x, decoder, [n, k], DType::F32).ok()?;
    super::tile_of(gpu.properties().hardware.max_shared_memory_size, call.parts, tile_rows, n)
}

//! Many tokens on tensor cores: rows sorted by expert, by the kernels of linear layers.

#[cfg(all(test, feature = "cuda"))]
mod tests;

use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::linear::Activation;
use marlin_ops::{Device, OpError, Result, Tensor};

use super::experts::Bank;
use super::gemm::SortedRows;
use super::mlp::{Call, ExpertKernel, OP};
use crate::Gpu;
use crate::linear::Prepared;
use crate::linear::exl3::{MOST_EXPERT_ROWS, tensor_cores};
use crate::linear::tensor::{ExpertProduct, ExpertRows, MOST_TILE_ROWS, expert_shape};

impl<R: Runtime> Call<'_, R> {
    /// Most rows of a tile of the kernels that take this call with such activations; 0 if none does.
    pub(super) fn most_tile_rows(&self, gpu: &Gpu<R>, x: DType) -> usize {
        let sizes = [self.columns, self.features];
        let rows = |bank: &Bank| match bank.weight.trellis() {
            Some(_) if tensor_cores(gpu) => MOST_EXPERT_ROWS,
            _ if expert_shape(gpu, 32, x, bank.weight.decoder, sizes).is_some() => MOST_TILE_ROWS,
            _ => 0,
        };
        self.second.map_or(MOST_TILE_ROWS, rows).min(rows(self.first))
    }

    /// The rows as kernels find them, of the call's first weight or, number 1, its second. With `slots`, x has a row for so
    /// many of them, otherwise for each.
    pub(super) fn expert_rows<'s>(
        &'s self,
        sorted: &'s SortedRows<'_, R>,
        number: usize,
        slots: Option<usize>,
    ) -> ExpertRows<'s, R> {
        ExpertRows {
            tiles: sorted.tiles,
            tile_count: sorted.tile_count,
            offsets: sorted.offsets,
            permutation: sorted.permutation,
            slots,
            places: &self.group.places,
            first_place: self.first_place + number,
            experts: self.experts,
        }
    }

    /// `out [T k, N]` in sorted order, as [`Call::tiles`].
    pub(super) fn tensor_tiles(
        &self,
        gpu: &Gpu<R>,
        sorted: &SortedRows<'_, R>,
        slots: Option<usize>,
        out: &Tensor<Gpu<R>>,
        kernel: &ExpertKernel,
    ) -> Result<()> {
        let mut prepared = Prepared::default();
        // The bank, whether first or second, and what it is multiplied with.
        let mut multiply = |bank: &Bank, number, activation, factor: Option<&Tensor<Gpu<R>>>, out: &Tensor<Gpu<R>>| {
            let (weight, sizes) = (&bank.weight, [self.columns, self.features]);
            let shape = expert_shape(gpu, kernel.tile_m, self.x.dtype(), weight.decoder, sizes).ok_or_else(|| {
                let what = format!("weights {sizes:?} of {:?} on tensor cores,", weight.decoder);
                OpError::Unsupported { operation: OP, backend: gpu.name(), what }
            })?;
            let rows = self.expert_rows(sorted, number, slots);
            let product = ExpertProduct { operation: OP, x: self.x, weight, activation, factor, out };
            product.launch(gpu, shape, &rows, &mut prepared)
        };
        let Some(second) = self.second else {
            return multiply(self.first, 0, self.activation, None, out);
        };
        let gate = gpu.scratch(OP, DType::F32, out.dims())?;
        multiply(self.first, 0, self.activation, None, &gate)?;
        multiply(second, 1, Activation::None, Some(&gate), out)
    }
}

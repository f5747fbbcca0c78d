//! Many tokens on tensor cores: rows sorted by expert, by the kernel of linear layers.

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
use crate::linear::tensor::{ExpertProduct, ExpertRows, expert_shape};
use crate::weight::GpuWeight;

impl Bank {
    /// All weights of the bank as one, with the sizes of each.
    fn weight(&self, in_features: usize, out_features: usize) -> GpuWeight {
        GpuWeight {
            in_features,
            out_features,
            decoder: self.decoder,
            words: self.words.clone(),
            word_count: self.word_count,
            scales: self.scales.clone(),
            scale_count: self.scale_count,
            zeros: self.zeros.clone(),
            zero_count: self.zero_count,
            table: self.table.clone(),
            table_len: self.table_len,
            bias: self.bias.as_ref().map(|(bias, _)| bias.clone()),
        }
    }
}

impl<R: Runtime> Call<'_, R> {
    /// Whether the kernel takes this call with such activations.
    pub(super) fn suits_tensor_cores(&self, gpu: &Gpu<R>, x: DType) -> bool {
        let sizes = [self.columns, self.features];
        let takes = |bank: &Bank| expert_shape(gpu, 32, x, bank.decoder, sizes).is_some();
        takes(self.first) && self.second.is_none_or(takes)
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
        let Some(second) = self.second else {
            return self.one(
                gpu,
                (sorted, slots),
                (self.first, 0),
                (self.activation, None),
                out,
                kernel,
                &mut prepared,
            );
        };
        let gate = gpu.scratch(OP, DType::F32, out.dims())?;
        self.one(gpu, (sorted, slots), (self.first, 0), (self.activation, None), &gate, kernel, &mut prepared)?;
        let combine = (Activation::None, Some(&gate));
        self.one(gpu, (sorted, slots), (second, 1), combine, out, kernel, &mut prepared)
    }

    /// The product with one bank, which is the first or second of the call.
    #[allow(clippy::too_many_arguments)]
    fn one(
        &self,
        gpu: &Gpu<R>,
        (sorted, slots): (&SortedRows<'_, R>, Option<usize>),
        (bank, number): (&Bank, usize),
        (activation, factor): (Activation, Option<&Tensor<Gpu<R>>>),
        out: &Tensor<Gpu<R>>,
        kernel: &ExpertKernel,
        prepared: &mut Prepared,
    ) -> Result<()> {
        let sizes = [self.columns, self.features];
        let shape = expert_shape(gpu, kernel.tile_m, self.x.dtype(), bank.decoder, sizes).ok_or_else(|| {
            let what = format!("weights [{}, {}] of {:?} on tensor cores,", self.columns, self.features, bank.decoder);
            OpError::Unsupported { operation: OP, backend: gpu.name(), what }
        })?;
        let rows = ExpertRows {
            tiles: sorted.tiles,
            tile_count: sorted.tile_count,
            offsets: sorted.offsets,
            permutation: sorted.permutation,
            slots,
            places: &self.group.places,
            first_place: self.first_place + number,
            experts: self.experts,
        };
        let weight = &bank.weight(self.features, self.columns);
        let product = ExpertProduct { operation: OP, x: self.x, weight, activation, factor, out };
        product.launch(gpu, shape, &rows, prepared)
    }
}

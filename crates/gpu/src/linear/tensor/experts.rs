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

/// Most rows of a tile.
pub(crate) const MOST_TILE_ROWS: usize = 128;

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

/// A cube's share of a product.
#[derive(CubeType, Clone, Copy)]
pub(in crate::linear) struct Share {
    /// Its first row of the output, and the end of the rows.
    pub(in crate::linear) first: usize,
    pub(in crate::linear) end: usize,
    /// Number of its weight.
    pub(in crate::linear) place: usize,
}

/// The share of a cube of so many rows of m; with `experts`, that of a tile of [`ExpertRows`]: no rows where the tile is
/// unused or its expert is not here.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(in crate::linear) fn share(
    tiles: &[u32],
    offsets: &[u32],
    places: &[u32],
    m: u32,
    expert_count: u32,
    first_place: u32,
    #[comptime] rows: usize,
    #[comptime] experts: bool,
) -> Share {
    if comptime!(experts) {
        let expert = tiles[2 * CUBE_POS_X as usize];
        let mut share = Share { first: 0usize.runtime(), end: 0usize.runtime(), place: 0usize.runtime() };
        if expert < expert_count {
            let place = places[(first_place * expert_count + expert) as usize];
            if place != u32::MAX {
                share.first = tiles[2 * CUBE_POS_X as usize + 1] as usize;
                share.end = offsets[expert as usize + 1] as usize;
                share.place = place as usize;
            }
        }
        share
    } else {
        Share { first: CUBE_POS_X as usize * rows, end: m as usize, place: 0usize.runtime() }
    }
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
        prepared: &mut Prepared<R>,
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

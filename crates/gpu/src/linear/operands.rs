//! A checked product and its operands as kernels take them.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::linear::{Activation, InputNorm};
use marlin_ops::{Result, Tensor};

use super::epilogue::{Epilogue, flags};
use super::input_order::Ordered;
use super::row_factors;
use super::tensor::split;
use crate::decode::{Decoder, Scale};
use crate::element::{Storage, load};
use crate::weight::GpuWeight;
use crate::{Buffer, Gpu};

/// What a result is combined with at the end.
pub(super) enum Combine<'a, R: Runtime> {
    Nothing,
    Add(&'a Tensor<Gpu<R>>),
    AddToOut,
    Multiply(&'a Tensor<Gpu<R>>),
}

/// `out = act(x^ W + bias) * (x^ U + up bias) * out_scale` combined with another tensor. Checked; M and N are not 0.
pub(super) struct Product<'a, R: Runtime> {
    pub(super) operation: &'static str,
    /// `[M, K]`.
    pub(super) x: &'a Tensor<Gpu<R>>,
    pub(super) norm: Option<InputNorm<'a, Gpu<R>>>,
    pub(super) weight: &'a GpuWeight,
    /// U of a gated product, with the decoder of W.
    pub(super) up: Option<&'a GpuWeight>,
    pub(super) activation: Activation,
    pub(super) out_scale: f32,
    pub(super) combine: Combine<'a, R>,
    /// `[M, N]`.
    pub(super) out: &'a Tensor<Gpu<R>>,
}

impl<R: Runtime> Clone for Product<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R: Runtime> Copy for Product<'_, R> {}

impl<R: Runtime> Clone for Combine<'_, R> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<R: Runtime> Copy for Combine<'_, R> {}

/// What products that share x and the norm need of them, found once.
pub(crate) struct Prepared<R: Runtime> {
    row_factors: Option<Buffer>,
    parts: Option<Buffer>,
    /// The same of x in the order that the latest weight with one of its own has.
    pub(super) ordered: Option<Box<Ordered<R>>>,
}

impl<R: Runtime> Default for Prepared<R> {
    fn default() -> Self {
        Self { row_factors: None, parts: None, ordered: None }
    }
}

impl<R: Runtime> Prepared<R> {
    /// The row factors of the products' norm, none without one.
    pub(super) fn row_factors(&mut self, gpu: &Gpu<R>, product: &Product<'_, R>) -> Result<Option<&Buffer>> {
        if let (None, Some(norm)) = (&self.row_factors, &product.norm) {
            self.row_factors = Some(row_factors::launch(gpu, product.operation, product.x, norm)?);
        }
        Ok(self.row_factors.as_ref())
    }

    /// The f32 rows as sums of two bf16, after the norm: see [`split`].
    pub(super) fn parts(&mut self, gpu: &Gpu<R>, product: &Product<'_, R>) -> Result<Buffer> {
        match &self.parts {
            Some(parts) => Ok(parts.clone()),
            None => Ok(self.parts.insert(split::launch(gpu, product)?).clone()),
        }
    }
}

/// How rows of activations are read.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) struct Input {
    pub(super) x: Storage,
    /// The weight of an input norm.
    pub(super) gamma: Option<Storage>,
}

/// How the group of a unit is found from the run-time operand `group`.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) enum Grouping {
    None,
    /// `group` is the binary logarithm of the units of a group.
    Shift,
    /// `group` is the number of units of a group.
    Divide,
}

/// The group of a unit.
#[cube]
pub(super) fn group_of(unit: usize, group: u32, #[comptime] grouping: Grouping) -> usize {
    match comptime!(grouping) {
        Grouping::None => 0usize.runtime(),
        Grouping::Shift => ((unit as u32) >> group) as usize,
        Grouping::Divide => unit / group as usize,
    }
}

/// Element `at` of x, times the norm's weight for input feature `k`.
#[cube]
pub(super) fn load_input<X: Numeric, G: Numeric>(
    x: &[X],
    gamma: &[G],
    at: usize,
    k: usize,
    gamma_offset: f32,
    #[comptime] input: Input,
) -> f32 {
    let value = load::<X>(x, at, input.x);
    if comptime!(input.gamma.is_some()) {
        value * (load::<G>(gamma, k, comptime!(input.gamma.unwrap_or(Storage::F32))) + gamma_offset)
    } else {
        value
    }
}

impl<R: Runtime> Product<'_, R> {
    /// `[M, N, K]`.
    pub(super) fn shape(&self) -> [usize; 3] {
        [self.x.rows(), self.weight.out_features, self.weight.in_features]
    }

    /// Weights that the product reads.
    pub(super) fn products(&self) -> usize {
        1 + usize::from(self.up.is_some())
    }

    pub(super) fn input(&self) -> Input {
        let gamma = self.norm.as_ref().map(|norm| Storage::of(norm.gamma.dtype()));
        Input { x: Storage::of(self.x.dtype()), gamma }
    }

    pub(super) fn epilogue(&self) -> Epilogue {
        let residual = match self.combine {
            Combine::Add(tensor) | Combine::Multiply(tensor) => Storage::of(tensor.dtype()),
            Combine::Nothing | Combine::AddToOut => Storage::F32,
        };
        let out = Storage::of(self.out.dtype());
        let in_place = matches!(self.combine, Combine::AddToOut);
        Epilogue { activation: self.activation, gated: self.up.is_some(), in_place, residual, out }
    }

    /// The operand `flags`.
    pub(super) fn flags(&self) -> u32 {
        let combine = match self.combine {
            Combine::Nothing | Combine::AddToOut => 0,
            Combine::Add(_) => flags::ADD,
            Combine::Multiply(_) => flags::MULTIPLY,
        };
        let bias = |weight: Option<&GpuWeight>, flag| if weight.is_some_and(|w| w.bias.is_some()) { flag } else { 0 };
        combine | bias(Some(self.weight), flags::BIAS) | bias(self.up, flags::UP_BIAS)
    }

    /// How groups are found, and the operand `group`.
    pub(super) fn grouping(&self) -> (Grouping, u32) {
        grouping(self.weight)
    }

    /// The offset of gamma and epsilon; unread without a norm.
    pub(super) fn norm_scalars(&self) -> (f32, f32) {
        self.norm.as_ref().map_or((0.0, 1.0), |norm| (norm.gamma_offset, norm.eps))
    }

    /// Element types of x, gamma, scales, residual and out.
    pub(super) fn elements(&self) -> [ElemType; 5] {
        let (input, epilogue) = (self.input(), self.epilogue());
        let gamma = input.gamma.unwrap_or(Storage::F32);
        [input.x.elem(), gamma.elem(), self.weight.decoder.scale_elem(), epilogue.residual.elem(), epilogue.out.elem()]
    }

    pub(super) fn x_arg(&self) -> BufferArg<R> {
        self.x.buffer().arg(self.x.elements())
    }

    pub(super) fn gamma_arg(&self, gpu: &Gpu<R>) -> BufferArg<R> {
        self.norm.as_ref().map_or_else(|| gpu.unread(), |norm| norm.gamma.buffer().arg(norm.gamma.elements()))
    }

    pub(super) fn residual_arg(&self, gpu: &Gpu<R>) -> BufferArg<R> {
        match self.combine {
            Combine::Add(tensor) | Combine::Multiply(tensor) => tensor.buffer().arg(tensor.elements()),
            Combine::Nothing | Combine::AddToOut => gpu.unread(),
        }
    }

    pub(super) fn out_arg(&self) -> BufferArg<R> {
        self.out.buffer().arg(self.out.elements())
    }

    /// The second weight, or the first one where the kernel reads only that.
    pub(super) fn up_or_weight(&self) -> &GpuWeight {
        self.up.unwrap_or(self.weight)
    }
}

/// How the groups of a weight are found, and the operand `group`.
pub(super) fn grouping(weight: &GpuWeight) -> (Grouping, u32) {
    let decoder = weight.decoder;
    let units = decoder.group_size / decoder.unit();
    match decoder.scale {
        Scale::None => (Grouping::None, 0),
        _ if units.is_power_of_two() => (Grouping::Shift, units.ilog2()),
        _ => (Grouping::Divide, units as u32),
    }
}

impl GpuWeight {
    /// `words` in vectors of `width` columns.
    pub(crate) fn words_arg<R: Runtime>(&self, width: usize) -> BufferArg<R> {
        vectors(&self.words, self.word_count, width)
    }

    /// `scales` in vectors of `width` columns.
    pub(crate) fn scales_arg<R: Runtime>(&self, width: usize) -> BufferArg<R> {
        vectors(&self.scales, self.scale_count, width)
    }

    /// `zeros` in vectors of `width` columns.
    pub(crate) fn zeros_arg<R: Runtime>(&self, width: usize) -> BufferArg<R> {
        vectors(&self.zeros, self.zero_count, width)
    }

    pub(crate) fn table_arg<R: Runtime>(&self) -> BufferArg<R> {
        self.table.arg(self.table_len)
    }

    pub(crate) fn bias_arg<R: Runtime>(&self, gpu: &Gpu<R>) -> BufferArg<R> {
        self.bias.as_ref().map_or_else(|| gpu.unread(), |bias| bias.arg(bias.bytes / size_of::<f32>()))
    }

    /// The decoder that kernels with a run-time group size are compiled for.
    pub(super) fn kernel_decoder(&self) -> Decoder {
        self.decoder.ungrouped()
    }
}

fn vectors<R: Runtime>(buffer: &Buffer, count: usize, width: usize) -> BufferArg<R> {
    buffer.arg((count / width).max(1))
}

//! Tensors of a case: uploads, poisoned outputs, values read back.

use marlin_formats::DType;
use marlin_ops::linear::Residual;
use marlin_ops::{Device, HostTensor, Result, Tensor};

/// What an unwritten word looks like.
const POISON: u32 = 0xDEAD_BEEF;

/// An f32 tensor.
pub(crate) fn floats<B: Device>(b: &B, dims: &[usize], values: &[f32]) -> Result<Tensor<B>> {
    b.upload(&HostTensor::from_f32(dims, values)?)
}

/// A tensor of any float dtype, each value rounded on the host.
pub(crate) fn floats_as<B: Device>(b: &B, dtype: DType, dims: &[usize], values: &[f32]) -> Result<Tensor<B>> {
    b.upload(&HostTensor::from_f32_as(dtype, dims, values)?)
}

/// A U32 tensor.
pub(crate) fn ids<B: Device>(b: &B, dims: &[usize], values: &[u32]) -> Result<Tensor<B>> {
    b.upload(&HostTensor::from_u32(dims, values)?)
}

/// An f32 output full of NaN.
pub(crate) fn poison<B: Device>(b: &B, dims: &[usize]) -> Result<Tensor<B>> {
    poison_as(b, DType::F32, dims)
}

/// An output of any float dtype full of NaN.
pub(crate) fn poison_as<B: Device>(b: &B, dtype: DType, dims: &[usize]) -> Result<Tensor<B>> {
    floats_as(b, dtype, dims, &vec![f32::NAN; dims.iter().product()])
}

/// A U32 output full of a word that no operation writes.
pub(crate) fn poison_ids<B: Device>(b: &B, dims: &[usize]) -> Result<Tensor<B>> {
    ids(b, dims, &vec![POISON; dims.iter().product()])
}

/// What an epilogue adds in a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Add {
    Nothing,
    Tensor,
    InPlace,
}

impl Add {
    /// The argument, where `tensor` is what [`Add::Tensor`] adds.
    pub(crate) fn of<B: Device>(self, tensor: &Tensor<B>) -> Residual<'_, B> {
        match self {
            Add::Nothing => Residual::None,
            Add::Tensor => Residual::Add(tensor),
            Add::InPlace => Residual::InPlace,
        }
    }

    /// The output: poisoned, or with the contents that it is added to.
    pub(crate) fn output<B: Device>(
        self,
        b: &B,
        dtype: DType,
        dims: &[usize],
        contents: impl FnOnce() -> Vec<f32>,
    ) -> Result<Tensor<B>> {
        match self {
            Add::InPlace => floats_as(b, dtype, dims, &contents()),
            Add::Nothing | Add::Tensor => poison_as(b, dtype, dims),
        }
    }
}

/// What a case read back.
pub(crate) struct Output {
    pub(crate) name: &'static str,
    pub(crate) values: Vec<f64>,
}

impl Output {
    /// A float tensor.
    pub(crate) fn floats<B: Device>(b: &B, name: &'static str, tensor: &Tensor<B>) -> Result<Self> {
        let values = b.read_f64(tensor)?;
        Ok(Self { name, values })
    }

    /// A U32 tensor.
    pub(crate) fn words<B: Device>(b: &B, name: &'static str, tensor: &Tensor<B>) -> Result<Self> {
        let values = b.read_u32(tensor)?.into_iter().map(f64::from).collect();
        Ok(Self { name, values })
    }
}

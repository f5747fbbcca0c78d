//! Elements of float tensors: f32, f16 and bf16 on every device. bf16 is stored as its 16 bits, because most Vulkan
//! devices know no such type; widening is exact and rounding is to nearest even.

use cubecl::ir::{ElemType, FloatKind, UIntKind};
use cubecl::prelude::*;
use marlin_formats::DType;

/// How a float tensor is stored.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(crate) enum Storage {
    F32,
    F16,
    BF16,
}

impl Storage {
    /// The storage of a checked float dtype.
    pub(crate) fn of(dtype: DType) -> Self {
        match dtype {
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            _ => Self::F32,
        }
    }

    /// The element type that kernels see.
    pub(crate) fn elem(self) -> ElemType {
        match self {
            Self::F32 => ElemType::Float(FloatKind::F32),
            Self::F16 => ElemType::Float(FloatKind::F16),
            Self::BF16 => ElemType::UInt(UIntKind::U16),
        }
    }
}

/// Element `i` of a tensor, widened.
#[cube]
pub(crate) fn load<E: Numeric>(data: &[E], i: usize, #[comptime] storage: Storage) -> f32 {
    widen::<E>(data[i], storage)
}

/// The value of an element.
#[cube]
pub(crate) fn widen<E: Numeric>(element: E, #[comptime] storage: Storage) -> f32 {
    if comptime!(storage == Storage::BF16) {
        f32::reinterpret(u32::cast_from(element) << 16u32)
    } else {
        f32::cast_from(element)
    }
}

/// A value rounded to an element.
#[cube]
pub(crate) fn narrow<E: Numeric>(value: f32, #[comptime] storage: Storage) -> E {
    if comptime!(storage == Storage::BF16) { E::cast_from(bf16_bits(value)) } else { E::cast_from(value) }
}

/// Writes element `i` of a tensor, rounded.
#[cube]
pub(crate) fn store<E: Numeric>(data: &mut [E], i: usize, value: f32, #[comptime] storage: Storage) {
    data[i] = narrow::<E>(value, storage);
}

/// The bf16 nearest to a value, ties to even; NaN stays a quiet NaN.
#[cube]
pub(crate) fn bf16_bits(value: f32) -> u32 {
    let bits = u32::reinterpret(value);
    let is_nan = (bits & 0x7fff_ffffu32) > 0x7f80_0000u32;
    let rounded = (bits + 0x7fffu32 + ((bits >> 16u32) & 1u32)) >> 16u32;
    select(is_nan, (bits >> 16u32) | 0x40u32, rounded)
}

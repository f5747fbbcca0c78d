//! Elements of float tensors: f32, f16 and bf16 on every device. bf16 is stored as its 16 bits, because most Vulkan
//! devices know no such type; widening is exact and rounding is to nearest even.

use cubecl::ir::{ElemType, FloatKind, UIntKind};
use cubecl::prelude::*;
use half::f16;
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
    match comptime!(storage) {
        Storage::F32 => E::cast_from(value),
        Storage::F16 => E::cast_from(f16::reinterpret(u16::cast_from(narrow_bits(u32::reinterpret(value), storage)))),
        Storage::BF16 => E::cast_from(narrow_bits(u32::reinterpret(value), storage)),
    }
}

/// Writes element `i` of a tensor, rounded.
#[cube]
pub(crate) fn store<E: Numeric>(data: &mut [E], i: usize, value: f32, #[comptime] storage: Storage) {
    data[i] = narrow::<E>(value, storage);
}

/// The bits of the element nearest to the f32 of these bits, ties to even; NaN becomes quiet and keeps its sign and
/// leading payload. Integer arithmetic, because drivers differ in the rounding of conversions, in subnormals and in NaN.
#[cube]
pub(crate) fn narrow_bits(bits: u32, #[comptime] storage: Storage) -> u32 {
    match comptime!(storage) {
        Storage::F32 => bits,
        Storage::F16 => f16_bits(bits),
        Storage::BF16 => bf16_bits(f32::reinterpret(bits)),
    }
}

/// The bits of the f32 that equals the element of these bits.
#[cube]
pub(crate) fn widen_bits(bits: u32, #[comptime] storage: Storage) -> u32 {
    match comptime!(storage) {
        Storage::F32 => bits,
        Storage::F16 => {
            let fraction = bits & 0x3ffu32;
            let exponent = (bits >> 10u32) & 31u32;
            // At least 2^-24, a normal f32.
            let subnormal = u32::reinterpret(f32::cast_from(fraction) * 5.960_464_5e-8f32);
            let finite = select(exponent == 0u32, subnormal, ((exponent + 112u32) << 23u32) | (fraction << 13u32));
            let quiet = select(fraction == 0u32, 0u32, fraction << 13u32 | 0x0040_0000u32);
            select(exponent == 31u32, quiet | 0x7f80_0000u32, finite) | ((bits & 0x8000u32) << 16u32)
        }
        Storage::BF16 => bits << 16u32,
    }
}

/// The f16 nearest to an f32, see [`narrow_bits`].
#[cube]
fn f16_bits(bits: u32) -> u32 {
    let magnitude = bits & 0x7fff_ffffu32;
    // Exponents differ by 112; a carry out of the fraction goes into the exponent.
    let normal = (magnitude - 0x3800_0000u32 + 0xfffu32 + ((magnitude >> 13u32) & 1u32)) >> 13u32;
    // Below 2^-14: in steps of 2^-24. From a shift by 25 on, nothing is left.
    let exponent = magnitude >> 23u32;
    let shift = select(exponent > 101u32, 126u32 - exponent, 25u32) & 31u32;
    let significand = (magnitude & 0x007f_ffffu32) | 0x0080_0000u32;
    let kept = significand >> shift;
    let lost = significand - (kept << shift);
    let half = (1u32 << shift) >> 1u32;
    let up = lost > half || (lost == half && (kept & 1u32) == 1u32);
    let subnormal = kept + select(up, 1u32, 0u32);
    let finite = select(magnitude < 0x3880_0000u32, subnormal, normal);
    // From 65,520 on.
    let bounded = select(magnitude < 0x477f_f000u32, finite, 0x7c00u32.runtime());
    let nan = 0x7e00u32 | ((magnitude >> 13u32) & 0x3ffu32);
    select(magnitude > 0x7f80_0000u32, nan, bounded) | ((bits >> 16u32) & 0x8000u32)
}

/// The bf16 nearest to a value, ties to even; NaN stays a quiet NaN.
#[cube]
pub(crate) fn bf16_bits(value: f32) -> u32 {
    let bits = u32::reinterpret(value);
    let is_nan = (bits & 0x7fff_ffffu32) > 0x7f80_0000u32;
    let rounded = (bits + 0x7fffu32 + ((bits >> 16u32) & 1u32)) >> 16u32;
    select(is_nan, (bits >> 16u32) | 0x40u32, rounded)
}

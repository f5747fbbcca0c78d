//! Tensor storage and typed access to it.

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use half::{bf16, f16};
use marlin_formats::DType;
use marlin_ops::{OpError, Result, Tensor};

use crate::Cpu;
use crate::simd::{Kernel, LANES, LINE_BYTES, Level, Simd};

/// Storage of a tensor in host memory.
pub enum Buffer {
    /// F32.
    F32(Vec<f32>),
    /// Bits of F16 or BF16.
    Half(Vec<u16>),
    /// U32, or the bits of I32.
    U32(Vec<u32>),
}

impl Buffer {
    /// `len` zeros; the pages stay untouched until written.
    pub(crate) fn zeros(dtype: DType, len: usize) -> Result<Self> {
        match dtype {
            DType::F32 => Ok(Self::F32(vec![0.0; len])),
            DType::F16 | DType::BF16 => Ok(Self::Half(vec![0; len])),
            DType::U32 | DType::I32 => Ok(Self::U32(vec![0; len])),
            _ => Err(unsupported("tensor", "dtype", dtype)),
        }
    }
}

/// The error of a dtype that this backend has no kernel for.
pub(crate) fn unsupported(operation: &'static str, operand: &str, dtype: DType) -> OpError {
    OpError::Unsupported { operation, backend: "cpu", what: format!("`{operand}` in {}", dtype.name()) }
}

/// The elements of an F32 tensor.
pub(crate) fn f32s<'a>(operation: &'static str, operand: &str, tensor: &'a Tensor<Cpu>) -> Result<&'a [f32]> {
    match tensor.buffer() {
        Buffer::F32(values) => Ok(&values[..tensor.elements()]),
        _ => Err(unsupported(operation, operand, tensor.dtype())),
    }
}

/// The elements of an optional F32 tensor.
pub(crate) fn optional_f32s<'a>(
    operation: &'static str,
    operand: &str,
    tensor: Option<&'a Tensor<Cpu>>,
) -> Result<Option<&'a [f32]>> {
    tensor.map(|t| f32s(operation, operand, t)).transpose()
}

/// The elements of an F32 tensor, writable.
pub(crate) fn f32s_mut<'a>(
    operation: &'static str,
    operand: &str,
    tensor: &'a mut Tensor<Cpu>,
) -> Result<&'a mut [f32]> {
    let (len, dtype) = (tensor.elements(), tensor.dtype());
    match tensor.buffer_mut() {
        Buffer::F32(values) => Ok(&mut values[..len]),
        _ => Err(unsupported(operation, operand, dtype)),
    }
}

/// The elements of a U32 tensor.
pub(crate) fn u32s<'a>(operation: &'static str, operand: &str, tensor: &'a Tensor<Cpu>) -> Result<&'a [u32]> {
    match tensor.buffer() {
        Buffer::U32(values) => Ok(&values[..tensor.elements()]),
        _ => Err(unsupported(operation, operand, tensor.dtype())),
    }
}

/// The elements of a U32 tensor, writable.
pub(crate) fn u32s_mut<'a>(
    operation: &'static str,
    operand: &str,
    tensor: &'a mut Tensor<Cpu>,
) -> Result<&'a mut [u32]> {
    let (len, dtype) = (tensor.elements(), tensor.dtype());
    match tensor.buffer_mut() {
        Buffer::U32(values) => Ok(&mut values[..len]),
        _ => Err(unsupported(operation, operand, dtype)),
    }
}

/// Float values of any stored type.
#[derive(Clone, Copy)]
pub(crate) enum Floats<'a> {
    F32(&'a [f32]),
    F16(&'a [u16]),
    BF16(&'a [u16]),
}

impl<'a> Floats<'a> {
    pub(crate) fn of(operation: &'static str, operand: &str, tensor: &'a Tensor<Cpu>) -> Result<Self> {
        let len = tensor.elements();
        match (tensor.buffer(), tensor.dtype()) {
            (Buffer::F32(v), _) => Ok(Self::F32(&v[..len])),
            (Buffer::Half(v), DType::F16) => Ok(Self::F16(&v[..len])),
            (Buffer::Half(v), DType::BF16) => Ok(Self::BF16(&v[..len])),
            (_, dtype) => Err(unsupported(operation, operand, dtype)),
        }
    }

    /// Widens `out.len()` values from `start`, exactly.
    pub(crate) fn widen(self, level: Level, start: usize, out: &mut [f32]) {
        level.run(Widen { source: self, start, out });
    }
}

struct Widen<'a, 'b> {
    source: Floats<'a>,
    start: usize,
    out: &'b mut [f32],
}

impl Kernel for Widen<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        widen(s, self.source, self.start, self.out);
    }
}

/// Starts to bring `count` values of `source` from `start` closer, as far as there are any.
#[inline(always)]
pub(crate) fn prefetch<S: Simd>(s: S, source: Floats<'_>, start: usize, count: usize) {
    match source {
        Floats::F32(v) => (start..start + count).step_by(LINE_BYTES / 4).for_each(|i| s.prefetch(v, i)),
        Floats::F16(v) | Floats::BF16(v) => {
            (start..start + count).step_by(LINE_BYTES / 2).for_each(|i| s.prefetch(v, i));
        }
    }
}

/// Widens `out.len()` values of `source` from `start`.
#[inline(always)]
pub(crate) fn widen<S: Simd>(s: S, source: Floats<'_>, start: usize, out: &mut [f32]) {
    let range = start..start + out.len();
    match source {
        Floats::F32(v) => out.copy_from_slice(&v[range]),
        Floats::F16(v) => {
            let (chunks, tail) = v[range].as_chunks::<LANES>();
            let (out_chunks, out_tail) = out.as_chunks_mut::<LANES>();
            for (out, v) in out_chunks.iter_mut().zip(chunks) {
                s.store(s.load_f16(v), out);
            }
            for (out, &v) in out_tail.iter_mut().zip(tail) {
                *out = f16::from_bits(v).to_f32();
            }
        }
        Floats::BF16(v) => {
            for (out, &v) in out.iter_mut().zip(&v[range]) {
                *out = f32::from_bits(u32::from(v) << 16);
            }
        }
    }
}

/// Where rows of f32 are stored, rounded once to the stored type.
pub(crate) enum FloatsMut<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [u16]),
    BF16(&'a mut [u16]),
}

impl<'a> FloatsMut<'a> {
    pub(crate) fn of(operation: &'static str, operand: &str, tensor: &'a mut Tensor<Cpu>) -> Result<Self> {
        let (len, dtype) = (tensor.elements(), tensor.dtype());
        match (tensor.buffer_mut(), dtype) {
            (Buffer::F32(v), _) => Ok(Self::F32(&mut v[..len])),
            (Buffer::Half(v), DType::F16) => Ok(Self::F16(&mut v[..len])),
            (Buffer::Half(v), DType::BF16) => Ok(Self::BF16(&mut v[..len])),
            (_, dtype) => Err(unsupported(operation, operand, dtype)),
        }
    }

    /// Stores `values` from `start` on.
    pub(crate) fn store(&mut self, start: usize, values: &[f32]) {
        let range = start..start + values.len();
        match self {
            Self::F32(out) => out[range].copy_from_slice(values),
            Self::F16(out) => out[range].reinterpret_cast_mut::<f16>().convert_from_f32_slice(values),
            Self::BF16(out) => out[range].reinterpret_cast_mut::<bf16>().convert_from_f32_slice(values),
        }
    }
}

use std::sync::Arc;

use half::{bf16, f16};
use marlin_formats::DType;

use crate::{Device, OpError, Result};

/// Largest number of dimensions of a tensor.
pub const MAX_RANK: usize = 4;

/// Dimensions of a row-major tensor, slowest first.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    dims: [usize; MAX_RANK],
    rank: usize,
}

impl Shape {
    /// A shape of at most [`MAX_RANK`] dimensions whose element count fits in `usize`.
    pub fn new(dims: &[usize]) -> Result<Self> {
        let count = dims.iter().try_fold(1usize, |product, &d| product.checked_mul(d));
        if dims.len() > MAX_RANK || count.is_none() {
            return Err(OpError::shape("shape", "dims", dims, "at most 4 dimensions, no overflow"));
        }
        let mut shape = Self { dims: [0; MAX_RANK], rank: dims.len() };
        shape.dims[..dims.len()].copy_from_slice(dims);
        Ok(shape)
    }

    /// The dimensions.
    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.dims().iter().product()
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.dims().fmt(f)
    }
}

/// A contiguous row-major tensor on a device. The buffer may be larger than the shape: scratch tensors are planned for
/// the largest batch and shrink with [`Tensor::set_rows`] without allocating.
pub struct Tensor<D: Device> {
    buffer: D::Buffer,
    shape: Shape,
    dtype: DType,
    capacity: usize,
}

impl<D: Device> Tensor<D> {
    /// Wraps a buffer of exactly `shape` elements; called by devices.
    pub fn from_buffer(buffer: D::Buffer, shape: Shape, dtype: DType) -> Self {
        Self { buffer, shape, dtype, capacity: shape.elements() }
    }

    /// The device buffer.
    pub fn buffer(&self) -> &D::Buffer {
        &self.buffer
    }

    /// The device buffer, for a backend that writes it.
    pub fn buffer_mut(&mut self) -> &mut D::Buffer {
        &mut self.buffer
    }

    /// Dimensions, slowest first.
    pub fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Number of elements in use.
    pub fn elements(&self) -> usize {
        self.shape.elements()
    }

    /// Bytes of the elements in use.
    pub fn size_in_bytes(&self) -> usize {
        self.elements() * self.dtype.size_in_bytes()
    }

    /// Last dimension, or 1 for a scalar.
    pub fn columns(&self) -> usize {
        self.dims().last().copied().unwrap_or(1)
    }

    /// Product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        let dims = self.dims();
        dims[..dims.len().saturating_sub(1)].iter().product()
    }

    /// Changes the first dimension within the planned capacity.
    pub fn set_rows(&mut self, rows: usize) -> Result<()> {
        let mut dims = self.shape;
        if let Some(first) = dims.dims[..dims.rank].first_mut() {
            *first = rows;
        }
        self.set_shape(dims)
    }

    /// Reinterprets the buffer with other dimensions within the planned capacity.
    pub fn reshape(&mut self, dims: &[usize]) -> Result<()> {
        self.set_shape(Shape::new(dims)?)
    }

    fn set_shape(&mut self, shape: Shape) -> Result<()> {
        if shape.elements() > self.capacity {
            return Err(OpError::shape(
                "reshape",
                "tensor",
                shape.dims(),
                format!("at most {} elements, as planned", self.capacity),
            ));
        }
        self.shape = shape;
        Ok(())
    }
}

impl<D: Device> std::fmt::Debug for Tensor<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({:?}, {:?})", self.dtype, self.shape)
    }
}

/// Little-endian bytes that a host tensor points into, shared with whoever mapped them.
type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A tensor in host memory or in a mapped file: little-endian, row-major, alignment not assumed.
#[derive(Clone)]
pub struct HostTensor {
    dtype: DType,
    shape: Shape,
    bytes: SharedBytes,
    start: usize,
}

impl HostTensor {
    /// A view of `bytes[start..]`; the length must cover the shape.
    pub fn new(dtype: DType, dims: &[usize], bytes: SharedBytes, start: usize) -> Result<Self> {
        let shape = Shape::new(dims)?;
        let needed = shape.elements().checked_mul(dtype.size_in_bytes()).and_then(|n| n.checked_add(start));
        if needed.is_none_or(|n| n > (*bytes).as_ref().len()) {
            return Err(OpError::shape("host tensor", "bytes", dims, "a buffer that holds the shape"));
        }
        Ok(Self { dtype, shape, bytes, start })
    }

    /// An owned f32 tensor.
    pub fn from_f32(dims: &[usize], values: &[f32]) -> Result<Self> {
        Self::owned(DType::F32, dims, le_bytes(values, |v| v.to_le_bytes()))
    }

    /// An owned u32 tensor.
    pub fn from_u32(dims: &[usize], values: &[u32]) -> Result<Self> {
        Self::owned(DType::U32, dims, le_bytes(values, |v| v.to_le_bytes()))
    }

    /// An owned tensor of the given float dtype, each value rounded once (RNE).
    pub fn from_f32_as(dtype: DType, dims: &[usize], values: &[f32]) -> Result<Self> {
        let bytes = match dtype {
            DType::F32 => return Self::from_f32(dims, values),
            DType::F16 => {
                let values: Vec<u16> = values.iter().map(|&v| f16::from_f32(v).to_bits()).collect();
                le_bytes(&values, |v| v.to_le_bytes())
            }
            DType::BF16 => {
                let values: Vec<u16> = values.iter().map(|&v| bf16::from_f32(v).to_bits()).collect();
                le_bytes(&values, |v| v.to_le_bytes())
            }
            found => {
                return Err(OpError::DType {
                    operation: "host tensor",
                    operand: "dtype",
                    found,
                    expected: "F32, F16 or BF16",
                });
            }
        };
        Self::owned(dtype, dims, bytes)
    }

    fn owned(dtype: DType, dims: &[usize], bytes: Vec<u8>) -> Result<Self> {
        let shape = Shape::new(dims)?;
        if bytes.len() != shape.elements() * dtype.size_in_bytes() {
            return Err(OpError::shape("host tensor", "values", dims, "as many values as the shape"));
        }
        Self::new(dtype, dims, Arc::new(bytes), 0)
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Dimensions, slowest first.
    pub fn dims(&self) -> &[usize] {
        self.shape.dims()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.elements()
    }

    /// The little-endian bytes of exactly this tensor.
    pub fn bytes(&self) -> &[u8] {
        let end = self.start + self.elements() * self.dtype.size_in_bytes();
        &(*self.bytes).as_ref()[self.start..end]
    }

    /// All values as f32; floats only (F32, F16, BF16), exact.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        let bytes = self.bytes();
        match self.dtype {
            DType::F32 => Ok(le_chunks(bytes, f32::from_le_bytes)),
            DType::F16 => Ok(le_chunks(bytes, |b| f16::from_le_bytes(b).to_f32())),
            DType::BF16 => Ok(le_chunks(bytes, |b| bf16::from_le_bytes(b).to_f32())),
            found => {
                Err(OpError::DType { operation: "host tensor", operand: "values", found, expected: "F32, F16 or BF16" })
            }
        }
    }

    /// All values of a 32-bit integer tensor as u32 bit patterns.
    pub fn to_u32(&self) -> Result<Vec<u32>> {
        match self.dtype {
            DType::U32 | DType::I32 => Ok(le_chunks(self.bytes(), u32::from_le_bytes)),
            found => Err(OpError::DType { operation: "host tensor", operand: "values", found, expected: "U32 or I32" }),
        }
    }

    /// All values of a 16-bit tensor as bit patterns.
    pub fn to_u16_bits(&self) -> Result<Vec<u16>> {
        match self.dtype.size_in_bytes() {
            2 => Ok(le_chunks(self.bytes(), u16::from_le_bytes)),
            _ => Err(OpError::DType {
                operation: "host tensor",
                operand: "values",
                found: self.dtype,
                expected: "a 16-bit type",
            }),
        }
    }
}

impl std::fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostTensor({:?}, {:?})", self.dtype, self.shape)
    }
}

/// Values as little-endian bytes; `convert` is for machines that store them otherwise.
fn le_bytes<const N: usize, T: bytemuck::NoUninit>(values: &[T], convert: impl Fn(&T) -> [u8; N]) -> Vec<u8> {
    match cfg!(target_endian = "little") {
        true => bytemuck::cast_slice(values).to_vec(),
        false => values.iter().flat_map(convert).collect(),
    }
}

/// `bytes` split into fixed-size little-endian values.
fn le_chunks<const N: usize, T>(bytes: &[u8], convert: impl Fn([u8; N]) -> T) -> Vec<T> {
    let (chunks, _) = bytes.as_chunks::<N>();
    chunks.iter().map(|&c| convert(c)).collect()
}

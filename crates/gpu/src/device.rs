use std::sync::Mutex;

use cubecl::bytes::Bytes;
use cubecl::future::block_on;
use cubecl::ir::{DeviceProperties, ElemType, UIntKind};
use cubecl::prelude::*;
use cubecl::server::{Handle, ServerError};
use marlin_formats::DType;
use marlin_ops::profile::Profiler;
use marlin_ops::{Device, ExpertWeights, HostTensor, OpError, PathSearch, Result, Shape, Tensor, Weight};

use crate::Buffer;
use crate::attention;
use crate::fault;
use crate::launch::{cubes_for, units};
use crate::linear;
use crate::step::{Recording, Steps};
use crate::traffic::Counters;
use crate::weight::{GpuExperts, GpuWeight};

/// Allocations from this size on are checked at once.
const CHECKED_BYTES: usize = 1 << 20;

/// A GPU as a device. Operations enqueue and return; reads wait, and report any failure of the work before them.
pub struct Gpu<R: Runtime> {
    client: ComputeClient<R>,
    name: &'static str,
    exact: bool,
    profiler: Profiler,
    traffic: Counters,
    pub(crate) steps: Steps,
    /// Held while a batch of tiles is searched.
    pub(crate) searching: Mutex<()>,
    /// What [`fault::record`] writes.
    faults: Buffer,
    /// Passed where a kernel has an operand that this configuration does not read.
    unread: Buffer,
}

impl<R: Runtime> Gpu<R> {
    /// A device under the name that users know its kind by.
    pub(crate) fn new(client: ComputeClient<R>, name: &'static str) -> Self {
        let buffer = |words: &[u32]| Buffer {
            handle: client.create_from_slice(bytemuck::cast_slice(words)),
            bytes: size_of_val(words),
        };
        let (faults, unread) = (buffer(&fault::CLEAR), buffer(&[0; 4]));
        let steps = Steps::new([buffer(&[0; 4]), buffer(&[0; 4])]);
        Self {
            client,
            name,
            exact: false,
            profiler: Profiler::default(),
            traffic: Counters::default(),
            steps,
            searching: Mutex::new(()),
            faults,
            unread,
        }
    }

    /// The device in its exact mode, or in the other one, in which it is opened. Where there are tensor cores, that one rounds f32
    /// and bf16 activations of products with EXL3 weights to f16 after the rotation, and multiplies one or two rows with values
    /// of codebook mul1 that are not rounded to f16. The exact mode does so with f16 activations of linear layers only. The other
    /// one also takes f32 keys and values, which latent attention has in a prompt, as sums of two bf16.
    pub fn with_exact(self, exact: bool) -> Self {
        Self { exact, ..self }
    }

    /// Whether activations with more bits than f16 keep them.
    pub(crate) fn is_exact(&self) -> bool {
        self.exact
    }

    /// Whether results depend on [`Gpu::with_exact`].
    pub fn has_modes(&self) -> bool {
        linear::exl3::tensor_cores(self) || attention::has_modes(self)
    }

    /// The client for a launch, which is counted. What a device can do is in [`Gpu::properties`].
    pub(crate) fn client(&self) -> &ComputeClient<R> {
        self.traffic.launched();
        &self.client
    }

    /// The client for all but launches.
    pub(crate) fn uncounted(&self) -> &ComputeClient<R> {
        &self.client
    }

    /// Limits of the device.
    pub(crate) fn properties(&self) -> &DeviceProperties {
        self.client.properties()
    }

    pub(crate) fn counters(&self) -> &Counters {
        &self.traffic
    }

    /// The argument of an operand that is not read.
    pub(crate) fn unread(&self) -> BufferArg<R> {
        self.unread.arg(1)
    }

    /// The fault record as an argument.
    pub(crate) fn faults(&self) -> BufferArg<R> {
        self.faults.arg(fault::SLOTS)
    }

    /// Memory with unspecified contents.
    pub(crate) fn allocate(&self, operation: &'static str, bytes: usize) -> Result<Buffer> {
        self.reserve(operation, bytes, |size| self.client.empty(size))
    }

    /// A buffer with these contents.
    pub(crate) fn create(&self, operation: &'static str, contents: &[u8]) -> Result<Buffer> {
        self.traffic.wrote(contents.len());
        self.reserve(operation, contents.len(), |size| {
            let mut bytes = contents.to_vec();
            bytes.resize(size, 0);
            self.client.create(Bytes::from_bytes_vec(bytes))
        })
    }

    /// Memory from `source`, in whole words: 16-bit tensors of odd length are copied as words.
    fn reserve(&self, operation: &'static str, bytes: usize, source: impl Fn(usize) -> Handle) -> Result<Buffer> {
        let most = self.client.properties().memory.max_page_size;
        if bytes as u64 > most {
            let reason = format!("a buffer of {bytes} bytes is asked for, {} allows {most}", self.name);
            return Err(OpError::Device { operation, reason });
        }
        let bytes = bytes.next_multiple_of(16).max(16);
        let buffer = Buffer { handle: source(bytes), bytes };
        if bytes >= CHECKED_BYTES && !self.steps.is_recording() {
            // Out of memory shows here rather than at some later read. (Memory of a recorded step was taken before.)
            self.client.flush().map_err(|e| device_error(operation, &e))?;
        }
        Ok(buffer)
    }

    /// A buffer of f32 values.
    pub(crate) fn create_f32(&self, operation: &'static str, values: &[f32]) -> Result<Buffer> {
        self.create(operation, bytemuck::cast_slice(values))
    }

    /// A buffer of u32 values.
    pub(crate) fn create_u32(&self, operation: &'static str, values: &[u32]) -> Result<Buffer> {
        self.create(operation, bytemuck::cast_slice(values))
    }

    /// Scratch of a tensor's shape.
    pub(crate) fn scratch(&self, operation: &'static str, dtype: DType, dims: &[usize]) -> Result<Tensor<Self>> {
        let shape = Shape::new(dims)?;
        let buffer = self.allocate(operation, shape.elements().saturating_mul(dtype.size_in_bytes()))?;
        Ok(Tensor::from_buffer(buffer, shape, dtype))
    }

    /// Waits and reads the first `bytes` of a buffer and perhaps a few more; reports what failed before.
    pub(crate) fn read(&self, operation: &'static str, buffer: &Buffer, bytes: usize) -> Result<Bytes> {
        self.traffic.read(bytes);
        // Of a buffer that is larger, as those of planned tensors are, no more than is asked for, in whole words.
        let unread = buffer.bytes - bytes.next_multiple_of(4).max(4);
        let handles = vec![buffer.handle.clone().offset_end(unread as u64), self.faults.handle.clone()];
        let read = block_on(self.client.read_async(handles)).map_err(|e| device_error(operation, &e))?;
        let Ok([data, record]) = <[Bytes; 2]>::try_from(read) else {
            return Err(OpError::Device { operation, reason: "two buffers were read as fewer".into() });
        };
        let record: Vec<u32> = record.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        if let Some(error) = fault::error(&record) {
            self.write(&self.faults, bytemuck::cast_slice(&fault::CLEAR));
            return Err(error);
        }
        Ok(data)
    }

    /// Replaces the start of a buffer, in order with the work before and after.
    pub(crate) fn write(&self, buffer: &Buffer, contents: &[u8]) {
        self.traffic.wrote(contents.len());
        let mut handle = buffer.handle.clone();
        handle.offset_end = Some((buffer.bytes - contents.len()) as u64);
        self.client.write(&handle, Bytes::from_bytes_vec(contents.to_vec()));
    }
}

#[cube(launch_unchecked)]
fn fill_zero(out: &mut [u32], count: u32) {
    if ABSOLUTE_POS < count as usize {
        out[ABSOLUTE_POS] = 0u32;
    }
}

#[cube(launch_unchecked)]
fn copy_elements<E: Numeric>(source: &[E], out: &mut [E], first: u32, count: u32, #[define(E)] _element: ElemType) {
    if ABSOLUTE_POS < count as usize {
        out[ABSOLUTE_POS] = source[first as usize + ABSOLUTE_POS];
    }
}

impl<R: Runtime> Device for Gpu<R> {
    type Buffer = Buffer;
    type Weight = GpuWeight;
    type Experts = GpuExperts;
    type Recording = Recording<R>;

    fn name(&self) -> &'static str {
        self.name
    }

    fn zeros(&self, dtype: DType, dims: &[usize]) -> Result<Tensor<Self>> {
        let tensor = self.scratch("zeros", dtype, dims)?;
        let words = tensor.buffer().bytes / 4;
        // SAFETY: the buffer holds that many words.
        unsafe {
            fill_zero::launch_unchecked::<R>(
                self.client(),
                cubes_for(words),
                units(),
                tensor.buffer().arg(words),
                words as u32,
            );
        }
        Ok(tensor)
    }

    fn upload(&self, host: &HostTensor) -> Result<Tensor<Self>> {
        let dtype = match host.dtype() {
            dtype @ (DType::F32 | DType::F16 | DType::BF16 | DType::U32 | DType::I32) => dtype,
            found => {
                let expected = "F32, F16, BF16, U32 or I32";
                return Err(OpError::DType { operation: "upload", operand: "host", found, expected });
            }
        };
        Ok(Tensor::from_buffer(self.create("upload", host.bytes())?, Shape::new(host.dims())?, dtype))
    }

    fn write_u32(&self, values: &[u32], out: &mut Tensor<Self>) -> Result<()> {
        const OP: &str = "write_u32";
        expect_dtype(OP, "out", out, DType::U32)?;
        if out.elements() != values.len() {
            out.reshape(&[values.len()])?;
        }
        if !values.is_empty() {
            self.write(out.buffer(), bytemuck::cast_slice(values));
        }
        Ok(())
    }

    fn copy_rows(&self, source: &Tensor<Self>, first: usize, count: usize, out: &mut Tensor<Self>) -> Result<()> {
        const OP: &str = "copy_rows";
        expect_dtype(OP, "out", out, source.dtype())?;
        let columns = source.columns();
        if out.columns() != columns || out.rows() != count {
            return Err(OpError::shape(OP, "out", out.dims(), format!("[{count}, {columns}]")));
        }
        if first.checked_add(count).is_none_or(|end| end > source.rows()) {
            let expected = format!("at least {first} + {count} rows");
            return Err(OpError::shape(OP, "source", source.dims(), expected));
        }
        let elements = count * columns;
        if elements == 0 {
            return Ok(());
        }
        let element = match source.dtype().size_in_bytes() {
            2 => ElemType::UInt(UIntKind::U16),
            _ => ElemType::UInt(UIntKind::U32),
        };
        // SAFETY: the rows lie within the source, as checked, and `out` holds `elements`.
        unsafe {
            copy_elements::launch_unchecked::<R>(
                self.client(),
                cubes_for(elements),
                units(),
                source.buffer().arg(source.elements()),
                out.buffer().arg(elements),
                (first * columns) as u32,
                elements as u32,
                element,
            );
        }
        Ok(())
    }

    fn read_f64(&self, tensor: &Tensor<Self>) -> Result<Vec<f64>> {
        Ok(self.read_f32(tensor)?.into_iter().map(f64::from).collect())
    }

    fn read_f32(&self, tensor: &Tensor<Self>) -> Result<Vec<f32>> {
        const OP: &str = "read_f32";
        let dtype = tensor.dtype();
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(OpError::DType {
                operation: OP,
                operand: "tensor",
                found: dtype,
                expected: "F32, F16 or BF16",
            });
        }
        let bytes = &self.read(OP, tensor.buffer(), tensor.size_in_bytes())?[..tensor.size_in_bytes()];
        match dtype {
            DType::F32 => Ok(bytemuck::pod_collect_to_vec(bytes)),
            _ => HostTensor::new(dtype, tensor.dims(), std::sync::Arc::new(bytes.to_vec()), 0)?.to_f32(),
        }
    }

    fn read_u32(&self, tensor: &Tensor<Self>) -> Result<Vec<u32>> {
        const OP: &str = "read_u32";
        expect_dtype(OP, "tensor", tensor, DType::U32)?;
        let bytes = self.read(OP, tensor.buffer(), tensor.size_in_bytes())?;
        Ok(bytemuck::pod_collect_to_vec(&bytes[..tensor.size_in_bytes()]))
    }

    fn path_search(&self) -> Option<&dyn PathSearch> {
        Some(self)
    }

    fn prepare_weight(&self, weight: Weight) -> Result<GpuWeight> {
        GpuWeight::new(self, &weight)
    }

    fn prepare_experts(&self, experts: Vec<ExpertWeights>) -> Result<GpuExperts> {
        GpuExperts::new(self, &experts)
    }

    fn run_step<E: From<OpError>>(
        &self,
        position: usize,
        recording: &mut Option<Recording<R>>,
        step: impl FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        self.step(position, recording, step)
    }

    fn profiler(&self) -> Option<&Profiler> {
        Some(&self.profiler)
    }

    fn synchronize(&self) -> Result<()> {
        block_on(self.client.sync()).map_err(|e| device_error("synchronize", &e))
    }
}

/// A failure of the device, without the backtrace that its message carries.
pub(crate) fn device_error(operation: &'static str, error: &ServerError) -> OpError {
    let message = error.to_string();
    let lines = message.lines().map(str::trim).take_while(|line| !line.starts_with("Backtrace"));
    OpError::Device { operation, reason: lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ") }
}

fn expect_dtype<R: Runtime>(
    operation: &'static str,
    operand: &'static str,
    tensor: &Tensor<Gpu<R>>,
    expected: DType,
) -> Result<()> {
    if tensor.dtype() == expected {
        return Ok(());
    }
    Err(OpError::DType { operation, operand, found: tensor.dtype(), expected: expected.name() })
}

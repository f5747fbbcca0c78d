use half::{bf16, f16};
use marlin_formats::DType;
use marlin_formats::exl3::Codebook;
use marlin_ops::activation::takes_int8_activations;
use marlin_ops::profile::{Arithmetic, Profiler};
use marlin_ops::{Device, ExpertWeights, HostTensor, OpError, Result, Shape, Tensor, Weight, WeightData};

use crate::Buffer;
use crate::arena::Arena;
use crate::buffer::{self, Floats};
use crate::layout::{PackedExperts, PackedWeight};
use crate::pool::Pool;
use crate::simd::Level;
use crate::workspace::Workspace;

/// An instruction set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Isa {
    /// `MARLIN_ISA` (`portable`, `avx2`, `avx512`, `neon`) if set, else the best that the machine has.
    #[default]
    Auto,
    /// Plain Rust.
    Portable,
    /// AVX2, FMA, F16C.
    Avx2,
    /// AVX-512 F, BW, VL, VNNI.
    Avx512,
    /// NEON with the dot-product instructions (Armv8.2 and later, all Apple silicon).
    Neon,
}

/// How a [`Cpu`] computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuOptions {
    /// Worker threads; all cores when absent.
    pub threads: Option<usize>,
    /// f32 activations everywhere; otherwise int8 activations where [`marlin_ops::activation::takes_int8_activations`]
    /// allows them, and for EXL3 weights what the crate's README says.
    pub exact: bool,
    /// Instruction set.
    pub isa: Isa,
}

/// The CPU as a device. Operations are complete when they return.
pub struct Cpu {
    pub(crate) pool: Pool,
    pub(crate) level: Level,
    pub(crate) workspace: Workspace,
    pub(crate) arena: Arena,
    profiler: Profiler,
    exact: bool,
}

impl Cpu {
    /// Starts the threads.
    ///
    /// # Errors
    /// A value error for `threads` = 0, for an instruction set that the machine lacks, and for an unknown `MARLIN_ISA`;
    /// a device error when threads cannot be started.
    pub fn new(options: CpuOptions) -> Result<Self> {
        let isa = match options.isa {
            Isa::Auto => isa_from_environment()?,
            isa => isa,
        };
        Ok(Self {
            pool: Pool::new(options.threads)?,
            level: level(isa)?,
            workspace: Workspace::default(),
            arena: Arena::default(),
            profiler: Profiler::default(),
            exact: options.exact,
        })
    }

    /// The instruction set in use, never [`Isa::Auto`].
    pub fn isa(&self) -> Isa {
        match self.level {
            Level::Portable(_) => Isa::Portable,
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => Isa::Avx2,
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => Isa::Avx512,
            #[cfg(target_arch = "aarch64")]
            Level::Neon(_) => Isa::Neon,
        }
    }

    /// Worker threads.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Whether all activations are f32.
    pub fn exact(&self) -> bool {
        self.exact
    }
}

/// The value of `MARLIN_ISA`.
fn isa_from_environment() -> Result<Isa> {
    let Some(name) = std::env::var_os("MARLIN_ISA") else {
        return Ok(Isa::Auto);
    };
    match name.to_str() {
        Some("portable") => Ok(Isa::Portable),
        Some("avx2") => Ok(Isa::Avx2),
        Some("avx512") => Ok(Isa::Avx512),
        Some("neon") => Ok(Isa::Neon),
        _ => {
            let reason = format!("is {name:?}, expected portable, avx2, avx512 or neon");
            Err(OpError::value("cpu", "MARLIN_ISA", reason))
        }
    }
}

/// The level of an instruction set that the machine must have.
fn level(isa: Isa) -> Result<Level> {
    let required = |level: Option<Level>, features: &str| {
        level.ok_or_else(|| {
            let reason = format!("is {isa:?}: this machine lacks {features}");
            OpError::value("cpu", "isa", reason)
        })
    };
    match isa {
        Isa::Auto => Ok(Level::best()),
        Isa::Portable => Ok(Level::PORTABLE),
        Isa::Avx2 => required(Level::avx2(), "AVX2, FMA or F16C"),
        Isa::Avx512 => required(Level::avx512(), "AVX-512 F, BW, VL or VNNI"),
        Isa::Neon => required(Level::neon(), "NEON or its dot-product instructions"),
    }
}

impl Device for Cpu {
    type Buffer = Buffer;
    type Weight = PackedWeight;
    type Experts = PackedExperts;
    type Recording = ();

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn zeros(&self, dtype: DType, dims: &[usize]) -> Result<Tensor<Self>> {
        let shape = Shape::new(dims)?;
        let buffer = Buffer::zeros(dtype, shape.elements())?;
        Ok(Tensor::from_buffer(buffer, shape, dtype))
    }

    fn upload(&self, host: &HostTensor) -> Result<Tensor<Self>> {
        let dtype = host.dtype();
        let buffer = match dtype {
            DType::F32 => Buffer::F32(host.to_f32()?),
            DType::F16 | DType::BF16 => Buffer::Half(host.to_u16_bits()?),
            DType::U32 | DType::I32 => Buffer::U32(host.to_u32()?),
            _ => return Err(buffer::unsupported("upload", "host", dtype)),
        };
        Ok(Tensor::from_buffer(buffer, Shape::new(host.dims())?, dtype))
    }

    fn write_u32(&self, values: &[u32], out: &mut Tensor<Self>) -> Result<()> {
        const OP: &str = "write_u32";
        expect_dtype(OP, "out", out, DType::U32)?;
        if out.elements() != values.len() {
            out.reshape(&[values.len()])?;
        }
        buffer::u32s_mut(OP, "out", out)?.copy_from_slice(values);
        Ok(())
    }

    fn copy_rows(&self, source: &Tensor<Self>, first: usize, count: usize, out: &mut Tensor<Self>) -> Result<()> {
        const OP: &str = "copy_rows";
        expect_dtype(OP, "out", out, source.dtype())?;
        let columns = source.columns();
        if out.columns() != columns || out.rows() != count {
            let expected = format!("[{count}, {columns}]");
            return Err(OpError::shape(OP, "out", out.dims(), expected));
        }
        if first.checked_add(count).is_none_or(|end| end > source.rows()) {
            let expected = format!("at least {first} + {count} rows");
            return Err(OpError::shape(OP, "source", source.dims(), expected));
        }
        let (from, len) = (first * columns, count * columns);
        match (source.buffer(), out.buffer_mut()) {
            (Buffer::F32(s), Buffer::F32(o)) => o[..len].copy_from_slice(&s[from..from + len]),
            (Buffer::Half(s), Buffer::Half(o)) => o[..len].copy_from_slice(&s[from..from + len]),
            (Buffer::U32(s), Buffer::U32(o)) => o[..len].copy_from_slice(&s[from..from + len]),
            _ => return Err(buffer::unsupported(OP, "out", source.dtype())),
        }
        Ok(())
    }

    fn read_f64(&self, tensor: &Tensor<Self>) -> Result<Vec<f64>> {
        Ok(self.read_f32(tensor)?.into_iter().map(f64::from).collect())
    }

    fn read_f32(&self, tensor: &Tensor<Self>) -> Result<Vec<f32>> {
        match Floats::of("read_f32", "tensor", tensor) {
            Ok(Floats::F32(v)) => Ok(v.to_vec()),
            Ok(Floats::F16(v)) => Ok(v.iter().map(|&b| f16::from_bits(b).to_f32()).collect()),
            Ok(Floats::BF16(v)) => Ok(v.iter().map(|&b| bf16::from_bits(b).to_f32()).collect()),
            Err(_) => Err(OpError::DType {
                operation: "read_f32",
                operand: "tensor",
                found: tensor.dtype(),
                expected: "F32, F16 or BF16",
            }),
        }
    }

    fn read_u32(&self, tensor: &Tensor<Self>) -> Result<Vec<u32>> {
        expect_dtype("read_u32", "tensor", tensor, DType::U32)?;
        Ok(buffer::u32s("read_u32", "tensor", tensor)?.to_vec())
    }

    fn prepare_weight(&self, weight: Weight) -> Result<PackedWeight> {
        PackedWeight::new(self, weight)
    }

    fn prepare_experts(&self, experts: Vec<ExpertWeights>) -> Result<PackedExperts> {
        PackedExperts::new(self, experts)
    }

    fn arithmetic(&self, data: &WeightData) -> Arithmetic {
        match data {
            WeightData::Quantized(q) if !self.exact && takes_int8_activations(&q.scheme) => Arithmetic::Int8,
            WeightData::Exl3(q) if !self.exact && q.codebook == Codebook::Mul1 => Arithmetic::Int16,
            _ => Arithmetic::F32,
        }
    }

    fn activation_dtypes(&self) -> &'static [DType] {
        &[DType::F32]
    }

    fn profiler(&self) -> Option<&Profiler> {
        Some(&self.profiler)
    }
}

fn expect_dtype(operation: &'static str, operand: &'static str, tensor: &Tensor<Cpu>, expected: DType) -> Result<()> {
    if tensor.dtype() == expected {
        return Ok(());
    }
    Err(OpError::DType { operation, operand, found: tensor.dtype(), expected: expected.name() })
}

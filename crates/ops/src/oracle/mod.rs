//! The f64 oracle: every operation written straight from its formula, the definition that backends are tested against.
//!
//! Stored values are decoded exactly to f64, all arithmetic is f64, and an output is rounded once: to nearest even for
//! an F16 or BF16 tensor, not at all for an F32 tensor. It is a complete [`Backend`](crate::Backend), so that whole
//! models run on it; speed is no goal.

mod attention;
mod convert;
mod hadamard;
mod linear;
mod moe;
mod norm;
mod rope;
mod rounding;
mod sampling;
mod special;
mod trellis;

use marlin_formats::DType;

use crate::activation::takes_int8_activations;
use crate::trellis::PathSearch;
use crate::{Device, ExpertWeights, HostTensor, InputOrder, OpError, Result, Shape, Tensor, Weight, WeightData};

pub use moe::{Choice, choose_experts};
pub use rounding::round_to;
pub use sampling::{Draw, draw, draw_by_cdf, draw_by_gumbel};

/// The f64 backend.
#[derive(Clone, Copy, Debug, Default)]
pub struct Oracle {
    int8_activations: bool,
}

impl Oracle {
    /// Linear layers take activations as they are.
    pub fn new() -> Self {
        Self::default()
    }

    /// Linear layers round activations as the fast CPU mode does
    /// ([`quantize_activation_block`](crate::activation::quantize_activation_block)) wherever the weight's scheme
    /// [`takes_int8_activations`]. Latent attention is not rounded: its `kv_b` is part of the attention.
    pub fn with_int8_activations() -> Self {
        Self { int8_activations: true }
    }
}

/// Elements of a tensor; the dtype of the tensor says which.
#[derive(Clone, Debug, PartialEq)]
pub enum Values {
    /// F32, F16, BF16.
    Floats(Vec<f64>),
    /// U32, I32 (bit patterns).
    Words(Vec<u32>),
}

/// A decoded linear layer.
#[derive(Clone, Debug)]
pub struct OracleWeight {
    /// `[out_features, in_features]`.
    values: Vec<f64>,
    in_features: usize,
    out_features: usize,
    /// `[out_features]`, zeros when there is none.
    bias: Vec<f64>,
    /// Activations are rounded to int8 blocks first.
    int8_activations: bool,
    /// The channels of x that `values` are for.
    input_order: Option<InputOrder>,
}

/// The decoded experts of a layer.
#[derive(Clone, Debug)]
pub struct OracleExperts {
    experts: Vec<[OracleWeight; 3]>,
}

impl Device for Oracle {
    type Buffer = Values;
    type Weight = OracleWeight;
    type Experts = OracleExperts;
    type Recording = ();

    fn name(&self) -> &'static str {
        "oracle"
    }

    fn zeros(&self, dtype: DType, dims: &[usize]) -> Result<Tensor<Self>> {
        let shape = Shape::new(dims)?;
        let values = match dtype {
            DType::F32 | DType::F16 | DType::BF16 => Values::Floats(vec![0.0; shape.elements()]),
            DType::U32 | DType::I32 => Values::Words(vec![0; shape.elements()]),
            found => return Err(dtype_error("zeros", found, "F32, F16, BF16, U32 or I32")),
        };
        Ok(Tensor::from_buffer(values, shape, dtype))
    }

    fn upload(&self, host: &HostTensor) -> Result<Tensor<Self>> {
        let values = match host.dtype() {
            DType::U32 | DType::I32 => Values::Words(host.to_u32()?),
            _ => Values::Floats(host.to_f32()?.into_iter().map(f64::from).collect()),
        };
        Ok(Tensor::from_buffer(values, Shape::new(host.dims())?, host.dtype()))
    }

    fn write_u32(&self, values: &[u32], out: &mut Tensor<Self>) -> Result<()> {
        if out.dtype() != DType::U32 {
            return Err(dtype_error("write_u32", out.dtype(), "U32"));
        }
        if out.elements() != values.len() {
            out.reshape(&[values.len()])?;
        }
        store_words(out, values);
        Ok(())
    }

    fn copy_rows(&self, source: &Tensor<Self>, first: usize, count: usize, out: &mut Tensor<Self>) -> Result<()> {
        const OP: &str = "copy_rows";
        if source.dtype() != out.dtype() {
            return Err(dtype_error(OP, out.dtype(), source.dtype().name()));
        }
        let columns = source.columns();
        if out.rows() != count || out.columns() != columns {
            let expected = format!("[{count}, {columns}]");
            return Err(OpError::shape(OP, "out", out.dims(), expected));
        }
        if first.checked_add(count).is_none_or(|end| end > source.rows()) {
            let expected = format!("at least {first} + {count} rows");
            return Err(OpError::shape(OP, "source", source.dims(), expected));
        }
        let range = first * columns..(first + count) * columns;
        let length = range.len();
        match (source.buffer(), out.buffer_mut()) {
            (Values::Floats(from), Values::Floats(to)) => to[..length].copy_from_slice(&from[range]),
            (Values::Words(from), Values::Words(to)) => to[..length].copy_from_slice(&from[range]),
            _ => unreachable!("equal dtypes have the same kind of buffer"),
        }
        Ok(())
    }

    fn read_f64(&self, tensor: &Tensor<Self>) -> Result<Vec<f64>> {
        match tensor.buffer() {
            Values::Floats(values) => Ok(values[..tensor.elements()].to_vec()),
            Values::Words(_) => Err(dtype_error("read", tensor.dtype(), "F32, F16 or BF16")),
        }
    }

    fn read_f32(&self, tensor: &Tensor<Self>) -> Result<Vec<f32>> {
        Ok(self.read_f64(tensor)?.into_iter().map(|v| v as f32).collect())
    }

    fn read_u32(&self, tensor: &Tensor<Self>) -> Result<Vec<u32>> {
        match tensor.buffer() {
            Values::Words(words) => Ok(words[..tensor.elements()].to_vec()),
            Values::Floats(_) => Err(dtype_error("read", tensor.dtype(), "U32")),
        }
    }

    fn path_search(&self) -> Option<&dyn PathSearch> {
        Some(self)
    }

    fn prepare_weight(&self, weight: Weight) -> Result<OracleWeight> {
        let (in_features, out_features) = (weight.in_features(), weight.out_features());
        let rounds = match &weight.data {
            WeightData::Dense(_) | WeightData::Exl3(_) | WeightData::Grid(_) => false,
            WeightData::Quantized(matrix) => takes_int8_activations(&matrix.scheme),
        };
        let bias = match &weight.bias {
            Some(bias) => bias.iter().copied().map(f64::from).collect(),
            None => vec![0.0; out_features],
        };
        Ok(OracleWeight {
            values: match &weight.data {
                // The product of rotations is not rounded to f32 on the way.
                WeightData::Exl3(matrix) => matrix.decode_f64()?,
                // As they are stored: x is brought into their order.
                WeightData::Quantized(matrix) => matrix.decode()?.into_iter().map(f64::from).collect(),
                _ => weight.to_f32()?.into_iter().map(f64::from).collect(),
            },
            in_features,
            out_features,
            bias,
            int8_activations: self.int8_activations && rounds,
            input_order: weight.input_order,
        })
    }

    fn prepare_experts(&self, experts: Vec<ExpertWeights>) -> Result<OracleExperts> {
        let prepare = |e: ExpertWeights| -> Result<[OracleWeight; 3]> {
            Ok([self.prepare_weight(e.gate)?, self.prepare_weight(e.up)?, self.prepare_weight(e.down)?])
        };
        let experts = experts.into_iter().map(prepare).collect::<Result<_>>()?;
        Ok(OracleExperts { experts })
    }
}

fn dtype_error(operation: &'static str, found: DType, expected: &'static str) -> OpError {
    OpError::DType { operation, operand: "tensor", found, expected }
}

/// The elements of a float tensor. The operations check dtypes before they reach a body.
fn floats(tensor: &Tensor<Oracle>) -> &[f64] {
    match tensor.buffer() {
        Values::Floats(values) => &values[..tensor.elements()],
        Values::Words(_) => unreachable!("{tensor:?} was checked to hold floats"),
    }
}

/// The elements of a U32 tensor.
fn words(tensor: &Tensor<Oracle>) -> &[u32] {
    match tensor.buffer() {
        Values::Words(values) => &values[..tensor.elements()],
        Values::Floats(_) => unreachable!("{tensor:?} was checked to hold U32"),
    }
}

/// Writes `values` from element `start` on, each rounded once to the dtype of `out`.
fn store(out: &mut Tensor<Oracle>, start: usize, values: &[f64]) {
    let dtype = out.dtype();
    match out.buffer_mut() {
        Values::Floats(slots) => {
            for (slot, &value) in slots[start..][..values.len()].iter_mut().zip(values) {
                *slot = round_to(dtype, value);
            }
        }
        Values::Words(_) => unreachable!("the output was checked to hold floats"),
    }
}

/// Writes all elements of a U32 tensor.
fn store_words(out: &mut Tensor<Oracle>, values: &[u32]) {
    match out.buffer_mut() {
        Values::Words(slots) => slots[..values.len()].copy_from_slice(values),
        Values::Floats(_) => unreachable!("the output was checked to hold U32"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An uploaded f32 tensor.
    pub(super) fn tensor(dims: &[usize], values: &[f32]) -> Tensor<Oracle> {
        Oracle::new().upload(&HostTensor::from_f32(dims, values).unwrap()).unwrap()
    }

    /// An uploaded U32 tensor.
    pub(super) fn ids(dims: &[usize], values: &[u32]) -> Tensor<Oracle> {
        Oracle::new().upload(&HostTensor::from_u32(dims, values).unwrap()).unwrap()
    }

    /// A zeroed F32 tensor.
    pub(super) fn empty(dims: &[usize]) -> Tensor<Oracle> {
        Oracle::new().zeros(DType::F32, dims).unwrap()
    }

    /// A dense f32 linear layer `[out, in]`.
    pub(super) fn dense(out: usize, inputs: usize, values: &[f32]) -> crate::Linear<Oracle> {
        let host = HostTensor::from_f32(&[out, inputs], values).unwrap();
        crate::Linear::new(&Oracle::new(), Weight::dense(host).unwrap()).unwrap()
    }

    /// Every value within `tolerance` of the expected one.
    pub(super) fn assert_close(found: &[f64], expected: &[f64], tolerance: f64) {
        assert_eq!(found.len(), expected.len());
        for (i, (f, e)) in found.iter().zip(expected).enumerate() {
            assert!((f - e).abs() <= tolerance, "[{i}] is {f}, expected {e}");
        }
    }

    /// Irregular values in about +-1.
    pub(super) fn waves(count: usize, seed: f64) -> Vec<f32> {
        (0..count).map(|i| (1.7 * i as f64 + seed).sin() as f32).collect()
    }

    #[test]
    fn transfers() {
        let oracle = Oracle::new();
        let mut words = ids(&[3], &[1, 2, 3]);
        oracle.write_u32(&[7, 8, 9], &mut words).unwrap();
        assert_eq!(oracle.read_u32(&words).unwrap(), [7, 8, 9]);
        oracle.write_u32(&[7], &mut words).unwrap();
        assert_eq!((words.dims(), oracle.read_u32(&words).unwrap()), (&[1][..], vec![7]));
        assert!(oracle.write_u32(&[0; 4], &mut words).is_err());
        assert!(oracle.read_f64(&words).is_err());
        let source = tensor(&[3, 2], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
        let mut out = empty(&[2, 2]);
        oracle.copy_rows(&source, 1, 2, &mut out).unwrap();
        assert_eq!(oracle.read_f64(&out).unwrap(), [2.0, 3.0, 4.0, 5.0]);
        assert!(oracle.copy_rows(&source, 2, 2, &mut out).is_err());
        assert!(oracle.write_u32(&[0; 4], &mut out).is_err());
        assert!(oracle.zeros(DType::Bool, &[1]).is_err());
    }
}

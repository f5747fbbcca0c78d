use marlin_formats::exl3::Exl3Matrix;
use marlin_formats::grid::GridMatrix;
use marlin_formats::{DType, QuantizedMatrix};

use crate::profile::{Arithmetic, Cost};
use crate::{Device, HostTensor, InputOrder, OpError, Result};

/// The stored values of one linear layer.
#[derive(Clone, Debug)]
pub enum WeightData {
    /// `[out_features, in_features]` row-major in F32, F16 or BF16 (checkpoint order).
    Dense(HostTensor),
    /// A native quantized matrix, K-major.
    Quantized(QuantizedMatrix),
    /// Trellis codes between two Hadamard rotations.
    Exl3(Exl3Matrix),
    /// Scalar grid codes with signs of inputs and outputs.
    Grid(GridMatrix),
}

/// One linear layer on the host: `y[n] = sum_k x[k] W[k,n] + bias[n]`.
#[derive(Clone, Debug)]
pub struct Weight {
    /// The matrix.
    pub data: WeightData,
    /// Optional bias `[out_features]`.
    pub bias: Option<Vec<f32>>,
    /// The channels of x that the rows of a quantized matrix multiply, if not one after the other.
    pub input_order: Option<InputOrder>,
}

impl Weight {
    /// A dense `[out_features, in_features]` weight.
    pub fn dense(values: HostTensor) -> Result<Self> {
        if values.dims().len() != 2 {
            return Err(OpError::shape("weight", "values", values.dims(), "[out, in]"));
        }
        if !matches!(values.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return Err(OpError::DType {
                operation: "weight",
                operand: "values",
                found: values.dtype(),
                expected: "F32, F16 or BF16",
            });
        }
        Ok(Self { data: WeightData::Dense(values), bias: None, input_order: None })
    }

    /// A quantized weight; its buffers are validated.
    pub fn quantized(matrix: QuantizedMatrix) -> Result<Self> {
        matrix.validate()?;
        Ok(Self { data: WeightData::Quantized(matrix), bias: None, input_order: None })
    }

    /// An EXL3 weight; its buffers are validated.
    pub fn exl3(matrix: Exl3Matrix) -> Result<Self> {
        matrix.validate()?;
        Ok(Self { data: WeightData::Exl3(matrix), bias: None, input_order: None })
    }

    /// A weight of grid codes; its buffers are validated.
    pub fn grid(matrix: GridMatrix) -> Result<Self> {
        matrix.validate()?;
        Ok(Self { data: WeightData::Grid(matrix), bias: None, input_order: None })
    }

    /// The same weight with a bias `[out_features]`.
    pub fn with_bias(mut self, bias: Vec<f32>) -> Result<Self> {
        if bias.len() != self.out_features() {
            return Err(OpError::shape("weight", "bias", &[bias.len()], "[out_features]"));
        }
        self.bias = Some(bias);
        Ok(self)
    }

    /// K.
    pub fn in_features(&self) -> usize {
        match &self.data {
            WeightData::Dense(t) => t.dims()[1],
            WeightData::Quantized(q) => q.in_features,
            WeightData::Exl3(matrix) => matrix.in_features,
            WeightData::Grid(matrix) => matrix.in_features,
        }
    }

    /// N.
    pub fn out_features(&self) -> usize {
        match &self.data {
            WeightData::Dense(t) => t.dims()[0],
            WeightData::Quantized(q) => q.out_features,
            WeightData::Exl3(matrix) => matrix.out_features,
            WeightData::Grid(matrix) => matrix.out_features,
        }
    }

    /// Decoded values, `[out_features, in_features]` row-major, by channel of x.
    pub fn to_f32(&self) -> Result<Vec<f32>> {
        match &self.data {
            WeightData::Dense(t) => t.to_f32(),
            WeightData::Quantized(q) => Ok(self.by_channel(q.decode()?)),
            WeightData::Exl3(matrix) => Ok(matrix.decode()?),
            WeightData::Grid(matrix) => Ok(matrix.decode()?),
        }
    }

    /// Name of the dtype or format.
    pub fn format_name(&self) -> &'static str {
        match &self.data {
            WeightData::Dense(t) => t.dtype().name(),
            WeightData::Quantized(q) => q.scheme.format.name(),
            WeightData::Exl3(_) => "exl3",
            WeightData::Grid(_) => "trellis_grid",
        }
    }

    /// Stored size of the matrix, its order and the bias.
    pub fn size_in_bytes(&self) -> usize {
        let weights = (self.in_features() * self.out_features()) as f64;
        let matrix = match &self.data {
            WeightData::Dense(t) => t.bytes().len(),
            WeightData::Quantized(q) => {
                let bits = q.scheme.bits_per_weight(q.in_features, q.out_features);
                (bits * weights / 8.0).round() as usize
            }
            WeightData::Exl3(matrix) => (matrix.bits_per_weight() * weights / 8.0).round() as usize,
            WeightData::Grid(matrix) => (matrix.bits_per_weight() * weights / 8.0).round() as usize,
        };
        let words = |len: Option<usize>| len.map_or(0, |len| 4 * len);
        matrix + words(self.bias.as_ref().map(Vec::len)) + words(self.input_order.as_ref().map(|o| o.channels().len()))
    }
}

/// A weight prepared for a device: repacked once, at load.
pub struct Linear<D: Device> {
    in_features: usize,
    out_features: usize,
    size_in_bytes: usize,
    format_name: &'static str,
    arithmetic: Arithmetic,
    channel_order: bool,
    data: D::Weight,
}

impl<D: Device> Linear<D> {
    /// Repacks `weight` into the device's layout.
    pub fn new(device: &D, weight: Weight) -> Result<Self> {
        weight.check_input_order()?;
        Ok(Self {
            in_features: weight.in_features(),
            out_features: weight.out_features(),
            size_in_bytes: weight.size_in_bytes(),
            format_name: weight.format_name(),
            arithmetic: device.arithmetic(&weight.data),
            channel_order: weight.input_order.is_none(),
            data: device.prepare_weight(weight)?,
        })
    }

    /// K.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// N.
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Stored bytes of the weight (codes, scales, zeros, order of the rows, bias).
    pub fn size_in_bytes(&self) -> usize {
        self.size_in_bytes
    }

    /// Name of the dtype or format.
    pub fn format_name(&self) -> &'static str {
        self.format_name
    }

    /// The device's own form.
    pub fn data(&self) -> &D::Weight {
        &self.data
    }

    /// Refuses a matrix whose rows are not in the order of channels: for operations that read x or the values of the matrix
    /// in another way than products do.
    pub(crate) fn check_channel_order(&self, operation: &'static str, operand: &'static str) -> Result<()> {
        match self.channel_order {
            true => Ok(()),
            false => Err(OpError::value(operation, operand, "has its rows in an order of their own")),
        }
    }

    /// A product with `rows` rows of activations, which are not counted.
    pub(crate) fn cost(&self, rows: usize) -> Cost {
        let flops = 2 * rows * self.in_features * self.out_features;
        Cost::default().add_weights(self.size_in_bytes).add_flops(self.arithmetic, flops)
    }
}

/// The three projections of one expert's gated MLP, on the host.
#[derive(Clone, Debug)]
pub struct ExpertWeights {
    /// `[intermediate, hidden]`.
    pub gate: Weight,
    /// `[intermediate, hidden]`.
    pub up: Weight,
    /// `[hidden, intermediate]`.
    pub down: Weight,
}

impl ExpertWeights {
    /// Name, weight and `[out_features, in_features]` of gate, up and down in a stack of these widths.
    fn projections(&self, hidden: usize, intermediate: usize) -> [(&'static str, &Weight, usize, usize); 3] {
        [
            ("gate", &self.gate, intermediate, hidden),
            ("up", &self.up, intermediate, hidden),
            ("down", &self.down, hidden, intermediate),
        ]
    }
}

/// One of an expert's weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExpertProjection {
    /// `[intermediate, hidden]`.
    Gate,
    /// `[intermediate, hidden]`.
    Up,
    /// `[hidden, intermediate]`.
    Down,
}

/// All routed experts of a layer, prepared for a device. Formats may differ by expert and projection.
pub struct ExpertStack<D: Device> {
    hidden: usize,
    intermediate: usize,
    /// What one row costs with gate, up and down of each expert.
    costs: Vec<[Cost; 3]>,
    format_name: &'static str,
    /// Inputs and hidden vectors are in the order of channels.
    channel_order: bool,
    data: D::Experts,
}

impl<D: Device> ExpertStack<D> {
    /// Checks that the experts agree, brings their rows into a common order and repacks them.
    pub fn new(device: &D, experts: Vec<ExpertWeights>) -> Result<Self> {
        const OP: &str = "expert stack";
        let first = experts.first().ok_or_else(|| OpError::value(OP, "experts", "is empty: at least one is needed"))?;
        let (hidden, intermediate) = (first.gate.in_features(), first.gate.out_features());
        let mut channel_order = true;
        let mut stacked = Vec::with_capacity(experts.len());
        for (e, expert) in experts.into_iter().enumerate() {
            for (name, w, n, k) in expert.projections(hidden, intermediate) {
                let found = [w.out_features(), w.in_features()];
                if found != [n, k] {
                    let expected = format!("[{n}, {k}] (expert {e})");
                    return Err(OpError::shape(OP, name, &found, expected));
                }
                w.check_input_order()?;
            }
            let (expert, in_order) = expert.in_stack_order()?;
            channel_order &= in_order;
            stacked.push(expert);
        }
        let mut format_name = stacked[0].gate.format_name();
        let mut costs = Vec::with_capacity(stacked.len());
        for expert in &stacked {
            costs.push(expert.projections(hidden, intermediate).map(|(_, w, n, k)| {
                if w.format_name() != format_name {
                    format_name = "mixed";
                }
                Cost::default().add_weights(w.size_in_bytes()).add_flops(device.arithmetic(&w.data), 2 * n * k)
            }));
        }
        let data = device.prepare_experts(stacked)?;
        Ok(Self { hidden, intermediate, costs, format_name, channel_order, data })
    }

    /// Model width.
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Width of each expert's hidden vector.
    pub fn intermediate(&self) -> usize {
        self.intermediate
    }

    /// Number of experts.
    pub fn count(&self) -> usize {
        self.costs.len()
    }

    /// Stored bytes of all experts.
    pub fn size_in_bytes(&self) -> usize {
        self.costs.iter().flatten().map(|cost| cost.weight_bytes as usize).sum()
    }

    /// Name of the experts' dtype or format, `mixed` if they differ.
    pub fn format_name(&self) -> &'static str {
        self.format_name
    }

    /// Refuses experts some of whose rows are in an order of their own: for operations on single projections, whose hidden
    /// vectors would be in an order that nothing else knows.
    pub(crate) fn check_channel_order(&self, operation: &'static str) -> Result<()> {
        match self.channel_order {
            true => Ok(()),
            false => Err(OpError::value(operation, "experts", "have rows in an order of their own")),
        }
    }

    /// The products of a row with each expert in `ids`, whose weights are read once however often they are chosen.
    /// Ids outside the stack, which no backend accepts, count nothing.
    pub(crate) fn cost(&self, ids: &[u32]) -> Cost {
        let mut total = Cost::default();
        for projection in [ExpertProjection::Gate, ExpertProjection::Up, ExpertProjection::Down] {
            total += self.projection_cost(projection, ids);
        }
        total
    }

    /// [`ExpertStack::cost`] of one projection.
    pub(crate) fn projection_cost(&self, projection: ExpertProjection, ids: &[u32]) -> Cost {
        let mut total = Cost::default();
        let mut chosen = vec![false; self.costs.len()];
        for &id in ids {
            let Some(costs) = self.costs.get(id as usize) else { continue };
            let cost = costs[projection as usize];
            let seen = std::mem::replace(&mut chosen[id as usize], true);
            total += if seen { Cost { weight_bytes: 0, ..cost } } else { cost };
        }
        total
    }

    /// The device's own form.
    pub fn data(&self) -> &D::Experts {
        &self.data
    }
}

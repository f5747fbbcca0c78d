//! Matrices whose rows are in another order than the channels of their input: activation order, which GPTQ quantizes in.

use std::sync::Arc;

use half::f16;
use marlin_formats::{DType, QuantizedMatrix, ScaleKind};

use crate::{ExpertWeights, HostTensor, OpError, Result, Weight, WeightData};

const OP: &str = "weight";

/// The channel of x that each row of a matrix multiplies: `y[n] = sum_k x[order[k]] W[k,n]`. Groups of a quantized matrix
/// are runs of its rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputOrder(Arc<[u32]>);

impl InputOrder {
    /// The order with these channels, one a row.
    ///
    /// # Errors
    /// Anything but a permutation of `0..channels.len()`, with the first row that is wrong.
    pub fn new(channels: Vec<u32>) -> Result<Self> {
        let mut seen = vec![false; channels.len()];
        for (row, &channel) in channels.iter().enumerate() {
            let known = seen.get_mut(channel as usize).ok_or_else(|| {
                let reason = format!("[{row}] is {channel}, there are {} channels", channels.len());
                OpError::value(OP, "input_order", reason)
            })?;
            if std::mem::replace(known, true) {
                return Err(OpError::value(OP, "input_order", format!("[{row}] is {channel} once more")));
            }
        }
        Ok(Self(channels.into()))
    }

    /// One channel a row.
    pub fn channels(&self) -> &[u32] {
        &self.0
    }

    /// Whether row k has channel k.
    pub fn is_natural(&self) -> bool {
        self.0.iter().zip(0..).all(|(&channel, row)| channel == row)
    }

    /// `out[k] = x[order[k]]`.
    #[inline]
    pub fn gather<T: Copy>(&self, x: &[T], out: &mut [T]) {
        for (out, &channel) in out.iter_mut().zip(&*self.0) {
            *out = x[channel as usize];
        }
    }

    /// `out[order[k]] = values[k]`.
    fn scatter<T: Copy>(&self, values: &[T], out: &mut [T]) {
        for (&value, &channel) in values.iter().zip(&*self.0) {
            out[channel as usize] = value;
        }
    }
}

impl Weight {
    /// The same matrix with its rows taken for these channels. Only quantized matrices keep an order; a dense one is sorted.
    ///
    /// # Errors
    /// An order of another length than K; an EXL3 or grid matrix, whose tiles are bound to the order of channels.
    pub fn with_input_order(mut self, order: InputOrder) -> Result<Self> {
        let k = self.in_features();
        if order.0.len() != k {
            return Err(OpError::shape(OP, "input_order", &[order.0.len()], format!("[{k}]")));
        }
        self.input_order = None;
        if order.is_natural() {
            return Ok(self);
        }
        match &self.data {
            WeightData::Quantized(_) => self.input_order = Some(order),
            WeightData::Dense(values) => {
                let sorted = sorted(&order, &values.to_f32()?);
                let dims = [self.out_features(), k];
                self.data = WeightData::Dense(HostTensor::from_f32_as(values.dtype(), &dims, &sorted)?);
            }
            WeightData::Exl3(_) | WeightData::Grid(_) => {
                let reason = format!("goes with {}, whose channels cannot change places", self.format_name());
                return Err(OpError::value(OP, "input_order", reason));
            }
        }
        Ok(self)
    }

    /// The weight without an order of its own. One that had it becomes dense: F16 where its scales are F16 and all values within
    /// its range, as programs that decode it into the type of its scales have it, otherwise F32.
    ///
    /// # Errors
    /// A matrix that cannot be decoded.
    pub fn in_channel_order(self) -> Result<Self> {
        let WeightData::Quantized(matrix) = &self.data else { return Ok(self) };
        if self.input_order.is_none() {
            return Ok(self);
        }
        let values = self.to_f32()?;
        let halves = matrix.scheme.format.scale_kind() == ScaleKind::F16;
        let fit = values.iter().all(|v| f16::from_f32(*v).is_finite());
        let dtype = if halves && fit { DType::F16 } else { DType::F32 };
        let values = HostTensor::from_f32_as(dtype, &[self.out_features(), self.in_features()], &values)?;
        Ok(Self { data: WeightData::Dense(values), bias: self.bias, input_order: None })
    }

    /// Refuses an order that [`Weight::with_input_order`] would not have set.
    pub(crate) fn check_input_order(&self) -> Result<()> {
        let Some(order) = &self.input_order else { return Ok(()) };
        if !matches!(self.data, WeightData::Quantized(_)) {
            return Err(OpError::value(OP, "input_order", format!("goes with {}", self.format_name())));
        }
        match order.0.len() == self.in_features() {
            true => Ok(()),
            false => Err(OpError::shape(OP, "input_order", &[order.0.len()], format!("[{}]", self.in_features()))),
        }
    }

    /// `values [N, K]` of the matrix by channel.
    pub(crate) fn by_channel(&self, values: Vec<f32>) -> Vec<f32> {
        match &self.input_order {
            None => values,
            Some(order) => sorted(order, &values),
        }
    }

    /// The weight with output feature `order[n]` in place n; none where outputs cannot change places.
    fn with_outputs(&self, order: &InputOrder) -> Result<Option<Self>> {
        let n = self.out_features();
        let data = match &self.data {
            WeightData::Dense(values) => {
                let row = values.bytes().len() / n;
                let rows = order.0.iter().flat_map(|&n| &values.bytes()[n as usize * row..][..row]);
                let bytes: Vec<u8> = rows.copied().collect();
                WeightData::Dense(HostTensor::new(values.dtype(), values.dims(), Arc::new(bytes), 0)?)
            }
            WeightData::Quantized(matrix) => WeightData::Quantized(with_columns(matrix, order)),
            WeightData::Exl3(_) | WeightData::Grid(_) => return Ok(None),
        };
        let bias = self.bias.as_ref().map(|bias| gathered(order, bias, 1));
        Ok(Some(Self { data, bias, input_order: self.input_order.clone() }))
    }
}

/// `values [N, K]` by channel.
fn sorted(order: &InputOrder, values: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; values.len()];
    let k = order.0.len().max(1);
    for (row, out) in values.chunks_exact(k).zip(out.chunks_exact_mut(k)) {
        order.scatter(row, out);
    }
    out
}

/// `values [rows, N]` of `width` elements each with column `order[n]` in place n.
fn gathered<T: Copy>(order: &InputOrder, values: &[T], width: usize) -> Vec<T> {
    let row = width * order.0.len().max(1);
    let columns =
        |row: &[T]| -> Vec<T> { order.0.iter().flat_map(|&n| &row[n as usize * width..][..width]).copied().collect() };
    values.chunks_exact(row).flat_map(columns).collect()
}

/// The matrix with output feature `order[n]` in place n.
fn with_columns(matrix: &QuantizedMatrix, order: &InputOrder) -> QuantizedMatrix {
    let width = matrix.scheme.format.scale_kind().words();
    QuantizedMatrix {
        codes: gathered(order, &matrix.codes, 1),
        scales: gathered(order, &matrix.scales, width),
        zeros: gathered(order, &matrix.zeros, width),
        super_scales: gathered(order, &matrix.super_scales, 1),
        super_minima: gathered(order, &matrix.super_minima, 1),
        ..*matrix
    }
}

impl ExpertWeights {
    /// The same expert as stacks have it: gate and up read their input in one order, and down the hidden vector as they
    /// write it, in an order that its own was folded into. Where that cannot be, weights become dense
    /// ([`Weight::in_channel_order`]). The second value says whether inputs and the hidden vector are in the order of channels.
    pub(crate) fn in_stack_order(self) -> Result<(Self, bool)> {
        let Self { mut gate, mut up, mut down } = self;
        let mut moved = false;
        if gate.input_order != up.input_order {
            (gate, up) = (gate.in_channel_order()?, up.in_channel_order()?);
        }
        if let Some(order) = &down.input_order {
            match (gate.with_outputs(order)?, up.with_outputs(order)?) {
                (Some(ordered_gate), Some(ordered_up)) => {
                    (gate, up) = (ordered_gate, ordered_up);
                    (down.input_order, moved) = (None, true);
                }
                _ => down = down.in_channel_order()?,
            }
        }
        let channel_order = !moved && gate.input_order.is_none();
        Ok((Self { gate, up, down }, channel_order))
    }
}

#[cfg(test)]
mod tests {
    use marlin_formats::{Format, Scheme};

    use super::*;
    use crate::linear::{Activation, LinearArgs, Residual};
    use crate::moe::ExpertMlpArgs;
    use crate::oracle::Oracle;
    use crate::{Device, ExpertStack, Linear, LinearOps, MoeOps};

    fn assert_close(found: &[f64], expected: &[f64], tolerance: f64) {
        let error = found.iter().zip(expected).map(|(f, e)| (f - e).abs()).fold(0.0, f64::max);
        assert!(error <= tolerance, "{error} > {tolerance}");
    }

    fn quantized(n: usize, k: usize, format: Format) -> Weight {
        let values: Vec<f32> = (0..n * k).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
        let scheme = Scheme::new(format, 32).unwrap();
        Weight::quantized(QuantizedMatrix::encode(scheme, &values, n, k).unwrap()).unwrap()
    }

    fn order(k: usize) -> InputOrder {
        InputOrder::new((0..k as u32).map(|i| (i * 5 + 3) % k as u32).collect()).unwrap()
    }

    #[test]
    fn only_permutations_are_orders() {
        let message = |channels: &[u32]| InputOrder::new(channels.to_vec()).unwrap_err().to_string();
        assert!(message(&[1, 2, 0, 2]).contains("`input_order` [3] is 2 once more"));
        assert!(message(&[1, 3, 0]).contains("`input_order` [1] is 3, there are 3 channels"));
        assert!(InputOrder::new(vec![0, 1, 2]).unwrap().is_natural());
        assert!(!InputOrder::new(vec![0, 2, 1]).unwrap().is_natural());
    }

    #[test]
    fn values_are_those_of_channels() {
        let (n, k) = (3, 64);
        for format in [Format::Int4U4, Format::Int4S4, Format::Int8] {
            let plain = quantized(n, k, format);
            let ordered = plain.clone().with_input_order(order(k)).unwrap();
            let (stored, values) = (plain.to_f32().unwrap(), ordered.to_f32().unwrap());
            let dense = HostTensor::from_f32(&[n, k], &stored).unwrap();
            let dense = Weight::dense(dense).unwrap().with_input_order(order(k)).unwrap();
            assert!(dense.input_order.is_none(), "dense values are sorted");
            assert_eq!(dense.to_f32().unwrap(), values);
            for (i, &channel) in order(k).channels().iter().enumerate() {
                for row in 0..n {
                    assert_eq!(values[row * k + channel as usize], stored[row * k + i]);
                }
            }
            let plain = ordered.in_channel_order().unwrap();
            assert_eq!(plain.format_name(), "F16");
            let error = |(a, b): (&f32, &f32)| (a - b).abs() / b.abs().max(1e-3);
            assert!(plain.to_f32().unwrap().iter().zip(&values).map(error).fold(0.0, f32::max) < 1e-3);
        }
    }

    #[test]
    fn bad_orders_are_refused() {
        let weight = quantized(2, 64, Format::Int4U4);
        let error = weight.clone().with_input_order(order(32)).unwrap_err().to_string();
        assert!(error.contains("`input_order` has shape [32], expected [64]"), "{error}");
        let natural = InputOrder::new((0..64).collect()).unwrap();
        assert!(weight.with_input_order(natural).unwrap().input_order.is_none());
    }

    #[test]
    fn outputs_change_places_with_all_that_is_theirs() {
        let n = 8;
        for format in Format::ENCODABLE.into_iter().filter(|format| format.check_group_size(32).is_ok()) {
            let weight = quantized(n, 64, format).with_bias((0..n).map(|n| n as f32).collect()).unwrap();
            let moved = weight.with_outputs(&order(n)).unwrap().unwrap();
            let (values, expected) = (moved.to_f32().unwrap(), weight.to_f32().unwrap());
            for (place, &from) in order(n).channels().iter().enumerate() {
                assert_eq!(values[place * 64..][..64], expected[from as usize * 64..][..64], "{format}");
                assert_eq!(moved.bias.as_ref().unwrap()[place], from as f32);
            }
        }
    }

    fn dense(weight: &Weight) -> Weight {
        let dims = [weight.out_features(), weight.in_features()];
        Weight::dense(HostTensor::from_f32(&dims, &weight.to_f32().unwrap()).unwrap()).unwrap()
    }

    #[test]
    fn products_are_those_of_the_values_by_channel() {
        let oracle = Oracle::new();
        let weight = quantized(5, 64, Format::Int4U4).with_input_order(order(64)).unwrap();
        let x: Vec<f32> = (0..128).map(|i| (i * 29 % 53) as f32 / 20.0 - 1.0).collect();
        let x = oracle.upload(&HostTensor::from_f32(&[2, 64], &x).unwrap()).unwrap();
        let [found, expected] = [weight.clone(), dense(&weight)].map(|weight| {
            let mut out = oracle.zeros(DType::F32, &[2, 5]).unwrap();
            let weight = Linear::new(&oracle, weight).unwrap();
            let (activation, out_scale, residual) = (Activation::None, 1.0, Residual::None);
            oracle
                .linear(LinearArgs { x: &x, weight: &weight, activation, out_scale, residual, out: &mut out })
                .unwrap();
            oracle.read_f64(&out).unwrap()
        });
        assert_close(&found, &expected, 1e-6);
    }

    #[test]
    fn experts_in_any_order_are_the_same_experts() {
        let oracle = Oracle::new();
        let (hidden, intermediate) = (64, 96);
        let plain = |n, k| quantized(n, k, Format::Int4U4);
        let other = InputOrder::new((0..hidden as u32).rev().collect()).unwrap();
        let gate =
            plain(intermediate, hidden).with_bias((0..intermediate).map(|n| n as f32 / 100.0).collect()).unwrap();
        let up = plain(intermediate, hidden);
        let down = plain(hidden, intermediate).with_input_order(order(intermediate)).unwrap();
        let in_order = |weight: &Weight, order: &InputOrder| weight.clone().with_input_order(order.clone()).unwrap();
        let dense_up = dense(&up);
        let eight_bits = quantized(hidden, intermediate, Format::Int8).with_input_order(order(intermediate)).unwrap();
        let cases = [
            (in_order(&gate, &order(hidden)), in_order(&up, &order(hidden)), down.clone(), false),
            (in_order(&gate, &order(hidden)), in_order(&up, &other), down.clone(), true),
            (gate.clone(), in_order(&up, &other), plain(hidden, intermediate), true),
            (gate, dense_up, eight_bits, false),
        ];
        let x: Vec<f32> = (0..2 * hidden).map(|i| (i * 29 % 53) as f32 / 20.0 - 1.0).collect();
        let x = oracle.upload(&HostTensor::from_f32(&[2, hidden], &x).unwrap()).unwrap();
        let ids = oracle.upload(&HostTensor::from_u32(&[2, 1], &[0, 0]).unwrap()).unwrap();
        let weights = oracle.upload(&HostTensor::from_f32(&[2, 1], &[1.0, 0.5]).unwrap()).unwrap();
        for (gate, up, down, rounded) in cases {
            let plain = ExpertWeights {
                gate: Weight { bias: gate.bias.clone(), ..dense(&gate) },
                up: dense(&up),
                down: dense(&down),
            };
            let [found, expected] = [ExpertWeights { gate, up, down }, plain].map(|expert| {
                let experts = ExpertStack::new(&oracle, vec![expert]).unwrap();
                if rounded {
                    assert_ne!(experts.format_name(), "int4_u4", "what became dense says so");
                }
                let mut out = oracle.zeros(DType::F32, &[2, hidden]).unwrap();
                let (activation, residual) = (Activation::Silu, Residual::None);
                let args = ExpertMlpArgs {
                    x: &x,
                    ids: &ids,
                    weights: &weights,
                    experts: &experts,
                    activation,
                    residual,
                    out: &mut out,
                };
                oracle.moe_expert_mlp(args).unwrap();
                oracle.read_f64(&out).unwrap()
            });
            let size = expected.iter().fold(0.0f64, |size, v| size.max(v.abs()));
            assert!(size > 0.1);
            assert_close(&found, &expected, size * if rounded { 2e-3 } else { 1e-6 });
        }
    }

    #[test]
    fn orders_that_do_not_fit_are_no_linear_layers() {
        let refused = |weight: Weight| Linear::new(&Oracle::new(), weight).err().unwrap().to_string();
        let short = Weight { input_order: Some(order(32)), ..quantized(2, 64, Format::Int4U4) };
        assert_eq!(refused(short.clone()), "weight: `input_order` has shape [32], expected [64]");
        let of_dense = Weight { input_order: Some(order(64)), ..dense(&quantized(2, 64, Format::Int4U4)) };
        assert_eq!(refused(of_dense), "weight: `input_order` goes with F32");
        let expert = ExpertWeights { gate: short.clone(), up: short, down: quantized(64, 2, Format::Int4U4) };
        assert!(ExpertStack::new(&Oracle::new(), vec![expert]).is_err());
    }

    #[test]
    fn values_beyond_f16_stay_f32() {
        let mut matrix = match quantized(2, 64, Format::Int4U4).data {
            WeightData::Quantized(matrix) => matrix,
            _ => unreachable!(),
        };
        matrix.scales.fill(f16::from_f32(3e4).to_bits());
        let weight = Weight::quantized(matrix).unwrap().with_input_order(order(64)).unwrap();
        let dense = weight.clone().in_channel_order().unwrap();
        assert_eq!(dense.format_name(), "F32");
        assert_eq!(dense.to_f32().unwrap(), weight.to_f32().unwrap());
    }
}

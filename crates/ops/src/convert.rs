//! Float conversion and decoded weights (operations.md: convert_float, dequant_*).

use crate::profile::{self, Cost, Operation};
use crate::{Device, Linear, OpError, Result, Tensor, check};

/// In which order a decoded weight lies.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum WeightOrder {
    /// `[output features, K]`, as checkpoints store it.
    OutputMajor,
    /// `[K, output features]`, as kernels read it.
    InputMajor,
}

/// Decodes some output features of a weight; its bias is left out.
pub struct DequantizeArgs<'a, D: Device> {
    /// `[K, N]` in any format, rows in the order of channels.
    pub weight: &'a Linear<D>,
    /// The first output feature.
    pub first: usize,
    /// What `out` means.
    pub order: WeightOrder,
    /// `[count, K]` or `[K, count]`, float: `(level - zero) * scale` in f32, rounded once more to its dtype.
    pub out: &'a mut Tensor<D>,
}

impl<D: Device> DequantizeArgs<'_, D> {
    /// Output features to decode.
    pub fn count(&self) -> usize {
        match self.order {
            WeightOrder::OutputMajor => self.out.rows(),
            WeightOrder::InputMajor => self.out.columns(),
        }
    }

    fn check(&self) -> Result<()> {
        const OP: &str = "dequantize";
        check::float(OP, "out", self.out)?;
        self.weight.check_channel_order(OP, "weight")?;
        let (k, n) = (self.weight.in_features(), self.weight.out_features());
        let count = self.count();
        match self.order {
            WeightOrder::OutputMajor => check::dims(OP, "out", self.out, &[count, k])?,
            WeightOrder::InputMajor => check::dims(OP, "out", self.out, &[k, count])?,
        }
        if self.first.checked_add(count).is_none_or(|end| end > n) {
            let reason = format!("is {}: with {count} features that is beyond the {n} of the weight", self.first);
            return Err(OpError::value(OP, "first", reason));
        }
        Ok(())
    }

    fn cost(&self) -> Cost {
        let share = self.weight.size_in_bytes() * self.count() / self.weight.out_features().max(1);
        Cost::default().add_weights(share).add_activations(&[self.out])
    }
}

/// The conversion family.
pub trait ConvertOps: Device {
    /// Body of [`ConvertOps::convert`]; arguments are checked.
    fn run_convert(&self, x: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()>;

    /// Body of [`ConvertOps::dequantize`]; arguments are checked.
    fn run_dequantize(&self, args: DequantizeArgs<'_, Self>) -> Result<()>;

    /// Decodes a weight, or some of its output features.
    fn dequantize(&self, args: DequantizeArgs<'_, Self>) -> Result<()> {
        const OP: &str = "dequantize";
        args.check()?;
        if args.out.elements() == 0 {
            return Ok(());
        }
        let operation = Operation::new("convert", OP).with_weights(args.weight.format_name());
        profile::run(self, operation, args, DequantizeArgs::cost, Self::run_dequantize)
    }

    /// Rounds every element to the dtype of `out`, to nearest even; NaN stays NaN (quiet, sign and leading payload
    /// kept), overflow gives infinity. Shapes must agree.
    fn convert(&self, x: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        const OP: &str = "convert";
        check::float(OP, "x", x)?;
        check::float(OP, "out", out)?;
        check::dims(OP, "out", out, x.dims())?;
        if x.elements() == 0 {
            return Ok(());
        }
        let cost = |(x, out): &(&Tensor<Self>, &mut Tensor<Self>)| Cost::default().add_activations(&[x, out]);
        profile::run(self, Operation::new("convert", OP), (x, out), cost, |device, (x, out)| device.run_convert(x, out))
    }
}

//! Float conversion (operations.md: convert_float).

use crate::profile::{self, Cost, Operation};
use crate::{Device, Result, Tensor, check};

/// The conversion family.
pub trait ConvertOps: Device {
    /// Body of [`ConvertOps::convert`]; arguments are checked.
    fn run_convert(&self, x: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()>;

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

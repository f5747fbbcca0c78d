//! Epilogues on their own (operations.md: epilogue_apply).

use super::{Activation, Residual};
use crate::profile::{Arithmetic, Cost};
use crate::{Device, Result, Tensor, check};

pub(super) const OP: &str = "apply_epilogue";

/// `x[m,n] = act(x[m,n] + bias[n]) * out_scale + residual[m,n]` in place, in f32 with one rounding.
pub struct EpilogueArgs<'a, D: Device> {
    /// `[M, N]`, overwritten.
    pub x: &'a mut Tensor<D>,
    /// `[N]`.
    pub bias: Option<&'a Tensor<D>>,
    /// Applied after the bias.
    pub activation: Activation,
    /// Applied after the activation; 1 for none.
    pub out_scale: f32,
    /// Added last; in place it is the previous contents of `x`.
    pub residual: Residual<'a, D>,
}

impl<D: Device> EpilogueArgs<'_, D> {
    pub(super) fn check(&self) -> Result<()> {
        let (m, n) = (self.x.rows(), self.x.columns());
        check::float(OP, "x", self.x)?;
        if let Some(bias) = self.bias {
            check::dims(OP, "bias", bias, &[n])?;
            check::float(OP, "bias", bias)?;
        }
        check::finite(OP, "out_scale", self.out_scale)?;
        if let Residual::Add(residual) = self.residual {
            check::rows_columns(OP, "residual", residual, m, n)?;
            check::float(OP, "residual", residual)?;
        }
        Ok(())
    }

    pub(super) fn cost(&self) -> Cost {
        let cost = Cost::default().add_flops(Arithmetic::F32, 4 * self.x.elements());
        let cost = cost.add_activations(&[self.x, self.x]);
        let cost = if let Residual::Add(residual) = self.residual { cost.add_activations(&[residual]) } else { cost };
        self.bias.map_or(cost, |bias| cost.add_weights(bias.size_in_bytes()))
    }
}

//! The load-balancing loss of a router (operations.md: moe_aux_loss; Switch Transformer, equations 4 to 6).

use marlin_formats::DType;

use crate::profile::{Arithmetic, Cost};
use crate::{Device, OpError, Result, Tensor, check};

pub(super) const OP: &str = "moe_aux_loss";

/// `load[e] = sum_t p[t,e]`, p the softmax over all experts; `counts[e]` the assignments to e;
/// `loss = E sum_e (counts[e] / T') (load[e] / T')` over the T' tokens that are not masked. A perfect balance gives k.
/// Loads and counts of several layers may be added up.
pub struct AuxLossArgs<'a, D: Device> {
    /// `[T, E]` F32.
    pub logits: &'a Tensor<D>,
    /// `[T, k]` U32.
    pub ids: &'a Tensor<D>,
    /// `[T]` U32; a token of mask 0 is padding, whose logits and ids are not looked at.
    pub mask: Option<&'a Tensor<D>>,
    /// `[E]` F32.
    pub load: &'a mut Tensor<D>,
    /// `[E]` U32.
    pub counts: &'a mut Tensor<D>,
    /// `[1]` F32.
    pub loss: &'a mut Tensor<D>,
}

impl<D: Device> AuxLossArgs<'_, D> {
    pub(super) fn check(&self) -> Result<()> {
        let (tokens, experts) = (self.logits.rows(), self.logits.columns());
        check::dtype(OP, "logits", self.logits, DType::F32)?;
        if tokens == 0 || experts == 0 {
            return Err(OpError::shape(OP, "logits", self.logits.dims(), "at least one token and one expert"));
        }
        check::dtype(OP, "ids", self.ids, DType::U32)?;
        check::rows_columns(OP, "ids", self.ids, tokens, self.ids.columns())?;
        if let Some(mask) = self.mask {
            check::dtype(OP, "mask", mask, DType::U32)?;
            check::dims(OP, "mask", mask, &[tokens])?;
        }
        check::dtype(OP, "load", self.load, DType::F32)?;
        check::dims(OP, "load", self.load, &[experts])?;
        check::dtype(OP, "counts", self.counts, DType::U32)?;
        check::dims(OP, "counts", self.counts, &[experts])?;
        check::dtype(OP, "loss", self.loss, DType::F32)?;
        check::dims(OP, "loss", self.loss, &[1])
    }

    pub(super) fn cost(&self) -> Cost {
        let cost = Cost::default().add_flops(Arithmetic::F32, 4 * self.logits.elements());
        let cost = cost.add_activations(&[self.logits, self.ids, self.load, self.counts, self.loss]);
        self.mask.map_or(cost, |mask| cost.add_activations(&[mask]))
    }
}

/// The error of a router logit that is NaN or +inf, or of a token with only -inf.
pub fn aux_logit_error(token: usize) -> OpError {
    OpError::value(OP, "logits", format!("row {token} holds NaN or +inf, or only -inf"))
}

/// The error of an expert id outside the layer.
pub fn aux_id_error(index: usize) -> OpError {
    OpError::value(OP, "ids", format!("[{index}] is no expert of this layer"))
}

/// The error of a mask that leaves no token.
pub fn no_token_error() -> OpError {
    OpError::value(OP, "mask", "leaves no token")
}

//! Row norms (operations.md: rms_norm, layer_norm).

use crate::profile::{self, Arithmetic, Cost, Operation};
use crate::{Device, Result, Tensor, check};

const FAMILY: &str = "norm";

/// `out = x / sqrt(mean_k x^2 + eps) * (gamma + gamma_offset)` per row of the last dimension.
pub struct RmsNormArgs<'a, D: Device> {
    /// `[.., K]`.
    pub x: &'a Tensor<D>,
    /// Added to `x` first; the sum is written back here (`h = x + residual`, the norm reads `h`).
    pub residual: Option<&'a mut Tensor<D>>,
    /// `[K]`, or none for all ones.
    pub gamma: Option<&'a Tensor<D>>,
    /// 0, or 1 for models that store `gamma - 1`.
    pub gamma_offset: f32,
    /// Inside the root, above 0.
    pub eps: f32,
    /// Shaped like `x`.
    pub out: &'a mut Tensor<D>,
}

/// [`RmsNormArgs`] with output over input: per-head norms of q and k.
pub struct RmsNormInPlaceArgs<'a, D: Device> {
    /// `[.., K]`, overwritten.
    pub x: &'a mut Tensor<D>,
    /// `[K]`.
    pub gamma: &'a Tensor<D>,
    /// 0 or 1.
    pub gamma_offset: f32,
    /// Inside the root, above 0.
    pub eps: f32,
}

/// `out = (x - mean) / sqrt(var + eps) * gamma + beta`, biased variance, per row of the last dimension.
pub struct LayerNormArgs<'a, D: Device> {
    /// `[.., K]`.
    pub x: &'a Tensor<D>,
    /// Added to `x` first; the sum is written back here.
    pub residual: Option<&'a mut Tensor<D>>,
    /// `[K]`.
    pub gamma: &'a Tensor<D>,
    /// `[K]`.
    pub beta: Option<&'a Tensor<D>>,
    /// Inside the root, above 0.
    pub eps: f32,
    /// Shaped like `x`.
    pub out: &'a mut Tensor<D>,
}

/// A norm of `x` into `out` with `per_element` FLOPs; a residual is read, its sum is written and counts one more.
fn cost<D: Device>(
    x: &Tensor<D>,
    residual: Option<&Tensor<D>>,
    weights: &[Option<&Tensor<D>>],
    out: &Tensor<D>,
    per_element: usize,
) -> Cost {
    let weights: usize = weights.iter().flatten().map(|w| w.size_in_bytes()).sum();
    let flops = (per_element + usize::from(residual.is_some())) * x.elements();
    let cost = Cost::default().add_flops(Arithmetic::F32, flops).add_weights(weights).add_activations(&[x, out]);
    residual.map_or(cost, |residual| cost.add_activations(&[residual, residual]))
}

impl<D: Device> RmsNormArgs<'_, D> {
    fn cost(&self) -> Cost {
        cost(self.x, self.residual.as_deref(), &[self.gamma], self.out, 4)
    }
}

impl<D: Device> RmsNormInPlaceArgs<'_, D> {
    fn cost(&self) -> Cost {
        cost(self.x, None, &[Some(self.gamma)], self.x, 4)
    }
}

impl<D: Device> LayerNormArgs<'_, D> {
    fn cost(&self) -> Cost {
        cost(self.x, self.residual.as_deref(), &[Some(self.gamma), self.beta], self.out, 7)
    }
}

/// The norm family.
pub trait NormOps: Device {
    /// Body of [`NormOps::rms_norm`]; arguments are checked.
    fn run_rms_norm(&self, args: RmsNormArgs<'_, Self>) -> Result<()>;

    /// Body of [`NormOps::rms_norm_in_place`]; arguments are checked.
    fn run_rms_norm_in_place(&self, args: RmsNormInPlaceArgs<'_, Self>) -> Result<()>;

    /// Body of [`NormOps::layer_norm`]; arguments are checked.
    fn run_layer_norm(&self, args: LayerNormArgs<'_, Self>) -> Result<()>;

    /// RMS norm, optionally after adding a residual.
    fn rms_norm(&self, args: RmsNormArgs<'_, Self>) -> Result<()> {
        const OP: &str = "rms_norm";
        let columns = args.x.columns();
        check::float(OP, "x", args.x)?;
        check::float(OP, "out", args.out)?;
        check::dims(OP, "out", args.out, args.x.dims())?;
        if let Some(residual) = &args.residual {
            check::dims(OP, "residual", residual, args.x.dims())?;
            check::float(OP, "residual", residual)?;
        }
        if let Some(gamma) = args.gamma {
            check::dims(OP, "gamma", gamma, &[columns])?;
            check::float(OP, "gamma", gamma)?;
        }
        check::finite(OP, "gamma_offset", args.gamma_offset)?;
        check::positive(OP, "eps", args.eps)?;
        if args.x.elements() == 0 {
            return Ok(());
        }
        profile::run(self, Operation::new(FAMILY, OP), args, RmsNormArgs::cost, Self::run_rms_norm)
    }

    /// RMS norm of each row, in place.
    fn rms_norm_in_place(&self, args: RmsNormInPlaceArgs<'_, Self>) -> Result<()> {
        const OP: &str = "rms_norm_in_place";
        check::float(OP, "x", args.x)?;
        check::dims(OP, "gamma", args.gamma, &[args.x.columns()])?;
        check::float(OP, "gamma", args.gamma)?;
        check::finite(OP, "gamma_offset", args.gamma_offset)?;
        check::positive(OP, "eps", args.eps)?;
        if args.x.elements() == 0 {
            return Ok(());
        }
        profile::run(self, Operation::new(FAMILY, OP), args, RmsNormInPlaceArgs::cost, Self::run_rms_norm_in_place)
    }

    /// Layer norm, optionally after adding a residual.
    fn layer_norm(&self, args: LayerNormArgs<'_, Self>) -> Result<()> {
        const OP: &str = "layer_norm";
        let columns = args.x.columns();
        check::float(OP, "x", args.x)?;
        check::float(OP, "out", args.out)?;
        check::dims(OP, "out", args.out, args.x.dims())?;
        if let Some(residual) = &args.residual {
            check::dims(OP, "residual", residual, args.x.dims())?;
            check::float(OP, "residual", residual)?;
        }
        check::dims(OP, "gamma", args.gamma, &[columns])?;
        check::float(OP, "gamma", args.gamma)?;
        if let Some(beta) = args.beta {
            check::dims(OP, "beta", beta, &[columns])?;
            check::float(OP, "beta", beta)?;
        }
        check::positive(OP, "eps", args.eps)?;
        if args.x.elements() == 0 {
            return Ok(());
        }
        profile::run(self, Operation::new(FAMILY, OP), args, LayerNormArgs::cost, Self::run_layer_norm)
    }
}

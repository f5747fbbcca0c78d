//! Gated MLP: `down(act(gate x) * (up x))`.

use marlin_ops::linear::{Activation, GatedUpArgs, InputNorm};
use marlin_ops::{Backend, Linear, Tensor};

use super::{Probe, project_onto};
use crate::error::Result;
use crate::loader::Loader;

/// A dense MLP, a shared expert, or (while calibrating) one routed expert.
pub(crate) struct Mlp<B: Backend> {
    /// Module name below the decoder layer, such as `mlp` or `mlp.shared_experts`.
    name: String,
    activation: Activation,
    gate_proj: Linear<B>,
    up_proj: Linear<B>,
    down_proj: Linear<B>,
}

impl<B: Backend> Mlp<B> {
    /// Loads `{name}.{gate,up,down}_proj` below the loader's prefix.
    pub(crate) fn load(loader: &mut Loader<'_, B>, name: &str, activation: Activation) -> Result<Self> {
        let mut linear = |part: &str| loader.linear(&format!("{name}.{part}"));
        let projections = [linear("gate_proj")?, linear("up_proj")?, linear("down_proj")?];
        Ok(Self::new(name.to_owned(), activation, projections))
    }

    /// An MLP of prepared projections.
    pub(crate) fn new(name: String, activation: Activation, [gate_proj, up_proj, down_proj]: [Linear<B>; 3]) -> Self {
        Self { name, activation, gate_proj, up_proj, down_proj }
    }

    /// Adds the MLP of `x`, `[rows, hidden]`, to `out`; `inner` is scratch for `[rows, intermediate]`.
    pub(crate) fn forward_onto(
        &self,
        backend: &B,
        x: &Tensor<B>,
        inner: &mut Tensor<B>,
        out: &mut Tensor<B>,
        probe: &mut Probe<'_>,
    ) -> Result<()> {
        self.gate(backend, x, None, inner, probe)?;
        self.project_down(backend, inner, out, probe)
    }

    /// `inner = act(gate x) * (up x)`, x normalised first where a norm is given.
    pub(crate) fn gate(
        &self,
        backend: &B,
        x: &Tensor<B>,
        norm: Option<InputNorm<'_, B>>,
        inner: &mut Tensor<B>,
        probe: &mut Probe<'_>,
    ) -> Result<()> {
        let name = &self.name;
        probe.see_each(backend, [format_args!("{name}.gate_proj"), format_args!("{name}.up_proj")], x)?;
        inner.reshape(&[x.rows(), self.gate_proj.out_features()])?;
        backend.gated_up(GatedUpArgs {
            x,
            norm,
            gate: &self.gate_proj,
            up: &self.up_proj,
            activation: self.activation,
            out: inner,
        })?;
        Ok(())
    }

    /// Adds the rest of the MLP to `out`.
    pub(crate) fn project_down(
        &self,
        backend: &B,
        inner: &Tensor<B>,
        out: &mut Tensor<B>,
        probe: &mut Probe<'_>,
    ) -> Result<()> {
        probe.see(backend, format_args!("{}.down_proj", self.name), inner)?;
        project_onto(backend, inner, &self.down_proj, out)
    }

    /// The linear layer called `name` below the decoder layer.
    pub(crate) fn linear_mut(&mut self, name: &str) -> Option<&mut Linear<B>> {
        match name.strip_prefix(self.name.as_str())? {
            ".gate_proj" => Some(&mut self.gate_proj),
            ".up_proj" => Some(&mut self.up_proj),
            ".down_proj" => Some(&mut self.down_proj),
            _ => None,
        }
    }
}

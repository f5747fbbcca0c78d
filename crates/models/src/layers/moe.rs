//! Sparse mixture of experts: `sum_s w_s expert_{e_s}(x) + shared(x)`, experts chosen by a router.

use marlin_formats::DType;
use marlin_ops::linear::{Activation, Residual};
use marlin_ops::moe::{CombineArgs, ExpertMlpArgs, GroupArgs, RouteArgs, Routing};
use marlin_ops::{Backend, ExpertStack, HostTensor, Linear, Tensor};

use super::{Mlp, Pass, Probe, project};
use crate::config::{MlpConfig, ModelConfig};
use crate::error::Result;
use crate::loader::Loader;
use crate::scratch::Scratch;

/// In which form routed experts are prepared.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExpertForm {
    /// One stack for the backend's fused kernels.
    Stack,
    /// One MLP each, whose inputs can be observed and whose weights can be replaced.
    Separate,
}

enum Experts<B: Backend> {
    Stack(ExpertStack<B>),
    Separate(Vec<Mlp<B>>),
}

/// Router, routed experts and the optional shared expert.
pub(crate) struct Moe<B: Backend> {
    routing: Routing,
    activation: Activation,
    /// `mlp.gate`, `[experts, hidden]`, kept f32.
    router: Linear<B>,
    /// `e_score_correction_bias`, `[experts]` f32.
    correction_bias: Option<Tensor<B>>,
    experts: Experts<B>,
    shared: Option<Mlp<B>>,
}

impl<B: Backend> Moe<B> {
    /// Loads `mlp.*` below the loader's prefix.
    pub(crate) fn load(
        loader: &mut Loader<'_, B>,
        config: &ModelConfig,
        mlp: &MlpConfig,
        form: ExpertForm,
    ) -> Result<Self> {
        let MlpConfig::Moe { experts: count, intermediate, shared_intermediate, routing, correction_bias, .. } = *mlp
        else {
            unreachable!("the caller matched the kind");
        };
        let (hidden, activation) = (config.hidden_size, config.activation);
        let experts = match form {
            ExpertForm::Stack => Experts::Stack(loader.expert_stack("mlp.experts", count, hidden, intermediate)?),
            ExpertForm::Separate => {
                let linears = loader.expert_linears("mlp.experts", count, hidden, intermediate)?;
                let named = linears
                    .into_iter()
                    .enumerate()
                    .map(|(e, projections)| Mlp::new(format!("mlp.experts.{e}"), activation, projections));
                Experts::Separate(named.collect())
            }
        };
        let shared = match shared_intermediate {
            None => None,
            Some(_) => Some(Mlp::load(loader, "mlp.shared_experts", activation)?),
        };
        let correction_bias =
            if correction_bias { Some(loader.vector("mlp.gate.e_score_correction_bias")?) } else { None };
        Ok(Self { routing, activation, router: loader.linear_f32("mlp.gate")?, correction_bias, experts, shared })
    }

    /// Adds the block's output for the normalised rows in `scratch.normed` to `scratch.hidden`.
    pub(crate) fn forward(&self, pass: &Pass<'_, B>, scratch: &mut Scratch<B>, probe: &mut Probe<'_>) -> Result<()> {
        self.route(pass, scratch)?;
        match &self.experts {
            Experts::Stack(stack) => pass.backend.moe_expert_mlp(ExpertMlpArgs {
                x: &scratch.normed,
                ids: &scratch.expert_ids,
                weights: &scratch.expert_weights,
                experts: stack,
                activation: self.activation,
                residual: Residual::InPlace,
                out: &mut scratch.hidden,
            })?,
            Experts::Separate(experts) => {
                run_separately(pass.backend, experts, scratch, probe)?;
            }
        }
        if let Some(shared) = &self.shared {
            shared.forward_onto(pass.backend, &scratch.normed, &mut scratch.inner, &mut scratch.hidden, probe)?;
        }
        Ok(())
    }

    /// Expert ids and weights of every row, `[rows, top_k]`.
    fn route(&self, pass: &Pass<'_, B>, scratch: &mut Scratch<B>) -> Result<()> {
        project(pass.backend, &scratch.normed, &self.router, &mut scratch.router_logits)?;
        let chosen = [pass.rows, self.routing.top_k];
        scratch.expert_ids.reshape(&chosen)?;
        scratch.expert_weights.reshape(&chosen)?;
        pass.backend.moe_route(RouteArgs {
            logits: &scratch.router_logits,
            bias: self.correction_bias.as_ref(),
            routing: self.routing,
            ids: &mut scratch.expert_ids,
            weights: &mut scratch.expert_weights,
        })?;
        Ok(())
    }

    /// The linear layer called `name` below the decoder layer; routed experts only in [`ExpertForm::Separate`].
    pub(crate) fn linear_mut(&mut self, name: &str) -> Option<&mut Linear<B>> {
        let Experts::Separate(experts) = &mut self.experts else {
            return self.shared.as_mut()?.linear_mut(name);
        };
        experts.iter_mut().chain(&mut self.shared).find_map(|mlp| mlp.linear_mut(name))
    }
}

/// [`MoeOps::moe_expert_mlp`](marlin_ops::MoeOps::moe_expert_mlp) expert by expert, so that each one's input can be
/// observed. Allocates: for calibration only.
fn run_separately<B: Backend>(
    backend: &B,
    experts: &[Mlp<B>],
    scratch: &mut Scratch<B>,
    probe: &mut Probe<'_>,
) -> Result<()> {
    let (assignments, top_k) = (scratch.expert_ids.elements(), scratch.expert_ids.columns());
    let mut offsets = backend.zeros(DType::U32, &[experts.len() + 1])?;
    let mut permutation = backend.zeros(DType::U32, &[assignments])?;
    let mut inverse = backend.zeros(DType::U32, &[assignments])?;
    backend.moe_group(GroupArgs {
        ids: &scratch.expert_ids,
        experts: experts.len(),
        offsets: &mut offsets,
        permutation: &mut permutation,
        inverse: &mut inverse,
    })?;
    let offsets = backend.read_u32(&offsets)?;
    let permutation = backend.read_u32(&permutation)?;
    let x = backend.read_f32(&scratch.normed)?;
    let hidden = scratch.normed.columns();

    let mut sorted = Vec::with_capacity(assignments * hidden);
    for (expert, bounds) in experts.iter().zip(offsets.windows(2)) {
        let routed = &permutation[bounds[0] as usize..bounds[1] as usize];
        if routed.is_empty() {
            continue;
        }
        let mut rows = Vec::with_capacity(routed.len() * hidden);
        for &assignment in routed {
            let token = assignment as usize / top_k;
            rows.extend_from_slice(&x[token * hidden..][..hidden]);
        }
        let dims = [routed.len(), hidden];
        let rows = backend.upload(&HostTensor::from_f32(&dims, &rows)?)?;
        let mut out = backend.zeros(DType::F32, &dims)?;
        expert.forward_onto(backend, &rows, &mut scratch.inner, &mut out, probe)?;
        sorted.extend(backend.read_f32(&out)?);
    }
    let sorted = HostTensor::from_f32(&[assignments, hidden], &sorted)?;
    backend.moe_combine(CombineArgs {
        rows: &backend.upload(&sorted)?,
        inverse: &inverse,
        weights: &scratch.expert_weights,
        residual: Residual::InPlace,
        out: &mut scratch.hidden,
    })?;
    Ok(())
}

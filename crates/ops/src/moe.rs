//! Mixture of experts (operations.md section 6). Assignment `a = t k + s` is slot s of token t.

mod aux_loss;
mod grouped;

pub use aux_loss::{AuxLossArgs, aux_id_error, aux_logit_error, no_token_error};
pub use grouped::{GroupedGemmArgs, RowOrder, offsets_error, permutation_error};

use marlin_formats::DType;

use crate::linear::{Activation, Residual};
use crate::profile::{self, Arithmetic, Cost, Operation};
use crate::{Device, ExpertStack, OpError, Result, Tensor, check};

const FAMILY: &str = "moe";

/// How router logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// 1 / (1 + e^-z).
    Sigmoid,
    /// Softmax over the chosen experts' logits.
    SoftmaxSelected,
}

/// How the score of an expert group is formed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// Largest member (DeepSeek-V2).
    Max,
    /// Sum of the two largest members (DeepSeek-V3, GLM-4.x).
    TopTwoSum,
}

/// A router's rule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Routing {
    /// Experts per token.
    pub top_k: usize,
    /// Score function.
    pub scoring: Scoring,
    /// Number of equal consecutive expert groups; 1 for no group limit.
    pub n_group: usize,
    /// Groups kept.
    pub topk_group: usize,
    /// Group score.
    pub group_score: GroupScore,
    /// Divide the chosen weights by their sum + `norm_eps`.
    pub norm_topk_prob: bool,
    /// 1e-20 for DeepSeek-V3 and GLM, 0 for Qwen3.
    pub norm_eps: f32,
    /// Applied last.
    pub routed_scaling_factor: f32,
}

/// Chooses experts: the `top_k` largest of score + bias within the kept groups, weights from the scores alone. Ties go
/// to the lower expert; ids are in descending selection score.
pub struct RouteArgs<'a, D: Device> {
    /// `[T, E]` F32.
    pub logits: &'a Tensor<D>,
    /// `[E]` F32 `e_score_correction_bias`.
    pub bias: Option<&'a Tensor<D>>,
    /// The rule.
    pub routing: Routing,
    /// `[T, k]` U32.
    pub ids: &'a mut Tensor<D>,
    /// `[T, k]` F32.
    pub weights: &'a mut Tensor<D>,
}

/// Sorts assignments by expert, stably.
pub struct GroupArgs<'a, D: Device> {
    /// `[T, k]` U32.
    pub ids: &'a Tensor<D>,
    /// E.
    pub experts: usize,
    /// `[E + 1]` U32: first sorted row of each expert; the last is T k.
    pub offsets: &'a mut Tensor<D>,
    /// `[T k]` U32: sorted row -> assignment.
    pub permutation: &'a mut Tensor<D>,
    /// `[T k]` U32: assignment -> sorted row.
    pub inverse: &'a mut Tensor<D>,
}

/// `out[t] = residual[t] + sum_s weights[t,s] * (act(x_t Wg_e) * (x_t Wu_e)) Wd_e`, `e = ids[t,s]`, ascending s.
pub struct ExpertMlpArgs<'a, D: Device> {
    /// `[T, hidden]`.
    pub x: &'a Tensor<D>,
    /// `[T, k]` U32, distinct per token.
    pub ids: &'a Tensor<D>,
    /// `[T, k]` F32.
    pub weights: &'a Tensor<D>,
    /// The layer's experts.
    pub experts: &'a ExpertStack<D>,
    /// Applied to the gate.
    pub activation: Activation,
    /// Added to the result.
    pub residual: Residual<'a, D>,
    /// `[T, hidden]`.
    pub out: &'a mut Tensor<D>,
}

/// `out[t] = residual[t] + sum_s weights[t,s] rows[inverse[t k + s]]`, ascending s.
pub struct CombineArgs<'a, D: Device> {
    /// `[T k, N]` in sorted order.
    pub rows: &'a Tensor<D>,
    /// `[T k]` U32.
    pub inverse: &'a Tensor<D>,
    /// `[T, k]` F32.
    pub weights: &'a Tensor<D>,
    /// Added to the result.
    pub residual: Residual<'a, D>,
    /// `[T, N]`.
    pub out: &'a mut Tensor<D>,
}

impl<D: Device> RouteArgs<'_, D> {
    fn cost(&self) -> Cost {
        let cost = Cost::default().add_flops(Arithmetic::F32, 4 * self.logits.elements());
        let cost = cost.add_activations(&[self.logits, self.ids, self.weights]);
        self.bias.map_or(cost, |bias| cost.add_weights(bias.size_in_bytes()))
    }
}

impl<D: Device> GroupArgs<'_, D> {
    fn cost(&self) -> Cost {
        Cost::default().add_activations(&[self.ids, self.offsets, self.permutation, self.inverse])
    }
}

impl<D: Device> ExpertMlpArgs<'_, D> {
    /// `chosen` holds the values of `ids`.
    fn cost(&self, chosen: &[u32]) -> Cost {
        let cost = self.experts.cost(chosen).add_activations(&[self.x, self.ids, self.weights]);
        let weighted_sum = 2 * chosen.len() * self.experts.hidden();
        self.residual.cost(cost, self.out).add_flops(Arithmetic::F32, weighted_sum)
    }
}

impl<D: Device> CombineArgs<'_, D> {
    fn cost(&self) -> Cost {
        let cost = Cost::default().add_flops(Arithmetic::F32, 2 * self.rows.elements());
        self.residual.cost(cost.add_activations(&[self.rows, self.inverse, self.weights]), self.out)
    }
}

/// The mixture-of-experts family.
pub trait MoeOps: Device {
    /// Body of [`MoeOps::moe_route`]; shapes and the rule are checked. NaN logits are the backend's error
    /// ([`nan_logit_error`]), and so are tokens without enough experts to choose from ([`no_expert_error`]).
    fn run_moe_route(&self, args: RouteArgs<'_, Self>) -> Result<()>;

    /// Body of [`MoeOps::moe_group`]; shapes are checked. An id >= E or twice in one token is the backend's error
    /// ([`expert_id_error`], [`duplicate_expert_error`]).
    fn run_moe_group(&self, args: GroupArgs<'_, Self>) -> Result<()>;

    /// Body of [`MoeOps::moe_expert_mlp`]; shapes are checked, ids as in [`MoeOps::run_moe_group`].
    fn run_moe_expert_mlp(&self, args: ExpertMlpArgs<'_, Self>) -> Result<()>;

    /// Body of [`MoeOps::moe_combine`]; shapes are checked. An index outside `rows` is the backend's error
    /// ([`inverse_index_error`]).
    fn run_moe_combine(&self, args: CombineArgs<'_, Self>) -> Result<()>;

    /// Body of [`MoeOps::moe_aux_loss`]; shapes are checked. Bad logits and ids, and a mask that leaves no token, are
    /// the backend's errors ([`aux_logit_error`], [`aux_id_error`], [`no_token_error`]).
    fn run_moe_aux_loss(&self, args: AuxLossArgs<'_, Self>) -> Result<()>;

    /// Body of [`MoeOps::moe_grouped_gemm`]; shapes are checked, ids as in [`MoeOps::run_moe_group`]. Bad offsets and
    /// permutations are the backend's errors ([`offsets_error`], [`permutation_error`]).
    fn run_moe_grouped_gemm(&self, args: GroupedGemmArgs<'_, Self>) -> Result<()>;

    /// Expert choice and weights from router logits.
    fn moe_route(&self, args: RouteArgs<'_, Self>) -> Result<()> {
        const OP: &str = "moe_route";
        let (tokens, experts) = (args.logits.rows(), args.logits.columns());
        check::dtype(OP, "logits", args.logits, DType::F32)?;
        check_routing(OP, &args.routing, experts)?;
        if let Some(bias) = args.bias {
            check::dims(OP, "bias", bias, &[experts])?;
            check::dtype(OP, "bias", bias, DType::F32)?;
        }
        check::dtype(OP, "ids", args.ids, DType::U32)?;
        check::dims(OP, "ids", args.ids, &[tokens, args.routing.top_k])?;
        check::dtype(OP, "weights", args.weights, DType::F32)?;
        check::dims(OP, "weights", args.weights, &[tokens, args.routing.top_k])?;
        if tokens == 0 {
            return Ok(());
        }
        profile::run(self, Operation::new(FAMILY, OP), args, RouteArgs::cost, Self::run_moe_route)
    }

    /// Stable grouping of assignments by expert. T = 0 gives all-zero offsets.
    fn moe_group(&self, args: GroupArgs<'_, Self>) -> Result<()> {
        const OP: &str = "moe_group";
        check::dtype(OP, "ids", args.ids, DType::U32)?;
        if args.ids.dims().len() != 2 {
            return Err(OpError::shape(OP, "ids", args.ids.dims(), "[T, k]"));
        }
        if args.experts == 0 {
            return Err(OpError::value(OP, "experts", "is 0"));
        }
        let assignments = args.ids.elements();
        for (name, tensor, len) in [
            ("offsets", &*args.offsets, args.experts + 1),
            ("permutation", &*args.permutation, assignments),
            ("inverse", &*args.inverse, assignments),
        ] {
            check::dtype(OP, name, tensor, DType::U32)?;
            check::dims(OP, name, tensor, &[len])?;
        }
        profile::run(self, Operation::new(FAMILY, OP), args, GroupArgs::cost, Self::run_moe_group)
    }

    /// The routed experts' gated MLPs with their weighted sum.
    fn moe_expert_mlp(&self, args: ExpertMlpArgs<'_, Self>) -> Result<()> {
        const OP: &str = "moe_expert_mlp";
        let (tokens, hidden) = (args.x.rows(), args.experts.hidden());
        check::float(OP, "x", args.x)?;
        check::rows_columns(OP, "x", args.x, tokens, hidden)?;
        check::float(OP, "out", args.out)?;
        check::rows_columns(OP, "out", args.out, tokens, hidden)?;
        check::dtype(OP, "ids", args.ids, DType::U32)?;
        let top_k = args.ids.columns();
        check::dims(OP, "ids", args.ids, &[tokens, top_k])?;
        check::dtype(OP, "weights", args.weights, DType::F32)?;
        check::dims(OP, "weights", args.weights, &[tokens, top_k])?;
        if let Residual::Add(residual) = args.residual {
            check::rows_columns(OP, "residual", residual, tokens, hidden)?;
            check::float(OP, "residual", residual)?;
        }
        if tokens == 0 {
            return Ok(());
        }
        // Which experts are read is known to the device alone.
        let chosen = match profile::recorder(self) {
            Some(_) => self.read_u32(args.ids)?,
            None => Vec::new(),
        };
        let operation = Operation::new(FAMILY, OP).with_weights(args.experts.format_name());
        profile::run(self, operation, args, |args| args.cost(&chosen), Self::run_moe_expert_mlp)
    }

    /// Weighted sum of expert outputs in sorted order.
    fn moe_combine(&self, args: CombineArgs<'_, Self>) -> Result<()> {
        const OP: &str = "moe_combine";
        let &[tokens, top_k] = args.weights.dims() else {
            return Err(OpError::shape(OP, "weights", args.weights.dims(), "[T, k]"));
        };
        check::dtype(OP, "weights", args.weights, DType::F32)?;
        let columns = args.rows.columns();
        check::float(OP, "rows", args.rows)?;
        check::rows_columns(OP, "rows", args.rows, tokens * top_k, columns)?;
        check::dtype(OP, "inverse", args.inverse, DType::U32)?;
        check::dims(OP, "inverse", args.inverse, &[tokens * top_k])?;
        check::float(OP, "out", args.out)?;
        check::rows_columns(OP, "out", args.out, tokens, columns)?;
        if let Residual::Add(residual) = args.residual {
            check::rows_columns(OP, "residual", residual, tokens, columns)?;
            check::float(OP, "residual", residual)?;
        }
        if tokens == 0 {
            return Ok(());
        }
        profile::run(self, Operation::new(FAMILY, OP), args, CombineArgs::cost, Self::run_moe_combine)
    }

    /// The load-balancing loss and what it is made of.
    fn moe_aux_loss(&self, args: AuxLossArgs<'_, Self>) -> Result<()> {
        args.check()?;
        profile::run(self, Operation::new(FAMILY, aux_loss::OP), args, AuxLossArgs::cost, Self::run_moe_aux_loss)
    }

    /// Products of rows with one weight of their experts. No rows: nothing is written.
    fn moe_grouped_gemm(&self, args: GroupedGemmArgs<'_, Self>) -> Result<()> {
        args.run(self, Self::run_moe_grouped_gemm)
    }
}

fn check_routing(operation: &'static str, routing: &Routing, experts: usize) -> Result<()> {
    let Routing { top_k, n_group, topk_group, .. } = *routing;
    if n_group == 0 || experts == 0 || !experts.is_multiple_of(n_group) {
        let reason = format!("is {n_group}, must divide the {experts} experts");
        return Err(OpError::value(operation, "n_group", reason));
    }
    if topk_group == 0 || topk_group > n_group {
        let reason = format!("is {topk_group}, must be in 1..={n_group}");
        return Err(OpError::value(operation, "topk_group", reason));
    }
    let selectable = topk_group * (experts / n_group);
    if top_k == 0 || top_k > selectable {
        let reason = format!("is {top_k}, must be in 1..={selectable} selectable experts");
        return Err(OpError::value(operation, "top_k", reason));
    }
    check::finite(operation, "routed_scaling_factor", routing.routed_scaling_factor)?;
    check::finite(operation, "norm_eps", routing.norm_eps)
}

/// The error of a NaN router logit.
pub fn nan_logit_error(token: usize, expert: usize) -> OpError {
    OpError::value("moe_route", "logits", format!("[{token}, {expert}] is NaN"))
}

/// The error of a token whose logits leave fewer than `top_k` experts with a selection score above -inf.
pub fn no_expert_error(token: usize) -> OpError {
    OpError::value("moe_route", "logits", format!("row {token} leaves too few experts: the others are -inf"))
}

/// The error of an expert id outside the layer.
pub fn expert_id_error(token: usize, slot: usize, id: u32, experts: usize) -> OpError {
    let reason = format!("[{token}, {slot}] is {id}, the layer has {experts} experts");
    OpError::value("moe_group", "ids", reason)
}

/// The error of an expert chosen twice for one token.
pub fn duplicate_expert_error(token: usize, id: u32) -> OpError {
    OpError::value("moe_group", "ids", format!("[{token}] names expert {id} twice"))
}

/// The error of an inverse index outside the rows.
pub fn inverse_index_error(assignment: usize, index: u32, rows: usize) -> OpError {
    OpError::value("moe_combine", "inverse", format!("[{assignment}] is {index}, rows are {rows}"))
}

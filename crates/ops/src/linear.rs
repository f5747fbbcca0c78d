//! Linear layers, gated products and embedding look-up (operations.md: linear_dense, linear_quant, gemv_quant,
//! epilogue_apply, gemm_batched, linear_norm, linear_norm_qkv, gated_up).

mod batched;
mod epilogue;

pub use batched::{BatchStrides, BatchedMatrix, BatchedShape, BatchedWeight, GemmBatchedArgs};
pub use epilogue::EpilogueArgs;

use marlin_formats::DType;

use crate::profile::{self, Arithmetic, Cost, Operation};
use crate::{Device, Linear, OpError, Result, Tensor, check};

const FAMILY: &str = "linear";

/// Pointwise function of an epilogue or a gated product.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    /// x.
    None,
    /// max(x, 0).
    Relu,
    /// max(x, 0)^2.
    Relu2,
    /// x / (1 + e^-x).
    Silu,
    /// x (1 + erf(x / sqrt 2)) / 2.
    GeluErf,
    /// x (1 + tanh(0.7978845608028654 (x + 0.044715 x^3))) / 2.
    GeluTanh,
    /// x / (1 + e^(-1.702 x)).
    GeluQuick,
    /// 1 / (1 + e^-x).
    Sigmoid,
}

/// What an epilogue adds after scaling.
pub enum Residual<'a, D: Device> {
    /// Nothing.
    None,
    /// Another tensor shaped like the output.
    Add(&'a Tensor<D>),
    /// The output's previous contents.
    InPlace,
}

impl<D: Device> Residual<'_, D> {
    /// `cost` of an operation that writes `out` once with this addend.
    pub(crate) fn cost(&self, cost: Cost, out: &Tensor<D>) -> Cost {
        match self {
            Self::None => cost.add_activations(&[out]),
            Self::Add(residual) => cost.add_activations(&[out, residual]),
            Self::InPlace => cost.add_activations(&[out, out]),
        }
    }
}

/// `out[m,n] = act(sum_k x[m,k] W[k,n] + bias[n]) * out_scale + residual[m,n]`.
pub struct LinearArgs<'a, D: Device> {
    /// `[M, K]`, any leading dimensions flattened.
    pub x: &'a Tensor<D>,
    /// `[N, K]` with its optional bias.
    pub weight: &'a Linear<D>,
    /// Applied after the bias.
    pub activation: Activation,
    /// Applied after the activation; 1 for none.
    pub out_scale: f32,
    /// Added last.
    pub residual: Residual<'a, D>,
    /// `[M, N]`.
    pub out: &'a mut Tensor<D>,
}

/// An RMS norm of the rows that products read: `x^[m,k] = x[m,k] r_m (gamma[k] + gamma_offset)`,
/// `r_m = 1 / sqrt(mean_k x^2 + eps)`.
pub struct InputNorm<'a, D: Device> {
    /// `[K]`.
    pub gamma: &'a Tensor<D>,
    /// Added to gamma: 1 in models that store gamma - 1.
    pub gamma_offset: f32,
    /// Above 0.
    pub eps: f32,
}

impl<D: Device> Clone for InputNorm<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<D: Device> Copy for InputNorm<'_, D> {}

impl<D: Device> InputNorm<'_, D> {
    fn check(&self, operation: &'static str, columns: usize) -> Result<()> {
        check::dims(operation, "gamma", self.gamma, &[columns])?;
        check::float(operation, "gamma", self.gamma)?;
        check::finite(operation, "gamma_offset", self.gamma_offset)?;
        check::positive(operation, "eps", self.eps)
    }
}

/// One of the products of [`ProjectionsArgs`].
pub struct Projection<'a, D: Device> {
    /// `[N, K]` with its optional bias.
    pub weight: &'a Linear<D>,
    /// `[M, N]`.
    pub out: &'a mut Tensor<D>,
}

/// `out_i[m,n] = sum_k x^[m,k] W_i[k,n] + bias_i[n]`: several products of the same rows, such as queries, keys and
/// values.
pub struct ProjectionsArgs<'a, 'b, D: Device> {
    /// `[M, K]`.
    pub x: &'a Tensor<D>,
    /// What makes x^ of x; x itself without.
    pub norm: Option<InputNorm<'a, D>>,
    /// The products.
    pub projections: &'a mut [Projection<'b, D>],
}

/// `out[m,i] = act(x^ Wg)[m,i] * (x^ Wu)[m,i]`, biases of both weights included.
pub struct GatedUpArgs<'a, D: Device> {
    /// `[M, K]`.
    pub x: &'a Tensor<D>,
    /// What makes x^ of x; x itself without.
    pub norm: Option<InputNorm<'a, D>>,
    /// `[I, K]`.
    pub gate: &'a Linear<D>,
    /// `[I, K]`.
    pub up: &'a Linear<D>,
    /// Applied to the gate.
    pub activation: Activation,
    /// `[M, I]`.
    pub out: &'a mut Tensor<D>,
}

/// `out[t,:] = W[ids[t],:]`: rows of an embedding stored as a linear weight `[vocab, hidden]`.
pub struct EmbeddingArgs<'a, D: Device> {
    /// `[T]` U32.
    pub ids: &'a Tensor<D>,
    /// `[vocab, hidden]`, no bias, rows in the order of channels.
    pub table: &'a Linear<D>,
    /// `[T, hidden]`.
    pub out: &'a mut Tensor<D>,
}

impl<D: Device> LinearArgs<'_, D> {
    /// The shapes, dtypes and scalars that [`LinearOps::linear`] takes.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "linear";
        let (k, n) = (self.weight.in_features(), self.weight.out_features());
        let m = self.x.rows();
        check::rows_columns(OP, "x", self.x, m, k)?;
        check::rows_columns(OP, "out", self.out, m, n)?;
        check::float(OP, "x", self.x)?;
        check::float(OP, "out", self.out)?;
        check::finite(OP, "out_scale", self.out_scale)?;
        if let Residual::Add(residual) = self.residual {
            check::rows_columns(OP, "residual", residual, m, n)?;
            check::float(OP, "residual", residual)?;
        }
        Ok(())
    }

    fn cost(&self) -> Cost {
        let cost = self.weight.cost(self.x.rows()).add_activations(&[self.x]);
        self.residual.cost(cost, self.out)
    }
}

impl<D: Device> InputNorm<'_, D> {
    fn cost(norm: Option<&Self>, x: &Tensor<D>) -> Cost {
        match norm {
            None => Cost::default(),
            Some(norm) => {
                Cost::default().add_weights(norm.gamma.size_in_bytes()).add_flops(Arithmetic::F32, 4 * x.elements())
            }
        }
    }
}

impl<D: Device> ProjectionsArgs<'_, '_, D> {
    fn cost(&self) -> Cost {
        let mut cost = InputNorm::cost(self.norm.as_ref(), self.x).add_activations(&[self.x]);
        for projection in &*self.projections {
            cost += projection.weight.cost(self.x.rows()).add_activations(&[projection.out]);
        }
        cost
    }
}

impl<D: Device> GatedUpArgs<'_, D> {
    /// The shapes, dtypes and scalars that [`LinearOps::gated_up`] takes.
    pub fn check(&self) -> Result<()> {
        const OP: &str = "gated_up";
        let (k, n) = (self.gate.in_features(), self.gate.out_features());
        let m = self.x.rows();
        let up = [self.up.out_features(), self.up.in_features()];
        if up != [n, k] {
            return Err(OpError::shape(OP, "up", &up, format!("[{n}, {k}] like `gate`")));
        }
        if let Some(norm) = &self.norm {
            norm.check(OP, k)?;
        }
        check::rows_columns(OP, "x", self.x, m, k)?;
        check::rows_columns(OP, "out", self.out, m, n)?;
        check::float(OP, "x", self.x)?;
        check::float(OP, "out", self.out)?;
        Ok(())
    }

    fn cost(&self) -> Cost {
        let mut cost = InputNorm::cost(self.norm.as_ref(), self.x);
        cost += self.gate.cost(self.x.rows());
        cost += self.up.cost(self.x.rows());
        cost.add_activations(&[self.x, self.out])
    }
}

impl<D: Device> EmbeddingArgs<'_, D> {
    fn cost(&self) -> Cost {
        let row = self.table.size_in_bytes() / self.table.out_features().max(1);
        Cost::default().add_weights(self.ids.elements() * row).add_activations(&[self.ids, self.out])
    }
}

/// The linear family.
pub trait LinearOps: Device {
    /// Body of [`LinearOps::linear`]; arguments are checked.
    fn run_linear(&self, args: LinearArgs<'_, Self>) -> Result<()>;

    /// Body of [`LinearOps::projections`]; arguments are checked.
    fn run_projections(&self, args: ProjectionsArgs<'_, '_, Self>) -> Result<()>;

    /// Body of [`LinearOps::gated_up`]; arguments are checked.
    fn run_gated_up(&self, args: GatedUpArgs<'_, Self>) -> Result<()>;

    /// Body of [`LinearOps::embedding`]; shapes are checked, ids are not: an id outside the table is the backend's
    /// error to raise ([`embedding_id_error`]).
    fn run_embedding(&self, args: EmbeddingArgs<'_, Self>) -> Result<()>;

    /// Body of [`LinearOps::gemm_batched`]; arguments are checked.
    fn run_gemm_batched(&self, args: GemmBatchedArgs<'_, Self>) -> Result<()>;

    /// Body of [`LinearOps::apply_epilogue`]; arguments are checked.
    fn run_apply_epilogue(&self, args: EpilogueArgs<'_, Self>) -> Result<()>;

    /// A linear layer with its epilogue. M = 0 writes nothing; K = 0 gives the epilogue of 0.
    fn linear(&self, args: LinearArgs<'_, Self>) -> Result<()> {
        const OP: &str = "linear";
        args.check()?;
        let (m, n) = (args.x.rows(), args.weight.out_features());
        if m == 0 || n == 0 {
            return Ok(());
        }
        let operation = Operation::new(FAMILY, OP).with_weights(args.weight.format_name());
        profile::run(self, operation, args, LinearArgs::cost, Self::run_linear)
    }

    /// Products of several weights with the same rows, normalised on the way. M = 0 writes nothing.
    fn projections(&self, args: ProjectionsArgs<'_, '_, Self>) -> Result<()> {
        const OP: &str = "projections";
        let (m, k) = (args.x.rows(), args.x.columns());
        check::float(OP, "x", args.x)?;
        if let Some(norm) = &args.norm {
            norm.check(OP, k)?;
        }
        for Projection { weight, out } in &*args.projections {
            let n = weight.out_features();
            if weight.in_features() != k {
                return Err(OpError::shape(OP, "weight", &[n, weight.in_features()], format!("[{n}, {k}]")));
            }
            check::rows_columns(OP, "out", out, m, n)?;
            check::float(OP, "out", out)?;
        }
        if m == 0 || args.projections.is_empty() {
            return Ok(());
        }
        let mut formats = args.projections.iter().map(|p| p.weight.format_name());
        let first = formats.next().unwrap_or_default();
        let format = if formats.all(|format| format == first) { first } else { "mixed" };
        let operation = Operation::new(FAMILY, OP).with_weights(format);
        profile::run(self, operation, args, ProjectionsArgs::cost, Self::run_projections)
    }

    /// The first half of a gated MLP (SwiGLU, GeGLU, ...).
    fn gated_up(&self, args: GatedUpArgs<'_, Self>) -> Result<()> {
        const OP: &str = "gated_up";
        args.check()?;
        let (m, n) = (args.x.rows(), args.gate.out_features());
        if m == 0 || n == 0 {
            return Ok(());
        }
        let format = match args.gate.format_name() {
            gate if gate == args.up.format_name() => gate,
            _ => "mixed",
        };
        let operation = Operation::new(FAMILY, OP).with_weights(format);
        profile::run(self, operation, args, GatedUpArgs::cost, Self::run_gated_up)
    }

    /// Embedding look-up. T = 0 writes nothing; an id >= vocab is an error.
    fn embedding(&self, args: EmbeddingArgs<'_, Self>) -> Result<()> {
        const OP: &str = "embedding";
        check::dtype(OP, "ids", args.ids, DType::U32)?;
        args.table.check_channel_order(OP, "table")?;
        let tokens = args.ids.elements();
        check::rows_columns(OP, "out", args.out, tokens, args.table.in_features())?;
        check::float(OP, "out", args.out)?;
        if tokens == 0 {
            return Ok(());
        }
        let operation = Operation::new(FAMILY, OP).with_weights(args.table.format_name());
        profile::run(self, operation, args, EmbeddingArgs::cost, Self::run_embedding)
    }

    /// Products of the matrices of a batch, broadcast and grouped by strides. B, H, M or N = 0 writes nothing; K = 0
    /// gives the activation of 0.
    fn gemm_batched(&self, args: GemmBatchedArgs<'_, Self>) -> Result<()> {
        args.check()?;
        if args.shape.is_empty() {
            return Ok(());
        }
        let operation = Operation::new(FAMILY, batched::OP).with_weights(args.weight.format_name());
        profile::run(self, operation, args, GemmBatchedArgs::cost, Self::run_gemm_batched)
    }

    /// Bias, activation, scale and residual of a product that is stored already.
    fn apply_epilogue(&self, args: EpilogueArgs<'_, Self>) -> Result<()> {
        args.check()?;
        if args.x.elements() == 0 {
            return Ok(());
        }
        profile::run(self, Operation::new(FAMILY, epilogue::OP), args, EpilogueArgs::cost, Self::run_apply_epilogue)
    }
}

/// The error of an id outside the embedding table.
pub fn embedding_id_error(index: usize, id: u32, vocab: usize) -> OpError {
    OpError::value("embedding", "ids", format!("[{index}] is {id}, vocabulary has {vocab}"))
}

//! Linear layers, gated products and embedding look-up (operations.md: linear_dense, linear_quant, gemv_quant,
//! epilogue_apply, gated_up).

use marlin_formats::DType;

use crate::{Device, Linear, OpError, Result, Tensor, check};

/// Pointwise function of an epilogue or a gated product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// `out[m,i] = act(x Wg)[m,i] * (x Wu)[m,i]`, biases of both weights included.
pub struct GatedUpArgs<'a, D: Device> {
    /// `[M, K]`.
    pub x: &'a Tensor<D>,
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
    /// `[vocab, hidden]`, no bias.
    pub table: &'a Linear<D>,
    /// `[T, hidden]`.
    pub out: &'a mut Tensor<D>,
}

/// The linear family.
pub trait LinearOps: Device {
    /// Body of [`LinearOps::linear`]; arguments are checked.
    fn run_linear(&self, args: LinearArgs<'_, Self>) -> Result<()>;

    /// Body of [`LinearOps::gated_up`]; arguments are checked.
    fn run_gated_up(&self, args: GatedUpArgs<'_, Self>) -> Result<()>;

    /// Body of [`LinearOps::embedding`]; shapes are checked, ids are not: an id outside the table is the backend's
    /// error to raise ([`embedding_id_error`]).
    fn run_embedding(&self, args: EmbeddingArgs<'_, Self>) -> Result<()>;

    /// A linear layer with its epilogue. M = 0 writes nothing; K = 0 gives the epilogue of 0.
    fn linear(&self, args: LinearArgs<'_, Self>) -> Result<()> {
        const OP: &str = "linear";
        let (k, n) = (args.weight.in_features(), args.weight.out_features());
        let m = args.x.rows();
        check::rows_columns(OP, "x", args.x, m, k)?;
        check::rows_columns(OP, "out", args.out, m, n)?;
        check::float(OP, "x", args.x)?;
        check::float(OP, "out", args.out)?;
        check::finite(OP, "out_scale", args.out_scale)?;
        if let Residual::Add(residual) = args.residual {
            check::rows_columns(OP, "residual", residual, m, n)?;
            check::float(OP, "residual", residual)?;
        }
        if m == 0 || n == 0 {
            return Ok(());
        }
        self.run_linear(args)
    }

    /// The first half of a gated MLP (SwiGLU, GeGLU, ...).
    fn gated_up(&self, args: GatedUpArgs<'_, Self>) -> Result<()> {
        const OP: &str = "gated_up";
        let (k, n) = (args.gate.in_features(), args.gate.out_features());
        let m = args.x.rows();
        let up = [args.up.out_features(), args.up.in_features()];
        if up != [n, k] {
            return Err(OpError::shape(OP, "up", &up, format!("[{n}, {k}] like `gate`")));
        }
        check::rows_columns(OP, "x", args.x, m, k)?;
        check::rows_columns(OP, "out", args.out, m, n)?;
        check::float(OP, "x", args.x)?;
        check::float(OP, "out", args.out)?;
        if m == 0 || n == 0 {
            return Ok(());
        }
        self.run_gated_up(args)
    }

    /// Embedding look-up. T = 0 writes nothing; an id >= vocab is an error.
    fn embedding(&self, args: EmbeddingArgs<'_, Self>) -> Result<()> {
        const OP: &str = "embedding";
        check::dtype(OP, "ids", args.ids, DType::U32)?;
        let tokens = args.ids.elements();
        check::rows_columns(OP, "out", args.out, tokens, args.table.in_features())?;
        check::float(OP, "out", args.out)?;
        if tokens == 0 {
            return Ok(());
        }
        self.run_embedding(args)
    }
}

/// The error of an id outside the embedding table.
pub fn embedding_id_error(index: usize, id: u32, vocab: usize) -> OpError {
    OpError::value("embedding", "ids", format!("[{index}] is {id}, vocabulary has {vocab}"))
}

//! Launches beyond the operations of a backend: a kernel chosen by hand, or a stage of an operation.

use marlin_formats::DType;
use marlin_ops::attention::{AttentionArgs, PagedAttentionArgs};
use marlin_ops::linear::{GatedUpArgs, LinearArgs};
use marlin_ops::moe::ExpertMlpArgs;
use marlin_ops::{Backend, OpError, Result, Tensor};

/// Which linear kernel to launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinearKernel {
    /// Weights straight from memory to registers.
    Gemv {
        /// Rows that share one pass over the weights.
        rows: usize,
        /// Outputs of a unit.
        columns: usize,
        /// Units side by side along the outputs.
        lanes: usize,
    },
    /// Tiles through shared memory.
    Matrix(MatrixTile),
    /// As `Matrix`, the inputs split into slices, partial sums joined in ascending order by a second launch.
    SplitK {
        /// The tile.
        tile: MatrixTile,
        /// How many slices.
        slices: usize,
    },
    /// As `Matrix`, all steps of all tiles shared out evenly.
    StreamK {
        /// The tile.
        tile: MatrixTile,
        /// How many workers.
        workers: usize,
    },
}

/// The tile of a workgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixTile {
    /// Rows.
    pub m: usize,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Units of the workgroup.
    pub units: usize,
    /// Tiles in flight.
    pub stages: usize,
    /// F16 or F32.
    pub accumulate: DType,
}

/// Which attention kernel to launch. A device may round tiles up to the sizes that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionKernel {
    /// Queries, or queries of a key head's group, in a workgroup.
    pub q_tile: usize,
    /// Keys in shared memory at once.
    pub kv_tile: usize,
    /// Parts of the keys that are joined by a second launch.
    pub splits: usize,
}

/// How experts are shared out among workgroups.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertKernel {
    /// A workgroup for each assignment and stretch of outputs.
    Parallel,
    /// One launch for gate, up, activation and down.
    Fused,
    /// Assignments sorted by expert; a workgroup for each tile of rows of one expert.
    Grouped {
        /// Rows.
        m: usize,
        /// Outputs.
        n: usize,
        /// Inputs.
        k: usize,
    },
}

/// What a device can launch besides its operations. Where a device has no such launch the method says so with
/// [`OpError::Unsupported`].
pub trait Variants<B: Backend> {
    /// Whether the device is to have every launch: on others those that are missing need a GPU.
    const GPU: bool;

    /// `linear` by this kernel.
    fn linear(&self, backend: &B, kernel: LinearKernel, args: LinearArgs<'_, B>) -> Result<()> {
        let _ = args;
        missing_linear(backend, kernel)
    }

    /// `gated_up` by this kernel.
    fn gated_up(&self, backend: &B, kernel: LinearKernel, args: GatedUpArgs<'_, B>) -> Result<()> {
        let _ = args;
        missing_linear(backend, kernel)
    }

    /// `attention` by this kernel.
    fn attention(&self, backend: &B, kernel: AttentionKernel, args: AttentionArgs<'_, B>) -> Result<()> {
        let _ = args;
        let AttentionKernel { q_tile, kv_tile, splits } = kernel;
        missing(backend, "attention", format!("a tile of {q_tile} queries and {kv_tile} keys, {splits} splits"))
    }

    /// `paged_attention` by this kernel.
    fn paged_attention(&self, backend: &B, kernel: AttentionKernel, args: PagedAttentionArgs<'_, B>) -> Result<()> {
        let _ = args;
        let AttentionKernel { q_tile, kv_tile, splits } = kernel;
        missing(backend, "paged_attention", format!("a tile of {q_tile} queries and {kv_tile} keys, {splits} splits"))
    }

    /// `moe_expert_mlp` by this kernel.
    fn expert_mlp(&self, backend: &B, kernel: ExpertKernel, args: ExpertMlpArgs<'_, B>) -> Result<()> {
        let _ = args;
        missing(backend, "moe_expert_mlp", format!("experts by a kernel chosen by hand, {kernel:?}"))
    }

    /// `convert` with every value rounded toward zero.
    fn convert_toward_zero(&self, backend: &B, x: &Tensor<B>, out: &mut Tensor<B>) -> Result<()> {
        let _ = (x, out);
        missing(backend, "convert", "rounding toward zero".into())
    }

    /// `p = softmax(x)` by rows.
    fn softmax(&self, backend: &B, x: &Tensor<B>, out: &mut Tensor<B>) -> Result<()> {
        let _ = (x, out);
        missing(backend, "softmax", "softmax of rows as an operation".into())
    }
}

/// The error of a linear kernel that a device lacks.
pub(crate) fn missing_linear<B: Backend>(backend: &B, kernel: LinearKernel) -> Result<()> {
    let what = match kernel {
        LinearKernel::Gemv { rows, columns, lanes } => {
            format!("a kernel for {rows} rows by {lanes} units of {columns} outputs")
        }
        LinearKernel::Matrix(tile) => format!("a tile of {}", tile.name()),
        LinearKernel::SplitK { slices, .. } => format!("{slices} slices of K"),
        LinearKernel::StreamK { workers, .. } => format!("{workers} workers that share out the tiles"),
    };
    missing(backend, "linear", what)
}

/// The error of a launch that a device lacks.
fn missing<B: Backend>(backend: &B, operation: &'static str, what: String) -> Result<()> {
    Err(OpError::Unsupported { operation, backend: backend.name(), what })
}

impl MatrixTile {
    /// `64x64x32, 2 stages, 128 units, f16 sums`.
    pub fn name(&self) -> String {
        let Self { m, n, k, units, stages, accumulate } = self;
        format!("{m}x{n}x{k}, {stages} stages, {units} units, {} sums", accumulate.name().to_lowercase())
    }
}

/// A device with its operations and nothing else.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlainOnly;

impl<B: Backend> Variants<B> for PlainOnly {
    const GPU: bool = false;
}

use marlin_formats::DType;

use crate::profile::{Arithmetic, Profiler};
use crate::trellis::PathSearch;
use crate::{
    AttentionOps, ConvertOps, ExpertWeights, HadamardOps, HostTensor, LinearOps, MoeOps, NormOps, OpError,
    PagedAttentionOps, Result, RopeOps, SamplingOps, Tensor, Weight, WeightData,
};

/// Memory of a device: buffers, transfers, prepared weights. Operations on it enqueue and return; the `read_*` methods
/// are the only ones that wait, and report any failure of the work before them.
pub trait Device: Sized + Send + Sync + 'static {
    /// Storage of a tensor.
    type Buffer: Send + Sync;
    /// A linear layer in the device's layout.
    type Weight: Send + Sync;
    /// The routed experts of a layer in the device's layout.
    type Experts: Send + Sync;
    /// What a device keeps of a step to repeat it; `()` where every step is enqueued anew.
    type Recording: Send + Sync;

    /// Short name for messages: "cpu", "oracle", ...
    fn name(&self) -> &'static str;

    /// A zero-filled tensor.
    fn zeros(&self, dtype: DType, dims: &[usize]) -> Result<Tensor<Self>>;

    /// Copies a host tensor (F32, F16, BF16, U32 or I32) to the device, dtype kept.
    fn upload(&self, host: &HostTensor) -> Result<Tensor<Self>>;

    /// Replaces the contents of a U32 tensor within its planned capacity (token ids, positions); it becomes
    /// `[values.len()]` unless it has that many elements already.
    fn write_u32(&self, values: &[u32], out: &mut Tensor<Self>) -> Result<()>;

    /// Copies `count` rows (all dimensions but the last flattened) of `source`, from `first`, to the start of `out`.
    /// Dtypes and columns must agree; the rows of `out` must be `count`.
    fn copy_rows(&self, source: &Tensor<Self>, first: usize, count: usize, out: &mut Tensor<Self>) -> Result<()>;

    /// Waits and reads a float tensor as f64 (exact for F32, F16, BF16).
    fn read_f64(&self, tensor: &Tensor<Self>) -> Result<Vec<f64>>;

    /// Waits and reads a float tensor as f32.
    fn read_f32(&self, tensor: &Tensor<Self>) -> Result<Vec<f32>>;

    /// Waits and reads a U32 tensor.
    fn read_u32(&self, tensor: &Tensor<Self>) -> Result<Vec<u32>>;

    /// Repacks a weight; called through [`crate::Linear::new`]. Products read the channels of its `input_order`.
    fn prepare_weight(&self, weight: Weight) -> Result<Self::Weight>;

    /// Repacks the experts of a layer; called through [`crate::ExpertStack::new`], which checks their shapes. Gate and up of an
    /// expert have the same `input_order`, or none, and down has none.
    fn prepare_experts(&self, experts: Vec<ExpertWeights>) -> Result<Self::Experts>;

    /// What products of linear layers and experts with these weights are computed in.
    fn arithmetic(&self, _data: &WeightData) -> Arithmetic {
        Arithmetic::F32
    }

    /// Dtypes of activations that operations take and give; where these leave one out, it is refused as unsupported.
    fn activation_dtypes(&self) -> &'static [DType] {
        &[DType::F32, DType::F16, DType::BF16]
    }

    /// Runs `step`, which decodes the token at `position` of a sequence: the layers of a model over one row. A device may
    /// record what it enqueues and, from then on, repeat the record instead of calling `step`.
    ///
    /// The caller keeps a recording for exactly one step: the same operations on the same tensors, of which only the
    /// contents change. In it rows are written to caches at `start = position`, attention sees `kv_len = [position + 1]`,
    /// nothing is read back and nothing uploaded; a run that is repeated does the same. One step runs at a time, and
    /// nothing else is enqueued on the device meanwhile.
    ///
    /// # Errors
    /// What `step` raises, and a failure to record.
    fn run_step<E: From<OpError>>(
        &self,
        _position: usize,
        _recording: &mut Option<Self::Recording>,
        mut step: impl FnMut() -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        step()
    }

    /// The search for EXL3 codes, on devices that have one: quantizers bring their own for the CPU.
    fn path_search(&self) -> Option<&dyn PathSearch> {
        None
    }

    /// Collects times, bytes and FLOPs of operations, if the device keeps such a record.
    fn profiler(&self) -> Option<&Profiler> {
        None
    }

    /// Waits until all work so far is done, and reports its failure; only profiling needs that. Nothing to do where
    /// operations are complete when they return.
    fn synchronize(&self) -> Result<()> {
        Ok(())
    }
}

/// A device that implements every operation family.
pub trait Backend:
    LinearOps + NormOps + RopeOps + AttentionOps + PagedAttentionOps + MoeOps + HadamardOps + SamplingOps + ConvertOps
{
}

impl<T> Backend for T where
    T: LinearOps
        + NormOps
        + RopeOps
        + AttentionOps
        + PagedAttentionOps
        + MoeOps
        + HadamardOps
        + SamplingOps
        + ConvertOps
{
}

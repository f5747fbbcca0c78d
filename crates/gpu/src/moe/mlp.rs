//! The experts' gated MLPs: which kernels compute them.

use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::linear::{Activation, Residual};
use marlin_ops::moe::ExpertMlpArgs;
use marlin_ops::{Device, OpError, Result, Tensor};

use super::exl3::Order;
use super::experts::{Bank, Group};
use super::fused::Fused;
use super::gemm::SortedRows;
use super::group::Sorted;
use crate::Gpu;
use crate::launch::MOST_CUBES;
use crate::linear::input_order::{ExpertOrders, gather};
use crate::linear::tensor::MOST_TILE_ROWS;

pub(super) const OP: &str = "moe_expert_mlp";

/// How work is shared out among cubes.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub enum ExpertStrategy {
    /// One launch for gate, up, activation and down: a cube for each assignment.
    Fused,
    /// Assignments sorted by expert; a cube for each tile of rows of one expert and stretch of columns.
    Grouped,
    /// As [`ExpertStrategy::Grouped`], by the tensor-core kernels of linear layers: int4 and E2M1 with f16 scales, N a
    /// multiple of 32, K of 128; EXL3.
    Tensor,
    /// A cube for each assignment and stretch of columns, of EXL3 on tensor cores also of K.
    Parallel,
}

/// A configuration of the experts' kernels.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct ExpertKernel {
    /// How work is shared out.
    pub strategy: ExpertStrategy,
    /// Rows of a tile: a power of two if grouped, 32, 64 or (not of EXL3) 128 on tensor cores, else 1.
    pub tile_m: usize,
    /// Columns of a tile, a power of two; hidden values in shared memory if fused; chosen by the kernel on tensor cores.
    pub tile_n: usize,
    /// Input features in shared memory; chosen by the kernel on tensor cores.
    pub tile_k: usize,
}

impl ExpertKernel {
    /// The default of the parallel strategy.
    pub const PARALLEL: Self = Self { strategy: ExpertStrategy::Parallel, tile_m: 1, tile_n: 32, tile_k: 2048 };
    /// The default of the fused strategy.
    pub const FUSED: Self = Self { strategy: ExpertStrategy::Fused, tile_m: 1, tile_n: 1024, tile_k: 2048 };

    /// The default of the grouped strategy for tiles of `tile_m` rows.
    pub const fn grouped(tile_m: usize) -> Self {
        Self { strategy: ExpertStrategy::Grouped, tile_m, tile_n: 64, tile_k: 32 }
    }

    /// The tensor-core strategy for tiles of `tile_m` rows.
    pub const fn tensor(tile_m: usize) -> Self {
        Self { strategy: ExpertStrategy::Tensor, tile_m, tile_n: 0, tile_k: 0 }
    }

    /// The same for so many rows and tiles of at most `most_rows`, if there is such a kernel and there are not too many tiles
    /// for a launch.
    pub(super) fn tensor_for(rows: usize, experts: usize, most_rows: usize) -> Option<Self> {
        let tile_m = match rows / experts.max(1) {
            0..=32 => 32,
            33..=64 => 64,
            _ => MOST_TILE_ROWS,
        };
        let tile_m = tile_m.min(most_rows);
        (tile_m > 0 && rows / tile_m + experts <= MOST_CUBES as usize).then_some(Self::tensor(tile_m))
    }

    /// The kernel for this many tokens: the experts' weights are read once for each assignment, or once for each tile.
    fn choose(tokens: usize, top_k: usize, experts: usize) -> Self {
        match tokens * top_k / experts.max(1) {
            _ if tokens <= DECODE_TOKENS => Self::PARALLEL,
            0..=8 => Self::grouped(8),
            9..=32 => Self::grouped(32),
            _ => Self::grouped(64),
        }
    }

    /// What no kernel offers, if anything.
    pub(super) fn limit(&self) -> Option<String> {
        let Self { tile_m, tile_n, tile_k, .. } = *self;
        let shapes = match self.strategy {
            ExpertStrategy::Parallel => {
                tile_m == 1 && matches!(tile_n, 8 | 16 | 32 | 64 | 128 | 256) && (128..=4096).contains(&tile_k)
            }
            ExpertStrategy::Fused => tile_m == 1 && (1024..=2048).contains(&tile_n) && (1024..=4096).contains(&tile_k),
            ExpertStrategy::Grouped => true,
            ExpertStrategy::Tensor => matches!(tile_m, 32 | 64 | 128),
        };
        (!shapes).then(|| format!("experts by {self:?}"))
    }
}

/// Largest number of tokens that is not sorted by expert.
const DECODE_TOKENS: usize = 4;

/// Products of rows with one or two projections of a group's experts.
pub(super) struct Call<'a, R: Runtime> {
    pub(super) x: &'a Tensor<Gpu<R>>,
    pub(super) group: &'a Group,
    /// Number of the first among gate, up and down.
    pub(super) first_place: usize,
    pub(super) first: &'a Bank,
    /// The weight whose product the first, activated, is multiplied with.
    pub(super) second: Option<&'a Bank>,
    pub(super) activation: Activation,
    pub(super) experts: usize,
    /// K and N.
    pub(super) features: usize,
    pub(super) columns: usize,
}

impl<R: Runtime> Gpu<R> {
    /// [`marlin_ops::MoeOps::moe_expert_mlp`] by a given kernel.
    ///
    /// # Errors
    /// As the operation, and [`OpError::Unsupported`] where the kernel's tiles cannot be.
    pub fn moe_expert_mlp_with(&self, args: ExpertMlpArgs<'_, Self>, kernel: &ExpertKernel) -> Result<()> {
        check(&args)?;
        self.expert_mlp(&args, kernel)
    }

    pub(super) fn choose_and_run(&self, args: &ExpertMlpArgs<'_, Self>) -> Result<()> {
        let (tokens, top_k, experts) = (args.x.rows(), args.ids.columns(), args.experts.count());
        let kernel = match ExpertKernel::tensor_for(tokens * top_k, experts, self.most_tile_rows(args)) {
            Some(kernel) if tokens > DECODE_TOKENS => kernel,
            _ => ExpertKernel::choose(tokens, top_k, experts),
        };
        self.expert_mlp(args, &kernel)
    }

    /// Most rows of a tile of the tensor-core kernels that take all projections; 0 if they do not.
    fn most_tile_rows(&self, args: &ExpertMlpArgs<'_, Self>) -> usize {
        // The hidden vectors are f32.
        let rows = |group| {
            let gated = Call::gated(args, group).most_tile_rows(self, args.x.dtype());
            gated.min(Call::down(args, group, args.x).most_tile_rows(self, DType::F32))
        };
        args.experts.data().groups.iter().map(rows).min().unwrap_or(0)
    }

    fn expert_mlp(&self, args: &ExpertMlpArgs<'_, Self>, kernel: &ExpertKernel) -> Result<()> {
        if let Some(what) = kernel.limit() {
            return Err(OpError::Unsupported { operation: OP, backend: self.name(), what });
        }
        if args.ids.elements() == 0 {
            self.combine(args.x, None, args.weights, &args.residual, args.out);
            return Ok(());
        }
        match kernel.strategy {
            ExpertStrategy::Fused => self.expert_mlp_fused(args, kernel),
            ExpertStrategy::Grouped | ExpertStrategy::Tensor => self.expert_mlp_grouped(args, kernel),
            ExpertStrategy::Parallel => self.expert_mlp_parallel(args, kernel),
        }
    }

    /// A row of x for each assignment, its channels as its expert reads them; none where all experts read them one after
    /// the other.
    fn ordered_rows(&self, args: &ExpertMlpArgs<'_, Self>) -> Result<Option<Tensor<Self>>> {
        let experts = args.experts.data();
        let Some(orders) = &experts.input_orders else { return Ok(None) };
        let rows = self.scratch(OP, args.x.dtype(), &[args.ids.elements(), args.experts.hidden()])?;
        gather(self, args.x, orders, Some(&ExpertOrders { ids: args.ids, experts: experts.count }), &rows);
        Ok(Some(rows))
    }

    fn expert_mlp_parallel(&self, args: &ExpertMlpArgs<'_, Self>, kernel: &ExpertKernel) -> Result<()> {
        let assignments = args.ids.elements();
        let (hidden, intermediate) = (args.experts.hidden(), args.experts.intermediate());
        let ordered = self.ordered_rows(args)?;
        let (x, slots) = ordered.as_ref().map_or((args.x, args.ids.columns()), |rows| (rows, 1));
        let gated = self.scratch(OP, DType::F32, &[assignments, intermediate])?;
        for (g, group) in args.experts.data().groups.iter().enumerate() {
            let order = Order::Assignments { ids: args.ids, slots, check: g == 0 };
            Call { x, ..Call::gated(args, group) }.run(self, &order, &gated, kernel)?;
        }
        let rows = self.scratch(OP, DType::F32, &[assignments, hidden])?;
        for group in &args.experts.data().groups {
            let order = Order::Assignments { ids: args.ids, slots: 1, check: false };
            Call::down(args, group, &gated).run(self, &order, &rows, kernel)?;
        }
        self.combine(&rows, None, args.weights, &args.residual, args.out);
        Ok(())
    }

    fn expert_mlp_grouped(&self, args: &ExpertMlpArgs<'_, Self>, kernel: &ExpertKernel) -> Result<()> {
        let (assignments, experts) = (args.ids.elements(), args.experts.count());
        let (hidden, intermediate) = (args.experts.hidden(), args.experts.intermediate());
        let ordered = self.ordered_rows(args)?;
        let (x, slots) = ordered.as_ref().map_or((args.x, args.ids.columns()), |rows| (rows, 1));
        let offsets = self.scratch(OP, DType::U32, &[experts + 1])?;
        let permutation = self.scratch(OP, DType::U32, &[assignments])?;
        let inverse = self.scratch(OP, DType::U32, &[assignments])?;
        let sorted = Sorted { offsets: &offsets, permutation: &permutation, inverse: &inverse };
        self.group(OP, args.ids, experts, &sorted)?;
        let (tiles, tile_count) = self.tiles(OP, &offsets, assignments, kernel.tile_m)?;
        let sorted = SortedRows { tiles: &tiles, tile_count, offsets: &offsets, permutation: &permutation };
        let gated = self.scratch(OP, DType::F32, &[assignments, intermediate])?;
        for group in &args.experts.data().groups {
            let order = Order::Sorted { rows: &sorted, slots: Some(slots) };
            Call { x, ..Call::gated(args, group) }.run(self, &order, &gated, kernel)?;
        }
        let rows = self.scratch(OP, DType::F32, &[assignments, hidden])?;
        for group in &args.experts.data().groups {
            Call::down(args, group, &gated).run(self, &Order::Sorted { rows: &sorted, slots: None }, &rows, kernel)?;
        }
        self.combine(&rows, Some(&inverse), args.weights, &args.residual, args.out);
        Ok(())
    }

    fn expert_mlp_fused(&self, args: &ExpertMlpArgs<'_, Self>, kernel: &ExpertKernel) -> Result<()> {
        let rows = self.scratch(OP, DType::F32, &[args.ids.elements(), args.experts.hidden()])?;
        let experts = args.experts.data();
        if experts.banks.iter().any(|bank| bank.weight.decoder.is_trellis()) {
            let what = "exl3 experts in one launch, which rotations part,".into();
            return Err(OpError::Unsupported { operation: OP, backend: self.name(), what });
        }
        if experts.input_orders.is_some() {
            let what = "experts with rows in an order of their own in one launch".into();
            return Err(OpError::Unsupported { operation: OP, backend: self.name(), what });
        }
        for (g, group) in experts.groups.iter().enumerate() {
            let fused = Fused {
                x: args.x,
                ids: args.ids,
                group,
                banks: group.banks.map(|bank| &experts.banks[bank]),
                experts: experts.count,
                intermediate: args.experts.intermediate(),
                activation: args.activation,
            };
            fused.launch(self, &rows, kernel, g == 0);
        }
        self.combine(&rows, None, args.weights, &args.residual, args.out);
        Ok(())
    }
}

impl<'a, R: Runtime> Call<'a, R> {
    /// `act(x Wg) * (x Wu)`.
    fn gated(args: &'a ExpertMlpArgs<'_, Gpu<R>>, group: &'a Group) -> Self {
        let banks = &args.experts.data().banks;
        Self {
            x: args.x,
            group,
            first_place: 0,
            first: &banks[group.banks[0]],
            second: Some(&banks[group.banks[1]]),
            activation: args.activation,
            experts: args.experts.count(),
            features: args.experts.hidden(),
            columns: args.experts.intermediate(),
        }
    }

    /// `h Wd`.
    fn down(args: &'a ExpertMlpArgs<'_, Gpu<R>>, group: &'a Group, gated: &'a Tensor<Gpu<R>>) -> Self {
        Self {
            x: gated,
            group,
            first_place: 2,
            first: &args.experts.data().banks[group.banks[2]],
            second: None,
            activation: Activation::None,
            experts: args.experts.count(),
            features: args.experts.intermediate(),
            columns: args.experts.hidden(),
        }
    }
}

/// The shapes that kernels rely on.
fn check<R: Runtime>(args: &ExpertMlpArgs<'_, Gpu<R>>) -> Result<()> {
    let (tokens, hidden, slots) = (args.x.rows(), args.experts.hidden(), args.ids.columns());
    let residual = if let Residual::Add(residual) = args.residual { Some(residual) } else { None };
    let floats = [("x", Some(args.x)), ("out", Some(&*args.out)), ("residual", residual)];
    for (operand, tensor) in floats.into_iter().filter_map(|(operand, tensor)| Some((operand, tensor?))) {
        let found = tensor.dtype();
        if !matches!(found, DType::F32 | DType::F16 | DType::BF16) {
            return Err(OpError::DType { operation: OP, operand, found, expected: "F32, F16 or BF16" });
        }
        if tensor.rows() != tokens || tensor.columns() != hidden {
            return Err(OpError::shape(OP, operand, tensor.dims(), format!("[{tokens}, {hidden}]")));
        }
    }
    for (operand, tensor, dtype) in [("ids", args.ids, DType::U32), ("weights", args.weights, DType::F32)] {
        let found = tensor.dtype();
        if found != dtype {
            return Err(OpError::DType { operation: OP, operand, found, expected: dtype.name() });
        }
        if tensor.dims() != [tokens, slots] {
            return Err(OpError::shape(OP, operand, tensor.dims(), format!("[{tokens}, {slots}]")));
        }
    }
    Ok(())
}

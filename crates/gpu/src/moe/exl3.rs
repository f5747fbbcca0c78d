//! Experts with EXL3 weights: each projection's rows are rotated with the signs and scales of their expert, multiplied with
//! the tiles by the kernels of all formats or, on tensor cores, of linear layers, and rotated back.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use half::f16;
use marlin_formats::DType;
use marlin_formats::exl3::HADAMARD;
use marlin_ops::linear::Activation;
use marlin_ops::{Result, Tensor};

use super::experts::Bank;
use super::gemm::SortedRows;
use super::group::check_id;
use super::mlp::{Call, ExpertKernel, ExpertStrategy, OP};
use crate::element::{Storage, load};
use crate::launch::{cubes, cubes_for, units};
use crate::linear::exl3::rotate::{BLOCKS, Channels, LANES, NORM, first_channel, has_planes, transform};
use crate::linear::exl3::{AssignedRows, multiply_assigned, multiply_experts};
use crate::math::activate;
use crate::{Buffer, Gpu};

#[cfg(all(test, any(feature = "vulkan", feature = "cuda")))]
mod tests;

/// Which row belongs to which assignment.
pub(super) enum Order<'a, R: Runtime> {
    /// Rows are assignments; `ids [T, k]`, a row of x for so many of them.
    Assignments { ids: &'a Tensor<Gpu<R>>, slots: usize, check: bool },
    /// Rows are sorted by expert; with `slots`, x has a row for so many assignments and not for each.
    Sorted { rows: &'a SortedRows<'a, R>, slots: Option<usize> },
}

/// How kernels find the expert and the source of a row.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct Lookup {
    /// Experts have stretches of rows, otherwise rows have ids.
    sorted: bool,
    /// x has a row for the assignments of a token.
    gather: bool,
}

/// The place of a row's expert in its bank, [`u32::MAX`] for those of other banks. `experts_of` are ids, or the offsets of
/// sorted rows.
#[cube]
fn place_of(
    experts_of: &[u32],
    places: &[u32],
    row: usize,
    rows: usize,
    experts: u32,
    projection: u32,
    #[comptime] lookup: Lookup,
) -> u32 {
    let mut place = u32::MAX.runtime();
    let row = select(row < rows, row, 0usize);
    let mut expert = 0u32.runtime();
    if comptime!(lookup.sorted) {
        // The last expert whose rows begin at or before this one.
        let mut after = experts;
        while expert + 1u32 < after {
            let middle = (expert + after) / 2u32;
            let before = experts_of[middle as usize] as usize <= row;
            expert = select(before, middle, expert);
            after = select(before, after, middle);
        }
        // Assignments to experts that do not exist are not sorted: the rows beyond the others have no expert.
        expert = select(row < experts_of[experts as usize] as usize, expert, experts);
    } else {
        expert = experts_of[row];
    }
    if expert < experts {
        place = places[(projection * experts + expert) as usize];
    }
    place
}

/// What [`rotate_expert_input`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct InputConfig {
    x: Storage,
    lookup: Lookup,
    planes: bool,
}

/// `out [rows, 128 blocks]`: `had(x * suh)` with the suh of the row's expert.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn rotate_expert_input<X: Numeric>(
    x: &[X],
    experts_of: &[u32],
    permutation: &[u32],
    places: &[u32],
    suh: &[f16],
    out: &mut [Vector<f32, Const<4>>],
    rows: u32,
    k: u32,
    blocks: u32,
    slots: u32,
    experts: u32,
    projection: u32,
    #[comptime] c: InputConfig,
    #[define(X)] _element: ElemType,
) {
    let (rows, k, blocks) = (rows as usize, k as usize, blocks as usize);
    let at = CUBE_POS * BLOCKS + UNIT_POS as usize / LANES;
    let lane = UNIT_POS as usize % LANES;
    let row = at / blocks;
    let place = place_of(experts_of, places, row, rows, experts, projection, c.lookup);
    let known = row < rows && place != u32::MAX;
    let row = select(known, row, 0usize);
    let mut source = row;
    if comptime!(c.lookup.gather) {
        source = select(known, row, 0usize) / slots as usize;
        if comptime!(c.lookup.sorted) {
            source = (permutation[row] / slots) as usize;
        }
    }
    let first = at % blocks * HADAMARD + first_channel(lane, Channels::Neighbours);
    let scales = select(known, place, 0u32) as usize * blocks * HADAMARD;
    let mut values = Array::<f32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        let inside = known && first + i < k;
        let feature = select(inside, first + i, 0usize);
        let value = load::<X>(x, select(inside, source * k + feature, 0usize), c.x);
        values[i] = select(inside, value * f32::cast_from(suh[scales + feature]) * NORM, f32::new(0.0));
    }
    transform(&mut values, c.planes);
    if known {
        let mut quad = Vector::<f32, Const<4>>::empty();
        #[unroll]
        for i in 0..4usize {
            quad.insert(i, values[i]);
        }
        out[at * LANES + lane] = quad;
    }
}

/// How the sums of a projection are read.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct SumsConfig {
    slices: usize,
    /// Rows have factors.
    factors: bool,
    bias: bool,
}

/// What [`rotate_expert_output`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct OutputConfig {
    lookup: Lookup,
    first: SumsConfig,
    /// Of the projection that the first, activated, is multiplied with.
    second: Option<SumsConfig>,
    activation: Activation,
    planes: bool,
    /// Ids are checked, which sorting does otherwise.
    check: bool,
}

/// A lane's values of a block of a row: `had(z) * svh + bias`, z the sum over slices, times the factor of its row if it has one.
/// The bank's `svh` and `bias` are those of `place`; values of columns from n on are not to be used. All units take part.
#[cube]
#[allow(clippy::too_many_arguments)]
fn rotated_sums(
    z: &[Vector<f32, Const<4>>],
    row_factors: &[f32],
    svh: &[f16],
    bias: &[f32],
    at: usize,
    rows: usize,
    blocks: usize,
    n: usize,
    place: usize,
    #[comptime] planes: bool,
    #[comptime] c: SumsConfig,
) -> Array<f32> {
    let lane = UNIT_POS as usize % LANES;
    let first = at * LANES + lane;
    let mut quad = z[first];
    #[unroll]
    for slice in 1..comptime!(c.slices) {
        quad += z[first + slice * rows * blocks * LANES];
    }
    let mut values = Array::<f32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        values[i] = quad.extract(i);
    }
    transform(&mut values, planes);
    let mut factor = f32::new(NORM);
    if comptime!(c.factors) {
        factor *= row_factors[at / blocks];
    }
    #[unroll]
    for i in 0..4usize {
        let column = at % blocks * HADAMARD + lane * 4usize + i;
        values[i] = values[i] * factor * f32::cast_from(svh[place * blocks * HADAMARD + column]);
        if comptime!(c.bias) {
            values[i] += bias[place * n + select(column < n, column, 0usize)];
        }
    }
    values
}

/// `out [rows, n]` of z and the svh and bias of the row's expert, as [`rotated_sums`] defines it: `act(first)`, or
/// `act(first) * second`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn rotate_expert_output(
    z: &[Vector<f32, Const<4>>],
    row_factors: &[f32],
    svh: &[f16],
    bias: &[f32],
    z2: &[Vector<f32, Const<4>>],
    row_factors2: &[f32],
    svh2: &[f16],
    bias2: &[f32],
    experts_of: &[u32],
    places: &[u32],
    out: &mut [f32],
    faults: &mut [Atomic<u32>],
    rows: u32,
    n: u32,
    blocks: u32,
    top_k: u32,
    experts: u32,
    projection: u32,
    #[comptime] c: OutputConfig,
) {
    let (rows, n, blocks) = (rows as usize, n as usize, blocks as usize);
    let at = CUBE_POS * BLOCKS + UNIT_POS as usize / LANES;
    let lane = UNIT_POS as usize % LANES;
    let row = at / blocks;
    let place = place_of(experts_of, places, row, rows, experts, projection, c.lookup);
    let known = row < rows && place != u32::MAX;
    if comptime!(c.check) {
        let checked = row < rows && at % blocks == 0usize && lane == 0usize;
        check_id(experts_of, faults, row, top_k as usize, experts, checked);
    }
    let own = select(known, at, 0usize);
    let place = select(known, place, 0u32) as usize;
    let mut values = rotated_sums(z, row_factors, svh, bias, own, rows, blocks, n, place, c.planes, c.first);
    #[unroll]
    for i in 0..4usize {
        values[i] = activate(values[i], c.activation);
    }
    if comptime!(c.second.is_some()) {
        let place = place_of(experts_of, places, row, rows, experts, projection + 1u32, c.lookup);
        let place = select(known, place, 0u32) as usize;
        let sums = comptime!(c.second.unwrap_or(c.first));
        let factors = rotated_sums(z2, row_factors2, svh2, bias2, own, rows, blocks, n, place, c.planes, sums);
        #[unroll]
        for i in 0..4usize {
            values[i] *= factors[i];
        }
    }
    #[unroll]
    for i in 0..4usize {
        let column = at % blocks * HADAMARD + lane * 4usize + i;
        if known && column < n {
            out[row * n + column] = values[i];
        }
    }
}

/// `gate = act(gate) * up`, `[rows, columns]`, in the rows whose experts are in the bank.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn multiply_gate(
    gate: &mut [f32],
    up: &[f32],
    experts_of: &[u32],
    places: &[u32],
    rows: u32,
    columns: u32,
    experts: u32,
    projection: u32,
    #[comptime] lookup: Lookup,
    #[comptime] activation: Activation,
) {
    let (rows, columns) = (rows as usize, columns as usize);
    let row = ABSOLUTE_POS / columns;
    let place = place_of(experts_of, places, row, rows, experts, projection, lookup);
    if row < rows && place != u32::MAX {
        gate[ABSOLUTE_POS] = activate(gate[ABSOLUTE_POS], activation) * up[ABSOLUTE_POS];
    }
}

impl<R: Runtime> Order<'_, R> {
    fn lookup(&self) -> Lookup {
        match self {
            Self::Assignments { .. } => Lookup { sorted: false, gather: true },
            Self::Sorted { slots, .. } => Lookup { sorted: true, gather: slots.is_some() },
        }
    }

    fn slots(&self) -> usize {
        match self {
            Self::Assignments { slots, .. } => *slots,
            Self::Sorted { slots, .. } => slots.unwrap_or(1),
        }
    }

    /// Ids, or offsets of sorted rows.
    fn experts_of(&self) -> BufferArg<R> {
        let tensor = match self {
            Self::Assignments { ids, .. } => ids,
            Self::Sorted { rows, .. } => rows.offsets,
        };
        tensor.buffer().arg(tensor.elements())
    }

    fn permutation(&self, gpu: &Gpu<R>) -> BufferArg<R> {
        match self {
            Self::Sorted { rows, slots: Some(_) } => rows.permutation.buffer().arg(rows.permutation.elements()),
            _ => gpu.unread(),
        }
    }
}

impl<'a, R: Runtime> Call<'a, R> {
    /// Launches the kernel of an order into `out [rows, N]`, with rotations where the weights have them.
    pub(super) fn run(
        &self,
        gpu: &Gpu<R>,
        order: &Order<'_, R>,
        out: &Tensor<Gpu<R>>,
        kernel: &ExpertKernel,
    ) -> Result<()> {
        let rotated = |bank: &Bank| bank.weight.decoder.is_trellis();
        let single =
            |first, first_place| Call { first, first_place, second: None, activation: Activation::None, ..*self };
        let second = match (self.second, rotated(self.first)) {
            (None, false) => return self.plain(gpu, order, out, kernel),
            (None, true) => {
                let sums = self.sums(gpu, order, out.rows(), kernel)?;
                self.rotate_output(gpu, order, &sums, None, out);
                return Ok(());
            }
            (Some(second), true) if rotated(second) => {
                let sums = single(self.first, self.first_place).sums(gpu, order, out.rows(), kernel)?;
                let factors = single(second, self.first_place + 1).sums(gpu, order, out.rows(), kernel)?;
                self.rotate_output(gpu, order, &sums, Some(&factors), out);
                return Ok(());
            }
            (Some(second), false) if !rotated(second) => return self.plain(gpu, order, out, kernel),
            (Some(second), _) => second,
        };
        let up = gpu.scratch(OP, DType::F32, out.dims())?;
        single(self.first, self.first_place).run(gpu, order, out, kernel)?;
        single(second, self.first_place + 1).run(gpu, order, &up, kernel)?;
        // SAFETY: both hold rows times columns, places [3, E].
        unsafe {
            multiply_gate::launch_unchecked::<R>(
                gpu.client(),
                cubes_for(out.elements()),
                units(),
                out.buffer().arg(out.elements()),
                up.buffer().arg(up.elements()),
                order.experts_of(),
                self.group.places.arg(3 * self.experts),
                out.rows() as u32,
                self.columns as u32,
                self.experts as u32,
                self.first_place as u32,
                order.lookup(),
                self.activation,
            );
        }
        Ok(())
    }

    fn plain(&self, gpu: &Gpu<R>, order: &Order<'_, R>, out: &Tensor<Gpu<R>>, kernel: &ExpertKernel) -> Result<()> {
        match order {
            Order::Assignments { ids, slots, check } => {
                self.rows(gpu, ids, *slots, out, kernel, *check);
                Ok(())
            }
            Order::Sorted { rows, slots } if kernel.strategy == ExpertStrategy::Tensor => {
                self.tensor_tiles(gpu, rows, *slots, out, kernel)
            }
            Order::Sorted { rows, slots } => self.tiles(gpu, rows, *slots, out, kernel),
        }
    }

    /// The sums of the first projection, an EXL3 one, before the last rotation.
    fn sums(&self, gpu: &Gpu<R>, order: &Order<'_, R>, rows: usize, kernel: &ExpertKernel) -> Result<Sums<'a, R>> {
        let bank = self.first;
        if let (&Order::Assignments { ids, slots, .. }, ExpertStrategy::Parallel) = (order, kernel.strategy) {
            let (places, projection) = (&self.group.places, self.first_place);
            let assigned = AssignedRows { ids, slots, places, projection, experts: self.experts };
            if let Some(z) = multiply_assigned(gpu, OP, &bank.weight, self.x, &assigned)? {
                return Ok(Sums { bank, z, factors: None });
            }
        }
        let features = self.features.next_multiple_of(HADAMARD);
        let x = gpu.scratch(OP, DType::F32, &[rows, features])?;
        self.rotate_input(gpu, order, &x);
        if let (Order::Sorted { rows, .. }, ExpertStrategy::Tensor) = (order, kernel.strategy) {
            let rows = self.expert_rows(rows, 0, None);
            let (z, factors) = multiply_experts(gpu, OP, &bank.weight, kernel.tile_m, &x, &rows)?;
            return Ok(Sums { bank, z, factors: Some(factors) });
        }
        let columns = self.columns.next_multiple_of(HADAMARD);
        let z = gpu.scratch(OP, DType::F32, &[rows, columns])?;
        let inner = Call { x: &x, second: None, activation: Activation::None, features, columns, ..*self };
        let own = match order {
            // The last rotation checks the ids.
            Order::Assignments { ids, .. } => Order::Assignments { ids, slots: 1, check: false },
            Order::Sorted { rows, .. } => Order::Sorted { rows, slots: None },
        };
        inner.plain(gpu, &own, &z, kernel)?;
        Ok(Sums { bank, z, factors: None })
    }

    fn rotate_input(&self, gpu: &Gpu<R>, order: &Order<'_, R>, out: &Tensor<Gpu<R>>) {
        let (rows, blocks) = (out.rows(), out.columns() / HADAMARD);
        let config = InputConfig { x: Storage::of(self.x.dtype()), lookup: order.lookup(), planes: has_planes(gpu) };
        // SAFETY: x holds a row of features for each of `slots` rows, the bank's scales suh of all its experts, places
        // [3, E], out the rotated rows; offsets E + 1 elements and the permutation an assignment for each row below the last
        // offset. Rows of other banks' experts and of none are passed over.
        unsafe {
            rotate_expert_input::launch_unchecked::<R>(
                gpu.client(),
                cubes((rows * blocks).div_ceil(BLOCKS)),
                units(),
                self.x.buffer().arg(self.x.elements()),
                order.experts_of(),
                order.permutation(gpu),
                self.group.places.arg(3 * self.experts),
                self.first.weight.scales.arg(self.first.weight.scale_count),
                out.buffer().arg(out.elements() / 4),
                rows as u32,
                self.features as u32,
                blocks as u32,
                order.slots() as u32,
                self.experts as u32,
                self.first_place as u32,
                config,
                config.x.elem(),
            );
        }
    }

    /// Enqueues [`rotate_expert_output`].
    fn rotate_output(
        &self,
        gpu: &Gpu<R>,
        order: &Order<'_, R>,
        first: &Sums<'_, R>,
        second: Option<&Sums<'_, R>>,
        out: &Tensor<Gpu<R>>,
    ) {
        let (rows, blocks) = (out.rows(), first.z.columns() / HADAMARD);
        let (check, top_k) = match order {
            Order::Assignments { ids, check, .. } => (*check, ids.columns()),
            Order::Sorted { .. } => (false, 1),
        };
        let config = OutputConfig {
            lookup: order.lookup(),
            first: first.config(rows),
            second: second.map(|sums| sums.config(rows)),
            activation: self.activation,
            planes: has_planes(gpu),
            check,
        };
        let unread = || [(); 4].map(|()| gpu.unread());
        let [z, factors, svh, bias] = first.args(gpu, rows);
        let [z2, factors2, svh2, bias2] = second.map_or_else(unread, |sums| sums.args(gpu, rows));
        // SAFETY: z hold slices of the rotated rows, the factors one each, out rows times columns, the banks' zero points svh
        // and biases of all their experts, places [3, E], ids or offsets what the order says. Rows of other banks' experts
        // are passed over; what they read in the place of their own is the first row, and not written.
        unsafe {
            rotate_expert_output::launch_unchecked::<R>(
                gpu.client(),
                cubes((rows * blocks).div_ceil(BLOCKS)),
                units(),
                z,
                factors,
                svh,
                bias,
                z2,
                factors2,
                svh2,
                bias2,
                order.experts_of(),
                self.group.places.arg(3 * self.experts),
                out.buffer().arg(out.elements()),
                gpu.faults(),
                rows as u32,
                self.columns as u32,
                blocks as u32,
                top_k as u32,
                self.experts as u32,
                self.first_place as u32,
                config,
            );
        }
    }
}

/// The products of rows with a bank's weights, before the last rotation.
struct Sums<'a, R: Runtime> {
    bank: &'a Bank,
    /// `[slices, rows, N padded]`.
    z: Tensor<Gpu<R>>,
    /// `[rows]`, by which to multiply them.
    factors: Option<Buffer>,
}

impl<R: Runtime> Sums<'_, R> {
    fn config(&self, rows: usize) -> SumsConfig {
        let (factors, bias) = (self.factors.is_some(), self.bank.late_bias.is_some());
        SumsConfig { slices: self.z.rows() / rows, factors, bias }
    }

    /// z, row factors, svh and bias.
    fn args(&self, gpu: &Gpu<R>, rows: usize) -> [BufferArg<R>; 4] {
        let (weight, late_bias) = (&self.bank.weight, self.bank.late_bias.as_ref());
        [
            self.z.buffer().arg(self.z.elements() / 4),
            self.factors.as_ref().map_or_else(|| gpu.unread(), |factors| factors.arg(rows)),
            weight.zeros.arg(weight.zero_count),
            late_bias.map_or_else(|| gpu.unread(), |(bias, len)| bias.arg(*len)),
        ]
    }
}

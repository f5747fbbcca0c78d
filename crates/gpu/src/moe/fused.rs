//! The whole gated MLP of an assignment in one launch: one cube computes a stretch of the hidden vector in shared memory
//! and adds its product with the down projection to its own output row.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::Tensor;
use marlin_ops::linear::Activation;

use super::dot::{dot, masked, place, span_units, whole_spans};
use super::experts::{Bank, Group};
use super::group::check_id;
use super::mlp::ExpertKernel;
use crate::Gpu;
use crate::decode::Decoder;
use crate::element::{Storage, load};
use crate::launch::cubes;
use crate::math::activate;

/// Units of a cube.
const UNITS: usize = 256;

/// What [`expert_mlp`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct Config {
    x: Storage,
    gate: Decoder,
    up: Decoder,
    down: Decoder,
    bias: [bool; 3],
    activation: Activation,
    /// Features of x in shared memory at most.
    features: usize,
    /// Hidden values in shared memory at most.
    stretch: usize,
    /// Ids are checked.
    check: bool,
}

impl Config {
    fn chunk(self) -> usize {
        whole_spans(self.features, &[self.gate, self.up])
    }

    fn hidden_chunk(self) -> usize {
        whole_spans(self.stretch, &[self.down])
    }
}

/// Adds the product of a stretch of a row with each column of a weight to `out`, which each unit has columns of.
#[cube]
#[allow(clippy::too_many_arguments)]
fn add_products<S: Numeric>(
    out: &mut [f32],
    row: &[f32],
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    expert: u32,
    base: usize,
    chunk: usize,
    features: usize,
    column: usize,
    count: usize,
    columns: usize,
    shift: usize,
    #[comptime] d: Decoder,
) {
    let weight = place(expert, features, columns, d);
    let span = comptime!(span_units(d));
    let begin = base / comptime!(d.unit());
    let mut end = begin + chunk / comptime!(d.unit());
    if end > weight.units {
        end = weight.units;
    }
    // All units take part in every round, so that they stay together.
    for round in 0..count.div_ceil(UNITS) {
        let i = round * UNITS + UNIT_POS as usize;
        let n = column + select(i < count, i, 0usize.runtime());
        let sum = dot::<S>(row, words, scales, zeros, table, &weight, base + shift, begin, end, span, n, columns, d);
        if i < count {
            out[i] += sum;
        }
    }
}

/// `out [T k, H]`: `(act(x Wg + bg) * (x Wu + bu)) Wd + bd` with the weights of the assignment's expert.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn expert_mlp<X: Numeric, S: Numeric, Q: Numeric, P: Numeric>(
    x: &[X],
    ids: &[u32],
    places: &[u32],
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    bias: &[f32],
    words2: &[u32],
    scales2: &[Q],
    zeros2: &[Q],
    table2: &[f32],
    bias2: &[f32],
    words3: &[u32],
    scales3: &[P],
    zeros3: &[P],
    table3: &[f32],
    bias3: &[f32],
    out: &mut [f32],
    faults: &mut [Atomic<u32>],
    assignments: u32,
    slots: u32,
    experts: u32,
    features: u32,
    intermediate: u32,
    zero: u32,
    #[comptime] c: Config,
    #[define(X, S, Q, P)] _elements: [ElemType; 4],
) {
    let mut row = Shared::<[f32]>::new_slice(comptime!(c.features));
    let mut gate = Shared::<[f32]>::new_slice(comptime!(c.stretch));
    let mut up = Shared::<[f32]>::new_slice(comptime!(c.stretch));
    let features = features as usize;
    let intermediate = intermediate as usize;
    let a = CUBE_POS;
    if a < assignments as usize {
        let unit = UNIT_POS as usize;
        let shift = masked(zero);
        let id = ids[a];
        if comptime!(c.check) {
            check_id(ids, faults, a, slots as usize, experts, unit == 0usize);
        }
        let mut at = u32::MAX.runtime();
        if id < experts {
            at = places[id as usize];
        }
        if at != u32::MAX {
            let at2 = places[(experts + id) as usize];
            let at3 = places[(2u32 * experts + id) as usize];
            let start = a / slots as usize * features;
            let mut n = unit;
            while n < features {
                out[a * features + n] = 0.0f32;
                if comptime!(c.bias[2]) {
                    out[a * features + n] = bias3[at3 as usize * features + n];
                }
                n += UNITS;
            }
            let chunk = comptime!(c.chunk());
            let hidden_chunk = comptime!(c.hidden_chunk());
            let mut first = 0usize.runtime();
            while first < intermediate {
                let mut count = intermediate - first;
                if count > hidden_chunk {
                    count = hidden_chunk.runtime();
                }
                let mut i = unit;
                while i < hidden_chunk {
                    gate[i] = 0.0f32;
                    up[i] = 0.0f32;
                    i += UNITS;
                }
                let mut base = 0usize.runtime();
                while base < features {
                    let mut i = unit;
                    while i < chunk {
                        let mut value = f32::new(0.0);
                        if base + i < features {
                            value = load::<X>(x, start + base + i, c.x);
                        }
                        row[i] = value;
                        i += UNITS;
                    }
                    sync_cube();
                    add_products::<S>(
                        &mut gate,
                        &row,
                        words,
                        scales,
                        zeros,
                        table,
                        at,
                        base,
                        chunk,
                        features,
                        first,
                        count,
                        intermediate,
                        shift,
                        c.gate,
                    );
                    add_products::<Q>(
                        &mut up,
                        &row,
                        words2,
                        scales2,
                        zeros2,
                        table2,
                        at2,
                        base,
                        chunk,
                        features,
                        first,
                        count,
                        intermediate,
                        shift,
                        c.up,
                    );
                    sync_cube();
                    base += chunk;
                }
                let mut i = unit;
                while i < count {
                    let mut g = gate[i];
                    let mut u = up[i];
                    if comptime!(c.bias[0]) {
                        g += bias[at as usize * intermediate + first + i];
                    }
                    if comptime!(c.bias[1]) {
                        u += bias2[at2 as usize * intermediate + first + i];
                    }
                    gate[i] = activate(g, c.activation) * u;
                    i += UNITS;
                }
                sync_cube();
                let from = a * features;
                add_products::<P>(
                    &mut out[from..from + features],
                    &gate,
                    words3,
                    scales3,
                    zeros3,
                    table3,
                    at3,
                    first,
                    hidden_chunk,
                    intermediate,
                    0usize,
                    features,
                    features,
                    shift,
                    c.down,
                );
                sync_cube();
                first += hidden_chunk;
            }
        }
    }
}

/// One launch of [`expert_mlp`].
pub(super) struct Fused<'a, R: Runtime> {
    pub(super) x: &'a Tensor<Gpu<R>>,
    /// `[T, k]`.
    pub(super) ids: &'a Tensor<Gpu<R>>,
    pub(super) group: &'a Group,
    /// Gate, up and down.
    pub(super) banks: [&'a Bank; 3],
    pub(super) experts: usize,
    pub(super) intermediate: usize,
    pub(super) activation: Activation,
}

impl<R: Runtime> Fused<'_, R> {
    /// `out [T k, H]`.
    pub(super) fn launch(&self, gpu: &Gpu<R>, out: &Tensor<Gpu<R>>, kernel: &ExpertKernel, check: bool) {
        let config = Config {
            x: Storage::of(self.x.dtype()),
            gate: self.banks[0].weight.decoder,
            up: self.banks[1].weight.decoder,
            down: self.banks[2].weight.decoder,
            bias: self.banks.map(|bank| bank.weight.bias.is_some()),
            activation: self.activation,
            features: kernel.tile_k,
            stretch: kernel.tile_n,
            check,
        };
        let [gate, up, down] = self.banks.map(|bank| bank.operands(gpu));
        // SAFETY: banks hold their experts' weights, places [3, E], out assignments times features and x a row of
        // features for each token; experts that are not in the banks are passed over.
        unsafe {
            expert_mlp::launch_unchecked::<R>(
                gpu.client(),
                cubes(self.ids.elements()),
                CubeDim::new_1d(UNITS as u32),
                self.x.buffer().arg(self.x.elements()),
                self.ids.buffer().arg(self.ids.elements()),
                self.group.places.arg(3 * self.experts),
                gate.words,
                gate.scales,
                gate.zeros,
                gate.table,
                gate.bias,
                up.words,
                up.scales,
                up.zeros,
                up.table,
                up.bias,
                down.words,
                down.scales,
                down.zeros,
                down.table,
                down.bias,
                out.buffer().arg(out.elements()),
                gpu.faults(),
                self.ids.elements() as u32,
                self.ids.columns() as u32,
                self.experts as u32,
                self.x.columns() as u32,
                self.intermediate as u32,
                0,
                config,
                [config.x.elem(), gate.scale_elem, up.scale_elem, down.scale_elem],
            );
        }
    }
}

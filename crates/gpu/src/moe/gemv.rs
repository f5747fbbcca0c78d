//! Few tokens: one cube for each assignment and stretch of columns, which reads its expert's weights once.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::Tensor;
use marlin_ops::linear::Activation;

use super::dot::{dot, masked, place, span_units, whole_spans};
use super::experts::Operands;
use super::group::check_id;
use super::mlp::{Call, ExpertKernel};
use crate::Gpu;
use crate::decode::Decoder;
use crate::element::{Storage, load};
use crate::launch::cubes;
use crate::math::activate;

/// Units of a cube.
const UNITS: usize = 256;

/// What [`expert_rows`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct Config {
    x: Storage,
    first: Decoder,
    /// Of the weight whose product the first, activated, is multiplied with.
    second: Option<Decoder>,
    bias: [bool; 2],
    activation: Activation,
    /// Columns of a cube.
    columns: usize,
    /// Features in shared memory at most.
    features: usize,
    /// Ids are checked.
    check: bool,
}

impl Config {
    fn second(self) -> Decoder {
        self.second.unwrap_or(self.first)
    }

    /// Features in shared memory.
    fn chunk(self) -> usize {
        whole_spans(self.features, &[self.first, self.second()])
    }
}

/// `out [T k, N]`: `act(x W1 + b1) * (x W2 + b2)`, or `x W1 + b1`, with the weights of the assignment's expert. Row
/// `a / slots` of x belongs to assignment a.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn expert_rows<X: Numeric, S: Numeric, Q: Numeric>(
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
    out: &mut [f32],
    faults: &mut [Atomic<u32>],
    assignments: u32,
    slots: u32,
    top_k: u32,
    experts: u32,
    first_place: u32,
    features: u32,
    columns: u32,
    zero: u32,
    #[comptime] c: Config,
    #[define(X, S, Q)] _elements: [ElemType; 3],
) {
    let mut row = Shared::<[f32]>::new_slice(comptime!(c.features));
    let mut partial = Shared::<[f32]>::new_slice(2 * UNITS);
    let columns = columns as usize;
    let features = features as usize;
    let stretches = columns.div_ceil(c.columns);
    let a = CUBE_POS / stretches;
    if a < assignments as usize {
        let unit = UNIT_POS as usize;
        let lane = unit % c.columns;
        let slice = unit / c.columns + masked(zero);
        let slices = comptime!(UNITS / c.columns);
        let n = CUBE_POS % stretches * c.columns + lane;
        // Units beyond the last column take part with another's, so that all stay together.
        let own = select(n < columns, n, 0usize.runtime());
        let id = ids[a];
        if comptime!(c.check) {
            let checked = unit == 0usize && CUBE_POS % stretches == 0usize;
            check_id(ids, faults, a, top_k as usize, experts, checked);
        }
        let mut at = u32::MAX.runtime();
        let mut at2 = 0u32.runtime();
        if id < experts {
            at = places[(first_place * experts + id) as usize];
            if comptime!(c.second.is_some()) {
                at2 = places[((first_place + 1u32) * experts + id) as usize];
            }
        }
        if at != u32::MAX {
            let weight = place(at, features, columns, c.first);
            let weight2 = place(at2, features, columns, comptime!(c.second()));
            let start = a / slots as usize * features;
            let mut sum = f32::new(0.0);
            let mut sum2 = f32::new(0.0);
            let mut base = 0usize.runtime();
            while base < features {
                let chunk = comptime!(c.chunk());
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
                let d = comptime!(c.first);
                let span = comptime!(span_units(d));
                let begin = base / comptime!(d.unit());
                let mut end = begin + chunk / comptime!(d.unit());
                if end > weight.units {
                    end = weight.units;
                }
                sum += dot::<S>(
                    &row,
                    words,
                    scales,
                    zeros,
                    table,
                    &weight,
                    base,
                    begin + slice * span,
                    end,
                    comptime!(span * slices),
                    own,
                    columns,
                    d,
                );
                if comptime!(c.second.is_some()) {
                    let d = comptime!(c.second());
                    let span = comptime!(span_units(d));
                    let begin = base / comptime!(d.unit());
                    let mut end = begin + chunk / comptime!(d.unit());
                    if end > weight2.units {
                        end = weight2.units;
                    }
                    sum2 += dot::<Q>(
                        &row,
                        words2,
                        scales2,
                        zeros2,
                        table2,
                        &weight2,
                        base,
                        begin + slice * span,
                        end,
                        comptime!(span * slices),
                        own,
                        columns,
                        d,
                    );
                }
                sync_cube();
                base += chunk;
            }
            partial[unit] = sum;
            partial[UNITS + unit] = sum2;
            sync_cube();
            let mut total = partial[lane];
            for other in 1..slices {
                total += partial[other * c.columns + lane];
            }
            if comptime!(c.bias[0]) {
                total += bias[at as usize * columns + own];
            }
            if comptime!(c.second.is_some()) {
                let mut total2 = partial[UNITS + lane];
                for other in 1..slices {
                    total2 += partial[UNITS + other * c.columns + lane];
                }
                if comptime!(c.bias[1]) {
                    total2 += bias2[at2 as usize * columns + own];
                }
                total = activate(total, c.activation) * total2;
            }
            if slice == 0usize && n < columns {
                out[a * columns + n] = total;
            }
        }
    }
}

impl<R: Runtime> Call<'_, R> {
    /// Launches [`expert_rows`]: `ids [T, k]`, `out [T k, N]`, `slots` assignments a row of x.
    pub(super) fn rows(
        &self,
        gpu: &Gpu<R>,
        ids: &Tensor<Gpu<R>>,
        slots: usize,
        out: &Tensor<Gpu<R>>,
        kernel: &ExpertKernel,
        check: bool,
    ) {
        let config = Config {
            x: Storage::of(self.x.dtype()),
            first: self.first.weight.decoder,
            second: self.second.map(|bank| bank.weight.decoder),
            bias: [self.first.weight.bias.is_some(), self.second.is_some_and(|bank| bank.weight.bias.is_some())],
            activation: self.activation,
            columns: kernel.tile_n,
            features: kernel.tile_k,
            check,
        };
        let second = self.second.map_or_else(|| Operands::unread(gpu), |bank| bank.operands(gpu));
        let first = self.first.operands(gpu);
        let assignments = ids.elements();
        // SAFETY: banks hold their experts' weights of features times columns, places [3, E], out assignments times
        // columns and x assignments / slots times features; experts that are not in the banks are passed over.
        unsafe {
            expert_rows::launch_unchecked::<R>(
                gpu.client(),
                cubes(assignments * self.columns.div_ceil(config.columns)),
                CubeDim::new_1d(UNITS as u32),
                self.x.buffer().arg(self.x.elements()),
                ids.buffer().arg(assignments),
                self.group.places.arg(3 * self.experts),
                first.words,
                first.scales,
                first.zeros,
                first.table,
                first.bias,
                second.words,
                second.scales,
                second.zeros,
                second.table,
                second.bias,
                out.buffer().arg(out.elements()),
                gpu.faults(),
                assignments as u32,
                slots as u32,
                ids.columns() as u32,
                self.experts as u32,
                self.first_place as u32,
                self.features as u32,
                self.columns as u32,
                0,
                config,
                [config.x.elem(), first.scale_elem, second.scale_elem],
            );
        }
    }
}

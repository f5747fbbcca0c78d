//! Weighted sums of expert outputs: one unit an element of the output, slots in ascending order.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::Tensor;
use marlin_ops::linear::Residual;

use crate::Gpu;
use crate::element::{Storage, load, store, widen};
use crate::fault::{Fault, record};
use crate::launch::{cubes_for, units};

/// What [`combine_rows`] adds to.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
enum Addend {
    None,
    Tensor(Storage),
    InPlace,
}

/// What [`combine_rows`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct Config {
    rows: Storage,
    addend: Addend,
    out: Storage,
    /// Rows are in sorted order, not in that of assignments.
    sorted: bool,
}

/// `out[t] = addend[t] + sum_s weights[t, s] rows[row of (t, s)]`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn combine_rows<Z: Numeric, H: Numeric, O: Numeric>(
    rows: &[Z],
    inverse: &[u32],
    weights: &[f32],
    residual: &[H],
    out: &mut [O],
    faults: &mut [Atomic<u32>],
    elements: u32,
    columns: u32,
    top_k: u32,
    row_count: u32,
    #[comptime] c: Config,
    #[define(Z, H, O)] _elements: [ElemType; 3],
) {
    let columns = columns as usize;
    // No loop inside of a branch: units beyond the last element take part and store nothing.
    let inside = ABSOLUTE_POS < elements as usize;
    let at = select(inside, ABSOLUTE_POS, 0usize.runtime());
    let token = at / columns;
    let n = at % columns;
    let mut sum = f32::new(0.0);
    match comptime!(c.addend) {
        Addend::None => {}
        Addend::Tensor(storage) => sum = load::<H>(residual, at, storage),
        Addend::InPlace => sum = widen::<O>(out[at], c.out),
    }
    for s in 0..top_k as usize {
        let a = token * top_k as usize + s;
        let mut row = a as u32;
        if comptime!(c.sorted) {
            row = inverse[a];
        }
        if row >= row_count {
            record(faults, comptime!(Fault::InverseIndex), a);
            row = 0u32;
        }
        sum += weights[a] * load::<Z>(rows, row as usize * columns + n, c.rows);
    }
    if inside {
        store::<O>(out, at, sum, c.out);
    }
}

impl<R: Runtime> Gpu<R> {
    /// Adds up `rows [T k, N]`, which are in the order of assignments where there is no `inverse`.
    pub(super) fn combine(
        &self,
        rows: &Tensor<Self>,
        inverse: Option<&Tensor<Self>>,
        weights: &Tensor<Self>,
        residual: &Residual<'_, Self>,
        out: &Tensor<Self>,
    ) {
        let (elements, columns) = (out.elements(), out.columns());
        if elements == 0 {
            return;
        }
        let addend = match residual {
            Residual::None => Addend::None,
            Residual::Add(residual) => Addend::Tensor(Storage::of(residual.dtype())),
            Residual::InPlace => Addend::InPlace,
        };
        let residual = match residual {
            Residual::Add(residual) => residual.buffer().arg(elements),
            Residual::None | Residual::InPlace => self.unread(),
        };
        let config = Config {
            rows: Storage::of(rows.dtype()),
            addend,
            out: Storage::of(out.dtype()),
            sorted: inverse.is_some(),
        };
        let addend = if let Addend::Tensor(storage) = addend { storage } else { Storage::F32 };
        // SAFETY: out and the residual hold `elements`, weights and inverse one element an assignment; rows are
        // compared with their number.
        unsafe {
            combine_rows::launch_unchecked::<R>(
                self.client(),
                cubes_for(elements),
                units(),
                rows.buffer().arg(rows.elements()),
                inverse.map_or_else(|| self.unread(), |inverse| inverse.buffer().arg(inverse.elements())),
                weights.buffer().arg(weights.elements()),
                residual,
                out.buffer().arg(elements),
                self.faults(),
                elements as u32,
                columns as u32,
                weights.columns() as u32,
                rows.rows() as u32,
                config,
                [config.rows.elem(), addend.elem(), config.out.elem()],
            );
        }
    }
}

//! A few rows in the order of their assignments to experts, each times the trellis weight of its expert: a cube has one row, and
//! its weight's place in a bank of such weights, one behind the other.

use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::linear::Activation;
use marlin_ops::{Result, Tensor};

use super::parts::Parts;
use super::{available, bytes, rows};
use crate::launch::MOST_CUBES;
use crate::linear::operands::{Combine, Product};
use crate::weight::GpuWeight;
use crate::{Buffer, Gpu};

/// Rows of x in the order of assignments.
pub(crate) struct AssignedRows<'a, R: Runtime> {
    /// `[T, k]`: the expert of each.
    pub(crate) ids: &'a Tensor<Gpu<R>>,
    /// x has a row for so many of them.
    pub(crate) slots: usize,
    /// `[3, E]` places in banks.
    pub(crate) places: &'a Buffer,
    /// Number of the projection among gate, up and down.
    pub(crate) projection: usize,
    pub(crate) experts: usize,
}

/// The same as kernels take it; without assignments, only the number of rows.
pub(super) struct Arguments<R: Runtime> {
    pub(super) ids: BufferArg<R>,
    pub(super) places: BufferArg<R>,
    /// Rows of sums.
    pub(super) m: u32,
    pub(super) slots: u32,
    pub(super) experts: u32,
    pub(super) projection: u32,
}

impl<R: Runtime> Arguments<R> {
    /// Those of `m` rows, or of rows of experts.
    pub(super) fn new(gpu: &Gpu<R>, m: usize, assigned: Option<&AssignedRows<'_, R>>) -> Self {
        let Some(assigned) = assigned else {
            let (ids, places) = (gpu.unread(), gpu.unread());
            return Self { ids, places, m: m as u32, slots: 1, experts: 0, projection: 0 };
        };
        let assignments = assigned.ids.elements();
        Self {
            ids: assigned.ids.buffer().arg(assignments),
            places: assigned.places.arg(3 * assigned.experts),
            m: assignments as u32,
            slots: assigned.slots as u32,
            experts: assigned.experts as u32,
            projection: assigned.projection as u32,
        }
    }
}

/// Where a cube's rows and its weight begin.
#[derive(CubeType)]
pub(super) struct Origin {
    /// Among the rows of x, of which there are `x_rows`.
    pub(super) x: usize,
    pub(super) x_rows: usize,
    /// Among those of a slice of the sums, which has `rows`.
    pub(super) row: usize,
    pub(super) rows: usize,
    /// The place of the weight among others; [`u32::MAX`] if there is none.
    pub(super) place: u32,
}

/// The origin of a cube, of `m` rows in all; of experts, assignment [`CUBE_POS_Z`] has row `assignment / slots` of x.
#[cube]
pub(super) fn origin(
    ids: &[u32],
    places: &[u32],
    m: usize,
    slots: u32,
    experts: u32,
    projection: u32,
    #[comptime] of_experts: bool,
) -> Origin {
    let mut origin = Origin { x: 0usize, x_rows: m, row: 0usize, rows: m, place: 0u32.runtime() };
    if comptime!(of_experts) {
        let expert = ids[CUBE_POS_Z as usize];
        origin.x = (CUBE_POS_Z / slots) as usize;
        origin.x_rows = m / slots as usize;
        origin.row = CUBE_POS_Z as usize;
        origin.place = u32::MAX.runtime();
        if expert < experts {
            origin.place = places[(projection * experts + expert) as usize];
        }
    }
    origin
}

/// Enqueues the products of rows as they come with the weights of a bank, which has N and K of one:
/// `[slices, assignments, N padded]`, to be added up and rotated; nothing if no kernel takes them. Rows of experts without a
/// place are not written.
///
/// # Errors
/// An unsupported error that names the limit where the kernel cannot have this shape.
pub(crate) fn multiply<R: Runtime>(
    gpu: &Gpu<R>,
    operation: &'static str,
    weight: &GpuWeight,
    x: &Tensor<Gpu<R>>,
    assigned: &AssignedRows<'_, R>,
) -> Result<Option<Tensor<Gpu<R>>>> {
    let assignments = assigned.ids.elements();
    debug_assert_eq!(x.rows() * assigned.slots, assignments);
    // Words have indices of 32 bits, and assignments are the third dimension of a launch.
    let fits = u32::try_from(weight.word_count).is_ok() && assignments <= MOST_CUBES as usize;
    let Some(trellis) = weight.trellis().filter(|_| fits && available(gpu)) else {
        return Ok(None);
    };
    let product = Product {
        operation,
        x,
        norm: None,
        weight,
        up: None,
        activation: Activation::None,
        out_scale: 1.0,
        combine: Combine::Nothing,
        // Only sums are written.
        out: x,
    };
    // Rows of f16 too keep what the mode keeps of f32.
    let parts = Parts::of(gpu, DType::F32);
    if bytes::takes(trellis, parts) {
        return bytes::multiply(gpu, &product, trellis, None, Some(assigned)).map(Some);
    }
    let plan = rows::Plan::of_experts(gpu, &product, trellis, parts, assignments);
    let dims = [plan.slices, assignments, weight.padded_out()];
    let partials = gpu.scratch(operation, DType::F32, &dims)?;
    rows::multiply(gpu, &product, &plan, rows::Rows::Assigned(assigned), &partials)?;
    Ok(Some(partials))
}

//! Sums and maxima over the units of a cube, in an order that depends on its shape alone.

use cubecl::prelude::*;

/// The sum over all units, known to each of them; `units` is the size of the cube.
#[cube]
#[allow(clippy::manual_is_multiple_of)] // Kernels have no such method.
pub(crate) fn cube_sum(value: f32, #[comptime] units: usize) -> f32 {
    let mut partial = Shared::<[f32]>::new_slice(units);
    let sum = plane_sum(value);
    if UNIT_POS % PLANE_DIM == 0 {
        partial[(UNIT_POS / PLANE_DIM) as usize] = sum;
    }
    sync_cube();
    let mut total = f32::new(0.0);
    for plane in 0..CUBE_DIM.div_ceil(PLANE_DIM) {
        total += partial[plane as usize];
    }
    // The memory may be written again at once.
    sync_cube();
    total
}

/// The largest value of all units, known to each of them; NaN is ignored.
#[cube]
#[allow(clippy::manual_is_multiple_of)] // Kernels have no such method.
pub(crate) fn cube_max(value: f32, #[comptime] units: usize) -> f32 {
    let mut partial = Shared::<[f32]>::new_slice(units);
    let max = plane_max(value);
    if UNIT_POS % PLANE_DIM == 0 {
        partial[(UNIT_POS / PLANE_DIM) as usize] = max;
    }
    sync_cube();
    let mut total = partial[0];
    for plane in 1..CUBE_DIM.div_ceil(PLANE_DIM) {
        total = max_of(total, partial[plane as usize]);
    }
    sync_cube();
    total
}

/// The larger of two values.
#[cube]
pub(crate) fn max_of(a: f32, b: f32) -> f32 {
    select(b > a, b, a)
}

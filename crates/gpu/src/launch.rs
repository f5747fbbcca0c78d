//! Shapes of launches.

use cubecl::prelude::*;

/// Units of a cube that works on elements or on one row.
pub(crate) const UNITS: u32 = 128;

/// Largest count along one dimension that all devices allow.
pub(crate) const MOST_CUBES: u32 = 65_535;

/// At least `count` cubes: kernels compare [`CUBE_POS`] with what they have to do.
pub(crate) fn cubes(count: usize) -> CubeCount {
    let count = u32::try_from(count).unwrap_or(u32::MAX).max(1);
    if count <= MOST_CUBES {
        return CubeCount::Static(count, 1, 1);
    }
    let rows = count.div_ceil(MOST_CUBES);
    CubeCount::Static(count.div_ceil(rows), rows, 1)
}

/// Cubes of [`UNITS`] for at least `elements` units: kernels compare [`ABSOLUTE_POS`] with what they have to do.
pub(crate) fn cubes_for(elements: usize) -> CubeCount {
    cubes(elements.div_ceil(UNITS as usize))
}

/// A cube of [`UNITS`].
pub(crate) fn units() -> CubeDim {
    CubeDim::new_1d(UNITS)
}

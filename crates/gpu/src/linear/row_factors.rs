//! The row factors `1 / sqrt(mean_k x^2 + eps)` of an input norm, for kernels whose cubes do not see whole rows.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::linear::InputNorm;
use marlin_ops::{Result, Tensor};

use crate::element::{Storage, load};
use crate::launch::{UNITS, cubes, units};
use crate::reduce::cube_sum;
use crate::{Buffer, Gpu};

#[cube(launch_unchecked)]
fn row_factors<X: Numeric>(
    x: &[X],
    out: &mut [f32],
    rows: u32,
    columns: u32,
    eps: f32,
    #[comptime] storage: Storage,
    #[define(X)] _element: ElemType,
) {
    let row = CUBE_POS;
    if row < rows as usize {
        let columns = columns as usize;
        let mut squares = f32::new(0.0);
        let mut i = UNIT_POS as usize;
        while i < columns {
            let value = load::<X>(x, row * columns + i, storage);
            squares += value * value;
            i += UNITS as usize;
        }
        let mean = cube_sum(squares, UNITS as usize) / f32::cast_from(columns as u32);
        if UNIT_POS == 0 {
            out[row] = 1.0f32 / f32::sqrt(mean + eps);
        }
    }
}

/// Enqueues the kernel, `[M]` f32.
pub(super) fn launch<R: Runtime>(
    gpu: &Gpu<R>,
    operation: &'static str,
    x: &Tensor<Gpu<R>>,
    norm: &InputNorm<'_, Gpu<R>>,
) -> Result<Buffer> {
    let (rows, columns) = (x.rows(), x.columns());
    let factors = gpu.scratch(operation, DType::F32, &[rows])?;
    let storage = Storage::of(x.dtype());
    // SAFETY: x holds rows * columns elements, the output rows.
    unsafe {
        row_factors::launch_unchecked::<R>(
            gpu.client(),
            cubes(rows),
            units(),
            x.buffer().arg(x.elements()),
            factors.buffer().arg(rows),
            rows as u32,
            columns as u32,
            norm.eps,
            storage,
            storage.elem(),
        );
    }
    Ok(factors.buffer().clone())
}

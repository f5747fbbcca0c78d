//! Softmax of rows: a cube a row.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::{OpError, Result, Tensor};

use super::order::{BAD, BANNED, cube_max_word, key_of, logit_of};
use crate::Gpu;
use crate::element::{Storage, load, store};
use crate::fault::{self, Fault};
use crate::launch::{UNITS, cubes, units};
use crate::math::exp;
use crate::reduce::cube_sum;

const OP: &str = "softmax";

/// Terms of the inner of the two sums of a unit.
const INNER: u32 = 16;

/// `out[row, i] = exp(x[row, i] - max) / sum`; NaN, +inf and a row of only -inf are faults.
#[cube(launch_unchecked)]
fn softmax_rows<E: Numeric, O: Numeric>(
    x: &[E],
    out: &mut [O],
    faults: &mut [Atomic<u32>],
    rows: u32,
    columns: u32,
    #[comptime] storage: [Storage; 2],
    #[define(E, O)] _elements: [ElemType; 2],
) {
    let row = CUBE_POS;
    if row < rows as usize {
        let columns = columns as usize;
        let start = row * columns;
        let mut key = 0u32.runtime();
        let mut bad = columns;
        let mut i = UNIT_POS as usize;
        while i < columns {
            let other = key_of(load::<E>(x, start + i, comptime!(storage[0])));
            bad = select(other == BAD && bad == columns, i, bad);
            key = select(other > key, other, key);
            i += UNITS as usize;
        }
        if bad < columns {
            fault::record(faults, Fault::SoftmaxLogit, start + bad);
        }
        let key = cube_max_word(key, UNITS as usize);
        if key == BANNED && UNIT_POS == 0 {
            fault::record(faults, Fault::SoftmaxEmpty, row);
        }
        let largest = logit_of(key);
        // Sums of a few terms, then of these: the error of one sum would grow with the vocabulary.
        let mut sum = f32::new(0.0);
        let mut inner = f32::new(0.0);
        let mut terms = 0u32.runtime();
        let mut i = UNIT_POS as usize;
        while i < columns {
            inner += exp(load::<E>(x, start + i, comptime!(storage[0])) - largest);
            terms += 1u32;
            let full = terms % INNER == 0u32;
            sum += select(full, inner, f32::new(0.0));
            inner = select(full, f32::new(0.0), inner);
            i += UNITS as usize;
        }
        let sum = cube_sum(sum + inner, UNITS as usize);
        let mut i = UNIT_POS as usize;
        while i < columns {
            let value = exp(load::<E>(x, start + i, comptime!(storage[0])) - largest);
            store::<O>(out, start + i, value / sum, comptime!(storage[1]));
            i += UNITS as usize;
        }
    }
}

impl<R: Runtime> Gpu<R> {
    /// `out = softmax(x)` by rows of `[R, V]`, f32 or 16-bit floats each.
    ///
    /// # Errors
    /// Tensors of different shapes or other types. A NaN or +inf element and a row of only -inf are errors of the next
    /// read.
    pub fn softmax(&self, x: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        for (operand, tensor) in [("x", x), ("out", &*out)] {
            if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
                let (found, expected) = (tensor.dtype(), "F32, F16 or BF16");
                return Err(OpError::DType { operation: OP, operand, found, expected });
            }
        }
        if x.dims() != out.dims() {
            return Err(OpError::shape(OP, "out", out.dims(), format!("{:?}", x.dims())));
        }
        let count = x.elements();
        if count == 0 {
            return Ok(());
        }
        let storage = [Storage::of(x.dtype()), Storage::of(out.dtype())];
        // SAFETY: both buffers hold rows * columns elements; the kernel stays within a row, its cubes within the rows.
        unsafe {
            softmax_rows::launch_unchecked::<R>(
                self.client(),
                cubes(x.rows()),
                units(),
                x.buffer().arg(count),
                out.buffer().arg(count),
                self.faults(),
                x.rows() as u32,
                x.columns() as u32,
                storage,
                storage.map(Storage::elem),
            );
        }
        Ok(())
    }
}

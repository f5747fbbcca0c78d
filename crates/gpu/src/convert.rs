//! Float conversion and copies.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::{ConvertOps, Result, Tensor};

use crate::Gpu;
use crate::element::{Storage, load, store};
use crate::launch::{cubes_for, units};

#[cube(launch_unchecked)]
fn convert_elements<I: Numeric, O: Numeric>(
    x: &[I],
    out: &mut [O],
    count: u32,
    #[comptime] storage: [Storage; 2],
    #[define(I, O)] _elements: [ElemType; 2],
) {
    let i = ABSOLUTE_POS;
    if i < count as usize {
        store::<O>(out, i, load::<I>(x, i, comptime!(storage[0])), comptime!(storage[1]));
    }
}

impl<R: Runtime> ConvertOps for Gpu<R> {
    fn run_convert(&self, x: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        let count = x.elements();
        let storage = [Storage::of(x.dtype()), Storage::of(out.dtype())];
        // SAFETY: both buffers hold `count` elements and units beyond do nothing.
        unsafe {
            convert_elements::launch_unchecked::<R>(
                self.client(),
                cubes_for(count),
                units(),
                x.buffer().arg(count),
                out.buffer().arg(count),
                count as u32,
                storage,
                storage.map(Storage::elem),
            );
        }
        Ok(())
    }
}

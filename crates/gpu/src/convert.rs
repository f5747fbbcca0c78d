//! Float conversion; [`crate::dequantize`] decodes weights.

use cubecl::ir::{ElemType, UIntKind};
use cubecl::prelude::*;
use marlin_ops::convert::DequantizeArgs;
use marlin_ops::{ConvertOps, Result, Tensor};

use crate::element::{Storage, narrow_bits, widen_bits};
use crate::launch::{cubes_for, units};
use crate::{Gpu, dequantize};

/// Elements as their bits in u32 or u16, so that devices that flush subnormals or change NaN convert them all the same.
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
        let bits = widen_bits(u32::cast_from(x[i]), comptime!(storage[0]));
        out[i] = O::cast_from(narrow_bits(bits, comptime!(storage[1])));
    }
}

/// The element type that holds a float's bits.
fn bits(storage: Storage) -> ElemType {
    ElemType::UInt(if storage == Storage::F32 { UIntKind::U32 } else { UIntKind::U16 })
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
                storage.map(bits),
            );
        }
        Ok(())
    }
    fn run_dequantize(&self, args: DequantizeArgs<'_, Self>) -> Result<()> {
        dequantize::launch(self, args)
    }
}

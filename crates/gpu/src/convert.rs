//! Float conversion; [`crate::dequantize`] decodes weights.

use cubecl::ir::{ElemType, UIntKind};
use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::convert::DequantizeArgs;
use marlin_ops::{ConvertOps, OpError, Result, Tensor};

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

/// f32 to bf16, both as bits; NaN becomes quiet.
#[cube(launch_unchecked)]
fn truncate_elements(x: &[u32], out: &mut [u16], count: u32) {
    let i = ABSOLUTE_POS;
    if i < count as usize {
        let bits = x[i];
        let quiet = select((bits & 0x7fff_ffffu32) > 0x7f80_0000u32, 0x40u32, 0u32.runtime());
        out[i] = u16::cast_from((bits >> 16u32) | quiet);
    }
}

impl<R: Runtime> Gpu<R> {
    /// Every f32 of `x` rounded toward zero to bf16; NaN stays a quiet NaN with its sign and leading payload.
    ///
    /// # Errors
    /// Tensors of different shapes or other types.
    pub fn convert_toward_zero(&self, x: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        const OP: &str = "convert";
        for (operand, found, dtype) in [("x", x.dtype(), DType::F32), ("out", out.dtype(), DType::BF16)] {
            if found != dtype {
                return Err(OpError::DType { operation: OP, operand, found, expected: dtype.name() });
            }
        }
        if x.dims() != out.dims() {
            return Err(OpError::shape(OP, "out", out.dims(), format!("{:?}", x.dims())));
        }
        let count = x.elements();
        if count == 0 {
            return Ok(());
        }
        // SAFETY: both buffers hold `count` elements and units beyond do nothing.
        unsafe {
            truncate_elements::launch_unchecked::<R>(
                self.client(),
                cubes_for(count),
                units(),
                x.buffer().arg(count),
                out.buffer().arg(count),
                count as u32,
            );
        }
        Ok(())
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

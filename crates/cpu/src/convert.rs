//! Float conversion: integer bit manipulation in both directions, so that no value depends on the floating-point mode.

use marlin_ops::{ConvertOps, Result, Tensor};

use crate::buffer::{Floats, FloatsMut};
use crate::{Buffer, Cpu};

/// Elements converted through one stretch of scratch.
const CHUNK: usize = 4096;

impl ConvertOps for Cpu {
    fn run_convert(&self, x: &Tensor<Self>, out: &mut Tensor<Self>) -> Result<()> {
        const OP: &str = "convert";
        let elements = x.elements();
        if x.dtype() == out.dtype() {
            match (x.buffer(), out.buffer_mut()) {
                (Buffer::F32(x), Buffer::F32(out)) => {
                    out[..elements].copy_from_slice(&x[..elements]);
                    return Ok(());
                }
                (Buffer::Half(x), Buffer::Half(out)) => {
                    out[..elements].copy_from_slice(&x[..elements]);
                    return Ok(());
                }
                _ => {}
            }
        }
        let source = Floats::of(OP, "x", x)?;
        let mut target = FloatsMut::of(OP, "out", out)?;
        let mut scratch = self.workspace.floats.take(CHUNK);
        for start in (0..elements).step_by(CHUNK) {
            let values = &mut scratch[..CHUNK.min(elements - start)];
            source.widen(self.level, start, values);
            target.store(start, values);
        }
        Ok(())
    }
}

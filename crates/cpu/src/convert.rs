//! Float conversion: integer bit manipulation in both directions, so that no value depends on the floating-point mode.

use marlin_formats::exl3::HADAMARD;
use marlin_ops::convert::{DequantizeArgs, WeightOrder};
use marlin_ops::{ConvertOps, Result, Tensor};

use crate::buffer::{Floats, FloatsMut};
use crate::layout::Values;
use crate::{Buffer, Cpu};

/// Elements converted through one stretch of scratch.
const CHUNK: usize = 4096;

/// Output features decoded side by side.
const STRETCH: usize = 16;

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
    fn run_dequantize(&self, args: DequantizeArgs<'_, Self>) -> Result<()> {
        let (weight, count, k) = (args.weight.data(), args.count(), args.weight.in_features());
        let mut target = FloatsMut::of("dequantize", "out", args.out)?;
        if let Values::Exl3(q) = &weight.values {
            // A Hadamard block of outputs at a time.
            let mut block = self.workspace.doubles.take(HADAMARD * HADAMARD);
            let mut columns = self.workspace.floats.take(HADAMARD * k);
            let mut n = 0;
            while n < count {
                let width = (HADAMARD - (args.first + n) % HADAMARD).min(count - n);
                let columns = &mut columns[..width * k];
                q.columns(args.first + n, k, &mut block, columns);
                match args.order {
                    WeightOrder::OutputMajor => target.store(n * k, columns),
                    WeightOrder::InputMajor => {
                        for row in 0..k {
                            let stretch: [f32; HADAMARD] =
                                std::array::from_fn(|i| if i < width { columns[i * k + row] } else { 0.0 });
                            target.store(row * count + n, &stretch[..width]);
                        }
                    }
                }
                n += width;
            }
            return Ok(());
        }
        match args.order {
            WeightOrder::OutputMajor => {
                let mut row = self.workspace.floats.take(k);
                for n in 0..count {
                    weight.column(args.first + n, &mut row);
                    target.store(n * k, &row);
                }
            }
            // Some columns at a time, so that rows are written in stretches.
            WeightOrder::InputMajor => {
                let mut columns = self.workspace.floats.take(STRETCH * k);
                for n in (0..count).step_by(STRETCH) {
                    let width = STRETCH.min(count - n);
                    for (i, column) in columns.chunks_exact_mut(k).take(width).enumerate() {
                        weight.column(args.first + n + i, column);
                    }
                    for row in 0..k {
                        let stretch: [f32; STRETCH] = std::array::from_fn(|i| columns[i * k + row]);
                        target.store(row * count + n, &stretch[..width]);
                    }
                }
            }
        }
        Ok(())
    }
}

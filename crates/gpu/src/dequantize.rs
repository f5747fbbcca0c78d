//! Weights decoded to floats.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_ops::Result;
use marlin_ops::convert::{DequantizeArgs, WeightOrder};

use crate::Gpu;
use crate::decode::{Decoder, Levels, decode_unit, group_scale, group_zero, weight_of};
use crate::element::{Storage, store};
use crate::launch::{cubes_for, units};
use crate::linear::exl3::{Rows, Unfolded, unfold};

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct DequantizeConfig {
    decoder: Decoder,
    out: Storage,
    order: WeightOrder,
}

/// Each unit decodes one unit of one output feature: `out[n, k]` or `out[k, n]` for features `first..first + count`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn dequantize_units<S: Numeric, O: Numeric>(
    words: &[u32],
    scales: &[S],
    zeros: &[S],
    table: &[f32],
    out: &mut [O],
    in_features: u32,
    out_features: u32,
    first: u32,
    count: u32,
    #[comptime] c: DequantizeConfig,
    #[define(S, O)] _elements: [ElemType; 2],
) {
    let k = in_features as usize;
    let width = comptime!(c.decoder.unit());
    // Neighbouring units take neighbouring features, whose words are neighbours.
    let unit = ABSOLUTE_POS / count as usize;
    let n = ABSOLUTE_POS % count as usize;
    if unit * width < k {
        let column = first as usize + n;
        let values = decode_unit(words, table, 0usize.runtime(), unit, column, out_features as usize, c.decoder);
        let mut scale = f32::new(1.0);
        let mut zero = f32::new(0.0);
        if comptime!(c.decoder.levels != Levels::Dense) {
            let at = unit * width / comptime!(c.decoder.group_size.max(1)) * out_features as usize + column;
            scale = group_scale::<S>(scales, table, at, c.decoder);
            zero = group_zero::<S>(zeros, at, c.decoder);
        }
        #[unroll]
        for i in 0..width {
            let row = unit * width + i;
            if row < k {
                let mut value = values[i];
                if comptime!(c.decoder.levels != Levels::Dense) {
                    value = weight_of(value, scale, zero, c.decoder);
                }
                if comptime!(c.order == WeightOrder::OutputMajor) {
                    store::<O>(out, n * k + row, value, c.out);
                } else {
                    store::<O>(out, row * count as usize + n, value, c.out);
                }
            }
        }
    }
}

/// Enqueues [`marlin_ops::ConvertOps::dequantize`].
pub(crate) fn launch<R: Runtime>(gpu: &Gpu<R>, args: DequantizeArgs<'_, Gpu<R>>) -> Result<()> {
    let (weight, count) = (args.weight.data(), args.count());
    if let Some(trellis) = weight.trellis() {
        let to = Unfolded { out: args.out, rows: count, transposed: args.order == WeightOrder::InputMajor };
        return unfold(gpu, weight, trellis, &Rows::From(args.first), &to);
    }
    let out = Storage::of(args.out.dtype());
    let config = DequantizeConfig { decoder: weight.decoder, out, order: args.order };
    // SAFETY: the buffers hold what the weight says they do, out holds K * count elements; the kernel stays within.
    unsafe {
        dequantize_units::launch_unchecked::<R>(
            gpu.client(),
            cubes_for(weight.units() * count),
            units(),
            weight.words.arg(weight.word_count),
            weight.scales.arg(weight.scale_count),
            weight.zeros.arg(weight.zero_count),
            weight.table.arg(weight.table_len),
            args.out.buffer().arg(args.out.elements()),
            weight.in_features as u32,
            weight.out_features as u32,
            args.first as u32,
            count as u32,
            config,
            [weight.decoder.scale_elem(), out.elem()],
        );
    }
    Ok(())
}

//! Products of rows with the weights of their experts: rows sorted by expert, one task per expert and block of rows.

use marlin_ops::Result;
use marlin_ops::moe::{GroupedGemmArgs, RowOrder, offsets_error, permutation_error};

use super::{ROW_BLOCK, check_ids, copy_tile, group};
use crate::Cpu;
use crate::buffer::{FloatsMut, f32s, u32s};
use crate::layout::PackedWeight;
use crate::linear::Layer;

const OP: &str = "moe_grouped_gemm";

/// Offsets go up from 0 to the number of rows.
fn check_offsets(offsets: &[u32], rows: usize) -> Result<()> {
    let last = offsets.len() - 1;
    let bad = |&i: &usize| {
        let least = if i == 0 { 0 } else { offsets[i - 1] };
        offsets[i] < least || (i == 0 && offsets[0] != 0) || (i == last && offsets[i] as usize != rows)
    };
    (0..=last).find(bad).map_or(Ok(()), |i| Err(offsets_error(i)))
}

/// Body of [`marlin_ops::MoeOps::moe_grouped_gemm`].
pub(super) fn moe_grouped_gemm(cpu: &Cpu, args: GroupedGemmArgs<'_, Cpu>) -> Result<()> {
    let [k, n] = args.weight_shape();
    let (rows, slots, count) = (args.out.rows(), args.slots(), args.experts.count());
    let mut own_offsets = cpu.workspace.indices.take(count + 1);
    // Row of x of each sorted row, and, in token order, the assignment that it belongs to.
    let mut sources = cpu.workspace.indices.take(rows);
    let mut assignments = cpu.workspace.indices.take(rows);
    let is_token = matches!(args.order, RowOrder::Token { .. });
    match &args.order {
        RowOrder::Token { ids } => {
            let ids_of = u32s(OP, "ids", ids)?;
            check_ids(ids_of, ids.columns(), count)?;
            group(ids_of, &mut own_offsets, &mut assignments, &mut sources);
            sources.iter_mut().zip(&*assignments).for_each(|(source, a)| *source = a / slots as u32);
        }
        RowOrder::Sorted { offsets, permutation } => {
            let offsets = u32s(OP, "offsets", offsets)?;
            check_offsets(offsets, rows)?;
            own_offsets.copy_from_slice(offsets);
            match permutation {
                Some(permutation) => {
                    let permutation = u32s(OP, "permutation", permutation)?;
                    if let Some(row) = permutation.iter().position(|&a| a as usize >= rows) {
                        return Err(permutation_error(row));
                    }
                    sources.iter_mut().zip(permutation).for_each(|(source, a)| *source = a / slots as u32);
                }
                None => sources.iter_mut().enumerate().for_each(|(row, source)| *source = row as u32),
            }
        }
    }
    let projection = args.projection as usize;
    let weight = |e: usize| -> &PackedWeight {
        let expert = &args.experts.data().0[e];
        [&expert.gate, &expert.up, &expert.down][projection]
    };
    let offsets = &own_offsets;
    let mut x = cpu.activations(f32s(OP, "x", args.x)?, k, &[], true);
    for e in (0..count).filter(|&e| offsets[e] < offsets[e + 1]) {
        cpu.prepare_activations(&mut x, &[weight(e)], true);
    }
    let x = x.with_index(&sources);
    let mut sorted = cpu.workspace.floats.take(rows * n);
    let mut rest = &mut sorted[..];
    let mut tasks = Vec::new();
    for e in 0..count {
        for first in (offsets[e] as usize..offsets[e + 1] as usize).step_by(ROW_BLOCK) {
            let block = first..(first + ROW_BLOCK).min(offsets[e + 1] as usize);
            let (out, others) = rest.split_at_mut(block.len() * n);
            rest = others;
            tasks.push((e, block, out));
        }
    }
    cpu.pool.for_items(tasks, |(e, rows, out)| {
        let layer = Layer { weight: weight(e), activation: args.activation, scale: 1.0 };
        let mut panels = cpu.panels(k);
        let (step, end) = (layer.weight.step(), layer.weight.tiles());
        let mut acc = cpu.workspace.lines.take(step * rows.len());
        for tile in (0..end).step_by(step) {
            let tiles = tile..end.min(tile + step);
            cpu.linear_tiles(&layer, tiles.clone(), &x, rows.clone(), &mut panels, &mut acc);
            for (tile, lines) in tiles.zip(acc.chunks_exact(rows.len())) {
                copy_tile(lines, tile, layer.weight.columns(tile), out);
            }
        }
    });
    let mut out = FloatsMut::of(OP, "out", args.out)?;
    if !is_token {
        out.store(0, &sorted);
        return Ok(());
    }
    for (row, &a) in sorted.chunks_exact(n).zip(&*assignments) {
        out.store(a as usize * n, row);
    }
    Ok(())
}

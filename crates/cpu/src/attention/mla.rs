//! Multi-head latent attention. `kv_b` is always decoded to f32: it is part of the attention, not a linear layer of the
//! fast mode.

mod absorbed;
mod exl3;

use std::ops::Range;

use marlin_ops::Result;
use marlin_ops::attention::{MlaAttentionArgs, MlaDims};

use super::EmptyRows;
use super::flash::{CacheRows, Ending, Flash, Query, padded};
use crate::Cpu;
use crate::buffer::{Floats, f32s, f32s_mut};
use crate::layout::PackedWeight;
use crate::linear::{Activations, Panels};
use crate::simd::LANES;

/// Latent rows expanded at once, and queries attended at once, in the prefill.
const ROW_BLOCK: usize = 32;

/// One call.
pub(super) struct Mla<'a> {
    cpu: &'a Cpu,
    dims: MlaDims,
    q: &'a [f32],
    cache: Floats<'a>,
    kv_len: &'a [usize],
    kv_b: &'a PackedWeight,
    scale: f32,
    out: &'a mut [f32],
}

impl<'a> Mla<'a> {
    pub(super) fn new(operation: &'static str, cpu: &'a Cpu, args: MlaAttentionArgs<'a, Cpu>) -> Result<Self> {
        Ok(Self {
            cpu,
            dims: args.dims(),
            q: f32s(operation, "q", args.q)?,
            cache: Floats::of(operation, "cache", args.cache)?,
            kv_len: args.kv_len,
            kv_b: args.kv_b.data(),
            scale: args.scale,
            out: f32s_mut(operation, "out", args.out)?,
        })
    }

    /// Width of a query row.
    fn q_width(&self) -> usize {
        self.dims.nope + self.dims.rope
    }

    /// Keys and values expanded per head, then ordinary attention.
    pub(super) fn prefill(self) -> Result<()> {
        let (cpu, d) = (self.cpu, self.dims);
        let longest = self.kv_len.iter().copied().max().unwrap_or(0);
        let mut latent = cpu.workspace.floats.take(d.batch * longest * d.rank);
        cpu.for_rows(&mut latent, d.rank, |row, out| {
            let (b, j) = (row / longest, row % longest);
            if j < self.kv_len[b] {
                let start = (b * d.capacity + j) * (d.rank + d.rope);
                self.cache.widen(cpu.level, start, out);
            }
        });
        let value_width = padded(d.value);
        let task_len = d.queries * value_width;
        let mut heads = cpu.workspace.floats.take(d.batch * d.heads * task_len);
        let empty = EmptyRows::new();
        cpu.pool.for_chunks(&mut heads, task_len, |task, out| {
            let (b, h) = (task / d.heads, task % d.heads);
            let latent = &latent[b * longest * d.rank..][..self.kv_len[b] * d.rank];
            self.prefill_head(b, h, latent, out, &empty);
        });
        empty.check(d.queries, d.heads)?;
        if d.value == 0 {
            return Ok(());
        }
        for (row, out) in self.out.chunks_exact_mut(d.value).enumerate() {
            let (b, i, h) = (row / d.heads / d.queries, row / d.heads % d.queries, row % d.heads);
            let at = (b * d.heads + h) * task_len + i * value_width;
            out.copy_from_slice(&heads[at..at + d.value]);
        }
        Ok(())
    }

    /// All queries of one head; `latent` is `[kv_len, r]`, `out` `[Sq, v padded]`.
    fn prefill_head(&self, b: usize, h: usize, latent: &[f32], out: &mut [f32], empty: &EmptyRows) {
        let (cpu, d) = (self.cpu, self.dims);
        let (kv_len, expanded_width) = (self.kv_len[b], d.nope + d.value);
        let mut expanded = cpu.workspace.floats.take(kv_len * expanded_width);
        let x = cpu.activations(latent, d.rank, &[], false).f32_only();
        let columns = h * expanded_width..(h + 1) * expanded_width;
        cpu.multiply_columns(self.kv_b, columns, &x, kv_len, |row, at, values| {
            expanded[row * expanded_width + at..][..values.len()].copy_from_slice(values);
        });
        let rows_of = |start: usize, width: usize| CacheRows {
            data: Floats::F32(&expanded),
            start,
            stride: expanded_width,
            width,
        };
        let keys = [rows_of(0, d.nope), self.rope_rows(b)];
        let (width, value_width) = (padded(self.q_width()), padded(d.value));
        let scratch_len = Flash::scratch_len(width, value_width, ROW_BLOCK);
        let mut scratch = cpu.workspace.floats.take(scratch_len);
        let mut q = cpu.workspace.floats.take(ROW_BLOCK * width);
        for first in (0..d.queries).step_by(ROW_BLOCK) {
            let count = ROW_BLOCK.min(d.queries - first);
            let row_id = |i: usize| (b * d.queries + first + i) * d.heads + h;
            let mut queries = [Query::EMPTY; ROW_BLOCK];
            let q = &mut q[..count * width];
            for (i, row) in q.chunks_exact_mut(width).enumerate() {
                let source = &self.q[row_id(i) * self.q_width()..][..self.q_width()];
                row[..source.len()].copy_from_slice(source);
                row[source.len()..].fill(0.0);
                queries[i].end = self.visible(b, first + i);
            }
            let mut seen = [false; ROW_BLOCK];
            cpu.level.run(Flash {
                q,
                queries: &queries[..count],
                keys: &keys,
                values: rows_of(d.nope, d.value),
                scale: self.scale,
                softcap: None,
                scratch: &mut scratch,
                out: &mut out[first * value_width..(first + count) * value_width],
                ending: Ending::Divided { seen: &mut seen[..count] },
            });
            record_empty(&seen[..count], row_id, empty);
        }
    }

    /// Keys visible to query `i`.
    fn visible(&self, b: usize, i: usize) -> usize {
        self.kv_len[b] - self.dims.queries + i + 1
    }

    /// The rotary part of the cache rows of a sequence.
    fn rope_rows(&self, b: usize) -> CacheRows<'a> {
        let row = self.dims.rank + self.dims.rope;
        CacheRows {
            data: self.cache,
            start: b * self.dims.capacity * row + self.dims.rank,
            stride: row,
            width: self.dims.rope,
        }
    }
}

fn record_empty(seen: &[bool], row_id: impl Fn(usize) -> usize, empty: &EmptyRows) {
    for (r, seen) in seen.iter().enumerate() {
        if !seen {
            empty.record(row_id(r));
        }
    }
}

impl Cpu {
    /// `x W` for some output columns, f32 activations; `store(row, column - columns.start, values)` gets the results.
    fn multiply_columns(
        &self,
        weight: &PackedWeight,
        columns: Range<usize>,
        x: &Activations<'_>,
        rows: usize,
        mut store: impl FnMut(usize, usize, &[f32]),
    ) {
        let mut panels: Panels<'_> = self.panels(weight.in_features);
        let step = weight.step();
        let mut acc = self.workspace.lines.take(step * ROW_BLOCK);
        for tile in (columns.start / LANES / step * step..columns.end.div_ceil(LANES)).step_by(step) {
            let tiles = tile..weight.tiles().min(tile + step);
            for start in (0..rows).step_by(ROW_BLOCK) {
                let count = ROW_BLOCK.min(rows - start);
                self.multiply_any(weight, tiles.clone(), x, start..start + count, &mut panels, &mut acc);
                for (tile, lines) in tiles.clone().zip(acc.chunks_exact(count)) {
                    let first = columns.start.max(tile * LANES);
                    let end = columns.end.min((tile + 1) * LANES);
                    if first >= end {
                        continue;
                    }
                    let lanes = first - tile * LANES..end - tile * LANES;
                    for (r, line) in lines.iter().enumerate() {
                        store(start + r, first - columns.start, &line.0[lanes.clone()]);
                    }
                }
            }
        }
    }
}

/// The values that belong to the columns of a tile when `values[0]` belongs to column `first`; 0 elsewhere.
#[inline(always)]
fn lane_values(values: &[f32], first: usize, tile: usize) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    for (lane, out) in out.iter_mut().enumerate() {
        let column = tile * LANES + lane;
        if column >= first && column < first + values.len() {
            *out = values[column - first];
        }
    }
    out
}

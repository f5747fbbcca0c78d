//! Multi-head latent attention. `kv_b` is always decoded to f32: it is part of the attention, not a linear layer of the
//! fast mode.

mod exl3;

use std::ops::Range;

use marlin_ops::Result;
use marlin_ops::attention::{MlaAttentionArgs, MlaDims};

use super::EmptyRows;
use super::flash::{CacheRows, Flash, Query, padded};
use crate::Cpu;
use crate::buffer::{Floats, f32s, f32s_mut};
use crate::layout::{PackedWeight, Values};
use crate::linear::decode::{PANEL, decode_panel};
use crate::linear::{Activations, Panels};
use crate::simd::{Kernel, LANES, Line, Simd};

/// Latent rows expanded at once, and queries attended at once, in the prefill.
const ROW_BLOCK: usize = 32;
/// Most (query, head) rows of one task of the absorbed form: they share one pass over the cache.
const DECODE_ROWS: usize = 32;
/// Least rows of one, which pay for widening the cache once more.
const LEAST_DECODE_ROWS: usize = 4;

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
                seen: &mut seen[..count],
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

    /// Absorbed form: `q~ = U_h^T q_nope`, attention of `[q~ | q_pe]` over the cache rows, `V_h` on the result.
    pub(super) fn decode(self) -> Result<()> {
        let (cpu, d) = (self.cpu, self.dims);
        let rows = d.batch * d.queries;
        let mut absorbed = cpu.workspace.floats.take(d.heads * rows * d.rank);
        let projection = rows * d.heads * d.nope.max(d.value) * d.rank;
        cpu.pool.for_chunks_of(projection, &mut absorbed, rows * d.rank, |h, out| {
            let (mla, head) = (&self, h);
            let lines = &mut cpu.workspace.lines.take(exl3::LINES * (rows + 1));
            match &self.kv_b.values {
                Values::Exl3(weight) => cpu.level.run(exl3::Absorb { mla, weight, head, lines, out }),
                _ => cpu.level.run(Absorb { mla, head, lines, out }),
            }
        });
        // Rows of one sequence are [Sq, H]; tasks take `block` of them.
        let value_width = padded(d.rank);
        let per_sequence = d.queries * d.heads;
        let block = per_sequence.div_ceil(cpu.pool.threads()).clamp(LEAST_DECODE_ROWS, DECODE_ROWS);
        let blocks = per_sequence.div_ceil(block);
        let task_len = block * value_width;
        let mut latent = cpu.workspace.floats.take(d.batch * blocks * task_len);
        let empty = EmptyRows::new();
        let keys: usize = self.kv_len.iter().sum();
        let work = keys * d.queries * d.heads * (2 * d.rank + d.rope);
        cpu.pool.for_chunks_of(work, &mut latent, task_len, |task, out| {
            let (b, first) = (task / blocks, task % blocks * block);
            let rows = first..per_sequence.min(first + block);
            self.decode_rows(b, rows, &absorbed, out, &empty);
        });
        empty.check(d.queries, d.heads)?;
        let mut heads = cpu.workspace.floats.take(d.heads * rows * d.value);
        cpu.pool.for_chunks_of(projection, &mut heads, rows * d.value, |h, out| {
            self.project_values(h, &latent, blocks * block, out);
        });
        if d.value == 0 {
            return Ok(());
        }
        for (row, out) in self.out.chunks_exact_mut(d.value).enumerate() {
            let (query, h) = (row / d.heads, row % d.heads);
            out.copy_from_slice(&heads[(h * rows + query) * d.value..][..d.value]);
        }
        Ok(())
    }

    /// Some (query, head) rows of sequence `b`; `absorbed` is `[H, B Sq, r]`, `out` `[rows, r padded]`.
    fn decode_rows(&self, b: usize, rows: Range<usize>, absorbed: &[f32], out: &mut [f32], empty: &EmptyRows) {
        let (cpu, d) = (self.cpu, self.dims);
        let count = rows.len();
        let row_width = d.rank + d.rope;
        let (width, value_width) = (padded(row_width), padded(d.rank));
        let row_id = |r: usize| b * d.queries * d.heads + rows.start + r;
        let mut queries = [Query::EMPTY; DECODE_ROWS];
        let mut q = cpu.workspace.floats.take(count * width);
        for (r, row) in q.chunks_exact_mut(width).enumerate() {
            let (query, h) = (row_id(r) / d.heads, row_id(r) % d.heads);
            let latent = &absorbed[(h * d.batch * d.queries + query) * d.rank..][..d.rank];
            let source = &self.q[row_id(r) * self.q_width()..][..self.q_width()];
            row[..d.rank].copy_from_slice(latent);
            row[d.rank..row_width].copy_from_slice(&source[d.nope..]);
            row[row_width..].fill(0.0);
            queries[r].end = self.visible(b, query % d.queries);
        }
        let scratch_len = Flash::scratch_len(width, value_width, count);
        let mut seen = [false; DECODE_ROWS];
        let cache_rows =
            |width| CacheRows { data: self.cache, start: b * d.capacity * row_width, stride: row_width, width };
        cpu.level.run(Flash {
            q: &q,
            queries: &queries[..count],
            keys: &[cache_rows(row_width)],
            // The latent part of a row is both key and value.
            values: cache_rows(d.rank),
            scale: self.scale,
            softcap: None,
            scratch: &mut cpu.workspace.floats.take(scratch_len),
            out: &mut out[..count * value_width],
            seen: &mut seen[..count],
        });
        record_empty(&seen[..count], row_id, empty);
    }

    /// `out[query] = V_h latent[query, h]`; `latent` is `[B, rows of a sequence and padding, r padded]`.
    fn project_values(&self, h: usize, latent: &[f32], sequence_rows: usize, out: &mut [f32]) {
        let (cpu, d) = (self.cpu, self.dims);
        let (rows, width) = (d.batch * d.queries, padded(d.rank));
        let mut x = cpu.workspace.floats.take(rows * d.rank);
        for (query, x) in x.chunks_exact_mut(d.rank.max(1)).enumerate() {
            let (b, r) = (query / d.queries, query % d.queries * d.heads + h);
            let at = (b * sequence_rows + r) * width;
            x.copy_from_slice(&latent[at..at + d.rank]);
        }
        let x = cpu.activations(&x, d.rank, &[], false).f32_only();
        let first = h * (d.nope + d.value) + d.nope;
        cpu.multiply_columns(self.kv_b, first..first + d.value, &x, rows, |row, at, values| {
            out[row * d.value + at..][..values.len()].copy_from_slice(values);
        });
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

/// `out[query] = U_h^T q_nope[query, h]`, `[B Sq, r]`: a sum over output columns of `kv_b`, kept per lane until the end.
struct Absorb<'a, 'b> {
    mla: &'a Mla<'a>,
    head: usize,
    /// One panel, then one panel of sums for each query.
    lines: &'b mut [Line<f32>],
    out: &'b mut [f32],
}

impl Kernel for Absorb<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (d, kv_b) = (self.mla.dims, self.mla.kv_b);
        let (panel, sums) = self.lines.split_at_mut(PANEL);
        let sums = &mut sums[..self.out.len() / d.rank * PANEL];
        let first = self.head * (d.nope + d.value);
        for k0 in (0..d.rank).step_by(PANEL) {
            let count = PANEL.min(d.rank - k0);
            sums.fill(Line::default());
            for tile in first / LANES..(first + d.nope).div_ceil(LANES) {
                decode_panel(s, kv_b, tile, k0, count, panel);
                for (query, sums) in sums.chunks_exact_mut(PANEL).enumerate() {
                    let start = (query * d.heads + self.head) * (d.nope + d.rope);
                    let q = lane_values(&self.mla.q[start..start + d.nope], first, tile);
                    let q = s.load(&q);
                    for (sum, w) in sums.iter_mut().zip(&panel[..count]) {
                        s.store(s.fma(s.load(&w.0), q, s.load(&sum.0)), &mut sum.0);
                    }
                }
            }
            for (query, sums) in sums.chunks_exact(PANEL).enumerate() {
                let out = &mut self.out[query * d.rank + k0..][..count];
                for (out, sum) in out.iter_mut().zip(sums) {
                    *out = s.reduce_add(s.load(&sum.0));
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

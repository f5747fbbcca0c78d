//! The absorbed form: `q~ = U_h^T q_nope`, attention of `[q~ | q_pe]` over the cache rows, `V_h` on the result. A pass over
//! the cache serves many heads, so keys are split among threads before heads are. Where keys are split does not depend on
//! the threads; how many rows make a task does, but each row is summed in the same order whatever lies beside it.

use std::ops::Range;

use marlin_ops::Result;

use super::{Mla, exl3, lane_values};
use crate::ahead::Reads;
use crate::attention::EmptyRows;
use crate::attention::flash::{CacheRows, Ending, Flash, Query, ROW_STEP, divide_by_sum, padded};
use crate::layout::{PackedWeight, Values};
use crate::linear::decode::{PANEL, QUAD, Quads, for_quads};
use crate::simd::{Kernel, LANES, Line, Simd};

/// Keys of a part.
const PART_KEYS: usize = 256;
/// Most (query, head) rows of one task.
const MOST_ROWS: usize = 5 * ROW_STEP;
/// Most rows of a sequence whose keys are split. More are tasks enough, and would have a sum for each part.
const MOST_SPLIT_ROWS: usize = 4 * MOST_ROWS;
/// Rows whose products take as long as widening and transposing the keys.
const LOAD_ROWS: usize = 8;

/// How attention is split into tasks: (query, head) rows of a sequence by keys.
#[derive(Clone, Copy, Debug)]
struct Split {
    /// Rows of a sequence.
    rows: usize,
    /// Rows of a task.
    block: usize,
    /// Keys of a part, and parts of the longest sequence.
    part_keys: usize,
    parts: usize,
    /// Width of a row of sums.
    width: usize,
}

impl Split {
    /// The ways to split `rows`.
    fn all(rows: usize, keys: usize, width: usize) -> [Self; MOST_ROWS / ROW_STEP] {
        let part_keys = if rows <= MOST_SPLIT_ROWS { PART_KEYS } else { keys.max(1) };
        let parts = keys.div_ceil(part_keys);
        std::array::from_fn(|i| {
            let block = ((i + 1) * ROW_STEP).min(rows.max(1));
            Self { rows, block, part_keys, parts, width }
        })
    }

    /// The way with which `threads` are done first.
    fn fastest(rows: usize, keys: usize, width: usize, batch: usize, threads: usize) -> Self {
        let all = Self::all(rows, keys, width);
        let time = |split: &&Self| {
            let rounds = (batch * split.tasks()).div_ceil(threads);
            rounds * (split.block.next_multiple_of(ROW_STEP) + LOAD_ROWS)
        };
        *all.iter().min_by_key(time).unwrap_or(&all[0])
    }

    /// Most floats of a sequence with so many keys.
    fn most(rows: usize, keys: usize, width: usize) -> usize {
        Self::all(rows, keys, width).iter().map(Self::len).max().unwrap_or(0)
    }

    fn blocks(&self) -> usize {
        self.rows.div_ceil(self.block)
    }

    /// Floats of a task: sums of its rows, then their states.
    fn task_len(&self) -> usize {
        self.block * self.width + padded(2 * self.block)
    }

    /// Tasks of a sequence.
    fn tasks(&self) -> usize {
        self.parts * self.blocks()
    }

    /// Floats of a sequence.
    fn len(&self) -> usize {
        self.tasks() * self.task_len()
    }

    /// Sequence, part and rows of a task.
    fn task(&self, task: usize) -> (usize, usize, Range<usize>) {
        let (b, part, first) =
            (task / self.tasks(), task % self.tasks() / self.blocks(), task % self.blocks() * self.block);
        (b, part, first..self.rows.min(first + self.block))
    }

    /// Sums and state that a part gave a row of sequence `b`.
    fn partial<'a>(&self, data: &'a [f32], b: usize, part: usize, row: usize) -> (&'a [f32], [f32; 2]) {
        let task = b * self.tasks() + part * self.blocks() + row / self.block;
        let (sums, states) = data[task * self.task_len()..][..self.task_len()].split_at(self.block * self.width);
        let r = row % self.block;
        (&sums[r * self.width..][..self.width], states.as_chunks().0[r])
    }
}

impl Mla<'_> {
    /// Absorbs the queries, attends part by part, then joins the parts and projects the values, head by head.
    pub(in crate::attention) fn decode(self) -> Result<()> {
        let (cpu, d) = (self.cpu, self.dims);
        let rows = d.batch * d.queries;
        let mut absorbed = cpu.workspace.floats.take(d.heads * rows * d.rank);
        let projection = rows * d.heads * d.nope.max(d.value) * d.rank;
        // Heads read `kv_b` one after the other: the columns for the queries here, those for the values below.
        let reads = |column: usize| Reads::of(self.kv_b.addresses(column / LANES).into_iter());
        let head_width = d.nope + d.value;
        let per_head = rows * d.rank;
        let absorb = |first: usize, out: &mut [f32]| {
            let lines = &mut cpu.workspace.lines.take(exl3::LINES * (rows + 1));
            for (head, out) in (first..).zip(out.chunks_exact_mut(per_head)) {
                let mla = &self;
                match &self.kv_b.values {
                    Values::Exl3(weight) => cpu.level.run(exl3::Absorb { mla, weight, head, lines, out }),
                    _ => cpu.level.run(Absorb { mla, head, lines, out }),
                }
            }
        };
        cpu.pool.for_parts(projection, &mut absorbed, per_head, |h| reads(h * head_width), absorb);
        // The sums of a latent row without columns have room all the same, so that states have tasks.
        let (split_rows, width) = (d.queries * d.heads, padded(d.rank.max(1)));
        let longest = self.kv_len.iter().copied().max().unwrap_or(0);
        let split = Split::fastest(split_rows, longest, width, d.batch, cpu.pool.threads());
        // While tokens are decoded one by one, room for a full cache: with that for the keys so far, memory would be asked
        // for again and again.
        let most = if d.queries == 1 { Split::most(split_rows, d.capacity, width) } else { split.len() };
        let mut partial = cpu.workspace.floats.take(d.batch * most);
        let partial = &mut partial[..d.batch * split.len()];
        let keys: usize = self.kv_len.iter().sum();
        let work = keys * d.queries * d.heads * (2 * d.rank + d.rope);
        cpu.pool.for_chunks_of(work, partial, split.task_len(), |task, out| {
            self.attend(&split, task, &absorbed, out);
        });
        let empty = EmptyRows::new();
        // Heads without values are joined all the same, which finds rows that see nothing.
        let head_len = rows * d.value.max(1);
        let mut heads = cpu.workspace.floats.take(d.heads * head_len);
        let project = |first: usize, out: &mut [f32]| {
            for (h, out) in (first..).zip(out.chunks_exact_mut(head_len)) {
                self.project_values(h, &split, partial, out, &empty);
            }
        };
        cpu.pool.for_parts(projection, &mut heads, head_len, |h| reads(h * head_width + d.nope), project);
        empty.check(d.queries, d.heads)?;
        if d.value == 0 {
            return Ok(());
        }
        for (row, out) in self.out.chunks_exact_mut(d.value).enumerate() {
            let (query, h) = (row / d.heads, row % d.heads);
            out.copy_from_slice(&heads[(h * rows + query) * d.value..][..d.value]);
        }
        Ok(())
    }

    /// One task: some rows over one part of their keys; `absorbed` is `[H, B Sq, r]`.
    fn attend(&self, split: &Split, task: usize, absorbed: &[f32], out: &mut [f32]) {
        let (cpu, d) = (self.cpu, self.dims);
        let (b, part, rows) = split.task(task);
        let count = rows.len();
        let row_width = d.rank + d.rope;
        let width = padded(row_width);
        let mut queries = [Query::EMPTY; MOST_ROWS];
        let mut q = cpu.workspace.floats.take(count * width);
        for ((row, q), seen) in rows.zip(q.chunks_exact_mut(width)).zip(&mut queries) {
            let (i, h) = (row / d.heads, row % d.heads);
            let query = b * d.queries + i;
            let latent = &absorbed[(h * d.batch * d.queries + query) * d.rank..][..d.rank];
            let source = &self.q[(query * d.heads + h) * self.q_width()..][..self.q_width()];
            q[..d.rank].copy_from_slice(latent);
            q[d.rank..row_width].copy_from_slice(&source[d.nope..]);
            q[row_width..].fill(0.0);
            seen.first = part * split.part_keys;
            seen.end = self.visible(b, i).clamp(seen.first, seen.first + split.part_keys);
        }
        let cache_rows =
            |width| CacheRows { data: self.cache, start: b * d.capacity * row_width, stride: row_width, width };
        let (out, states) = out.split_at_mut(split.block * split.width);
        cpu.level.run(Flash {
            q: &q,
            queries: &queries[..count],
            keys: &[cache_rows(row_width)],
            // The latent part of a row is both key and value.
            values: cache_rows(d.rank),
            scale: self.scale,
            softcap: None,
            scratch: &mut cpu.workspace.floats.take(Flash::scratch_len(width, split.width, count)),
            out: &mut out[..count * split.width],
            ending: Ending::Partial { states: &mut states.as_chunks_mut().0[..count] },
        });
    }

    /// `out[query] = V_h latent[query, h]`, with the latent row of its parts.
    fn project_values(&self, h: usize, split: &Split, partial: &[f32], out: &mut [f32], empty: &EmptyRows) {
        let (cpu, d) = (self.cpu, self.dims);
        let rows = d.batch * d.queries;
        let mut x = cpu.workspace.floats.take(rows * d.rank);
        for (query, out) in x.chunks_exact_mut(d.rank.max(1)).enumerate() {
            let (b, row) = (query / d.queries, query % d.queries * d.heads + h);
            if !cpu.level.run(Join { split, partial, b, row, out }) {
                empty.record(query * d.heads + h);
            }
        }
        let x = cpu.activations(&x, d.rank, &[], false).f32_only();
        let first = h * (d.nope + d.value) + d.nope;
        cpu.multiply_columns(self.kv_b, first..first + d.value, &x, rows, |row, at, values| {
            out[row * d.value + at..][..values.len()].copy_from_slice(values);
        });
    }
}

/// Joins the parts of a row; whether they saw any key.
struct Join<'a> {
    split: &'a Split,
    partial: &'a [f32],
    b: usize,
    row: usize,
    out: &'a mut [f32],
}

impl Kernel for Join<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> bool {
        let Self { split, partial, b, row, out } = self;
        let part = |i| split.partial(partial, b, i, row);
        let max = (0..split.parts).map(|i| part(i).1[0]).fold(f32::NEG_INFINITY, f32::max);
        let mut total = 0.0;
        out.fill(0.0);
        for (sums, [part_max, part_sum]) in (0..split.parts).map(part) {
            // A part without visible keys has no maximum to be relative to.
            if part_sum == 0.0 {
                continue;
            }
            let factor = (part_max - max).exp();
            total += factor * part_sum;
            for (out, sum) in out.iter_mut().zip(sums) {
                *out += factor * sum;
            }
        }
        divide_by_sum(total, out)
    }
}

/// `out[query] = U_h^T q_nope[query, h]`, `[B Sq, r]`: a sum over output columns of `kv_b`, kept per lane until the end.
struct Absorb<'a, 'b> {
    mla: &'a Mla<'a>,
    head: usize,
    /// One panel of sums for each query, then one line for each query.
    lines: &'b mut [Line<f32>],
    out: &'b mut [f32],
}

impl Kernel for Absorb<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (d, kv_b) = (self.mla.dims, self.mla.kv_b);
        let queries = self.out.len() / d.rank;
        let (sums, rest) = self.lines.split_at_mut(queries * PANEL);
        let values = &mut rest[..queries];
        let first = self.head * (d.nope + d.value);
        for k0 in (0..d.rank).step_by(PANEL) {
            let count = PANEL.min(d.rank - k0);
            sums.fill(Line::default());
            for tile in first / LANES..(first + d.nope).div_ceil(LANES) {
                for (query, values) in values.iter_mut().enumerate() {
                    let start = (query * d.heads + self.head) * (d.nope + d.rope);
                    values.0 = lane_values(&self.mla.q[start..start + d.nope], first, tile);
                }
                s.outlined(AddColumns { weight: kv_b, tile, k0, count, values, sums });
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

/// `sums[query][k] += w[k] values[query]` for the lines of a tile's panel; `sums` is `[queries][PANEL]`.
struct AddColumns<'a, 'b> {
    weight: &'a PackedWeight,
    tile: usize,
    k0: usize,
    count: usize,
    values: &'a [Line<f32>],
    sums: &'b mut [Line<f32>],
}

impl Kernel for AddColumns<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { weight, tile, k0, count, .. } = self;
        match (self.values, self.sums.as_chunks_mut().0) {
            ([values], [sums]) => {
                for_quads(s, weight, tile, k0, count, &mut OneQuery { values: s.load(&values.0), sums })
            }
            (values, sums) => for_quads(s, weight, tile, k0, count, &mut Queries { values, sums }),
        }
    }
}

/// Sums of one query, which stays in a register.
struct OneQuery<'a, S: Simd> {
    values: S::F,
    sums: &'a mut [Line<f32>; PANEL],
}

impl<S: Simd> Quads<S> for OneQuery<'_, S> {
    #[inline(always)]
    fn take(&mut self, s: S, at: usize, lines: [S::F; QUAD]) {
        for (line, sum) in lines.into_iter().zip(&mut self.sums[at..at + QUAD]) {
            s.store(s.fma(line, self.values, s.load(&sum.0)), &mut sum.0);
        }
    }
}

/// Sums of several.
struct Queries<'a> {
    values: &'a [Line<f32>],
    sums: &'a mut [[Line<f32>; PANEL]],
}

impl<S: Simd> Quads<S> for Queries<'_> {
    #[inline(always)]
    fn take(&mut self, s: S, at: usize, lines: [S::F; QUAD]) {
        for (values, sums) in self.values.iter().zip(&mut *self.sums) {
            OneQuery { values: s.load(&values.0), sums }.take(s, at, lines);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_cache_needs_the_most() {
        let (capacity, width) = (5000, 512);
        for rows in [1, 5, 20, 64, MOST_SPLIT_ROWS] {
            let most = Split::most(rows, capacity, width);
            for keys in 1..=capacity {
                for threads in [1, 2, 16] {
                    assert!(Split::fastest(rows, keys, width, 1, threads).len() <= most, "{rows} rows, {keys} keys");
                }
            }
        }
    }

    #[test]
    fn sums_of_many_rows_do_not_grow_with_the_keys() {
        let of = |keys| Split::fastest(MOST_SPLIT_ROWS + 1, keys, 512, 1, 4).len();
        assert_eq!(of(200_000), of(100));
    }
}

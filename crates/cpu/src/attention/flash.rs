//! Online softmax over tiles of keys for a block of queries (Milakov & Gimelshein 2018; Dao et al. 2022).
//!
//! Scores and weighted values are both products of rows with a tile of 64 columns: keys are transposed as they are
//! widened, so that a lane is a key, and values lie in column blocks. Every sum runs over ascending k, whichever rows
//! share a register block.

use std::ops::Range;

use crate::buffer::{Floats, prefetch, widen};
use crate::simd::math::exp;
use crate::simd::{Kernel, LANES, Simd};

/// Keys of a tile, and columns of a block of values.
pub(super) const TILE: usize = 64;
/// Vectors of a tile's row.
const VECTORS: usize = TILE / LANES;

/// `columns` rounded up to whole vectors.
pub(super) fn padded(columns: usize) -> usize {
    columns.next_multiple_of(LANES)
}

/// Columns of cached rows: row j is `width` elements from `start + j stride`.
#[derive(Clone, Copy)]
pub(super) struct CacheRows<'a> {
    pub(super) data: Floats<'a>,
    pub(super) start: usize,
    pub(super) stride: usize,
    pub(super) width: usize,
}

/// What one query sees.
#[derive(Clone, Copy)]
pub(super) struct Query<'a> {
    /// First visible key.
    pub(super) first: usize,
    /// One past the last visible key.
    pub(super) end: usize,
    /// Additive mask by key.
    pub(super) mask: Option<&'a [f32]>,
    /// Logit that joins the denominator.
    pub(super) sink: Option<f32>,
}

/// Attention of a block of queries. The result of a query does not depend on the queries beside it as long as the block
/// starts at the same key.
pub(super) struct Flash<'a, 'b> {
    /// `[rows, key width padded]`, padding 0.
    pub(super) q: &'a [f32],
    pub(super) queries: &'a [Query<'a>],
    /// Pieces side by side that make up a key.
    pub(super) keys: &'a [CacheRows<'a>],
    pub(super) values: CacheRows<'a>,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    /// [`Flash::scratch_len`] floats.
    pub(super) scratch: &'b mut [f32],
    /// `[rows, value width padded]`; what lies in the padding is unspecified.
    pub(super) out: &'b mut [f32],
    pub(super) ending: Ending<'b>,
}

/// How [`Flash`] ends.
pub(super) enum Ending<'b> {
    /// Sums are divided by their denominators. Says whether a query saw a key or a sink; the output of the others is 0.
    Divided { seen: &'b mut [bool] },
    /// Sums stay relative to their maximum. Gives that, and the denominator.
    Partial { states: &'b mut [[f32; 2]] },
}

/// A row of a tile.
pub(super) type TileRow = [f32; TILE];

/// Parts of the scratch memory.
struct Workspace<'a> {
    /// Keys, `[key width][TILE]`.
    keys: &'a mut [TileRow],
    /// Values, `[blocks of TILE columns][TILE keys]`.
    values: &'a mut [TileRow],
    /// Sixteen widened keys, `[LANES][key width]`.
    stage: &'a mut [f32],
    /// Scores, then probabilities, by query.
    scores: &'a mut [TileRow],
    /// Running maximum and denominator, by query.
    states: &'a mut [[f32; 2]],
    /// What each query sees of the tile.
    visible: &'a mut [Visible],
}

/// Keys of a tile that a query sees.
#[derive(Clone, Copy, Default)]
pub(super) struct Visible {
    lo: usize,
    hi: usize,
    /// One bit for each key of the tile: those between that a mask hides.
    hidden: u64,
}

impl Visible {
    /// Whether these are the first `count` keys, none of them hidden.
    pub(super) fn sees_first(&self, count: usize) -> bool {
        self.lo == 0 && self.hi == count && self.hidden == 0
    }

    /// The next run of keys that are not hidden, at or after `from`.
    #[inline(always)]
    pub(super) fn next_run(&self, from: usize) -> Option<Range<usize>> {
        let is_hidden = |j: usize| self.hidden >> j & 1 == 1;
        let mut start = from.max(self.lo);
        while start < self.hi && is_hidden(start) {
            start += 1;
        }
        let mut end = start;
        while end < self.hi && !is_hidden(end) {
            end += 1;
        }
        (start < end).then_some(start..end)
    }
}

impl<'a> Workspace<'a> {
    fn new(scratch: &'a mut [f32], visible: &'a mut [Visible], key_width: usize, value_width: usize) -> Self {
        let rows = visible.len();
        let (tiles, rest) = scratch.as_chunks_mut::<TILE>().0.split_at_mut(key_width + value_rows(value_width));
        let (keys, values) = tiles.split_at_mut(key_width);
        let (scores, rest) = rest.split_at_mut(rows);
        let (stage, states) = rest.as_flattened_mut().split_at_mut(LANES * key_width);
        Self { keys, values, stage, scores, states: &mut states.as_chunks_mut().0[..rows], visible }
    }
}

/// Rows of a tile of values.
const fn value_rows(value_width: usize) -> usize {
    value_width.div_ceil(TILE) * TILE
}

/// Most queries of one call.
pub(super) const MAX_ROWS: usize = 64;

impl Flash<'_, '_> {
    /// Scratch for key and value widths (padded) and a number of queries.
    pub(super) fn scratch_len(key_width: usize, value_width: usize, rows: usize) -> usize {
        let rest = (LANES * key_width + 2 * rows).next_multiple_of(TILE);
        TILE * (key_width + value_rows(value_width) + rows) + rest
    }
}

impl Kernel for Flash<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.queries.len();
        let (width, value_width) = (self.q.len() / rows, self.out.len() / rows);
        let mut visible = [Visible::default(); MAX_ROWS];
        let mut work = Workspace::new(self.scratch, &mut visible[..rows], width, value_width);
        for (state, query) in work.states.iter_mut().zip(self.queries) {
            *state = first_state(query.sink);
        }
        self.out.fill(0.0);
        let first = self.queries.iter().map(|q| q.first).min().unwrap_or(0);
        let end = self.queries.iter().map(|q| q.end).max().unwrap_or(0);
        for j in first..end.min(first + TILE) {
            for rows in self.keys.iter().chain([&self.values]) {
                prefetch(s, rows.data, rows.start + j * rows.stride, rows.width);
            }
        }
        for j0 in (first..end).step_by(TILE) {
            let count = TILE.min(end - j0);
            load_keys(s, self.keys, j0, count, width, &mut work);
            load_values(s, self.values, j0, count, work.values);
            score(s, self.q, self.queries, j0, &mut work);
            for (r, query) in self.queries.iter().enumerate() {
                let out = &mut self.out[r * value_width..(r + 1) * value_width];
                let (tile, scale) = ((j0, count), (self.scale, self.softcap));
                work.visible[r] = probabilities(s, query, tile, scale, &mut work.scores[r], &mut work.states[r], out);
            }
            add_values(s, &work, value_width, self.out);
        }
        match self.ending {
            Ending::Divided { seen } => {
                for ((seen, [_, sum]), out) in
                    seen.iter_mut().zip(work.states).zip(self.out.chunks_exact_mut(value_width))
                {
                    *seen = divide_by_sum(*sum, out);
                }
            }
            Ending::Partial { states } => states.copy_from_slice(work.states),
        }
    }
}

/// Maximum and denominator before the first key.
pub(super) fn first_state(sink: Option<f32>) -> [f32; 2] {
    match sink {
        Some(sink) if sink != f32::NEG_INFINITY => [sink, 1.0],
        _ => [f32::NEG_INFINITY, 0.0],
    }
}

/// Ends a row whose denominator is `sum`; whether it saw anything.
#[inline(always)]
pub(super) fn divide_by_sum(sum: f32, out: &mut [f32]) -> bool {
    let seen = sum != 0.0;
    if seen {
        for v in out {
            *v /= sum;
        }
    }
    seen
}

/// Turns a query's products with the keys of a tile, `(first, count)`, into probabilities relative to the running
/// maximum and shrinks `out` to it; `scale` and soft cap first.
#[inline(always)]
pub(super) fn probabilities<S: Simd>(
    s: S,
    query: &Query<'_>,
    (j0, count): (usize, usize),
    (scale, softcap): (f32, Option<f32>),
    scores: &mut TileRow,
    state: &mut [f32; 2],
    out: &mut [f32],
) -> Visible {
    let seen = query.first.max(j0)..query.end.min(j0 + count);
    if seen.is_empty() {
        return Visible::default();
    }
    let columns = seen.start - j0..seen.end - j0;
    finish_scores(scores, columns.clone(), scale, softcap);
    if let Some(mask) = query.mask {
        for (score, m) in scores[columns.start..].iter_mut().zip(&mask[seen]) {
            *score += m;
        }
    }
    soften(s, scores, columns, state, out)
}

/// Widens and transposes `count` keys from `j0`; columns past `count` hold anything.
#[inline(always)]
fn load_keys<S: Simd>(s: S, pieces: &[CacheRows<'_>], j0: usize, count: usize, width: usize, work: &mut Workspace<'_>) {
    for at in (0..count).step_by(LANES) {
        for (i, row) in work.stage.chunks_exact_mut(width).take(count - at).enumerate() {
            let mut column = 0;
            for piece in pieces {
                let start = piece.start + (j0 + at + i) * piece.stride;
                prefetch(s, piece.data, start + TILE * piece.stride, piece.width);
                widen(s, piece.data, start, &mut row[column..column + piece.width]);
                column += piece.width;
            }
            row[column..].fill(0.0);
        }
        for (d, columns) in work.keys.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
            let mut block = [s.splat(0.0); LANES];
            for (row, stage) in block.iter_mut().zip(work.stage.chunks_exact(width)) {
                *row = s.load(&stage.as_chunks().0[d]);
            }
            for (column, row) in columns.iter_mut().zip(s.transpose(block)) {
                s.store(row, &mut column.as_chunks_mut().0[at / LANES]);
            }
        }
    }
}

/// Widens `count` values from `j0` into blocks of [`TILE`] columns.
#[inline(always)]
fn load_values<S: Simd>(s: S, values: CacheRows<'_>, j0: usize, count: usize, tile: &mut [TileRow]) {
    for (c, block) in tile.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
        let width = TILE.min(values.width - c * TILE);
        for (j, row) in block[..count].iter_mut().enumerate() {
            let start = values.start + (j0 + j) * values.stride + c * TILE;
            prefetch(s, values.data, start + TILE * values.stride, width);
            widen(s, values.data, start, &mut row[..width]);
        }
    }
}

/// `acc[r][c] += sum_k a[r][k] b[k][c]` for `R` rows and `C` vectors of columns, one product after the other.
struct AddProducts<'a, const R: usize, const C: usize> {
    /// Row r starts at element `r a_stride`.
    a: &'a [f32],
    a_stride: usize,
    b: &'a [TileRow],
    /// Row r starts at element `r acc_stride`.
    acc: &'a mut [f32],
    acc_stride: usize,
}

impl<const R: usize, const C: usize> Kernel for AddProducts<'_, R, C> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut rows: [&[f32]; R] = [&[]; R];
        for (r, row) in rows.iter_mut().enumerate() {
            *row = &self.a[r * self.a_stride..][..self.b.len()];
        }
        let mut acc = [[s.splat(0.0); C]; R];
        for (r, acc) in acc.iter_mut().enumerate() {
            let lines = self.acc[r * self.acc_stride..][..C * LANES].as_chunks().0;
            for c in 0..C {
                acc[c] = s.load(&lines[c]);
            }
        }
        for (k, b) in self.b.iter().enumerate() {
            let b = b.as_chunks().0;
            let mut columns = [s.splat(0.0); C];
            for c in 0..C {
                columns[c] = s.load(&b[c]);
            }
            for r in 0..R {
                let a = s.splat(rows[r][k]);
                for c in 0..C {
                    acc[r][c] = s.fma(a, columns[c], acc[r][c]);
                }
            }
        }
        for (r, acc) in acc.iter().enumerate() {
            let lines = self.acc[r * self.acc_stride..][..C * LANES].as_chunks_mut().0;
            for c in 0..C {
                s.store(acc[c], &mut lines[c]);
            }
        }
    }
}

/// [`AddProducts`] of `vectors` vectors of columns; each size is compiled by itself, with all registers to its sums.
#[inline(always)]
fn add_products<S: Simd, const R: usize>(
    s: S,
    vectors: usize,
    (a, a_stride): (&[f32], usize),
    b: &[TileRow],
    (acc, acc_stride): (&mut [f32], usize),
) {
    match vectors {
        0 => {}
        1 => s.outlined(AddProducts::<R, 1> { a, a_stride, b, acc, acc_stride }),
        2 => s.outlined(AddProducts::<R, 2> { a, a_stride, b, acc, acc_stride }),
        3 => s.outlined(AddProducts::<R, 3> { a, a_stride, b, acc, acc_stride }),
        _ => s.outlined(AddProducts::<R, VECTORS> { a, a_stride, b, acc, acc_stride }),
    }
}

/// Rows of the largest register block.
pub(super) const ROW_STEP: usize = 6;

/// Rows that fit the registers, of `left`.
#[inline(always)]
fn row_block<S: Simd>(left: usize) -> usize {
    match left {
        ROW_STEP.. if S::WIDE => ROW_STEP,
        2.. if S::WIDE => 2,
        _ => 1,
    }
}

/// `scores[r][j] = q[r] . key j` for the keys of the tile at `j0` that some query of a register block sees.
#[inline(always)]
fn score<S: Simd>(s: S, q: &[f32], queries: &[Query<'_>], j0: usize, work: &mut Workspace<'_>) {
    let (width, rows, mut r) = (work.keys.len(), work.scores.len(), 0);
    while r < rows {
        let block = row_block::<S>(rows - r);
        let end = queries[r..r + block].iter().map(|q| q.end).max().unwrap_or(0);
        let vectors = end.saturating_sub(j0).div_ceil(LANES);
        let q = (&q[r * width..], width);
        let scores = work.scores[r..r + block].as_flattened_mut();
        scores.fill(0.0);
        match block {
            ROW_STEP => add_products::<S, ROW_STEP>(s, vectors, q, work.keys, (scores, TILE)),
            2 => add_products::<S, 2>(s, vectors, q, work.keys, (scores, TILE)),
            _ => add_products::<S, 1>(s, vectors, q, work.keys, (scores, TILE)),
        }
        r += block;
    }
}

/// Scale and soft cap; scores outside `visible` become -inf.
#[inline(always)]
fn finish_scores(scores: &mut TileRow, visible: Range<usize>, scale: f32, softcap: Option<f32>) {
    scores[..visible.start].fill(f32::NEG_INFINITY);
    scores[visible.end..].fill(f32::NEG_INFINITY);
    for score in &mut scores[visible.clone()] {
        *score *= scale;
    }
    if let Some(cap) = softcap {
        for score in &mut scores[visible] {
            *score = cap * (*score / cap).tanh();
        }
    }
}

/// Turns scores into probabilities relative to the running maximum and shrinks `out` to it. A key whose score is -inf
/// is hidden.
#[inline(always)]
fn soften<S: Simd>(
    s: S,
    scores: &mut TileRow,
    visible: Range<usize>,
    state: &mut [f32; 2],
    out: &mut [f32],
) -> Visible {
    let [old_max, old_sum] = *state;
    let mut max = s.splat(old_max);
    for chunk in scores.as_chunks().0 {
        max = s.max(s.load(chunk), max);
    }
    let max = s.reduce_max(max);
    let hidden = hidden_keys(&scores[visible.clone()]) << visible.start;
    if max == f32::NEG_INFINITY && !scores[visible.clone()].iter().any(|v| v.is_nan()) {
        return Visible::default();
    }
    let mut sum = s.splat(0.0);
    for chunk in scores.as_chunks_mut().0 {
        // Hidden keys get exactly 0.
        let p = exp(s, s.sub(s.load(chunk), s.splat(max)));
        sum = s.add(sum, p);
        s.store(p, chunk);
    }
    let shrink = match old_max == f32::NEG_INFINITY {
        true => 0.0,
        false => (old_max - max).exp(),
    };
    if shrink != 1.0 {
        for v in &mut *out {
            *v *= shrink;
        }
    }
    *state = [max, old_sum * shrink + s.reduce_add(sum)];
    Visible { lo: visible.start, hi: visible.end, hidden }
}

/// One bit for each score of -inf.
#[inline(always)]
fn hidden_keys(scores: &[f32]) -> u64 {
    if !scores.contains(&f32::NEG_INFINITY) {
        return 0;
    }
    let bits = scores.iter().enumerate().map(|(j, &score)| u64::from(score == f32::NEG_INFINITY) << j);
    bits.fold(0, |bits, bit| bits | bit)
}

/// `out[r] += sum_j p[r][j] value j` over the keys that each query sees; hidden values are not read.
#[inline(always)]
fn add_values<S: Simd>(s: S, work: &Workspace<'_>, value_width: usize, out: &mut [f32]) {
    let (rows, mut r) = (work.visible.len(), 0);
    while r < rows {
        let block = row_block::<S>(rows - r);
        let visible = &work.visible[r..r + block];
        let lo = visible.iter().map(|v| v.lo).max().unwrap_or(0);
        let hi = visible.iter().map(|v| v.hi).min().unwrap_or(0);
        let out = &mut out[r * value_width..(r + block) * value_width];
        if lo >= hi || visible.iter().any(|v| v.hidden != 0) {
            for (i, (v, out)) in visible.iter().zip(out.chunks_exact_mut(value_width)).enumerate() {
                let mut from = 0;
                while let Some(keys) = v.next_run(from) {
                    from = keys.end;
                    add_blocks::<S, 1>(s, work, r + i, keys, out);
                }
            }
        } else {
            // What all see goes together; each row's sum still runs from its first key to its last.
            for (i, (v, out)) in visible.iter().zip(out.chunks_exact_mut(value_width)).enumerate() {
                add_blocks::<S, 1>(s, work, r + i, v.lo..lo, out);
            }
            match block {
                ROW_STEP => add_blocks::<S, ROW_STEP>(s, work, r, lo..hi, out),
                2 => add_blocks::<S, 2>(s, work, r, lo..hi, out),
                _ => add_blocks::<S, 1>(s, work, r, lo..hi, out),
            }
            for (i, (v, out)) in visible.iter().zip(out.chunks_exact_mut(value_width)).enumerate() {
                add_blocks::<S, 1>(s, work, r + i, hi..v.hi, out);
            }
        }
        r += block;
    }
}

/// `R` rows over the same keys.
#[inline(always)]
fn add_blocks<S: Simd, const R: usize>(s: S, work: &Workspace<'_>, r: usize, keys: Range<usize>, out: &mut [f32]) {
    if keys.is_empty() {
        return;
    }
    let width = out.len() / R;
    let probabilities = &work.scores[r..r + R].as_flattened()[keys.start..];
    for (c, block) in work.values.as_chunks::<TILE>().0.iter().enumerate() {
        let vectors = (width - c * TILE) / LANES;
        let out = (&mut out[c * TILE..], width);
        add_products::<S, R>(s, vectors, (probabilities, TILE), &block[keys.clone()], out);
    }
}

//! Online softmax over tiles of keys for a block of queries (Milakov & Gimelshein 2018; Dao et al. 2022).

use crate::buffer::{Floats, widen};
use crate::simd::math::{dot, exp};
use crate::simd::{Kernel, LANES, Simd};

/// Keys decoded at once.
pub(super) const TILE: usize = 64;

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
    /// Values, or none when they are the first columns of the keys.
    pub(super) values: Option<CacheRows<'a>>,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    /// [`Flash::scratch_len`] floats.
    pub(super) scratch: &'b mut [f32],
    /// `[rows, value width padded]`; what lies in the padding is unspecified.
    pub(super) out: &'b mut [f32],
    /// Whether a query saw a key or a sink; the output of the others is 0.
    pub(super) seen: &'b mut [bool],
}

/// Running maximum and denominator of one query.
#[derive(Clone, Copy)]
struct State {
    max: f32,
    sum: f32,
}

impl Flash<'_, '_> {
    /// Scratch for key and value widths (padded) and a number of queries.
    pub(super) fn scratch_len(key_width: usize, value_width: usize, rows: usize) -> usize {
        TILE * (key_width + value_width) + 2 * rows
    }
}

impl Kernel for Flash<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.queries.len();
        let (width, value_width) = (self.q.len() / rows, self.out.len() / rows);
        let (key_tile, rest) = self.scratch.split_at_mut(TILE * width);
        let (value_tile, states) = rest.split_at_mut(TILE * value_width);
        let (states, _) = states.as_chunks_mut::<2>();
        for (state, query) in states.iter_mut().zip(self.queries) {
            *state = match query.sink {
                Some(sink) if sink != f32::NEG_INFINITY => [sink, 1.0],
                _ => [f32::NEG_INFINITY, 0.0],
            };
        }
        self.out.fill(0.0);
        let first = self.queries.iter().map(|q| q.first).min().unwrap_or(0);
        let end = self.queries.iter().map(|q| q.end).max().unwrap_or(0);
        for j0 in (first..end).step_by(TILE) {
            let count = TILE.min(end - j0);
            load_tile(s, self.keys, j0, count, width, key_tile);
            if let Some(values) = self.values {
                load_tile(s, &[values], j0, count, value_width, value_tile);
            }
            let (values, stride) = match self.values {
                Some(_) => (&value_tile[..], value_width),
                None => (&key_tile[..], width),
            };
            for (r, query) in self.queries.iter().enumerate() {
                let (lo, hi) = (query.first.max(j0), query.end.min(j0 + count));
                if lo >= hi {
                    continue;
                }
                let mut scores = [f32::NEG_INFINITY; TILE];
                let visible = lo - j0..hi - j0;
                let q = &self.q[r * width..(r + 1) * width];
                score(s, q, key_tile, visible.clone(), &mut scores);
                finish_scores(&mut scores[visible.clone()], self.scale, self.softcap);
                if let Some(mask) = query.mask {
                    for (score, m) in scores[visible.clone()].iter_mut().zip(&mask[lo..hi]) {
                        *score += m;
                    }
                }
                let state = State { max: states[r][0], sum: states[r][1] };
                let out = &mut self.out[r * value_width..(r + 1) * value_width];
                let state = accumulate(s, &mut scores, visible, values, stride, state, out);
                states[r] = [state.max, state.sum];
            }
        }
        for (r, &[_, sum]) in states.iter().take(rows).enumerate() {
            self.seen[r] = sum != 0.0;
            if self.seen[r] {
                for v in &mut self.out[r * value_width..(r + 1) * value_width] {
                    *v /= sum;
                }
            }
        }
    }
}

/// Widens `count` rows from `j0` into rows of `width`, padding 0.
#[inline(always)]
fn load_tile<S: Simd>(s: S, pieces: &[CacheRows<'_>], j0: usize, count: usize, width: usize, tile: &mut [f32]) {
    for (i, row) in tile.chunks_exact_mut(width).take(count).enumerate() {
        let mut at = 0;
        for piece in pieces {
            let start = piece.start + (j0 + i) * piece.stride;
            widen(s, piece.data, start, &mut row[at..at + piece.width]);
            at += piece.width;
        }
        row[at..].fill(0.0);
    }
}

/// `scores[j] = q . key j`.
#[inline(always)]
fn score<S: Simd>(s: S, q: &[f32], keys: &[f32], visible: std::ops::Range<usize>, scores: &mut [f32; TILE]) {
    let width = q.len();
    let mut j = visible.start;
    while j + 4 <= visible.end {
        let four = &keys[j * width..(j + 4) * width];
        let sums = dot4_keys(s, q, four);
        scores[j..j + 4].copy_from_slice(&sums);
        j += 4;
    }
    while j < visible.end {
        scores[j] = dot(s, q, &keys[j * width..(j + 1) * width]);
        j += 1;
    }
}

/// Dot products of q with four consecutive keys, each with the arithmetic of [`dot`].
#[inline(always)]
fn dot4_keys<S: Simd>(s: S, q: &[f32], keys: &[f32]) -> [f32; 4] {
    let mut out = [0.0; 4];
    for (out, key) in out.iter_mut().zip(keys.chunks_exact(q.len())) {
        *out = dot(s, q, key);
    }
    out
}

fn finish_scores(scores: &mut [f32], scale: f32, softcap: Option<f32>) {
    for score in &mut *scores {
        *score *= scale;
    }
    if let Some(cap) = softcap {
        for score in scores {
            *score = cap * (*score / cap).tanh();
        }
    }
}

/// Folds the scores of one tile into the state; scores outside `visible` are -inf, and a key whose score is -inf is
/// hidden: its value is not read.
#[inline(always)]
fn accumulate<S: Simd>(
    s: S,
    scores: &mut [f32; TILE],
    visible: std::ops::Range<usize>,
    values: &[f32],
    stride: usize,
    state: State,
    out: &mut [f32],
) -> State {
    let mut max = s.splat(state.max);
    for chunk in scores.as_chunks::<LANES>().0 {
        max = s.max(s.load(chunk), max);
    }
    let max = s.reduce_max(max);
    if max == f32::NEG_INFINITY && !scores[visible.clone()].iter().any(|v| v.is_nan()) {
        return state;
    }
    let hidden = scores.map(|v| v == f32::NEG_INFINITY);
    let mut sum = s.splat(0.0);
    for chunk in scores.as_chunks_mut::<LANES>().0 {
        let p = exp(s, s.sub(s.load(chunk), s.splat(max)));
        sum = s.add(sum, p);
        s.store(p, chunk);
    }
    let shrink = match state.max == f32::NEG_INFINITY {
        true => 0.0,
        false => (state.max - max).exp(),
    };
    if shrink != 1.0 {
        for v in &mut *out {
            *v *= shrink;
        }
    }
    let mut j = visible.start;
    while j < visible.end {
        if hidden[j] {
            j += 1;
            continue;
        }
        let run = j;
        while j < visible.end && !hidden[j] {
            j += 1;
        }
        add_values(s, &scores[run..j], &values[run * stride..], stride, out);
    }
    State { max, sum: state.sum * shrink + s.reduce_add(sum) }
}

/// `out += sum_j p_j row_j`.
#[inline(always)]
fn add_values<S: Simd>(s: S, p: &[f32], rows: &[f32], stride: usize, out: &mut [f32]) {
    const WIDTH: usize = 4 * LANES;
    let (wide, rest) = out.as_chunks_mut::<WIDTH>();
    let done = wide.len() * WIDTH;
    for (c, out) in wide.iter_mut().enumerate() {
        let (lanes, _) = out.as_chunks_mut::<LANES>();
        let mut acc = [s.splat(0.0); 4];
        for (acc, lanes) in acc.iter_mut().zip(&*lanes) {
            *acc = s.load(lanes);
        }
        for (j, &p) in p.iter().enumerate() {
            let row = &rows[j * stride + c * WIDTH..][..WIDTH];
            let p = s.splat(p);
            for (acc, v) in acc.iter_mut().zip(row.as_chunks::<LANES>().0) {
                *acc = s.fma(p, s.load(v), *acc);
            }
        }
        for (acc, lanes) in acc.into_iter().zip(lanes) {
            s.store(acc, lanes);
        }
    }
    for (c, out) in rest.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let at = done + c * LANES;
        let mut acc = s.load(out);
        for (j, &p) in p.iter().enumerate() {
            if let Some(v) = rows[j * stride + at..].first_chunk::<LANES>() {
                acc = s.fma(s.splat(p), s.load(v), acc);
            }
        }
        s.store(acc, out);
    }
}

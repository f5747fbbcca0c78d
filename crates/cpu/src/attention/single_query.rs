//! Attention of one query, all heads of a group at once: the arithmetic of [`Flash`](super::flash::Flash) bit by bit,
//! straight from the cache. Keys are transposed in registers, sums stay there, and what lies ahead is fetched meanwhile,
//! so that decoding waits for the cache alone.

use std::ops::Range;

use super::flash::{CacheRows, Query, TILE, TileRow, Visible, divide_by_sum, first_state, probabilities};
use crate::buffer::{Floats, prefetch};
use crate::simd::{Kernel, LANES, LINE_BYTES, Simd};

/// Most heads of a group.
pub(super) const MAX_HEADS: usize = 8;

/// Attention of one query for the heads of a group. Widths are whole vectors, that of keys one of [`is_key_width`];
/// cache rows lie side by side.
pub(super) struct SingleQuery<'a, 'b> {
    /// `[heads, key width]`.
    pub(super) q: &'a [f32],
    /// By head; all see the same range.
    pub(super) heads: &'a [Query<'a>],
    pub(super) keys: CacheRows<'a>,
    pub(super) values: CacheRows<'a>,
    pub(super) scale: f32,
    pub(super) softcap: Option<f32>,
    /// Whether the first rows are still far away.
    pub(super) is_cold: bool,
    /// Cache rows from here to the group that this thread takes next, if it does.
    pub(super) next_group: Option<usize>,
    /// `[heads, value width]`.
    pub(super) out: &'b mut [f32],
    /// Whether a head saw a key or a sink; the output of the others is 0.
    pub(super) seen: &'b mut [bool],
}

impl Kernel for SingleQuery<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { heads, keys, values, out, .. } = self;
        let (first, end) = (heads[0].first, heads[0].end);
        let mut states = [[0.0; 2]; MAX_HEADS];
        for (state, head) in states.iter_mut().zip(heads) {
            *state = first_state(head.sink);
        }
        out.fill(0.0);
        if self.is_cold {
            for j in first..end.min(first + TILE) {
                prefetch(s, keys.data, keys.start + j * keys.stride, keys.width);
                prefetch(s, values.data, values.start + j * values.stride, values.width);
            }
        }
        let mut scores = [[0.0; TILE]; MAX_HEADS];
        let mut visible = [Visible::default(); MAX_HEADS];
        for j0 in (first..end).step_by(TILE) {
            // Rows to fetch meanwhile: the next tile, or the first of the next group.
            let next = match self.next_group {
                _ if j0 + TILE < end => j0 + TILE..end.min(j0 + 2 * TILE),
                Some(group) => group + first..group + end.min(first + TILE),
                None => 0..0,
            };
            let tile = Tile { rows: j0..end.min(j0 + TILE), next };
            let count = tile.rows.len();
            score(s, self.q, keys, &tile, &mut scores[..heads.len()]);
            for (h, out) in out.chunks_exact_mut(values.width).enumerate() {
                let (scores, state) = (&mut scores[h], &mut states[h]);
                visible[h] = probabilities(s, &heads[h], (j0, count), (self.scale, self.softcap), scores, state, out);
            }
            add_values(s, values, &tile, &scores[..heads.len()], &visible[..heads.len()], out);
        }
        for (h, out) in out.chunks_exact_mut(values.width).enumerate() {
            self.seen[h] = divide_by_sum(states[h][1], out);
        }
    }
}

/// Cache rows that are worked on and those to fetch meanwhile, counted from the start of the group's rows.
struct Tile {
    rows: Range<usize>,
    next: Range<usize>,
}

/// Fetches a stretch of memory in equal parts.
struct Fetch<'a, T> {
    data: &'a [T],
    at: usize,
    part: usize,
}

impl<'a, T> Fetch<'a, T> {
    /// In `steps` parts.
    #[inline(always)]
    fn new(data: &'a [T], steps: usize) -> Self {
        let lines = data.len().div_ceil(Self::PER_LINE);
        Self { data, at: 0, part: lines.div_ceil(steps) }
    }

    /// Elements of a cache line.
    const PER_LINE: usize = LINE_BYTES / size_of::<T>();

    #[inline(always)]
    fn step<S: Simd>(&mut self, s: S) {
        for _ in 0..self.part {
            s.prefetch(self.data, self.at);
            self.at += Self::PER_LINE;
        }
    }
}

/// How cached values are stored.
trait Element: Copy {
    type Stored: Copy;

    /// Widens sixteen.
    fn load<S: Simd>(s: S, v: &[Self::Stored; LANES]) -> S::F;
}

#[derive(Clone, Copy)]
struct F32;
#[derive(Clone, Copy)]
struct F16;
#[derive(Clone, Copy)]
struct Bf16;

impl Element for F32 {
    type Stored = f32;

    #[inline(always)]
    fn load<S: Simd>(s: S, v: &[f32; LANES]) -> S::F {
        s.load(v)
    }
}

impl Element for F16 {
    type Stored = u16;

    #[inline(always)]
    fn load<S: Simd>(s: S, v: &[u16; LANES]) -> S::F {
        s.load_f16(v)
    }
}

impl Element for Bf16 {
    type Stored = u16;

    #[inline(always)]
    fn load<S: Simd>(s: S, v: &[u16; LANES]) -> S::F {
        s.load_bf16(v)
    }
}

/// `scores[h][j] = q[h] . key j` for the keys of the tile; columns past its end hold anything.
#[inline(always)]
fn score<S: Simd>(s: S, q: &[f32], keys: CacheRows<'_>, tile: &Tile, scores: &mut [TileRow]) {
    match keys.data {
        Floats::F32(data) => score_stored::<S, F32>(s, q, &data[keys.start..], keys.width, tile, scores),
        Floats::F16(data) => score_stored::<S, F16>(s, q, &data[keys.start..], keys.width, tile, scores),
        Floats::BF16(data) => score_stored::<S, Bf16>(s, q, &data[keys.start..], keys.width, tile, scores),
    }
}

#[inline(always)]
fn score_stored<S: Simd, E: Element>(
    s: S,
    q: &[f32],
    keys: &[E::Stored],
    width: usize,
    tile: &Tile,
    scores: &mut [TileRow],
) {
    match width / LANES {
        4 => score_rows::<S, E, 4>(s, q, keys, tile, scores),
        8 => score_rows::<S, E, 8>(s, q, keys, tile, scores),
        16 => score_rows::<S, E, 16>(s, q, keys, tile, scores),
        _ => unreachable!("`is_key_width` lets through three widths"),
    }
}

/// Whether keys may be this wide: each width is compiled by itself.
pub(super) fn is_key_width(width: usize) -> bool {
    matches!(width, 64 | 128 | 256)
}

#[inline(always)]
fn score_rows<S: Simd, E: Element, const D: usize>(
    s: S,
    q: &[f32],
    keys: &[E::Stored],
    tile: &Tile,
    scores: &mut [TileRow],
) {
    let keys = keys.as_chunks().0.as_chunks::<D>().0;
    let (mut q, mut scores, mut next) = (q.as_chunks().0.as_chunks::<D>().0, scores, &keys[tile.next.clone()]);
    let keys = &keys[tile.rows.clone()];
    while !scores.is_empty() {
        let heads = head_block::<S>(scores.len());
        let (own_q, other_q) = q.split_at(heads);
        let (own, others) = scores.split_at_mut(heads);
        match heads {
            8 => s.outlined(Scores::<E, 8, D> { q: own_q, keys, next, scores: own }),
            4 => s.outlined(Scores::<E, 4, D> { q: own_q, keys, next, scores: own }),
            2 => s.outlined(Scores::<E, 2, D> { q: own_q, keys, next, scores: own }),
            _ => s.outlined(Scores::<E, 1, D> { q: own_q, keys, next, scores: own }),
        }
        (q, scores, next) = (other_q, others, &[]);
    }
}

/// Heads that share the keys in registers, of `left`.
#[inline(always)]
fn head_block<S: Simd>(left: usize) -> usize {
    match left {
        8.. if S::WIDE => 8,
        4.. => 4,
        2.. => 2,
        _ => 1,
    }
}

/// A row of keys as stored, `[D]` vectors.
type Row<E, const D: usize> = [[<E as Element>::Stored; LANES]; D];

/// Scores of `H` heads with keys of `D` vectors.
struct Scores<'a, 'b, E: Element, const H: usize, const D: usize> {
    q: &'a [[[f32; LANES]; D]],
    /// At most [`TILE`].
    keys: &'a [Row<E, D>],
    /// To fetch.
    next: &'a [Row<E, D>],
    scores: &'b mut [TileRow],
}

impl<E: Element, const H: usize, const D: usize> Kernel for Scores<'_, '_, E, H, D> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let q = &self.q.as_chunks::<H>().0[0];
        let blocks = self.keys.len().div_ceil(LANES);
        let mut fetch = Fetch::new(self.next.as_flattened(), blocks * D);
        let mut b = 0;
        // Two blocks hide each other's latencies where few heads share them.
        while H <= 2 && b + 2 <= blocks {
            let rows = [block_rows(self.keys, b), block_rows(self.keys, b + 1)];
            let (mut first, mut second) = ([s.splat(0.0); H], [s.splat(0.0); H]);
            for d in 0..D {
                first = add_dots::<S, E, H, D>(s, q, &rows[0], d, first);
                fetch.step(s);
                second = add_dots::<S, E, H, D>(s, q, &rows[1], d, second);
                fetch.step(s);
            }
            store_block(s, first, b, self.scores);
            store_block(s, second, b + 1, self.scores);
            b += 2;
        }
        while b < blocks {
            let rows = block_rows(self.keys, b);
            let mut sums = [s.splat(0.0); H];
            for d in 0..D {
                sums = add_dots::<S, E, H, D>(s, q, &rows, d, sums);
                fetch.step(s);
            }
            store_block(s, sums, b, self.scores);
            b += 1;
        }
    }
}

/// Sixteen keys from `16 b`; past the last one it stands in, since nobody looks at those scores.
#[inline(always)]
fn block_rows<T>(keys: &[T], b: usize) -> [&T; LANES] {
    let mut rows = [&keys[b * LANES]; LANES];
    for (i, row) in rows.iter_mut().enumerate() {
        *row = &keys[(b * LANES + i).min(keys.len() - 1)];
    }
    rows
}

/// Adds the products of features `16 d` to `16 d + 15` with sixteen keys, one key a lane, in order.
#[inline(always)]
fn add_dots<S: Simd, E: Element, const H: usize, const D: usize>(
    s: S,
    q: &[[[f32; LANES]; D]; H],
    rows: &[&Row<E, D>; LANES],
    d: usize,
    mut sums: [S::F; H],
) -> [S::F; H] {
    let mut block = [s.splat(0.0); LANES];
    for (block, row) in block.iter_mut().zip(rows) {
        *block = E::load(s, &row[d]);
    }
    for (k, column) in s.transpose(block).into_iter().enumerate() {
        for (q, sum) in q.iter().zip(&mut sums) {
            *sum = s.fma(s.splat(q[d][k]), column, *sum);
        }
    }
    sums
}

#[inline(always)]
fn store_block<S: Simd, const H: usize>(s: S, sums: [S::F; H], b: usize, scores: &mut [TileRow]) {
    for (sum, scores) in sums.into_iter().zip(scores) {
        s.store(sum, &mut scores.as_chunks_mut().0[b]);
    }
}

/// Cached values of a group from its first row, in vectors.
struct Values<'a, E: Element> {
    data: &'a [[E::Stored; LANES]],
    /// Vectors of a row.
    width: usize,
}

impl<'a, E: Element> Values<'a, E> {
    #[inline(always)]
    fn new(data: &'a [E::Stored], rows: CacheRows<'_>) -> Self {
        Self { data: data[rows.start..].as_chunks().0, width: rows.width / LANES }
    }

    #[inline(always)]
    fn rows(&self, rows: &Range<usize>) -> &'a [[E::Stored; LANES]] {
        &self.data[rows.start * self.width..rows.end * self.width]
    }
}

/// `out[h] += sum_j p[h][j] value j` over the keys that each head sees; hidden values are not used.
#[inline(always)]
fn add_values<S: Simd>(s: S, values: CacheRows<'_>, tile: &Tile, p: &[TileRow], visible: &[Visible], out: &mut [f32]) {
    match values.data {
        Floats::F32(data) => add_vectors::<S, F32>(s, &Values::new(data, values), tile, p, visible, out),
        Floats::F16(data) => add_vectors::<S, F16>(s, &Values::new(data, values), tile, p, visible, out),
        Floats::BF16(data) => add_vectors::<S, Bf16>(s, &Values::new(data, values), tile, p, visible, out),
    }
}

#[inline(always)]
fn add_vectors<S: Simd, E: Element>(
    s: S,
    values: &Values<'_, E>,
    tile: &Tile,
    p: &[TileRow],
    visible: &[Visible],
    out: &mut [f32],
) {
    let (mut out, mut h) = (out.as_chunks_mut().0, 0);
    while h < p.len() {
        let see_all = visible[h..].iter().take_while(|v| v.sees_first(tile.rows.len())).count();
        let heads = match see_all {
            0 => 1,
            _ if !S::WIDE => 1,
            n => head_block::<S>(n),
        };
        let (own, others) = out.split_at_mut(heads * values.width);
        let p = &p[h..h + heads];
        match heads {
            _ if see_all == 0 => {
                let mut from = 0;
                while let Some(keys) = visible[h].next_run(from) {
                    from = keys.end;
                    add_columns::<S, E, 1>(s, values, tile, keys, p, own);
                }
            }
            8 => add_columns::<S, E, 8>(s, values, tile, 0..tile.rows.len(), p, own),
            4 => add_columns::<S, E, 4>(s, values, tile, 0..tile.rows.len(), p, own),
            2 => add_columns::<S, E, 2>(s, values, tile, 0..tile.rows.len(), p, own),
            _ => add_columns::<S, E, 1>(s, values, tile, 0..tile.rows.len(), p, own),
        }
        (out, h) = (others, h + heads);
    }
}

/// `H` heads over the same keys, as many columns at a time as registers hold sums.
#[inline(always)]
fn add_columns<S: Simd, E: Element, const H: usize>(
    s: S,
    values: &Values<'_, E>,
    tile: &Tile,
    keys: Range<usize>,
    p: &[TileRow],
    out: &mut [[f32; LANES]],
) {
    let mut column = 0;
    while column < values.width {
        let keys = keys.clone();
        let out = &mut *out;
        column += match (H, values.width - column) {
            (1 | 2, 8..) if S::WIDE => s.outlined(Weighted::<E, H, 8> { values, tile, keys, p, column, out }),
            (1 | 2 | 4, 4..) if S::WIDE || H == 1 => {
                s.outlined(Weighted::<E, H, 4> { values, tile, keys, p, column, out })
            }
            (_, 2..) => s.outlined(Weighted::<E, H, 2> { values, tile, keys, p, column, out }),
            _ => s.outlined(Weighted::<E, H, 1> { values, tile, keys, p, column, out }),
        };
    }
}

/// `out[h] += sum_j p[h][j] value j` for `C` vectors of columns; returns C.
struct Weighted<'a, 'b, E: Element, const H: usize, const C: usize> {
    values: &'a Values<'a, E>,
    tile: &'a Tile,
    keys: Range<usize>,
    p: &'a [TileRow],
    column: usize,
    out: &'b mut [[f32; LANES]],
}

impl<E: Element, const H: usize, const C: usize> Kernel for Weighted<'_, '_, E, H, C> {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> usize {
        let Self { values, tile, column, .. } = self;
        let mut p: [&[f32]; H] = [&[]; H];
        let mut sums = [[s.splat(0.0); C]; H];
        for h in 0..H {
            p[h] = &self.p[h][self.keys.clone()];
            let out = &self.out[h * values.width + column..][..C];
            for c in 0..C {
                sums[h][c] = s.load(&out[c]);
            }
        }
        // Rows are fetched along with the first columns.
        let next = if column == 0 { values.rows(&tile.next) } else { &[] };
        let mut fetch = Fetch::new(next, tile.rows.len());
        let rows = values.rows(&tile.rows);
        for (i, j) in self.keys.enumerate() {
            let row = &rows[j * values.width + column..][..C];
            fetch.step(s);
            let mut vectors = [s.splat(0.0); C];
            for c in 0..C {
                vectors[c] = E::load(s, &row[c]);
            }
            for h in 0..H {
                let p = s.splat(p[h][i]);
                for c in 0..C {
                    sums[h][c] = s.fma(p, vectors[c], sums[h][c]);
                }
            }
        }
        for (h, sums) in sums.iter().enumerate() {
            let out = &mut self.out[h * values.width + column..][..C];
            for (sum, out) in sums.iter().zip(out) {
                s.store(*sum, out);
            }
        }
        C
    }
}

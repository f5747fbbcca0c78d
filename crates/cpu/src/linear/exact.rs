//! Tiles times f32 activations.

use crate::layout::{PackedWeight, Values};
use crate::simd::{Kernel, Line, Simd};

use super::Rows;
use super::decode::{PANEL, QUAD, Quads, decode_panel, for_quads};

/// Every format's units divide this many input features.
const UNITS: usize = 32;

/// `acc[r][lane] = sum_k x[r][k] w[k][lane]` for the rows of `x`; each panel of K gives a partial sum of its own.
#[inline(always)]
pub(super) fn multiply<S: Simd>(
    s: S,
    weight: &PackedWeight,
    tile: usize,
    x: Rows<'_, f32>,
    panel: &mut [Line<f32>],
    acc: &mut [Line<f32>],
) {
    acc.fill(Line::default());
    let features = weight.stored_features();
    for k0 in (0..features).step_by(PANEL) {
        let count = PANEL.min(features - k0);
        if let ([acc], false) = (&mut *acc, matches!(weight.values, Values::Exl3(_)))
            && count.is_multiple_of(UNITS)
        {
            s.outlined(OneRow { weight, tile, k0, x: &x.row(0)[k0..k0 + count], acc });
            continue;
        }
        decode_panel(s, weight, tile, k0, count, panel);
        let panel = &panel[..count];
        let mut r = 0;
        if S::WIDE {
            while r + 6 <= acc.len() {
                add_rows::<S, 6, 4>(s, panel, x, k0, r, acc);
                r += 6;
            }
        }
        while r + 2 <= acc.len() {
            if S::WIDE {
                add_rows::<S, 2, 4>(s, panel, x, k0, r, acc);
            } else {
                add_rows::<S, 2, 2>(s, panel, x, k0, r, acc);
            }
            r += 2;
        }
        if r < acc.len() {
            if S::WIDE {
                add_rows::<S, 1, 4>(s, panel, x, k0, r, acc);
            } else {
                add_rows::<S, 1, 2>(s, panel, x, k0, r, acc);
            }
        }
    }
}

/// One row of a panel straight from the codes, in the chains of [`add_rows`], whose result it has.
struct OneRow<'a> {
    weight: &'a PackedWeight,
    tile: usize,
    k0: usize,
    x: &'a [f32],
    acc: &'a mut Line<f32>,
}

impl Kernel for OneRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if S::WIDE { self.add::<S, 4>(s) } else { self.add::<S, 2>(s) }
    }
}

impl OneRow<'_> {
    #[inline(always)]
    fn add<S: Simd, const CHAINS: usize>(self, s: S) {
        let Self { weight, tile, k0, x, acc } = self;
        let mut chains = Chains { x: x.as_chunks().0, sums: [s.splat(0.0); CHAINS] };
        for_quads(s, weight, tile, k0, x.len(), &mut chains);
        add_chains(s, chains.sums, acc);
    }
}

/// Sums of a row, feature k in chain `k % CHAINS`.
struct Chains<'a, S: Simd, const CHAINS: usize> {
    x: &'a [[f32; QUAD]],
    sums: [S::F; CHAINS],
}

impl<S: Simd, const CHAINS: usize> Quads<S> for Chains<'_, S, CHAINS> {
    #[inline(always)]
    fn take(&mut self, s: S, at: usize, lines: [S::F; QUAD]) {
        for ((i, line), &x) in lines.into_iter().enumerate().zip(&self.x[at / QUAD]) {
            let sum = &mut self.sums[i % CHAINS];
            *sum = s.fma(s.splat(x), line, *sum);
        }
    }
}

/// Adds the chains of a panel up, then to `acc`.
#[inline(always)]
fn add_chains<S: Simd, const CHAINS: usize>(s: S, sums: [S::F; CHAINS], acc: &mut Line<f32>) {
    let mut total = sums[0];
    for &sum in &sums[1..] {
        total = s.add(total, sum);
    }
    s.store(s.add(s.load(&acc.0), total), &mut acc.0);
}

/// Rows `r .. r + R` of one panel. Each row sums in `CHAINS` interleaved chains whatever R is, so that a row's result
/// does not depend on the rows beside it.
#[inline(always)]
fn add_rows<S: Simd, const R: usize, const CHAINS: usize>(
    s: S,
    panel: &[Line<f32>],
    x: Rows<'_, f32>,
    k0: usize,
    r: usize,
    acc: &mut [Line<f32>],
) {
    let mut rows: [&[f32]; R] = [&[]; R];
    for (i, row) in rows.iter_mut().enumerate() {
        *row = &x.row(r + i)[k0..k0 + panel.len()];
    }
    let mut sums = [[s.splat(0.0); CHAINS]; R];
    let (chunks, tail) = panel.as_chunks::<CHAINS>();
    for (i, lines) in chunks.iter().enumerate() {
        for (c, line) in lines.iter().enumerate() {
            let w = s.load(&line.0);
            for (sums, row) in sums.iter_mut().zip(rows) {
                sums[c] = s.fma(s.splat(row[i * CHAINS + c]), w, sums[c]);
            }
        }
    }
    let done = chunks.len() * CHAINS;
    for (c, line) in tail.iter().enumerate() {
        let w = s.load(&line.0);
        for (sums, row) in sums.iter_mut().zip(rows) {
            sums[c] = s.fma(s.splat(row[done + c]), w, sums[c]);
        }
    }
    for (sums, acc) in sums.into_iter().zip(&mut acc[r..r + R]) {
        add_chains(s, sums, acc);
    }
}

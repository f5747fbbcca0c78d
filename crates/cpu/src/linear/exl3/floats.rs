//! The tiles of a span times f32 activations: the exact mode, and the codebooks of sums of two f16.

use marlin_formats::exl3::{Codebook, HADAMARD, tile};

use super::super::decode::PANEL;
use super::super::{Rows, exact};
use super::{fetch_ahead, rotate_back, sum_halves};
use crate::layout::PackedWeight;
use crate::layout::exl3::{Exl3, SPAN};
use crate::simd::trellis::{PAIRS, TrellisRow};
use crate::simd::{Kernel, Line, Simd};

/// The tiles of a span times f32 activations.
pub(super) struct FloatSpan<'a> {
    pub(super) weight: &'a PackedWeight,
    pub(super) q: &'a Exl3,
    pub(super) span: usize,
    pub(super) x: Rows<'a, f32>,
    /// [`PANEL`] lines.
    pub(super) floats: &'a mut [Line<f32>],
    pub(super) acc: &'a mut [Line<f32>],
}

impl Kernel for FloatSpan<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let rows = self.acc.len() / SPAN;
        // Exact mode, which rounds the values, keeps to the panels: it is not made for speed.
        let from_words = self.q.codebook != Codebook::Mul1 && !self.q.rounds;
        for (t, acc) in self.acc.chunks_exact_mut(rows).enumerate() {
            let column = SPAN * self.span + t;
            match acc {
                [acc] if from_words => {
                    *acc = with_bits!(self.q.bits, one_row_of_halves::<S>(s, self.q, column, self.x.row(0)))
                }
                _ => exact::multiply(s, self.weight, column, self.x, self.floats, acc),
            }
        }
        rotate_back(s, &self.q.svh[self.span * HADAMARD..], self.acc);
    }
}

#[inline(always)]
fn one_row_of_halves<S: Simd, const BITS: usize>(s: S, q: &Exl3, column: usize, x: &[f32]) -> Line<f32> {
    let words = q.words_from(column);
    if S::WIDE {
        s.outlined(OneRowOfHalves::<BITS, 4> { codebook: q.codebook, words, x })
    } else {
        s.outlined(OneRowOfHalves::<BITS, 2> { codebook: q.codebook, words, x })
    }
}

/// One row of f32 straight from the packed words, in the chains and panels of [`exact::multiply`], whose result it has.
struct OneRowOfHalves<'a, const BITS: usize, const CHAINS: usize> {
    codebook: Codebook,
    /// Those of the column, and what follows it.
    words: &'a [TrellisRow],
    x: &'a [f32],
}

impl<const BITS: usize, const CHAINS: usize> Kernel for OneRowOfHalves<'_, BITS, CHAINS> {
    type Output = Line<f32>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Line<f32> {
        let multiplier = s.splat_i(self.codebook.multiplier() as i32);
        let increment = s.splat_i(self.codebook.increment() as i32);
        let tiles = self.words.as_chunks::<BITS>().0;
        let mut acc = s.splat(0.0);
        for (p, x) in self.x.chunks(PANEL).enumerate() {
            let mut sums = [s.splat(0.0); CHAINS];
            let first = p * PANEL / tile::SIDE;
            for (i, (tile, x)) in tiles[first..].iter().zip(x.as_chunks::<{ tile::SIDE }>().0).enumerate() {
                fetch_ahead::<S, BITS>(s, self.words, first + i);
                for_pairs!(s, |pair| {
                    for (state, k) in s.trellis_states(tile, pair).into_iter().zip(2 * pair..) {
                        let value = sum_halves(s, s.add_i(s.mul_i(state, multiplier), increment));
                        sums[k % CHAINS] = s.fma(s.splat(x[k]), value, sums[k % CHAINS]);
                    }
                });
            }
            let mut total = sums[0];
            for &sum in &sums[1..] {
                total = s.add(total, sum);
            }
            acc = s.add(acc, total);
        }
        let mut out = Line::default();
        s.store(acc, &mut out.0);
        out
    }
}

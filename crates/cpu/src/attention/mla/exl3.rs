//! The absorbed form with an EXL3 `kv_b`: `U q = suh H (W (H (svh q)))`, the transposed product.

use marlin_formats::exl3::HADAMARD;

use super::{Mla, lane_values};
use crate::layout::exl3::{Exl3, SPAN};
use crate::linear::decode::{PANEL, decode_panel};
use crate::linear::exl3::transform;
use crate::simd::{Kernel, LANES, Line, Simd};

/// Lines of scratch for each query, and for the decoded panel of an EXL3 weight.
pub(super) const LINES: usize = PANEL + SPAN;

/// `out[query] = U_h^T q_nope[query, h]`, `[B Sq, r]`.
pub(super) struct Absorb<'a, 'b> {
    pub(super) mla: &'a Mla<'a>,
    pub(super) weight: &'a Exl3,
    pub(super) head: usize,
    /// One panel, then one panel of sums for each query, then the rotated part of each query.
    pub(super) lines: &'b mut [Line<f32>],
    pub(super) out: &'b mut [f32],
}

impl Kernel for Absorb<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (d, q) = (self.mla.dims, self.weight);
        let queries = self.out.len() / d.rank;
        let (panel, rest) = self.lines.split_at_mut(PANEL);
        let (sums, rotated) = rest.split_at_mut(queries * PANEL);
        let rotated = &mut rotated[..queries * SPAN];
        let first = self.head * (d.nope + d.value);
        for k0 in (0..d.rank).step_by(PANEL) {
            let count = PANEL.min(q.suh.len() - k0);
            sums.fill(Line::default());
            for span in first / HADAMARD..(first + d.nope).div_ceil(HADAMARD) {
                for (query, lines) in rotated.chunks_exact_mut(SPAN).enumerate() {
                    let start = (query * d.heads + self.head) * (d.nope + d.rope);
                    let values = &self.mla.q[start..start + d.nope];
                    let svh = q.svh[span * HADAMARD..].as_chunks::<LANES>().0;
                    let mut v = [s.splat(0.0); SPAN];
                    for ((t, v), svh) in v.iter_mut().enumerate().zip(svh) {
                        *v = s.mul(s.load(&lane_values(values, first, SPAN * span + t)), s.load(svh));
                    }
                    for (v, line) in transform(s, v).into_iter().zip(lines) {
                        s.store(v, &mut line.0);
                    }
                }
                for t in 0..SPAN {
                    decode_panel(s, self.mla.kv_b, SPAN * span + t, k0, count, panel);
                    for (lines, sums) in rotated.chunks_exact(SPAN).zip(sums.chunks_exact_mut(PANEL)) {
                        let x = s.load(&lines[t].0);
                        for (sum, w) in sums.iter_mut().zip(&panel[..count]) {
                            s.store(s.fma(s.load(&w.0), x, s.load(&sum.0)), &mut sum.0);
                        }
                    }
                }
            }
            for (sums, out) in sums.chunks_exact(PANEL).zip(self.out.chunks_exact_mut(d.rank)) {
                for (b, out) in out[k0..].chunks_mut(HADAMARD).take(count / HADAMARD).enumerate() {
                    let at = b * HADAMARD;
                    let mut values = [0.0; HADAMARD];
                    for (value, sum) in values.iter_mut().zip(&sums[at..]) {
                        *value = s.reduce_add(s.load(&sum.0));
                    }
                    let mut v = [s.splat(0.0); SPAN];
                    for (v, values) in v.iter_mut().zip(values.as_chunks::<LANES>().0) {
                        *v = s.load(values);
                    }
                    let suh = q.suh[k0 + at..].as_chunks::<LANES>().0;
                    for ((v, suh), values) in
                        transform(s, v).into_iter().zip(suh).zip(values.as_chunks_mut::<LANES>().0)
                    {
                        s.store(s.mul(v, s.load(suh)), values);
                    }
                    out.copy_from_slice(&values[..out.len()]);
                }
            }
        }
    }
}

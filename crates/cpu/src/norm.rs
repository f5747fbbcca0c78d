//! Row norms.

use marlin_ops::norm::{LayerNormArgs, RmsNormArgs, RmsNormInPlaceArgs};
use marlin_ops::{NormOps, Result};

use crate::Cpu;
use crate::buffer::{f32s, f32s_mut, optional_f32s};
use crate::simd::{Kernel, LANES, Simd};

/// Elements below which rows are not worth handing to other threads.
const SERIAL_ELEMENTS: usize = 1 << 14;

/// Gain of an RMS norm.
#[derive(Clone, Copy)]
pub(crate) struct RmsNorm<'a> {
    pub(crate) gamma: Option<&'a [f32]>,
    pub(crate) gamma_offset: f32,
    pub(crate) eps: f32,
}

/// `row *= r (gamma + offset)`.
pub(crate) struct NormalizeRow<'a> {
    pub(crate) norm: RmsNorm<'a>,
    pub(crate) row: &'a mut [f32],
}

impl Kernel for NormalizeRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mean = sum_of_squares(s, self.row) / self.row.len() as f32;
        let r = 1.0 / (mean + self.norm.eps).sqrt();
        match self.norm.gamma {
            Some(gamma) => {
                for (v, gamma) in self.row.iter_mut().zip(gamma) {
                    *v = *v * r * (gamma + self.norm.gamma_offset);
                }
            }
            None => {
                for v in self.row {
                    *v = *v * r * (1.0 + self.norm.gamma_offset);
                }
            }
        }
    }
}

#[inline(always)]
fn sum_of_squares<S: Simd>(s: S, row: &[f32]) -> f32 {
    let (chunks, tail) = row.as_chunks::<LANES>();
    let mut sums = [s.splat(0.0); 2];
    let (pairs, last) = chunks.as_chunks::<2>();
    for [a, b] in pairs {
        let (a, b) = (s.load(a), s.load(b));
        sums = [s.fma(a, a, sums[0]), s.fma(b, b, sums[1])];
    }
    for a in last {
        let a = s.load(a);
        sums[0] = s.fma(a, a, sums[0]);
    }
    let tail: f32 = tail.iter().map(|v| v * v).sum();
    s.reduce_add(s.add(sums[0], sums[1])) + tail
}

impl Cpu {
    /// Calls `f(row, values)` for every row, in parallel when there is enough to do.
    pub(crate) fn for_rows(&self, data: &mut [f32], columns: usize, f: impl Fn(usize, &mut [f32]) + Sync + Send) {
        let rows = data.len() / columns.max(1);
        let grain = match data.len() < SERIAL_ELEMENTS {
            true => rows.max(1),
            false => self.pool.grain(rows),
        };
        self.pool.for_chunks(data, grain * columns, |i, chunk| {
            for (r, row) in chunk.chunks_exact_mut(columns).enumerate() {
                f(i * grain + r, row);
            }
        });
    }
}

/// Rows of `h`: `x`, or `x + residual`, which also becomes the residual.
pub(crate) enum Input<'a> {
    X(&'a [f32]),
    /// Already written to the output.
    Done,
}

impl<'a> Input<'a> {
    fn new(x: &'a [f32], residual: Option<&mut [f32]>, out: &mut [f32]) -> Self {
        let Some(residual) = residual else {
            return Self::X(x);
        };
        for ((h, x), out) in residual.iter_mut().zip(x).zip(out) {
            *h += x;
            *out = *h;
        }
        Self::Done
    }

    /// Puts row `i` into `row`.
    fn load(&self, i: usize, row: &mut [f32]) {
        if let Self::X(x) = self {
            row.copy_from_slice(&x[i * row.len()..][..row.len()]);
        }
    }
}

impl Cpu {
    /// RMS norm of the input's rows into `out`.
    pub(crate) fn normalize_rows(&self, norm: RmsNorm<'_>, input: &Input<'_>, columns: usize, out: &mut [f32]) {
        self.for_rows(out, columns, |i, row| {
            input.load(i, row);
            self.level.run(NormalizeRow { norm, row });
        });
    }
}

impl NormOps for Cpu {
    fn run_rms_norm(&self, args: RmsNormArgs<'_, Self>) -> Result<()> {
        const OP: &str = "rms_norm";
        let columns = args.x.columns();
        let norm =
            RmsNorm { gamma: optional_f32s(OP, "gamma", args.gamma)?, gamma_offset: args.gamma_offset, eps: args.eps };
        let x = f32s(OP, "x", args.x)?;
        let residual = args.residual.map(|r| f32s_mut(OP, "residual", r)).transpose()?;
        let out = f32s_mut(OP, "out", args.out)?;
        let input = Input::new(x, residual, out);
        self.normalize_rows(norm, &input, columns, out);
        Ok(())
    }

    fn run_rms_norm_in_place(&self, args: RmsNormInPlaceArgs<'_, Self>) -> Result<()> {
        const OP: &str = "rms_norm_in_place";
        let columns = args.x.columns();
        let norm =
            RmsNorm { gamma: Some(f32s(OP, "gamma", args.gamma)?), gamma_offset: args.gamma_offset, eps: args.eps };
        self.for_rows(f32s_mut(OP, "x", args.x)?, columns, |_, row| {
            self.level.run(NormalizeRow { norm, row });
        });
        Ok(())
    }

    fn run_layer_norm(&self, args: LayerNormArgs<'_, Self>) -> Result<()> {
        const OP: &str = "layer_norm";
        let columns = args.x.columns();
        let gamma = f32s(OP, "gamma", args.gamma)?;
        let beta = optional_f32s(OP, "beta", args.beta)?;
        let x = f32s(OP, "x", args.x)?;
        let residual = args.residual.map(|r| f32s_mut(OP, "residual", r)).transpose()?;
        let out = f32s_mut(OP, "out", args.out)?;
        let input = Input::new(x, residual, out);
        let eps = f64::from(args.eps);
        self.for_rows(out, columns, |i, row| {
            input.load(i, row);
            layer_norm_row(row, gamma, beta, eps);
        });
        Ok(())
    }
}

/// Two passes in f64: a mean far above the deviation would cost all f32 digits.
fn layer_norm_row(row: &mut [f32], gamma: &[f32], beta: Option<&[f32]>, eps: f64) {
    let columns = row.len() as f64;
    let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / columns;
    let squares = row.iter().map(|&v| (f64::from(v) - mean).powi(2));
    let r = 1.0 / (squares.sum::<f64>() / columns + eps).sqrt();
    for (k, v) in row.iter_mut().enumerate() {
        let normalized = (f64::from(*v) - mean) * r * f64::from(gamma[k]);
        *v = (normalized + beta.map_or(0.0, |beta| f64::from(beta[k]))) as f32;
    }
}

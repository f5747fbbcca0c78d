//! The specification's bounds and how an output is held against them (operations.md section 0, "Numeric policy", and
//! the **Tol** line of each operation).
//!
//! The cases use f32 inputs and outputs. Where the specification gives only bounds for 16-bit ones, which are
//! dominated by the rounding of the output (2^-11 or 2^-8), the f32 bound of linear layers is used instead: it is 50
//! times stricter.

use marlin_formats::DType;

use crate::case::Mode;

/// Unit round-off of f32.
pub const U32: f64 = 1.0 / 16_777_216.0;

/// LIN32: f32 linear layers, relF.
pub const LINEAR: f64 = 1e-5;

/// LIN16 and LINB16: linear layers with f16 and bf16 outputs, relF.
pub const LINEAR_F16: f64 = 6e-4;
/// See [`LINEAR_F16`].
pub const LINEAR_BF16: f64 = 5e-3;

/// gated_mlp with f16 rounding of the hidden vector, relF: also the bound for two linear layers in a row whose
/// activations are rounded to int8, where a hidden value within f32 rounding of a tie takes the neighbouring code.
pub const GATED_MLP_ROUNDED: f64 = 8e-4;

/// EXL3 with f32 outputs, element by element: share of `|svh|` times the RMS of all outputs of the Hadamard block
/// before their `svh` and bias. The definition of the format says so. The chapter of trellis kernels has another
/// figure, 2e-3 of the RMS of the outputs themselves, for 16-bit ones; that RMS is not used, because outlier channels
/// of `svh` dominate it and hide what happens to the others.
pub const EXL3: f64 = 2.5e-3;

/// EXL3 with f32 outputs in the fast CPU mode, relF. Values of the codebook are not rounded to f16 there: they lie
/// within half an ulp, in the mean 1.4e-4 where their RMS is 1. Activations as i16 add 2.4e-5. The specification grants 6e-4.
pub const EXL3_FAST: f64 = 4e-4;

/// relF of a product with EXL3 weights. Where nothing is rounded (codebook values are f16 exactly, rotations and sums
/// f32) the bound of f32 linear layers holds.
pub(crate) fn exl3(mode: Mode) -> f64 {
    match mode {
        Mode::Exact => LINEAR,
        Mode::Int8Activations => EXL3_FAST,
        // One value of a row may lose 2^-11, 4.9e-4, and others nothing that makes up for it.
        Mode::F16Activations => LINEAR_F16,
    }
}

/// The same for f32 results of one or two EXL3 layers as relF: the specification's RMS of 3.4e-4, twice and with the
/// growth that a product of the two brings.
pub const EXL3_ROWS: f64 = 8e-4;

/// Attention, relF per query and head; 16-bit I/O only in the specification.
pub const ATTENTION: f64 = LINEAR;

/// ATT16. Also for scores of 30 and more, whose f32 rounding alone changes a probability by 1e-5.
pub const ATTENTION_F16: f64 = 8e-4;

/// ATTB16.
pub const ATTENTION_BF16: f64 = 6e-3;

/// Attention where f32 keys and values are sums of two bf16: 2^-17 of each. Results lose 2e-5 of their size, but ten times that
/// where values cancel each other.
pub const ATTENTION_SPLIT: f64 = 4e-4;

/// Largest difference of attention as a share of max |V| for such a relF, as of ATT16.
pub const fn attention_of_max_v(bound: f64) -> f64 {
    bound * 1e-3 / ATTENTION_F16
}

/// relF of attention over such keys and values. GPUs may round f32 ones to sums of two bf16; which shapes they do it for is theirs.
pub(crate) fn attention(mode: Mode, cache: DType) -> f64 {
    match (mode, cache) {
        (Mode::F16Activations, DType::F32) => ATTENTION_SPLIT,
        _ => ATTENTION,
    }
}

/// Row norms, relF per row; 16-bit I/O only in the specification.
pub const NORM: f64 = LINEAR;

/// NORM16 and NORMB16: row norms with f16 and bf16 outputs.
pub const NORM_F16: f64 = 5e-4;
/// See [`NORM_F16`].
pub const NORM_BF16: f64 = 4e-3;

/// The largest share of a value that one ulp of its type is.
pub fn relative_ulp(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1.0 / 1024.0,
        DType::BF16 => 1.0 / 128.0,
        _ => 2.0 * U32,
    }
}

/// NORM16, relative to |x - mean|, for rows whose mean exceeds their deviation 1e5 times.
pub const NORM_LARGE_MEAN: f64 = 5e-4;

/// rope_apply: share of the pair's larger element beside 1 ulp.
pub const ROPE_OF_PAIR: f64 = 3e-7;

/// Relative error granted to exp, tanh and erf in an activation.
pub const ACTIVATION: f64 = 2e-7;

/// moe_route: relative error of a weight.
pub const ROUTE_WEIGHT: f64 = 2e-6;

/// moe_route: ids are compared where decisions are at least this far apart.
pub const ROUTE_MARGIN: f64 = 1e-5;

/// moe_aux_loss: relative error of loads and loss.
pub const AUX_LOSS: f64 = 1e-5;

/// moe_combine: relF per token.
pub const COMBINE: f64 = 2e-6;

/// hadamard_block in f32: relF per block.
pub const HADAMARD: f64 = 1e-6;

/// logits_process: ulps of f32.
pub const LOGITS_ULPS: f64 = 2.0;

/// sample_filtered: draws are compared where decisions are at least this far apart in probability.
pub const SAMPLE_MARGIN: f64 = 1e-6;

/// sample_gumbel: draws are compared where the two largest values with noise are at least this far apart.
pub const GUMBEL_MARGIN: f64 = 1e-5;

/// Upper 0.1 % point of chi-square with 7 degrees of freedom.
pub const CHI_SQUARE_7: f64 = 24.32;

/// Relative excess of the cost of a path: of the found and the best one, both summed over 256 terms in f32. Where two
/// closing states of the first pass are as close, the second pass may lose more: the cases have none.
pub const PATH_COST: f64 = 2.0 * 256.0 * U32;

/// How an output is compared.
#[derive(Clone, Debug)]
pub enum Tolerance {
    /// Equal values; NaN equals NaN, -0 equals 0. Metric: largest difference, bound 0.
    Exact,
    /// Equal bits as f64: signs of zeros, and sign and payload of NaN, count.
    Bits,
    /// relF over blocks of this many consecutive elements.
    Blocks {
        /// Elements of a block.
        block: usize,
        /// Bound on relF.
        bound: f64,
    },
    /// relF over as many blocks of equal length as there are bounds. Metric: the largest share of a bound, bound 1.
    Rows {
        /// Bounds on relF, one a block.
        bounds: Vec<f64>,
    },
    /// `|y - y*| <= ulps ulp(y*) + relative |y*| + absolute`. Metric: share of that bound, bound 1.
    Elements {
        /// f32 ulps of the expected value.
        ulps: f64,
        /// Share of the expected value.
        relative: f64,
        /// One value per element, or empty.
        absolute: Vec<f64>,
    },
    /// The output itself is a statistic with this upper bound.
    AtMost(f64),
    /// Several at once.
    All(Vec<Tolerance>),
}

/// Error and bound of the criterion that came closest to failing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Verdict {
    /// In the metric of `tolerance`.
    pub max_error: f64,
    /// Bound.
    pub tolerance: f64,
}

impl Verdict {
    /// Nothing was compared and nothing is wrong.
    pub const NOTHING: Verdict = Verdict { max_error: 0.0, tolerance: 0.0 };

    /// Within the bound.
    pub fn passed(&self) -> bool {
        self.max_error <= self.tolerance
    }

    /// The share of the bound that is used up.
    fn severity(&self) -> f64 {
        if self.tolerance > 0.0 {
            self.max_error / self.tolerance
        } else if self.max_error > 0.0 {
            f64::INFINITY
        } else {
            0.0
        }
    }

    /// The one closer to failing.
    pub fn worse(self, other: Verdict) -> Verdict {
        if other.severity() > self.severity() || self == Self::NOTHING { other } else { self }
    }
}

impl Tolerance {
    /// Holds `found` against `expected`; equal lengths.
    pub fn judge(&self, found: &[f64], expected: &[f64]) -> Verdict {
        match self {
            Tolerance::Exact => {
                let errors = found.iter().zip(expected).map(|(&f, &e)| difference(f, e));
                verdict(largest(errors), 0.0)
            }
            Tolerance::Bits => {
                let errors = found.iter().zip(expected).map(|(f, e)| {
                    if f.to_bits() == e.to_bits() { 0.0 } else { difference(*f, *e).max(f64::MIN_POSITIVE) }
                });
                verdict(largest(errors), 0.0)
            }
            &Tolerance::Blocks { block, bound } => {
                let blocks = found.chunks(block.max(1)).zip(expected.chunks(block.max(1)));
                verdict(largest(blocks.map(|(f, e)| relative_norm(f, e))), bound)
            }
            Tolerance::Rows { bounds } => {
                let block = found.len().checked_div(bounds.len()).unwrap_or(0).max(1);
                let blocks = found.chunks(block).zip(expected.chunks(block)).zip(bounds);
                verdict(largest(blocks.map(|((f, e), bound)| relative_norm(f, e) / bound)), 1.0)
            }
            Tolerance::Elements { ulps, relative, absolute } => {
                let shares = found.iter().zip(expected).enumerate().map(|(i, (&f, &e))| {
                    let bound = ulps * ulp(e) + relative * e.abs() + absolute.get(i).copied().unwrap_or(0.0);
                    match difference(f, e) {
                        0.0 => 0.0,
                        error if bound > 0.0 => error / bound,
                        _ => f64::MAX,
                    }
                });
                verdict(largest(shares), 1.0)
            }
            &Tolerance::AtMost(bound) => verdict(largest(found.iter().copied()), bound),
            Tolerance::All(all) => {
                all.iter().map(|tolerance| tolerance.judge(found, expected)).fold(Verdict::NOTHING, Verdict::worse)
            }
        }
    }
}

fn verdict(max_error: f64, tolerance: f64) -> Verdict {
    Verdict { max_error, tolerance }
}

/// The largest error; a NaN error counts as the largest of all.
fn largest(errors: impl Iterator<Item = f64>) -> f64 {
    errors.fold(0.0, |max, e| if e.is_nan() { f64::MAX } else { f64::min(e.max(max), f64::MAX) })
}

/// `|found - expected|`; `f64::MAX` when only one of them is NaN or infinite. An expected value beyond the range of
/// f32 stands for infinity.
fn difference(found: f64, expected: f64) -> f64 {
    let expected = if (expected as f32).is_infinite() { f64::INFINITY.copysign(expected) } else { expected };
    if found == expected || (found.is_nan() && expected.is_nan()) {
        return 0.0;
    }
    let difference = (found - expected).abs();
    if difference.is_finite() { difference } else { f64::MAX }
}

/// `||found - expected|| / ||expected||` over the finite expected elements; the others must be equal.
fn relative_norm(found: &[f64], expected: &[f64]) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    for (&f, &e) in found.iter().zip(expected) {
        let d = difference(f, e);
        if d == f64::MAX {
            return f64::MAX;
        }
        if (e as f32).is_finite() {
            error += d * d;
            norm += e * e;
        }
    }
    match (error, norm) {
        (0.0, _) => 0.0,
        (_, 0.0) => f64::MAX,
        _ => (error / norm).sqrt(),
    }
}

/// The spacing of f32 at `value`.
fn ulp(value: f64) -> f64 {
    let magnitude = (value as f32).abs();
    if magnitude.is_finite() { f64::from(magnitude.next_up()) - f64::from(magnitude) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_and_bits() {
        let nan = f64::NAN;
        assert!(Tolerance::Exact.judge(&[0.0, nan, 1e39], &[-0.0, nan, f64::INFINITY]).max_error > 0.0);
        assert!(Tolerance::Exact.judge(&[0.0, nan], &[-0.0, nan]).passed());
        assert!(!Tolerance::Bits.judge(&[0.0], &[-0.0]).passed());
        assert!(!Tolerance::Exact.judge(&[nan], &[1.0]).passed());
        assert!(!Tolerance::Exact.judge(&[1.0], &[1.0 + 1e-15]).passed());
        assert!(Tolerance::Exact.judge(&[f64::INFINITY], &[1e39]).passed());
    }

    #[test]
    fn blocks_are_judged_one_by_one() {
        let tolerance = Tolerance::Blocks { block: 2, bound: 1e-3 };
        let expected = [1e6, 0.0, 3.0, 4.0];
        let verdict = tolerance.judge(&[1e6, 0.0, 3.0, 4.01], &expected);
        assert!((verdict.max_error - 0.002).abs() < 1e-12 && !verdict.passed());
        assert!(tolerance.judge(&[1e6, 1.0, 3.0, 4.0], &expected).passed());
        assert!(!tolerance.judge(&[1e6, 0.0, f64::NAN, 4.0], &expected).passed());
        assert!(!tolerance.judge(&[1e-30, 0.0], &[0.0, 0.0]).passed());
    }

    #[test]
    fn rows_have_their_own_bounds() {
        let tolerance = Tolerance::Rows { bounds: vec![1e-2, 1e-3] };
        let expected = [3.0, 4.0, 3.0, 4.0];
        assert!(tolerance.judge(&[3.0, 4.01, 3.0, 4.0], &expected).passed());
        let verdict = tolerance.judge(&[3.0, 4.0, 3.0, 4.01], &expected);
        assert!((verdict.max_error - 2.0).abs() < 1e-9 && !verdict.passed());
    }

    #[test]
    fn elements_and_the_worst_criterion() {
        let one_ulp = Tolerance::Elements { ulps: 1.0, relative: 0.0, absolute: vec![] };
        let up = f64::from(1f32.next_up());
        assert!(one_ulp.judge(&[up], &[1.0]).passed());
        assert!(!one_ulp.judge(&[2.0 * up - 1.0], &[1.0]).passed());
        let absolute = Tolerance::Elements { ulps: 0.0, relative: 0.0, absolute: vec![0.5, 0.0] };
        assert!(absolute.judge(&[0.5, 7.0], &[0.0, 7.0]).passed());
        assert!(!absolute.judge(&[0.5, 7.1], &[0.0, 7.0]).passed());
        let all = Tolerance::All(vec![Tolerance::Blocks { block: 2, bound: 1.0 }, one_ulp]);
        let verdict = all.judge(&[1.5, 0.0], &[1.0, 0.0]);
        assert!(verdict.tolerance == 1.0 && verdict.max_error > 1e6);
        assert!(!Tolerance::AtMost(3.0).judge(&[3.5], &[0.0]).passed());
    }
}

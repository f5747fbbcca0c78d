//! Rows that an operation normalises itself, and what its results may be off.

use marlin_ops::activation::{ACTIVATION_BLOCK, takes_int8_activations};
use marlin_ops::linear::InputNorm;
use marlin_ops::{Backend, InputOrder, Result, Tensor, Weight, WeightData};

use crate::case::Mode;
use crate::random::Random;
use crate::tolerance::U32;

/// An input norm of a case.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm {
    pub(super) offset: f32,
    pub(super) eps: f32,
}

pub(crate) const GATED_NORM: Norm = Norm { offset: 0.0, eps: 1e-6 };

impl Norm {
    /// With zeros and negative values.
    pub(crate) fn gamma(self, k: usize) -> Vec<f32> {
        let mut gamma = Random::of(&format!("gamma {k}")).normals(k);
        gamma.iter_mut().skip(3).step_by(7).for_each(|g| *g = 0.0);
        gamma
    }

    pub(crate) fn input<B: Backend>(self, gamma: &Tensor<B>) -> InputNorm<'_, B> {
        InputNorm { gamma, gamma_offset: self.offset, eps: self.eps }
    }

    /// Normalised rows of `k`.
    pub(crate) fn apply(self, x: &[f32], k: usize) -> Vec<f64> {
        let gamma = self.gamma(k);
        let row = |row: &[f32]| -> Vec<f64> {
            let squares = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>();
            let root = (squares / k as f64 + f64::from(self.eps)).sqrt();
            let gamma = gamma.iter().map(|&g| f64::from(g) + f64::from(self.offset));
            row.iter().zip(gamma).map(|(&v, g)| f64::from(v) / root * g).collect()
        };
        x.chunks(k).flat_map(row).collect()
    }
}

/// Normal rows times a factor. Those of an input norm are drawn again while a normalised value, right to 16 f32
/// roundings as the largest of its block is, lies so close to a tie that its int8 code may be the neighbour's, in the order
/// of any of these weights' rows too.
pub(crate) fn rows(
    m: usize,
    k: usize,
    scale: f32,
    norm: Option<Norm>,
    orders: &[InputOrder],
    random: &mut Random,
) -> Vec<f32> {
    let mut row = || -> Vec<f32> { random.normals(k).iter().map(|v| v * scale).collect() };
    let mut clear_row = |norm: Norm| {
        let clear = |row: &Vec<f32>| {
            let normed = norm.apply(row, k);
            let mut ordered = normed.clone();
            let has_ties_in = |order: &InputOrder| {
                order.gather(&normed, &mut ordered);
                has_ties(&ordered, 32.0 * U32)
            };
            !has_ties(&normed, 32.0 * U32) && !orders.iter().any(has_ties_in)
        };
        (0..1000).map(|_| row()).find(clear).expect("some row of a thousand has no tie")
    };
    match norm {
        Some(norm) => (0..m).flat_map(|_| clear_row(norm)).collect(),
        None => (0..m).flat_map(|_| row()).collect(),
    }
}

/// Of one output: its size, with that of what int8 activations change, and what its f32 computation may be off.
#[derive(Clone, Copy)]
pub(crate) struct Bound {
    pub(super) size: f64,
    pub(crate) error: f64,
}

/// Bounds of products with normalised rows, `[m, n]`. A value of a row is right to 16 f32 roundings (mean, root, two
/// products).
pub(crate) fn after_norm(weight: &Weight, x: &[f64], mode: Mode) -> Result<Vec<Bound>> {
    let (k, n) = (weight.in_features(), weight.out_features());
    let rounds = rounds(weight, mode);
    let w = weight.to_f32()?;
    let bias = weight.bias.clone().unwrap_or(vec![0.0; n]);
    let steps = (2 * k + 16) as f64 * U32;
    let bound = |x: &[f64], n: usize| {
        let terms = x.iter().zip(&w[n * k..]).map(|(x, &w)| x * f64::from(w));
        let sum = terms.clone().map(f64::abs).sum::<f64>() + f64::from(bias[n]).abs();
        let value = terms.sum::<f64>() + f64::from(bias[n]);
        // A code is off by 1/254 of the largest value of its block, which is less than eight times the usual one.
        let rounding = if rounds { sum / 32.0 } else { 0.0 };
        Bound { size: value.abs() + rounding, error: sum * steps }
    };
    Ok(x.chunks(k).flat_map(|x| (0..n).map(move |n| (x, n))).map(|(x, n)| bound(x, n)).collect())
}

/// Whether products with a weight take int8 activations.
pub(super) fn rounds(weight: &Weight, mode: Mode) -> bool {
    match &weight.data {
        WeightData::Quantized(matrix) => mode == Mode::Int8Activations && takes_int8_activations(&matrix.scheme),
        WeightData::Dense(_) | WeightData::Exl3(_) | WeightData::Grid(_) => false,
    }
}

/// Whether the int8 code of a value lies within `margin` (relative) of a tie.
fn has_ties(x: &[f64], margin: f64) -> bool {
    let block = |block: &[f64]| {
        let step = block.iter().fold(0.0f64, |largest, v| largest.max(v.abs())) / 127.0;
        let is_tie = |v: &f64| ((v / step).abs().fract() - 0.5).abs() <= 127.0 * margin;
        step > 0.0 && block.iter().any(is_tie)
    };
    x.chunks(ACTIVATION_BLOCK).any(block)
}

//! Quantizing the rows of a weight against a factored Hessian.

use std::ops::Range;

use marlin_formats::{Group, QuantizedMatrix, Scheme};
use ndarray::linalg::general_mat_mul;
use ndarray::s;
use rayon::prelude::*;

use super::{Gptq, InverseFactor, check_features};
use crate::dense::{view, view_mut};
use crate::rtn::{check_weight, in_group, largest_magnitude};
use crate::scale::fit_group;
use crate::{QuantizeError, Result};

/// Output features that one task eliminates together. Fixed, so that the sums of a row do not
/// depend on the number of threads.
const ROWS: usize = 32;

impl InverseFactor {
    /// Quantizes `weight`, `[out_features, in_features]` row-major.
    ///
    /// # Errors
    /// A NaN or infinite weight, a wrong length or shape, [`QuantizeError::Features`] for a
    /// Hessian of another width, a scale overflow with its group, and
    /// [`QuantizeError::Diverged`].
    pub fn quantize(&self, scheme: Scheme, weight: &[f32], out_features: usize, in_features: usize) -> Result<Gptq> {
        check_weight(scheme, weight, out_features, in_features)?;
        check_features(self.features(), in_features)?;
        let tensor_scale = scheme.tensor_scale(largest_magnitude(weight));
        let groups_per_row = scheme.groups(in_features);
        let elimination = Elimination {
            factor: self,
            scheme,
            tensor_scale,
            blocks: blocks(in_features, self.options.block, self.fitted_late(scheme)),
        };
        let mut codes = vec![0u8; weight.len()];
        let mut groups = vec![Group::ZERO; out_features * groups_per_row];
        let losses: Vec<f64> = weight
            .par_chunks(ROWS * in_features)
            .zip(codes.par_chunks_mut(ROWS * in_features))
            .zip(groups.par_chunks_mut(ROWS * groups_per_row))
            .enumerate()
            .map(|(chunk, ((weight, codes), groups))| elimination.run(chunk * ROWS, weight, codes, groups))
            .collect::<Result<_>>()?;
        let matrix = QuantizedMatrix::from_codes(scheme, in_features, out_features, &codes, &groups, tensor_scale)?;
        Ok(Gptq { matrix, loss: losses.iter().sum() })
    }

    /// The group size when groups are fitted during the elimination.
    fn fitted_late(&self, scheme: Scheme) -> Option<usize> {
        (!self.options.act_order).then_some(scheme.group_size)
    }
}

/// Splits K into blocks of at most `block`. A block ends where a group begins that reaches beyond
/// it: the group is fitted there, so its weights must have all updates.
fn blocks(features: usize, block: usize, group_size: Option<usize>) -> Vec<Range<usize>> {
    let mut blocks = Vec::with_capacity(features.div_ceil(block));
    let mut start = 0;
    while start < features {
        let mut end = features.min(start.saturating_add(block));
        if let Some(group_size) = group_size {
            let last_group = (end - 1) / group_size * group_size;
            let group_end = features.min(last_group.saturating_add(group_size));
            if last_group > start && group_end > end {
                end = last_group;
            }
        }
        blocks.push(start..end);
        start = end;
    }
    blocks
}

/// What every row of one weight shares.
struct Elimination<'a> {
    factor: &'a InverseFactor,
    scheme: Scheme,
    tensor_scale: Option<f32>,
    blocks: Vec<Range<usize>>,
}

impl Elimination<'_> {
    /// Eliminates the rows of `weight`, `[rows, K]`, the first of which is output feature `first`.
    /// Writes codes `[rows, K]` and groups `[rows, G]`; returns the rows' loss.
    fn run(&self, first: usize, weight: &[f32], codes: &mut [u8], groups: &mut [Group]) -> Result<f64> {
        let k = self.factor.features();
        let groups_per_row = self.scheme.groups(k);
        let rows = weight.len() / k;
        let mut work = self.ordered(weight);
        if self.factor.options.act_order {
            self.fit_all(first, weight, groups)?;
        }
        let mut losses = vec![0.0; rows];
        let mut errors = vec![0.0f32; rows * self.factor.options.block.min(k)];
        for block in &self.blocks {
            let width = block.len();
            for (r, work) in work.chunks_exact_mut(k).enumerate() {
                let row = Row {
                    n: first + r,
                    work,
                    codes: &mut codes[r * k..][..k],
                    groups: &mut groups[r * groups_per_row..][..groups_per_row],
                };
                let errors = &mut errors[r * width..][..width];
                losses[r] += self.eliminate_block(row, block.clone(), errors)?;
            }
            self.update_rest(&mut work, &errors[..rows * width], block.clone());
        }
        match losses.iter().position(|loss| !loss.is_finite()) {
            Some(r) => Err(QuantizeError::Diverged { n: first + r }),
            None => Ok(losses.iter().sum()),
        }
    }

    /// The weights in elimination order, those of dead channels 0.
    fn ordered(&self, weight: &[f32]) -> Vec<f32> {
        let (order, dead) = (&self.factor.order, &self.factor.dead);
        weight
            .chunks_exact(order.len())
            .flat_map(|row| order.iter().map(|&feature| if dead[feature] { 0.0 } else { row[feature] }))
            .collect()
    }

    /// Fits every group of every row from the original weights.
    fn fit_all(&self, first: usize, weight: &[f32], groups: &mut [Group]) -> Result<()> {
        let (k, group_size) = (self.factor.features(), self.scheme.group_size);
        let groups_per_row = self.scheme.groups(k);
        let rows = weight.chunks_exact(k).zip(groups.chunks_exact_mut(groups_per_row));
        let mut live = vec![0.0; k];
        for (r, (row, groups)) in rows.enumerate() {
            for ((live, &w), &dead) in live.iter_mut().zip(row).zip(&self.factor.dead) {
                *live = if dead { 0.0 } else { w };
            }
            for (g, (weights, group)) in live.chunks(group_size).zip(groups).enumerate() {
                *group = self.fit(first + r, g, weights)?;
            }
        }
        Ok(())
    }

    /// Fits group `g` of output feature `n` from `weights`, which lie along K.
    fn fit(&self, n: usize, g: usize, weights: &[f32]) -> Result<Group> {
        let start = g * self.scheme.group_size;
        let importance = &self.factor.importance[start..start + weights.len()];
        let search = self.factor.options.scale_search;
        fit_group(self.scheme, weights, Some(importance), self.tensor_scale, search)
            .map_err(|error| in_group(error, n, g))
    }

    /// Quantizes the features of one block of one row, updating the block's later weights at once.
    /// Writes the scaled errors; returns their share of the loss.
    fn eliminate_block(&self, row: Row<'_>, block: Range<usize>, errors: &mut [f32]) -> Result<f64> {
        let k = self.factor.features();
        let group_size = self.scheme.group_size;
        let mut loss = 0.0;
        for (i, step) in block.clone().enumerate() {
            let feature = self.factor.order[step];
            let g = feature / group_size;
            if !self.factor.options.act_order && step % group_size == 0 {
                let end = k.min(step.saturating_add(group_size));
                row.groups[g] = self.fit(row.n, g, &row.work[step..end])?;
            }
            let group = &row.groups[g];
            let w = row.work[step];
            let code = self.scheme.code(w, group);
            row.codes[feature] = code;
            let upper = &self.factor.upper[step * k..][..k];
            let error = (w - self.scheme.dequantize(code, group)) / upper[step];
            errors[i] = error;
            if !self.factor.dead[feature] {
                loss += f64::from(error).powi(2);
            }
            let later = step + 1..block.end;
            for (w, &u) in row.work[later.clone()].iter_mut().zip(&upper[later]) {
                *w -= error * u;
            }
        }
        Ok(loss)
    }

    /// Applies a block's errors, `[rows, block]`, to all weights after it: `W -= E U`.
    fn update_rest(&self, work: &mut [f32], errors: &[f32], block: Range<usize>) {
        let k = self.factor.features();
        if block.end == k {
            return;
        }
        let upper = view(&self.factor.upper[block.start * k..block.end * k], k);
        let upper = upper.slice(s![.., block.end..]);
        let mut work = view_mut(work, k);
        let mut rest = work.slice_mut(s![.., block.end..]);
        general_mat_mul(-1.0, &view(errors, block.len()), &upper, 1.0, &mut rest);
    }
}

/// One output feature under elimination.
struct Row<'a> {
    n: usize,
    /// Compensated weights in elimination order, `[K]`.
    work: &'a mut [f32],
    /// `[K]` along K.
    codes: &'a mut [u8],
    /// `[G]` along K.
    groups: &'a mut [Group],
}

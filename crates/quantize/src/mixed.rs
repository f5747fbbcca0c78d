//! Mixed precision: which block of a model gets how many bits, from measured sensitivity.
//!
//! Each block (the attention of a layer, its MLP, each expert) is quantized to every candidate
//! format; its loss is the error this makes in its outputs on calibration text, relative to the
//! outputs, weighted with the share of the tokens it sees. [`allocate_formats`] then spends a budget
//! of bits where it saves most.

use std::collections::BTreeMap;

use marlin_formats::Scheme;

use crate::{QuantizeError, Result};

/// What a block of modules loses in each candidate format.
#[derive(Clone, Debug, PartialEq)]
pub struct Sensitivity {
    /// Common path of its modules: `model.layers.3.mlp.experts.5`.
    pub block: String,
    /// Its weights.
    pub weights: u64,
    /// Loss by candidate, summed over its modules.
    pub losses: Vec<f64>,
}

impl Sensitivity {
    /// The block of a module: its path without the last component.
    pub fn block_of(module: &str) -> &str {
        module.rsplit_once('.').map_or(module, |(block, _)| block)
    }

    /// Sums modules `(path, weights, loss by candidate)` up to blocks, in order of first mention.
    pub fn sum(modules: impl IntoIterator<Item = (String, u64, Vec<f64>)>) -> Vec<Self> {
        let mut blocks: Vec<Self> = Vec::new();
        let mut index: BTreeMap<String, usize> = BTreeMap::new();
        for (module, weights, losses) in modules {
            let block = Self::block_of(&module).to_owned();
            let at = *index.entry(block.clone()).or_insert(blocks.len());
            match blocks.get_mut(at) {
                None => blocks.push(Self { block, weights, losses }),
                Some(found) => {
                    found.weights += weights;
                    found.losses.iter_mut().zip(losses).for_each(|(sum, loss)| *sum += loss);
                }
            }
        }
        blocks
    }
}

/// The index of each block's format among `candidates`, whose code bits average at most `bits` over
/// all weights (scales are not counted, as in a format's name).
///
/// Every block starts at the fewest bits. Steps along the lower convex hull of its losses are then
/// taken in order of the loss they save per bit, as long as they fit; a step that does not fit ends
/// its block's ascent. Ties go to the earlier block.
///
/// # Errors
/// [`QuantizeError::Option`] when `bits` lies outside the range of the candidates, and for losses
/// that are not finite.
pub fn allocate_formats(blocks: &[Sensitivity], candidates: &[Scheme], bits: f64) -> Result<Vec<usize>> {
    let code_bits: Vec<f64> = candidates.iter().map(|scheme| f64::from(scheme.format.code_bits())).collect();
    let fewest = code_bits.iter().copied().fold(f64::INFINITY, f64::min);
    let most = code_bits.iter().copied().fold(0.0, f64::max);
    if !(fewest..=most).contains(&bits) {
        let rule = "between the fewest and the most bits of the format's family";
        return Err(QuantizeError::Option { option: "bits", value: bits.to_string(), rule });
    }
    if let Some(block) = blocks.iter().find(|block| block.losses.iter().any(|loss| !loss.is_finite())) {
        let rule = "made from finite weights and activations";
        return Err(QuantizeError::Option { option: "sensitivity", value: block.block.clone(), rule });
    }
    let hulls: Vec<Vec<usize>> = blocks.iter().map(|block| hull(&code_bits, &block.losses)).collect();
    let total: f64 = blocks.iter().map(|block| block.weights as f64).sum();
    let cost = |block: usize, step: usize| {
        (code_bits[hulls[block][step + 1]] - code_bits[hulls[block][step]]) * blocks[block].weights as f64
    };
    let start: f64 = blocks.iter().zip(&hulls).map(|(block, hull)| code_bits[hull[0]] * block.weights as f64).sum();
    let mut spare = bits * total - start;
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (b, hull) in hulls.iter().enumerate() {
        for step in 0..hull.len() - 1 {
            let saved = blocks[b].losses[hull[step]] - blocks[b].losses[hull[step + 1]];
            steps.push((saved / cost(b, step), b, step));
        }
    }
    // Within a block the gains fall, so that its steps stay in order.
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(&b.2)));
    let mut chosen = vec![0; blocks.len()];
    for (_, b, step) in steps {
        if chosen[b] == step && cost(b, step) <= spare {
            spare -= cost(b, step);
            chosen[b] += 1;
        }
    }
    Ok(chosen.into_iter().zip(&hulls).map(|(step, hull)| hull[step]).collect())
}

/// Candidates on the lower convex hull of (bits, loss), from the fewest bits to the least loss.
fn hull(bits: &[f64], losses: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..bits.len()).collect();
    order.sort_by(|&a, &b| bits[a].total_cmp(&bits[b]).then(losses[a].total_cmp(&losses[b])).then(a.cmp(&b)));
    let mut hull: Vec<usize> = Vec::new();
    for next in order {
        if hull.last().is_some_and(|&last| losses[next] >= losses[last]) {
            continue;
        }
        while let [.., a, b] = hull[..] {
            let slope = |from: usize, to: usize| (losses[from] - losses[to]) / (bits[to] - bits[from]);
            if slope(a, b) > slope(b, next) {
                break;
            }
            hull.pop();
        }
        hull.push(next);
    }
    hull
}

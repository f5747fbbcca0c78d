//! Mixture of experts.

mod aux_loss;
mod grouped;

use std::cmp::Ordering;

use super::linear::residual_values;
use super::special::{activate, sigmoid};
use super::{Oracle, floats, store, store_words, words};
use crate::moe::{
    AuxLossArgs, CombineArgs, ExpertMlpArgs, GroupArgs, GroupScore, GroupedGemmArgs, MoeOps, RouteArgs, Routing,
    Scoring, duplicate_expert_error, expert_id_error, inverse_index_error, nan_logit_error, no_expert_error,
};
use crate::{Result, Tensor};

/// The experts of one token.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Chosen experts, in descending selection score.
    pub ids: Vec<usize>,
    /// Their weights.
    pub weights: Vec<f64>,
    /// Smallest difference that any comparison behind the choice hinged on; 0 for an exact tie.
    pub margin: f64,
    /// Every chosen expert's selection score is above -inf.
    pub admissible: bool,
}

/// Indices of `scores` in descending order, ties in ascending index.
fn descending(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].partial_cmp(&scores[a]).unwrap_or(Ordering::Equal));
    order
}

/// Smallest difference between neighbours among the first `count + 1` of a descending order.
fn margin(scores: &[f64], order: &[usize], count: usize) -> f64 {
    let neighbours = order.windows(2).take(count).map(|pair| (scores[pair[0]], scores[pair[1]]));
    neighbours.filter(|(_, b)| b.is_finite()).map(|(a, b)| a - b).fold(f64::INFINITY, f64::min)
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|z| (z - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.into_iter().map(|w| w / sum).collect()
}

/// The routing rule for one token's logits (not NaN) and the optional selection bias.
pub fn choose_experts(logits: &[f64], bias: Option<&[f64]>, routing: &Routing) -> Choice {
    let scores = match routing.scoring {
        Scoring::Softmax => softmax(logits),
        Scoring::Sigmoid => logits.iter().map(|&z| sigmoid(z)).collect(),
        Scoring::SoftmaxSelected => logits.to_vec(),
    };
    let mut selection: Vec<f64> = match bias {
        Some(bias) => scores.iter().zip(bias).map(|(p, b)| p + b).collect(),
        None => scores.clone(),
    };

    let group_size = selection.len() / routing.n_group;
    let group_scores: Vec<f64> = selection
        .chunks(group_size)
        .map(|group| {
            let best = descending(group);
            match routing.group_score {
                GroupScore::Max => group[best[0]],
                GroupScore::TopTwoSum => best.iter().take(2).map(|&e| group[e]).sum(),
            }
        })
        .collect();
    let groups = descending(&group_scores);
    let dropped = &groups[routing.topk_group..];
    for &group in dropped {
        selection[group * group_size..][..group_size].fill(f64::NEG_INFINITY);
    }
    // Which groups are kept matters, not their order.
    let group_margin = match dropped.first() {
        Some(&best) => group_scores[groups[routing.topk_group - 1]] - group_scores[best],
        None => f64::INFINITY,
    };

    let order = descending(&selection);
    let ids = order[..routing.top_k].to_vec();
    let chosen: Vec<f64> = ids.iter().map(|&e| scores[e]).collect();
    let mut weights = match routing.scoring {
        Scoring::SoftmaxSelected => softmax(&chosen),
        Scoring::Softmax | Scoring::Sigmoid => chosen,
    };
    if routing.norm_topk_prob {
        let sum = weights.iter().sum::<f64>() + f64::from(routing.norm_eps);
        weights.iter_mut().for_each(|w| *w /= sum);
    }
    weights.iter_mut().for_each(|w| *w *= f64::from(routing.routed_scaling_factor));
    let admissible = ids.iter().all(|&e| selection[e] > f64::NEG_INFINITY);
    Choice { admissible, margin: margin(&selection, &order, routing.top_k).min(group_margin), ids, weights }
}

/// Every id is an expert of the layer, none twice in one token.
fn check_ids(ids: &Tensor<Oracle>, experts: usize) -> Result<()> {
    for (t, token) in words(ids).chunks(ids.columns().max(1)).enumerate() {
        for (s, &id) in token.iter().enumerate() {
            if id as usize >= experts {
                return Err(expert_id_error(t, s, id, experts));
            }
            if token[..s].contains(&id) {
                return Err(duplicate_expert_error(t, id));
            }
        }
    }
    Ok(())
}

impl MoeOps for Oracle {
    fn run_moe_route(&self, args: RouteArgs<'_, Self>) -> Result<()> {
        let experts = args.logits.columns();
        let (mut ids, mut weights) = (Vec::new(), Vec::new());
        for (t, logits) in floats(args.logits).chunks(experts).enumerate() {
            if let Some(e) = logits.iter().position(|z| z.is_nan()) {
                return Err(nan_logit_error(t, e));
            }
            let choice = choose_experts(logits, args.bias.map(floats), &args.routing);
            if !choice.admissible {
                return Err(no_expert_error(t));
            }
            ids.extend(choice.ids.iter().map(|&e| e as u32));
            weights.extend(choice.weights);
        }
        store_words(args.ids, &ids);
        store(args.weights, 0, &weights);
        Ok(())
    }

    fn run_moe_group(&self, args: GroupArgs<'_, Self>) -> Result<()> {
        check_ids(args.ids, args.experts)?;
        let ids = words(args.ids);
        let mut permutation: Vec<u32> = (0..ids.len() as u32).collect();
        permutation.sort_by_key(|&a| ids[a as usize]);
        let mut inverse = vec![0; ids.len()];
        for (row, &assignment) in permutation.iter().enumerate() {
            inverse[assignment as usize] = row as u32;
        }
        let below = |e: usize| ids.iter().filter(|&&id| (id as usize) < e).count() as u32;
        let offsets: Vec<u32> = (0..=args.experts).map(below).collect();
        store_words(args.offsets, &offsets);
        store_words(args.permutation, &permutation);
        store_words(args.inverse, &inverse);
        Ok(())
    }

    fn run_moe_expert_mlp(&self, args: ExpertMlpArgs<'_, Self>) -> Result<()> {
        check_ids(args.ids, args.experts.count())?;
        let (hidden, top_k) = (args.experts.hidden(), args.ids.columns());
        let residual = residual_values(&args.residual, args.out);
        for t in 0..args.x.rows() {
            let x = &floats(args.x)[t * hidden..][..hidden];
            let mut y = residual[t * hidden..][..hidden].to_vec();
            for s in t * top_k..(t + 1) * top_k {
                let [gate, up, down] = &args.experts.data().experts[words(args.ids)[s] as usize];
                let h: Vec<f64> =
                    gate.apply(x).into_iter().zip(up.apply(x)).map(|(g, u)| activate(args.activation, g) * u).collect();
                let w = floats(args.weights)[s];
                for (y, z) in y.iter_mut().zip(down.apply(&h)) {
                    *y += w * z;
                }
            }
            store(args.out, t * hidden, &y);
        }
        Ok(())
    }

    fn run_moe_combine(&self, args: CombineArgs<'_, Self>) -> Result<()> {
        let (columns, rows) = (args.rows.columns(), args.rows.rows());
        let top_k = args.weights.columns();
        let inverse = words(args.inverse);
        if let Some(a) = inverse.iter().position(|&i| i as usize >= rows) {
            return Err(inverse_index_error(a, inverse[a], rows));
        }
        let mut y = residual_values(&args.residual, args.out);
        for (t, y) in y.chunks_mut(columns).enumerate() {
            let weights = &floats(args.weights)[t * top_k..][..top_k];
            for (&w, &row) in weights.iter().zip(&inverse[t * top_k..]) {
                let z = &floats(args.rows)[row as usize * columns..][..columns];
                for (y, z) in y.iter_mut().zip(z) {
                    *y += w * z;
                }
            }
        }
        store(args.out, 0, &y);
        Ok(())
    }

    fn run_moe_aux_loss(&self, args: AuxLossArgs<'_, Self>) -> Result<()> {
        aux_loss::moe_aux_loss(args)
    }

    fn run_moe_grouped_gemm(&self, args: GroupedGemmArgs<'_, Self>) -> Result<()> {
        grouped::moe_grouped_gemm(args)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, empty, ids, tensor};
    use super::*;
    use crate::linear::Residual;
    use crate::{Device, Linear};

    const PLAIN: Routing = Routing {
        top_k: 2,
        scoring: Scoring::Softmax,
        n_group: 1,
        topk_group: 1,
        group_score: GroupScore::Max,
        norm_topk_prob: false,
        norm_eps: 0.0,
        routed_scaling_factor: 1.0,
    };

    #[test]
    fn softmax_over_all_experts() {
        let logits = [0.0, 2f64.ln(), 5f64.ln(), 0.0];
        let choice = choose_experts(&logits, None, &PLAIN);
        assert_eq!(choice.ids, [2, 1]);
        assert_close(&choice.weights, &[5.0 / 9.0, 2.0 / 9.0], 1e-15);
        // The third best is e^0 / 9.
        assert_close(&[choice.margin], &[1.0 / 9.0], 1e-15);
        let normalised = Routing { norm_topk_prob: true, ..PLAIN };
        assert_close(&choose_experts(&logits, None, &normalised).weights, &[5.0 / 7.0, 2.0 / 7.0], 1e-15);
        let selected = Routing { scoring: Scoring::SoftmaxSelected, ..PLAIN };
        assert_close(&choose_experts(&logits, None, &selected).weights, &[5.0 / 7.0, 2.0 / 7.0], 1e-15);
    }

    #[test]
    fn bias_selects_and_does_not_weigh() {
        let routing = Routing {
            scoring: Scoring::Sigmoid,
            norm_topk_prob: true,
            norm_eps: 1e-20,
            routed_scaling_factor: 1.8,
            ..PLAIN
        };
        let logits = [3f64.ln(), 0.0, -(3f64.ln()), 0.0];
        let bias = [7.0, 7.0, 7.6, 7.1];
        // Scores 0.75, 0.5, 0.25, 0.5; with bias 7.75, 7.5, 7.85, 7.6.
        let choice = choose_experts(&logits, Some(&bias), &routing);
        assert_eq!(choice.ids, [2, 0]);
        assert_close(&choice.weights, &[f64::from(1.8f32) * 0.25, f64::from(1.8f32) * 0.75], 1e-12);
    }

    #[test]
    fn ties_go_to_the_lower_expert() {
        let choice = choose_experts(&[1.0; 5], None, &PLAIN);
        assert_eq!((choice.ids, choice.margin), (vec![0, 1], 0.0));
        let choice = choose_experts(&[0.0, 1.0, 0.0, 1.0], None, &PLAIN);
        assert_eq!(choice.ids, [1, 3]);
    }

    #[test]
    fn group_limits() {
        let logits = [4.0, 0.0, 3.0, 3.0, 2.0, 2.5];
        let routing = Routing { n_group: 3, scoring: Scoring::SoftmaxSelected, group_score: GroupScore::Max, ..PLAIN };
        // Group maxima 4, 3, 2.5; sums of two 4, 6, 4.5.
        assert_eq!(choose_experts(&logits, None, &routing).ids, [0, 1]);
        let sums = Routing { group_score: GroupScore::TopTwoSum, ..routing };
        assert_eq!(choose_experts(&logits, None, &sums).ids, [2, 3]);
        let two = Routing { topk_group: 2, ..sums };
        assert_eq!(choose_experts(&logits, None, &two).ids, [2, 3]);
    }

    #[test]
    fn saturated_sigmoids_stay_finite() {
        let routing = Routing { scoring: Scoring::Sigmoid, norm_topk_prob: true, norm_eps: 1e-20, ..PLAIN };
        let choice = choose_experts(&[-1e4; 3], None, &routing);
        assert_eq!(choice.weights, [0.0, 0.0]);
    }

    #[test]
    fn grouping_is_stable() {
        let oracle = Oracle::new();
        let chosen = ids(&[3, 2], &[2, 0, 0, 3, 2, 3]);
        let (mut offsets, mut perm, mut inverse) = (ids(&[6], &[9; 6]), ids(&[6], &[9; 6]), ids(&[6], &[9; 6]));
        let args = GroupArgs {
            ids: &chosen,
            experts: 5,
            offsets: &mut offsets,
            permutation: &mut perm,
            inverse: &mut inverse,
        };
        oracle.moe_group(args).unwrap();
        assert_eq!(oracle.read_u32(&offsets).unwrap(), [0, 2, 2, 4, 6, 6]);
        assert_eq!(oracle.read_u32(&perm).unwrap(), [1, 2, 0, 4, 3, 5]);
        assert_eq!(oracle.read_u32(&inverse).unwrap(), [2, 0, 1, 4, 3, 5]);
        assert!(check_ids(&ids(&[1, 2], &[1, 1]), 5).is_err());
        assert!(check_ids(&ids(&[1, 2], &[1, 5]), 5).is_err());
    }

    #[test]
    fn combine_weighs_rows_in_their_places() {
        let oracle = Oracle::new();
        let rows = tensor(&[4, 1], &[1.0, 10.0, 100.0, 1000.0]);
        let inverse = ids(&[4], &[2, 0, 3, 1]);
        let weights = tensor(&[2, 2], &[1.0, 0.5, 2.0, 3.0]);
        let mut out = tensor(&[2, 1], &[0.25, 0.0]);
        let args = CombineArgs {
            rows: &rows,
            inverse: &inverse,
            weights: &weights,
            residual: Residual::InPlace,
            out: &mut out,
        };
        oracle.moe_combine(args).unwrap();
        assert_eq!(oracle.read_f64(&out).unwrap(), [100.75, 2030.0]);
    }

    #[test]
    fn expert_mlp_is_a_weighted_sum_of_gated_mlps() {
        use crate::linear::{Activation, GatedUpArgs, LinearArgs, LinearOps};
        use crate::{ExpertStack, ExpertWeights, HostTensor, Weight};
        let oracle = Oracle::new();
        let weight = |values: &[f32]| Weight::dense(HostTensor::from_f32(&[1, 1], values).unwrap()).unwrap();
        let experts: Vec<ExpertWeights> = [[1.0, 2.0, 3.0], [-1.0, 0.5, 2.0]]
            .map(|[g, u, d]| ExpertWeights { gate: weight(&[g]), up: weight(&[u]), down: weight(&[d]) })
            .to_vec();
        let x = tensor(&[1, 1], &[1.5]);
        let single = |e: &ExpertWeights| {
            let linear = |w: &Weight| Linear::new(&oracle, w.clone()).unwrap();
            let (mut h, mut y) = (empty(&[1, 1]), empty(&[1, 1]));
            let args = GatedUpArgs {
                norm: None,
                x: &x,
                gate: &linear(&e.gate),
                up: &linear(&e.up),
                activation: Activation::Silu,
                out: &mut h,
            };
            oracle.gated_up(args).unwrap();
            let args = LinearArgs {
                x: &h,
                weight: &linear(&e.down),
                activation: Activation::None,
                out_scale: 1.0,
                residual: Residual::None,
                out: &mut y,
            };
            oracle.linear(args).unwrap();
            oracle.read_f64(&y).unwrap()[0]
        };
        let expected = 0.25 * single(&experts[1]) + 0.75 * single(&experts[0]);
        let stack = ExpertStack::new(&oracle, experts).unwrap();
        let mut out = empty(&[1, 1]);
        let args = ExpertMlpArgs {
            x: &x,
            ids: &ids(&[1, 2], &[1, 0]),
            weights: &tensor(&[1, 2], &[0.25, 0.75]),
            experts: &stack,
            activation: Activation::Silu,
            residual: Residual::None,
            out: &mut out,
        };
        oracle.moe_expert_mlp(args).unwrap();
        assert_close(&oracle.read_f64(&out).unwrap(), &[expected], 1e-14);
    }
}

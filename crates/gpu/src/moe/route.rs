//! Choice of experts: one cube a token. Every expert counts those that come before it, which gives its rank at once.

use cubecl::prelude::*;
use marlin_ops::moe::{GroupScore, RouteArgs, Scoring};
use marlin_ops::{Device, OpError, Result};

use super::dot::masked;
use crate::Gpu;
use crate::fault::{Fault, record};
use crate::launch::{UNITS, cubes, units};
use crate::math::exp;
use crate::reduce::{cube_max, cube_sum, max_of};

/// Most experts of a layer: their scores lie in shared memory.
const MOST_EXPERTS: usize = 1920;

#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
enum Score {
    Softmax,
    Sigmoid,
    SoftmaxSelected,
}

/// What [`route_tokens`] is compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct Config {
    score: Score,
    bias: bool,
    /// Only some groups are kept.
    limited: bool,
    /// A group's score is the sum of its two best.
    two_best: bool,
    normalize: bool,
    /// At least the number of experts.
    capacity: usize,
}

/// A number that orders as the value does; 0 and -0 are alike, NaN is 0, the key of -inf is [`LOWEST`].
#[cube]
fn key(value: f32) -> u32 {
    let bits = u32::reinterpret(value);
    let magnitude = bits & 0x7fff_ffffu32;
    let ordered = select(bits == magnitude, magnitude | 0x8000_0000u32, 0x8000_0000u32 - magnitude);
    select(magnitude > 0x7f80_0000u32, 0u32.runtime(), ordered)
}

/// The key of -inf.
const LOWEST: u32 = 0x8000_0000 - 0x7f80_0000;

#[cube]
fn is_nan(value: f32) -> bool {
    (u32::reinterpret(value) & 0x7fff_ffffu32) > 0x7f80_0000u32
}

/// 1 / (1 + e^-z), without overflow.
#[cube]
fn sigmoid(z: f32) -> f32 {
    let small = exp(-f32::abs(z));
    let p = 1.0f32 / (1.0f32 + small);
    select(z >= 0.0f32, p, small * p)
}

/// `ids` and `weights [T, k]` of `logits [T, E]`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn route_tokens(
    logits: &[f32],
    bias: &[f32],
    ids: &mut [u32],
    weights: &mut [f32],
    faults: &mut [Atomic<u32>],
    tokens: u32,
    experts: u32,
    top_k: u32,
    n_group: u32,
    topk_group: u32,
    norm_eps: f32,
    scaling: f32,
    zero: u32,
    #[comptime] c: Config,
) {
    // Scores behind the weights, and keys of the selection scores.
    let mut scores = Shared::<[f32]>::new_slice(comptime!(c.capacity));
    let mut selection = Shared::<[u32]>::new_slice(comptime!(c.capacity));
    let mut groups = Shared::<[u32]>::new_slice(comptime!(c.capacity));
    let mut chosen = Shared::<[u32]>::new_slice(comptime!(c.capacity));
    let token = CUBE_POS;
    if token < tokens as usize {
        let count = experts as usize;
        let unit = UNIT_POS as usize;
        let shift = masked(zero);
        // All units take part in every round, so that they stay together; keys beyond the last expert are the lowest.
        let rounds = count.div_ceil(UNITS as usize);
        score_experts(&mut scores, logits, faults, token * count, count, rounds, c);
        for round in 0..rounds {
            let e = round * UNITS as usize + unit;
            let mut own = 0u32.runtime();
            if e < count {
                let mut q = scores[e];
                if comptime!(c.bias) {
                    q += bias[e];
                }
                own = key(q);
            }
            selection[e] = own;
        }
        sync_cube();
        if comptime!(c.limited) {
            let size = count / n_group as usize;
            for round in 0..rounds {
                let g = round * UNITS as usize + unit;
                let group = select(g < n_group as usize, g, 0usize.runtime());
                groups[g] = group_key(&scores, bias, group * size, size, c);
            }
            sync_cube();
            for round in 0..rounds {
                let e = round * UNITS as usize + unit;
                let group = select(e < count, e / size, 0usize.runtime());
                if rank(&groups, group, n_group as usize, shift) >= topk_group {
                    selection[e] = 0u32;
                }
            }
            sync_cube();
        }
        for round in 0..rounds {
            let e = round * UNITS as usize + unit;
            let r = rank(&selection, e, count, shift);
            if e < count && r < top_k {
                chosen[r as usize] = e as u32;
                ids[token * top_k as usize + r as usize] = e as u32;
                if selection[e] <= LOWEST {
                    record(faults, comptime!(Fault::RouterEmpty), token);
                }
            }
        }
        sync_cube();
        store_weights(weights, &scores, &chosen, token * top_k as usize, top_k as usize, norm_eps, scaling, shift, c);
    }
}

/// The scores of a token's experts; SoftmaxSelected keeps logits.
#[cube]
fn score_experts(
    scores: &mut [f32],
    logits: &[f32],
    faults: &mut [Atomic<u32>],
    start: usize,
    count: usize,
    rounds: usize,
    #[comptime] c: Config,
) {
    let mut max = f32::new(f32::MIN);
    for round in 0..rounds {
        let e = round * UNITS as usize + UNIT_POS as usize;
        let mut z = f32::new(f32::MIN);
        if e < count {
            z = logits[start + e];
            if is_nan(z) {
                record(faults, comptime!(Fault::RouterLogit), start + e);
            }
        }
        max = max_of(max, z);
        scores[e] = if comptime!(c.score == Score::Sigmoid) { sigmoid(z) } else { z };
    }
    if comptime!(c.score == Score::Softmax) {
        let max = cube_max(max, UNITS as usize);
        let mut sum = f32::new(0.0);
        for round in 0..rounds {
            let e = round * UNITS as usize + UNIT_POS as usize;
            let p = select(e < count, exp(scores[e] - max), f32::new(0.0));
            scores[e] = p;
            sum += p;
        }
        let sum = cube_sum(sum, UNITS as usize);
        for round in 0..rounds {
            let e = round * UNITS as usize + UNIT_POS as usize;
            scores[e] = scores[e] / sum;
        }
    }
    sync_cube();
}

/// The key of a group's score.
#[cube]
fn group_key(scores: &[f32], bias: &[f32], start: usize, size: usize, #[comptime] c: Config) -> u32 {
    let mut best = f32::new(f32::NEG_INFINITY);
    let mut second = f32::new(f32::NEG_INFINITY);
    for i in 0..size {
        let mut q = scores[start + i];
        if comptime!(c.bias) {
            q += bias[start + i];
        }
        let lesser = select(q > best, best, q);
        best = max_of(best, q);
        second = max_of(second, lesser);
    }
    if comptime!(c.two_best) {
        if size > 1usize {
            best += second;
        }
    }
    key(best)
}

/// How many of the first `count` keys come before that of `i`: larger ones, and equal ones of lower index.
#[cube]
fn rank(keys: &[u32], i: usize, count: usize, shift: usize) -> u32 {
    let own = keys[i];
    let mut before = 0u32.runtime();
    for other in 0..count {
        let value = keys[other + shift];
        let equal = u32::cast_from(value == own) & u32::cast_from(other < i);
        before += u32::cast_from(value > own) | equal;
    }
    before
}

/// Weights of the chosen experts from their scores alone; every unit sums all of them in the same order.
#[cube]
#[allow(clippy::too_many_arguments)]
fn store_weights(
    weights: &mut [f32],
    scores: &[f32],
    chosen: &[u32],
    start: usize,
    count: usize,
    norm_eps: f32,
    scaling: f32,
    shift: usize,
    #[comptime] c: Config,
) {
    let mut max = f32::new(0.0);
    if comptime!(c.score == Score::SoftmaxSelected) {
        max = scores[chosen[shift] as usize];
        for i in 1..count {
            max = max_of(max, scores[chosen[i + shift] as usize]);
        }
    }
    let mut sum = f32::new(0.0);
    for i in 0..count {
        sum += weight_of(scores[chosen[i + shift] as usize], max, c);
    }
    let mut s = UNIT_POS as usize;
    while s < count {
        let mut w = weight_of(scores[chosen[s] as usize], max, c);
        if comptime!(c.score == Score::SoftmaxSelected) {
            w = w / sum;
            if comptime!(c.normalize) {
                // They add up to 1 already.
                w = w / (1.0f32 + norm_eps);
            }
        } else if comptime!(c.normalize) {
            w = w / (sum + norm_eps);
        }
        weights[start + s] = w * scaling;
        s += UNITS as usize;
    }
}

/// A chosen expert's weight before it is divided by any sum.
#[cube]
fn weight_of(score: f32, max: f32, #[comptime] c: Config) -> f32 {
    if comptime!(c.score == Score::SoftmaxSelected) { exp(score - max) } else { score }
}

impl<R: Runtime> Gpu<R> {
    pub(super) fn route(&self, args: RouteArgs<'_, Self>) -> Result<()> {
        const OP: &str = "moe_route";
        let routing = &args.routing;
        let (tokens, experts) = (args.logits.rows(), args.logits.columns());
        if experts > MOST_EXPERTS {
            let what = format!("{experts} experts, at most {MOST_EXPERTS}");
            return Err(OpError::Unsupported { operation: OP, backend: self.name(), what });
        }
        let config = Config {
            score: match routing.scoring {
                Scoring::Softmax => Score::Softmax,
                Scoring::Sigmoid => Score::Sigmoid,
                Scoring::SoftmaxSelected => Score::SoftmaxSelected,
            },
            bias: args.bias.is_some(),
            limited: routing.topk_group < routing.n_group,
            two_best: routing.group_score == GroupScore::TopTwoSum,
            normalize: routing.norm_topk_prob,
            capacity: if experts <= 256 { 256 } else { MOST_EXPERTS },
        };
        // SAFETY: logits hold tokens times experts elements, the bias `experts`, ids and weights tokens times k; there
        // are at most `capacity` experts, and the chosen ones are distinct.
        unsafe {
            route_tokens::launch_unchecked::<R>(
                self.client(),
                cubes(tokens),
                units(),
                args.logits.buffer().arg(args.logits.elements()),
                args.bias.map_or_else(|| self.unread(), |bias| bias.buffer().arg(experts)),
                args.ids.buffer().arg(args.ids.elements()),
                args.weights.buffer().arg(args.weights.elements()),
                self.faults(),
                tokens as u32,
                experts as u32,
                routing.top_k as u32,
                routing.n_group as u32,
                routing.topk_group as u32,
                routing.norm_eps,
                routing.routed_scaling_factor,
                0,
                config,
            );
        }
        Ok(())
    }
}

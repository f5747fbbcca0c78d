//! Sampling.

use std::cmp::Ordering;

use super::{Oracle, floats, store, store_words};
use crate::rng::{Stream, gumbel, random_word, uniform};
use crate::sampling::{
    DrawArgs, LogitsProcessArgs, SampleArgs, SampleFilter, SamplingOps, bad_logit_error, bad_probability_error,
    empty_logits_error, no_probability_error,
};
use crate::{Result, Tensor};

/// What a filtered draw gives.
#[derive(Clone, Debug, PartialEq)]
pub struct Draw {
    /// The id.
    pub id: usize,
    /// Ids that survived the filters, in descending probability.
    pub survivors: Vec<usize>,
    /// Distance of the closest decision (a filter's threshold, the draw's boundary) from the other outcome, in
    /// probability.
    pub margin: f64,
}

/// The first id whose cumulative probability exceeds `u` of the whole, and the smallest distance of a cumulative
/// probability from `u`. The probabilities are not negative, one is above 0.
pub fn draw_by_cdf(probabilities: &[f64], u: f64) -> (usize, f64) {
    let total: f64 = probabilities.iter().sum();
    let (mut cumulative, mut margin) = (0.0, f64::INFINITY);
    let (mut id, mut last) = (None, 0);
    for (v, &p) in probabilities.iter().enumerate().filter(|(_, p)| **p > 0.0) {
        cumulative += p;
        last = v;
        margin = margin.min((cumulative / total - u).abs());
        if id.is_none() && cumulative > u * total {
            id = Some(v);
        }
    }
    (id.unwrap_or(last), margin)
}

/// The id of the largest logit with the noise of (seed, row, step), and by how much it leads. No NaN or +inf.
pub fn draw_by_gumbel(logits: &[f64], seed: u64, row: u32, step: u32) -> (usize, f64) {
    let (mut best, mut id, mut lead) = (f64::NEG_INFINITY, 0, f64::INFINITY);
    for (v, l) in logits.iter().enumerate() {
        let value = l + gumbel(random_word(seed, Stream::Gumbel, row, step, v as u32));
        if value > best {
            (lead, best, id) = (value - best, value, v);
        } else {
            lead = lead.min(best - value);
        }
    }
    (id, lead)
}

/// A candidate: id and probability.
type Candidate = (usize, f64);

/// The filters of `filter` on the softmax of `logits` (no NaN or +inf, one finite), then the draw for `u` in [0, 1).
pub fn draw(logits: &[f64], filter: &SampleFilter, u: f64) -> Draw {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights = logits.iter().map(|l| (l - max).exp());
    let mut kept: Vec<Candidate> = weights.enumerate().filter(|(_, p)| *p > 0.0).collect();
    kept.sort_by(|a, b| descending(a.1, b.1));
    let mut margin = f64::INFINITY;

    if let Some(k) = filter.top_k {
        kept.truncate(k);
    }
    normalise(&mut kept);
    if let Some(p) = filter.top_p {
        keep_mass(&mut kept, f64::from(p), &mut margin);
    }
    if let Some(min_p) = filter.min_p.map(f64::from) {
        let largest = kept[0].1;
        let distances = kept.iter().map(|(_, p)| (p / largest - min_p).abs());
        // A threshold of 0 keeps everything, and a ratio of exactly 1 is computed exactly by any implementation.
        margin = distances.filter(|&d| d > 0.0 && min_p > 0.0).fold(margin, f64::min);
        kept.retain(|(_, p)| *p >= min_p * largest);
        normalise(&mut kept);
    }
    if let Some(mass) = filter.typical {
        keep_typical(&mut kept, f64::from(mass), &mut margin);
    }

    let mut cumulative = 0.0;
    let mut id = None;
    for &(candidate, p) in &kept {
        cumulative += p;
        margin = margin.min((cumulative - u).abs());
        if id.is_none() && cumulative > u {
            id = Some(candidate);
        }
    }
    let survivors: Vec<usize> = kept.iter().map(|(id, _)| *id).collect();
    Draw {
        // u < 1 and the mass is 1 up to rounding, so only the last survivor can be left over.
        id: id.unwrap_or(survivors[survivors.len() - 1]),
        survivors,
        margin,
    }
}

fn descending(a: f64, b: f64) -> Ordering {
    b.partial_cmp(&a).unwrap_or(Ordering::Equal)
}

/// Divides by the survivors' mass.
fn normalise(kept: &mut [Candidate]) {
    let mass: f64 = kept.iter().map(|(_, p)| p).sum();
    kept.iter_mut().for_each(|(_, p)| *p /= mass);
}

/// Keeps the shortest prefix with mass >= `wanted`, at least one; all for 1.
fn keep_mass(kept: &mut Vec<Candidate>, wanted: f64, margin: &mut f64) {
    if wanted < 1.0 {
        let mut mass = 0.0;
        let mut count = 0;
        while count == 0 || mass < wanted {
            mass += kept[count].1;
            count += 1;
            if wanted > 0.0 {
                *margin = margin.min((mass - wanted).abs());
            }
            if count == kept.len() {
                break;
            }
        }
        kept.truncate(count);
    }
    normalise(kept);
}

/// Keeps the shortest prefix with mass >= `wanted` in ascending `|-ln p - entropy|`, back in descending probability.
fn keep_typical(kept: &mut Vec<Candidate>, wanted: f64, margin: &mut f64) {
    let entropy: f64 = -kept.iter().map(|(_, p)| p * p.ln()).sum::<f64>();
    let distance = |p: f64| (-p.ln() - entropy).abs();
    kept.sort_by(|a, b| descending(distance(b.1), distance(a.1)));
    let sorted = kept.clone();
    keep_mass(kept, wanted, margin);
    // Two different probabilities at nearly equal distance on both sides of the cut could be exchanged.
    if let (Some(last), Some(next)) = (sorted.get(kept.len() - 1), sorted.get(kept.len()))
        && last.1 != next.1
    {
        *margin = margin.min(distance(next.1) - distance(last.1));
    }
    kept.sort_by(|a, b| descending(a.1, b.1).then(a.0.cmp(&b.0)));
}

/// No NaN, no +inf, not only -inf.
fn check_row(operation: &'static str, row: usize, logits: &[f64]) -> Result<()> {
    if let Some(v) = logits.iter().position(|l| l.is_nan() || *l == f64::INFINITY) {
        return Err(bad_logit_error(operation, row, v, logits[v]));
    }
    if logits.iter().all(|l| *l == f64::NEG_INFINITY) {
        return Err(empty_logits_error(operation, row));
    }
    Ok(())
}

impl SamplingOps for Oracle {
    fn run_argmax(&self, logits: &Tensor<Self>, ids: &mut Tensor<Self>) -> Result<()> {
        let mut chosen = Vec::new();
        for (r, row) in floats(logits).chunks(logits.columns()).enumerate() {
            check_row("argmax", r, row)?;
            let largest = (1..row.len()).fold(0, |best, v| if row[v] > row[best] { v } else { best });
            chosen.push(largest as u32);
        }
        store_words(ids, &chosen);
        Ok(())
    }

    fn run_process_logits(&self, args: LogitsProcessArgs<'_, Self>) -> Result<()> {
        let mut logits = floats(args.logits).to_vec();
        check_row("logits_process", 0, &logits)?;
        let process = args.process;
        let [repetition, frequency, presence, temperature] =
            [process.repetition_penalty, process.frequency_penalty, process.presence_penalty, process.temperature]
                .map(f64::from);
        for (v, l) in logits.iter_mut().enumerate() {
            let count = |ids: &[u32]| ids.iter().filter(|&&id| id as usize == v).count();
            let generated = count(args.generated);
            if generated + count(args.prompt) > 0 {
                *l = if *l > 0.0 { *l / repetition } else { *l * repetition };
            }
            *l -= frequency * generated as f64;
            if generated > 0 {
                *l -= presence;
            }
            *l /= temperature;
        }
        store(args.logits, 0, &logits);
        Ok(())
    }

    fn run_sample(&self, args: SampleArgs<'_, Self>) -> Result<()> {
        let mut ids = Vec::new();
        for (r, row) in floats(args.logits).chunks(args.logits.columns()).enumerate() {
            check_row("sample", r, row)?;
            let word = random_word(args.seed, Stream::Categorical, args.rows[r], args.steps[r], 0);
            ids.push(draw(row, args.filter, uniform(word)).id as u32);
        }
        store_words(args.ids, &ids);
        Ok(())
    }

    fn run_sample_categorical(&self, args: DrawArgs<'_, Self>) -> Result<()> {
        let mut ids = Vec::new();
        for (r, row) in floats(args.values).chunks(args.values.columns()).enumerate() {
            if let Some(v) = row.iter().position(|p| !(*p >= 0.0 && p.is_finite())) {
                return Err(bad_probability_error(r, v, row[v]));
            }
            if row.iter().all(|p| *p == 0.0) {
                return Err(no_probability_error(r));
            }
            let word = random_word(args.seed, Stream::Categorical, args.rows[r], args.steps[r], 0);
            ids.push(draw_by_cdf(row, uniform(word)).0 as u32);
        }
        store_words(args.ids, &ids);
        Ok(())
    }

    fn run_sample_gumbel(&self, args: DrawArgs<'_, Self>) -> Result<()> {
        let mut ids = Vec::new();
        for (r, row) in floats(args.values).chunks(args.values.columns()).enumerate() {
            check_row("sample_gumbel", r, row)?;
            ids.push(draw_by_gumbel(row, args.seed, args.rows[r], args.steps[r]).0 as u32);
        }
        store_words(args.ids, &ids);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{assert_close, ids, tensor};
    use super::*;
    use crate::Device;
    use crate::sampling::LogitsProcess;

    /// Logits of the given probabilities.
    fn logits(p: &[f64]) -> Vec<f64> {
        p.iter().map(|p| p.ln()).collect()
    }

    #[test]
    fn draw_walks_down_the_probabilities() {
        let l = logits(&[0.1, 0.5, 0.4]);
        let id = |u: f64| draw(&l, &SampleFilter::NONE, u).id;
        assert_eq!([id(0.0), id(0.49), id(0.51), id(0.89), id(0.91)], [1, 1, 2, 2, 0]);
        assert_eq!(draw(&l, &SampleFilter::NONE, 0.51).survivors, [1, 2, 0]);
        assert!((draw(&l, &SampleFilter::NONE, 0.51).margin - 0.01).abs() < 1e-12);
        // -inf is never drawn; equal probabilities go by index.
        let banned = [f64::NEG_INFINITY, 1.0, 1.0, f64::NEG_INFINITY];
        assert_eq!(draw(&banned, &SampleFilter::NONE, 0.999_999).survivors, [1, 2]);
    }

    #[test]
    fn each_filter_and_its_ties() {
        let l = logits(&[0.1, 0.4, 0.1, 0.3, 0.1]);
        let kept = |filter: SampleFilter| draw(&l, &filter, 0.0).survivors;
        let none = SampleFilter::NONE;
        assert_eq!(kept(SampleFilter { top_k: Some(3), ..none.clone() }), [1, 3, 0]);
        assert_eq!(kept(SampleFilter { top_k: Some(99), ..none.clone() }), [1, 3, 0, 2, 4]);
        assert_eq!(kept(SampleFilter { top_p: Some(0.0), ..none.clone() }), [1]);
        assert_eq!(kept(SampleFilter { top_p: Some(0.75), ..none.clone() }), [1, 3, 0]);
        assert_eq!(kept(SampleFilter { top_p: Some(1.0), ..none.clone() }), [1, 3, 0, 2, 4]);
        assert_eq!(kept(SampleFilter { min_p: Some(0.5), ..none.clone() }), [1, 3]);
        assert_eq!(kept(SampleFilter { min_p: Some(1.0), ..none.clone() }), [1]);
        // Entropy 1.419; |-ln p - H| = 0.50 for 0.4, 0.21 for 0.3, 0.88 for 0.1.
        assert_eq!(kept(SampleFilter { typical: Some(0.2), ..none.clone() }), [3]);
        assert_eq!(kept(SampleFilter { typical: Some(0.5), ..none.clone() }), [1, 3]);
        assert_eq!(kept(SampleFilter { typical: Some(0.75), ..none }), [1, 3, 0]);
    }

    #[test]
    fn filters_renormalise_over_the_survivors() {
        let l = logits(&[0.4, 0.3, 0.2, 0.1]);
        // After top-k 2 the first has 4/7 = 0.57 of the mass.
        let filter = SampleFilter { top_k: Some(2), top_p: Some(0.55), ..SampleFilter::NONE };
        assert_eq!(draw(&l, &filter, 0.99).survivors, [0]);
        let filter = SampleFilter { top_k: Some(2), ..SampleFilter::NONE };
        assert_eq!(draw(&l, &filter, 0.57).id, 0);
        assert_eq!(draw(&l, &filter, 0.58).id, 1);
    }

    #[test]
    fn argmax_takes_the_first_maximum() {
        let oracle = Oracle::new();
        let x = tensor(&[3, 3], &[1.0, 2.0, 2.0, -0.0, 0.0, -1.0, f32::NEG_INFINITY, -9.0, -9.0]);
        let mut out = ids(&[3], &[7; 3]);
        oracle.argmax(&x, &mut out).unwrap();
        assert_eq!(oracle.read_u32(&out).unwrap(), [1, 0, 1]);
        for bad in [f32::NAN, f32::INFINITY] {
            let x = tensor(&[1, 2], &[0.0, bad]);
            assert!(oracle.argmax(&x, &mut ids(&[1], &[0])).is_err());
        }
        let x = tensor(&[1, 2], &[f32::NEG_INFINITY; 2]);
        assert!(oracle.argmax(&x, &mut ids(&[1], &[0])).is_err());
    }

    #[test]
    fn cdf_skips_zeros_and_takes_unnormalised_probabilities() {
        let p = [0.0, 2.0, 0.0, 6.0, 0.0];
        let id = |u: f64| draw_by_cdf(&p, u).0;
        assert_eq!([id(0.0), id(0.2499), id(0.25), id(1.0 - 2f64.powi(-32))], [1, 1, 3, 3]);
        assert!((draw_by_cdf(&p, 0.3).1 - 0.05).abs() < 1e-12);
        // Rounding may leave the sum below u: the last id that can be drawn.
        assert_eq!(id(1.0), 3);
    }

    #[test]
    fn gumbel_noise_belongs_to_row_token_and_step() {
        let logits = [0.0; 50];
        let chosen: Vec<usize> = (0..60).map(|i| draw_by_gumbel(&logits, 5, i / 8, i % 8).0).collect();
        let mut different = chosen.clone();
        different.sort_unstable();
        different.dedup();
        assert!(different.len() > 25, "{chosen:?}");
        let mut banned = [f64::NEG_INFINITY; 50];
        banned[49] = -1e4;
        assert_eq!(draw_by_gumbel(&banned, 5, 1, 1), (49, f64::INFINITY));
    }

    #[test]
    fn penalties_in_order() {
        let oracle = Oracle::new();
        let mut x = tensor(&[4], &[2.0, -2.0, 4.0, 1.0]);
        let process =
            LogitsProcess { repetition_penalty: 2.0, frequency_penalty: 0.25, presence_penalty: 0.5, temperature: 0.5 };
        let args = LogitsProcessArgs { logits: &mut x, prompt: &[0, 0], generated: &[1, 2, 2], process: &process };
        oracle.process_logits(args).unwrap();
        // [2/2, -2*2 - 0.25 - 0.5, 4/2 - 0.5 - 0.5, 1] / 0.5
        assert_close(&oracle.read_f64(&x).unwrap(), &[2.0, -9.5, 2.0, 2.0], 1e-12);
    }

    #[test]
    fn sample_uses_row_and_step_of_the_stream() {
        let oracle = Oracle::new();
        let count = 64;
        let x = tensor(&[count, 2], &vec![0.0; 2 * count]);
        let (rows, steps): (Vec<u32>, Vec<u32>) = (0..count as u32).map(|i| (i / 8, i % 8)).unzip();
        let mut out = ids(&[count], &vec![9; count]);
        let args =
            SampleArgs { logits: &x, filter: &SampleFilter::NONE, seed: 42, rows: &rows, steps: &steps, ids: &mut out };
        oracle.sample(args).unwrap();
        let chosen = oracle.read_u32(&out).unwrap();
        for i in 0..count {
            let word = random_word(42, Stream::Categorical, rows[i], steps[i], 0);
            assert_eq!(chosen[i], u32::from(uniform(word) >= 0.5));
        }
        assert!(chosen.contains(&0) && chosen.contains(&1));
    }
}

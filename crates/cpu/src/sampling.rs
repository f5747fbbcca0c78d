//! Sampling. Probabilities and sums are f64; candidates are sorted only as far as a decision needs.

use std::cmp::Ordering;

use marlin_ops::rng::{Stream, gumbel, philox4x32, random_word, uniform};
use marlin_ops::sampling::{
    DrawArgs, LogitsProcessArgs, SampleArgs, SampleFilter, bad_logit_error, bad_probability_error, empty_logits_error,
    no_probability_error,
};
use marlin_ops::{Result, SamplingOps, Tensor};

use crate::Cpu;
use crate::buffer::{Floats, f32s, f32s_mut, u32s_mut};

/// First number of candidates that is sorted.
const FIRST_SORTED: usize = 256;

/// An id and its probability (or logit, before the softmax).
pub(crate) type Candidate = (u32, f64);

/// Value descending, then id ascending.
fn order(a: &Candidate, b: &Candidate) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// Candidates of one row; the first `sorted` are in order and not below any later one.
struct Candidates<'a> {
    items: &'a mut Vec<Candidate>,
    sorted: usize,
}

impl<'a> Candidates<'a> {
    /// Softmax over the finite logits (the `top_k` largest of them); `items` is empty.
    fn new(logits: &[f32], top_k: Option<usize>, items: &'a mut Vec<Candidate>) -> Self {
        let finite = (0..).zip(logits).filter(|(_, l)| **l != f32::NEG_INFINITY);
        // Adding 0 makes -0 equal to +0 under the total order.
        items.extend(finite.map(|(id, &l)| (id, f64::from(l) + 0.0)));
        let mut out = Self { items, sorted: 0 };
        if let Some(k) = top_k.filter(|&k| k < out.items.len()) {
            out.items.select_nth_unstable_by(k, order);
            out.items.truncate(k);
        }
        let logits = out.items.iter().map(|(_, l)| *l);
        let max = logits.fold(f64::NEG_INFINITY, f64::max);
        out.items.iter_mut().for_each(|(_, p)| *p = (*p - max).exp());
        out.items.retain(|(_, p)| *p > 0.0);
        out.normalise();
        out
    }

    fn normalise(&mut self) {
        let mass: f64 = self.items.iter().map(|(_, p)| p).sum();
        self.items.iter_mut().for_each(|(_, p)| *p /= mass);
    }

    /// The candidate at place `i` in descending order.
    fn ranked(&mut self, i: usize) -> Candidate {
        while i >= self.sorted {
            let wanted = FIRST_SORTED.max(8 * self.sorted).min(self.items.len());
            let rest = &mut self.items[self.sorted..];
            let count = wanted - self.sorted;
            if count < rest.len() {
                rest.select_nth_unstable_by(count, order);
            }
            rest[..count].sort_unstable_by(order);
            self.sorted = wanted;
        }
        self.items[i]
    }

    /// Shortest prefix with mass >= `wanted`, at least one candidate.
    fn keep_mass(&mut self, wanted: f64) {
        if wanted < 1.0 {
            let (mut mass, mut count) = (0.0, 0);
            while count < self.items.len() && (count == 0 || mass < wanted) {
                mass += self.ranked(count).1;
                count += 1;
            }
            self.items.truncate(count);
            self.sorted = self.sorted.min(count);
        }
        self.normalise();
    }

    fn keep_above(&mut self, min_p: f64) {
        let least = min_p * self.ranked(0).1;
        self.items.retain(|(_, p)| *p >= least);
        self.sorted = self.sorted.min(self.items.len());
        self.normalise();
    }

    /// Shortest prefix with mass >= `wanted` in ascending `|-ln p - entropy|`.
    fn keep_typical(&mut self, wanted: f64) {
        let entropy: f64 = -self.items.iter().map(|(_, p)| p * p.ln()).sum::<f64>();
        let distance = |p: f64| (-p.ln() - entropy).abs();
        let by_distance = |a: &Candidate, b: &Candidate| distance(a.1).total_cmp(&distance(b.1)).then(order(a, b));
        self.items.sort_unstable_by(by_distance);
        self.sorted = self.items.len();
        self.keep_mass(wanted);
        self.items.sort_unstable_by(order);
    }

    /// The first candidate whose cumulative probability exceeds `u`.
    fn draw(&mut self, u: f64) -> u32 {
        let mut cumulative = 0.0;
        for i in 0..self.items.len() {
            let (id, p) = self.ranked(i);
            cumulative += p;
            if cumulative > u {
                return id;
            }
        }
        // u < 1 and the mass is 1 up to rounding.
        self.ranked(self.items.len() - 1).0
    }
}

fn sample_row(logits: &[f32], filter: &SampleFilter, u: f64, items: &mut Vec<Candidate>) -> u32 {
    let mut candidates = Candidates::new(logits, filter.top_k, items);
    if let Some(p) = filter.top_p {
        candidates.keep_mass(f64::from(p));
    }
    if let Some(p) = filter.min_p {
        candidates.keep_above(f64::from(p));
    }
    if let Some(mass) = filter.typical {
        candidates.keep_typical(f64::from(mass));
    }
    candidates.draw(u)
}

/// No NaN, no +inf, not only -inf; returns the lowest index of the largest value.
fn check_row(operation: &'static str, row: usize, logits: &[f32]) -> Result<usize> {
    let bad = |l: &f32| l.is_nan() || *l == f32::INFINITY;
    if let Some(id) = logits.iter().position(bad) {
        return Err(bad_logit_error(operation, row, id, f64::from(logits[id])));
    }
    let mut best = 0;
    for (id, l) in logits.iter().enumerate() {
        if *l > logits[best] {
            best = id;
        }
    }
    if logits[best] == f32::NEG_INFINITY {
        return Err(empty_logits_error(operation, row));
    }
    Ok(best)
}

/// The first id whose cumulative probability exceeds `u` of the whole.
fn draw_by_cdf(row: usize, probabilities: &[f32], u: f64) -> Result<u32> {
    if let Some(id) = probabilities.iter().position(|p| !(*p >= 0.0 && p.is_finite())) {
        return Err(bad_probability_error(row, id, f64::from(probabilities[id])));
    }
    let threshold = u * probabilities.iter().map(|p| f64::from(*p)).sum::<f64>();
    let (mut cumulative, mut last) = (0.0, None);
    for (id, p) in (0..).zip(probabilities).filter(|(_, p)| **p > 0.0) {
        cumulative += f64::from(*p);
        last = Some(id);
        if cumulative > threshold {
            break;
        }
    }
    last.ok_or_else(|| no_probability_error(row))
}

/// The id of the largest logit with noise; the logits are checked.
fn draw_by_gumbel(logits: &[f32], seed: u64, row: u32, step: u32) -> u32 {
    let key = [seed as u32, (seed >> 32) as u32];
    let (mut best, mut id) = (f64::NEG_INFINITY, 0);
    for (block, logits) in (0..).zip(logits.chunks(4)) {
        let words = philox4x32(key, [block, row, step, Stream::Gumbel as u32]);
        for (i, (&l, word)) in (0..).zip(logits.iter().zip(words)) {
            let value = f64::from(l) + gumbel(word);
            if value > best {
                (best, id) = (value, 4 * block + i);
            }
        }
    }
    id
}

impl Cpu {
    /// One draw per row of any float dtype.
    fn draw_rows(
        &self,
        operation: &'static str,
        operand: &str,
        args: DrawArgs<'_, Self>,
        draw: impl Fn(usize, &[f32]) -> Result<u32>,
    ) -> Result<()> {
        let columns = args.values.columns();
        let values = Floats::of(operation, operand, args.values)?;
        let mut row = self.workspace.floats.take(columns);
        for (r, id) in u32s_mut(operation, "ids", args.ids)?.iter_mut().enumerate() {
            values.widen(self.level, r * columns, &mut row);
            *id = draw(r, &row)?;
        }
        Ok(())
    }
}

impl SamplingOps for Cpu {
    fn run_argmax(&self, logits: &Tensor<Self>, ids: &mut Tensor<Self>) -> Result<()> {
        const OP: &str = "argmax";
        let columns = logits.columns();
        let logits = f32s(OP, "logits", logits)?;
        let ids = u32s_mut(OP, "ids", ids)?;
        for (r, (row, id)) in logits.chunks_exact(columns).zip(ids).enumerate() {
            *id = check_row(OP, r, row)? as u32;
        }
        Ok(())
    }

    fn run_process_logits(&self, args: LogitsProcessArgs<'_, Self>) -> Result<()> {
        const OP: &str = "logits_process";
        let logits = f32s_mut(OP, "logits", args.logits)?;
        check_row(OP, 0, logits)?;
        let process = args.process;
        let [repetition, frequency, presence, temperature] =
            [process.repetition_penalty, process.frequency_penalty, process.presence_penalty, process.temperature]
                .map(f64::from);
        // An id is penalised once, at its first occurrence; counts by sorted runs need no table of the vocabulary.
        let mut ids = self.workspace.indices.take(args.prompt.len() + args.generated.len());
        let (prompt, generated) = ids.split_at_mut(args.prompt.len());
        prompt.copy_from_slice(args.prompt);
        generated.copy_from_slice(args.generated);
        prompt.sort_unstable();
        generated.sort_unstable();
        let mut penalise = |id: u32, count: usize| {
            let value = &mut logits[id as usize];
            let mut l = f64::from(*value);
            l = if l > 0.0 { l / repetition } else { l * repetition };
            l -= frequency * count as f64;
            if count > 0 {
                l -= presence;
            }
            *value = (l / temperature) as f32;
        };
        for run in generated.chunk_by(|a, b| a == b) {
            penalise(run[0], run.len());
        }
        for run in prompt.chunk_by(|a, b| a == b) {
            if generated.binary_search(&run[0]).is_err() {
                penalise(run[0], 0);
            }
        }
        if temperature != 1.0 {
            let penalised = |id: usize| {
                let id = id as u32;
                prompt.binary_search(&id).is_ok() || generated.binary_search(&id).is_ok()
            };
            for (id, value) in logits.iter_mut().enumerate() {
                if !penalised(id) {
                    *value = (f64::from(*value) / temperature) as f32;
                }
            }
        }
        Ok(())
    }

    fn run_sample(&self, args: SampleArgs<'_, Self>) -> Result<()> {
        const OP: &str = "sample";
        let columns = args.logits.columns();
        let logits = f32s(OP, "logits", args.logits)?;
        let ids = u32s_mut(OP, "ids", args.ids)?;
        for (r, (row, id)) in logits.chunks_exact(columns).zip(ids).enumerate() {
            check_row(OP, r, row)?;
            let (key, step) = (args.rows[r], args.steps[r]);
            let word = random_word(args.seed, Stream::Categorical, key, step, 0);
            *id = self.workspace.candidates.lend(|items| sample_row(row, args.filter, uniform(word), items));
        }
        Ok(())
    }

    fn run_sample_categorical(&self, args: DrawArgs<'_, Self>) -> Result<()> {
        let (seed, rows, steps) = (args.seed, args.rows, args.steps);
        self.draw_rows("sample_categorical", "probabilities", args, |r, probabilities| {
            let word = random_word(seed, Stream::Categorical, rows[r], steps[r], 0);
            draw_by_cdf(r, probabilities, uniform(word))
        })
    }

    fn run_sample_gumbel(&self, args: DrawArgs<'_, Self>) -> Result<()> {
        const OP: &str = "sample_gumbel";
        let (seed, rows, steps) = (args.seed, args.rows, args.steps);
        self.draw_rows(OP, "logits", args, |r, logits| {
            check_row(OP, r, logits)?;
            Ok(draw_by_gumbel(logits, seed, rows[r], steps[r]))
        })
    }
}

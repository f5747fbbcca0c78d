//! Sampling with f32 and 16-bit logits.

use marlin_formats::DType;
use marlin_ops::moe::{GroupScore, RouteArgs, Routing, Scoring};
use marlin_ops::oracle::draw;
use marlin_ops::rng::{Stream, random_word, uniform};
use marlin_ops::sampling::{LogitsProcess, LogitsProcessArgs, SampleArgs, SampleFilter};
use marlin_ops::{Backend, Result};

use super::bind::Bound;
use super::bounds;
use super::case::{AuditCase, Sink, short};
use super::configuration::Settings;
use super::variants::Variants;
use crate::input::{Output, floats, floats_as, poison, poison_as, poison_ids};
use crate::random::Random;
use crate::tolerance::{self, Tolerance, U32};

/// Vocabularies of the specification.
const VOCABULARIES: [usize; 5] = [1, 2, 31, 32_000, 151_936];

/// Logits in steps of 1/16, exact in every type; ties are frequent.
fn logits(rows: usize, vocab: usize, random: &mut Random) -> Vec<f32> {
    random.normals(rows * vocab).into_iter().map(|v| (v * 32.0).round() / 16.0).collect()
}

#[derive(Debug)]
struct ArgmaxCase {
    rows: usize,
    vocab: usize,
    io: DType,
}

impl AuditCase for ArgmaxCase {
    fn configuration(&self) -> String {
        format!("argmax [{}, {}] io={}", self.rows, self.vocab, short(self.io))
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        let values = logits(self.rows, self.vocab, &mut Random::of(&self.configuration()));
        let x = floats_as(b, self.io, &[self.rows, self.vocab], &values)?;
        let mut chosen = poison_ids(b, &[self.rows])?;
        b.argmax(&x, &mut chosen)?;
        Ok(vec![Output::words(b, "ids", &chosen)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        vec![Tolerance::Exact]
    }
}

#[derive(Debug)]
struct SoftmaxCase {
    rows: usize,
    vocab: usize,
    /// Added to every logit.
    shift: f32,
    io: DType,
}

impl AuditCase for SoftmaxCase {
    fn configuration(&self) -> String {
        format!("softmax [{}, {}] + {} io={}", self.rows, self.vocab, self.shift, short(self.io))
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, variants: &V) -> Result<Vec<Output>> {
        let mut values = logits(self.rows, self.vocab, &mut Random::of(&self.configuration()));
        values.iter_mut().for_each(|v| *v += self.shift);
        let dims = [self.rows, self.vocab];
        let x = floats_as(b, self.io, &dims, &values)?;
        let mut out = poison_as(b, self.io, &dims)?;
        variants.softmax(b, &x, &mut out)?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        let relative = bounds::SOFTMAX.max(if self.io == DType::F32 { 0.0 } else { 2.0 * bounds::round_off(self.io) });
        // Below the normal numbers of a 16-bit type the step is fixed.
        let step = if self.io == DType::F16 { 2f64.powi(-24) } else { 1e-38 };
        vec![Tolerance::Elements { ulps: 0.0, relative, absolute: vec![step; self.rows * self.vocab] }]
    }

    fn needs_variants(&self) -> bool {
        true
    }
}

/// Softmax as a router with as many experts for each token as there are.
#[derive(Debug)]
struct RouterSoftmaxCase {
    tokens: usize,
    experts: usize,
}

impl AuditCase for RouterSoftmaxCase {
    fn configuration(&self) -> String {
        format!("router softmax [{}, {}]", self.tokens, self.experts)
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        let dims = [self.tokens, self.experts];
        let logits = logits(self.tokens, self.experts, &mut Random::of(&self.configuration()));
        let logits = floats(b, &dims, &logits)?;
        let (mut chosen, mut weights) = (poison_ids(b, &dims)?, poison(b, &dims)?);
        let routing = Routing {
            top_k: self.experts,
            scoring: Scoring::Softmax,
            n_group: 1,
            topk_group: 1,
            group_score: GroupScore::Max,
            norm_topk_prob: false,
            norm_eps: 0.0,
            routed_scaling_factor: 1.0,
        };
        b.moe_route(RouteArgs { logits: &logits, bias: None, routing, ids: &mut chosen, weights: &mut weights })?;
        Ok(vec![Output::words(b, "ids", &chosen)?, Output::floats(b, "weights", &weights)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        let relative = bounds::SOFTMAX.min(tolerance::ROUTE_WEIGHT);
        vec![Tolerance::Exact, Tolerance::Elements { ulps: 0.0, relative, absolute: vec![] }]
    }
}

#[derive(Debug)]
struct ProcessCase {
    vocab: usize,
    io: DType,
    process: LogitsProcess,
}

impl ProcessCase {
    fn logits(&self) -> Vec<f32> {
        logits(1, self.vocab, &mut Random::of(&self.configuration()))
    }
}

impl AuditCase for ProcessCase {
    fn configuration(&self) -> String {
        let LogitsProcess { repetition_penalty, temperature, .. } = &self.process;
        format!("V={} io={} repetition={repetition_penalty} T={temperature}", self.vocab, short(self.io))
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        let x = floats_as(b, self.io, &[self.vocab], &self.logits())?;
        // Logits are f32 from here on.
        let mut processed = poison(b, &[self.vocab])?;
        b.convert(&x, &mut processed)?;
        let last = self.vocab as u32 - 1;
        b.process_logits(LogitsProcessArgs {
            logits: &mut processed,
            prompt: &[0, 0, last],
            generated: &[last, last / 2, last / 2],
            process: &self.process,
        })?;
        Ok(vec![Output::floats(b, "logits", &processed)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        // Two operations, each within an ulp of the largest intermediate value.
        let LogitsProcess { repetition_penalty, temperature, .. } = self.process;
        let rho = repetition_penalty.max(1.0 / repetition_penalty);
        let size = |l: &f32| tolerance::LOGITS_ULPS * U32 * f64::from(l.abs() * rho / temperature);
        let absolute = self.logits().iter().map(size).collect();
        vec![Tolerance::Elements { ulps: tolerance::LOGITS_ULPS, relative: 0.0, absolute }]
    }
}

const SEED: u64 = 0xFEDC_BA98_7654_3210;

#[derive(Debug)]
struct SampleCase {
    draws: usize,
    vocab: usize,
    filter: SampleFilter,
}

impl SampleCase {
    /// Rows, row ids and steps whose draws are not at a boundary.
    fn inputs(&self) -> (Vec<f32>, Vec<u32>, Vec<u32>) {
        let random = &mut Random::of(&self.configuration());
        let (mut values, mut rows, mut steps) = (Vec::new(), Vec::new(), Vec::new());
        while rows.len() < self.draws {
            let row = logits(1, self.vocab, random);
            let exact: Vec<f64> = row.iter().copied().map(f64::from).collect();
            let id = random.word() % 1000;
            let clear = (0..4).map(|_| random.word() % 1_000_000).find(|&step| {
                let u = uniform(random_word(SEED, Stream::Categorical, id, step, 0));
                draw(&exact, &self.filter, u).margin > tolerance::SAMPLE_MARGIN
            });
            if let Some(step) = clear {
                values.extend(row);
                rows.push(id);
                steps.push(step);
            }
        }
        (values, rows, steps)
    }
}

impl AuditCase for SampleCase {
    fn configuration(&self) -> String {
        format!("[{}, {}] {:?}", self.draws, self.vocab, self.filter)
    }

    fn run<B: Backend, V: Variants<B>>(&self, b: &B, _: &V) -> Result<Vec<Output>> {
        let (values, rows, steps) = self.inputs();
        let logits = floats(b, &[self.draws, self.vocab], &values)?;
        let mut chosen = poison_ids(b, &[self.draws])?;
        b.sample(SampleArgs {
            logits: &logits,
            filter: &self.filter,
            seed: SEED,
            rows: &rows,
            steps: &steps,
            ids: &mut chosen,
        })?;
        Ok(vec![Output::words(b, "ids", &chosen)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        vec![Tolerance::Exact]
    }
}

fn filtered<S: Sink>(settings: &Settings<'_>, sink: &mut S) {
    settings.implied(&["rng"]);
    let most = settings.count("k_max").unwrap_or(usize::MAX);
    let top_k = settings.word("filter") == Some("top_k");
    let filters: Vec<SampleFilter> = match top_k {
        true => [1, 40, 64].iter().filter(|k| **k <= most).map(|&k| by_k(k)).collect(),
        false => [0.0, 0.1, 0.9, 1.0].map(|p| SampleFilter { top_p: Some(p), ..SampleFilter::NONE }).to_vec(),
    };
    for filter in filters {
        for (draws, vocab) in [(20, 1000), (3, 2), (2, 31)] {
            sink.check(&SampleCase { draws, vocab, filter: filter.clone() });
        }
        if top_k {
            sink.check(&SampleCase { draws: 2, vocab: 151_936, filter });
        }
    }
}

fn by_k(k: usize) -> SampleFilter {
    SampleFilter { top_k: Some(k), ..SampleFilter::NONE }
}

fn process<S: Sink>(settings: &Settings<'_>, sink: &mut S) {
    // A call has one row and its own lists.
    settings.implied(&["ids"]);
    let plain = LogitsProcess::default();
    let processes: Vec<LogitsProcess> = match settings.word("stage") {
        Some("repetition") => {
            [1.3, 0.7, 2.0].map(|rho| LogitsProcess { repetition_penalty: rho, ..plain.clone() }).to_vec()
        }
        _ => [0.7, 1.0, 1e-3, 3.0].map(|tau| LogitsProcess { temperature: tau, ..plain.clone() }).to_vec(),
    };
    for io in settings.types("io") {
        for process in &processes {
            for vocab in [2, 100, 32_000] {
                sink.check(&ProcessCase { vocab, io, process: process.clone() });
            }
        }
    }
}

pub(crate) fn bind<S: Sink>(operation: &str, settings: &Settings<'_>, sink: &mut S) -> Bound {
    match operation {
        "sample_filtered" => filtered(settings, sink),
        "logits_process" => process(settings, sink),
        "argmax_rows" => {
            settings.implied(&["tie"]);
            for io in settings.types("io") {
                for vocab in VOCABULARIES {
                    sink.check(&ArgmaxCase { rows: 3, vocab, io });
                }
            }
        }
        // The self-test is that of a router.
        _ if settings.has("n") => {
            settings.implied(&["io"]);
            let experts = settings.count("n").expect("experts");
            for tokens in [1, 17] {
                sink.check(&RouterSoftmaxCase { tokens, experts });
            }
        }
        _ => {
            for io in settings.types("io") {
                for vocab in VOCABULARIES {
                    for shift in [0.0, 1e4] {
                        sink.check(&SoftmaxCase { rows: 2, vocab, shift, io });
                    }
                }
            }
        }
    }
    Ok(())
}

//! Argmax, logits processing, filtered draws.

use marlin_formats::DType;
use marlin_ops::oracle::draw;
use marlin_ops::rng::{Stream, random_word, uniform};
use marlin_ops::sampling::{LogitsProcess, LogitsProcessArgs, SampleArgs, SampleFilter};
use marlin_ops::{Backend, Result};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Output, floats, floats_as, poison_ids};
use crate::random::Random;
use crate::tolerance::{self, Tolerance, U32};

/// A row of logits.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Logits {
    /// Normal times this, in steps of 1/64: some ties.
    Normal(f32),
    Equal,
    /// Ten equal maxima among normal values.
    TenMaxima,
    /// Maxima at the first and the last id.
    FirstAndLast,
    /// -0 then +0, the others negative.
    Zeros,
    /// -inf but for three ids.
    MostlyBanned,
    /// Bad: this value at the middle id.
    One(f32),
    /// Bad.
    AllBanned,
}

impl Logits {
    pub(crate) fn row(self, vocab: usize, random: &mut Random) -> Vec<f32> {
        let factor = if let Logits::Normal(factor) = self { factor } else { 1.0 };
        let mut row: Vec<f32> = random.normals(vocab).into_iter().map(|v| (v * factor * 64.0).round() / 64.0).collect();
        match self {
            Logits::Normal(_) => {}
            Logits::Equal => row.fill(-3.25),
            Logits::TenMaxima => (0..10).for_each(|i| row[(i * 37 + 5) % vocab] = 6.0),
            Logits::FirstAndLast => {
                row[0] = 9.0;
                row[vocab - 1] = 9.0;
            }
            Logits::Zeros => {
                row.iter_mut().for_each(|v| *v = -v.abs() - 1.0);
                row[vocab / 2] = -0.0;
                row[vocab - 1] = 0.0;
            }
            Logits::MostlyBanned => {
                for (v, l) in row.iter_mut().enumerate() {
                    if ![vocab / 3, vocab / 2, vocab - 1].contains(&v) {
                        *l = f32::NEG_INFINITY;
                    }
                }
            }
            Logits::One(value) => row[vocab / 2] = value,
            Logits::AllBanned => row.fill(f32::NEG_INFINITY),
        }
        row
    }
}

struct ArgmaxCase {
    rows: usize,
    vocab: usize,
    logits: Logits,
    dtype: DType,
}

/// An argmax of f32 logits.
fn argmax(rows: usize, vocab: usize, logits: Logits) -> ArgmaxCase {
    ArgmaxCase { rows, vocab, logits, dtype: DType::F32 }
}

impl Case for ArgmaxCase {
    const OPERATION: &'static str = "argmax";

    fn configuration(&self) -> String {
        let dtype = if self.dtype == DType::F32 { String::new() } else { format!(" {}", self.dtype.name()) };
        format!("[{}, {}] {:?}{dtype}", self.rows, self.vocab, self.logits)
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let logits: Vec<f32> = (0..self.rows).flat_map(|_| self.logits.row(self.vocab, random)).collect();
        let logits = floats_as(b, self.dtype, &[self.rows, self.vocab], &logits)?;
        let mut chosen = poison_ids(b, &[self.rows])?;
        b.argmax(&logits, &mut chosen)?;
        Ok(vec![Output::words(b, "ids", &chosen)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        vec![Tolerance::Exact]
    }
}

struct ProcessCase {
    vocab: usize,
    prompt: Vec<u32>,
    generated: Vec<u32>,
    process: LogitsProcess,
}

const PLAIN: LogitsProcess =
    LogitsProcess { repetition_penalty: 1.0, frequency_penalty: 0.0, presence_penalty: 0.0, temperature: 1.0 };

impl ProcessCase {
    fn new(process: LogitsProcess) -> Self {
        Self { vocab: 100, prompt: vec![3, 3, 50, 99, 0], generated: vec![7, 50, 7, 7, 98], process }
    }

    fn logits(&self) -> Vec<f32> {
        let mut row = Random::of(&self.configuration()).normals(self.vocab);
        row[0] = 0.0;
        if self.vocab > 3 {
            row[3] = f32::NEG_INFINITY;
        }
        row
    }
}

impl Case for ProcessCase {
    const OPERATION: &'static str = "process_logits";

    fn configuration(&self) -> String {
        let (prompt, generated) = (self.prompt.len(), self.generated.len());
        format!("V={} prompt={prompt} generated={generated} {:?}", self.vocab, self.process)
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let mut logits = floats(b, &[self.vocab], &self.logits())?;
        b.process_logits(LogitsProcessArgs {
            logits: &mut logits,
            prompt: &self.prompt,
            generated: &self.generated,
            process: &self.process,
        })?;
        Ok(vec![Output::floats(b, "logits", &logits)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        let LogitsProcess { repetition_penalty, frequency_penalty, presence_penalty, temperature } = self.process;
        // 2 ulp of the largest intermediate value: subtracting a penalty can cancel.
        let rho = repetition_penalty.max(1.0 / repetition_penalty);
        let penalty = frequency_penalty.abs() * 3.0 + presence_penalty.abs();
        let size = |l: f32| f64::from((l.abs() * rho + penalty) / temperature);
        let absolute =
            self.logits().into_iter().map(|l| if l.is_finite() { tolerance::LOGITS_ULPS * U32 * size(l) } else { 0.0 });
        vec![Tolerance::Elements { ulps: tolerance::LOGITS_ULPS, relative: 0.0, absolute: absolute.collect() }]
    }
}

struct SampleCase {
    draws: usize,
    vocab: usize,
    logits: Logits,
    filter: SampleFilter,
    /// All draws from one row, with a chi-square test of their counts; 8 ids.
    chi_square: bool,
    surplus_steps: usize,
}

const NONE: SampleFilter = SampleFilter::NONE;

/// A few draws from about a thousand ids.
fn sample(filter: SampleFilter) -> SampleCase {
    SampleCase { draws: 20, vocab: 1000, logits: Logits::Normal(2.0), filter, chi_square: false, surplus_steps: 0 }
}

pub(crate) const SEED: u64 = 0x0123_4567_89AB_CDEF;

/// Inputs of a [`SampleCase`].
struct SampleInputs {
    logits: Vec<f32>,
    rows: Vec<u32>,
    steps: Vec<u32>,
}

impl SampleCase {
    fn inputs(&self) -> SampleInputs {
        let random = &mut Random::of(&self.configuration());
        let mut inputs = SampleInputs { logits: Vec::new(), rows: Vec::new(), steps: Vec::new() };
        let first = self.logits.row(self.vocab, random);
        let mut tries = 0;
        while inputs.rows.len() < self.draws {
            tries += 1;
            assert!(tries < 3 * self.draws + 100, "no clear decisions in {}", self.configuration());
            let row = match self.chi_square {
                true => first.clone(),
                false => self.logits.row(self.vocab, random),
            };
            let id = random.word() % 1000;
            // Bad rows have no draw to look at.
            let bad = matches!(self.logits, Logits::One(_) | Logits::AllBanned);
            let step = if bad { Some(0) } else { self.clear_step(&row, id, random) };
            if let Some(step) = step {
                inputs.logits.extend(row);
                inputs.rows.push(id);
                inputs.steps.push(step);
            }
        }
        inputs
    }

    /// A step at which no decision is within the margin of rounding; none where a filter's own threshold is.
    fn clear_step(&self, row: &[f32], id: u32, random: &mut Random) -> Option<u32> {
        let exact: Vec<f64> = row.iter().copied().map(f64::from).collect();
        (0..4).map(|_| random.word() % 1_000_000).find(|&step| {
            let u = uniform(random_word(SEED, Stream::Categorical, id, step, 0));
            draw(&exact, &self.filter, u).margin > tolerance::SAMPLE_MARGIN
        })
    }

    /// Pearson's statistic of the counts against softmax of the unfiltered row.
    fn chi_square(&self, logits: &[f32], chosen: &[f64]) -> f64 {
        let weights: Vec<f64> = logits[..self.vocab].iter().map(|l| f64::from(*l).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let terms = weights.iter().enumerate().map(|(v, w)| {
            let expected = self.draws as f64 * w / sum;
            let found = chosen.iter().filter(|&&id| id == v as f64).count() as f64;
            (found - expected).powi(2) / expected
        });
        terms.sum()
    }
}

impl Case for SampleCase {
    const OPERATION: &'static str = "sample";

    fn configuration(&self) -> String {
        let SampleFilter { top_k, top_p, min_p, typical } = &self.filter;
        let mut text = format!("[{}, {}] {:?}", self.draws, self.vocab, self.logits);
        for (name, value) in [
            ("top_k", top_k.map(|k| k.to_string())),
            ("top_p", top_p.map(|p| p.to_string())),
            ("min_p", min_p.map(|p| p.to_string())),
            ("typical", typical.map(|p| p.to_string())),
        ] {
            if let Some(value) = value {
                text += &format!(" {name}={value}");
            }
        }
        if self.chi_square {
            text += " chi-square";
        }
        text
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let SampleInputs { logits, rows, mut steps } = self.inputs();
        steps.resize(self.draws + self.surplus_steps, 0);
        let tensor = floats(b, &[self.draws, self.vocab], &logits)?;
        let mut chosen = poison_ids(b, &[self.draws])?;
        b.sample(SampleArgs {
            logits: &tensor,
            filter: &self.filter,
            seed: SEED,
            rows: &rows,
            steps: &steps,
            ids: &mut chosen,
        })?;
        let chosen = Output::words(b, "ids", &chosen)?;
        if !self.chi_square {
            return Ok(vec![chosen]);
        }
        let values = vec![self.chi_square(&logits, &chosen.values)];
        Ok(vec![chosen, Output { name: "chi_square", values }])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        match self.chi_square {
            true => vec![Tolerance::Exact, Tolerance::AtMost(tolerance::CHI_SQUARE_7)],
            false => vec![Tolerance::Exact],
        }
    }
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    for vocab in [1, 2, 31, 1000, 32_000, 151_936] {
        for logits in [Logits::Normal(2.0), Logits::Equal, Logits::FirstAndLast, Logits::Zeros] {
            runner.check(&argmax(2, vocab, logits));
        }
    }
    for logits in [Logits::TenMaxima, Logits::MostlyBanned] {
        runner.check(&argmax(3, 1000, logits));
    }
    runner.check(&argmax(0, 8, Logits::Equal));
    // 16-bit logits have many true ties.
    for dtype in runner.half_dtypes() {
        for vocab in [1, 31, 1000, 151_936] {
            for logits in [Logits::Normal(2.0), Logits::FirstAndLast, Logits::Zeros] {
                runner.check(&ArgmaxCase { dtype, ..argmax(2, vocab, logits) });
            }
        }
        let bad = ArgmaxCase { dtype, ..argmax(2, 1000, Logits::One(f32::NAN)) };
        runner.refuse(&format!("NaN logit, {}", dtype.name()), &bad, Refusal::Value("logits"));
    }
    process(runner);
    filters(runner);
    bad_arguments(runner);
}

fn process<B: Backend>(runner: &mut Runner<'_, B>) {
    for process in [
        PLAIN,
        LogitsProcess { repetition_penalty: 1.3, ..PLAIN },
        LogitsProcess { repetition_penalty: 0.7, ..PLAIN },
        LogitsProcess { frequency_penalty: 0.4, ..PLAIN },
        LogitsProcess { presence_penalty: -0.6, ..PLAIN },
        LogitsProcess { temperature: 0.7, ..PLAIN },
        LogitsProcess { temperature: 1e-3, ..PLAIN },
        LogitsProcess { repetition_penalty: 1.1, frequency_penalty: 0.2, presence_penalty: 0.3, temperature: 0.8 },
    ] {
        runner.check(&ProcessCase::new(process.clone()));
        for (prompt, generated) in [(vec![], vec![]), (vec![1, 2], vec![]), (vec![], vec![4, 4])] {
            let process = process.clone();
            runner.check(&ProcessCase { vocab: 33, prompt, generated, process });
        }
    }
    runner.check(&ProcessCase { vocab: 151_936, ..ProcessCase::new(PLAIN) });
}

fn filters<B: Backend>(runner: &mut Runner<'_, B>) {
    let mut table = vec![NONE];
    table.extend([1, 2, 40, 64, 999, 1000, 5000].map(|k| SampleFilter { top_k: Some(k), ..NONE }));
    table.extend([0.0, 0.1, 0.5, 0.9, 1.0].map(|p| SampleFilter { top_p: Some(p), ..NONE }));
    table.extend([0.0, 0.05, 0.3, 1.0].map(|p| SampleFilter { min_p: Some(p), ..NONE }));
    table.extend([0.1, 0.5, 0.95].map(|p| SampleFilter { typical: Some(p), ..NONE }));
    table.extend([
        SampleFilter { top_k: Some(40), top_p: Some(0.9), ..NONE },
        SampleFilter { top_p: Some(0.95), min_p: Some(0.05), ..NONE },
        SampleFilter { top_k: Some(64), min_p: Some(0.1), ..NONE },
        SampleFilter { top_k: Some(100), typical: Some(0.8), ..NONE },
        SampleFilter { top_k: Some(200), top_p: Some(0.97), min_p: Some(0.01), typical: Some(0.9) },
    ]);
    for filter in table {
        runner.check(&sample(filter.clone()));
        runner.check(&SampleCase { logits: Logits::Normal(0.5), ..sample(filter) });
    }
    for logits in [Logits::Equal, Logits::TenMaxima, Logits::MostlyBanned] {
        for filter in [
            NONE,
            SampleFilter { top_k: Some(5), ..NONE },
            SampleFilter { top_p: Some(0.3337), ..NONE },
            SampleFilter { min_p: Some(0.9), ..NONE },
        ] {
            runner.check(&SampleCase { logits, ..sample(filter) });
        }
    }
    for vocab in [1, 2, 31, 32_000, 151_936] {
        for (factor, filter) in [
            (2.0, NONE),
            (2.0, SampleFilter { top_k: Some(40), top_p: Some(0.9), ..NONE }),
            // Peaked, so that the probabilities around the cut are well above the margin.
            (8.0, SampleFilter { top_p: Some(0.95), ..NONE }),
        ] {
            let logits = Logits::Normal(factor);
            runner.check(&SampleCase { draws: 3, vocab, logits, ..sample(filter) });
        }
    }
    runner.check(&SampleCase { draws: 2, vocab: 202_048, logits: Logits::Equal, ..sample(NONE) });
    for factor in [0.5, 1.5] {
        let case =
            SampleCase { draws: 100_000, vocab: 8, logits: Logits::Normal(factor), chi_square: true, ..sample(NONE) };
        runner.check(&case);
    }
}

fn bad_arguments<B: Backend>(runner: &mut Runner<'_, B>) {
    let bad_rows = [
        ("NaN logit", Logits::One(f32::NAN)),
        ("+inf logit", Logits::One(f32::INFINITY)),
        ("only -inf", Logits::AllBanned),
    ];
    for (what, logits) in bad_rows {
        for vocab in [5, 1000] {
            let what = format!("{what}, V={vocab}");
            let case = argmax(2, vocab, logits);
            runner.refuse(&what, &case, Refusal::Value("logits"));
            let case = SampleCase { draws: 2, vocab, logits, ..sample(NONE) };
            runner.refuse(&what, &case, Refusal::Value("logits"));
        }
    }
    let case = argmax(1, 0, Logits::Normal(1.0));
    runner.refuse("V = 0", &case, Refusal::Shape("logits"));

    let filters = [
        ("top_k", SampleFilter { top_k: Some(0), ..NONE }),
        ("top_p", SampleFilter { top_p: Some(1.5), ..NONE }),
        ("top_p", SampleFilter { top_p: Some(-0.1), ..NONE }),
        ("top_p", SampleFilter { top_p: Some(f32::NAN), ..NONE }),
        ("min_p", SampleFilter { min_p: Some(2.0), ..NONE }),
        ("typical", SampleFilter { typical: Some(0.0), ..NONE }),
        ("typical", SampleFilter { typical: Some(1.0), ..NONE }),
    ];
    for (operand, filter) in filters {
        let what = format!("{filter:?}");
        let case = SampleCase { logits: Logits::AllBanned, ..sample(filter) };
        runner.refuse(&what, &case, Refusal::Value(operand));
    }
    let case = SampleCase { surplus_steps: 1, ..sample(NONE) };
    runner.refuse("a step too many", &case, Refusal::Shape("steps"));

    let processes = [
        ("repetition_penalty", LogitsProcess { repetition_penalty: 0.0, ..PLAIN }),
        ("repetition_penalty", LogitsProcess { repetition_penalty: -1.0, ..PLAIN }),
        ("frequency_penalty", LogitsProcess { frequency_penalty: f32::NAN, ..PLAIN }),
        ("presence_penalty", LogitsProcess { presence_penalty: f32::INFINITY, ..PLAIN }),
        ("temperature", LogitsProcess { temperature: 0.0, ..PLAIN }),
        ("temperature", LogitsProcess { temperature: -0.5, ..PLAIN }),
    ];
    for (operand, process) in processes {
        let what = format!("{process:?}");
        runner.refuse(&what, &ProcessCase::new(process), Refusal::Value(operand));
    }
    let case = ProcessCase { prompt: vec![100], ..ProcessCase::new(PLAIN) };
    runner.refuse("prompt id = V", &case, Refusal::Value("prompt"));
    let case = ProcessCase { generated: vec![0, 100], ..ProcessCase::new(PLAIN) };
    runner.refuse("generated id = V", &case, Refusal::Value("generated"));
}

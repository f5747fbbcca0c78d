//! Draws by cumulative probability and by Gumbel noise.

use marlin_formats::DType;
use marlin_ops::oracle::{draw_by_cdf, draw_by_gumbel};
use marlin_ops::rng::{Stream, random_word, uniform};
use marlin_ops::sampling::DrawArgs;
use marlin_ops::{Backend, HostTensor, Result, Tensor};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Output, floats_as, poison_ids};
use crate::random::Random;
use crate::sampling::{Logits, SEED};
use crate::tolerance::{self, Tolerance};

/// A row of probabilities.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Probabilities {
    /// Squares of normal values times this; the sum is not 1.
    Squares(f32),
    Uniform,
    /// All in one id.
    OneHot,
    /// Only the middle third is above 0.
    Middle,
    /// Bad: this value at the middle id.
    One(f32),
    /// Bad.
    Zeros,
}

impl Probabilities {
    fn row(self, vocab: usize, random: &mut Random) -> Vec<f32> {
        let factor = if let Self::Squares(factor) = self { factor } else { 1.0 };
        let mut row: Vec<f32> = random.normals(vocab).into_iter().map(|v| v * v * factor).collect();
        match self {
            Self::Squares(_) => {}
            Self::Uniform => row.fill(1.0 / vocab as f32),
            Self::OneHot | Self::Zeros => {
                row.fill(0.0);
                if self == Self::OneHot {
                    row[vocab * 2 / 3] = 0.3;
                }
            }
            Self::Middle => {
                let third = vocab / 3;
                row[..third].fill(0.0);
                row[vocab - third..].fill(-0.0);
            }
            Self::One(value) => row[vocab / 2] = value,
        }
        row
    }
}

/// What rows hold, and with that the operation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rows {
    Probabilities(Probabilities),
    Logits(Logits),
}

impl Rows {
    fn row(self, vocab: usize, random: &mut Random) -> Vec<f32> {
        match self {
            Self::Probabilities(kind) => kind.row(vocab, random),
            Self::Logits(kind) => kind.row(vocab, random),
        }
    }

    fn is_bad(self) -> bool {
        use Probabilities::{One, Zeros};
        matches!(self, Self::Probabilities(One(_) | Zeros) | Self::Logits(Logits::One(_) | Logits::AllBanned))
    }
}

#[derive(Clone, Copy)]
struct DrawCase {
    draws: usize,
    vocab: usize,
    rows: Rows,
    dtype: DType,
    /// All draws from one row of 8 ids, with a test of their counts.
    chi_square: bool,
    surplus_steps: usize,
}

fn draws(draws: usize, vocab: usize, rows: Rows) -> DrawCase {
    DrawCase { draws, vocab, rows, dtype: DType::F32, chi_square: false, surplus_steps: 0 }
}

struct Inputs {
    values: Vec<f32>,
    rows: Vec<u32>,
    steps: Vec<u32>,
}

impl DrawCase {
    fn inputs(&self) -> Result<Inputs> {
        let random = &mut Random::of(&self.configuration());
        let mut inputs = Inputs { values: Vec::new(), rows: Vec::new(), steps: Vec::new() };
        let first = self.rows.row(self.vocab, random);
        let mut tries = 0;
        while inputs.rows.len() < self.draws {
            tries += 1;
            assert!(tries < 3 * self.draws + 100, "no clear decisions in {}", self.configuration());
            let row = if self.chi_square { first.clone() } else { self.rows.row(self.vocab, random) };
            // As it is stored.
            let row = HostTensor::from_f32_as(self.dtype, &[self.vocab], &row)?.to_f32()?;
            let id = random.word() % 1000;
            if let Some(step) = self.clear_step(&row, id, random) {
                inputs.values.extend(row);
                inputs.rows.push(id);
                inputs.steps.push(step);
            }
        }
        Ok(inputs)
    }

    /// A step whose decision is not within the margin of rounding. Bad rows have none to look at.
    fn clear_step(&self, row: &[f32], id: u32, random: &mut Random) -> Option<u32> {
        let exact: Vec<f64> = row.iter().copied().map(f64::from).collect();
        (0..4).map(|_| random.word() % 1_000_000).find(|&step| match self.rows {
            _ if self.rows.is_bad() => true,
            Rows::Probabilities(_) => {
                let u = uniform(random_word(SEED, Stream::Categorical, id, step, 0));
                draw_by_cdf(&exact, u).1 > tolerance::SAMPLE_MARGIN
            }
            Rows::Logits(_) => draw_by_gumbel(&exact, SEED, id, step).1 > tolerance::GUMBEL_MARGIN,
        })
    }

    /// Pearson's statistic of the counts.
    fn statistic(&self, values: &[f32], chosen: &[f64]) -> f64 {
        let weight = |v: &f32| match self.rows {
            Rows::Probabilities(_) => f64::from(*v),
            Rows::Logits(_) => f64::from(*v).exp(),
        };
        let weights: Vec<f64> = values[..self.vocab].iter().map(weight).collect();
        let sum: f64 = weights.iter().sum();
        let terms = weights.iter().enumerate().map(|(v, w)| {
            let expected = self.draws as f64 * w / sum;
            let found = chosen.iter().filter(|&&id| id == v as f64).count() as f64;
            (found - expected).powi(2) / expected
        });
        terms.sum()
    }

    fn draw<B: Backend>(&self, b: &B, values: &Tensor<B>, rows: &[u32], steps: &[u32]) -> Result<Output> {
        let mut chosen = poison_ids(b, &[self.draws])?;
        let args = DrawArgs { values, seed: SEED, rows, steps, ids: &mut chosen };
        match self.rows {
            Rows::Probabilities(_) => b.sample_categorical(args)?,
            Rows::Logits(_) => b.sample_gumbel(args)?,
        }
        Output::words(b, "ids", &chosen)
    }
}

impl Case for DrawCase {
    const OPERATION: &'static str = "sample_categorical or sample_gumbel";

    fn configuration(&self) -> String {
        let chi_square = if self.chi_square { " chi-square" } else { "" };
        format!("[{}, {}] {:?} {}{chi_square}", self.draws, self.vocab, self.rows, self.dtype.name())
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let Inputs { values, rows, mut steps } = self.inputs()?;
        steps.resize(self.draws + self.surplus_steps, 0);
        let tensor = floats_as(b, self.dtype, &[self.draws, self.vocab], &values)?;
        let chosen = self.draw(b, &tensor, &rows, &steps)?;
        if !self.chi_square {
            return Ok(vec![chosen]);
        }
        let statistic = vec![self.statistic(&values, &chosen.values)];
        Ok(vec![chosen, Output { name: "chi_square", values: statistic }])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        match self.chi_square {
            true => vec![Tolerance::Exact, Tolerance::AtMost(tolerance::CHI_SQUARE_7)],
            false => vec![Tolerance::Exact],
        }
    }
}

/// Draws from given probabilities.
pub(crate) fn by_probability() -> Vec<impl Case + use<>> {
    use Probabilities::{Middle, OneHot, Squares, Uniform};
    let mut cases = Vec::new();
    for vocab in [1, 31, 1000, 151_936] {
        cases.push(draws(3, vocab, Rows::Probabilities(Squares(1.0))));
    }
    for kind in [Uniform, OneHot, Middle, Squares(1e-30)] {
        cases.push(draws(20, 1000, Rows::Probabilities(kind)));
    }
    cases
}

/// Draws from logits by Gumbel noise.
pub(crate) fn by_noise(dtype: DType) -> Vec<impl Case + use<>> {
    let mut cases = Vec::new();
    for vocab in [2, 31, 32_000] {
        cases.push(DrawCase { dtype, ..draws(20, vocab, Rows::Logits(Logits::Normal(2.0))) });
    }
    cases.push(DrawCase { dtype, ..draws(20, 1000, Rows::Logits(Logits::MostlyBanned)) });
    cases
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    let squares = Rows::Probabilities(Probabilities::Squares(1.0));
    let normal = Rows::Logits(Logits::Normal(2.0));
    for vocab in [1, 2, 31, 1000, 32_000, 151_936, 154_880] {
        for rows in [squares, normal] {
            runner.check(&draws(3, vocab, rows));
        }
    }
    for dtype in [DType::F16, DType::BF16] {
        for vocab in [31, 32_000] {
            for rows in [squares, normal] {
                runner.check(&DrawCase { dtype, ..draws(20, vocab, rows) });
            }
        }
    }
    use Probabilities::{Middle, One, OneHot, Squares, Uniform, Zeros};
    for kind in [Uniform, OneHot, Middle, Squares(1e30), Squares(1e-30)] {
        for vocab in [3, 257, 5000] {
            runner.check(&draws(20, vocab, Rows::Probabilities(kind)));
        }
    }
    runner.check(&draws(2, 202_048, Rows::Probabilities(Uniform)));
    runner.check(&draws(0, 8, squares));
    for kind in [Logits::Equal, Logits::TenMaxima, Logits::MostlyBanned, Logits::Normal(0.0)] {
        for vocab in [10, 1000] {
            runner.check(&draws(20, vocab, Rows::Logits(kind)));
        }
    }
    for rows in [squares, Rows::Logits(Logits::Normal(1.0))] {
        runner.check(&DrawCase { chi_square: true, ..draws(100_000, 8, rows) });
    }
    for value in [-1e-3, f32::NAN, f32::INFINITY] {
        for vocab in [5, 1000] {
            let case = draws(2, vocab, Rows::Probabilities(One(value)));
            runner.refuse(&format!("a probability of {value}, V={vocab}"), &case, Refusal::Value("probabilities"));
        }
    }
    let case = draws(2, 40, Rows::Probabilities(Zeros));
    runner.refuse("probabilities of 0", &case, Refusal::Value("probabilities"));
    for logits in [Logits::One(f32::NAN), Logits::One(f32::INFINITY), Logits::AllBanned] {
        for vocab in [5, 1000] {
            let case = draws(2, vocab, Rows::Logits(logits));
            runner.refuse(&format!("{logits:?}, V={vocab}"), &case, Refusal::Value("logits"));
        }
    }
    for (rows, operand) in [(squares, "probabilities"), (normal, "logits")] {
        runner.refuse(&format!("no {operand}"), &draws(1, 0, rows), Refusal::Shape(operand));
        let case = DrawCase { surplus_steps: 1, ..draws(2, 9, rows) };
        runner.refuse(&format!("a step too many for {operand}"), &case, Refusal::Shape("steps"));
    }
}

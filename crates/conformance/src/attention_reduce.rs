//! Joining the partial sums of split attention.

use marlin_formats::DType;
use marlin_ops::attention::{EmptyRow, SplitReduceArgs};
use marlin_ops::{Backend, Result};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Output, floats, floats_as, poison_as};
use crate::random::Random;
use crate::tolerance::{Tolerance, U32, relative_ulp};

/// Maxima of the partitions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Maxima {
    Normal,
    /// +-100.
    Wide,
    /// Every other partition is empty, and its sums are NaN.
    SomeEmpty,
    /// Those of the last row are all empty.
    EmptyRow,
}

#[derive(Clone, Debug)]
struct ReduceCase {
    heads: usize,
    partitions: usize,
    columns: usize,
    used: Vec<usize>,
    maxima: Maxima,
    sinks: bool,
    empty_row: EmptyRow,
    out: DType,
    max_partitions: usize,
}

fn reduce(partitions: usize, used: &[usize]) -> ReduceCase {
    ReduceCase {
        heads: 3,
        partitions,
        columns: 80,
        used: used.to_vec(),
        maxima: Maxima::Normal,
        sinks: false,
        empty_row: EmptyRow::Error,
        out: DType::F32,
        max_partitions: partitions,
    }
}

struct Inputs {
    partial: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

impl ReduceCase {
    /// Partitions that are not used hold NaN.
    fn inputs(&self, random: &mut Random) -> Inputs {
        let rows = self.used.len() * self.heads;
        let mut inputs = Inputs { partial: Vec::new(), max: Vec::new(), sum: Vec::new() };
        for row in 0..rows {
            for p in 0..self.partitions {
                let unused = p >= self.used[row / self.heads];
                let empty = match self.maxima {
                    Maxima::SomeEmpty => p % 2 == 1,
                    Maxima::EmptyRow => row == rows - 1,
                    Maxima::Normal | Maxima::Wide => false,
                };
                let spread = if self.maxima == Maxima::Wide { 50.0 } else { 1.0 };
                let sum = 1.0 + 16.0 * random.unit();
                let nan = unused || empty;
                inputs.max.push(match (unused, empty) {
                    (true, _) => f32::NAN,
                    (_, true) => f32::NEG_INFINITY,
                    _ => random.normal() * spread,
                });
                inputs.sum.push(if nan { f32::NAN } else { sum });
                let values = random.normals(self.columns).into_iter();
                inputs.partial.extend(values.map(|v| if nan { f32::NAN } else { v * sum }));
            }
        }
        inputs
    }
}

impl Case for ReduceCase {
    const OPERATION: &'static str = "attention_split_reduce";

    fn configuration(&self) -> String {
        let Self { heads, partitions, columns, used, maxima, sinks, empty_row, out, .. } = self;
        let (batch, out) = (used.len(), out.name());
        format!(
            "[{batch}, {heads}, {partitions}, {columns}] used={used:?} {maxima:?} sinks={sinks} {empty_row:?} {out}"
        )
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        let inputs = self.inputs(random);
        let dims = [self.used.len(), self.heads, self.partitions, self.columns];
        let mut max_dims = [dims[0], dims[1], dims[2]];
        let sum = floats(b, &max_dims, &inputs.sum)?;
        let mut max = inputs.max;
        max_dims[2] = self.max_partitions;
        max.resize(max_dims.iter().product(), 0.0);
        let sinks = floats(b, &[self.heads], &random.normals(self.heads))?;
        let mut out = poison_as(b, self.out, &[dims[0], dims[1], dims[3]])?;
        b.attention_split_reduce(SplitReduceArgs {
            partial: &floats_as(b, DType::F32, &dims, &inputs.partial)?,
            max: &floats(b, &max_dims, &max)?,
            sum: &sum,
            used: &self.used,
            sinks: self.sinks.then_some(&sinks),
            empty_row: self.empty_row,
            out: &mut out,
        })?;
        Ok(vec![Output::floats(b, "out", &out)?])
    }

    fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
        let inputs = self.inputs(&mut Random::of(&self.configuration()));
        let rows = self.used.len() * self.heads;
        // 4 P u of the largest mean that is joined.
        let value = |row: usize, column: usize| {
            let parts = row * self.partitions..(row + 1) * self.partitions;
            let means = parts.map(|p| f64::from(inputs.partial[p * self.columns + column] / inputs.sum[p]).abs());
            4.0 * self.partitions as f64 * U32 * means.filter(|mean| mean.is_finite()).fold(0.0, f64::max)
        };
        let absolute = (0..rows).flat_map(|row| (0..self.columns).map(move |column| (row, column)));
        let absolute = absolute.map(|(row, column)| value(row, column)).collect();
        let relative = if self.out == DType::F32 { 0.0 } else { relative_ulp(self.out) };
        vec![Tolerance::Elements { ulps: 1.0, relative, absolute }]
    }
}

/// Joined partitions with outputs of this type.
pub(crate) fn joined(out: DType) -> Vec<impl Case + use<>> {
    let mut cases = Vec::new();
    for partitions in [1, 2, 33] {
        for maxima in [Maxima::Normal, Maxima::Wide, Maxima::SomeEmpty] {
            for sinks in [false, true] {
                cases.push(ReduceCase { maxima, sinks, out, ..reduce(partitions, &[partitions, 1]) });
            }
        }
    }
    cases
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    for partitions in [1, 2, 33, 130] {
        runner.check(&reduce(partitions, &[partitions, 1]));
        runner.check(&reduce(partitions, &[partitions.div_ceil(2), partitions, partitions]));
        for maxima in [Maxima::Wide, Maxima::SomeEmpty] {
            runner.check(&ReduceCase { maxima, ..reduce(partitions, &[partitions, 1]) });
            runner.check(&ReduceCase { maxima, sinks: true, ..reduce(partitions, &[partitions]) });
        }
    }
    for columns in [1, 64, 127, 256] {
        runner.check(&ReduceCase { columns, ..reduce(2, &[2, 1]) });
    }
    for out in [DType::F16, DType::BF16] {
        runner.check(&ReduceCase { out, ..reduce(3, &[3, 2]) });
    }
    for (maxima, used) in [(Maxima::EmptyRow, vec![2, 2]), (Maxima::Normal, vec![2, 0])] {
        let case = ReduceCase { maxima, ..reduce(2, &used) };
        runner.check(&ReduceCase { empty_row: EmptyRow::Zero, ..case.clone() });
        runner.check(&ReduceCase { sinks: true, ..case });
    }
    runner.check(&reduce(2, &[]));
    let case = ReduceCase { maxima: Maxima::EmptyRow, ..reduce(2, &[2, 2]) };
    runner.refuse("all partitions empty", &case, Refusal::Value("max"));
    runner.refuse("an empty context", &reduce(2, &[1, 0]), Refusal::Value("used"));
    runner.refuse("more partitions than there are", &reduce(2, &[1, 3]), Refusal::Value("used"));
    let case = ReduceCase { max_partitions: 3, ..reduce(2, &[2]) };
    runner.refuse("a maximum too many", &case, Refusal::Shape("max"));
}

//! Row norms.

use marlin_formats::DType;
use marlin_ops::norm::{LayerNormArgs, RmsNormArgs, RmsNormInPlaceArgs};
use marlin_ops::{Backend, Result};

use crate::case::{Case, Mode, Refusal, Runner};
use crate::input::{Output, floats_as, poison_as};
use crate::random::Random;
use crate::tolerance::{self, Tolerance, U32};

/// Rows to normalise.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Rows {
    Normal,
    /// Every second row is zero.
    SomeZero,
    /// Around +-6e4.
    Large,
    /// 0.01 except for one 300.
    Outlier,
    /// Mean 1e3, deviation 1e-2.
    LargeMean,
    /// The same value everywhere.
    Constant,
}

impl Rows {
    fn values(self, rows: usize, columns: usize, random: &mut Random) -> Vec<f32> {
        let normal = random.normals(rows * columns);
        let value = |(i, v): (usize, f32)| match self {
            Rows::Normal => v,
            Rows::SomeZero if (i / columns).is_multiple_of(2) => 0.0,
            Rows::SomeZero => v,
            Rows::Large => 6e4f32.copysign(v),
            Rows::Outlier if i % columns == columns / 2 => 300.0,
            Rows::Outlier => 0.01 * v,
            Rows::LargeMean => 1e3 + 1e-2 * v,
            Rows::Constant => 7.3,
        };
        normal.into_iter().enumerate().map(value).collect()
    }
}

/// Which operation, with what besides x.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Rms { gamma: bool, residual: bool },
    RmsInPlace,
    Layer { beta: bool, residual: bool },
}

struct NormCase {
    kind: Kind,
    rows: usize,
    columns: usize,
    values: Rows,
    eps: f32,
    gamma_offset: f32,
    gamma_columns: Option<usize>,
    /// Of all operands.
    dtype: DType,
}

/// A table entry without the operation, which the three wrappers below supply.
const NORM: NormCase = NormCase {
    kind: Kind::RmsInPlace,
    rows: 3,
    columns: 128,
    values: Rows::Normal,
    eps: 1e-6,
    gamma_offset: 0.0,
    gamma_columns: None,
    dtype: DType::F32,
};

impl NormCase {
    fn configuration(&self) -> String {
        let NormCase { kind, rows, columns, values, eps, gamma_offset, .. } = self;
        let dtype = if self.dtype == DType::F32 { String::new() } else { format!(" {}", self.dtype.name()) };
        format!("{kind:?} [{rows}, {columns}] {values:?} eps={eps} offset={gamma_offset}{dtype}")
    }

    fn run<B: Backend>(&self, b: &B) -> Result<Vec<Output>> {
        let random = &mut Random::of(&self.configuration());
        // Three dimensions, as per-head norms have.
        let dims = [self.rows, 1, self.columns];
        let floats = |dims: &[usize], values: &[f32]| floats_as(b, self.dtype, dims, values);
        let mut x = floats(&dims, &self.values.values(self.rows, self.columns, random))?;
        let mut residual = floats(&dims, &random.normals(self.rows * self.columns))?;
        let width = self.gamma_columns.unwrap_or(self.columns);
        let mut gamma = random.normals(width);
        if let Some(first) = gamma.first_mut() {
            *first = 0.0;
        }
        let gamma = floats(&[width], &gamma)?;
        let beta = floats(&[self.columns], &random.normals(self.columns))?;
        let mut out = poison_as(b, self.dtype, &dims)?;
        let (eps, gamma_offset) = (self.eps, self.gamma_offset);
        match self.kind {
            Kind::Rms { gamma: has_gamma, residual: has_residual } => b.rms_norm(RmsNormArgs {
                x: &x,
                residual: has_residual.then_some(&mut residual),
                gamma: has_gamma.then_some(&gamma),
                gamma_offset,
                eps,
                out: &mut out,
            })?,
            Kind::RmsInPlace => {
                let args = RmsNormInPlaceArgs { x: &mut x, gamma: &gamma, gamma_offset, eps };
                b.rms_norm_in_place(args)?;
                return Ok(vec![Output::floats(b, "x", &x)?]);
            }
            Kind::Layer { beta: has_beta, residual: has_residual } => {
                b.layer_norm(LayerNormArgs {
                    x: &x,
                    residual: has_residual.then_some(&mut residual),
                    gamma: &gamma,
                    beta: has_beta.then_some(&beta),
                    eps,
                    out: &mut out,
                })?;
            }
        }
        Ok(vec![Output::floats(b, "out", &out)?, Output::floats(b, "residual", &residual)?])
    }

    fn tolerances(&self) -> Vec<Tolerance> {
        let bound = match self.values {
            Rows::LargeMean | Rows::Constant if matches!(self.kind, Kind::Layer { .. }) => tolerance::NORM_LARGE_MEAN,
            _ => match self.dtype {
                DType::F16 => tolerance::NORM_F16,
                DType::BF16 => tolerance::NORM_BF16,
                _ => tolerance::NORM,
            },
        };
        let mut rows = Tolerance::Blocks { block: self.columns, bound };
        // The sum of two f32 values, rounded once.
        let mut relative = U32;
        if self.dtype != DType::F32 {
            // Rounding twice, to f32 and to the stored type, may end one ulp away.
            relative = tolerance::relative_ulp(self.dtype);
            let absolute = vec![tolerance::NORM; self.rows * self.columns];
            rows = Tolerance::All(vec![rows, Tolerance::Elements { ulps: 0.0, relative, absolute }]);
        }
        let sum = Tolerance::Elements { ulps: 0.0, relative, absolute: vec![] };
        match self.kind {
            Kind::RmsInPlace => vec![rows],
            _ => vec![rows, sum],
        }
    }
}

/// Names the operation of a [`NormCase`].
macro_rules! operation {
    ($case:ident, $name:literal) => {
        struct $case(NormCase);

        impl Case for $case {
            const OPERATION: &'static str = $name;

            fn configuration(&self) -> String {
                self.0.configuration()
            }

            fn run<B: Backend>(&self, backend: &B) -> Result<Vec<Output>> {
                self.0.run(backend)
            }

            fn tolerances(&self, _: Mode) -> Vec<Tolerance> {
                self.0.tolerances()
            }
        }
    };
}

operation!(RmsNorm, "rms_norm");
operation!(RmsNormInPlace, "rms_norm_in_place");
operation!(LayerNorm, "layer_norm");

/// (rows, columns, values, eps) for every kind of norm.
fn table() -> Vec<(usize, usize, Rows, f32)> {
    let widths = [1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 128, 768, 2048, 7168, 16_384];
    let mut table: Vec<_> = widths.into_iter().map(|k| (3, k, Rows::Normal, 1e-6)).collect();
    table.extend([1, 2, 17, 130].map(|rows| (rows, 128, Rows::Normal, 1e-5)));
    for columns in [65, 2048] {
        table.extend([
            (4, columns, Rows::SomeZero, 1e-6),
            (2, columns, Rows::Large, 1e-6),
            (2, columns, Rows::Outlier, 1e-5),
            (2, columns, Rows::Normal, 0.5),
        ]);
    }
    table.push((0, 64, Rows::Normal, 1e-6));
    table
}

pub(crate) fn run<B: Backend>(runner: &mut Runner<'_, B>) {
    for (rows, columns, values, eps) in table() {
        let case = |kind| NormCase { kind, rows, columns, values, eps, ..NORM };
        for (gamma, residual) in [(true, false), (false, false), (true, true)] {
            runner.check(&RmsNorm(case(Kind::Rms { gamma, residual })));
        }
        runner.check(&RmsNormInPlace(case(Kind::RmsInPlace)));
        for (beta, residual) in [(true, false), (false, true)] {
            runner.check(&LayerNorm(case(Kind::Layer { beta, residual })));
        }
    }
    let plain = Kind::Rms { gamma: true, residual: false };
    runner.check(&RmsNorm(NormCase { kind: plain, gamma_offset: 1.0, ..NORM }));
    runner.check(&RmsNormInPlace(NormCase { gamma_offset: 1.0, ..NORM }));
    for columns in [64, 1000] {
        for values in [Rows::LargeMean, Rows::Constant] {
            let kind = Kind::Layer { beta: values == Rows::Constant, residual: false };
            runner.check(&LayerNorm(NormCase { kind, columns, values, eps: 1e-6, ..NORM }));
        }
    }
    for dtype in runner.half_dtypes() {
        halves(runner, dtype);
    }
    bad_arguments(runner);
}

/// Norms with all operands in a 16-bit type.
fn halves<B: Backend>(runner: &mut Runner<'_, B>, dtype: DType) {
    for (rows, columns, values) in [
        (3, 1, Rows::Normal),
        (2, 7, Rows::Normal),
        (17, 64, Rows::Normal),
        (4, 65, Rows::SomeZero),
        (2, 130, Rows::Large),
        (2, 768, Rows::Outlier),
        (2, 7168, Rows::Normal),
    ] {
        let case = |kind| NormCase { kind, rows, columns, values, dtype, ..NORM };
        for (gamma, residual) in [(true, false), (true, true)] {
            runner.check(&RmsNorm(case(Kind::Rms { gamma, residual })));
        }
        runner.check(&RmsNormInPlace(NormCase { gamma_offset: 1.0, ..case(Kind::RmsInPlace) }));
        for (beta, residual) in [(true, false), (false, true)] {
            runner.check(&LayerNorm(case(Kind::Layer { beta, residual })));
        }
    }
}

fn bad_arguments<B: Backend>(runner: &mut Runner<'_, B>) {
    let rms = Kind::Rms { gamma: true, residual: false };
    let layer = Kind::Layer { beta: true, residual: false };
    for eps in [0.0, -1e-6, f32::NAN, f32::INFINITY] {
        let case = |kind| NormCase { kind, eps, ..NORM };
        let what = format!("eps {eps}");
        runner.refuse(&what, &RmsNorm(case(rms)), Refusal::Value("eps"));
        runner.refuse(&what, &RmsNormInPlace(case(Kind::RmsInPlace)), Refusal::Value("eps"));
        runner.refuse(&what, &LayerNorm(case(layer)), Refusal::Value("eps"));
    }
    let short = |kind| NormCase { kind, gamma_columns: Some(127), ..NORM };
    runner.refuse("short gamma", &RmsNorm(short(rms)), Refusal::Shape("gamma"));
    let in_place = RmsNormInPlace(short(Kind::RmsInPlace));
    runner.refuse("short gamma", &in_place, Refusal::Shape("gamma"));
    runner.refuse("short gamma", &LayerNorm(short(layer)), Refusal::Shape("gamma"));
}

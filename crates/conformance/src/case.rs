//! What a case is, and the runner that judges it.

use std::panic::{AssertUnwindSafe, catch_unwind};

use marlin_formats::DType;
use marlin_ops::oracle::Oracle;
use marlin_ops::{Backend, OpError, Result};

use crate::input::Output;
use crate::tolerance::{Tolerance, Verdict};
use crate::{CaseResult, Family};

/// One operation in one configuration.
pub(crate) trait Case {
    /// Name of the operation.
    const OPERATION: &'static str;

    /// Everything that distinguishes the case; also the seed of its inputs.
    fn configuration(&self) -> String;

    /// Builds the inputs, runs the operation and reads every output.
    fn run<B: Backend>(&self, backend: &B) -> Result<Vec<Output>>;

    /// How each output is compared.
    fn tolerances(&self, mode: Mode) -> Vec<Tolerance>;

    /// The least change of an output's largest element that must be noticed, as a share of it.
    fn noticed(&self) -> f64 {
        0.01
    }
}

/// What operations may round on their way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Nothing of f32 activations.
    #[default]
    Exact,
    /// The default of CPUs: activations of integer formats to int8 blocks, which the oracle rounds too, and those of EXL3.
    Int8Activations,
    /// The default of GPUs: activations of EXL3, to f16 after the rotation, and f32 keys and values, to sums of two bf16.
    F16Activations,
}

impl Mode {
    /// What such outputs are compared with.
    pub(crate) fn oracle(self) -> Oracle {
        match self {
            Self::Int8Activations => Oracle::with_int8_activations(),
            Self::Exact | Self::F16Activations => Oracle::new(),
        }
    }
}

/// The error that a case of bad arguments must get: its kind and operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Shape(&'static str),
    DType(&'static str),
    Value(&'static str),
}

/// Runs cases on a backend and on the oracle.
pub(crate) struct Runner<'a, B> {
    backend: &'a B,
    oracle: Oracle,
    mode: Mode,
    family: Family,
    tamper: bool,
    containing: String,
    results: Vec<CaseResult>,
}

impl<'a, B: Backend> Runner<'a, B> {
    pub(crate) fn new(backend: &'a B, mode: Mode) -> Self {
        Self {
            backend,
            oracle: mode.oracle(),
            mode,
            family: Family::Device,
            tamper: false,
            containing: String::new(),
            results: Vec::new(),
        }
    }

    /// The family of the next results.
    pub(crate) fn enter(&mut self, family: Family) {
        self.family = family;
    }

    /// The 16-bit types of activations that the backend takes.
    pub(crate) fn half_dtypes(&self) -> Vec<DType> {
        let dtypes = self.backend.activation_dtypes().iter().copied();
        dtypes.filter(|dtype| dtype.size_in_bytes() == 2).collect()
    }

    /// Whether the backend encodes tiles.
    pub(crate) fn has_path_search(&self) -> bool {
        self.backend.path_search().is_some()
    }

    /// Leaves out the next cases whose configuration does not contain this.
    pub(crate) fn only_containing(&mut self, text: &str) {
        self.containing = text.to_owned();
    }

    pub(crate) fn into_results(self) -> Vec<CaseResult> {
        self.results
    }

    /// From here on one element of one output is changed before it is judged, and only the judgement of that output
    /// counts. Refusals and empty outputs, which have nothing to change, are left out.
    #[cfg(test)]
    pub(crate) fn tamper_with_outputs(&mut self) {
        self.tamper = true;
    }

    /// Runs a case and records how far it is from the oracle.
    pub(crate) fn check<C: Case>(&mut self, case: &C) {
        if !case.configuration().contains(&self.containing) {
            return;
        }
        let outcome = guarded(|| case.run(self.backend)).and_then(|mut found| {
            let expected = guarded(|| case.run(&self.oracle)).map_err(|error| format!("the oracle: {error}"))?;
            let tolerances = case.tolerances(self.mode);
            if self.tamper {
                return Ok(tampered(&mut found, &expected, &tolerances, case.noticed()));
            }
            judge(&found, &expected, &tolerances).map(Some)
        });
        match outcome {
            Ok(Some(verdict)) => self.record::<C>(case.configuration(), verdict, None),
            Ok(None) => {}
            Err(error) => self.record::<C>(case.configuration(), NOT_COMPUTED, Some(error)),
        }
    }

    /// Runs a case of bad arguments, which must be refused with this error.
    pub(crate) fn refuse<C: Case>(&mut self, what: &str, case: &C, expected: Refusal) {
        if self.tamper || !format!("refused: {what}").contains(&self.containing) {
            return;
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| case.run(self.backend)))
            .map_err(|panic| format!("panicked: {}", message(&*panic)))
            .and_then(|outcome| match outcome {
                Err(error) if refusal(&error) == Some(expected) => Ok(()),
                Err(error) => Err(format!("expected {expected:?}, got: {error}")),
                Ok(_) => Err(format!("expected {expected:?}, but it was accepted")),
            });
        let verdict = if outcome.is_ok() { Verdict::NOTHING } else { NOT_COMPUTED };
        self.record::<C>(format!("refused: {what}"), verdict, outcome.err());
    }

    fn record<C: Case>(&mut self, configuration: String, verdict: Verdict, error: Option<String>) {
        self.results.push(CaseResult {
            family: self.family.name(),
            operation: C::OPERATION,
            configuration,
            max_error: verdict.max_error,
            tolerance: verdict.tolerance,
            passed: verdict.passed(),
            error,
        });
    }
}

/// The verdict on a case without outputs.
const NOT_COMPUTED: Verdict = Verdict { max_error: f64::MAX, tolerance: 0.0 };

/// The outputs, or what went wrong, panics included.
pub(crate) fn guarded(run: impl FnOnce() -> Result<Vec<Output>>) -> std::result::Result<Vec<Output>, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(outcome) => outcome.map_err(|error| error.to_string()),
        Err(panic) => Err(format!("panicked: {}", message(&*panic))),
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("without a message")
}

/// The worst verdict over all outputs.
pub(crate) fn judge(
    found: &[Output],
    expected: &[Output],
    tolerances: &[Tolerance],
) -> std::result::Result<Verdict, String> {
    assert_eq!(expected.len(), tolerances.len(), "one tolerance for each output of a case");
    let mut worst = Verdict::NOTHING;
    for ((found, expected), tolerance) in found.iter().zip(expected).zip(tolerances) {
        if found.values.len() != expected.values.len() {
            let (f, e) = (found.values.len(), expected.values.len());
            return Err(format!("output `{}` has {f} elements instead of {e}", found.name));
        }
        worst = worst.worse(tolerance.judge(&found.values, &expected.values));
    }
    Ok(worst)
}

/// Judges each output with its largest element changed by `share`; the most lenient verdict, none without elements.
fn tampered(found: &mut [Output], expected: &[Output], tolerances: &[Tolerance], share: f64) -> Option<Verdict> {
    let mut lenient: Option<Verdict> = None;
    for ((found, expected), tolerance) in found.iter_mut().zip(expected).zip(tolerances) {
        if matches!(tolerance, Tolerance::AtMost(_)) {
            continue;
        }
        let size = |v: f64| if v.is_finite() { v.abs() } else { -1.0 };
        let Some(largest) = found.values.iter_mut().max_by(|a, b| size(**a).total_cmp(&size(**b))) else {
            continue;
        };
        *largest = match *largest {
            0.0 => 1.0,
            v if v.is_finite() => v * (1.0 + share),
            _ => 0.0,
        };
        let verdict = tolerance.judge(&found.values, &expected.values);
        if lenient.is_none_or(|other| other.worse(verdict) == other) {
            lenient = Some(verdict);
        }
    }
    lenient
}

/// The kind and operand of an argument error.
fn refusal(error: &OpError) -> Option<Refusal> {
    match error {
        OpError::Shape { operand, .. } => Some(Refusal::Shape(operand)),
        OpError::DType { operand, .. } => Some(Refusal::DType(operand)),
        OpError::Value { operand, .. } => Some(Refusal::Value(operand)),
        _ => None,
    }
}

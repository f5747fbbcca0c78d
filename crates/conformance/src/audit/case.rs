//! A launch of a row, and what runs or counts launches.

use std::collections::HashMap;
use std::fmt::Debug;

use marlin_formats::DType;
use marlin_ops::oracle::Oracle;
use marlin_ops::{Backend, OpError, Result};

use super::reference::Reference;
use super::variants::Variants;
use crate::case::{guarded, judge};
use crate::input::Output;
use crate::tolerance::{Tolerance, Verdict};

/// One launch, or a few that make up one operation, in one configuration. Cases that print alike are the same.
pub(crate) trait AuditCase: Debug {
    /// What distinguishes the case, for people; also the seed of its inputs.
    fn configuration(&self) -> String;

    /// Builds the inputs, runs the launches and reads every output. Run on the oracle it gives the expected values.
    fn run<B: Backend, V: Variants<B>>(&self, backend: &B, variants: &V) -> Result<Vec<Output>>;

    /// How each output is compared.
    fn tolerances(&self) -> Vec<Tolerance>;

    /// It asks for launches that only [`Variants`] have.
    fn needs_variants(&self) -> bool {
        false
    }
}

/// What a binding hands its launches to.
pub(crate) trait Sink {
    /// Takes a launch.
    fn check<C: AuditCase>(&mut self, case: &C);
}

/// Counts launches without running them.
#[derive(Default)]
pub(crate) struct Count {
    pub(crate) launches: usize,
    pub(crate) needs_variants: bool,
}

impl Sink for Count {
    fn check<C: AuditCase>(&mut self, case: &C) {
        self.launches += 1;
        self.needs_variants |= case.needs_variants();
    }
}

/// How a launch ended.
#[derive(Clone)]
pub(crate) enum Outcome {
    /// It was compared.
    Judged(Verdict),
    /// The device has no such launch.
    Missing(String),
    /// An error, or a panic.
    Error(String),
}

/// Outcomes by the type and the text of the case: rows share launches, which run once.
pub(crate) type Known = HashMap<String, Outcome>;

/// Runs launches on a backend and on the oracle.
pub(crate) struct Run<'a, B, V> {
    pub(crate) backend: &'a B,
    pub(crate) variants: &'a V,
    /// Of launches that other rows had already.
    known: &'a mut Known,
    /// Of every launch of this row, with its configuration.
    pub(crate) outcomes: Vec<(String, Outcome)>,
    /// One element of one output is changed before it is judged.
    #[cfg(test)]
    pub(crate) tamper: bool,
}

impl<'a, B: Backend, V: Variants<B>> Run<'a, B, V> {
    pub(crate) fn new(backend: &'a B, variants: &'a V, known: &'a mut Known) -> Self {
        Self {
            backend,
            variants,
            known,
            outcomes: Vec::new(),
            #[cfg(test)]
            tamper: false,
        }
    }

    fn outcome<C: AuditCase>(&self, case: &C) -> Outcome {
        let mut missing = None;
        let found = guarded(|| {
            let found = case.run(self.backend, self.variants);
            if let Err(OpError::Unsupported { what, .. }) = &found {
                missing = Some(what.clone());
            }
            found
        });
        if let Some(what) = missing {
            return Outcome::Missing(what);
        }
        let compared = found.and_then(|found| {
            let expected =
                guarded(|| case.run(&Oracle::new(), &Reference)).map_err(|error| format!("the oracle: {error}"))?;
            if found.len() != expected.len() {
                return Err(format!("{} outputs instead of {}", found.len(), expected.len()));
            }
            #[cfg(test)]
            if self.tamper {
                let mut found = found;
                found.iter_mut().for_each(tamper);
                return judge(&found, &expected, &case.tolerances());
            }
            judge(&found, &expected, &case.tolerances())
        });
        match compared {
            Ok(verdict) => Outcome::Judged(verdict),
            Err(error) => Outcome::Error(error),
        }
    }
}

impl<B: Backend, V: Variants<B>> Sink for Run<'_, B, V> {
    fn check<C: AuditCase>(&mut self, case: &C) {
        let key = format!("{} {case:?}", std::any::type_name::<C>());
        let outcome = match self.known.get(&key) {
            Some(outcome) => outcome.clone(),
            None => {
                let outcome = self.outcome(case);
                self.known.insert(key, outcome.clone());
                outcome
            }
        };
        self.outcomes.push((case.configuration(), outcome));
    }
}

/// Doubles the largest element.
#[cfg(test)]
fn tamper(output: &mut Output) {
    let size = |v: f64| if v.is_finite() { v.abs() } else { -1.0 };
    if let Some(largest) = output.values.iter_mut().max_by(|a, b| size(**a).total_cmp(&size(**b))) {
        *largest = if *largest == 0.0 { 1.0 } else { *largest * 2.0 };
    }
}

/// Short name of a float type.
pub(crate) fn short(dtype: DType) -> String {
    dtype.name().to_lowercase()
}

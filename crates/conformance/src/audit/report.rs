//! Running the table on a device.

use marlin_ops::Backend;
use serde::Serialize;

use super::bind::bind;
use super::case::{Known, Outcome, Run};
use super::configuration::Settings;
use super::table::Kernel;
use super::variants::Variants;
use crate::tolerance::Verdict;

/// How a row ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Every launch is within its tolerance.
    Passed,
    /// A launch is not, or could not be computed.
    Failed,
    /// The CPU has no such configuration (16-bit rows, tiles) and needs none.
    NotApplicable,
    /// The row is bound to nothing so far.
    NotYet,
}

impl Status {
    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Passed => "pass",
            Self::Failed => "FAILED",
            Self::NotApplicable => "needs a GPU",
            Self::NotYet => "not yet",
        }
    }
}

/// The outcome of one row.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RowResult {
    /// Name of the kernel.
    pub name: &'static str,
    /// Its family.
    pub family: &'static str,
    /// Operation of the specification.
    pub operation: &'static str,
    /// As in the table.
    pub configuration: String,
    /// Every launch is within its tolerance.
    pub passed: bool,
    /// How it ended.
    pub status: Status,
    /// Launches that were compared.
    pub launches: usize,
    /// The error that came closest to (or exceeded) its bound, in the metric of that bound.
    pub max_error: f64,
    /// The bound on `max_error`.
    pub tolerance: f64,
    /// What is missing, or what failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The outcome of an audit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AuditReport {
    /// Name of the device.
    pub device: String,
    /// Number of rows that passed.
    pub passed: usize,
    /// Number of rows that failed.
    pub failed: usize,
    /// Number of rows that need a GPU, on another device.
    pub not_applicable: usize,
    /// Number of rows that are bound to nothing so far.
    pub not_yet: usize,
    /// Every row that was asked for, in the order of the table.
    pub results: Vec<RowResult>,
}

impl AuditReport {
    /// Counts rows.
    pub fn new(device: &str, results: Vec<RowResult>) -> Self {
        let count = |status| results.iter().filter(|row| row.status == status).count();
        Self {
            device: device.to_owned(),
            passed: count(Status::Passed),
            failed: count(Status::Failed),
            not_applicable: count(Status::NotApplicable),
            not_yet: count(Status::NotYet),
            results,
        }
    }
}

/// Runs rows on a device and holds their launches against the oracle. A launch that rows share runs once.
pub struct Audit<'a, B, V> {
    backend: &'a B,
    variants: &'a V,
    known: Known,
}

impl<'a, B: Backend, V: Variants<B>> Audit<'a, B, V> {
    /// Runs nothing.
    pub fn new(backend: &'a B, variants: &'a V) -> Self {
        Self { backend, variants, known: Known::new() }
    }

    /// Runs one row.
    pub fn row(&mut self, kernel: &Kernel) -> RowResult {
        run(self.backend, self.variants, &mut self.known, kernel)
    }
}

fn run<B: Backend, V: Variants<B>>(backend: &B, variants: &V, known: &mut Known, kernel: &Kernel) -> RowResult {
    let mut launches = Run::new(backend, variants, known);
    let settings = Settings::new(&kernel.configuration);
    let bound = bind(kernel, &settings, &mut launches);
    let mut row = RowResult {
        name: kernel.name,
        family: kernel.family,
        operation: kernel.operation,
        configuration: kernel.configuration.to_string(),
        passed: false,
        status: Status::Passed,
        launches: 0,
        max_error: 0.0,
        tolerance: 0.0,
        reason: None,
    };
    if let Err(reason) = bound {
        (row.status, row.reason) = (Status::NotYet, Some(reason.to_owned()));
        return row;
    }
    let lacking = if V::GPU { Status::Failed } else { Status::NotApplicable };
    let mut worst = Verdict::NOTHING;
    for (configuration, outcome) in launches.outcomes {
        let (status, reason) = match outcome {
            Outcome::Judged(verdict) => {
                row.launches += 1;
                worst = worst.worse(verdict);
                let status = if verdict.passed() { Status::Passed } else { Status::Failed };
                (status, format!("[{configuration}]: {:.3e} > {:.3e}", verdict.max_error, verdict.tolerance))
            }
            Outcome::Missing(what) => (lacking, format!("[{configuration}]: the device does not offer {what}")),
            Outcome::Error(error) => (Status::Failed, format!("[{configuration}]: {error}")),
        };
        // A failure counts most, then what is missing; the first of each is told.
        let first = row.status == Status::Passed && status != Status::Passed;
        if first || (row.status == Status::NotApplicable && status == Status::Failed) {
            (row.status, row.reason) = (status, Some(reason));
        }
    }
    (row.max_error, row.tolerance) = (worst.max_error, worst.tolerance);
    row.passed = row.status == Status::Passed;
    row
}

#[cfg(test)]
mod tests {
    use marlin_ops::oracle::Oracle;

    use super::*;
    use crate::audit::kernels;
    use crate::audit::reference::Reference;

    /// On the oracle itself every bound row passes: the launches are well-formed.
    #[test]
    fn launches_are_well_formed() {
        let oracle = Oracle::new();
        let mut audit = Audit::new(&oracle, &Reference);
        for row in kernels().iter().map(|kernel| audit.row(kernel)) {
            assert!(matches!(row.status, Status::Passed | Status::NotYet | Status::NotApplicable), "{row:?}");
            assert!(row.status == Status::Passed || row.reason.is_some(), "{row:?}");
            assert!(row.max_error == 0.0, "{row:?}");
        }
    }

    /// Every launch notices a wrong element.
    #[test]
    fn every_launch_can_fail() {
        let oracle = Oracle::new();
        let mut known = Known::new();
        for kernel in kernels() {
            let mut launches = Run::new(&oracle, &Reference, &mut known);
            launches.tamper = true;
            let settings = Settings::new(&kernel.configuration);
            if bind(kernel, &settings, &mut launches).is_err() {
                continue;
            }
            for (configuration, outcome) in launches.outcomes {
                match outcome {
                    Outcome::Judged(verdict) => {
                        assert!(!verdict.passed(), "{} [{configuration}] passed with a wrong output", kernel.name);
                    }
                    Outcome::Missing(_) => {}
                    Outcome::Error(error) => panic!("{} [{configuration}]: {error}", kernel.name),
                }
            }
        }
    }
}

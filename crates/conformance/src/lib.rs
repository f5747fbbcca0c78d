//! The proof that a backend computes what the f64 oracle defines: every operation in many configurations.
//!
//! Each family has a table of cases. A case builds its inputs from a seed, runs on any backend and returns the outputs
//! it read back; [`verify`] runs it on the backend and on the oracle and judges the difference by the specification's
//! metric ([`tolerance`]). Outputs are poisoned before a run, so that an element left unwritten shows. Bad arguments
//! are cases too: they must be refused with the right error, naming the right operand.

mod attention;
mod attention_paged;
mod attention_reduce;
pub mod audit;
mod case;
mod convert;
mod dequantize;
mod device;
mod hadamard;
mod input;
mod linear;
mod linear_batched;
mod linear_exl3;
mod mla;
mod moe;
mod moe_grouped;
mod norm;
mod random;
mod report;
mod rope;
mod sampling;
mod sampling_draws;
pub mod tolerance;
mod trellis;
mod weight;

use std::fmt;
use std::str::FromStr;

use marlin_ops::Backend;

pub use case::Mode;
use case::Runner;
pub use report::{CaseResult, Report};

/// The operation families, plus the device itself (memory and transfers).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // The names say it.
pub enum Family {
    Device,
    Linear,
    Norm,
    Rope,
    Attention,
    Moe,
    Hadamard,
    Sampling,
    Convert,
}

impl Family {
    /// Every family, in the order of a report.
    pub const ALL: [Family; 9] = [
        Family::Device,
        Family::Linear,
        Family::Norm,
        Family::Rope,
        Family::Attention,
        Family::Moe,
        Family::Hadamard,
        Family::Sampling,
        Family::Convert,
    ];

    /// The name used in reports and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Family::Device => "device",
            Family::Linear => "linear",
            Family::Norm => "norm",
            Family::Rope => "rope",
            Family::Attention => "attention",
            Family::Moe => "moe",
            Family::Hadamard => "hadamard",
            Family::Sampling => "sampling",
            Family::Convert => "convert",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A family name that does not exist.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown family `{name}`, the families are {}", Family::ALL.map(Family::name).join(", "))]
pub struct UnknownFamily {
    /// What was asked for.
    pub name: String,
}

impl FromStr for Family {
    type Err = UnknownFamily;

    fn from_str(name: &str) -> Result<Self, UnknownFamily> {
        let unknown = || UnknownFamily { name: name.to_owned() };
        Family::ALL.into_iter().find(|family| family.name() == name).ok_or_else(unknown)
    }
}

/// What to verify.
#[derive(Clone, Debug, Default)]
pub struct VerifyOptions {
    /// Families to run; all when absent.
    pub families: Option<Vec<Family>>,
    /// The mode that the backend is in.
    pub mode: Mode,
    /// Name of the device in the report; the backend's own when empty.
    pub device: String,
    /// Run only cases whose configuration contains this.
    pub containing: String,
}

/// Runs every case of the chosen families on `backend` and judges it. A case that fails, returns an error or panics is
/// a failed result; the others still run.
pub fn verify<B: Backend>(backend: &B, options: &VerifyOptions) -> Report {
    let mut runner = Runner::new(backend, options.mode);
    runner.only_containing(&options.containing);
    run_families(&mut runner, options.families.as_deref().unwrap_or(&Family::ALL));
    let device = match options.device.as_str() {
        "" => backend.name(),
        name => name,
    };
    Report::new(device, runner.into_results())
}

fn run_families<B: Backend>(runner: &mut Runner<'_, B>, families: &[Family]) {
    for &family in families {
        runner.enter(family);
        match family {
            Family::Device => device::run(runner),
            Family::Linear => {
                linear::run(runner);
                linear_batched::run(runner);
                linear_exl3::run(runner);
            }
            Family::Norm => norm::run(runner),
            Family::Rope => rope::run(runner),
            Family::Attention => {
                attention::run(runner);
                mla::run(runner);
                attention_paged::run(runner);
                attention_reduce::run(runner);
            }
            Family::Moe => {
                moe::run(runner);
                moe_grouped::run(runner);
            }
            Family::Hadamard => hadamard::run(runner),
            Family::Sampling => {
                sampling::run(runner);
                sampling_draws::run(runner);
            }
            Family::Convert => {
                convert::run(runner);
                dequantize::run(runner);
                trellis::run(runner);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every check of every family notices a change of 1 % (of 3 % in attention's bf16 results; or of 1, or an infinity) in
    /// a single output element.
    #[test]
    fn every_case_can_fail() {
        for mode in [Mode::Exact, Mode::Int8Activations, Mode::F16Activations] {
            let oracle = mode.oracle();
            let mut runner = Runner::new(&oracle, mode);
            runner.tamper_with_outputs();
            run_families(&mut runner, &Family::ALL);
            let results = runner.into_results();
            assert!(results.len() > 500);
            for result in results {
                assert!(!result.passed, "{result:?} passed with a wrong output");
            }
        }
    }

    #[test]
    fn family_names() {
        for family in Family::ALL {
            assert_eq!(family.name().parse(), Ok(family));
        }
        let error = "lineal".parse::<Family>().unwrap_err().to_string();
        assert!(error.contains("lineal") && error.contains("sampling"));
    }
}

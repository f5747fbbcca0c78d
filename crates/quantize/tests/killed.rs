//! Processes killed at any moment, also while they write, leave what the next one needs.
//!
//! Alone in its binary: a process that another test is starting would hold the lock of a folder for a moment.

mod common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::chain::{METHODS, Source, SourceResult, files, fingerprint, fixture, targets};
use marlin_quantize::{Calibration, ModelSource, Module, Settings, Staging, quantize_model};

/// Reads slowly, so that there is time to be killed in.
struct Slow(Source);

impl ModelSource for Slow {
    fn weight(&self, module: &Module) -> SourceResult<Vec<f32>> {
        std::thread::sleep(Duration::from_millis(3));
        self.0.weight(module)
    }

    fn vector(&self, tensor: &str, len: usize) -> SourceResult<Vec<f32>> {
        self.0.vector(tensor, len)
    }
}

const STAGING: &str = "MARLIN_TEST_STAGING";
const METHOD: &str = "MARLIN_TEST_METHOD";

/// The process that [`killed_processes_are_taken_up`] kills.
#[test]
#[ignore = "run by another test"]
fn child() {
    let method = METHODS[std::env::var(METHOD).unwrap().parse::<usize>().unwrap()];
    let mut staging = Staging::open(Path::new(&std::env::var_os(STAGING).unwrap()), &fingerprint(method)).unwrap();
    let mut fixture = fixture();
    let assignments = targets(method, &fixture.assignments);
    let settings = Settings { assignments: &assignments, method, folds: &[], search: None };
    let source = Slow(Source(fixture.weights.clone()));
    let chain: &mut dyn Calibration = &mut fixture.chain;
    quantize_model(settings, &source, Some(chain), &mut staging, &|_| {}).unwrap();
}

fn spawn(dir: &Path, method: usize) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--ignored"]).env(STAGING, dir).env(METHOD, method.to_string());
    command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn killed_processes_are_taken_up() {
    // The fourth takes long; interrupting it is tested in-process.
    for (m, method) in METHODS.into_iter().enumerate().take(3) {
        let root = tempfile::tempdir().unwrap();
        let uninterrupted = root.path().join("whole.partial");
        assert!(spawn(&uninterrupted, m).wait().unwrap().success());
        let mut kills = 0;
        for round in 0..2u64 {
            let dir = root.path().join(format!("{round}.partial"));
            // Later and later, so that every round ends.
            for delay in std::iter::successors(Some(1 + round), |delay| Some(delay + 3 + delay / 3)) {
                let mut process = spawn(&dir, m);
                std::thread::sleep(Duration::from_millis(delay));
                // SIGKILL on Unix.
                process.kill().unwrap();
                if process.wait().unwrap().success() {
                    break;
                }
                kills += 1;
                assert!(delay < 60_000, "the job never ends");
            }
            assert_eq!(files(&dir), files(&uninterrupted), "{method:?}");
        }
        assert!(kills >= 4, "only {kills} processes were killed");
    }
}

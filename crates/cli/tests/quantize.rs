//! `marlin quantize` killed at any moment and started again ends with the same files.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn repository() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

fn spawn(out: &Path, options: &[String]) -> Child {
    let models = repository().join("models");
    Command::new(env!("CARGO_BIN_EXE_marlin"))
        .arg("quantize")
        .args([models.join("marlin-stories").as_path(), out])
        .args(["--device", "cpu"])
        .args(options)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Every file of a folder with its contents.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn killed_at_any_moment_it_ends_with_the_same_files() {
    let text = repository().join("models/data/calibration.txt");
    let calibrated = |options: &str, ignored: &[&'static str]| -> Vec<String> {
        let options = options.split(' ').map(str::to_owned);
        let ignored = ignored.iter().map(|pattern| format!("--ignore={pattern}"));
        options.chain(ignored).chain([format!("--calibration={}", text.display())]).collect()
    };
    // Methods that take long get a few modules.
    let middle = ["*layers.2*", "*layers.3*"];
    let most = ["*mlp*", "*layers.1*", "*layers.2*", "*layers.3*", "*q_b*", "*o_proj*"];
    for options in [
        vec!["--format=int4".to_owned()],
        calibrated("--format int3 --calibration-tokens 1024", &[]),
        calibrated("--format int3 --calibration-tokens 1024 --method mr-gptq", &[]),
        calibrated("--format int4 --method awq --calibration-tokens 256", &[]),
        calibrated("--format int --bits 3.5 --calibration-tokens 64 --context 32", &middle),
        calibrated("--format exl3 --bits 1 --head-bits 16 --calibration-tokens 64 --context 64", &most),
    ] {
        let root = tempfile::tempdir().unwrap();
        let whole = root.path().join("whole");
        let start = Instant::now();
        let finished = spawn(&whole, &options).wait_with_output().unwrap();
        assert!(finished.status.success(), "{options:?}: {}", String::from_utf8_lossy(&finished.stderr));
        // Warnings at most: no progress bar in a pipe.
        let stderr = String::from_utf8(finished.stderr).unwrap();
        assert!(stderr.lines().all(|line| line.starts_with("warning: ")), "{stderr}");
        let step = start.elapsed() / 12;

        let out = root.path().join("out");
        let mut kills = 0;
        // Each process lives longer than the one before, so that the job ends.
        for lifetime in (1..).map(|i| step * i) {
            let mut process = spawn(&out, &options);
            std::thread::sleep(lifetime);
            // SIGKILL on Unix.
            process.kill().unwrap();
            if process.wait().unwrap().success() {
                break;
            }
            kills += 1;
            assert!(lifetime < Duration::from_secs(300), "the job never ends");
        }
        assert!(kills >= 2, "{options:?}: only {kills} processes were killed");
        assert!(contents(&out) == contents(&whole), "{options:?}");
        let mut left: Vec<_> = std::fs::read_dir(root.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["out", "whole"]);
    }
}

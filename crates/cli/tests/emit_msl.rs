//! `marlin kernels --emit msl DIR`.
#![cfg(feature = "gpu")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

fn emit(format: &str, dir: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
    command.args(["kernels", "--emit", format]).arg(dir).output().unwrap()
}

#[test]
fn kernels_are_written_into_a_new_folder() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("msl");
    let refused = |format: &str, dir: &Path, words: &str| {
        let output = emit(format, dir);
        let error = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && error.contains(words), "{error}");
        assert!(!folder.exists());
    };
    refused("wgsl", &folder, "msl");
    refused("msl", &folder.join("kernels"), "msl: ");
    refused("msl", parent.path(), "exists already");

    let output = emit("msl", &folder);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let files: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() > 1000);
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(printed, format!("{}: {} kernels\n", folder.display(), files.len()));
    for file in files {
        assert_eq!(file.extension().unwrap(), "metal");
        assert!(fs::read_to_string(&file).unwrap().contains("[[kernel]]"), "{}", file.display());
    }
    // Nothing else is left beside it.
    assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 1);
}

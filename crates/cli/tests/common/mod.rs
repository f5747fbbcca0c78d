//! Running the binary.

#![allow(dead_code)] // Each test file uses a part.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Standard output of a command that must succeed.
pub fn stdout(arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(env!("CARGO_BIN_EXE_marlin")).args(arguments).output().expect("the binary starts");
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Its one JSON object.
pub fn json(arguments: &[&str]) -> Value {
    serde_json::from_slice(&stdout(arguments)).unwrap_or_else(|e| panic!("{arguments:?}: {e}"))
}

/// A path below `models/`.
pub fn models(name: &str) -> String {
    let models: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models").join(name);
    models.display().to_string()
}

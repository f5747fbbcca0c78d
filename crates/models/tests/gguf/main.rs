//! GGUF files: weights, configuration, tokenizer and template against llama.cpp and the gguf package (written by
//! `tools/golden/make_gguf.sh`), and damaged files.

#[path = "../common/mod.rs"]
mod common;
mod file;
mod hostile;
mod parity;
mod tokenizer;
mod weights;

use std::path::{Path, PathBuf};

/// A file of the goldens.
fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden_gguf").join(name)
}

//! The golden models: tiny random checkpoints of every architecture with the logits that transformers computes
//! (written by `tools/golden`).

#![allow(dead_code)] // Each test binary uses its own part.

pub mod parity;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use marlin_formats::DType;
use marlin_models::{Checkpoint, LoadOptions, Model, ModelConfig};
use marlin_ops::Backend;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

/// Tokens and the logits of one full forward pass over them.
pub struct Golden {
    pub tokens: Vec<u32>,
    /// `[tokens, vocab]`.
    pub logits: Vec<f32>,
}

impl Golden {
    /// Reads a file with `tokens` I64 or I32 `[T]` and `logits` F32 `[T, vocab]`.
    pub fn read(path: &Path) -> Golden {
        let bytes = std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let (tokens, logits) = (file.tensor("tokens").unwrap(), file.tensor("logits").unwrap());
        assert_eq!(logits.dtype(), Dtype::F32);
        assert_eq!(tokens.shape()[0], logits.shape()[0]);
        let (logits, _) = logits.data().as_chunks::<4>();
        let golden =
            Golden { tokens: integers(&tokens), logits: logits.iter().map(|&b| f32::from_le_bytes(b)).collect() };
        assert!(golden.tokens.len() >= 8, "{}: too few tokens", path.display());
        golden
    }

    /// Largest |logit|, what tolerances are relative to.
    pub fn scale(&self) -> f32 {
        self.logits.iter().fold(0.0, |m, v| m.max(v.abs()))
    }
}

/// Token ids of an I64 or I32 tensor.
fn integers(tensor: &TensorView<'_>) -> Vec<u32> {
    match tensor.dtype() {
        Dtype::I64 => {
            let (chunks, _) = tensor.data().as_chunks::<8>();
            chunks.iter().map(|&b| u32::try_from(i64::from_le_bytes(b)).unwrap()).collect()
        }
        Dtype::I32 => {
            let (chunks, _) = tensor.data().as_chunks::<4>();
            chunks.iter().map(|&b| u32::try_from(i32::from_le_bytes(b)).unwrap()).collect()
        }
        other => panic!("tokens are {other:?}"),
    }
}

/// All golden folders, sorted; fails when there is none. `MARLIN_GOLDEN` names another root, such as one that
/// `tools/golden/make.sh --seed 7 --out DIR` wrote.
pub fn golden_folders() -> Vec<PathBuf> {
    folders_in(&std::env::var_os("MARLIN_GOLDEN").map_or_else(|| golden_folder(""), PathBuf::from))
}

/// The model folders of other projects' formats, sorted.
pub fn imported_folders() -> Vec<PathBuf> {
    folders_in(&golden_folder("../imports/models"))
}

fn folders_in(root: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    let mut folders: Vec<PathBuf> =
        entries.map(|entry| entry.unwrap().path()).filter(|path| path.join("config.json").exists()).collect();
    folders.sort();
    assert!(!folders.is_empty(), "{}: no golden model", root.display());
    folders
}

/// One golden folder by name.
pub fn golden_folder(name: &str) -> PathBuf {
    // Tests of other crates use these models too.
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden").join(name)
}

pub fn load<B: Backend>(backend: &Arc<B>, dir: &Path, chunk: usize) -> Model<B> {
    try_load(backend, dir, chunk).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

/// Loads with an f32 cache.
pub fn try_load<B: Backend>(backend: &Arc<B>, dir: &Path, chunk: usize) -> marlin_models::Result<Model<B>> {
    let config = ModelConfig::from_dir(dir)?;
    let checkpoint = Checkpoint::open(dir)?;
    let options = LoadOptions { chunk, cache_dtype: DType::F32, ..LoadOptions::default() };
    Model::load(Arc::clone(backend), &checkpoint, config, options)
}

/// The checkpoint that ExLlamaV3 wrote, and the logits of its runtime.
pub fn exl3() -> (PathBuf, Golden) {
    let dir = golden_folder("../golden_exl3/tiny_llama");
    let path = dir.with_extension("logits.safetensors");
    let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (tokens, logits) = (file.tensor("input_ids").unwrap(), file.tensor("exl3.logits").unwrap());
    let logits = logits.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    (dir, Golden { tokens: integers(&tokens), logits })
}

/// Largest |a - b|; NaN counts as infinite.
pub fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).fold(0.0, |worst, (a, b)| {
        let difference = (a - b).abs();
        if difference.is_nan() { f32::INFINITY } else { worst.max(difference) }
    })
}

/// The bundled bf16 model and its golden logits.
pub fn bundled() -> (PathBuf, Golden) {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models");
    let golden = Golden::read(&models.join("data/bundled_logits.safetensors"));
    (models.join("marlin-stories"), golden)
}

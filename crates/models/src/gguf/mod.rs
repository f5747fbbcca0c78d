//! GGUF checkpoints: one file that holds the weights, what `config.json` says, the tokenizer and the chat template.

mod blocks;
mod config;
mod metadata;
mod names;
mod pretokenizer;
mod reader;
mod rope;
mod tokenizer;
mod types;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{ModelError, Result};
pub(crate) use blocks::{matrix, nvfp4_divisor};
pub(crate) use config::{AttentionRows, attention_rows, expert_count};
pub(crate) use names::hugging_face;
use reader::{GgufFile, MAGIC, is_later_part};
pub(crate) use reader::{GgufModel, TensorRecord};
pub(crate) use types::{BlockType, GgmlType};

/// Rotary factors of Llama 3, which the configuration takes up: no tensor of the model itself.
pub(crate) const ROPE_FACTORS: &str = "rope_freqs.weight";

/// The GGUF file that `path` names: itself, or the only one of a folder without safetensors. `None` when `path` is a
/// model folder of the other kind.
///
/// # Errors
/// A folder with several GGUF models and no safetensors; the system's own.
pub(crate) fn find(path: &Path) -> Result<Option<PathBuf>> {
    let is_gguf = |path: &Path| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"));
    if path.is_file() {
        let mut start = Vec::new();
        let file = File::open(path).map_err(ModelError::io(path))?;
        file.take(MAGIC.len() as u64).read_to_end(&mut start).map_err(ModelError::io(path))?;
        return Ok((is_gguf(path) || start == MAGIC).then(|| path.to_owned()));
    }
    let safetensors = ["model.safetensors", "model.safetensors.index.json"];
    if !path.is_dir() || safetensors.iter().any(|name| path.join(name).exists()) {
        return Ok(None);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(ModelError::io(path))? {
        let entry = entry.map_err(ModelError::io(path))?;
        if is_gguf(&entry.path()) && !is_later_part(&entry.file_name().to_string_lossy()) {
            found.push(entry.path());
        }
    }
    found.sort();
    match found.len() {
        0 | 1 => Ok(found.pop()),
        count => {
            let reason = format!("the folder holds {count} GGUF models, {} and others: name one", found[0].display());
            Err(ModelError::Gguf { path: path.to_owned(), reason })
        }
    }
}

/// What `config.json` would say.
///
/// # Errors
/// As [`GgufModel::open`], and what the metadata lacks or says wrong: names the key.
pub(crate) fn config_json(path: &Path) -> Result<Value> {
    config::config_json(&GgufModel::open(path)?)
}

/// What `generation_config.json` would say.
///
/// # Errors
/// A damaged file, or a key of the wrong kind.
pub(crate) fn generation_json(path: &Path) -> Result<Value> {
    config::generation_json(&GgufFile::open(path)?.metadata())
}

/// What `tokenizer.json` would say.
///
/// # Errors
/// A damaged file, or a vocabulary that is missing, damaged or of an unknown kind: names the key.
pub(crate) fn tokenizer_json(path: &Path) -> Result<Value> {
    tokenizer::tokenizer_json(&GgufFile::open(path)?.metadata())
}

/// The chat template and its special tokens, `None` without one.
///
/// # Errors
/// A damaged file, or a key of the wrong kind.
pub(crate) fn chat_template(path: &Path) -> Result<Option<(String, Map<String, Value>)>> {
    let file = GgufFile::open(path)?;
    let metadata = file.metadata();
    match metadata.text("tokenizer.chat_template")? {
        None => Ok(None),
        Some(source) => Ok(Some((source.to_owned(), tokenizer::special_tokens(&metadata)?))),
    }
}

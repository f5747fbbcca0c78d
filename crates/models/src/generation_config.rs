//! `generation_config.json`: how a model's publisher wants it sampled.

use std::path::Path;

use crate::config::{Fields, ModelConfig, read_json};
use crate::error::{ModelError, Result};

/// Sampling defaults and end tokens of a model folder; fields are `None` where the file does not give them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// False asks for greedy decoding.
    pub do_sample: Option<bool>,
    /// Softmax temperature, at least 0.
    pub temperature: Option<f32>,
    /// Most likely tokens kept; 0 keeps all.
    pub top_k: Option<usize>,
    /// Probability mass kept, in (0, 1].
    pub top_p: Option<f32>,
    /// Smallest probability kept relative to the largest, in [0, 1].
    pub min_p: Option<f32>,
    /// Repetition penalty, above 0.
    pub repetition_penalty: Option<f32>,
}

impl GenerationConfig {
    /// Reads `dir/generation_config.json`, or the sampling keys of a GGUF file; a model without them has no wishes.
    ///
    /// # Errors
    /// Invalid JSON, or a value outside its range, with the field.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        if let Some(file) = crate::gguf::find(dir)? {
            return Self::read(&Fields::new(&file, &crate::gguf::generation_json(&file)?)?);
        }
        let path = dir.join("generation_config.json");
        match read_json(&path, "it is optional") {
            Ok(value) => Self::read(&Fields::new(&path, &value)?),
            Err(ModelError::MissingFile { .. }) => Ok(Self::default()),
            Err(other) => Err(other),
        }
    }

    /// End tokens: those given here, else those of `config.json`.
    pub fn eos_token_ids<'a>(&'a self, config: &'a ModelConfig) -> &'a [u32] {
        match self.eos_token_ids.is_empty() {
            true => &config.eos_token_ids,
            false => &self.eos_token_ids,
        }
    }

    fn read(fields: &Fields<'_>) -> Result<Self> {
        let ranged = |name: &str, ok: fn(f64) -> bool, range: &str| match fields.optional_number(name)? {
            Some(v) if !ok(v) => Err(fields.error(name, format!("is {v}, must be {range}"))),
            v => Ok(v.map(|v| v as f32)),
        };
        Ok(Self {
            eos_token_ids: fields.token_ids("eos_token_id")?,
            do_sample: match fields.get("do_sample") {
                Some(_) => Some(fields.boolean("do_sample", false)?),
                None => None,
            },
            temperature: ranged("temperature", |v| v >= 0.0, "at least 0")?,
            top_k: fields.optional_integer("top_k", 0, u64::from(u32::MAX))?,
            top_p: ranged("top_p", |v| v > 0.0 && v <= 1.0, "in (0, 1]")?,
            min_p: ranged("min_p", |v| (0.0..=1.0).contains(&v), "in [0, 1]")?,
            repetition_penalty: ranged("repetition_penalty", |v| v > 0.0, "above 0")?,
        })
    }
}

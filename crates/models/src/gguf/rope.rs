//! Rotary scaling: the metadata keys, and Llama 3's bands, which a GGUF file stores as one factor a frequency.

use std::f64::consts::PI;

use marlin_ops::rope::{RopeConfig, RopeScaling};
use serde_json::{Map, Value, json};

use super::config::shortest;
use super::reader::GgufModel;
use super::types::GgmlType;
use crate::error::{ModelError, Result};
use marlin_formats::DType;

const FACTORS: &str = "rope_freqs.weight";
/// Stored factors are f32; a band's parameters must reproduce each to within its rounding.
const FACTOR_TOLERANCE: f64 = 1e-6;
/// Llama 3.1, 3.2 and 3.3: bands from 1 and 4 turns of a context of 8192.
const PUBLISHED_BANDS: (f64, f64) = (8192.0, 4.0);

/// The `rope_scaling` object for heads of `rotary_dim` rotated channels, `None` for plain rotation.
///
/// # Errors
/// A scaling type that is not supported, factors that no Llama 3 bands give: names the key or tensor.
pub(super) fn scaling(model: &GgufModel, arch: &str, rotary_dim: u64) -> Result<Option<Value>> {
    let metadata = model.metadata();
    let key = |name: &str| format!("{arch}.rope.scaling.{name}");
    let kind = metadata.text(&key("type"))?;
    if model.tensor(FACTORS).is_some() {
        if let Some(kind) = kind.filter(|&kind| kind != "none") {
            let reason = format!("is `{kind}`, but the file holds {FACTORS} too");
            return Err(metadata.error(&key("type"), reason));
        }
        let theta = metadata.number(&format!("{arch}.rope.freq_base"))?.unwrap_or(10_000.0);
        return bands(model, theta, rotary_dim).map(Some);
    }
    if let Some((_, tensor)) = model.tensors().find(|(_, tensor)| tensor.name.starts_with("rope_factors_")) {
        let reason = format!("tensor `{}`: long and short rotary factors are not supported", tensor.name);
        return Err(ModelError::Gguf { path: metadata.path.to_owned(), reason });
    }
    for name in ["attn_factor", "yarn_attn_factor", "yarn_ext_factor"] {
        if let Some(value) = metadata.number(&key(name))?.filter(|&value| value != 1.0) {
            return Err(metadata.error(&key(name), format!("is {value}; only 1 is supported")));
        }
    }
    let factor = metadata.number(&key("factor"))?.map(shortest);
    match kind.unwrap_or("none") {
        "none" => match metadata.number(&format!("{arch}.rope.scale_linear"))?.filter(|&factor| factor != 1.0) {
            None => Ok(None),
            Some(factor) => Ok(Some(json!({"rope_type": "linear", "factor": shortest(factor)}))),
        },
        "linear" => Ok(Some(json!({"rope_type": "linear", "factor": factor}))),
        "yarn" => {
            let mut yarn = Map::new();
            yarn.insert("rope_type".into(), json!("yarn"));
            yarn.insert("factor".into(), json!(factor));
            let original = metadata.required_integer(&key("original_context_length"))?;
            yarn.insert("original_max_position_embeddings".into(), json!(original));
            for (name, stored) in [("beta_fast", "yarn_beta_fast"), ("beta_slow", "yarn_beta_slow")] {
                if let Some(value) = metadata.number(&key(stored))? {
                    yarn.insert(name.into(), json!(shortest(value)));
                }
            }
            if arch == "deepseek2" {
                // The rotation itself keeps its length; the scores take the whole correction. The multiplier holds
                // a tenth of mscale_all_dim.
                yarn.insert("attention_factor".into(), json!(1.0));
                let multiplier = metadata.number(&key("yarn_log_multiplier"))?.unwrap_or(0.0);
                yarn.insert("mscale_all_dim".into(), json!(shortest(f64::from((multiplier / 0.1) as f32))));
            }
            Ok(Some(Value::Object(yarn)))
        }
        other => {
            let reason = format!("is `{other}`, which is not supported; supported: none, linear, yarn");
            Err(metadata.error(&key("type"), reason))
        }
    }
}

/// The Llama 3 parameters whose factors are those stored.
fn bands(model: &GgufModel, theta: f64, rotary_dim: u64) -> Result<Value> {
    let path = model.metadata().path;
    let Some((part, tensor)) = model.tensor(FACTORS) else {
        return Err(ModelError::MissingTensor { path: path.to_owned(), tensor: FACTORS.to_owned() });
    };
    let fail =
        |reason: String| ModelError::Gguf { path: path.to_owned(), reason: format!("tensor `{FACTORS}`: {reason}") };
    if tensor.kind != GgmlType::Plain(DType::F32) || tensor.shape.iter().product::<usize>() as u64 != rotary_dim / 2 {
        let found = (tensor.kind.name(), &tensor.shape);
        return Err(fail(format!("is {found:?}, expected F32 [{}]", rotary_dim / 2)));
    }
    let stored: Vec<f64> =
        part.bytes(tensor).as_chunks::<4>().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect();
    let plain = RopeConfig { theta, rotary_dim: rotary_dim as usize, scaling: RopeScaling::Default };
    let frequencies = plain.inverse_frequencies().map_err(|e| fail(e.to_string()))?;
    let factor = stored.iter().copied().fold(1.0, f64::max);
    let candidates = [Some(PUBLISHED_BANDS), fitted_bands(&stored, &frequencies, factor)];
    for (original, high) in candidates.into_iter().flatten() {
        let scaling = RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: high,
            original_max_position: original,
        };
        let Ok(scaled) = (RopeConfig { scaling, ..plain }).inverse_frequencies() else { continue };
        let same = |((plain, scaled), stored): ((&f64, &f64), &f64)| {
            (plain / scaled - stored).abs() <= FACTOR_TOLERANCE * stored
        };
        if frequencies.iter().zip(&scaled).zip(&stored).all(same) {
            return Ok(json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }));
        }
    }
    Err(fail("its factors are not those of Llama 3's frequency bands, the only ones supported".to_owned()))
}

/// Context and high band edge (the low one is 1) from two factors between the bands. There, the inverse factor
/// is linear in the turns of a channel over the context: `1/f = (1-s)/F + s`, `s = (turns - 1) / (high - 1)`.
fn fitted_bands(stored: &[f64], frequencies: &[f64], factor: f64) -> Option<(f64, f64)> {
    let smooth = |f: f64| (1.0 / f - 1.0 / factor) / (1.0 - 1.0 / factor);
    let between = |f: f64| f > 1.0 + 1e-4 && f < factor * (1.0 - 1e-4);
    let mut points =
        stored.iter().zip(frequencies).filter(|(f, _)| between(**f)).map(|(&f, &w)| (w / (2.0 * PI), smooth(f)));
    let first = points.next()?;
    let Some(last) = points.next_back() else {
        // One point gives the context if the high edge is the published one.
        let original = ((first.1 * (PUBLISHED_BANDS.1 - 1.0) + 1.0) / first.0).round();
        return (original.is_finite() && original >= 1.0).then_some((original, PUBLISHED_BANDS.1));
    };
    // s = a * turns_per_token + b, a = L0 / (high - 1), b = -1 / (high - 1).
    let a = (first.1 - last.1) / (first.0 - last.0);
    let b = first.1 - a * first.0;
    let high = 1.0 - 1.0 / b;
    // Published values are whole.
    let (original, high) = ((a * (high - 1.0)).round(), high.round());
    (original.is_finite() && original >= 1.0 && high.is_finite() && high > 1.0).then_some((original, high))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Factors of known bands give the bands back, from one point between the edges or several.
    #[test]
    fn bands_are_found_from_their_factors() {
        for (theta, rotary_dim, factor, high, original) in
            [(500_000.0, 128, 8.0, 4.0, 8192.0), (500.0, 16, 8.0, 4.0, 64.0), (100.0, 32, 16.0, 6.0, 300.0)]
        {
            let plain = RopeConfig { theta, rotary_dim, scaling: RopeScaling::Default };
            let scaling = RopeScaling::Llama3 {
                factor,
                low_freq_factor: 1.0,
                high_freq_factor: high,
                original_max_position: original,
            };
            let frequencies = plain.inverse_frequencies().unwrap();
            let scaled = RopeConfig { scaling, ..plain }.inverse_frequencies().unwrap();
            let stored: Vec<f64> =
                frequencies.iter().zip(&scaled).map(|(plain, scaled)| f64::from((plain / scaled) as f32)).collect();
            assert_eq!(fitted_bands(&stored, &frequencies, factor), Some((original, high)));
        }
        assert_eq!(fitted_bands(&[1.0, 8.0], &[1.0, 0.1], 8.0), None);
    }
}

//! Rotary embedding fields, in the published spelling (`rope_theta`, `rope_scaling`) and in that of transformers 5
//! (`rope_parameters`).

use marlin_ops::rope::{RopeConfig, RopeScaling, yarn_mscale};

use super::Fields;
use crate::error::Result;

/// Supported `rope_type` values.
const ROPE_TYPES: &str = "default, linear, dynamic, yarn, llama3";

/// What a config says about rotary embedding.
pub(super) struct RopeFields {
    /// The table.
    pub config: RopeConfig,
    /// Factor on the softmax scale of MLA models: `(0.1 mscale_all_dim ln factor + 1)^2` for any scaled rope that gives
    /// `mscale_all_dim`, else 1.
    pub mla_scale: f64,
}

/// Reads and checks the rope fields for `rotary_dim` channels.
pub(super) fn read(fields: &Fields<'_>, rotary_dim: usize, max_positions: usize) -> Result<RopeFields> {
    // As in transformers: a non-empty rope_scaling replaces rope_parameters as a whole.
    let (name, dict) = match fields.child("rope_scaling")? {
        Some(dict) => ("rope_scaling", Some(dict)),
        None => ("rope_parameters", fields.child("rope_parameters")?),
    };
    let dict_or_top = |field: &str| match dict.map(|d| d.optional_positive(field)).transpose()? {
        Some(Some(value)) => Ok(Some(value)),
        _ => fields.optional_positive(field),
    };
    let theta = dict_or_top("rope_theta")?.unwrap_or(10_000.0);
    if let Some(partial) = dict_or_top("partial_rotary_factor")?.filter(|&p| p != 1.0) {
        let reason = format!("is {partial}; this architecture rotates all channels (1.0)");
        return Err(fields.error("partial_rotary_factor", reason));
    }
    let mut config = RopeConfig { theta, rotary_dim, scaling: RopeScaling::Default };
    let mut mla_scale = 1.0;
    if let Some(dict) = dict {
        if let Some(key) = dict.keys().find(|k| dict.get(k).is_some_and(|v| v.is_object())) {
            return Err(dict.error(key, "is an object; rope parameters per layer type are not supported"));
        }
        let kind = match dict.optional_string("rope_type")? {
            Some(kind) => kind,
            None => dict.optional_string("type")?.unwrap_or("default"),
        };
        config.scaling = scaling(kind, fields, &dict, max_positions)?;
        let all_dim = dict.optional_number("mscale_all_dim")?.filter(|&m| m != 0.0);
        if let (true, Some(all_dim)) = (kind != "default", all_dim) {
            mla_scale = yarn_mscale(dict.positive("factor")?, all_dim).powi(2);
        }
    }
    check(fields, name, &config)?;
    Ok(RopeFields { config, mla_scale })
}

fn scaling(kind: &str, top: &Fields<'_>, dict: &Fields<'_>, max_positions: usize) -> Result<RopeScaling> {
    const L0: &str = "original_max_position_embeddings";
    let original = || -> Result<f64> {
        let given = match top.optional_positive(L0)? {
            Some(top) => Some(top),
            None => dict.optional_positive(L0)?,
        };
        Ok(given.unwrap_or(max_positions as f64))
    };
    // 0 and null mean the default, as `or` does in transformers.
    let beta = |name: &str, default: f64| match dict.optional_number(name)? {
        None | Some(0.0) => Ok(default),
        Some(v) if v > 0.0 => Ok(v),
        Some(v) => Err(dict.error(name, format!("is {v}, must be above 0"))),
    };
    match kind {
        // Dynamic scaling equals the default within max_position_embeddings, and no longer context is accepted.
        "default" | "dynamic" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: dict.positive("factor")? }),
        "yarn" => Ok(RopeScaling::Yarn {
            factor: match dict.is_null("factor") {
                true => max_positions as f64 / original()?,
                false => dict.positive("factor")?,
            },
            original_max_position: original()?,
            beta_fast: beta("beta_fast", 32.0)?,
            beta_slow: beta("beta_slow", 1.0)?,
            attention_factor: dict.optional_positive("attention_factor")?,
            mscale: dict.optional_number("mscale")?,
            mscale_all_dim: dict.optional_number("mscale_all_dim")?,
            truncate: dict.boolean("truncate", true)?,
        }),
        "llama3" => {
            let (low, high) = (dict.positive("low_freq_factor")?, dict.positive("high_freq_factor")?);
            if high <= low {
                let reason = format!("is {high}, must exceed low_freq_factor {low}");
                return Err(dict.error("high_freq_factor", reason));
            }
            Ok(RopeScaling::Llama3 {
                factor: dict.positive("factor")?,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position: original()?,
            })
        }
        other => {
            let reason = format!("`{other}` is not supported; supported: {ROPE_TYPES}");
            Err(dict.error("rope_type", reason))
        }
    }
}

/// Values that are fine by themselves can still give no usable table (theta 1 with YaRN, overflow).
fn check(fields: &Fields<'_>, name: &str, config: &RopeConfig) -> Result<()> {
    let frequencies =
        config.inverse_frequencies().map_err(|e| fields.error(name, format!("gives no rotary table: {e}")))?;
    let factor = config.attention_factor();
    let usable = |v: f64| v.is_finite() && v > 0.0;
    match frequencies.iter().copied().chain([factor]).find(|&v| !usable(v)) {
        None => Ok(()),
        Some(v) => Err(fields.error(name, format!("gives a rotary frequency or factor of {v}"))),
    }
}

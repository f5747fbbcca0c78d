//! MLX checkpoints: `weight` U32 `[N, K bits / 32]` with a group of K for each scale.
//!
//! `affine`: `scales` and `biases` `[N, G]`, `W = s * q + beta` with codes of 2, 3, 4, 5, 6 or 8 bits in one LSB-first
//! stream a row. `mxfp4`, `nvfp4` and `mxfp8`: `scales` U8 and no `biases`. All map onto native formats unchanged (mxfp8
//! with its scales in f16 or f32). The tensors tell bits, group size and mode.

use marlin_formats::{DType, e8m0};
use marlin_ops::{ExpertWeights, Weight};

use super::codes::{transpose, unpack_rows};
use super::grid::{Affine, Codes, fp8_weight};
use super::mxfp4::block_weight;
use super::stored::Stored;
use crate::Checkpoint;
use crate::error::Result;

/// `None` when the module is not quantized.
pub(super) fn weight(stored: &Stored<'_>, n: usize, k: usize) -> Result<Option<Weight>> {
    if stored.dtype(".weight") != Some(DType::U32) {
        return Ok(None);
    }
    let shape = stored.shape(".weight")?;
    let fits = |bits: &usize| (k * bits).is_multiple_of(32) && shape == [n, k * bits / 32];
    let bits = [2, 3, 4, 5, 6, 8].into_iter().find(fits).ok_or_else(|| {
        stored.error(".weight", format!("has shape {shape:?}, which no width of 2 to 8 bits gives for [{n}, {k}]"))
    })?;
    let groups = match stored.shape(".scales")? {
        [rows, groups] if *rows == n && *groups > 0 && k.is_multiple_of(*groups) => *groups,
        other => {
            let reason = format!("has shape {other:?}, expected [{n}, a divisor of {k}]");
            return Err(stored.error(".scales", reason));
        }
    };
    let words = stored.words(".weight", shape)?;
    if !stored.has(".biases") {
        return block_mode(stored, [n, k], bits, groups, &words).map(Some);
    }
    let scales = stored.floats(".scales", &[n, groups])?;
    let offsets = stored.floats(".biases", &[n, groups])?;
    let codes = match bits {
        2 | 4 | 8 => Codes::Words(transpose(&words, words.len() / n)),
        _ => Codes::Unpacked(unpack_rows(&words, shape[1], bits as u32, k)),
    };
    let affine = Affine {
        bits: bits as u32,
        out_features: n,
        in_features: k,
        group_size: k / groups,
        codes,
        scales: transpose(&scales.values, groups),
        offsets: transpose(&offsets.values, groups),
        dtype: scales.dtype,
    };
    affine.into_weight(stored, ".weight").map(Some)
}

/// A module without offsets: the scale's group tells the mode.
fn block_mode(stored: &Stored<'_>, [n, k]: [usize; 2], bits: usize, groups: usize, words: &[u32]) -> Result<Weight> {
    let scales = stored.bytes(".scales", &[DType::U8], "U8 (a module without `biases`)", &[n, groups])?;
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    match (bits, k / groups) {
        (4, 32) => block_weight(stored, ".weight", [n, k], &bytes, &scales, None),
        (4, 16) => block_weight(stored, ".weight", [n, k], &bytes, &scales, Some(1.0)),
        (8, 32) => {
            let decode = |(i, byte): (usize, u8)| {
                e8m0::decode(byte).map_err(|_| stored.error(".scales", format!("holds NaN (255) at element {i}")))
            };
            let scales =
                transpose(&scales, groups).into_iter().enumerate().map(decode).collect::<Result<Vec<f32>>>()?;
            fp8_weight(stored, ".weight", [n, k], 32, &bytes, &scales)
        }
        (bits, group_size) => {
            let reason = format!("has {bits}-bit codes in groups of {group_size} without `biases`: no known mode");
            Err(stored.error(".weight", reason))
        }
    }
}

/// Experts stacked as `{mlp}.switch_mlp.{gate,up,down}_proj.*`, `None` when they are not. `prefix` is `{mlp}.experts`.
pub(super) fn experts(
    checkpoint: &Checkpoint,
    prefix: &str,
    count: usize,
    hidden: usize,
    intermediate: usize,
) -> Result<Option<Vec<ExpertWeights>>> {
    let Some(mlp) = prefix.strip_suffix(".experts") else { return Ok(None) };
    let [gate, up, down] = ["gate", "up", "down"].map(|name| format!("{mlp}.switch_mlp.{name}_proj"));
    if !checkpoint.contains(&format!("{gate}.weight")) {
        return Ok(None);
    }
    let projection = |module: &str, e: usize, n: usize, k: usize| {
        let stored = Stored::slice(checkpoint, module, e, count);
        match weight(&stored, n, k)? {
            Some(weight) => Ok(weight),
            None => super::dense_slice(&stored, n, k),
        }
    };
    let experts = (0..count).map(|e| {
        Ok(ExpertWeights {
            gate: projection(&gate, e, intermediate, hidden)?,
            up: projection(&up, e, intermediate, hidden)?,
            down: projection(&down, e, hidden, intermediate)?,
        })
    });
    experts.collect::<Result<Vec<_>>>().map(Some)
}

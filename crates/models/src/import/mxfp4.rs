//! MXFP4 experts as gpt-oss publishes them, and the block formats that other methods share.
//!
//! `{experts}.gate_up_proj_blocks` U8 `[E, 2 I, H/32, 16]` with `_scales` U8 `[E, 2 I, H/32]` and `gate_up_proj_bias`
//! `[E, 2 I]`, rows of gate (even) and up (odd) in turn; `down_proj_*` likewise. Codes and scales move unchanged.

use marlin_formats::{DType, Format, Scheme};
use marlin_ops::{ExpertWeights, Weight};

use super::codes::{transpose, transpose_bytes};
use super::grid::quantized;
use super::stored::Stored;
use crate::Checkpoint;
use crate::error::Result;

/// The experts below `prefix`, `None` when they are not stored like this.
pub(super) fn experts(
    checkpoint: &Checkpoint,
    prefix: &str,
    count: usize,
    hidden: usize,
    intermediate: usize,
) -> Result<Option<Vec<ExpertWeights>>> {
    let [gate_up, down] = ["gate_up_proj", "down_proj"].map(|name| format!("{prefix}.{name}"));
    if !checkpoint.contains(&format!("{gate_up}_blocks")) {
        return Ok(None);
    }
    let experts = (0..count).map(|e| {
        let gate_up = Stored::slice(checkpoint, &gate_up, e, count);
        let down = Stored::slice(checkpoint, &down, e, count);
        let gate = projection(&gate_up, intermediate, hidden, 0, 2)?;
        let up = projection(&gate_up, intermediate, hidden, 1, 2)?;
        Ok(ExpertWeights { gate, up, down: projection(&down, hidden, intermediate, 0, 1)? })
    });
    experts.collect::<Result<Vec<_>>>().map(Some)
}

/// Rows `first`, `first + step`, ... of a stacked projection.
fn projection(stored: &Stored<'_>, n: usize, k: usize, first: usize, step: usize) -> Result<Weight> {
    if !k.is_multiple_of(32) {
        return Err(stored.error("_blocks", format!("is for {k} channels, not a multiple of 32")));
    }
    let blocks = stored.bytes("_blocks", &[DType::U8], "U8", &[n * step, k / 32, 16])?;
    let scales = stored.bytes("_scales", &[DType::U8], "U8", &[n * step, k / 32])?;
    let rows = |bytes: &[u8], width: usize| -> Vec<u8> {
        bytes.chunks_exact(width).skip(first).step_by(step).flatten().copied().collect()
    };
    let weight = block_weight(stored, "_blocks", [n, k], &rows(&blocks, k / 2), &rows(&scales, k / 32), None)?;
    if !stored.has("_bias") {
        return Ok(weight);
    }
    let bias = stored.floats("_bias", &[n * step])?.values;
    weight.with_bias(bias.into_iter().skip(first).step_by(step).collect()).map_err(stored.refused("_bias"))
}

/// E2M1 codes `[N, K/2]`, two a byte, the even channel low, with one byte of scale a group `[N, G]`: MXFP4, or NVFP4
/// with its tensor scale, a divisor.
pub(super) fn block_weight(
    stored: &Stored<'_>,
    suffix: &str,
    [n, k]: [usize; 2],
    codes: &[u8],
    scales: &[u8],
    tensor_scale: Option<f32>,
) -> Result<Weight> {
    let format = if tensor_scale.is_some() { Format::Nvfp4 } else { Format::Mxfp4 };
    let scheme = Scheme::with_default_group(format);
    if k % scheme.group_size != 0 {
        return Err(stored.error(suffix, format!("is for {k} channels, not a multiple of {}", scheme.group_size)));
    }
    let scales = transpose(scales, k / scheme.group_size).into_iter().map(u16::from).collect();
    quantized(scheme, k, n, transpose_bytes(codes, n), scales, Vec::new(), tensor_scale).map_err(stored.refused(suffix))
}

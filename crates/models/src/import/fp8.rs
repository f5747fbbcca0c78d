//! FP8 checkpoints: `weight` F8_E4M3 `[N, K]` times `weight_scale_inv` or `weight_scale`, one f32 for the tensor, for
//! each row or for each block (128x128 as DeepSeek publishes). Despite its name `weight_scale_inv` is a multiplier.
//!
//! The bytes stay as they are; each scale is repeated for the columns of its block, in f16 where all are exactly f16,
//! else in f32. Blocks that do not fit the native groups become dense f32, the product.

use marlin_formats::{DType, e8m0};
use marlin_ops::Weight;

use super::grid::fp8_weight;
use super::stored::Stored;
use crate::config::Fields;
use crate::error::Result;

/// What the tensors cannot tell.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    /// Rows (along N) and columns (along K) of a block.
    block: Option<[usize; 2]>,
}

/// Scales of activations, which weights do not need.
const ACTIVATION_SCALES: [&str; 4] = [".input_scale", ".activation_scale", ".input_scale_ub", ".input_global_scale"];

/// The block of a scale grid when the config names none.
const DEFAULT_BLOCK: [usize; 2] = [128, 128];

impl Config {
    pub(super) fn read(fields: &Fields<'_>) -> Result<Self> {
        if let Some(fmt) = fields.optional_string("fmt")?.filter(|fmt| !["e4m3", "e4m3fn"].contains(fmt)) {
            return Err(fields.error("fmt", format!("`{fmt}` is not supported; supported: e4m3")));
        }
        let block = match fields.list("weight_block_size")? {
            None => None,
            Some(list) => {
                let sizes: Vec<usize> =
                    list.iter().filter_map(|v| v.as_u64()).filter_map(|v| usize::try_from(v).ok()).collect();
                match sizes[..] {
                    [n, k] if list.len() == 2 && n > 0 && k > 0 => Some([n, k]),
                    _ => return Err(fields.error("weight_block_size", "is not two whole numbers above 0")),
                }
            }
        };
        Ok(Self { block })
    }

    /// `None` when the module is not quantized.
    pub(super) fn weight(&self, stored: &Stored<'_>, n: usize, k: usize) -> Result<Option<Weight>> {
        if stored.dtype(".weight") != Some(DType::F8E4M3) {
            return Ok(None);
        }
        weight(stored, n, k, self.block).map(Some)
    }
}

/// An FP8 module with scales per tensor, row or block.
pub(super) fn weight(stored: &Stored<'_>, n: usize, k: usize, block: Option<[usize; 2]>) -> Result<Weight> {
    stored.ignore(&ACTIVATION_SCALES)?;
    let suffix = if stored.has(".weight_scale_inv") { ".weight_scale_inv" } else { ".weight_scale" };
    let bytes = stored.bytes(".weight", &[DType::F8E4M3], "F8_E4M3", &[n, k])?;
    let shape = stored.shape(suffix)?;
    let values = scale_values(stored, suffix, shape)?;
    let [rows, columns] = match shape {
        [] | [1] | [1, 1] => [1, 1],
        [rows] if *rows == n => [n, 1],
        [rows, columns] => [*rows, *columns],
        _ => return Err(stored.error(suffix, format!("has shape {shape:?}, no scales for a weight of [{n}, {k}]"))),
    };
    let Some([block_n, block_k]) = block_size(block, [n, k], [rows, columns]) else {
        let reason = format!("has shape {shape:?}, no blocks of a weight of [{n}, {k}]");
        return Err(stored.error(suffix, reason));
    };
    let groups = k.div_ceil(block_k);
    let mut scales = Vec::with_capacity(groups * n);
    for g in 0..groups {
        scales.extend((0..n).map(|row| values[row / block_n * columns + g]));
    }
    fp8_weight(stored, ".weight", [n, k], block_k, &bytes, &scales)
}

/// Scales as f32; bytes are E8M0.
fn scale_values(stored: &Stored<'_>, suffix: &str, shape: &[usize]) -> Result<Vec<f32>> {
    if stored.dtype(suffix) != Some(DType::U8) {
        return Ok(stored.floats(suffix, shape)?.values);
    }
    let bytes = stored.bytes(suffix, &[DType::U8], "U8", shape)?;
    let decode = |(i, &byte): (usize, &u8)| {
        e8m0::decode(byte).map_err(|_| stored.error(suffix, format!("holds NaN (255) at element {i}")))
    };
    bytes.iter().enumerate().map(decode).collect()
}

/// The rows and columns of a block, so that blocks of `[n, k]` make the `grid`.
fn block_size(named: Option<[usize; 2]>, [n, k]: [usize; 2], grid: [usize; 2]) -> Option<[usize; 2]> {
    let makes_grid = |[bn, bk]: [usize; 2]| grid == [n.div_ceil(bn), k.div_ceil(bk)];
    // Per tensor and per row need no block size, and a config may name one for other modules.
    if grid == [1, 1] {
        return Some([n, k]);
    }
    if grid == [n, 1] {
        return Some([1, k]);
    }
    match named {
        Some(block) => makes_grid(block).then_some(block),
        None if makes_grid(DEFAULT_BLOCK) => Some(DEFAULT_BLOCK),
        None => {
            let [rows, columns] = grid;
            let whole = rows > 0 && columns > 0 && n % rows == 0 && k % columns == 0;
            whole.then(|| [n / rows, k / columns])
        }
    }
}

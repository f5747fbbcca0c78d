//! bitsandbytes checkpoints.
//!
//! 4 bits (`nf4`, `fp4`): `weight` U8 `[N K / 2, 1]`, two codes a byte, the first one high, over the flattened matrix;
//! `weight.absmax` a block (F32, or U8 with `weight.nested_absmax` and `weight.nested_quant_map`),
//! `weight.quant_map` F32 `[16]`, and `weight.quant_state.bitsandbytes__*`, JSON. `W = level * absmax`, in the state's
//! dtype. NF4 whose block maxima are exactly f16 (those of f16 and bf16 weights without double quantization) and whose
//! blocks do not cross rows stays native; the rest becomes dense values in the state's dtype, as the source computes.
//!
//! 8 bits (LLM.int8): `weight` I8 `[N, K]`, `SCB` F32 `[N]`: `W = (q + 128) * s - 128 * s` with `s = SCB / 127` in f32,
//! which differs from the source's `q * SCB / 127` by at most 2^-22 of the row's largest weight.

use marlin_formats::{DType, Format, Scheme, normal_float};
use marlin_ops::Weight;
use serde_json::Value;

use super::grid::{Affine, Codes, dense, is_f16, native_group_size, quantized};
use super::stored::Stored;
use crate::error::Result;

/// Names of the state tensor, one for each kind of codes.
const STATES: [&str; 2] = [".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4"];
/// Largest state that is not taken for a damaged file.
const MAX_STATE_BYTES: usize = 1 << 16;

/// `None` when the module is not quantized.
pub(super) fn weight(stored: &Stored<'_>, n: usize, k: usize) -> Result<Option<Weight>> {
    match stored.dtype(".weight") {
        Some(DType::I8) => int8(stored, n, k).map(Some),
        Some(DType::U8) => four_bit(stored, n, k).map(Some),
        _ => Ok(None),
    }
}

fn int8(stored: &Stored<'_>, n: usize, k: usize) -> Result<Weight> {
    if stored.has(".weight_format") {
        let format = stored.bytes(".weight_format", &[DType::U8], "U8", stored.shape(".weight_format")?)?;
        if format != [0] {
            return Err(stored.error(".weight_format", format!("is {format:?}, only 0 (rows in order) is read")));
        }
    }
    let bytes = stored.bytes(".weight", &[DType::I8], "I8", &[n, k])?;
    let scales: Vec<f32> = stored.floats(".SCB", &[n])?.values.iter().map(|scb| scb / 127.0).collect();
    // Two's complement to offset binary.
    let codes = Codes::Unpacked(bytes.into_iter().map(|b| b ^ 0x80).collect());
    let offsets = scales.iter().map(|s| -128.0 * s).collect();
    let (bits, dtype) = (8, DType::F32);
    Affine { bits, out_features: n, in_features: k, group_size: k, codes, scales, offsets, dtype }
        .into_weight(stored, ".weight")
}

fn four_bit(stored: &Stored<'_>, n: usize, k: usize) -> Result<Weight> {
    let state_name = STATES.into_iter().find(|name| stored.has(name)).ok_or_else(|| {
        stored.error(
            ".weight",
            format!("has bytes, but there is neither `{}` nor `{}`", &STATES[0][1..], &STATES[1][1..]),
        )
    })?;
    let state = State::read(stored, state_name, n, k)?;
    let elements = n * k;
    let shape = stored.shape(".weight")?;
    let bytes = stored.bytes(".weight", &[DType::U8], "U8", shape)?;
    if bytes.len() != elements.div_ceil(2) {
        let reason = format!("has shape {shape:?}, expected {} bytes for [{n}, {k}]", elements.div_ceil(2));
        return Err(stored.error(".weight", reason));
    }
    let levels = stored.floats(".weight.quant_map", &[16])?.values;
    let absmax = state.absmax(stored, elements)?;
    let code = |i: usize| usize::from(if i.is_multiple_of(2) { bytes[i / 2] >> 4 } else { bytes[i / 2] & 15 });
    let native =
        (levels == normal_float::NF4 && k.is_multiple_of(state.blocksize) && absmax.iter().all(|&a| is_f16(a)))
            .then(|| native_group_size(Format::Nf4, state.blocksize, k))
            .flatten();
    if let Some(group_size) = native {
        let layout = Format::Nf4.layout();
        let codes: Vec<u8> = (0..elements).map(|i| code(i) as u8).collect();
        let words = super::codes::pack_native(&codes, layout, n, k);
        let half: Vec<u16> = absmax.iter().map(|&a| half::f16::from_f32(a).to_bits()).collect();
        let scales = super::codes::transpose(&half, k / state.blocksize);
        let scheme = Scheme { format: Format::Nf4, group_size };
        return quantized(scheme, k, n, words, scales, Vec::new(), None).map_err(stored.refused(".weight"));
    }
    let values: Vec<f32> = (0..elements).map(|i| levels[code(i)] * absmax[i / state.blocksize]).collect();
    dense(stored, ".weight", state.dtype, n, k, &values)
}

/// What the JSON of the state tensor says.
struct State {
    blocksize: usize,
    dtype: DType,
    nested: Option<Nested>,
}

/// Double quantization of the block maxima.
struct Nested {
    blocksize: usize,
    offset: f32,
}

impl State {
    fn read(stored: &Stored<'_>, name: &str, n: usize, k: usize) -> Result<Self> {
        let shape = stored.shape(name)?;
        if shape.iter().product::<usize>() > MAX_STATE_BYTES {
            return Err(stored.error(name, format!("has shape {shape:?}, too large for a description")));
        }
        let bytes = stored.bytes(name, &[DType::U8], "U8", shape)?;
        let json: Value =
            serde_json::from_slice(&bytes).map_err(|e| stored.error(name, format!("does not hold JSON: {e}")))?;
        let fail = |field: &str| stored.error(name, format!("says {field} {}", json[field]));
        let size = |field: &str| {
            let value = json[field].as_u64().and_then(|v| usize::try_from(v).ok()).filter(|&v| v > 0);
            value.ok_or_else(|| fail(field))
        };
        let dtype = match json["dtype"].as_str() {
            Some("float32") => DType::F32,
            Some("float16") => DType::F16,
            Some("bfloat16") => DType::BF16,
            _ => return Err(fail("dtype")),
        };
        let dims: Option<Vec<u64>> =
            json["shape"].as_array().map(|dims| dims.iter().filter_map(Value::as_u64).collect());
        if dims.is_some_and(|dims| dims != [n as u64, k as u64]) {
            return Err(stored.error(name, format!("says shape {}, the model has [{n}, {k}]", json["shape"])));
        }
        let nested = match stored.has(".weight.nested_absmax") {
            false => None,
            true => {
                let offset = json["nested_offset"].as_f64().map(|v| v as f32).filter(|v| v.is_finite());
                Some(Nested {
                    blocksize: size("nested_blocksize")?,
                    offset: offset.ok_or_else(|| fail("nested_offset"))?,
                })
            }
        };
        Ok(Self { blocksize: size("blocksize")?, dtype, nested })
    }

    /// The maximum of every block.
    fn absmax(&self, stored: &Stored<'_>, elements: usize) -> Result<Vec<f32>> {
        let blocks = elements.div_ceil(self.blocksize);
        let Some(nested) = &self.nested else {
            return Ok(stored.floats(".weight.absmax", &[blocks])?.values);
        };
        let codes = stored.bytes(".weight.absmax", &[DType::U8], "U8 (double quantization)", &[blocks])?;
        let map = stored.floats(".weight.nested_quant_map", &[256])?.values;
        let maxima = stored.floats(".weight.nested_absmax", &[blocks.div_ceil(nested.blocksize)])?.values;
        let value = |(b, &q): (usize, &u8)| map[usize::from(q)] * maxima[b / nested.blocksize] + nested.offset;
        Ok(codes.iter().enumerate().map(value).collect())
    }
}

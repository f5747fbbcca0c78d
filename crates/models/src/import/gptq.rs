//! GPTQ checkpoints of AutoGPTQ and GPTQModel: `W = (q - z) * s`, codes packed along K.
//!
//! Tensors of a module: `qweight` I32 `[K * bits / 32, N]`, `qzeros` I32 `[G, N * bits / 32]`, `scales` `[G, N]`, `g_idx`
//! I32 `[K]` (the group of every input channel). `checkpoint_format` `gptq` stores `z - 1`, `gptq_v2` and `gptq_p` store
//! `z`; `marlin` is the layout of the CUDA kernel of that name with tensors `B` and `s`.
//!
//! The codes move into the native format unchanged; where `g_idx` is not `k / group_size`, sorted by group, with the channels
//! of their rows beside them.

use marlin_formats::DType;
use marlin_ops::Weight;

use super::codes::{planar_code, unpack_columns, unpack_rows};
use super::grid::{Codes, IntGrid};
use super::stored::Stored;
use crate::config::Fields;
use crate::error::Result;

/// What the tensors cannot tell.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    group_size: Option<usize>,
    zero_points: ZeroPoints,
    planar: bool,
}

/// How `qzeros` relates to zero points.
#[derive(Clone, Copy, Debug, PartialEq)]
enum ZeroPoints {
    /// `z - 1` in every field.
    MinusOne,
    /// `z - 1` by a subtraction from whole words, whose borrows reach other fields where `z` is 0.
    MinusOneWords,
    /// `z`.
    Plain,
}

/// Formats that `checkpoint_format` may name.
const FORMATS: &str = "gptq, gptq_v2, gptq_p, marlin";

impl Config {
    pub(super) fn read(fields: &Fields<'_>) -> Result<Self> {
        let named = fields.optional_string("checkpoint_format")?.or(fields.optional_string("format")?);
        let format = named.unwrap_or("gptq");
        let bits = fields.optional_integer("bits", 1, 16)?;
        if let Some(bits) = bits.filter(|bits| !(2..=8).contains(bits)) {
            return Err(fields.error("bits", format!("is {bits}, expected 2 to 8")));
        }
        let quantizer = match fields.child("meta")? {
            Some(meta) => match meta.get("quantizer") {
                Some(serde_json::Value::Array(list)) => list.iter().filter_map(|v| v.as_str()).collect::<String>(),
                Some(serde_json::Value::String(name)) => name.clone(),
                _ => String::new(),
            },
            None => String::new(),
        };
        let (zero_points, planar) = match format {
            "gptq" if quantizer.contains("gptqmodel") => (ZeroPoints::MinusOneWords, false),
            "gptq" => (ZeroPoints::MinusOne, false),
            "gptq_v2" => (ZeroPoints::Plain, false),
            "gptq_p" => (ZeroPoints::Plain, true),
            // The words of this layout are told by their names.
            "marlin" => (ZeroPoints::Plain, false),
            other => {
                let reason = format!("`{other}` is not supported; supported: {FORMATS}");
                return Err(fields.error("checkpoint_format", reason));
            }
        };
        Ok(Self { group_size: super::group_size(fields, "group_size")?, zero_points, planar })
    }

    /// `None` when the module is not quantized.
    pub(super) fn weight(&self, stored: &Stored<'_>, n: usize, k: usize) -> Result<Option<Weight>> {
        if stored.has(".B") && stored.has(".s") {
            return super::marlin::weight(stored, n, k).map(Some);
        }
        if !stored.has(".qweight") {
            return Ok(None);
        }
        let bits = self.bits(stored, n, k)?;
        let (scales, dtype) = super::column_scales(stored, ".scales", n)?;
        let groups = scales.len() / n;
        let group_size = super::resolve_group_size(self.group_size, groups, k)
            .ok_or_else(|| stored.error(".scales", format!("has {groups} groups, which {k} channels do not make")))?;
        let words = stored.words(".qweight", &[(k * bits as usize).div_ceil(32), n])?;
        let codes = match bits {
            2 | 4 | 8 => Codes::Words(words),
            _ if self.is_planar(bits) => {
                let code = |i: usize| planar_code(|w| words[w * n + i / k], i % k, bits);
                Codes::Unpacked((0..n * k).map(code).collect())
            }
            _ => Codes::Unpacked(unpack_columns(&words, n, bits, k)),
        };
        let zeros = self.zeros(stored, bits, groups, n)?;
        let grid = IntGrid { bits, out_features: n, in_features: k, group_size, codes, scales, zeros, dtype };
        match group_index(stored, ".g_idx", k, groups, group_size)? {
            None => grid.into_weight(stored, ".qweight").map(Some),
            Some(index) => grid.into_ordered_weight(stored, ".qweight", &index).map(Some),
        }
    }

    /// The width of the codes, from the rows of `qweight`.
    fn bits(&self, stored: &Stored<'_>, n: usize, k: usize) -> Result<u32> {
        let shape = stored.shape(".qweight")?;
        let fits = |bits: &u32| shape == [(k * *bits as usize).div_ceil(32), n];
        let known = [2u32, 3, 4, 5, 6, 7, 8];
        let bits = known.into_iter().find(fits).ok_or_else(|| {
            stored.error(".qweight", format!("has shape {shape:?}, which no width of 2 to 8 bits gives for [{n}, {k}]"))
        })?;
        // Codes of these widths are read in whole blocks.
        let odd = !matches!(bits, 2 | 4 | 8);
        if odd && (!k.is_multiple_of(32) || self.is_planar(bits) && !n.is_multiple_of(32)) {
            return Err(stored.error(".qweight", format!("has {bits}-bit codes, which need multiples of 32 channels")));
        }
        if matches!(bits, 5..=7) && !self.planar {
            return Err(stored.error(".qweight", format!("has {bits}-bit codes, which only `gptq_p` stores")));
        }
        Ok(bits)
    }

    fn is_planar(&self, bits: u32) -> bool {
        self.planar && matches!(bits, 3 | 5 | 6 | 7)
    }

    /// Zero points `[G, N]`.
    fn zeros(&self, stored: &Stored<'_>, bits: u32, groups: usize, n: usize) -> Result<Vec<f32>> {
        let per_row = (n * bits as usize).div_ceil(32);
        let mut words = stored.words(".qzeros", &[groups, per_row])?;
        let modulus = 1u32 << bits;
        let unpack = |words: &[u32]| match self.is_planar(bits) {
            true => {
                let code = |i: usize| planar_code(|w| words[i / n * per_row + w], i % n, bits);
                (0..groups * n).map(code).collect()
            }
            false => unpack_rows(words, per_row, bits, n),
        };
        let fields: Vec<u8> = unpack(&words);
        if self.zero_points == ZeroPoints::Plain {
            return Ok(fields.into_iter().map(f32::from).collect());
        }
        // Writers disagree on z = 0 only: the field alone wraps, or the subtraction borrows from the next field.
        let wrapped = fields.iter().any(|&f| u32::from(f) == modulus - 1);
        if wrapped {
            let whole = self.zero_points == ZeroPoints::MinusOneWords && matches!(bits, 2 | 4 | 8);
            let rule = if whole { "whole words" } else { "each field" };
            stored.warn(format!("zero points of 0 stored as `z - 1`; read by adding 1 to {rule}"));
            if words.iter().all(|&w| w == u32::MAX) {
                stored.warn("every stored zero point is all ones; the file is probably damaged");
            }
            if whole {
                let ones = u32::MAX / (modulus - 1);
                words.iter_mut().for_each(|word| *word = word.wrapping_add(ones));
                let fields: Vec<u8> = unpack(&words);
                return Ok(fields.into_iter().map(f32::from).collect());
            }
        }
        Ok(fields.into_iter().map(|f| ((u32::from(f) + 1) % modulus) as f32).collect())
    }
}

/// The group of every channel, `None` where it is `k / group_size`.
pub(super) fn group_index(
    stored: &Stored<'_>,
    suffix: &str,
    k: usize,
    groups: usize,
    group_size: usize,
) -> Result<Option<Vec<usize>>> {
    if !stored.has(suffix) {
        return Ok(None);
    }
    let bytes = stored.bytes(suffix, &[DType::I32], "I32", &[k])?;
    let index: Vec<i32> = super::stored::chunks(&bytes, i32::from_le_bytes);
    // compressed-tensors fills an unused index with -1.
    if index.iter().all(|&g| g == -1) {
        return Ok(None);
    }
    let checked = index.iter().enumerate().map(|(i, &g)| match usize::try_from(g) {
        Ok(g) if g < groups => Ok(g),
        _ => Err(stored.error(suffix, format!("puts channel {i} into group {g}, there are {groups}"))),
    });
    let index = checked.collect::<Result<Vec<usize>>>()?;
    let in_order = index.iter().enumerate().all(|(i, &g)| g == i / group_size);
    Ok((!in_order).then_some(index))
}

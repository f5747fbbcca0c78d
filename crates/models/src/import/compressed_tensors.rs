//! compressed-tensors checkpoints (llm-compressor).
//!
//! `pack-quantized`: `weight_packed` I32 `[N, ceil(K bits / 32)]` of `q + 2^(bits-1)`, `weight_scale` `[N, G]`, `[N, 1]` or
//! `[1]`, `weight_shape` (N, K), `weight_zero_point` I32 `[ceil(N bits / 32), G]` packed along N, `weight_g_idx`.
//! `int-quantized`: `weight` I8 `[N, K]`. `nvfp4-pack-quantized` and `mxfp4-pack-quantized`: `weight_packed` U8 `[N, K/2]`.
//! `float-quantized`, `naive-quantized` and `mxfp8-quantized`: `weight` F8_E4M3. The tensors tell which; the config gives
//! the width of packed codes.
//!
//! Everything but scales that no native form holds exactly, and groups of uneven lengths, stays in codes; those become dense
//! values in the scales' dtype.

use marlin_formats::DType;
use marlin_ops::Weight;
use regex::Regex;
use serde_json::Value;

use super::codes::{pack_native, transpose, unpack_rows, unpack_rows_whole};
use super::grid::{Codes, IntGrid};
use super::mxfp4::block_weight;
use super::stored::Stored;
use crate::config::Fields;
use crate::error::Result;

/// What the tensors cannot tell.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    groups: Vec<Group>,
}

/// One of `config_groups`.
#[derive(Clone, Debug)]
struct Group {
    targets: Vec<Target>,
    bits: u32,
    group_size: Option<usize>,
    block: Option<[usize; 2]>,
}

/// Which modules a group is for.
#[derive(Clone, Debug)]
enum Target {
    /// A module path.
    Path(String),
    /// A pattern that matches from the start of the path.
    Pattern(Regex),
}

/// Formats that are read.
const FORMATS: [&str; 8] = [
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
];

impl Config {
    pub(super) fn read(fields: &Fields<'_>) -> Result<Self> {
        let check = |name: &str, format: Option<&str>| match format {
            Some(format) if !FORMATS.contains(&format) => {
                let reason = format!("`{format}` is not supported; supported: {}", FORMATS.join(", "));
                Err(fields.error(name, reason))
            }
            _ => Ok(()),
        };
        check("format", fields.optional_string("format")?)?;
        let Some(groups) = fields.get("config_groups") else {
            return Err(fields.error("config_groups", "is missing"));
        };
        let Value::Object(groups) = groups else {
            return Err(fields.error("config_groups", "is not an object"));
        };
        let mut read = Vec::new();
        for (name, group) in groups {
            let name = format!("config_groups.{name}");
            check(&format!("{name}.format"), group["format"].as_str())?;
            read.push(Group::read(fields, &name, group)?);
        }
        Ok(Self { groups: read })
    }

    /// The group of a module: by path, by pattern, or by class (`Linear`), which every module here has.
    fn group(&self, module: &str) -> Option<&Group> {
        let by = |rank: u32| self.groups.iter().find(move |group| group.targets.iter().any(|t| t.rank(module) == rank));
        by(3).or_else(|| by(2)).or_else(|| by(1))
    }

    /// `None` when the module is not quantized.
    pub(super) fn weight(&self, stored: &Stored<'_>, n: usize, k: usize) -> Result<Option<Weight>> {
        let group = self.group(stored.module());
        let weight = match (stored.dtype(".weight_packed"), stored.dtype(".weight")) {
            (Some(DType::U8), _) => fp4(stored, n, k),
            (Some(_), _) => {
                let group = group.ok_or_else(|| {
                    stored.error(".weight_packed", "is of a module that no target of config_groups matches")
                })?;
                pack_quantized(stored, group, n, k)
            }
            (None, Some(DType::I8)) => int_quantized(stored, group.and_then(|g| g.group_size), n, k),
            (None, Some(DType::F8E4M3)) => super::fp8::weight(stored, n, k, group.and_then(|g| g.block)),
            _ => return Ok(None),
        };
        stored.ignore(&[
            ".input_scale",
            ".input_global_scale",
            ".input_zero_point",
            ".output_scale",
            ".weight_shape",
        ])?;
        weight.map(Some)
    }
}

impl Group {
    fn read(fields: &Fields<'_>, name: &str, group: &Value) -> Result<Self> {
        let weights = &group["weights"];
        let bits = match weights["num_bits"].as_u64() {
            Some(bits @ 1..=8) => bits as u32,
            _ => {
                let reason = format!("is {}, expected 1 to 8", weights["num_bits"]);
                return Err(fields.error(&format!("{name}.weights.num_bits"), reason));
            }
        };
        let size = |value: &Value| value.as_u64().and_then(|v| usize::try_from(v).ok()).filter(|&v| v > 0);
        let block = match &weights["block_structure"] {
            Value::Array(sizes) => match sizes.iter().map(size).collect::<Option<Vec<_>>>().as_deref() {
                Some([n, k]) => Some([*n, *k]),
                _ => {
                    let field = format!("{name}.weights.block_structure");
                    return Err(fields.error(&field, "is not two whole numbers above 0"));
                }
            },
            _ => None,
        };
        let mut targets = Vec::new();
        for target in group["targets"].as_array().map(Vec::as_slice).unwrap_or_default() {
            let field = format!("{name}.targets");
            let Some(text) = target.as_str() else {
                return Err(fields.error(&field, format!("holds {target}, expected names")));
            };
            targets.push(match text.strip_prefix("re:") {
                None => Target::Path(text.to_owned()),
                Some(pattern) => Target::Pattern(
                    Regex::new(pattern)
                        .map_err(|e| fields.error(&field, format!("holds `{text}`, no regular expression: {e}")))?,
                ),
            });
        }
        Ok(Self { targets, bits, group_size: size(&weights["group_size"]), block })
    }
}

impl Target {
    /// How closely the target names the module: 3 by path, 2 by pattern, 1 by class, 0 not at all.
    fn rank(&self, module: &str) -> u32 {
        match self {
            Target::Path(path) if path == module => 3,
            Target::Pattern(pattern) if pattern.find(module).is_some_and(|m| m.start() == 0) => 2,
            Target::Path(class) if class == "Linear" || class == "Embedding" => 1,
            _ => 0,
        }
    }
}

/// NVFP4 with `weight_global_scale`, a divisor; MXFP4 without.
fn fp4(stored: &Stored<'_>, n: usize, k: usize) -> Result<Weight> {
    if !k.is_multiple_of(16) {
        return Err(stored.error(".weight_packed", format!("is for {k} channels, not a multiple of 16")));
    }
    let codes = stored.bytes(".weight_packed", &[DType::U8], "U8", &[n, k / 2])?;
    let (group_size, dtype, name) = match stored.dtype(".weight_scale") {
        Some(DType::F8E4M3) => (16, DType::F8E4M3, "F8_E4M3"),
        _ => (32, DType::U8, "F8_E4M3 (NVFP4) or U8 (MXFP4)"),
    };
    let scales = stored.bytes(".weight_scale", &[dtype], name, &[n, k / group_size])?;
    let tensor_scale = match dtype {
        DType::F8E4M3 => Some(stored.scalar(".weight_global_scale")?),
        _ => None,
    };
    block_weight(stored, ".weight_packed", [n, k], &codes, &scales, tensor_scale)
}

/// Scales `[G, N]` and the group size.
fn scales(stored: &Stored<'_>, group_size: Option<usize>, n: usize, k: usize) -> Result<(Vec<f32>, DType, usize)> {
    let shape = stored.shape(".weight_scale")?;
    let floats = stored.floats(".weight_scale", shape)?;
    let groups = match shape {
        [] | [1] if floats.values.len() == 1 => return Ok((vec![floats.values[0]; n], floats.dtype, k)),
        [rows] if *rows == n => 1,
        [rows, groups] if *rows == n && *groups > 0 => *groups,
        _ => {
            let reason = format!("has shape {shape:?}, expected [{n}, groups], [{n}, 1] or [1]");
            return Err(stored.error(".weight_scale", reason));
        }
    };
    let size = super::resolve_group_size(group_size, groups, k).filter(|size| size * groups == k || groups == 1);
    let size = size.ok_or_else(|| {
        stored.error(".weight_scale", format!("has {groups} groups, which do not divide {k} channels"))
    })?;
    Ok((transpose(&floats.values, groups), floats.dtype, size))
}

fn pack_quantized(stored: &Stored<'_>, group: &Group, n: usize, k: usize) -> Result<Weight> {
    check_shape(stored, n, k)?;
    let bits = group.bits;
    let (scales, dtype, group_size) = scales(stored, group.group_size, n, k)?;
    let groups = scales.len() / n;
    let (dense, whole) = ((k * bits as usize).div_ceil(32), k.div_ceil(32 / bits as usize));
    let width = match stored.shape(".weight_packed")? {
        [rows, width] if *rows == n && (*width == dense || *width == whole) => *width,
        other => {
            let reason = format!("has shape {other:?}, expected [{n}, {dense}] for {bits} bits");
            return Err(stored.error(".weight_packed", reason));
        }
    };
    let words = stored.words(".weight_packed", &[n, width])?;
    let codes = match bits {
        2 | 4 | 8 => Codes::Words(transpose(&words, words.len() / n)),
        _ if width == dense => Codes::Unpacked(unpack_rows(&words, width, bits, k)),
        _ => Codes::Unpacked(unpack_rows_whole(&words, width, bits, k)),
    };
    let zeros = match stored.has(".weight_zero_point") {
        false => vec![(1u32 << (bits - 1)) as f32; scales.len()],
        true => zero_points(stored, bits, n, groups)?,
    };
    let grid = IntGrid { bits, out_features: n, in_features: k, group_size, codes, scales, zeros, dtype };
    match super::gptq::group_index(stored, ".weight_g_idx", k, groups, group_size)? {
        None => grid.into_weight(stored, ".weight_packed"),
        Some(index) => grid.into_ordered_weight(stored, ".weight_packed", &index),
    }
}

/// `weight_shape` must name the model's shape.
fn check_shape(stored: &Stored<'_>, n: usize, k: usize) -> Result<()> {
    let expected = [n as i64, k as i64];
    let found: Vec<i64> = match stored.dtype(".weight_shape") {
        None => return Ok(()),
        Some(DType::I32) => {
            let bytes = stored.bytes(".weight_shape", &[DType::I32], "I64 or I32", &[2])?;
            super::stored::chunks(&bytes, |b| i64::from(i32::from_le_bytes(b)))
        }
        Some(_) => {
            let bytes = stored.bytes(".weight_shape", &[DType::I64], "I64 or I32", &[2])?;
            super::stored::chunks(&bytes, i64::from_le_bytes)
        }
    };
    match found == expected {
        true => Ok(()),
        false => Err(stored.error(".weight_shape", format!("holds {found:?}, the model has {expected:?}"))),
    }
}

/// Zero points `[G, N]`, offset by `2^(bits-1)` as the codes are. Stored packed along N (`[rows, G]`), or as I8 `[N, G]`.
fn zero_points(stored: &Stored<'_>, bits: u32, n: usize, groups: usize) -> Result<Vec<f32>> {
    const NAME: &str = ".weight_zero_point";
    let middle = 1i32 << (bits - 1);
    if stored.dtype(NAME) == Some(DType::I8) {
        let shape = stored.shape(NAME)?;
        if shape.iter().product::<usize>() != n * groups {
            return Err(stored.error(NAME, format!("has shape {shape:?}, expected [{n}, {groups}]")));
        }
        let bytes = stored.bytes(NAME, &[DType::I8], "I8", shape)?;
        return Ok(transpose(&bytes, groups).into_iter().map(|b| (i32::from(b as i8) + middle) as f32).collect());
    }
    let rows = match stored.shape(NAME)? {
        [rows, columns]
            if *columns == groups
                && [(n * bits as usize).div_ceil(32), n.div_ceil(32 / bits as usize)].contains(rows) =>
        {
            *rows
        }
        other => {
            let expected = (n * bits as usize).div_ceil(32);
            return Err(stored.error(NAME, format!("has shape {other:?}, expected [{expected}, {groups}]")));
        }
    };
    let words = stored.words(NAME, &[rows, groups])?;
    let fields = match rows == (n * bits as usize).div_ceil(32) {
        // A stream down each column; the last block of 32 codes may be short.
        true => {
            let columns = transpose(&words, groups);
            unpack_rows(&columns, rows, bits, n)
        }
        false => unpack_rows_whole(&transpose(&words, groups), rows, bits, n),
    };
    Ok(fields.into_iter().map(f32::from).collect())
}

/// Signed bytes `[N, K]`.
fn int_quantized(stored: &Stored<'_>, group_size: Option<usize>, n: usize, k: usize) -> Result<Weight> {
    let bytes = stored.bytes(".weight", &[DType::I8], "I8", &[n, k])?;
    let (scales, dtype, group_size) = scales(stored, group_size, n, k)?;
    let groups = scales.len() / n;
    let zeros = match stored.has(".weight_zero_point") {
        false => vec![128.0; scales.len()],
        true if stored.shape(".weight_zero_point")?.iter().product::<usize>() == 1 && n * groups != 1 => {
            let shape = stored.shape(".weight_zero_point")?;
            let zero = stored.bytes(".weight_zero_point", &[DType::I8], "I8", shape)?[0] as i8;
            vec![f32::from(zero) + 128.0; scales.len()]
        }
        true => zero_points(stored, 8, n, groups)?,
    };
    let codes: Vec<u8> = bytes.into_iter().map(|b| b ^ 0x80).collect();
    let codes = Codes::Words(pack_native(&codes, marlin_formats::pack::Layout::Bits8, n, k));
    IntGrid { bits: 8, out_features: n, in_features: k, group_size, codes, scales, zeros, dtype }
        .into_weight(stored, ".weight")
}

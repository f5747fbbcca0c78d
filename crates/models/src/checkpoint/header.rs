//! The safetensors header: `u64` length, JSON, data (github.com/huggingface/safetensors, "Format").

use std::fmt;
use std::path::Path;

use marlin_formats::DType;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::error::{ModelError, Result};

/// Largest header the format permits.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// One tensor as the header describes it, offsets from the start of the file.
#[derive(Debug)]
pub(super) struct HeaderEntry {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub start: usize,
    pub len: usize,
}

/// Reads and checks the header of a whole safetensors file: lengths before any allocation, every offset, and that the
/// tensors cover the data exactly once, as the format demands.
pub(super) fn parse(path: &Path, file: &[u8]) -> Result<Vec<HeaderEntry>> {
    let (json, data_start) = header_json(path, file)?;
    let raw: RawHeader =
        serde_json::from_slice(json).map_err(|e| header_error(path, format!("not a tensor table: {e}")))?;
    let mut entries =
        raw.tensors.into_iter().map(|(name, raw)| entry(path, name, raw, data_start)).collect::<Result<Vec<_>>>()?;
    check_coverage(path, file.len(), data_start, &mut entries)?;
    Ok(entries)
}

/// The header's bytes and where the data starts.
fn header_json<'a>(path: &Path, file: &'a [u8]) -> Result<(&'a [u8], usize)> {
    let truncated = |expected| ModelError::Truncated { path: path.to_owned(), expected, found: file.len() as u64 };
    let (length, rest) = file.split_first_chunk::<8>().ok_or_else(|| truncated(8))?;
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        let reason = format!("header length {length} exceeds the limit of {MAX_HEADER_BYTES} bytes");
        return Err(header_error(path, reason));
    }
    let json = rest.get(..length as usize).ok_or_else(|| truncated(8 + length))?;
    Ok((json, 8 + length as usize))
}

/// Checks one entry by itself: dtype, and shape x dtype = byte length without overflow.
fn entry(path: &Path, name: String, raw: RawEntry, data_start: usize) -> Result<HeaderEntry> {
    let fail = |reason: String| Err(header_error(path, format!("tensor `{name}`: {reason}")));
    // Scales of MX formats: a byte, which other files store as U8.
    let dtype = if raw.dtype == "F8_E8M0" { Some(DType::U8) } else { DType::from_safetensors_name(&raw.dtype) };
    let Some(dtype) = dtype else {
        return Err(ModelError::TensorDType {
            path: path.to_owned(),
            tensor: name,
            found: raw.dtype,
            expected: "a safetensors type of at most 8 bytes that this project reads",
        });
    };
    let dims = raw.shape.iter().map(|&d| usize::try_from(d).ok());
    let shape: Option<Vec<usize>> = dims.collect();
    let bytes = shape
        .as_ref()
        .and_then(|shape| shape.iter().try_fold(dtype.size_in_bytes(), |product, &d| product.checked_mul(d)));
    let (Some(shape), Some(bytes)) = (shape, bytes) else {
        return fail(format!("shape {:?} overflows", raw.shape));
    };
    let [begin, end] = raw.data_offsets;
    if end < begin || end - begin != bytes as u64 {
        return fail(format!("data_offsets [{begin}, {end}] do not hold {bytes} bytes of {} {shape:?}", dtype.name()));
    }
    let start = usize::try_from(begin).ok().and_then(|b| b.checked_add(data_start));
    match start.and_then(|s| s.checked_add(bytes)).zip(start) {
        Some((_, start)) => Ok(HeaderEntry { name, dtype, shape, start, len: bytes }),
        None => fail(format!("data_offsets [{begin}, {end}] overflow")),
    }
}

/// The tensors must follow one another without overlap or hole and end with the file.
fn check_coverage(path: &Path, file_len: usize, data_start: usize, entries: &mut [HeaderEntry]) -> Result<()> {
    entries.sort_by_key(|e| (e.start, e.len));
    let mut end = data_start;
    for entry in &*entries {
        if entry.start != end {
            let what = if entry.start < end { "overlaps" } else { "leaves a hole after" };
            let reason = format!(
                "tensor `{}` at data offset {} {what} the tensor before it, which ends at {}",
                entry.name,
                entry.start - data_start,
                end - data_start
            );
            return Err(header_error(path, reason));
        }
        end += entry.len;
    }
    if end > file_len {
        return Err(ModelError::Truncated { path: path.to_owned(), expected: end as u64, found: file_len as u64 });
    }
    if end < file_len {
        let reason = format!("{} bytes after the last tensor belong to none", file_len - end);
        return Err(header_error(path, reason));
    }
    Ok(())
}

fn header_error(path: &Path, reason: String) -> ModelError {
    ModelError::Header { path: path.to_owned(), reason }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The header's object, with repeated names refused (a map would keep the last one).
struct RawHeader {
    tensors: Vec<(String, RawEntry)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Table;

        impl<'de> Visitor<'de> for Table {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensor descriptions")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
                let mut tensors = Vec::new();
                let mut seen = std::collections::HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) {
                        return Err(serde::de::Error::custom(format!("`{name}` appears twice")));
                    }
                    if name == "__metadata__" {
                        map.next_value::<std::collections::BTreeMap<String, String>>()?;
                    } else {
                        tensors.push((name, map.next_value()?));
                    }
                }
                Ok(RawHeader { tensors })
            }
        }

        deserializer.deserialize_map(Table)
    }
}

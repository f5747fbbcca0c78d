//! The GGUF container (github.com/ggml-org/ggml, docs/gguf.md): header, metadata and tensor table, checked against the
//! file before anything is allocated or read by what they say.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::metadata::{ARRAY, MetaArray, MetaValue, Metadata, ValueType, signed};
use super::types::{GgmlType, TypeError};
use crate::error::{ModelError, Result};
use crate::mmap::MappedFile;

/// First bytes of every file.
pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
/// Longest tensor name, as in ggml, which keeps a terminator.
const MAX_NAME_BYTES: usize = 63;
/// Longest metadata key.
const MAX_KEY_BYTES: usize = 65_535;
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;

/// One tensor of the table.
#[derive(Clone, Debug)]
pub(crate) struct TensorRecord {
    pub name: String,
    pub kind: GgmlType,
    /// Elements, slowest first (the file lists them fastest first).
    pub shape: Vec<usize>,
    /// Bytes from the start of the file.
    pub start: usize,
    pub len: usize,
}

/// One mapped file with its parsed header.
#[derive(Debug)]
pub(crate) struct GgufFile {
    pub file: Arc<MappedFile>,
    values: BTreeMap<String, MetaValue>,
    pub tensors: Vec<TensorRecord>,
}

impl GgufFile {
    /// Maps and parses one file.
    ///
    /// # Errors
    /// [`ModelError::Gguf`] and [`ModelError::Truncated`], which say what is wrong with which key or tensor.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = Arc::new(MappedFile::open(path)?);
        let (values, tensors) = parse(path, (*file).as_ref())?;
        Ok(Self { file, values, tensors })
    }

    /// The metadata.
    pub(crate) fn metadata(&self) -> Metadata<'_> {
        Metadata { path: self.file.path(), file: (*self.file).as_ref(), values: &self.values }
    }

    /// The bytes of a tensor.
    pub(crate) fn bytes(&self, tensor: &TensorRecord) -> &[u8] {
        &(*self.file).as_ref()[tensor.start..tensor.start + tensor.len]
    }
}

/// A file and, for a split model, the parts that follow it.
#[derive(Debug)]
pub(crate) struct GgufModel {
    /// The first holds the metadata.
    pub parts: Vec<GgufFile>,
}

impl GgufModel {
    /// Opens a file with every further part that its `split.count` announces.
    ///
    /// # Errors
    /// As [`GgufFile::open`]; a part that is missing, not the first, or not of this model; a tensor in two parts.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let first = GgufFile::open(path)?;
        let count = first.metadata().integer("split.count")?.unwrap_or(1);
        if count <= 1 {
            return Ok(Self { parts: vec![first] });
        }
        let names = split_names(path, &first, count)?;
        let total = first.metadata().required_integer("split.tensors.count")?;
        let mut parts = vec![first];
        for (i, part) in names.into_iter().enumerate().skip(1) {
            if !part.exists() {
                return Err(ModelError::MissingFile { path: part, needed_for: "it is a part of a split GGUF model" });
            }
            let file = GgufFile::open(&part)?;
            let metadata = file.metadata();
            for (key, expected) in [("split.no", i as u64), ("split.count", count)] {
                let found = metadata.required_integer(key)?;
                if found != expected {
                    return Err(metadata.error(key, format!("is {found}, expected {expected}")));
                }
            }
            parts.push(file);
        }
        let found: usize = parts.iter().map(|part| part.tensors.len()).sum();
        if found as u64 != total {
            let reason = format!("is {total}, but the parts hold {found} tensors");
            return Err(parts[0].metadata().error("split.tensors.count", reason));
        }
        Ok(Self { parts })
    }

    /// The metadata that governs.
    pub(crate) fn metadata(&self) -> Metadata<'_> {
        self.parts[0].metadata()
    }

    /// Every tensor with its part.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&GgufFile, &TensorRecord)> {
        self.parts.iter().flat_map(|part| part.tensors.iter().map(move |tensor| (part, tensor)))
    }

    /// A tensor by its name in the file.
    pub(crate) fn tensor(&self, name: &str) -> Option<(&GgufFile, &TensorRecord)> {
        self.tensors().find(|(_, tensor)| tensor.name == name)
    }
}

/// The name of part `index` (from 1) in the pattern of split files.
fn part_suffix(index: u64, count: u64) -> String {
    format!("-{index:05}-of-{count:05}.gguf")
}

/// The files of a split model, given its first.
fn split_names(path: &Path, first: &GgufFile, count: u64) -> Result<Vec<PathBuf>> {
    let metadata = first.metadata();
    if metadata.required_integer("split.no")? != 0 {
        return Err(metadata.error("split.no", "is not 0: open the first part of the split model"));
    }
    // Five digits in the name.
    if count > 99_999 {
        return Err(metadata.error("split.count", format!("is {count}, at most 99999 parts can be named")));
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(stem) = name.strip_suffix(&part_suffix(1, count)) else {
        let reason = format!("is {count}: the first part's name must end in `{}`", part_suffix(1, count));
        return Err(metadata.error("split.count", reason));
    };
    Ok((1..=count).map(|i| path.with_file_name(format!("{stem}{}", part_suffix(i, count)))).collect())
}

/// Whether `name` is a later part of a split model.
pub(crate) fn is_later_part(name: &str) -> bool {
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    name.strip_suffix(".gguf")
        .and_then(|stem| stem.rsplit_once("-of-"))
        .and_then(|(stem, count)| Some((stem.rsplit_once('-')?.1, count)))
        .is_some_and(|(index, count)| digits(index) && digits(count) && index != "00001")
}

/// Reads little-endian values, each checked against the end of the file.
pub(super) struct Cursor<'a> {
    path: &'a Path,
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(path: &'a Path, file: &'a [u8], at: usize) -> Self {
        Self { path, file, at }
    }

    fn error(&self, reason: impl Into<String>) -> ModelError {
        ModelError::Gguf { path: self.path.to_owned(), reason: reason.into() }
    }

    fn remaining(&self) -> u64 {
        (self.file.len() - self.at) as u64
    }

    fn take(&mut self, len: u64) -> Result<&'a [u8]> {
        if len > self.remaining() {
            return Err(ModelError::Truncated {
                path: self.path.to_owned(),
                expected: (self.at as u64).saturating_add(len),
                found: self.file.len() as u64,
            });
        }
        let bytes = &self.file[self.at..self.at + len as usize];
        self.at += len as usize;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N as u64)?);
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A count of things that take at least `min_bytes` each.
    fn count(&mut self, what: &str, min_bytes: u64) -> Result<usize> {
        let count = self.u64()?;
        let most = self.remaining() / min_bytes;
        if count > most {
            return Err(self.error(format!("{what} is {count}, the file has room for {most}")));
        }
        Ok(count as usize)
    }

    /// A string; `what` names it in errors.
    pub(super) fn text(&mut self, what: &str) -> Result<&'a str> {
        let len = self.u64()?;
        if len > self.remaining() {
            return Err(self.error(format!("{what} is a string of {len} bytes, {} are left", self.remaining())));
        }
        let bytes = self.take(len)?;
        std::str::from_utf8(bytes).map_err(|e| self.error(format!("{what} is not UTF-8: {e}")))
    }

    /// A scalar of the given type.
    fn value(&mut self, key: &str, kind: ValueType) -> Result<MetaValue> {
        Ok(match kind {
            ValueType::U8 => MetaValue::Unsigned(u64::from(self.array::<1>()?[0])),
            ValueType::I8 => signed(i64::from(i8::from_le_bytes(self.array()?))),
            ValueType::U16 => MetaValue::Unsigned(u64::from(u16::from_le_bytes(self.array()?))),
            ValueType::I16 => signed(i64::from(i16::from_le_bytes(self.array()?))),
            ValueType::U32 => MetaValue::Unsigned(u64::from(self.u32()?)),
            ValueType::I32 => signed(i64::from(i32::from_le_bytes(self.array()?))),
            ValueType::U64 => MetaValue::Unsigned(self.u64()?),
            ValueType::I64 => signed(i64::from_le_bytes(self.array()?)),
            ValueType::F32 => MetaValue::Float(f64::from(f32::from_le_bytes(self.array()?))),
            ValueType::F64 => MetaValue::Float(f64::from_le_bytes(self.array()?)),
            ValueType::Bool => match self.array::<1>()?[0] {
                byte @ (0 | 1) => MetaValue::Bool(byte == 1),
                byte => return Err(self.error(format!("key `{key}` is a boolean of value {byte}"))),
            },
            ValueType::String => MetaValue::Text(self.text(&format!("key `{key}`"))?.to_owned()),
        })
    }

    /// Steps over an array, checking that all of it is there.
    fn skip_array(&mut self, key: &str) -> Result<MetaValue> {
        let id = self.u32()?;
        let Some(element) = ValueType::from_id(id) else {
            let what = if id == ARRAY { "arrays, which GGUF does not allow".to_owned() } else { format!("type {id}") };
            return Err(self.error(format!("key `{key}` is an array of {what}")));
        };
        let count = self.count(&format!("the length of array `{key}`"), element.min_bytes())?;
        let start = self.at;
        if element == ValueType::String {
            for _ in 0..count {
                let len = self.u64()?;
                self.take(len)?;
            }
        } else {
            self.take(count as u64 * element.min_bytes())?;
        }
        Ok(MetaValue::Array(MetaArray { element, count, start }))
    }
}

/// Header, metadata and tensor table of a whole file.
fn parse(path: &Path, file: &[u8]) -> Result<(BTreeMap<String, MetaValue>, Vec<TensorRecord>)> {
    let mut cursor = Cursor::new(path, file, 0);
    if cursor.take(4)? != MAGIC {
        return Err(cursor.error("the file does not start with `GGUF`"));
    }
    match cursor.u32()? {
        2 | 3 => {}
        version if version & 0xFFFF == 0 => return Err(cursor.error("big-endian files are not supported")),
        version => return Err(cursor.error(format!("version {version} is not supported; supported: 2, 3"))),
    }
    // Name length, number of dimensions, type and offset; key length, type and one byte of value.
    let tensors = cursor.count("the number of tensors", 8 + 4 + 4 + 8)?;
    let keys = cursor.count("the number of metadata keys", 8 + 4 + 1)?;
    let values = (0..keys).try_fold(BTreeMap::new(), |mut values, _| {
        let (key, value) = key_value(&mut cursor)?;
        match values.insert(key.to_owned(), value) {
            None => Ok(values),
            Some(_) => Err(cursor.error(format!("key `{key}` appears twice"))),
        }
    })?;
    let alignment = alignment(&Metadata { path, file, values: &values })?;
    let mut names = HashSet::new();
    let mut records = Vec::new();
    for _ in 0..tensors {
        let record = tensor_record(&mut cursor)?;
        if !names.insert(record.name.clone()) {
            return Err(cursor.error(format!("tensor `{}` appears twice", record.name)));
        }
        records.push(record);
    }
    place(&cursor, alignment, &mut records)?;
    Ok((values, records))
}

fn key_value<'a>(cursor: &mut Cursor<'a>) -> Result<(&'a str, MetaValue)> {
    let key = cursor.text("a metadata key")?;
    if key.is_empty() || key.len() > MAX_KEY_BYTES {
        return Err(cursor.error(format!("a metadata key has {} bytes, expected 1..={MAX_KEY_BYTES}", key.len())));
    }
    let id = cursor.u32()?;
    let value = match ValueType::from_id(id) {
        Some(kind) => cursor.value(key, kind)?,
        None if id == ARRAY => cursor.skip_array(key)?,
        None => return Err(cursor.error(format!("key `{key}` has unknown value type {id}"))),
    };
    Ok((key, value))
}

fn alignment(metadata: &Metadata<'_>) -> Result<u64> {
    const KEY: &str = "general.alignment";
    match metadata.integer(KEY)?.unwrap_or(DEFAULT_ALIGNMENT) {
        alignment if alignment.is_power_of_two() && alignment <= u64::from(u32::MAX) => Ok(alignment),
        alignment => Err(metadata.error(KEY, format!("is {alignment}, expected a power of two"))),
    }
}

/// One row of the tensor table; `start` is still the offset from the start of the data.
fn tensor_record(cursor: &mut Cursor<'_>) -> Result<TensorRecord> {
    let name = cursor.text("a tensor name")?;
    let error = |cursor: &Cursor<'_>, reason: String| Err(cursor.error(format!("tensor `{name}`: {reason}")));
    if name.is_empty() || name.len() > MAX_NAME_BYTES {
        let reason = format!("the name has {} bytes, expected 1..={MAX_NAME_BYTES}", name.len());
        return error(cursor, reason);
    }
    let dims = cursor.u32()?;
    if dims == 0 || dims > MAX_DIMS {
        return error(cursor, format!("has {dims} dimensions, expected 1..={MAX_DIMS}"));
    }
    let extents = (0..dims).map(|_| cursor.u64()).collect::<Result<Vec<_>>>()?;
    let id = cursor.u32()?;
    let offset = cursor.u64()?;
    let kind = match GgmlType::from_id(id) {
        Ok(kind) => kind,
        Err(TypeError::Unsupported(type_name)) => {
            return error(cursor, format!("is of type {type_name}, which is not supported"));
        }
        Err(TypeError::Unknown) => return error(cursor, format!("has unknown type {id}")),
    };
    let (block, block_bytes) = (kind.block_elements(), kind.block_bytes());
    let elements = extents.iter().try_fold(1usize, |product, &extent| {
        usize::try_from(extent).ok().filter(|&extent| extent > 0).and_then(|extent| product.checked_mul(extent))
    });
    let len = elements.and_then(|elements| (elements / block).checked_mul(block_bytes));
    let (Some(len), Ok(start)) = (len, usize::try_from(offset)) else {
        return error(
            cursor,
            format!("has dimensions {extents:?} at offset {offset}, beyond the address space or empty"),
        );
    };
    if !extents[0].is_multiple_of(block as u64) {
        let reason = format!("has rows of {} elements, not whole blocks of {block} ({})", extents[0], kind.name());
        return error(cursor, reason);
    }
    let shape = extents.iter().rev().map(|&extent| extent as usize).collect();
    Ok(TensorRecord { name: name.to_owned(), kind, shape, start, len })
}

/// Turns data offsets into file offsets, after checking that each tensor starts where the one before it ends, padded.
fn place(cursor: &Cursor<'_>, alignment: u64, records: &mut [TensorRecord]) -> Result<()> {
    let data_start = (cursor.at as u64).next_multiple_of(alignment);
    let mut expected = 0u64;
    for record in records {
        let offset = record.start as u64;
        if offset != expected {
            let reason = format!(
                "tensor `{}` is at data offset {offset}, expected {expected}: after the tensor before it, aligned to {alignment}",
                record.name
            );
            return Err(cursor.error(reason));
        }
        let end = offset.checked_add(record.len as u64).and_then(|end| end.checked_add(data_start));
        let Some(end) = end.filter(|&end| end <= cursor.file.len() as u64) else {
            return Err(ModelError::Truncated {
                path: cursor.path.to_owned(),
                expected: end.unwrap_or(u64::MAX),
                found: cursor.file.len() as u64,
            });
        };
        record.start = (data_start + offset) as usize;
        expected = (end - data_start).next_multiple_of(alignment);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use marlin_formats::DType;

    use super::super::types::BlockType;
    use super::*;

    /// A minimal file written by the reference: two keys, and tensor `t` of two Q8_0 blocks.
    const HEADER: &str = "474755460300000001000000000000000200000000000000140000000000000067656e6572616c2e6172636869\
        746563747572650800000005000000000000006c6c616d6111000000000000006c6c616d612e626c6f636b5f636f756e740400000001\
        00000001000000000000007402000000200000000000000002000000000000000800000000000000\
        00000000";

    fn reference_file() -> Vec<u8> {
        let digits: Vec<u32> = HEADER.chars().filter_map(|c| c.to_digit(16)).collect();
        let mut bytes: Vec<u8> = digits.chunks(2).map(|pair| (pair[0] * 16 + pair[1]) as u8).collect();
        assert_eq!(bytes.len(), 143);
        bytes.resize(160 + 68, 0);
        bytes
    }

    #[test]
    fn the_reference_header_is_read() {
        let bytes = reference_file();
        let (values, tensors) = parse(Path::new("minimal.gguf"), &bytes).unwrap();
        assert_eq!(values["general.architecture"], MetaValue::Text("llama".to_owned()));
        assert_eq!(values["llama.block_count"], MetaValue::Unsigned(1));
        let [tensor] = &tensors[..] else { panic!("{tensors:?}") };
        assert_eq!((tensor.name.as_str(), tensor.kind), ("t", GgmlType::Block(BlockType::Q8_0)));
        assert_eq!((&tensor.shape[..], tensor.start, tensor.len), (&[2, 32][..], 160, 68));
        assert!(parse(Path::new("minimal.gguf"), &bytes[..227]).is_err());
    }

    #[test]
    fn every_type_has_the_size_of_its_block() {
        let sizes: Vec<(usize, usize)> = [2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 39, 40]
            .map(|id| GgmlType::from_id(id).unwrap())
            .map(|kind| (kind.block_elements(), kind.block_bytes()))
            .to_vec();
        let small = [(32, 18), (32, 20), (32, 22), (32, 24), (32, 34)];
        let large =
            [(256, 84), (256, 110), (256, 144), (256, 176), (256, 210), (32, 18), (256, 136), (32, 17), (64, 36)];
        assert_eq!(sizes, [&small[..], &large[..]].concat());
        assert_eq!(GgmlType::from_id(30), Ok(GgmlType::Plain(DType::BF16)));
        assert_eq!(GgmlType::from_id(5), Err(TypeError::Unknown));
    }

    #[test]
    fn later_parts_are_told_from_first_ones() {
        assert!(is_later_part("m-00002-of-00003.gguf"));
        for first in ["m-00001-of-00003.gguf", "m.gguf", "m-2-of-3.gguf", "m-00002-of-00003.bin"] {
            assert!(!is_later_part(first), "{first}");
        }
    }
}

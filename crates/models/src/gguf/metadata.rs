//! Metadata values of a GGUF file.

use std::collections::BTreeMap;
use std::path::Path;

use super::reader::Cursor;
use crate::error::{ModelError, Result};

/// A scalar's or array element's type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    U64,
    I64,
    F64,
}

/// The type id of an array.
pub(super) const ARRAY: u32 = 9;

impl ValueType {
    pub(super) fn from_id(id: u32) -> Option<Self> {
        use ValueType::*;
        Some(match id {
            0 => U8,
            1 => I8,
            2 => U16,
            3 => I16,
            4 => U32,
            5 => I32,
            6 => F32,
            7 => Bool,
            8 => String,
            10 => U64,
            11 => I64,
            12 => F64,
            _ => return None,
        })
    }

    /// Fewest bytes of one value: a string's length field alone.
    pub(super) const fn min_bytes(self) -> u64 {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::String => 8,
        }
    }
}

/// One metadata value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum MetaValue {
    /// Unsigned and non-negative signed integers.
    Unsigned(u64),
    /// A negative integer.
    Negative(i64),
    Float(f64),
    Bool(bool),
    Text(String),
    Array(MetaArray),
}

/// An array, left in the file: its elements are read when asked for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct MetaArray {
    pub(super) element: ValueType,
    pub(super) count: usize,
    /// Offset of the first element in the file.
    pub(super) start: usize,
}

/// The metadata of a file, with checked access by key.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Metadata<'a> {
    pub(super) path: &'a Path,
    pub(super) file: &'a [u8],
    pub(super) values: &'a BTreeMap<String, MetaValue>,
}

impl<'a> Metadata<'a> {
    /// An error about a key.
    pub(crate) fn error(&self, key: &str, reason: impl Into<String>) -> ModelError {
        ModelError::config(self.path, key, reason)
    }

    /// The value of a key.
    pub(crate) fn get(&self, key: &str) -> Option<&'a MetaValue> {
        self.values.get(key)
    }

    /// An optional string.
    pub(crate) fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(MetaValue::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.error(key, "is not a string")),
        }
    }

    /// An optional boolean.
    pub(crate) fn boolean(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(MetaValue::Bool(value)) => Ok(Some(*value)),
            Some(_) => Err(self.error(key, "is not a boolean")),
        }
    }

    /// An optional finite number.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(MetaValue::Float(value)) if value.is_finite() => Ok(Some(*value)),
            Some(MetaValue::Float(value)) => Err(self.error(key, format!("is {value}, expected a finite number"))),
            Some(MetaValue::Unsigned(value)) => Ok(Some(*value as f64)),
            Some(_) => Err(self.error(key, "is not a number")),
        }
    }

    /// An optional whole number. An array of equal ones (a value a layer) counts as that one.
    pub(crate) fn integer(&self, key: &str) -> Result<Option<u64>> {
        match self.get(key) {
            None => Ok(None),
            Some(MetaValue::Unsigned(value)) => Ok(Some(*value)),
            Some(MetaValue::Array(array)) => {
                let mut values =
                    self.elements(key, array, ValueType::U32).or_else(|_| self.elements(key, array, ValueType::I32))?;
                let first = values.next();
                match (&first, values.all(|v| Some(&v) == first.as_ref())) {
                    (Some(MetaValue::Unsigned(value)), true) => Ok(Some(*value)),
                    _ => Err(self.error(key, "differs from layer to layer, which is not supported")),
                }
            }
            Some(_) => Err(self.error(key, "is not a whole number")),
        }
    }

    /// A required whole number.
    pub(crate) fn required_integer(&self, key: &str) -> Result<u64> {
        self.integer(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// An optional token id.
    pub(crate) fn token_id(&self, key: &str) -> Result<Option<u32>> {
        match self.integer(key)? {
            None => Ok(None),
            // Writers store -1 in an unsigned field for none.
            Some(id) if id == u64::from(u32::MAX) => Ok(None),
            Some(id) => match u32::try_from(id) {
                Ok(id) => Ok(Some(id)),
                Err(_) => Err(self.error(key, format!("is {id}, expected a token id"))),
            },
        }
    }

    /// An optional array of strings.
    pub(crate) fn strings(&self, key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(array) = self.array(key, ValueType::String)? else {
            return Ok(None);
        };
        let mut cursor = Cursor::new(self.path, self.file, array.start);
        // Parsing the header has walked the array: there are `count` strings.
        (0..array.count).map(|i| cursor.text(&format!("{key}[{i}]"))).collect::<Result<_>>().map(Some)
    }

    /// An optional array of 32-bit floats.
    pub(crate) fn floats(&self, key: &str) -> Result<Option<Vec<f32>>> {
        let Some(array) = self.array(key, ValueType::F32)? else {
            return Ok(None);
        };
        let values = self.elements(key, &array, ValueType::F32)?;
        Ok(Some(values.map(|v| if let MetaValue::Float(v) = v { v as f32 } else { unreachable!("an f32") }).collect()))
    }

    /// An optional array of 32-bit integers.
    pub(crate) fn integers(&self, key: &str) -> Result<Option<Vec<i64>>> {
        let array = match self.get(key) {
            None => return Ok(None),
            Some(MetaValue::Array(array)) => array,
            Some(_) => return Err(self.error(key, "is not an array")),
        };
        let kind = if array.element == ValueType::U32 { ValueType::U32 } else { ValueType::I32 };
        let values = self.elements(key, array, kind)?.map(|v| match v {
            MetaValue::Unsigned(v) => v as i64,
            MetaValue::Negative(v) => v,
            _ => unreachable!("a 32-bit integer"),
        });
        Ok(Some(values.collect()))
    }

    fn array(&self, key: &str, element: ValueType) -> Result<Option<MetaArray>> {
        match self.get(key) {
            None => Ok(None),
            Some(MetaValue::Array(array)) if array.element == element => Ok(Some(*array)),
            Some(_) => Err(self.error(key, format!("is not an array of {element:?}"))),
        }
    }

    /// The values of an array of 4-byte numbers.
    fn elements(
        &self,
        key: &str,
        array: &MetaArray,
        expected: ValueType,
    ) -> Result<impl Iterator<Item = MetaValue> + 'a> {
        if array.element != expected {
            return Err(self.error(key, format!("is an array of {:?}, expected {expected:?}", array.element)));
        }
        let bytes = &self.file[array.start..array.start + 4 * array.count];
        Ok(bytes.as_chunks::<4>().0.iter().map(move |&b| match expected {
            ValueType::F32 => MetaValue::Float(f64::from(f32::from_le_bytes(b))),
            ValueType::I32 => signed(i64::from(i32::from_le_bytes(b))),
            _ => MetaValue::Unsigned(u64::from(u32::from_le_bytes(b))),
        }))
    }
}

/// An integer as a metadata value.
pub(super) fn signed(value: i64) -> MetaValue {
    u64::try_from(value).map_or(MetaValue::Negative(value), MetaValue::Unsigned)
}

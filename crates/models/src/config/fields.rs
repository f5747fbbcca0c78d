//! Checked access to the fields of a JSON object.

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{ModelError, Result};

/// Parses a JSON file; `needed_for` explains its absence.
pub(crate) fn read_json(path: &Path, needed_for: &'static str) -> Result<Value> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(ModelError::MissingFile { path: path.to_owned(), needed_for });
        }
        Err(e) => return Err(ModelError::io(path)(e)),
    };
    serde_json::from_slice(&text).map_err(|source| ModelError::Json { path: path.to_owned(), source })
}

/// The fields of one object of a JSON file. `null` counts as absent unless a method says otherwise.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    path: &'a Path,
    parent: &'a str,
    object: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The fields of a file's top level.
    pub(crate) fn new(path: &'a Path, value: &'a Value) -> Result<Self> {
        match value {
            Value::Object(object) => Ok(Self { path, parent: "", object }),
            _ => Err(ModelError::config(path, "(top level)", "is not an object")),
        }
    }

    /// The file.
    pub(crate) fn path(&self) -> &'a Path {
        self.path
    }

    /// The fields of the object at `name`, `None` when absent or empty.
    pub(crate) fn child(&self, name: &'a str) -> Result<Option<Fields<'a>>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(object)) if object.is_empty() => Ok(None),
            Some(Value::Object(object)) => Ok(Some(Fields { path: self.path, parent: name, object })),
            Some(other) => Err(self.error(name, format!("is {other}, expected an object"))),
        }
    }

    /// An error about a field.
    pub(crate) fn error(&self, name: &str, reason: impl Into<String>) -> ModelError {
        let field = match self.parent {
            "" => name.to_owned(),
            parent => format!("{parent}.{name}"),
        };
        ModelError::config(self.path, field, reason)
    }

    /// The field's value unless absent or null.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|v| !v.is_null())
    }

    /// Whether the field is present and null.
    pub(crate) fn is_null(&self, name: &str) -> bool {
        self.object.get(name).is_some_and(Value::is_null)
    }

    /// Every key.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'a str> {
        self.object.keys().map(String::as_str)
    }

    /// A required string.
    pub(crate) fn string(&self, name: &str) -> Result<&'a str> {
        self.optional_string(name)?.ok_or_else(|| self.error(name, "is missing"))
    }

    /// An optional string.
    pub(crate) fn optional_string(&self, name: &str) -> Result<Option<&'a str>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s)),
            Some(other) => Err(self.error(name, format!("is {other}, expected a string"))),
        }
    }

    /// A boolean with its default.
    pub(crate) fn boolean(&self, name: &str, default: bool) -> Result<bool> {
        match self.get(name) {
            None => Ok(default),
            Some(Value::Bool(b)) => Ok(*b),
            Some(other) => Err(self.error(name, format!("is {other}, expected true or false"))),
        }
    }

    /// An optional finite number.
    pub(crate) fn optional_number(&self, name: &str) -> Result<Option<f64>> {
        match self.get(name) {
            None => Ok(None),
            Some(v) => match v.as_f64().filter(|v| v.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => Err(self.error(name, format!("is {v}, expected a finite number"))),
            },
        }
    }

    /// An optional finite number above 0.
    pub(crate) fn optional_positive(&self, name: &str) -> Result<Option<f64>> {
        match self.optional_number(name)? {
            Some(v) if v <= 0.0 => Err(self.error(name, format!("is {v}, must be above 0"))),
            v => Ok(v),
        }
    }

    /// A required finite number above 0.
    pub(crate) fn positive(&self, name: &str) -> Result<f64> {
        self.optional_positive(name)?.ok_or_else(|| self.error(name, "is missing"))
    }

    /// An optional whole number in `min..=max`.
    pub(crate) fn optional_integer(&self, name: &str, min: u64, max: u64) -> Result<Option<usize>> {
        match self.get(name) {
            None => Ok(None),
            Some(v) => self.in_range(name, v, min, max).map(Some),
        }
    }

    /// A required whole number in `min..=max`.
    pub(crate) fn integer(&self, name: &str, min: u64, max: u64) -> Result<usize> {
        self.optional_integer(name, min, max)?.ok_or_else(|| self.error(name, "is missing"))
    }

    /// An optional list.
    pub(crate) fn list(&self, name: &str) -> Result<Option<&'a [Value]>> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(self.error(name, format!("is {other}, expected a list"))),
        }
    }

    /// Token ids given as one number or a list of them; absent is empty.
    pub(crate) fn token_ids(&self, name: &str) -> Result<Vec<u32>> {
        let id = |v: &Value| {
            let id = v.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.error(name, format!("holds {v}, expected a token id")))
        };
        match self.get(name) {
            None => Ok(Vec::new()),
            Some(Value::Array(ids)) => ids.iter().map(id).collect(),
            Some(v) => Ok(vec![id(v)?]),
        }
    }

    /// One optional token id; -1 means none, as older files write it.
    pub(crate) fn token_id(&self, name: &str) -> Result<Option<u32>> {
        if self.get(name).and_then(Value::as_i64) == Some(-1) {
            return Ok(None);
        }
        Ok(self.token_ids(name)?.first().copied())
    }

    fn in_range(&self, name: &str, value: &Value, min: u64, max: u64) -> Result<usize> {
        let found = value.as_u64().filter(|v| (min..=max).contains(v));
        match found.and_then(|v| usize::try_from(v).ok()) {
            Some(v) => Ok(v),
            None => {
                let reason = format!("is {value}, expected a whole number in {min}..={max}");
                Err(self.error(name, reason))
            }
        }
    }
}

//! A kernel's configuration: `key=value|value;...`, every key and value known to the schema.

use std::cell::RefCell;
use std::fmt;
use std::str::FromStr;

use marlin_formats::DType;

use super::schema::{Key, Kind, key};

/// A value of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Count(usize),
    /// Both ends; the last is `usize::MAX` for `any`.
    Range(usize, usize),
    Tile(TileShape),
    Flag(bool),
    Type(ElementType),
    Word(&'static str),
}

/// Two or three sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct TileShape {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: Option<usize>,
}

/// An element type of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ElementType {
    F32,
    F16,
    Bf16,
    U32,
    U8,
}

const TYPES: [(&str, ElementType); 5] = [
    ("f32", ElementType::F32),
    ("f16", ElementType::F16),
    ("bf16", ElementType::Bf16),
    ("u32", ElementType::U32),
    ("u8", ElementType::U8),
];

impl ElementType {
    /// The tensor dtype.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
            Self::U32 => DType::U32,
            Self::U8 => DType::U8,
        }
    }
}

/// What is wrong with a configuration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigurationError {
    /// No such key.
    #[error("unknown key in `{0}`")]
    Key(String),
    /// Not a value of the key.
    #[error("`{value}` is no value of `{key}`")]
    Value {
        /// The key.
        key: &'static str,
        /// What was found.
        value: String,
    },
    /// A key twice.
    #[error("`{0}` is given twice")]
    Twice(&'static str),
}

impl Kind {
    fn parse(self, text: &str) -> Option<Value> {
        let count = |text: &str| text.parse::<usize>().ok();
        match self {
            Kind::Count => count(text).map(Value::Count),
            Kind::Range if text == "any" => Some(Value::Range(1, usize::MAX)),
            Kind::Range => match text.split_once("..") {
                Some((first, last)) => Some(Value::Range(count(first)?, count(last)?)),
                None => count(text).map(|n| Value::Range(n, n)),
            },
            Kind::Tile => match *text.split('x').map(count).collect::<Option<Vec<_>>>()? {
                [m, n] => Some(Value::Tile(TileShape { m, n, k: None })),
                [m, n, k] => Some(Value::Tile(TileShape { m, n, k: Some(k) })),
                _ => None,
            },
            Kind::Flag => text.parse().ok().map(Value::Flag),
            Kind::Type => TYPES.iter().find(|(name, _)| *name == text).map(|&(_, value)| Value::Type(value)),
            Kind::Word(words) => words.iter().find(|word| **word == text).map(|word| Value::Word(word)),
        }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Value::Count(n) => write!(f, "{n}"),
            Value::Range(_, usize::MAX) => f.write_str("any"),
            Value::Range(first, last) if first == last => write!(f, "{first}"),
            Value::Range(first, last) => write!(f, "{first}..{last}"),
            Value::Tile(TileShape { m, n, k: None }) => write!(f, "{m}x{n}"),
            Value::Tile(TileShape { m, n, k: Some(k) }) => write!(f, "{m}x{n}x{k}"),
            Value::Flag(flag) => write!(f, "{flag}"),
            Value::Type(found) => {
                f.write_str(TYPES.iter().find(|(_, value)| *value == found).map_or("", |(name, _)| name))
            }
            Value::Word(word) => f.write_str(word),
        }
    }
}

/// Keys and their values, in the order of the table.
#[derive(Clone, Debug)]
pub struct Configuration {
    entries: Vec<(&'static Key, Vec<Value>)>,
}

impl FromStr for Configuration {
    type Err = ConfigurationError;

    fn from_str(text: &str) -> Result<Self, ConfigurationError> {
        let mut entries: Vec<(&'static Key, Vec<Value>)> = Vec::new();
        for part in text.split(';') {
            let (name, values) = part.split_once('=').ok_or_else(|| ConfigurationError::Key(part.into()))?;
            let key = key(name).ok_or_else(|| ConfigurationError::Key(part.into()))?;
            if entries.iter().any(|(known, _)| known.name == name) {
                return Err(ConfigurationError::Twice(key.name));
            }
            let parse = |value: &str| {
                key.kind.parse(value).ok_or_else(|| ConfigurationError::Value { key: key.name, value: value.into() })
            };
            entries.push((key, values.split('|').map(parse).collect::<Result<_, _>>()?));
        }
        Ok(Self { entries })
    }
}

impl fmt::Display for Configuration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (key, values)) in self.entries.iter().enumerate() {
            let separator = if i == 0 { "" } else { ";" };
            let values: Vec<String> = values.iter().map(Value::to_string).collect();
            write!(f, "{separator}{}={}", key.name, values.join("|"))?;
        }
        Ok(())
    }
}

impl Configuration {
    /// The keys used, for the documentation.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &'static Key> {
        self.entries.iter().map(|(key, _)| *key)
    }
}

/// Reads a configuration and remembers which keys were read, so that none is passed over.
pub(crate) struct Settings<'a> {
    configuration: &'a Configuration,
    read: RefCell<Vec<bool>>,
}

/// The values of one kind.
macro_rules! getter {
    ($(#[$doc:meta])* $name:ident, $value:ident($($field:ident),+) -> $result:ty, $expression:expr) => {
        $(#[$doc])*
        pub(crate) fn $name(&self, key: &str) -> Vec<$result> {
            let values = self.values(key).iter().map(|value| match *value {
                Value::$value($($field),+) => $expression,
                other => unreachable!("`{key}` holds {other:?}"),
            });
            values.collect()
        }
    };
}

impl<'a> Settings<'a> {
    pub(crate) fn new(configuration: &'a Configuration) -> Self {
        Self { configuration, read: RefCell::new(vec![false; configuration.entries.len()]) }
    }

    fn values(&self, key: &str) -> &'a [Value] {
        debug_assert!(super::schema::key(key).is_some(), "`{key}` is not in the schema");
        let Some(index) = self.configuration.entries.iter().position(|(known, _)| known.name == key) else {
            return &[];
        };
        self.read.borrow_mut()[index] = true;
        &self.configuration.entries[index].1
    }

    getter!(
        /// Whole numbers.
        counts, Count(n) -> usize, n
    );
    getter!(
        /// Both ends of ranges.
        ranges, Range(first, last) -> (usize, usize), (first, last)
    );
    getter!(
        /// Tiles.
        tiles, Tile(tile) -> TileShape, tile
    );
    getter!(
        /// Flags.
        flags, Flag(flag) -> bool, flag
    );
    getter!(
        /// Element types.
        types, Type(element) -> DType, element.dtype()
    );
    getter!(
        /// Words.
        words, Word(word) -> &'static str, word
    );

    /// The only whole number, if the key is there.
    pub(crate) fn count(&self, key: &str) -> Option<usize> {
        self.counts(key).first().copied()
    }

    /// The only tile, if the key is there.
    pub(crate) fn tile(&self, key: &str) -> Option<TileShape> {
        self.tiles(key).first().copied()
    }

    /// The only word, if the key is there.
    pub(crate) fn word(&self, key: &str) -> Option<&'static str> {
        self.words(key).first().copied()
    }

    /// The only type, if the key is there.
    pub(crate) fn element(&self, key: &str) -> Option<DType> {
        self.types(key).first().copied()
    }

    /// The only flag; false if the key is absent.
    pub(crate) fn flag(&self, key: &str) -> bool {
        self.flags(key).first() == Some(&true)
    }

    /// Whether the key is there.
    pub(crate) fn has(&self, key: &str) -> bool {
        !self.values(key).is_empty()
    }

    /// Keys that hold by construction, whatever their values.
    pub(crate) fn implied(&self, keys: &[&str]) {
        for key in keys {
            self.values(key);
        }
    }

    /// Keys that were not read.
    pub(crate) fn unread(&self) -> Vec<&'static Key> {
        let read = self.read.borrow();
        self.configuration.entries.iter().zip(&*read).filter(|(_, read)| !**read).map(|((key, _), _)| *key).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_and_values_are_errors() {
        let parse = |text: &str| text.parse::<Configuration>().map(|c| c.to_string());
        assert_eq!(parse("tile=64x64x32;m=1..8;io=f16|bf16"), Ok("tile=64x64x32;m=1..8;io=f16|bf16".into()));
        assert_eq!(parse("m=any").as_deref(), Ok("m=any"));
        assert!(matches!(parse("tiles=64x64x32"), Err(ConfigurationError::Key(_))));
        assert!(matches!(parse("tile"), Err(ConfigurationError::Key(_))));
        assert!(matches!(parse("io=f64"), Err(ConfigurationError::Value { key: "io", .. })));
        assert!(matches!(parse("tile=64"), Err(ConfigurationError::Value { .. })));
        assert!(matches!(parse("copy=sync"), Err(ConfigurationError::Value { .. })));
        assert_eq!(parse("acc=f16;acc=f32"), Err(ConfigurationError::Twice("acc")));
    }

    #[test]
    fn keys_that_were_not_read() {
        let configuration: Configuration = "m=1;io=f16;copy=async".parse().expect("a configuration");
        let settings = Settings::new(&configuration);
        assert_eq!(settings.ranges("m"), [(1, 1)]);
        let unread: Vec<&str> = settings.unread().iter().map(|key| key.name).collect();
        assert_eq!(unread, ["io", "copy"]);
    }
}

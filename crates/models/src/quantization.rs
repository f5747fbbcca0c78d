//! `quantization_config`: of the native container, and which other method it names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use marlin_formats::{Format, Scheme, Shift};
use marlin_ops::{ExpertWeights, Weight};
use regex::Regex;
use serde_json::{Map, Value, json};

use crate::Checkpoint;
use crate::config::Fields;
use crate::error::{ModelError, Result};
use crate::import::{Method, QUANT_METHODS};

/// `quant_method` of the native container.
const QUANT_METHOD: &str = "metal_marlin";
/// The version this project reads and writes.
const FORMAT_VERSION: u64 = 1;

/// Which modules are stored in a native format, and in which.
#[derive(Clone, Debug, Default)]
pub struct QuantizationConfig {
    /// The config file, for messages.
    path: PathBuf,
    default: Option<SchemeEntry>,
    modules: BTreeMap<String, SchemeEntry>,
    ignore: Vec<Ignore>,
    /// How another project quantized the checkpoint; the fields above are empty then.
    method: Option<Method>,
}

/// A scheme object. A group size of -1 (one group a column) is resolved with K.
#[derive(Clone, Copy, Debug, PartialEq)]
struct SchemeEntry {
    format: Format,
    group_size: Option<usize>,
    in_features: Option<usize>,
    out_features: Option<usize>,
}

/// An entry of `ignore`.
#[derive(Clone, Debug)]
enum Ignore {
    Exact(String),
    /// Matches from the start of the module path, as `re.match` does.
    Pattern(Regex),
}

impl Ignore {
    fn parse(text: &str) -> std::result::Result<Self, String> {
        match text.strip_prefix("re:") {
            None => Ok(Ignore::Exact(text.to_owned())),
            Some(pattern) => Regex::new(pattern)
                .map(Ignore::Pattern)
                .map_err(|e| format!("holds `{text}`, which is not a regular expression: {e}")),
        }
    }
}

impl QuantizationConfig {
    /// A config for writing: `default` for every quantized module that `modules` does not override; `ignore` names the
    /// modules stored plain, exactly or by `re:` patterns that match from the start.
    ///
    /// # Errors
    /// [`ModelError::Request`] for a pattern that is not a regular expression.
    pub fn new(default: Scheme, modules: BTreeMap<String, Scheme>, ignore: &[String]) -> Result<Self> {
        let entry = |scheme: Scheme| SchemeEntry {
            format: scheme.format,
            group_size: Some(scheme.group_size),
            in_features: None,
            out_features: None,
        };
        let ignore = ignore.iter().map(|text| Ignore::parse(text)).collect::<std::result::Result<_, _>>();
        Ok(Self {
            path: PathBuf::new(),
            default: Some(entry(default)),
            modules: modules.into_iter().map(|(m, s)| (m, entry(s))).collect(),
            ignore: ignore.map_err(|e| ModelError::request("ignore pattern", e))?,
            method: None,
        })
    }

    /// Reads `quantization_config` of a parsed `config.json`; `path` appears in errors.
    ///
    /// # Errors
    /// A `quant_method` other than the native one, an unknown format, a group size that it refuses, fields that
    /// contradict the format: each names the field.
    pub fn from_config(path: &Path, config: &Value) -> Result<Self> {
        Self::read(&Fields::new(path, config)?)
    }

    /// Reads `quantization_config` of a config file; absent means that nothing is quantized.
    pub(crate) fn read(fields: &Fields<'_>) -> Result<Self> {
        let imported = |method| Self { path: fields.path().to_owned(), method, ..Self::default() };
        let Some(fields) = fields.child("quantization_config")? else {
            return Ok(imported(Method::beside(fields)?));
        };
        if fields.get("quant_method").is_none()
            && let Some(mlx) = Method::mlx(&fields)?
        {
            return Ok(imported(Some(mlx)));
        }
        let method = fields.string("quant_method")?;
        if method != QUANT_METHOD {
            if let Some(method) = Method::read(method, &fields)? {
                return Ok(imported(Some(method)));
            }
            let known = QUANT_METHODS.join(", ");
            let reason = format!("`{method}` is not supported; supported: {QUANT_METHOD}, {known}");
            return Err(fields.error("quant_method", reason));
        }
        let version = fields.integer("format_version", 0, u64::MAX)? as u64;
        if version != FORMAT_VERSION {
            let reason = format!("is {version}, this version reads {FORMAT_VERSION}");
            return Err(fields.error("format_version", reason));
        }
        let path = fields.path();
        let default = match fields.get("default") {
            None => None,
            Some(value) => Some(scheme_entry(path, "quantization_config.default", value)?),
        };
        let mut modules = BTreeMap::new();
        match fields.get("modules") {
            None => {}
            Some(Value::Object(map)) => {
                for (module, value) in map {
                    let field = format!("quantization_config.modules.{module}");
                    modules.insert(module.clone(), scheme_entry(path, &field, value)?);
                }
            }
            Some(other) => return Err(fields.error("modules", format!("is {other}, expected an object"))),
        }
        let ignore = fields.list("ignore")?.unwrap_or_default();
        let ignore = ignore.iter().map(|value| ignore_entry(&fields, value)).collect::<Result<_>>()?;
        Ok(Self { path: path.to_owned(), default, modules, ignore, method: None })
    }

    /// Whether nothing is quantized.
    pub fn is_empty(&self) -> bool {
        self.default.is_none() && self.modules.is_empty() && self.method.is_none()
    }

    /// The name of the method by which another project quantized the checkpoint.
    pub fn method(&self) -> Option<&'static str> {
        self.method.as_ref().map(Method::name)
    }

    /// A module from another project's tensors, without bias; `None` when it is stored plain.
    pub(crate) fn import(&self, checkpoint: &Checkpoint, module: &str, n: usize, k: usize) -> Result<Option<Weight>> {
        self.method.as_ref().map_or(Ok(None), |method| method.weight(checkpoint, module, n, k))
    }

    /// Routed experts from another project's stacks, `None` when they are stored otherwise.
    pub(crate) fn import_experts(
        &self,
        checkpoint: &Checkpoint,
        prefix: &str,
        experts: usize,
        hidden: usize,
        intermediate: usize,
    ) -> Result<Option<Vec<ExpertWeights>>> {
        let read = |method: &Method| method.experts(checkpoint, prefix, experts, hidden, intermediate);
        self.method.as_ref().map_or(Ok(None), read)
    }

    /// The default scheme's format and its group size, `None` for one group a column.
    pub fn default_format(&self) -> Option<(Format, Option<usize>)> {
        self.default.map(|d| (d.format, d.group_size))
    }

    /// Whether `ignore` names the module.
    pub fn is_ignored(&self, module: &str) -> bool {
        self.ignore.iter().any(|ignore| match ignore {
            Ignore::Exact(name) => name == module,
            Ignore::Pattern(pattern) => pattern.find(module).is_some_and(|m| m.start() == 0),
        })
    }

    /// The scheme of a module that is stored quantized as `[out_features, in_features]`.
    ///
    /// # Errors
    /// [`ModelError::Config`] when the config gives none, ignores the module, or contradicts its dimensions.
    pub fn scheme(&self, module: &str, out_features: usize, in_features: usize) -> Result<Scheme> {
        let field = || format!("quantization_config.modules.{module}");
        let fail = |reason: String| Err(ModelError::config(&self.path, field(), reason));
        if self.is_ignored(module) {
            return fail("is ignored, but its tensors are quantized".to_owned());
        }
        let Some(entry) = self.modules.get(module).or(self.default.as_ref()) else {
            return fail("is missing and there is no default, but its tensors are quantized".to_owned());
        };
        for (name, given, expected) in
            [("in_features", entry.in_features, in_features), ("out_features", entry.out_features, out_features)]
        {
            if given.is_some_and(|given| given != expected) {
                return fail(format!("says {name} {given:?}, the model has {expected}"));
            }
        }
        let unit = entry.format.layout().codes_per_unit();
        let group_size = match (entry.group_size, entry.format.fixed_group_size()) {
            (Some(group_size), _) | (None, Some(group_size)) => group_size,
            (None, None) => in_features.next_multiple_of(unit),
        };
        Scheme::new(entry.format, group_size).map_err(|e| ModelError::config(&self.path, field(), e.to_string()))
    }

    /// The JSON object to store as `quantization_config`.
    pub fn to_json(&self) -> Value {
        let modules: Map<String, Value> =
            self.modules.iter().map(|(module, entry)| (module.clone(), entry.to_json())).collect();
        let ignore: Vec<String> = self
            .ignore
            .iter()
            .map(|ignore| match ignore {
                Ignore::Exact(name) => name.clone(),
                Ignore::Pattern(pattern) => format!("re:{}", pattern.as_str()),
            })
            .collect();
        let mut object = Map::new();
        object.insert("quant_method".into(), json!(QUANT_METHOD));
        object.insert("format_version".into(), json!(FORMAT_VERSION));
        if let Some(default) = &self.default {
            object.insert("default".into(), default.to_json());
        }
        object.insert("modules".into(), Value::Object(modules));
        object.insert("ignore".into(), json!(ignore));
        Value::Object(object)
    }
}

impl SchemeEntry {
    fn to_json(self) -> Value {
        let mut object = Map::new();
        object.insert("format".into(), json!(self.format.name()));
        object.insert("bits".into(), json!(self.format.code_bits()));
        object.insert("group_size".into(), self.group_size.map_or(json!(-1), |g| json!(g)));
        object.insert("sym".into(), json!(self.format.shift() == Shift::None));
        object.insert("scale_dtype".into(), json!(scale_dtype(self.format)));
        for (name, value) in [("in_features", self.in_features), ("out_features", self.out_features)] {
            if let Some(value) = value {
                object.insert(name.into(), json!(value));
            }
        }
        object.insert("sparsity".into(), json!("none"));
        Value::Object(object)
    }
}

/// The `scale_dtype` of a format: the stored type's name in lower case.
fn scale_dtype(format: Format) -> String {
    format.scale_kind().name().to_lowercase()
}

fn ignore_entry(fields: &Fields<'_>, value: &Value) -> Result<Ignore> {
    let Some(text) = value.as_str() else {
        return Err(fields.error("ignore", format!("holds {value}, expected module paths")));
    };
    Ignore::parse(text).map_err(|e| fields.error("ignore", e))
}

fn scheme_entry(path: &Path, field: &str, value: &Value) -> Result<SchemeEntry> {
    let error = |name: &str, reason: String| ModelError::config(path, format!("{field}.{name}"), reason);
    let Value::Object(object) = value else {
        return Err(ModelError::config(path, field, "is not an object"));
    };
    let get = |name: &str| object.get(name).filter(|v| !v.is_null());
    let name = match get("format") {
        Some(Value::String(name)) => name.as_str(),
        other => return Err(error("format", format!("is {other:?}, expected a format name"))),
    };
    let mut format: Format = name.parse().map_err(|e| error("format", format!("{e}")))?;
    let sym = get("sym").map(|v| v.as_bool().ok_or_else(|| error("sym", format!("is {v}, expected true or false"))));
    let sym = sym.transpose()?;
    // The specification names both forms of int8 alike and tells them apart by `sym`.
    if format == Format::Int8 && sym == Some(false) {
        format = Format::Int8Asym;
    }
    if let Some(sym) = sym.filter(|&sym| sym != (format.shift() == Shift::None)) {
        return Err(error("sym", format!("is {sym}, which contradicts {format}")));
    }
    for (name, expected) in
        [("bits", json!(format.code_bits())), ("scale_dtype", json!(scale_dtype(format))), ("sparsity", json!("none"))]
    {
        if let Some(found) = get(name).filter(|&v| *v != expected) {
            return Err(error(name, format!("is {found}, expected {expected} for {format}")));
        }
    }
    let count = |name: &str| match get(name) {
        None => Ok(None),
        Some(v) => match v.as_u64().and_then(|v| usize::try_from(v).ok()).filter(|&v| v > 0) {
            Some(v) => Ok(Some(v)),
            None => Err(error(name, format!("is {v}, expected a whole number above 0"))),
        },
    };
    let group_size = match get("group_size").map(|v| (v.as_i64(), v)) {
        None => Some(format.default_group_size()),
        Some((Some(-1), _)) => None,
        Some(_) => count("group_size")?,
    };
    if let Some(group_size) = group_size {
        let check = format.check_group_size(group_size);
        check.map_err(|e| error("group_size", e.to_string()))?;
    }
    Ok(SchemeEntry { format, group_size, in_features: count("in_features")?, out_features: count("out_features")? })
}

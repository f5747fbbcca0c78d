//! Chat templates: Jinja as transformers sets it up, messages to prompt text.

use std::path::{Path, PathBuf};

use minijinja::value::{Kwargs, Value as JinjaValue};
use minijinja::{Environment, Error, ErrorKind};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::config::{Fields, read_json};
use crate::error::{ModelError, Result};

mod calendar;
mod json_text;

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// Text.
    pub content: String,
}

impl Message {
    /// A message.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// A model folder's chat template with its special tokens.
#[derive(Debug)]
pub struct ChatTemplate {
    /// The file it came from.
    path: PathBuf,
    environment: Environment<'static>,
    /// `bos_token`, `eos_token`, ... as the template sees them.
    special_tokens: Map<String, Value>,
}

/// The template's name inside the environment.
const NAME: &str = "chat_template";

/// Instructions that one rendering may take, seconds of work: templates are code of a stranger.
const MAX_INSTRUCTIONS: u64 = 50_000_000;
/// Widest `indent` of `tojson`.
const MAX_INDENT: usize = 64;

/// Token variables that templates use.
const SPECIAL_TOKENS: [&str; 5] = ["bos_token", "eos_token", "pad_token", "unk_token", "sep_token"];

impl ChatTemplate {
    /// Reads `dir/chat_template.jinja`, or else the `chat_template` of `dir/tokenizer_config.json` (a string, or the
    /// one named `default` of a list), or that of a GGUF file. `None` when there is none.
    ///
    /// # Errors
    /// A file that cannot be read, or a template that does not parse.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>> {
        if let Some(file) = crate::gguf::find(dir)? {
            let template = crate::gguf::chat_template(&file)?;
            return template.map(|(source, tokens)| Self::new(&file, source, tokens)).transpose();
        }
        let config_path = dir.join("tokenizer_config.json");
        let config = match read_json(&config_path, "it is optional") {
            Ok(config) => config,
            Err(ModelError::MissingFile { .. }) => Value::Object(Map::new()),
            Err(other) => return Err(other),
        };
        let fields = Fields::new(&config_path, &config)?;
        let special_tokens = special_tokens(&fields)?;
        let jinja_path = dir.join("chat_template.jinja");
        let (path, source) = if jinja_path.exists() {
            let source = std::fs::read_to_string(&jinja_path).map_err(ModelError::io(&jinja_path))?;
            (jinja_path, source)
        } else {
            match template_of_config(&fields)? {
                Some(source) => (config_path.clone(), source),
                None => return Ok(None),
            }
        };
        Self::new(&path, source, special_tokens).map(Some)
    }

    /// A template from its text; `path` appears in errors, `special_tokens` (`bos_token`, ...) are its variables.
    ///
    /// # Errors
    /// A template that does not parse.
    pub fn new(path: &Path, source: String, special_tokens: Map<String, Value>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_fuel(Some(MAX_INSTRUCTIONS));
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> std::result::Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| calendar::strftime_now(&format));
        environment.add_filter("tojson", to_json);
        environment.add_template_owned(NAME, source).map_err(|e| template_error(path, &e))?;
        Ok(Self { path: path.to_owned(), environment, special_tokens })
    }

    /// The prompt text of a conversation. `add_generation_prompt` ends it with the start of the assistant's answer;
    /// `extra` are further variables (`tools`, `enable_thinking`).
    ///
    /// # Errors
    /// What the template itself refuses (`raise_exception`), an error while it runs, or no end after 50 million
    /// instructions.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        extra: &Map<String, Value>,
    ) -> Result<String> {
        let mut context = self.special_tokens.clone();
        context.extend(extra.iter().map(|(name, value)| (name.clone(), value.clone())));
        let messages = messages.iter().map(|m| serde_json::json!({"role": m.role, "content": m.content})).collect();
        context.insert("messages".into(), Value::Array(messages));
        context.insert("add_generation_prompt".into(), add_generation_prompt.into());
        let template = self.environment.get_template(NAME);
        template
            .and_then(|t| t.render(JinjaValue::from_serialize(&context)))
            .map_err(|e| template_error(&self.path, &e))
    }
}

fn template_error(path: &Path, error: &Error) -> ModelError {
    let line = error.line().map_or(String::new(), |line| format!(" (line {line})"));
    let reason = match error.detail() {
        Some(detail) if error.kind() == ErrorKind::InvalidOperation => format!("{detail}{line}"),
        Some(detail) => format!("{}: {detail}{line}", error.kind()),
        None => format!("{}{line}", error.kind()),
    };
    ModelError::ChatTemplate { path: path.to_owned(), reason }
}

/// `chat_template`: a string, or a list of `{"name", "template"}` of which `default` is taken.
fn template_of_config(fields: &Fields<'_>) -> Result<Option<String>> {
    const FIELD: &str = "chat_template";
    let list = match fields.get(FIELD) {
        None => return Ok(None),
        Some(Value::String(source)) => return Ok(Some(source.clone())),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(fields.error(FIELD, "is neither a string nor a list of named templates")),
    };
    let default = list.iter().find(|entry| entry["name"] == "default");
    match default.map(|entry| &entry["template"]) {
        Some(Value::String(source)) => Ok(Some(source.clone())),
        _ => Err(fields.error(FIELD, "has no template named `default`")),
    }
}

/// Token variables: plain strings, or objects with the text in `content`.
fn special_tokens(fields: &Fields<'_>) -> Result<Map<String, Value>> {
    let mut tokens = Map::new();
    for name in SPECIAL_TOKENS {
        let text = match fields.get(name) {
            None => continue,
            Some(Value::Object(token)) => token.get("content"),
            other => other,
        };
        match text {
            Some(Value::String(text)) => tokens.insert(name.into(), text.clone().into()),
            _ => return Err(fields.error(name, "is neither a string nor an object with `content`")),
        };
    }
    Ok(tokens)
}

/// transformers' `tojson`: Python's `json.dumps` without ASCII or HTML escapes, optionally indented.
fn to_json(value: &JinjaValue, kwargs: Kwargs) -> std::result::Result<String, Error> {
    let indent: Option<usize> = kwargs.get("indent")?;
    if let Some(indent) = indent.filter(|&indent| indent > MAX_INDENT) {
        let message = format!("tojson: indent is {indent}, at most {MAX_INDENT}");
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    // transformers' other arguments are fine at their defaults; anything else would be ignored silently.
    for name in ["ensure_ascii", "separators", "sort_keys"] {
        let given: Option<JinjaValue> = kwargs.get(name)?;
        if given.is_some_and(|v| v.is_true()) {
            let message = format!("tojson: argument `{name}` is not supported");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    }
    kwargs.assert_all_used()?;
    let value = serde_json::to_value(value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(json_text::python_json(&value, indent))
}

#[cfg(test)]
mod tests;

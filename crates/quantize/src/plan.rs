//! Which modules of a model are quantized, and to what.
//!
//! By default the linear layers of the decoder are quantized: attention projections (those of the
//! MLA latents and `kv_b_proj` among them), dense MLPs, shared and routed experts. Token
//! embeddings, `lm_head`, routers (`mlp.gate`) and every other matrix stay as stored; vectors
//! (norms, biases, router corrections) are never quantized. [`Plan`] overrides all of this.

use std::fmt;
use std::str::FromStr;

use marlin_formats::exl3::Codebook;
use marlin_formats::{Format, FormatError, Scheme};

use crate::{QuantizeError, Result};

/// What a weight matrix does in the model, from its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// A linear layer of the decoder.
    Linear,
    /// Token embeddings (`embed_tokens`).
    Embedding,
    /// The output projection (`lm_head`).
    LmHead,
    /// The router of a mixture of experts (`mlp.gate`).
    Router,
    /// A matrix outside the decoder layers that the model runs, such as a prediction layer for
    /// later tokens.
    Other,
}

/// A weight matrix of a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Path without `.weight`: `model.layers.3.mlp.experts.5.down_proj`.
    pub name: String,
    /// N.
    pub out_features: usize,
    /// K.
    pub in_features: usize,
    /// The decoder layer it belongs to, if it is one of those the model runs.
    pub layer: Option<usize>,
    /// What it does.
    pub role: Role,
}

impl Module {
    /// A module of a model with `num_layers` decoder layers; layer and role come from the name.
    pub fn new(name: impl Into<String>, out_features: usize, in_features: usize, num_layers: usize) -> Self {
        let name = name.into();
        let layer = layer_index(&name).filter(|&layer| layer < num_layers);
        let role = match (name.rsplit('.').next(), layer) {
            (Some("lm_head"), None) => Role::LmHead,
            (Some("embed_tokens"), None) if layer_index(&name).is_none() => Role::Embedding,
            (Some("gate"), Some(_)) => Role::Router,
            (_, Some(_)) => Role::Linear,
            (_, None) => Role::Other,
        };
        Self { name, out_features, in_features, layer, role }
    }

    /// Elements of the matrix.
    pub fn weights(&self) -> usize {
        self.out_features * self.in_features
    }
}

/// The number after `layers.` in a module path.
fn layer_index(name: &str) -> Option<usize> {
    let mut parts = name.split('.');
    parts.find(|&part| part == "layers")?;
    parts.next()?.parse().ok()
}

/// A module path in which `*` stands for any characters, dots included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Whether the whole path matches.
    pub fn matches(&self, name: &str) -> bool {
        let mut parts = self.0.split('*');
        // `split` yields at least one part.
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = name.strip_prefix(first) else {
            return false;
        };
        let parts: Vec<&str> = parts.collect();
        let Some((last, middle)) = parts.split_last() else {
            return rest.is_empty();
        };
        for part in middle {
            match rest.find(part) {
                Some(at) => rest = &rest[at + part.len()..],
                None => return false,
            }
        }
        rest.ends_with(last)
    }

    /// Whether it names one module exactly.
    pub fn is_exact(&self) -> bool {
        !self.0.contains('*')
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Pattern {
    type Err = QuantizeError;

    /// Reads a pattern; it must not be empty.
    fn from_str(text: &str) -> Result<Self> {
        let reason = match text {
            "" => "is empty",
            _ if text.starts_with("re:") => "regular expressions are not read here; use `*`",
            _ => return Ok(Self(text.to_owned())),
        };
        Err(syntax("pattern", text, reason))
    }
}

/// `PATTERN=FORMAT[:GROUP]`: another scheme for the modules that match.
#[derive(Clone, Debug, PartialEq)]
pub struct Override {
    /// Which modules.
    pub pattern: Pattern,
    /// Their scheme.
    pub scheme: Scheme,
}

impl FromStr for Override {
    type Err = QuantizeError;

    /// Reads `PATTERN=FORMAT[:GROUP]`.
    fn from_str(text: &str) -> Result<Self> {
        let (pattern, scheme) =
            text.split_once('=').ok_or_else(|| syntax("override", text, "expected PATTERN=FORMAT[:GROUP]"))?;
        Ok(Self { pattern: pattern.parse()?, scheme: parse_scheme(scheme)? })
    }
}

/// Reads `FORMAT` or `FORMAT:GROUP`.
///
/// # Errors
/// An unknown format (the message lists the valid names), one that is only imported, a group size that is no number or
/// that the format cannot store.
pub fn parse_scheme(text: &str) -> Result<Scheme> {
    let (name, group) = text.split_once(':').map_or((text, None), |(name, group)| (name, Some(group)));
    let format: Format = name.parse()?;
    if !format.can_encode() {
        return Err(FormatError::ImportOnly { format }.into());
    }
    let Some(group) = group else {
        return Ok(Scheme::with_default_group(format));
    };
    let group_size = group.parse().map_err(|_| syntax("group size", group, "expected a number"))?;
    Ok(Scheme::new(format, group_size)?)
}

fn syntax(what: &'static str, text: &str, reason: &str) -> QuantizeError {
    QuantizeError::Syntax { what, text: text.to_owned(), reason: reason.to_owned() }
}

/// Which modules are quantized, and to what.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// The scheme of the decoder's linear layers.
    pub default: Scheme,
    /// The scheme of the token embeddings; as stored when absent.
    pub embeddings: Option<Scheme>,
    /// The scheme of `lm_head`; as stored when absent.
    pub lm_head: Option<Scheme>,
    /// Modules that stay as stored, whatever the rest says.
    pub ignore: Vec<Pattern>,
    /// Other schemes; the last match wins. A pattern with `*` reaches only the decoder's linear
    /// layers, an exact path any matrix.
    pub overrides: Vec<Override>,
}

/// What a module is quantized to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// A format whose weights share scales by groups along K.
    Grouped(Scheme),
    /// EXL3 at a whole number of bits.
    Exl3 {
        /// State to value.
        codebook: Codebook,
        /// Bits a weight, 1 to 8.
        bits: u32,
    },
}

impl Target {
    /// Bits of one weight's code, scales and padding not counted.
    pub const fn code_bits(&self) -> u32 {
        match self {
            Self::Grouped(scheme) => scheme.format.code_bits(),
            Self::Exl3 { bits, .. } => *bits,
        }
    }

    /// The scheme, if it is a grouped format.
    pub const fn scheme(&self) -> Option<Scheme> {
        match self {
            Self::Grouped(scheme) => Some(*scheme),
            Self::Exl3 { .. } => None,
        }
    }
}

impl From<Scheme> for Target {
    fn from(scheme: Scheme) -> Self {
        Self::Grouped(scheme)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Grouped(scheme) => write!(f, "{}:{}", scheme.format, scheme.group_size),
            Self::Exl3 { codebook, bits } => write!(f, "exl3 {} {bits} bits", codebook.name()),
        }
    }
}

/// What happens to one module.
#[derive(Clone, Debug, PartialEq)]
pub struct Assignment {
    /// The module.
    pub module: Module,
    /// What it is quantized to, or `None`: it stays as stored.
    pub target: Option<Target>,
    /// Whether the target is the plan's default for linear layers, which no option names for this module: what a mixture
    /// may replace.
    pub by_default: bool,
}

impl Assignment {
    /// The scheme it is quantized to, `None` for EXL3 and for a module that stays as stored.
    pub fn scheme(&self) -> Option<Scheme> {
        self.target.and_then(|target| target.scheme())
    }
}

impl Plan {
    /// The scheme for linear layers, nothing overridden.
    pub fn new(default: Scheme) -> Self {
        Self { default, embeddings: None, lm_head: None, ignore: Vec::new(), overrides: Vec::new() }
    }

    /// Decides about every module.
    ///
    /// # Errors
    /// [`QuantizeError::NothingMatched`] for an option that reaches no module: a misspelt pattern,
    /// or `lm_head` in a model that ties it to the embeddings.
    pub fn resolve(&self, modules: &[Module]) -> Result<Vec<Assignment>> {
        self.check_matches(modules)?;
        let assign = |module: &Module| {
            let (scheme, by_default) = self.scheme(module);
            Assignment { module: module.clone(), target: scheme.map(Target::from), by_default }
        };
        Ok(modules.iter().map(assign).collect())
    }

    /// The scheme of a module, and whether it is the default of linear layers.
    fn scheme(&self, module: &Module) -> (Option<Scheme>, bool) {
        if self.ignore.iter().any(|ignore| ignore.matches(&module.name)) {
            return (None, false);
        }
        let mut overrides = self.overrides.iter().rev();
        if let Some(found) = overrides.find(|found| reaches(&found.pattern, module)) {
            return (Some(found.scheme), false);
        }
        match module.role {
            Role::Linear => (Some(self.default), true),
            Role::Embedding => (self.embeddings, false),
            Role::LmHead => (self.lm_head, false),
            Role::Router | Role::Other => (None, false),
        }
    }

    fn check_matches(&self, modules: &[Module]) -> Result<()> {
        let has_role = |role| modules.iter().any(|module| module.role == role);
        let nothing = |option: String| Err(QuantizeError::NothingMatched { option });
        if self.embeddings.is_some() && !has_role(Role::Embedding) {
            return nothing("the embeddings format".to_owned());
        }
        if self.lm_head.is_some() && !has_role(Role::LmHead) {
            return nothing("the lm_head format (are the embeddings tied?)".to_owned());
        }
        for ignore in &self.ignore {
            if !modules.iter().any(|module| ignore.matches(&module.name)) {
                return nothing(format!("ignore pattern `{ignore}`"));
            }
        }
        for Override { pattern, .. } in &self.overrides {
            if !modules.iter().any(|module| reaches(pattern, module)) {
                return nothing(format!("override pattern `{pattern}`"));
            }
        }
        Ok(())
    }
}

fn reaches(pattern: &Pattern, module: &Module) -> bool {
    (pattern.is_exact() || module.role == Role::Linear) && pattern.matches(&module.name)
}

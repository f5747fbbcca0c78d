//! The `tokenizer.json` and the template variables that a GGUF file's vocabulary stands for.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::metadata::Metadata;
use super::pretokenizer;
use crate::error::Result;

const MODEL: &str = "tokenizer.ggml.model";
const TOKENS: &str = "tokenizer.ggml.tokens";
/// SentencePiece's stand-in for a space.
const SPACE: &str = "\u{2581}";
/// Longest token that SentencePiece's merges are derived from: splits times length must stay small.
const MAX_MERGED_BYTES: usize = 1024;
/// Most ways a token on average can be made of two others; published vocabularies have 2 or 3.
const MAX_MERGES_A_TOKEN: usize = 64;

/// `tokenizer.ggml.token_type` values.
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const BYTE: i64 = 6;

/// Builds the `tokenizer.json` of the vocabulary.
///
/// # Errors
/// A vocabulary that is missing or of another kind than byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`), an
/// unknown pre-tokenizer, arrays of different lengths, a token twice, ids outside the vocabulary: each names the key.
pub(crate) fn tokenizer_json(metadata: &Metadata<'_>) -> Result<Value> {
    let vocabulary = Vocabulary::read(metadata)?;
    match metadata.text(MODEL)? {
        Some("gpt2") => byte_level(metadata, &vocabulary),
        Some("llama") => sentence_piece(metadata, &vocabulary),
        Some(other) => Err(metadata.error(MODEL, format!("`{other}` is not supported; supported: gpt2, llama"))),
        None => Err(metadata.error(MODEL, "is missing")),
    }
}

/// `bos_token`, `eos_token`, ... as a chat template sees them.
///
/// # Errors
/// As [`tokenizer_json`] for the vocabulary.
pub(crate) fn special_tokens(metadata: &Metadata<'_>) -> Result<Map<String, Value>> {
    let tokens = metadata.strings(TOKENS)?.unwrap_or_default();
    let mut special = Map::new();
    for (name, id) in [("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding")] {
        let key = format!("tokenizer.ggml.{id}_token_id");
        let Some(id) = metadata.token_id(&key)? else { continue };
        let Some(token) = tokens.get(id as usize) else {
            return Err(metadata.error(&key, format!("is {id}, the vocabulary has {} tokens", tokens.len())));
        };
        special.insert(name.to_owned(), json!(token));
    }
    Ok(special)
}

/// Tokens by id, with their types.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    types: Vec<i64>,
    ids: HashMap<&'a str, u32>,
}

impl<'a> Vocabulary<'a> {
    fn read(metadata: &Metadata<'a>) -> Result<Self> {
        const TYPES: &str = "tokenizer.ggml.token_type";
        let tokens = match metadata.strings(TOKENS)? {
            Some(tokens) if !tokens.is_empty() => tokens,
            _ => return Err(metadata.error(TOKENS, "is missing or empty: the file has no tokenizer")),
        };
        let types = metadata.integers(TYPES)?.unwrap_or_else(|| vec![1; tokens.len()]);
        if types.len() != tokens.len() {
            let reason = format!("has {} entries for {} tokens", types.len(), tokens.len());
            return Err(metadata.error(TYPES, reason));
        }
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in tokens.iter().enumerate() {
            if let Some(other) = ids.insert(*token, id as u32) {
                return Err(metadata.error(TOKENS, format!("holds `{token}` as {other} and as {id}")));
            }
        }
        Ok(Self { tokens, types, ids })
    }

    /// Tokens that text is searched for before anything else.
    fn added_tokens(&self) -> Vec<Value> {
        let added =
            self.types.iter().enumerate().filter(|(_, kind)| matches!(**kind, UNKNOWN | CONTROL | USER_DEFINED));
        added
            .map(|(id, &kind)| {
                json!({"id": id, "content": self.tokens[id], "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": kind != USER_DEFINED})
            })
            .collect()
    }

    fn vocab(&self) -> Map<String, Value> {
        self.tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect()
    }

    /// The template that puts start and end tokens around a text, `null` when there are none.
    fn post_processor(&self, metadata: &Metadata<'_>, defaults: &Defaults) -> Result<Value> {
        let around = |add: &str, add_default: bool, id: &str, id_default: Option<u32>| {
            if !metadata.boolean(&format!("tokenizer.ggml.{add}"))?.unwrap_or(add_default) {
                return Ok(None);
            }
            let key = format!("tokenizer.ggml.{id}");
            let Some(id) = metadata.token_id(&key)?.or(id_default) else {
                return Err(metadata.error(&key, format!("is missing, but tokenizer.ggml.{add} asks for it")));
            };
            match self.tokens.get(id as usize) {
                Some(token) => Ok(Some((id, *token))),
                None => Err(metadata.error(&key, format!("is {id}, the vocabulary has {} tokens", self.tokens.len()))),
            }
        };
        let start = around("add_bos_token", defaults.add_bos, "bos_token_id", defaults.bos)?;
        let end = around("add_eos_token", false, "eos_token_id", defaults.eos)?;
        if start.is_none() && end.is_none() {
            return Ok(Value::Null);
        }
        let piece = |(_, token): &(u32, &str)| json!({"SpecialToken": {"id": token, "type_id": 0}});
        let template = |sequences: &[&str]| {
            let mut pieces = Vec::new();
            for (i, sequence) in sequences.iter().enumerate() {
                let special = |token: &Option<(u32, &str)>| {
                    token
                        .iter()
                        .map(piece)
                        .map(|mut piece| {
                            piece["SpecialToken"]["type_id"] = json!(i);
                            piece
                        })
                        .collect::<Vec<_>>()
                };
                pieces.extend(special(&start));
                pieces.push(json!({"Sequence": {"id": sequence, "type_id": i}}));
                pieces.extend(special(&end));
            }
            pieces
        };
        let special: Map<String, Value> = [start, end]
            .into_iter()
            .flatten()
            .map(|(id, token)| (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]})))
            .collect();
        Ok(json!({"type": "TemplateProcessing", "single": template(&["A"]), "pair": template(&["A", "B"]),
            "special_tokens": special}))
    }
}

/// What a missing key means for one kind of vocabulary.
struct Defaults {
    add_bos: bool,
    bos: Option<u32>,
    eos: Option<u32>,
}

/// Byte-level BPE: GPT-2's bytes as characters, ranked merges, and the splitting rule that `tokenizer.ggml.pre` names.
fn byte_level(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Value> {
    const MERGES: &str = "tokenizer.ggml.merges";
    let rule = pretokenizer::rule(metadata)?;
    let Some(lines) = metadata.strings(MERGES)? else {
        return Err(metadata.error(MERGES, "is missing"));
    };
    let mut merges = Vec::with_capacity(lines.len());
    for (i, line) in lines.into_iter().enumerate() {
        // The first character can itself be a space in vocabularies that are not byte-level.
        let Some((left, right)) = line.split_once(' ') else {
            return Err(metadata.error(MERGES, format!("entry {i} `{line}` is not two tokens")));
        };
        let merged = format!("{left}{right}");
        if let Some(unknown) = [left, right, &merged].into_iter().find(|token| !vocabulary.ids.contains_key(token)) {
            return Err(metadata.error(MERGES, format!("entry {i} needs `{unknown}`, which is no token")));
        }
        merges.push(json!([left, right]));
    }
    let prefix = metadata.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(false);
    let defaults = Defaults { add_bos: rule.add_bos, bos: None, eos: None };
    Ok(json!({
        "version": "1.0",
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": if rule.nfc { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": rule.json(prefix),
        "post_processor": vocabulary.post_processor(metadata, &defaults)?,
        "decoder": {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "unk_token": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": rule.ignore_merges, "vocab": vocabulary.vocab(), "merges": merges},
    }))
}

/// SentencePiece BPE: merges ranked by the score of what they make, bytes for what no token spells.
fn sentence_piece(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>) -> Result<Value> {
    const SCORES: &str = "tokenizer.ggml.scores";
    const UNKNOWN_ID: &str = "tokenizer.ggml.unknown_token_id";
    let Some(scores) = metadata.floats(SCORES)? else {
        return Err(metadata.error(SCORES, "is missing"));
    };
    if scores.len() != vocabulary.tokens.len() {
        let reason = format!("has {} entries for {} tokens", scores.len(), vocabulary.tokens.len());
        return Err(metadata.error(SCORES, reason));
    }
    let prefix = metadata.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = Vec::new();
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if prefix {
        normalizers.push(json!({"type": "Prepend", "prepend": SPACE}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    normalizers.push(json!({"type": "Replace", "pattern": {"String": " "}, "content": SPACE}));
    let unknown = metadata.token_id(UNKNOWN_ID)?.unwrap_or(0);
    let Some(unknown) = vocabulary.tokens.get(unknown as usize) else {
        let reason = format!("is {unknown}, the vocabulary has {} tokens", vocabulary.tokens.len());
        return Err(metadata.error(UNKNOWN_ID, reason));
    };
    let defaults = Defaults { add_bos: true, bos: Some(1), eos: Some(2) };
    Ok(json!({
        "version": "1.0",
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": vocabulary.post_processor(metadata, &defaults)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "BPE", "unk_token": unknown, "fuse_unk": true, "byte_fallback": true,
            "ignore_merges": false, "vocab": vocabulary.vocab(), "merges": score_merges(metadata, vocabulary, &scores)?},
    }))
}

/// Every way to make a token of two others, by descending score of the token; equal scores in the order of the ids.
fn score_merges(metadata: &Metadata<'_>, vocabulary: &Vocabulary<'_>, scores: &[f32]) -> Result<Vec<Value>> {
    let mut merges: Vec<(usize, usize)> = Vec::new();
    for (id, token) in vocabulary.tokens.iter().enumerate() {
        if matches!(vocabulary.types[id], UNKNOWN | CONTROL | BYTE) {
            continue;
        }
        if token.len() > MAX_MERGED_BYTES {
            let reason = format!("entry {id} has {} bytes, the longest permitted has {MAX_MERGED_BYTES}", token.len());
            return Err(metadata.error(TOKENS, reason));
        }
        if scores[id].is_nan() {
            return Err(metadata.error("tokenizer.ggml.scores", format!("entry {id} is not a number")));
        }
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if vocabulary.ids.contains_key(left) && vocabulary.ids.contains_key(right) {
                merges.push((id, at));
            }
        }
        if merges.len() > MAX_MERGES_A_TOKEN * vocabulary.tokens.len() {
            let reason = format!("can be merged in more than {MAX_MERGES_A_TOKEN} ways a token");
            return Err(metadata.error(TOKENS, reason));
        }
    }
    merges.sort_by(|a, b| scores[b.0].total_cmp(&scores[a.0]));
    let pair = |(id, at): (usize, usize)| {
        let (left, right) = vocabulary.tokens[id].split_at(at);
        json!([left, right])
    };
    Ok(merges.into_iter().map(pair).collect())
}

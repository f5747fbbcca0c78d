//! `tokenizer.json`: text to token ids and back, also piece by piece.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde::de::IgnoredAny;

use crate::error::{ModelError, Result};

/// A model folder's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    path: PathBuf,
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    /// Reads `dir/tokenizer.json`, or the vocabulary of a GGUF file (see [`crate::Checkpoint::open`]).
    ///
    /// # Errors
    /// A missing file or one that the tokenizers library refuses, named.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        if let Some(file) = crate::gguf::find(dir)? {
            let json = crate::gguf::tokenizer_json(&file)?;
            return Self::from_bytes(&file, json.to_string().as_bytes());
        }
        let path = dir.join("tokenizer.json");
        if !path.exists() {
            return Err(ModelError::MissingFile { path, needed_for: "text cannot be turned into tokens without it" });
        }
        let json = std::fs::read(&path).map_err(ModelError::io(&path))?;
        Self::from_bytes(&path, &json)
    }

    /// Reads a tokenizer from the contents of a `tokenizer.json`; `path` appears in errors.
    ///
    /// # Errors
    /// Contents that the tokenizers library refuses.
    pub fn from_bytes(path: &Path, json: &[u8]) -> Result<Self> {
        let error = |reason: String| ModelError::Tokenizer { path: path.to_owned(), reason };
        // The library panics at what is not JSON inside of a decoder.
        serde_json::from_slice::<IgnoredAny>(json).map_err(|e| error(format!("not valid JSON: {e}")))?;
        let inner = guarded(|| tokenizers::Tokenizer::from_bytes(json)).map_err(error)?;
        Ok(Self { path: path.to_owned(), inner })
    }

    /// Token ids of `text`. `add_special_tokens` adds what the tokenizer's post-processor puts around a text (often a
    /// start token); text from a chat template carries its own.
    ///
    /// # Errors
    /// Text that the tokenizer cannot encode.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = guarded(|| self.inner.encode(text, add_special_tokens));
        Ok(encoding.map_err(|reason| self.error(reason))?.get_ids().to_vec())
    }

    /// Text of token ids. Bytes that are not UTF-8 become U+FFFD; ids without a token are skipped.
    ///
    /// # Errors
    /// The library's refusal.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        guarded(|| self.inner.decode(ids, skip_special_tokens)).map_err(|reason| self.error(reason))
    }

    /// The id of a token given by its exact text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token with this id, as the vocabulary spells it.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Decodes one token after another.
    pub fn stream(&self, skip_special_tokens: bool) -> StreamDecoder<'_> {
        StreamDecoder { tokenizer: self, skip_special_tokens, ids: Vec::new(), settled: 0, sent: String::new() }
    }

    fn error(&self, reason: String) -> ModelError {
        ModelError::Tokenizer { path: self.path.clone(), reason }
    }
}

/// The library's result, or why it failed. It panics at some definitions that contradict themselves; a file must not be
/// able to end the process.
fn guarded<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizers library does not accept this definition".to_owned()),
    }
}

/// What an unfinished or invalid byte sequence decodes to.
const REPLACEMENT: char = char::REPLACEMENT_CHARACTER;

/// Text of a growing token sequence. A character whose bytes are spread over several tokens comes out with its last
/// one; bytes that never become a character are left out, so that no broken character (U+FFFD) is ever shown.
#[derive(Debug)]
pub struct StreamDecoder<'a> {
    tokenizer: &'a Tokenizer,
    skip_special_tokens: bool,
    /// Tokens decoded together: what a token adds can depend on the one before it (a leading space).
    ids: Vec<u32>,
    /// The first `settled` of them are context only: their text is complete and sent.
    settled: usize,
    /// Text of `ids` that has been returned.
    sent: String,
}

impl StreamDecoder<'_> {
    /// The text that token `id` completes; often empty in the middle of a character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        let complete = text.trim_end_matches(REPLACEMENT);
        let unsent = self.unsent(complete).to_owned();
        let new = unsent.replace(REPLACEMENT, "");
        if complete.len() < text.len() {
            self.sent.push_str(&unsent);
            return Ok(new);
        }
        // All complete: keep only the tokens since the last such point as context.
        self.ids.drain(..self.settled);
        self.settled = self.ids.len();
        self.sent = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        Ok(new)
    }

    /// The text held back, without what never became a character. The decoder starts afresh.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(&mut self) -> Result<String> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        let rest = self.unsent(&text).replace(REPLACEMENT, "");
        self.ids.clear();
        self.settled = 0;
        self.sent.clear();
        Ok(rest)
    }

    /// The part of `text` after what has been sent. A decoder that falls back to bytes can turn a sent character into
    /// U+FFFD when an invalid byte follows it; sent text stays, so the common start is left out.
    fn unsent<'t>(&self, text: &'t str) -> &'t str {
        let common: usize =
            text.chars().zip(self.sent.chars()).take_while(|(a, b)| a == b).map(|(c, _)| c.len_utf8()).sum();
        // Shorter than what was sent: nothing new yet.
        if common < self.sent.len() && text.len() <= self.sent.len() {
            return "";
        }
        &text[common..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte-level tokenizer of the 256 bytes, ids in GPT-2's order of printable stand-ins, with one special token.
    fn byte_level() -> Tokenizer {
        let printable = |b: u32| (33..=126).contains(&b) || (161..=172).contains(&b) || (174..=255).contains(&b);
        let mut next = 256;
        let vocab: serde_json::Map<String, serde_json::Value> = (0..256u32)
            .map(|b| {
                let code = if printable(b) {
                    b
                } else {
                    next += 1;
                    next - 1
                };
                (char::from_u32(code).unwrap().to_string(), b.into())
            })
            .collect();
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [{"id": 256, "content": "<|end|>", "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true}],
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "vocab": vocab, "merges": []},
        });
        Tokenizer::from_bytes(Path::new("tokenizer.json"), json.to_string().as_bytes()).unwrap()
    }

    /// A tokenizer in the manner of SentencePiece: words with a leading mark, bytes as `<0xNN>`.
    fn byte_fallback() -> Tokenizer {
        let mut vocab: serde_json::Map<String, serde_json::Value> =
            (0..256u32).map(|b| (format!("<0x{b:02X}>"), b.into())).collect();
        vocab.insert("\u{2581}one".into(), 256.into());
        vocab.insert("\u{2581}two".into(), 257.into());
        let json = serde_json::json!({
            "version": "1.0",
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": true},
        });
        Tokenizer::from_bytes(Path::new("tokenizer.json"), json.to_string().as_bytes()).unwrap()
    }

    fn pieces(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
        let mut stream = tokenizer.stream(true);
        let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        pieces
    }

    fn bytes(text: &[u8]) -> Vec<u32> {
        text.iter().map(|&b| u32::from(b)).collect()
    }

    #[test]
    fn encodes_and_decodes() {
        let tokenizer = byte_level();
        let ids = tokenizer.encode("Zoë 🦙", true).unwrap();
        assert_eq!(ids, bytes("Zoë 🦙".as_bytes()));
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "Zoë 🦙");
        assert_eq!(tokenizer.token_id("<|end|>"), Some(256));
        assert_eq!(tokenizer.vocab_size(), 257);
    }

    #[test]
    fn split_characters_come_out_whole() {
        let found = pieces(&byte_level(), &bytes("aë🦙.".as_bytes()));
        assert_eq!(found, ["a", "", "ë", "", "", "", "🦙", ".", ""]);
        let found = pieces(&byte_fallback(), &[&[256, 257], &bytes("é".as_bytes())[..], &[257]].concat());
        assert_eq!(found, ["one", " two", "", "é", " two", ""]);
    }

    #[test]
    fn every_piece_of_valid_text_is_valid_and_all_together_are_the_text() {
        let text = "Grüße, 東京! 👩‍👩‍👧 — naïve ﷽ ½";
        let tokenizer = byte_level();
        let found = pieces(&tokenizer, &bytes(text.as_bytes()));
        assert!(found.iter().all(|p| !p.contains(REPLACEMENT)));
        assert_eq!(found.concat(), text);
    }

    #[test]
    fn bytes_that_never_become_a_character_are_left_out() {
        // A lone continuation byte is seen to be invalid when text follows; an unfinished character only at the end.
        let found = pieces(&byte_level(), &[0x80, 0x61, 0xF0, 0x9F]);
        assert_eq!(found, ["", "a", "", "", ""]);
        // A run of byte tokens is one unit there: the character already sent stays.
        let found = pieces(&byte_fallback(), &[256, 0xC3, 0xA9, 0xFF, 257]);
        assert_eq!(found, ["one", "", "é", "", " two", ""]);
    }

    #[test]
    fn special_tokens_are_silent() {
        assert_eq!(pieces(&byte_level(), &[0x61, 256, 0x62]), ["a", "", "b", ""]);
        let tokenizer = byte_level();
        let mut stream = tokenizer.stream(false);
        assert_eq!(stream.push(256).unwrap(), "<|end|>");
    }

    #[test]
    fn missing_or_broken_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json") && error.contains("not found"), "{error}");
        std::fs::write(dir.path().join("tokenizer.json"), "{\"model\": 3}").unwrap();
        let error = Tokenizer::from_dir(dir.path()).unwrap_err();
        assert!(matches!(error, ModelError::Tokenizer { ref path, .. } if path.ends_with("tokenizer.json")));
    }
}

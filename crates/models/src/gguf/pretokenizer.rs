//! How byte-level vocabularies split text before merging, by the names of `tokenizer.ggml.pre`. The patterns are those
//! of the models' own tokenizer.json files.

use serde_json::{Value, json};

use super::metadata::Metadata;
use crate::error::Result;

const PRE: &str = "tokenizer.ggml.pre";

/// GPT-2, with numbers of any length.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Llama 3: numbers of up to three digits.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Qwen 2 and 3: digit by digit.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// GPT-4o and Llama 4.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// Mistral's Tekken.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
/// DeepSeek-V3's words, after numbers and Chinese and Japanese runs.
const DEEPSEEK3_WORDS: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
/// DeepSeek LLM's and V2's cased letters.
const DEEPSEEK_LETTERS: &str = r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-\x{1F7D}ᾀ-ᾴᾶ-ᾼ\x{1FBE}ῂ-ῄῆ-ῌῐ-\x{1FD3}ῖ-\x{1FDB}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212A}-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+";
const DEEPSEEK_PUNCTUATION: &str = r"\s?[!-/:-~！-／：-～‘-‟　-。]+";
const DEEPSEEK_IDEOGRAPHS: &str = r"[一-龥ࠀ-一가-퟿]+";

/// What `default` and files without a name stand for: punctuation first, numbers in threes.
const DEFAULT: Rule = Rule {
    patterns: &[
        r"[\p{P}\$\+<=>\^~\|]+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+",
        "[0-9][0-9][0-9]",
    ],
    ..PLAIN
};

/// How one family splits.
#[derive(Clone, Copy)]
pub(super) struct Rule {
    /// Patterns applied one after another, each to the pieces that the ones before it left.
    patterns: &'static [&'static str],
    /// Text is brought to normal form C first.
    pub nfc: bool,
    /// A piece that is a token is taken whole, whatever the merges say.
    pub ignore_merges: bool,
    /// A start token is added unless the file says otherwise.
    pub add_bos: bool,
}

const PLAIN: Rule = Rule { patterns: &[GPT2], nfc: false, ignore_merges: false, add_bos: false };

/// Names and rules.
const RULES: [(&[&str], Rule); 11] = [
    (&["default"], DEFAULT),
    (&["gpt-2", "mpt", "phi-2", "olmo", "jais", "trillion", "granite-docling"], PLAIN),
    (
        &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral"],
        Rule { patterns: &[LLAMA3], ignore_merges: true, add_bos: true, ..PLAIN },
    ),
    (&["smaug-bpe", "dbrx", "glm4", "chatglm-bpe"], Rule { patterns: &[LLAMA3], ..PLAIN }),
    (&["qwen2", "deepseek-r1-qwen", "megrez"], Rule { patterns: &[QWEN2], nfc: true, ..PLAIN }),
    (&["stablelm2", "hunyuan"], Rule { patterns: &[QWEN2], ..PLAIN }),
    (
        &["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone"],
        Rule { patterns: &[r"\p{N}", GPT2], ..PLAIN },
    ),
    (&["gpt-4o", "llama4"], Rule { patterns: &[GPT4O], ..PLAIN }),
    (&["tekken"], Rule { patterns: &[TEKKEN], ignore_merges: true, add_bos: true, ..PLAIN }),
    (
        &["deepseek-llm"],
        Rule {
            patterns: &[r"[\r\n]", DEEPSEEK_LETTERS, DEEPSEEK_PUNCTUATION, r"\s+$", DEEPSEEK_IDEOGRAPHS, r"\p{N}+"],
            ..PLAIN
        },
    ),
    (&["deepseek-v3"], Rule { patterns: &[r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", DEEPSEEK3_WORDS], ..PLAIN }),
];

/// DeepSeek Coder and the models derived from it.
const DEEPSEEK_CODER: (&[&str], Rule) = (
    &["deepseek-coder"],
    Rule { patterns: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", DEEPSEEK_IDEOGRAPHS, r"\p{N}"], ..PLAIN },
);

/// The rule that the file names.
///
/// # Errors
/// An unknown name: another splitting would give other tokens.
pub(super) fn rule(metadata: &Metadata<'_>) -> Result<Rule> {
    let Some(name) = metadata.text(PRE)? else {
        return Ok(DEFAULT);
    };
    let all = || RULES.iter().chain([&DEEPSEEK_CODER]);
    let found = all().find(|(names, _)| names.contains(&name));
    found.map(|(_, rule)| *rule).ok_or_else(|| {
        let known: Vec<&str> = all().flat_map(|(names, _)| names.iter().copied()).collect();
        metadata.error(PRE, format!("`{name}` is not supported; supported: {}", known.join(", ")))
    })
}

impl Rule {
    /// The `pre_tokenizer` of a tokenizer.json.
    pub(super) fn json(&self, prefix_space: bool) -> Value {
        let splits = self.patterns.iter().map(
            |pattern| json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false}),
        );
        let bytes = json!({"type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": true,
            "use_regex": false});
        json!({"type": "Sequence", "pretokenizers": splits.chain([bytes]).collect::<Vec<_>>()})
    }
}

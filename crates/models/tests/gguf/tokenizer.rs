//! Token ids against llama.cpp for every splitting rule, decoding, and the chat template.

use marlin_models::{ChatTemplate, Message, Tokenizer};
use serde_json::Value;

use crate::file::{ARRAY, GgufSpec, text};
use crate::golden;

#[test]
fn ids_equal_llama_cpp() {
    let goldens: Value = serde_json::from_slice(&std::fs::read(golden("encodings.json")).unwrap()).unwrap();
    let mut failures = Vec::new();
    for (file, cases) in goldens.as_object().unwrap() {
        let tokenizer = Tokenizer::from_dir(&golden(file)).unwrap();
        for case in cases.as_array().unwrap() {
            let (text, expected) = (case["text"].as_str().unwrap(), &case["ids"]);
            let ids = tokenizer.encode(text, true).unwrap();
            if serde_json::json!(ids) != *expected {
                let show = |ids: &[u32]| ids.iter().map(|&id| tokenizer.token(id).unwrap()).collect::<Vec<_>>();
                let expected: Vec<u32> = serde_json::from_value(expected.clone()).unwrap();
                failures.push(format!("{file} {text:?}\n  {:?}\n  {:?}", show(&ids), show(&expected)));
            }
        }
    }
    assert!(failures.is_empty(), "{} differ:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn decoding_gives_the_text_back() {
    for file in ["tokenizer-qwen2.gguf", "tokenizer-deepseek-v3.gguf", "tokenizer-spm.gguf", "tokenizer-spm_plain.gguf"]
    {
        let tokenizer = Tokenizer::from_dir(&golden(file)).unwrap();
        let text = "Größe, 東京! 👩‍👩‍👧  don't 123\n";
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text, "{file}");
    }
}

#[test]
fn the_template_comes_with_its_tokens() {
    let template = ChatTemplate::from_dir(&golden("llama-spm.gguf")).unwrap().unwrap();
    let messages = [Message::new("user", "hi")];
    let prompt = template.render(&messages, true, &serde_json::Map::new()).unwrap();
    assert_eq!(prompt, "<s>[user] hi</s>[assistant]");
    assert!(ChatTemplate::from_dir(&golden("tokenizer-spm.gguf")).unwrap().is_none());
}

fn strings(values: &[&str]) -> Vec<u8> {
    let count = (values.len() as u64).to_le_bytes();
    [&8u32.to_le_bytes()[..], &count, &values.iter().flat_map(|v| text(v)).collect::<Vec<u8>>()].concat()
}

fn error_of(spec: &GgufSpec) -> String {
    let dir = tempfile::tempdir().unwrap();
    Tokenizer::from_dir(&spec.write(dir.path(), "model.gguf")).unwrap_err().to_string()
}

#[test]
fn damaged_vocabularies_are_refused() {
    let tokens = |tokens: &[&str]| {
        let spec = GgufSpec::default().text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "qwen2");
        spec.key("tokenizer.ggml.tokens", ARRAY, &strings(tokens)).key("tokenizer.ggml.merges", ARRAY, &strings(&[]))
    };
    let good = tokens(&["a", "b", "ab"]);
    let id = |name: &str, id: u32| good.clone().u32(name, id);
    let merges = |lines: &[&str]| good.clone().key("tokenizer.ggml.merges", ARRAY, &strings(lines));
    let integers = |values: &[i32]| {
        let count = (values.len() as u64).to_le_bytes();
        [&5u32.to_le_bytes()[..], &count, &values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()].concat()
    };
    let boolean = |spec: GgufSpec, name: &str| spec.key(name, 7, &[1]);
    let spm = good.clone().text("tokenizer.ggml.model", "llama");
    let cases = [
        (GgufSpec::llama(), ["tokenizer.ggml.tokens", "missing"]),
        (tokens(&["a", "a"]), ["tokenizer.ggml.tokens", "`a`"]),
        (good.clone().without("tokenizer.ggml.model"), ["tokenizer.ggml.model", "missing"]),
        (good.clone().text("tokenizer.ggml.model", "bert"), ["tokenizer.ggml.model", "bert"]),
        (good.clone().text("tokenizer.ggml.pre", "unheard-of"), ["tokenizer.ggml.pre", "unheard-of"]),
        (good.clone().u32("tokenizer.ggml.pre", 1), ["tokenizer.ggml.pre", "string"]),
        (good.clone().without("tokenizer.ggml.merges"), ["tokenizer.ggml.merges", "missing"]),
        (merges(&["ab"]), ["tokenizer.ggml.merges", "entry 0"]),
        (merges(&["a b", "b b"]), ["entry 1", "`bb`"]),
        (
            good.clone().key("tokenizer.ggml.token_type", ARRAY, &integers(&[1, 1])),
            ["tokenizer.ggml.token_type", "2 entries"],
        ),
        (boolean(id("tokenizer.ggml.bos_token_id", 7), "tokenizer.ggml.add_bos_token"), ["bos_token_id", "is 7"]),
        (boolean(good.clone(), "tokenizer.ggml.add_bos_token"), ["bos_token_id", "missing"]),
        (spm.clone(), ["tokenizer.ggml.scores", "missing"]),
        (spm.key("tokenizer.ggml.scores", ARRAY, &integers(&[1, 1, 1])), ["tokenizer.ggml.scores", "array"]),
    ];
    for (spec, parts) in cases {
        let error = error_of(&spec);
        assert!(error.contains("model.gguf") && parts.iter().all(|part| error.contains(part)), "{parts:?}: {error}");
    }
    let dir = tempfile::tempdir().unwrap();
    assert!(Tokenizer::from_dir(&merges(&["a b"]).write(dir.path(), "model.gguf")).is_ok());
}

/// Runs of one character merge in quadratically many ways: more than any vocabulary needs is refused.
#[test]
fn merges_are_bounded_by_the_vocabulary() {
    let runs = |longest: usize| {
        let tokens: Vec<String> = (1..=longest).map(|len| "a".repeat(len)).collect();
        let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
        let count = (longest as u64).to_le_bytes();
        let scores = [&6u32.to_le_bytes()[..], &count, &vec![0; 4 * longest]].concat();
        let spec =
            GgufSpec::default().text("tokenizer.ggml.model", "llama").key("tokenizer.ggml.scores", ARRAY, &scores);
        let spec = spec.key("tokenizer.ggml.tokens", ARRAY, &strings(&tokens));
        spec.key("tokenizer.ggml.add_bos_token", 7, &[0])
    };
    let dir = tempfile::tempdir().unwrap();
    let tokenizer = Tokenizer::from_dir(&runs(100).write(dir.path(), "model.gguf")).unwrap();
    assert_eq!(tokenizer.vocab_size(), 100);
    let error = error_of(&runs(200));
    assert!(error.contains("tokenizer.ggml.tokens") && error.contains("more than 64 ways"), "{error}");
}

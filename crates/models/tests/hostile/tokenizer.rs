use std::path::Path;

use marlin_models::{ModelError, Tokenizer};

use super::*;

const GOOD: &str = include_str!("../../../../fuzz/seeds/tokenizer/byte_level_bpe.json");

#[track_caller]
fn refused(json: &str, parts: &[&str]) {
    let error = Tokenizer::from_bytes(Path::new("tokenizer.json"), json.as_bytes()).unwrap_err();
    assert!(matches!(error, ModelError::Tokenizer { .. }));
    assert_names(&error.to_string(), &["tokenizer.json"]);
    assert_names(&error.to_string(), parts);
}

#[test]
fn a_good_definition_is_read() {
    let tokenizer = Tokenizer::from_bytes(Path::new("tokenizer.json"), GOOD.as_bytes()).unwrap();
    assert_eq!(tokenizer.encode("Onc", true).unwrap(), [5, 4]);
}

/// The library itself panics at these.
#[test]
fn text_that_is_not_json_is_refused_wherever_it_breaks_off() {
    for end in 0..GOOD.len() {
        refused(&GOOD[..end], &["not valid JSON"]);
    }
    refused(&GOOD.replace("\"trim_offsets\": true", "\"trim_offsets\": tru"), &["not valid JSON"]);
}

#[test]
fn parts_of_the_wrong_kind_are_refused() {
    for (from, to) in [
        ("\"BPE\"", "\"Unknown\""),
        ("[\"O\", \"n\"]", "[\"O\", \"missing\"]"),
        ("[\"O\", \"n\"]", "[7]"),
        ("\"type\": \"NFC\"", "\"type\": \"Nothing\""),
        ("\"version\": \"1.0\"", "\"version\": \"2.0\""),
    ] {
        assert!(GOOD.contains(from), "{from}");
        refused(&GOOD.replacen(from, to, 1), &[]);
    }
}

//! `marlin bench`: what it measures fits together.

mod common;

use common::{json, stdout};
use serde_json::Value;

const BENCH: [&str; 7] = ["bench", "--device", "cpu", "--prompt-tokens", "24", "--gen-tokens", "5"];

fn number(value: &Value, key: &str) -> f64 {
    value[key].as_f64().unwrap_or_else(|| panic!("{key}: {value}"))
}

fn operations(phase: &Value) -> &Vec<Value> {
    phase["operations"].as_array().unwrap_or_else(|| panic!("operations: {phase}"))
}

fn assert_close(found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() < 1e-9, "{found}, expected {expected}");
}

#[test]
fn decode_reads_the_chosen_experts_and_the_cache() {
    let result = json(&[&BENCH[..], &["--json"]].concat());
    let bytes = number(&result, "bytes_per_token");
    assert_close(number(&result, "achieved_bytes_per_s"), bytes * number(&result, "decode_tokens_per_s"));
    assert!(number(&result, "read_bandwidth_bytes_per_s") > 1e8, "{result}");
    // Five tokens in turns of four.
    let shares = &result["share_of_plain_reads"];
    assert_eq!((number(shares, "rounds"), number(shares, "tokens_per_round")), (2.0, 4.0), "{shares}");
    let quartiles = ["lower_quartile", "median", "upper_quartile"].map(|key| number(shares, key));
    assert!(quartiles[0] > 0.0 && quartiles.is_sorted(), "{shares}");
    assert!(number(shares, "decode_bytes_per_s") > 0.0 && number(shares, "plain_bytes_per_s") > 1e8, "{shares}");
    // Two of eight experts, one row of the embedding.
    let weights = number(&result, "weights_bytes");
    assert!(0.3 * weights < bytes && bytes < 0.9 * weights, "{result}");
    assert!(result.get("profile").is_none());
}

#[test]
fn the_profile_adds_up() {
    let result = json(&[&BENCH[..], &["--profile", "--json"]].concat());
    let profile = &result["profile"];
    for bound in ["read_bytes_per_s", "f32_flops_per_s", "int8_ops_per_s"] {
        assert!(number(&profile["roofline"], bound) > 1e8, "{profile}");
    }
    for (name, tokens) in [("prefill", 24.0), ("decode", 5.0)] {
        let phase = &profile[name];
        let seconds = number(phase, "seconds");
        assert_eq!(number(phase, "tokens"), tokens);
        let mut accounted = 0.0;
        for operation in operations(phase) {
            let time = number(operation, "seconds");
            accounted += time;
            assert!(number(operation, "calls") >= 1.0 && time > 0.0, "{operation}");
            assert_close(number(operation, "time_share"), time / seconds);
            assert_close(number(operation, "achieved_bytes_per_s") * time, number(operation, "bytes"));
            assert!(operation["achieved_flops_per_s"].is_f64(), "{operation}");
            assert!(number(operation, "roofline_share") > 0.0, "{operation}");
        }
        let rest = number(phase, "unaccounted_seconds");
        assert!(rest >= 0.0 && (accounted + rest - seconds).abs() < 1e-9, "{phase}");
        let families: Vec<_> = operations(phase).iter().map(|o| o["family"].as_str().expect("family")).collect();
        assert!(["linear", "attention", "moe", "norm", "rope"].iter().all(|f| families.contains(f)), "{families:?}");
    }
    // The cache grows steadily: the first and the last token tell the mean of all.
    let read: f64 =
        operations(&profile["decode"]).iter().map(|o| number(o, "weight_bytes") + number(o, "cache_bytes")).sum();
    assert_close(read / 5.0, number(&result, "bytes_per_token"));
}

#[test]
fn tables_are_printed() {
    let text = String::from_utf8(stdout(&[&BENCH[..], &["--profile"]].concat())).unwrap();
    for part in [
        "MB per decoded token",
        "next to plain reads",
        "from small pages",
        "roofline",
        "prefill: 24 tokens",
        "decode: 5 tokens",
        "unaccounted",
    ] {
        assert!(text.contains(part), "`{part}` is not in\n{text}");
    }
    assert_eq!(text.matches("moe moe_expert_mlp exl3").count(), 2, "{text}");
    let plain = String::from_utf8(stdout(&BENCH)).unwrap();
    assert!(plain.contains("MB per decoded token") && !plain.contains("unaccounted"), "{plain}");
}

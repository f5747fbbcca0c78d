//! The oracle passes its own cases, so that none asks for what its definition does not give.

use marlin_conformance::{CaseResult, Mode, VerifyOptions, verify};
use marlin_ops::oracle::Oracle;

fn passes(oracle: Oracle, mode: Mode) {
    let options = VerifyOptions { mode, ..VerifyOptions::default() };
    let report = verify(&oracle, &options);
    let failures: Vec<_> = report.failures().collect();
    assert!(failures.is_empty(), "{failures:#?}");
    assert_eq!(report.device, "oracle");
    assert_eq!((report.passed, report.failed), (report.results.len(), 0));
    let json = serde_json::to_value(&report).unwrap();
    let keys = |value: &serde_json::Value| -> Vec<String> { value.as_object().unwrap().keys().cloned().collect() };
    assert_eq!(keys(&json), ["device", "passed", "failed", "results"]);
    for result in json["results"].as_array().unwrap() {
        let expected = ["family", "operation", "configuration", "max_error", "tolerance", "passed"];
        assert_eq!(keys(result), expected);
        assert!(result["max_error"].is_f64() && result["tolerance"].is_f64());
    }
}

#[test]
fn exact() {
    passes(Oracle::new(), Mode::Exact);
}

#[test]
fn int8_activations() {
    passes(Oracle::with_int8_activations(), Mode::Int8Activations);
}

#[test]
fn the_modes_are_told_apart() {
    let options =
        VerifyOptions { families: Some(vec![marlin_conformance::Family::Linear]), ..VerifyOptions::default() };
    let report = verify(&Oracle::with_int8_activations(), &options);
    assert!(report.failed > 100, "only {} cases notice rounded activations", report.failed);
    // Formats without integer codes are not rounded; a gated product may pair them with others.
    let alone = |failure: &&CaseResult| !failure.configuration.contains(" x ");
    assert!(report.failures().filter(alone).all(|failure| !failure.configuration.starts_with("fp8")));
}

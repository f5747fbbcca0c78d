//! What the int8 activations of the default mode cost in perplexity, against `--exact`.

mod common;

use common::{json, models, stdout};

/// Largest relative change of the perplexity.
const TOLERANCE: f64 = 0.001;

/// Held-out perplexity in both modes of a bundled or just quantized model.
fn check(name: &str, model: &str, windows: &str) {
    let text = models("data/heldout.txt");
    let score = |flags: &[&str]| {
        let arguments =
            ["perplexity", "--model", model, "--text", &text, "--windows", windows, "--threads", "1", "--json"];
        let result = json(&[&arguments, flags].concat());
        assert!(result["tokens"].as_u64() > Some(10_000), "{result}");
        result["perplexity"].as_f64().expect("a number")
    };
    let (fast, exact) = (score(&[]), score(&["--exact"]));
    let change = fast / exact - 1.0;
    println!("{name}: {fast:.5}, exact {exact:.5}, change {:.4} %", 100.0 * change);
    assert!(change.abs() <= TOLERANCE, "{name}: {fast} against {exact} in exact mode");
    assert_ne!(fast, exact, "{name}: the default mode rounds activations");
}

#[test]
fn the_bundled_models() {
    check("bundled EXL3", &models("marlin-stories-exl3"), "1000");
    check("bundled INT4", &models("marlin-stories-int4"), "1000");
}

/// The bf16 model in every format that takes int8 activations. Rounding to the nearest of four values would leave no
/// model to speak of, so that two bits are chosen by GPTQ.
#[test]
fn every_integer_format() {
    let (folder, calibration) = (tempfile::tempdir().unwrap(), models("data/calibration.txt"));
    for format in ["fp4_e2m1", "nvfp4", "mxfp4", "int4_u4", "int4_s4", "int8", "int8_asym", "int3", "int2"] {
        let out = folder.path().join(format).display().to_string();
        let gptq = ["--method", "gptq", "--calibration", &calibration, "--calibration-tokens", "8192"];
        let method = if format == "int2" { &gptq[..] } else { &[] };
        stdout(&[&["quantize", &models("marlin-stories"), &out, "--format", format], method].concat());
        check(format, &out, "20");
    }
}

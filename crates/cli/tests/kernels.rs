//! `marlin kernels`, and the audit of `marlin verify` on the CPU.

mod common;

use std::process::Command;

use common::{json, stdout};

#[test]
fn listing() {
    let rows = json(&["kernels", "--json"]);
    let rows = rows.as_array().expect("an array");
    assert_eq!(rows.len(), 284);
    let row = &rows[0];
    assert_eq!((row["name"].as_str(), row["family"].as_str()), (Some("marlin_gemm_fp4"), Some("gemm")));
    let text = String::from_utf8(stdout(&["kernels", "--family", "rope"])).expect("text");
    assert_eq!(text.lines().count(), 16);
    assert!(text.contains("rope_apply"), "{text}");
    assert!(text.ends_with("15 kernels, 15 bound, 0 not yet\n"), "{text}");
    assert!(stdout(&["kernels", "--markdown"]).starts_with(b"# The kernel collection"));
}

/// Every row has a line, none fails, and the last line counts them.
#[test]
fn every_row_on_the_cpu() {
    let text = String::from_utf8(stdout(&["verify", "--device", "cpu"])).expect("text");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 1 + 284 + 1, "{text}");
    assert!(lines[1].starts_with("marlin_gemm_fp4 "), "{text}");
    let last = lines[285];
    let count = |what: &str| -> usize {
        let before = last.split(what).next().and_then(|before| before.split_whitespace().last());
        before.and_then(|count| count.parse().ok()).unwrap_or_else(|| panic!("{what}: {last}"))
    };
    assert!(last.starts_with("cpu: "), "{last}");
    assert_eq!(count(" failed"), 0, "{text}");
    assert!(count(" rows passed") >= 70, "{last}");
    assert_eq!(count(" rows passed") + count(" not yet") + count(" need a GPU"), 284, "{last}");
}

#[test]
fn one_row_by_its_name() {
    let report = json(&["verify", "--device", "cpu", "--kernel", "rope_generate_cache", "--json"]);
    assert_eq!((&report["device"], &report["passed"], &report["failed"]), (&"cpu".into(), &1.into(), &0.into()));
    let row = &report["results"][0];
    assert_eq!((&row["status"], &row["passed"]), (&"passed".into(), &true.into()));
    for key in ["family", "operation", "configuration", "max_error", "tolerance"] {
        assert!(!row[key].is_null(), "{key}: {row}");
    }
    let report = json(&["verify", "--device", "cpu", "--kernel", "image_resize_bicubic", "--json"]);
    let row = &report["results"][0];
    assert_eq!((&row["status"], &row["passed"]), (&"not_yet".into(), &false.into()));
    assert!(row["reason"].as_str().is_some_and(|reason| reason.contains("vision")), "{row}");
}

#[test]
fn unknown_names_are_errors() {
    for (arguments, part) in [
        (&["kernels", "--family", "gemms"][..], "gemms"),
        (&["verify", "--device", "cpu", "--kernel", "no_such_kernel"], "no_such_kernel"),
        (&["verify", "--device", "cpu", "--family", "norm", "--kernel", "no_such_norm"], "no_such_norm"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_marlin")).args(arguments).output().expect("the binary starts");
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(part), "{arguments:?}");
    }
}

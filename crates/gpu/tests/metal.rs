//! Every kernel that the conformance suite launches, as Metal would compile it. What the suite says of the results does
//! not matter here: the recorder runs nothing.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use marlin_conformance::{CaseResult, VerifyOptions, verify};
use marlin_gpu::record::{msl, write_msl};

#[test]
fn every_kernel_is_metal() {
    let (recorder, recording) = msl();
    let report = verify(&recorder, &VerifyOptions::default());
    let kernels = recording.kernels();
    println!("{} launches, {} kernels", recording.launches(), kernels.len());
    // What is not launched is not checked: no family may be missing, no case refused.
    for family in ["attention", "convert", "dequantize", "hadamard", "linear", "moe", "norm", "rope", "sampling"] {
        assert!(kernels.iter().any(|kernel| kernel.name.starts_with(family)), "no kernel of {family}");
    }
    let not_launched: Vec<_> = report.results.iter().filter(|result| !launched(result)).collect();
    assert!(not_launched.is_empty(), "{} cases without kernels: {not_launched:#?}", not_launched.len());

    let folder = new_folder("msl");
    let files = write_msl(&folder, &kernels).unwrap();
    assert_eq!(files.len(), kernels.len());
    let faults = recording.faults();
    assert!(faults.is_empty(), "{} faults\n{}", faults.len(), faults.join("\n"));
    let (parsed, output) = check(&folder);
    assert!(parsed, "clang refuses kernels in {}:\n{output}", folder.display());
}

/// Bad values inside operands are found by kernels, which do not run here; every other refusal of an operation means that
/// its kernel was not launched.
fn launched(result: &CaseResult) -> bool {
    let Some(error) = &result.error else { return true };
    result.configuration.starts_with("refused: ") && error.ends_with("but it was accepted")
}

/// The check notices text that is not Metal, and says in which kernel.
#[test]
fn bad_text_is_refused() {
    let kernel = |statement: &str| {
        format!(
            "#include <metal_stdlib>\nusing namespace metal;\n[[kernel]]\n\
             void f(device float* x [[buffer(0)]], uint i [[thread_index_in_threadgroup]]) {{\n{statement}\n}}\n"
        )
    };
    let folder = new_folder("bad-msl");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("good.metal"), kernel("x[i] = exp(x[i]);")).unwrap();
    let (parsed, output) = check(&folder);
    assert!(parsed, "{output}");
    if output.contains("SKIPPED") {
        return;
    }
    for (name, statement) in [
        ("function", "x[i] = expf(x[i]);"),
        ("type", "double y = x[i]; x[i] = y;"),
        ("space", "threadgroup float* y = x; y[i] = 0.0;"),
        ("syntax", "x[i] = ;"),
        ("directive", "#error instruction without a translation"),
    ] {
        let path = folder.join(name).with_extension("metal");
        fs::write(&path, kernel(statement)).unwrap();
        let (parsed, output) = check(&folder);
        assert!(!parsed, "{statement} was accepted");
        assert!(output.contains("clang refuses 1 of 2") && output.contains("error:"), "{output}");
        assert!(output.contains(&format!("{name}.metal")) && !output.contains("good.metal"), "{output}");
        fs::remove_file(&path).unwrap();
    }
}

/// Whether clang parses every kernel of a folder, and what the script says. One at a time: it may install clang.
fn check(folder: &Path) -> (bool, String) {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tools/metal/check.sh");
    let output = Command::new(script).arg(folder).output().unwrap();
    let text = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    if text.contains("SKIPPED") {
        // Past the capture of the test harness, which hides what passing tests print.
        std::io::stderr().write_all(text.as_bytes()).unwrap();
    }
    println!("{text}");
    (output.status.success(), text)
}

/// A folder of this test run that does not exist yet.
fn new_folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if folder.exists() {
        fs::remove_dir_all(&folder).unwrap();
    }
    folder
}

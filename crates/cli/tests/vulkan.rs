//! A model and kernels on the Vulkan device of this machine, software or not. Without one each test prints a line `SKIPPED`.
#![cfg(all(feature = "gpu", not(target_os = "macos")))]

mod decode;
#[path = "../../models/tests/common/mod.rs"]
mod golden;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use marlin_gpu::Vulkan;
use serde_json::Value;

/// The device, or a line past the capture of the test harness, which hides what passing tests print.
fn device(test: &str) -> Option<Vulkan> {
    match marlin_gpu::vulkan(None) {
        Ok(gpu) => Some(gpu.with_exact(true)),
        Err(error) => {
            std::io::stderr().write_all(format!("SKIPPED: {test}, because {error}\n").as_bytes()).unwrap();
            None
        }
    }
}

/// The bundled INT4 model, greedy, 64 tokens: the text that the CPU computes with f32 activations.
#[test]
fn greedy_tokens_equal_the_cpus() {
    if device("greedy tokens on Vulkan").is_none() {
        return;
    }
    let text = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
        command.args(["generate", "--json", "--temperature", "0", "--max-tokens", "64", "Once upon a time, there was"]);
        let output = command.args(arguments).current_dir(repository()).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let result: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(result["generated_tokens"], 64);
        result["text"].as_str().unwrap().to_owned()
    };
    assert_eq!(text(&["--device", "vulkan"]), text(&["--device", "cpu", "--exact"]));
}

/// Logits of every golden model, fed in every way, within the tolerance of f32 activations.
#[test]
fn logits_equal_transformers() {
    if let Some(gpu) = device("logits of the golden models on Vulkan") {
        golden::parity::check_all_golden_models(gpu);
    }
}

#[test]
fn exl3_logits_equal_the_runtimes() {
    if let Some(gpu) = device("logits of an EXL3 model on Vulkan") {
        golden::parity::check_exl3_on(&Arc::new(gpu));
    }
}

#[test]
fn imported_models_have_their_tools_logits() {
    if let Some(gpu) = device("logits of imported models on Vulkan") {
        golden::parity::check_imported_on(&Arc::new(gpu));
    }
}

#[test]
fn nothing_but_a_token_travels() {
    if let Some(gpu) = device("traffic per token on Vulkan") {
        decode::one_small_read_a_token(&Arc::new(gpu));
    }
}

#[test]
fn bench_counts_launches() {
    if device("`marlin bench` on Vulkan").is_none() {
        return;
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
    command.args(["bench", "--device", "vulkan", "--prompt-tokens", "8", "--gen-tokens", "2", "--json"]);
    let output = command.current_dir(repository()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    let number = |value: &Value, key: &str| value[key].as_f64().unwrap_or_else(|| panic!("{key}: {value}"));
    let [decode] = &result["decodes"].as_array().unwrap()[..] else { panic!("Vulkan has no graphs: {result}") };
    assert_eq!((number(decode, "reads_per_token"), number(decode, "read_bytes_per_token")), (1.0, 4.0));
    assert!(number(decode, "launches_per_token") > 20.0 && number(decode, "microseconds_per_launch") > 0.0, "{decode}");
    assert!(number(&result, "copy_bandwidth_bytes_per_s") > 1e8, "{result}");
    let (rate, bytes) = (number(&result, "decode_tokens_per_s"), number(&result, "bytes_per_token"));
    assert!((number(&result, "achieved_bytes_per_s") / (rate * bytes) - 1.0).abs() < 1e-9, "{result}");
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Some rows of the kernel audit; `test.sh` runs all.
#[test]
fn kernels_of_the_collection_pass() {
    if device("the kernel audit on Vulkan").is_none() {
        return;
    }
    for kernel in ["float_to_bf16_kernel", "softmax_fp16", "rope_qk_fused", "marlin_gemm_fp4_single_stage"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_marlin"));
        command.args(["verify", "--device", "vulkan", "--kernel", kernel, "--json"]);
        let output = command.output().unwrap();
        assert!(output.status.success(), "{kernel}: {}", String::from_utf8_lossy(&output.stdout));
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        let counts = ["passed", "failed"].map(|key| report[key].as_u64());
        assert_eq!((&report["device"], counts), (&"vulkan".into(), [Some(1), Some(0)]), "{report}");
        let row = &report["results"][0];
        assert_eq!((&row["name"], &row["status"]), (&kernel.into(), &"passed".into()), "{report}");
    }
}

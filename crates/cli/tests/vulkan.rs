//! A model and kernels on the Vulkan device of this machine, software or not. Without one each test prints a line `SKIPPED`.
#![cfg(all(feature = "gpu", not(target_os = "macos")))]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use marlin_gpu::Vulkan;
use serde_json::Value;

/// The device, or a line past the capture of the test harness, which hides what passing tests print.
fn device(test: &str) -> Option<Vulkan> {
    match marlin_gpu::vulkan(None) {
        Ok(gpu) => Some(gpu),
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

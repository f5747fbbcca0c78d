//! The command line as a user meets it: the bundled model, `--json`, exit statuses and error lines.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn marlin(arguments: &[&str]) -> Output {
    marlin_in(Path::new("."), arguments, b"")
}

/// Runs the binary in `folder` with `input` on standard input.
fn marlin_in(folder: &Path, arguments: &[&str], input: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_marlin"))
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    // A command that refuses its arguments may exit before reading.
    let _ = child.stdin.take().expect("stdin").write_all(input);
    child.wait_with_output().expect("the binary ends")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(arguments: &[&str]) -> Value {
    let output = marlin(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{arguments:?}: {e}"))
}

/// The command fails with status 1 and one line that contains every part.
fn assert_fails(arguments: &[&str], parts: &[&str]) {
    let output = marlin(arguments);
    let line = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {line}");
    assert_eq!(line.trim_end().lines().count(), 1, "{arguments:?}: {line}");
    assert!(output.stdout.is_empty(), "{arguments:?}");
    for part in parts {
        assert!(line.contains(part), "{arguments:?}: `{part}` is not in `{line}`");
    }
}

/// The arguments are refused with status 2 and a message that contains every part.
fn assert_usage(arguments: &[&str], parts: &[&str]) {
    let output = marlin(arguments);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
    for part in parts {
        assert!(text.contains(part), "{arguments:?}: `{part}` is not in `{text}`");
    }
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn stories() -> String {
    repository().join("models/marlin-stories").display().to_string()
}

fn path(folder: &Path, name: &str) -> String {
    folder.join(name).display().to_string()
}

const PROMPT: &str = "Once upon a time, there was a little girl named Lily.";

#[test]
fn generate_reports_what_the_contract_says() {
    let greedy = ["generate", PROMPT, "--device", "cpu", "--temperature", "0", "--max-tokens", "40", "--json"];
    let result = json(&greedy);
    let text = result["text"].as_str().expect("text");
    assert!(text.len() > 40, "{text}");
    assert!(!text.contains(PROMPT), "the continuation only: {text}");
    assert!(result["prompt_tokens"].as_u64() > Some(5));
    assert_eq!(result["generated_tokens"], 40);
    assert_eq!(result["finish_reason"], "length");
    assert_eq!(result["device"], "cpu");
    assert!(result["model"].as_str().is_some_and(|m| m.contains("marlin-stories")));
    for rate in ["prefill_tokens_per_s", "decode_tokens_per_s"] {
        assert!(result[rate].as_f64() > Some(0.0), "{rate}");
    }
    assert_eq!(json(&greedy)["text"], result["text"], "greedy is reproducible");
}

#[test]
fn a_story_ends_and_keeps_its_character() {
    let result = json(&["generate", PROMPT, "--temperature", "0", "--max-tokens", "700", "--json"]);
    let text = result["text"].as_str().expect("text");
    assert_eq!(result["finish_reason"], "stop", "{text}");
    assert!(text.matches("Lily").count() >= 2, "{text}");
    assert!(!text.contains('\u{fffd}') && !text.contains("<|"), "{text}");
}

#[test]
fn a_seed_repeats_a_draw_and_threads_do_not_matter() {
    let draw = |seed: &str, threads: &str| {
        json(&[
            "generate",
            PROMPT,
            "--seed",
            seed,
            "--threads",
            threads,
            "--max-tokens",
            "60",
            "--temperature",
            "1",
            "--top-k",
            "50",
            "--top-p",
            "0.95",
            "--min-p",
            "0.01",
            "--json",
        ])["text"]
            .clone()
    };
    assert_eq!(draw("7", "1"), draw("7", "2"));
    assert_ne!(draw("7", "1"), draw("8", "1"));
}

#[test]
fn generate_works_from_any_folder_and_from_a_pipe() {
    let folder = tempfile::tempdir().unwrap();
    let arguments = ["generate", "--max-tokens", "5", "--temperature", "0"];
    let output = marlin_in(folder.path(), &arguments, b"Once upon a time\n");
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(output.stdout.starts_with(b"Once upon a time"));
    assert!(stderr(&output).contains("tokens/s"));
}

#[test]
fn exact_mode_and_caches_agree_on_greedy_text() {
    let text = |flags: &[&str]| {
        let mut arguments = vec!["generate", PROMPT, "--temperature", "0", "--max-tokens", "24", "--json"];
        arguments.extend(flags);
        json(&arguments)["text"].clone()
    };
    let exact = text(&["--exact", "--kv", "f32"]);
    assert_eq!(text(&["--exact", "--kv", "f16"]), exact);
    assert_eq!(text(&["--exact", "--threads", "1", "--kv", "f32"]), exact);
}

#[test]
fn wrong_usage_is_status_2() {
    for p in ["0", "1.01", "-0.1", "nan", "x"] {
        assert_usage(&["generate", PROMPT, &format!("--top-p={p}")], &["--top-p"]);
    }
    for t in ["-1", "-0.5", "inf", "nan"] {
        assert_usage(&["generate", PROMPT, &format!("--temperature={t}")], &["--temperature"]);
    }
    assert_usage(&["generate", PROMPT, "--temperature", "-1"], &["--temperature", "0 (greedy) or above"]);
    assert_usage(&["generate", PROMPT, "--max-tokens", "0"], &["--max-tokens", "at least 1"]);
    assert_usage(&["generate", PROMPT, "--max-tokens", "-3"], &["--max-tokens", "at least 1"]);
    assert_usage(&["generate", PROMPT, "--threads", "100000"], &["--threads", "at most 1024"]);
    assert_usage(&["quantize", "in", "out", "--format", "int4", "--group", "-1"], &["--group", "at least 1"]);
    assert_usage(&["generate", PROMPT, "--top-k", "0"], &["--top-k"]);
    assert_usage(&["generate", PROMPT, "--min-p", "1.5"], &["--min-p"]);
    assert_usage(&["generate", PROMPT, "--typical", "1"], &["--typical"]);
    assert_usage(&["generate", PROMPT, "--repetition-penalty", "0"], &["--repetition-penalty"]);
    assert_usage(&["generate", PROMPT, "--context", "0"], &["--context"]);
    assert_usage(&["generate", PROMPT, "--device", "abacus"], &["abacus", "cpu"]);
    assert_usage(&["no-such-command"], &["no-such-command"]);
    assert_usage(&["verify", "--family", "cooking"], &["cooking", "linear", "attention"]);
    let every = ["fp4_e2m1", "nvfp4", "mxfp4", "int4_u4", "int4_s4", "int8", "fp8_e4m3", "int3", "int2", "nf4", "nf3"];
    assert_usage(&["quantize", "in", "out", "--format", "fp5"], &every);
    assert_usage(&["synth", "qwen3-0.6b", "out", "--format", "fp5"], &every);
}

#[test]
fn help_names_every_format_and_architecture() {
    let help = |arguments: &[&str]| String::from_utf8(marlin(arguments).stdout).unwrap();
    assert!(help(&["--help"]).starts_with("Run, quantize and measure"));
    for command in ["quantize", "synth"] {
        let text = help(&[command, "--help"]);
        assert!(["mxfp4", "int8_asym", "fp8_e5m2", "nf2"].iter().all(|format| text.contains(format)), "{text}");
    }
    assert!(help(&["synth", "--help"]).contains("deepseek-v2-lite"));
}

#[test]
fn bad_prompts_are_refused() {
    assert_fails(&["generate", ""], &["prompt", "empty"]);
    let long = "the cat ".repeat(200);
    assert_fails(&["generate", &long, "--context", "64"], &["prompt", "context", "64", "up to 2048"]);
    let output = marlin_in(Path::new("."), &["generate"], b"");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("prompt"));
    let output = marlin_in(Path::new("."), &["generate"], b"\xff\xfe\xfd");
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("UTF-8"));

    let folder = tempfile::tempdir().unwrap();
    let small = path(folder.path(), "small");
    let output = marlin(&["synth", "tiny-qwen3", &small, "--vocab", "100", "--tokenizer", &stories()]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_fails(&["generate", PROMPT, "--model", &small], &["vocabulary of 100", "tokenizer.json"]);
}

/// At this temperature every byte token comes up, in no order that would be UTF-8.
#[test]
fn a_broken_character_is_never_printed() {
    let flags = ["--temperature", "1000", "--max-tokens", "400", "--seed", "1", "--json"];
    let result = json(&[&["generate", "🦙 é"], &flags[..]].concat());
    let text = result["text"].as_str().expect("text");
    assert!(text.len() > 400 && !text.contains(char::REPLACEMENT_CHARACTER), "{text}");
}

#[test]
fn absent_things_are_named() {
    assert_fails(&["generate", PROMPT, "--model", "no/such/model"], &["no/such/model: no such folder"]);
    assert_fails(&["generate", PROMPT, "--model", "Cargo.toml"], &["Cargo.toml: not a folder"]);
    assert_fails(&["quantize", "no/such/model", "out", "--format", "int4"], &["no/such/model: no such folder"]);
    assert_fails(&["generate", PROMPT, "--device", "cuda"], &["cuda", "cpu"]);
    assert_fails(&["perplexity", "--text", "no-such.txt"], &["no-such.txt"]);
    assert_fails(&["inspect", "no/such/model"], &["no/such/model"]);
    assert_fails(&["synth", "gpt-9", "out"], &["gpt-9", "qwen3-0.6b", "glm-4.7-flash"]);
    assert_fails(&["synth", "tiny-qwen3", "out", "--format", "exl3"], &["--format exl3 needs --bits"]);
    assert_fails(&["synth", "tiny-qwen3", "out", "--format", "int4", "--bits", "3"], &["belong to --format exl3"]);

    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(Path::new(&stories()).join(file), folder.path().join(file)).unwrap();
    }
    let model = folder.path().display().to_string();
    assert_fails(&["generate", PROMPT, "--model", &model], &["tokenizer.json"]);
}

#[test]
fn logits_are_written_for_every_token() {
    let folder = tempfile::tempdir().unwrap();
    let file = path(folder.path(), "logits.safetensors");
    let output = marlin(&["logits", "--model", &stories(), "--tokens", "5,6,7", "--output", &file]);
    assert!(output.status.success(), "{}", stderr(&output));
    let bytes = std::fs::read(&file).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let logits = tensors.tensor("logits").unwrap();
    assert_eq!(logits.dtype(), safetensors::Dtype::F32);
    assert_eq!(logits.shape()[0], 3);

    let absent = path(folder.path(), "absent.safetensors");
    let arguments = ["logits", "--model", &stories(), "--tokens", "5,99999999", "--output", &absent];
    assert_fails(&arguments, &["99999999", "vocabulary"]);
    assert!(!Path::new(&absent).exists());
}

#[test]
fn quantize_inspect_and_score() {
    let folder = tempfile::tempdir().unwrap();
    let out = path(folder.path(), "int8");
    let quantize = ["quantize", &stories(), &out, "--format", "int8", "--method", "rtn"];
    let output = marlin(&quantize);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_fails(&quantize, &["int8", "exists"]);

    let inspection = json(&["inspect", &out, "--json"]);
    assert_eq!(inspection["architecture"], "glm4_moe_lite");
    assert!((8.0..8.3).contains(&inspection["quantized_bits_per_weight"].as_f64().unwrap()), "{inspection}");

    let text = path(folder.path(), "text.txt");
    let heldout = std::fs::read_to_string(repository().join("models/data/heldout.txt")).unwrap();
    let end = heldout.char_indices().nth(12_000).map_or(heldout.len(), |(i, _)| i);
    std::fs::write(&text, &heldout[..end]).unwrap();
    let score = |model: &str, flags: &[&str]| {
        let mut arguments = vec!["perplexity", "--model", model, "--text", &text, "--json"];
        arguments.extend(flags);
        let result = json(&arguments);
        let (p, nll) = (result["perplexity"].as_f64().unwrap(), result["nll_per_token"].as_f64().unwrap());
        assert!((p.ln() - nll).abs() < 1e-9);
        assert!(result["tokens"].as_u64() > Some(1000));
        p
    };
    let original = score(&stories(), &["--exact"]);
    let int8 = score(&out, &["--exact"]);
    assert!((1.0..20.0).contains(&original), "{original}");
    assert!((int8 / original - 1.0).abs() < 0.005, "{int8} against {original}");

    let compare = |model: &str| {
        let flags = ["--reference", &stories(), "--exact", "--json"];
        let result = json(&[&["perplexity", "--model", model, "--text", &text][..], &flags].concat());
        (result["kl_divergence"].as_f64().unwrap(), result["top1_agreement"].as_f64().unwrap())
    };
    assert_eq!(compare(&stories()), (0.0, 1.0));
    let (divergence, agreement) = compare(&out);
    assert!(divergence > 0.0 && divergence < 0.01, "{divergence}");
    assert!(agreement > 0.98 && agreement <= 1.0, "{agreement}");
    let other = repository().join("crates/models/tests/golden/llama-base").display().to_string();
    assert_fails(&["perplexity", "--text", &text, "--reference", &other], &["llama-base", "vocabulary"]);
}

#[test]
fn fused_experts_are_inspected_like_single_ones() {
    let dir = repository().join("crates/models/tests/golden/qwen3_moe-fused").display().to_string();
    let inspection = json(&["inspect", &dir, "--json"]);
    let formats = inspection["formats"].as_object().unwrap();
    assert_eq!(formats.keys().collect::<Vec<_>>(), ["f32"]);
    assert_eq!(formats["f32"]["bits_per_weight"], 32.0);
}

/// A limit on the size of files stands for a full disk.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let (model, file) = (path(folder.path(), "out"), path(folder.path(), "logits.safetensors"));
    let ids = vec!["7"; 200].join(",");
    for arguments in [
        &["quantize", &stories(), &model, "--format", "int4"][..],
        &["synth", "tiny-qwen3", &model],
        &["logits", "--tokens", &ids, "--output", &file],
    ] {
        let output = Command::new("sh")
            .args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_marlin")])
            .args(arguments)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", stderr(&output));
        assert_eq!(stderr(&output).lines().count(), 1, "{arguments:?}: {}", stderr(&output));
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().collect();
        assert!(left.is_empty(), "{arguments:?}: {left:?}");
    }
}

#[test]
fn perplexity_needs_two_tokens() {
    let folder = tempfile::tempdir().unwrap();
    let text = path(folder.path(), "empty.txt");
    std::fs::write(&text, "").unwrap();
    assert_fails(&["perplexity", "--text", &text], &["empty.txt", "at least 2"]);
}

/// A model with the shape of Qwen3-0.6B but 8 layers: the peak stays within weights + cache + 20 %.
#[test]
fn memory_stays_near_the_weights() {
    let folder = tempfile::tempdir().unwrap();
    let out = path(folder.path(), "qwen");
    let output = marlin(&["synth", "qwen3-0.6b", &out, "--format", "int4", "--layers", "8"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let flags = ["--device", "cpu", "--prompt-tokens", "64", "--gen-tokens", "8", "--json"];
    let result = json(&[&["bench", "--model", out.as_str()], &flags[..]].concat());
    for key in ["prefill_tokens_per_s", "decode_tokens_per_s"] {
        assert!(result[key].as_f64() > Some(0.0), "{result}");
    }
    let bytes = |key: &str| result[key].as_f64().unwrap_or_else(|| panic!("{key}: {result}"));
    let allowed = 1.2 * (bytes("weights_bytes") + bytes("kv_cache_bytes"));
    assert!(bytes("peak_rss_bytes") <= allowed, "{result}");
}

#[test]
fn verify_reports_every_case() {
    let report = json(&["verify", "--device", "cpu", "--family", "norm", "--json"]);
    assert_eq!(report["device"], "cpu");
    assert_eq!(report["failed"], 0);
    let results = report["results"].as_array().unwrap();
    assert_eq!(report["passed"].as_u64(), Some(results.len() as u64));
    for key in ["family", "operation", "configuration", "max_error", "tolerance", "passed"] {
        assert!(results.iter().all(|r| !r[key].is_null()), "{key}");
    }
}

#[test]
fn chat_answers_each_line() {
    let arguments = ["chat", "--temperature", "0", "--max-tokens", "30"];
    let input = b"Tell me a story about a girl named Mia.\n\nTell me another.\n/exit\n";
    let output = marlin_in(Path::new("."), &arguments, input);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.trim().lines().count() >= 2, "{text}");
}

#[test]
fn devices_lists_the_cpu() {
    let result = json(&["devices", "--json"]);
    assert_eq!(result["devices"][0]["name"], "cpu");
    assert!(result["devices"][0]["threads"].as_u64() >= Some(1));
}

/// A CUDA GPU, then another that is no software, then the CPU; and a thread count is a wish for the CPU.
#[test]
fn auto_is_the_best_device_and_never_software() {
    let listed = json(&["devices", "--json"]);
    let devices = listed["devices"].as_array().unwrap();
    let best = devices.iter().skip(1).find(|device| device["software"] == false).unwrap_or(&devices[0]);
    let run = |arguments: &[&str]| {
        let result = json(&[&["generate", PROMPT, "--max-tokens", "1", "--json"], arguments].concat());
        result["device"].clone()
    };
    assert_eq!(run(&[]), best["name"]);
    assert_eq!(run(&["--threads", "1"]), "cpu");
    assert_fails(&["generate", PROMPT, "--device-index", "1"], &["--device-index 1", "--device"]);
}

//! `marlin quantize` on the tiny random models of the parity tests.

use std::collections::BTreeMap;
use std::fs;

use clap::Parser;
use marlin_formats::exl3::Exl3Matrix;
use marlin_formats::{DType, Format, QuantizedMatrix};
use marlin_models::{Checkpoint, KvCache, LoadOptions, Logits, Model, ModelConfig};
use marlin_ops::{Weight, WeightData};
use marlin_quantize::{ModelSource, Module, Previous, Role, rtn};
use serde_json::{Value, json};
use tempfile::TempDir;

use std::path::Path;

use super::*;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    args: QuantizeArgs,
}

/// A copy of a golden model with a tokenizer whose words are `w0`, `w1`, ...
struct Folder {
    root: TempDir,
}

impl Folder {
    fn new(golden: &str) -> Self {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden").join(golden);
        let root = tempfile::tempdir().unwrap();
        let input = root.path().join("in");
        fs::create_dir(&input).unwrap();
        for entry in fs::read_dir(source).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap();
            if name != "golden.safetensors" {
                fs::copy(&path, input.join(name)).unwrap();
            }
        }
        let folder = Self { root };
        let vocab_size = folder.config(&input)["vocab_size"].as_u64().unwrap();
        let vocab: serde_json::Map<String, Value> = (0..vocab_size).map(|i| (format!("w{i}"), json!(i))).collect();
        let tokenizer = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"}
        });
        fs::write(input.join("tokenizer.json"), tokenizer.to_string()).unwrap();
        let words: Vec<String> = (0..400u64).map(|i| format!("w{}", i * i * 7 % vocab_size)).collect();
        fs::write(folder.path("text"), words.join(" ")).unwrap();
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn config(&self, dir: &Path) -> Value {
        serde_json::from_str(&fs::read_to_string(dir.join("config.json")).unwrap()).unwrap()
    }

    /// Runs the command with IN and OUT; further words of `options` are separated by spaces, `TEXT` is the text file.
    fn quantize(&self, output: &str, options: &str) -> Result<()> {
        let text = self.path("text");
        let words = options.split(' ').map(|word| match word {
            "TEXT" => text.to_str().unwrap(),
            word => word,
        });
        let (input, output) = (self.path("in"), self.path(output));
        let fixed = ["quantize", input.to_str().unwrap(), output.to_str().unwrap()];
        run(Command::try_parse_from(fixed.into_iter().chain(words))?.args)
    }

    fn refuses(&self, options: &str, expected: &[&str]) {
        let message = format!("{:#}", self.quantize("refused", options).unwrap_err());
        for expected in expected {
            assert!(message.contains(expected), "{options}: {message}");
        }
        self.assert_only(&["in", "text"]);
    }

    /// Fails in the middle: what was finished stays, and goes with `--restart`.
    fn stops(&self, options: &str, expected: &[&str]) {
        let message = format!("{:#}", self.quantize("stopped", options).unwrap_err());
        for expected in expected.iter().chain(&["stopped.partial", "goes on from there"]) {
            assert!(message.contains(expected), "{options}: {message}");
        }
        self.assert_only(&["in", "stopped.partial", "text"]);
        fs::remove_dir_all(self.path("stopped.partial")).unwrap();
    }

    fn assert_only(&self, expected: &[&str]) {
        let mut names: Vec<String> = fs::read_dir(self.root.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        assert_eq!(names, expected);
    }
}

/// A folder that was written.
struct Written {
    config: ModelConfig,
    checkpoint: Checkpoint,
}

impl Written {
    /// Opens a folder and loads it as a model, which refuses missing and extra tensors.
    fn open(dir: &Path) -> Self {
        let device = DeviceArgs { device: DeviceKind::Cpu, device_index: None, exact: true, threads: Some(1) };
        let backend = crate::device::open_cpu(&device).unwrap();
        let config = ModelConfig::from_dir(dir).unwrap();
        let checkpoint = Checkpoint::open(dir).unwrap();
        Model::load(backend, &checkpoint, config.clone(), LoadOptions::default()).unwrap();
        Self { config, checkpoint }
    }

    fn weight(&self, module: &Module) -> Weight {
        let Module { name, out_features, in_features, .. } = module;
        self.checkpoint.weight(&self.config.quantization, name, *out_features, *in_features, false).unwrap()
    }

    fn matrix(&self, module: &Module) -> Option<QuantizedMatrix> {
        match self.weight(module).data {
            WeightData::Quantized(matrix) => Some(matrix),
            WeightData::Dense(_) | WeightData::Exl3(_) | WeightData::Grid(_) => None,
        }
    }
}

const MODELS: [&str; 7] = [
    "glm4_moe_lite-base",
    "glm4_moe_lite-fused_mixed_layers",
    "qwen3-yarn_bias",
    "qwen3_moe-fused",
    "llama-base",
    "deepseek_v2-biases_tied",
    "deepseek_v3-base",
];

#[test]
fn rtn_writes_every_decoder_linear_and_keeps_the_rest() {
    for (golden, format) in MODELS.into_iter().zip(Format::ENCODABLE.into_iter().cycle()) {
        let folder = Folder::new(golden);
        folder.quantize("out", &format!("--format {format}")).unwrap();
        let (input, output) = (Input::open(&folder.path("in")).unwrap(), Written::open(&folder.path("out")));
        let scheme = Scheme::with_default_group(format);
        for module in &input.modules {
            let dense = input.stored_weight(module).unwrap();
            let Module { out_features: n, in_features: k, .. } = *module;
            let expected = rtn(scheme, &dense.to_f32().unwrap(), n, k, ScaleSearch::Range).unwrap();
            let expected = (module.role == Role::Linear).then_some(expected);
            assert_eq!(output.matrix(module), expected, "{golden} {}", module.name);
            if expected.is_none() {
                let stored = output.checkpoint.tensor(&format!("{}.weight", module.name)).unwrap();
                assert_eq!((stored.dtype(), stored.bytes()), (dense.dtype(), dense.bytes()));
            }
        }
        for vector in input.config.vector_tensors() {
            let of = |checkpoint: &Checkpoint| checkpoint.tensor(&vector.name).unwrap().bytes().to_vec();
            assert_eq!(of(&input.checkpoint), of(&output.checkpoint), "{golden} {}", vector.name);
        }
        let config = folder.config(&folder.path("out"));
        let written = &config["quantization_config"];
        assert_eq!(written["quant_method"], "metal_marlin");
        assert_eq!(written["default"]["format"], format.name());
        assert!(written["ignore"].as_array().unwrap().contains(&json!("model.embed_tokens")));
        assert!(folder.path("out/tokenizer.json").exists());
        folder.assert_only(&["in", "out", "text"]);
    }
}

#[test]
fn gptq_calibrates_every_linear_of_every_architecture() {
    for golden in MODELS {
        let folder = Folder::new(golden);
        folder.quantize("gptq", "--format int3 --calibration TEXT --context 64").unwrap();
        folder.quantize("again", "--format int3 --method gptq --calibration TEXT --context 64").unwrap();
        folder.quantize("rtn", "--format int3 --scale-search mse").unwrap();
        let open = |name: &str| Written::open(&folder.path(name));
        let (gptq, again, plain) = (open("gptq"), open("again"), open("rtn"));
        let input = Input::open(&folder.path("in")).unwrap();
        for module in input.modules.iter().filter(|module| module.role == Role::Linear) {
            let matrix = gptq.matrix(module);
            assert_eq!(matrix, again.matrix(module), "{golden} {} repeats", module.name);
            // Experts may stay unreached by the 400 tokens; the rest must have been calibrated.
            if !module.name.contains(".experts.") {
                assert_ne!(matrix, plain.matrix(module), "{golden} {} was not calibrated", module.name);
            }
        }
    }
}

#[test]
fn options_choose_formats_by_module() {
    let folder = Folder::new("glm4_moe_lite-fused_mixed_layers");
    let options = "--format int --bits 8 --group 32 --embeddings int8 --lm-head nf4:32 --ignore *.experts.1.up_proj \
                   --override *.o_proj=mxfp4 --override model.layers.2.mlp.gate=fp8:32 --calibration TEXT \
                   --calibration-tokens 100 --context 33 --no-act-order --damping 0.05";
    folder.quantize("out", options).unwrap();
    let output = Written::open(&folder.path("out"));
    let input = Input::open(&folder.path("in")).unwrap();
    let mut chosen = BTreeMap::new();
    for module in &input.modules {
        let scheme = output.matrix(module).map(|matrix| matrix.scheme);
        let kind = match (&module.role, module.name.as_str()) {
            (Role::Linear, name) if name.ends_with(".experts.1.up_proj") => "ignored",
            (Role::Linear, name) if name.ends_with(".o_proj") => "o_proj",
            (Role::Linear, _) => "linear",
            (_, name) => name,
        };
        let before = chosen.insert(kind.to_owned(), scheme);
        assert!(before.is_none_or(|before| before == scheme), "{}", module.name);
    }
    let scheme = |text: &str| Some(parse_scheme(text).unwrap());
    for (kind, expected) in [
        ("linear", scheme("int8:32")),
        ("ignored", None),
        ("o_proj", scheme("mxfp4")),
        ("model.embed_tokens", scheme("int8")),
        ("lm_head", scheme("nf4:32")),
        ("model.layers.2.mlp.gate", scheme("fp8:32")),
    ] {
        assert_eq!(chosen[kind], expected, "{kind}");
    }
}

#[test]
fn wrong_options_are_refused_before_anything_is_written() {
    let folder = Folder::new("llama-base");
    let mut every_name: Vec<&str> = Format::ALL.iter().map(|format| format.name()).collect();
    every_name.push("int5");
    folder.refuses("--format int5", &every_name);
    folder.refuses("--format q4_k", &["q4_k", "only imported"]);
    folder.refuses("--format int4 --bits 3", &["int4_s4", "4 bits"]);
    folder.refuses("--format int", &["--bits", "2, 3, 4, 8"]);
    folder.refuses("--format int --bits 5", &["2, 3, 4, 8"]);
    folder.refuses("--format int3 --group 40", &["40", "multiple of 32"]);
    folder.refuses("--format nvfp4 --group 32", &["16"]);
    folder.refuses("--format int4 --method gptq", &["--calibration"]);
    folder.refuses("--format int4 --method rtn --calibration TEXT", &["--calibration"]);
    folder.refuses("--format int4 --damping 0.1", &["--calibration"]);
    folder.refuses("--format int4 --calibration TEXT --damping 2", &["[0, 1]"]);
    folder.refuses("--format int4 --calibration nowhere.txt", &["nowhere.txt"]);
    folder.refuses("--format int4 --ignore *.nope", &["*.nope"]);
    folder.refuses("--format int4 --override *.q_proj=int5", &["int5", "nvfp4"]);
    folder.refuses("--format int4 --device cuda", &["device"]);
    folder.refuses("--format int4 --calibration-tokens 100", &["--calibration"]);
    folder.refuses("--format int4 --context 64", &["--calibration"]);
    folder.refuses("--format int4 --verbose", &["--verbose", "mixture"]);
    folder.refuses("--format exl3 --bits 3.5 --calibration TEXT --verbose", &["--verbose", "mixture"]);
    folder.refuses("--format int --bits 3.5", &["mixture", "--calibration"]);
    folder.refuses("--format int --bits 1.5 --calibration TEXT", &["2, 3, 4, 8", "fraction"]);
    folder.refuses("--format int4 --method awq", &["--calibration"]);
    folder.refuses("--format int4 --method awq --calibration TEXT --damping 0.1", &["--damping"]);
    folder.refuses("--format int4 --seed 3", &["--seed", "exl3"]);
    folder.refuses("--format exl3 --calibration TEXT", &["--bits"]);
    folder.refuses("--format exl3 --bits 9 --calibration TEXT", &["--bits", "1 to 8"]);
    folder.refuses("--format exl3 --bits 3", &["--calibration"]);
    folder.refuses("--format exl3 --bits 3 --calibration TEXT --group 64", &["--group", "exl3"]);
    folder.refuses("--format exl3 --bits 3 --calibration TEXT --head-bits 9", &["1 to 8", "16"]);
    folder.refuses("--format exl3 --bits 3 --calibration TEXT --codebook 2inst", &["3inst, mcg, mul1"]);
    folder.refuses("--format exl3 --bits 3 --calibration TEXT --ignore *.nope", &["*.nope"]);
}

#[test]
fn bad_folders_are_refused_and_leave_nothing_behind() {
    let folder = Folder::new("llama-base");
    fs::create_dir(folder.path("exists")).unwrap();
    let message = format!("{:#}", folder.quantize("exists", "--format int4").unwrap_err());
    assert!(message.contains("exists already"), "{message}");
    assert_eq!(fs::read_dir(folder.path("exists")).unwrap().count(), 0);
    fs::remove_dir(folder.path("exists")).unwrap();

    folder.quantize("out", "--format int4").unwrap();
    fs::rename(folder.path("in"), folder.path("dense")).unwrap();
    fs::rename(folder.path("out"), folder.path("in")).unwrap();
    let message = format!("{:#}", folder.quantize("out", "--format int4").unwrap_err());
    assert!(message.contains("quantized already"), "{message}");
    fs::remove_dir_all(folder.path("in")).unwrap();
    fs::rename(folder.path("dense"), folder.path("in")).unwrap();

    fs::write(folder.path("text"), "").unwrap();
    folder.refuses("--format int4 --calibration TEXT", &["text", "empty"]);
    fs::remove_file(folder.path("in/tokenizer.json")).unwrap();
    folder.refuses("--format int4 --calibration TEXT", &["tokenizer.json"]);
}

#[test]
fn nan_weights_and_missing_tensors_are_named() {
    for golden in ["llama-base", "qwen3_moe-fused"] {
        let folder = Folder::new(golden);
        let input = Input::open(&folder.path("in")).unwrap();
        let module = input.modules.iter().rfind(|module| module.role == Role::Linear).unwrap();
        let name = input.slices.get(&module.name).map_or(format!("{}.weight", module.name), |s| s.tensor.clone());
        let file = input.checkpoint.get(&name).unwrap().file.to_owned();
        let value = input.stored_weight(module).unwrap().bytes()[..4].to_vec();
        let mut bytes = fs::read(&file).unwrap();
        let at = bytes.windows(4).rposition(|window| window == value).unwrap();
        drop(input);
        bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        fs::write(&file, &bytes).unwrap();
        folder.stops("--format int4", &["down_proj", "NaN"]);
        folder.stops("--format int4 --calibration TEXT", &["down_proj", "NaN"]);
    }
    let folder = Folder::new("llama-base");
    let mut config = folder.config(&folder.path("in"));
    config["num_hidden_layers"] = json!(9);
    fs::write(folder.path("in/config.json"), config.to_string()).unwrap();
    folder.refuses("--format int4", &["model.layers.", "missing"]);
}

#[test]
fn missing_biases_and_extra_tensors_are_named() {
    let change = |golden: &str, field: &str, value: Value| {
        let folder = Folder::new(golden);
        let mut config = folder.config(&folder.path("in"));
        config[field] = value;
        fs::write(folder.path("in/config.json"), config.to_string()).unwrap();
        folder
    };
    let folder = change("llama-base", "attention_bias", json!(true));
    folder.refuses("--format int4", &["model.layers.0.self_attn.q_proj.bias", "missing"]);
    let folder = change("glm4_moe_lite-base", "num_nextn_predict_layers", json!(0));
    folder.refuses("--format int4", &["model.layers.3.", "not part of this architecture"]);
}

/// Every file of a folder with its contents.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

#[test]
fn an_interrupted_job_goes_on_with_the_same_arguments_only() {
    let folder = Folder::new("glm4_moe_lite-base");
    let options = "--format int3 --calibration TEXT --context 64";
    folder.quantize("whole", options).unwrap();
    // A folder where the model is put together, which cannot be made, stops the job after all parts are finished.
    let partial = folder.path("out.partial");
    let stop = |options: &str| {
        fs::remove_dir_all(partial.join("model")).ok();
        let input = folder.path("in/merges.txt");
        fs::create_dir(&input).unwrap();
        let stopped = folder.quantize("out", options);
        fs::remove_dir(&input).unwrap();
        format!("{:#}", stopped.unwrap_err())
    };
    assert!(stop(options).contains("merges.txt"));
    folder.assert_only(&["in", "out.partial", "text", "whole"]);

    for (other, expected) in [
        ("--format int4 --calibration TEXT --context 64", "--format was `int3`, now `int4_s4`"),
        ("--format int3 --calibration TEXT --context 32", "calibration tokens was "),
        ("--format int3 --calibration TEXT --context 64 --damping 0.1", "damping: 0.1"),
        ("--format int3", "--calibration was "),
        ("--format int3 --method mr-gptq --calibration TEXT --context 64", "now `rotated Gptq"),
    ] {
        let message = format!("{:#}", folder.quantize("out", other).unwrap_err());
        for expected in ["out.partial: ", "unfinished work of another job", expected, "--restart"] {
            assert!(message.contains(expected), "{other}: {message}");
        }
    }
    // One part is lost, one unreadable.
    let part = |index: usize| partial.join(format!("part-{index:05}.safetensors"));
    let first = fs::read(part(0)).unwrap();
    fs::write(part(0), &first[..first.len() / 2]).unwrap();
    let message = format!("{:#}", folder.quantize("out", options).unwrap_err());
    assert!(message.contains("part-00000.safetensors: damaged"), "{message}");
    fs::write(part(0), &first).unwrap();
    fs::remove_file(part(1)).unwrap();
    fs::remove_file(part(2)).unwrap();
    folder.quantize("out", options).unwrap();
    assert_eq!(contents(&folder.path("out")), contents(&folder.path("whole")));
    folder.assert_only(&["in", "out", "text", "whole"]);

    // Killed after the folder got its name: nothing is left to do.
    fs::rename(folder.path("out"), folder.path("kept")).unwrap();
    stop(options);
    let hash = format!("\"{}\"", Fingerprint::hash(&fs::read(folder.path("kept/config.json")).unwrap()));
    let set_state = |from: &str, to: &str| {
        let state = fs::read_to_string(partial.join("state.json")).unwrap();
        let changed = state.replace(&format!("\"assembled\": {from}"), &format!("\"assembled\": {to}"));
        assert_ne!(state, changed);
        fs::write(partial.join("state.json"), changed).unwrap();
    };
    // Another folder with the name is not it.
    set_state("null", "\"0123456789abcdef\"");
    fs::rename(folder.path("kept"), folder.path("out")).unwrap();
    let message = format!("{:#}", folder.quantize("out", options).unwrap_err());
    assert!(message.contains("exists already") && part(0).exists(), "{message}");
    set_state("\"0123456789abcdef\"", &hash);
    folder.quantize("out", options).unwrap();
    assert_eq!(contents(&folder.path("out")), contents(&folder.path("whole")));
    folder.assert_only(&["in", "out", "text", "whole"]);

    // Another folder came in between: it stays, and so does the unfinished work.
    fs::rename(folder.path("out"), folder.path("kept")).unwrap();
    stop(options);
    fs::create_dir(folder.path("out")).unwrap();
    let message = format!("{:#}", folder.quantize("out", options).unwrap_err());
    assert!(message.contains("exists already"), "{message}");
    fs::remove_dir(folder.path("out")).unwrap();
    assert!(part(0).exists());
    folder.quantize("out", "--format int8 --restart").unwrap();
    folder.assert_only(&["in", "kept", "out", "text", "whole"]);
}

/// The folder's name is taken while the job works.
#[test]
fn a_folder_that_appears_meanwhile_is_not_taken_for_the_result() {
    let folder = Folder::new("llama-base");
    let input = Input::open(&folder.path("in")).unwrap();
    let recipe = Recipe::Native(Plan::new(parse_scheme("int4").unwrap()));
    let mut assignments = recipe.resolve(&input.modules, input.config.num_layers).unwrap();
    assignments.iter_mut().for_each(|assignment| assignment.target = None);
    let (out, dir) = (folder.path("out"), folder.path("out.partial"));
    let mut staging = Staging::open(&dir, &Fingerprint::default()).unwrap();
    let mut output = output::Output::create(&out, &staging).unwrap();
    output.copy_plain(&input, &assignments, &Default::default()).unwrap();
    fs::create_dir(&out).unwrap();
    let error = output.finish(&input, &recipe, &assignments, &mut staging).unwrap_err();
    assert!(error.to_string().contains("exists already"), "{error}");
    drop(staging);
    fs::write(out.join("config.json"), "{}").unwrap();
    let staging = Staging::open(&dir, &Fingerprint::default()).unwrap();
    assert!(!staging.is_published(&out).unwrap());
    assert!(fs::read_to_string(dir.join("state.json")).unwrap().contains("\"assembled\": null"));
}

/// The EXL3 matrix of a module from its stored tensors.
fn exl3_matrix(checkpoint: &Checkpoint, module: &Module) -> Exl3Matrix {
    let tensor = |suffix: &str, dtype: DType, dims: &[usize]| {
        let tensor = checkpoint.tensor(&format!("{}.{suffix}", module.name)).unwrap();
        assert_eq!((tensor.dtype(), tensor.dims()), (dtype, dims), "{}.{suffix}", module.name);
        tensor
    };
    let (k, n) = (module.in_features.next_multiple_of(128), module.out_features.next_multiple_of(128));
    let words = *checkpoint.get(&format!("{}.trellis", module.name)).unwrap().shape.last().unwrap();
    let marker = tensor("mul1", DType::I32, &[]);
    assert_eq!(marker.bytes(), 0x83DC_D12Du32.to_le_bytes());
    let matrix = Exl3Matrix {
        codebook: Codebook::Mul1,
        bits: (words / 16) as u32,
        in_features: module.in_features,
        out_features: module.out_features,
        trellis: tensor("trellis", DType::I16, &[k / 16, n / 16, words]).to_u16_bits().unwrap(),
        suh: tensor("suh", DType::F16, &[k]).to_u16_bits().unwrap(),
        svh: tensor("svh", DType::F16, &[n]).to_u16_bits().unwrap(),
    };
    matrix.validate().unwrap();
    matrix
}

#[test]
fn exl3_folders_are_those_of_exllamav3() {
    // The search takes long: one expert of eight, and of a tied model its attention inputs.
    let experts: Vec<String> = (1..8).map(|e| format!("*.experts.{e}.*")).collect();
    for (golden, ignored) in [
        ("llama-biases", Vec::new()),
        ("glm4_moe_lite-fused_mixed_layers", experts),
        ("deepseek_v3-no_q_lora_tied", vec!["*.mlp.*".to_owned(), "*.o_proj".to_owned()]),
    ] {
        let folder = Folder::new(golden);
        let ignore: String = ignored.iter().map(|pattern| format!(" --ignore {pattern}")).collect();
        let ignored: Vec<Pattern> = ignored.iter().map(|pattern| pattern.parse().unwrap()).collect();
        let options = "--format exl3 --bits 3.5 --codebook mul1 --seed 7 --head-bits 5 --calibration TEXT --context 64";
        let options = format!("{options}{ignore}");
        folder.quantize("out", &options).unwrap();
        let mut input = Input::open(&folder.path("in")).unwrap();
        input.add_tied_head();
        let checkpoint = Checkpoint::open(&folder.path("out")).unwrap();
        let (mut bits, mut weights) = (0.0, 0.0);
        let mut rates = std::collections::BTreeSet::new();
        for module in &input.modules {
            let dense = input.stored_weight(module).unwrap();
            let plain = format!("{}.weight", module.name);
            let trellis = match module.role {
                _ if ignored.iter().any(|pattern| pattern.matches(&module.name)) => false,
                Role::Linear => !module.name.ends_with("kv_b_proj"),
                role => role == Role::LmHead,
            };
            assert_eq!(checkpoint.contains(&plain), !trellis, "{golden} {plain}");
            if !trellis {
                let stored = checkpoint.tensor(&plain).unwrap();
                assert_eq!((stored.dtype(), stored.bytes()), (dense.dtype(), dense.bytes()));
                continue;
            }
            let matrix = exl3_matrix(&checkpoint, module);
            if module.role == Role::LmHead {
                assert_eq!(matrix.bits, 5);
            } else {
                rates.insert(matrix.bits);
                bits += f64::from(matrix.bits) * module.weights() as f64;
                weights += module.weights() as f64;
            }
            let (dense, decoded) = (dense.to_f32().unwrap(), matrix.decode().unwrap());
            let square = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
            let error =
                square(&mut dense.iter().zip(&decoded).map(|(a, b)| a - b)) / square(&mut dense.iter().copied());
            assert!(error < 0.1, "{golden} {}: {error}", module.name);
            let bias = format!("{}.bias", module.name);
            if input.checkpoint.contains(&bias) {
                let stored = checkpoint.tensor(&bias).unwrap();
                assert_eq!((stored.dtype(), stored.dims()), (DType::F16, &[matrix.padded_out()][..]));
            }
        }
        assert_eq!(rates.into_iter().collect::<Vec<_>>(), [3, 4], "{golden}");
        let config = folder.config(&folder.path("out"))["quantization_config"].clone();
        let average = (bits / weights * 1e4).round() / 1e4;
        assert!((3.0..=3.5).contains(&average), "{average}");
        assert_eq!(config["quant_method"], "exl3");
        assert_eq!((&config["bits"], &config["head_bits"]), (&json!(average), &json!(5)));
        assert_eq!((&config["codebook"], &config["out_scales"]), (&json!("mul1"), &json!("always")));
        assert_eq!(config["calibration"], json!({"rows": 7, "cols": 64}));
        let text = fs::read_to_string(folder.path("out/quantization_config.json")).unwrap();
        let beside: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(beside["quant_method"], "exl3");
        let storage = beside["tensor_storage"].as_object().unwrap();
        for name in checkpoint.names() {
            let info = checkpoint.get(name).unwrap();
            let entry = &storage[name.rsplit_once('.').unwrap().0]["stored_tensors"][name];
            assert_eq!((&entry["shape"], &entry["n_bytes"]), (&json!(info.shape), &json!(info.bytes)), "{name}");
        }
        assert_eq!(storage["lm_head"]["bits_per_weight"], 5);
        assert_eq!(storage["lm_head"]["mul1_multiplier"], 2_212_286_765u32);
        folder.assert_only(&["in", "out", "text"]);
    }
}

#[test]
fn awq_scales_fold_into_every_architecture() {
    for golden in MODELS.into_iter().chain(["llama-biases"]) {
        let folder = Folder::new(golden);
        let options = "--format int4_u4 --group 32 --method awq --calibration TEXT --context 64";
        folder.quantize("out", options).unwrap();
        // Loads as a model, which refuses missing and extra tensors.
        let written = Written::open(&folder.path("out"));
        let input = Input::open(&folder.path("in")).unwrap();
        let plan = Plan::new(parse_scheme("int4_u4:32").unwrap());
        let folds = folds::folds(&input.config, &plan.resolve(&input.modules).unwrap());
        let layers = input.config.num_layers;
        assert!(folds.len() >= 2 * layers, "{golden}");
        // Undone, the folded model is close to the one that was read: check every reader of every norm.
        let mut moved = 0;
        for fold in &folds {
            let Previous::Norm { tensor } = &fold.previous else { continue };
            let vector = |checkpoint: &Checkpoint| checkpoint.vector(tensor, fold.channels()).unwrap();
            let (before, after) = (vector(&input.checkpoint), vector(&written.checkpoint));
            moved += usize::from(before != after);
            for reader in &fold.readers {
                if folds.iter().any(|f| matches!(&f.previous, Previous::Linear { module, .. } if module == reader)) {
                    continue;
                }
                let dense = input.stored_weight(reader).unwrap().to_f32().unwrap();
                let stored = written.weight(reader).to_f32().unwrap();
                let columns = (0..dense.len()).map(|i| i % reader.in_features);
                let (mut error, mut whole) = (0.0, 0.0);
                for ((w, q), k) in dense.iter().zip(&stored).zip(columns) {
                    let exact = f64::from(w * before[k]);
                    error += (f64::from(q * after[k]) - exact).powi(2);
                    whole += exact * exact;
                }
                let limit = if written.matrix(reader).is_some() { 0.05 } else { 1e-10 };
                assert!(error < limit * whole, "{golden} {}: {}", reader.name, error / whole);
            }
        }
        assert!(moved > 0, "{golden}: no scales were found");
        folder.quantize("again", options).unwrap();
        assert_eq!(contents(&folder.path("again")), contents(&folder.path("out")));
    }
}

/// The router reads what the experts read, but is not quantized with them.
#[test]
fn awq_leaves_routers_alone() {
    let folder = Folder::new("glm4_moe_lite-fused_mixed_layers");
    let options = "--format int4_u4 --group 32 --method awq --calibration TEXT --context 64 \
                   --override model.layers.2.mlp.gate=int8:32";
    folder.refuses(options, &["model.layers.2.mlp.gate", "int8:32", "AWQ"]);
    // Without a quantized expert there is nothing to fold.
    let linear = ["self_attn", "mlp.experts", "mlp.shared_experts"];
    let ignore: String = linear.iter().map(|part| format!(" --ignore model.layers.2.{part}.*")).collect();
    folder.quantize("out", &format!("{options}{ignore}")).unwrap();
    let written = Written::open(&folder.path("out"));
    let input = Input::open(&folder.path("in")).unwrap();
    let router = input.modules.iter().find(|module| module.name == "model.layers.2.mlp.gate").unwrap();
    let dense = input.stored_weight(router).unwrap().to_f32().unwrap();
    let (n, k) = (router.out_features, router.in_features);
    let search = AwqOptions::default().scale_search;
    assert_eq!(written.matrix(router), Some(rtn(parse_scheme("int8:32").unwrap(), &dense, n, k, search).unwrap()));
    let norm = "model.layers.2.post_attention_layernorm.weight";
    let of = |checkpoint: &Checkpoint| checkpoint.tensor(norm).unwrap().bytes().to_vec();
    assert_eq!(of(&written.checkpoint), of(&input.checkpoint));
}

/// An override to the format just below the budget is one like every other.
#[test]
fn overrides_hold_in_a_mixture() {
    let folder = Folder::new("glm4_moe_lite-base");
    // A budget near the top: all but a few blocks get 4 bits.
    let options = "--format int --bits 3.9 --group 32 --calibration TEXT --context 64";
    let overridden = format!("{options} --override *.q_a_proj=int3:32");
    folder.quantize("plain", options).unwrap();
    folder.quantize("out", &overridden).unwrap();
    let widths = |name: &str| -> Vec<u32> {
        let written = Written::open(&folder.path(name));
        let input = Input::open(&folder.path("in")).unwrap();
        let modules = input.modules.iter().filter(|module| module.name.ends_with(".q_a_proj"));
        modules.map(|module| written.matrix(module).unwrap().scheme.format.code_bits()).collect()
    };
    assert!(widths("plain").iter().any(|&bits| bits > 3));
    assert!(widths("out").iter().all(|&bits| bits == 3), "{:?}", widths("out"));
    // Other work: unfinished parts of one are not the other's.
    let arguments = |options: &str| {
        let words = options.replace("TEXT", folder.path("text").to_str().unwrap());
        let words: Vec<String> = words.split(' ').map(str::to_owned).collect();
        let fixed = ["quantize", folder.path("in").to_str().unwrap(), "out"].map(str::to_owned);
        Command::try_parse_from(fixed.into_iter().chain(words)).unwrap().args
    };
    let fingerprint = |options: &str| {
        let args = arguments(options);
        let input = Input::open(&folder.path("in")).unwrap();
        let recipe = args.recipe().unwrap();
        let assignments = recipe.resolve(&input.modules, input.config.num_layers).unwrap();
        args.fingerprint(&input, args.method(&recipe).unwrap(), &assignments, &[], "cpu").unwrap()
    };
    assert_ne!(fingerprint(options), fingerprint(&overridden));
}

#[test]
fn fractional_bits_mix_formats_under_the_budget() {
    let folder = Folder::new("glm4_moe_lite-base");
    let options = "--format int --bits 3.3 --group 32 --calibration TEXT --context 64 --verbose";
    folder.quantize("out", options).unwrap();
    let written = Written::open(&folder.path("out"));
    let input = Input::open(&folder.path("in")).unwrap();
    let (mut bits, mut weights) = (0.0, 0.0);
    let mut blocks: BTreeMap<String, std::collections::BTreeSet<u32>> = BTreeMap::new();
    for module in input.modules.iter().filter(|module| module.role == Role::Linear) {
        let width = written.matrix(module).unwrap().scheme.format.code_bits();
        bits += f64::from(width) * module.weights() as f64;
        weights += module.weights() as f64;
        let (block, _) = module.name.rsplit_once('.').unwrap();
        blocks.entry(block.to_owned()).or_default().insert(width);
    }
    assert!(blocks.values().all(|widths| widths.len() == 1), "{blocks:?}");
    assert!(blocks.values().collect::<std::collections::BTreeSet<_>>().len() > 1, "{blocks:?}");
    assert!((3.0..=3.3).contains(&(bits / weights)), "{}", bits / weights);
    folder.quantize("again", options).unwrap();
    assert_eq!(contents(&folder.path("again")), contents(&folder.path("out")));
    folder.assert_only(&["again", "in", "out", "text"]);
}

/// The logits of a folder's model after each of its first 40 tokens, `[40, vocab]`.
fn logits(dir: &Path) -> Vec<f32> {
    let device = DeviceArgs { device: DeviceKind::Cpu, device_index: None, exact: true, threads: Some(1) };
    let backend = crate::device::open_cpu(&device).unwrap();
    let config = ModelConfig::from_dir(dir).unwrap();
    let tokens: Vec<u32> = (0..40u32).map(|i| (i * i * 7 + 3) % config.vocab_size as u32).collect();
    let options = LoadOptions { cache_dtype: DType::F32, ..LoadOptions::default() };
    let model = Model::load(backend, &Checkpoint::open(dir).unwrap(), config, options).unwrap();
    let mut cache = KvCache::new(&model, tokens.len()).unwrap();
    let mut scratch = model.scratch(tokens.len()).unwrap();
    let logits = model.forward(&tokens, &mut cache, &mut scratch, Logits::All).unwrap();
    model.backend().read_f32(logits).unwrap()
}

/// Largest difference, as a part of the largest value of `b`.
fn difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let largest = |values: &mut dyn Iterator<Item = f32>| values.fold(0.0, |max: f32, v| max.max(v.abs()));
    largest(&mut a.iter().zip(b).map(|(a, b)| a - b)) / largest(&mut b.iter().copied())
}

#[test]
fn rotated_folders_compute_the_same() {
    let more = ["llama-biases", "glm4_moe_lite-no_q_lora_tied", "qwen3_moe-mlp_only_sliding_yarn"];
    for golden in MODELS.into_iter().chain(more) {
        let folder = Folder::new(golden);
        let expected = logits(&folder.path("in"));
        // Nothing is quantized: what is left is the rotation.
        let options = "--method mr-gptq --calibration TEXT --context 64 --format";
        folder.quantize("plain", &format!("{options} fp4 --ignore *")).unwrap();
        let plain = logits(&folder.path("plain"));
        assert_ne!(plain, expected, "{golden}");
        assert!(difference(&plain, &expected) < 1e-4, "{golden}: {:e}", difference(&plain, &expected));
        let options = format!("{options} int8 --group 32 --embeddings int8 --lm-head int8");
        folder.quantize("out", &options).unwrap();
        let written = Written::open(&folder.path("out"));
        let mut input = Input::open(&folder.path("in")).unwrap();
        input.rotate().unwrap();
        for module in input.modules.iter().filter(|module| module.role != Role::Router) {
            let decoded = written.matrix(module).unwrap().decode().unwrap();
            let rotated = input::Source(&input).weight(module).unwrap();
            let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
            let error = squares(&mut decoded.iter().zip(&rotated).map(|(a, b)| a - b));
            let error = error / squares(&mut rotated.iter().copied());
            assert!(error < 1e-3, "{golden} {}: {error:e}", module.name);
        }
        // The head is a matrix of its own, prediction layers are gone.
        let config = folder.config(&folder.path("out"));
        assert_eq!(config["tie_word_embeddings"], false);
        assert!(config.get("num_nextn_predict_layers").is_none_or(|layers| layers == 0));
        assert!(written.checkpoint.contains("lm_head.mm.q"));
        assert!(!written.checkpoint.names().any(|name| input.config.is_of_prediction_layer(name)));
        folder.quantize("again", &options).unwrap();
        assert_eq!(contents(&folder.path("again")), contents(&folder.path("out")));
    }
}

#[test]
fn mr_gptq_takes_every_four_bit_float_and_needs_text() {
    let folder = Folder::new("glm4_moe_lite-base");
    folder.refuses("--format nvfp4 --method mr-gptq", &["--method mr-gptq needs calibration text"]);
    folder.refuses("--format exl3 --bits 4 --method mr-gptq --calibration TEXT", &["--method", "exl3"]);
    for format in ["fp4", "nvfp4", "mxfp4"] {
        let options = format!("--format {format} --calibration TEXT --context 64 --method");
        folder.quantize(&format!("{format}-gptq"), &format!("{options} gptq")).unwrap();
        folder.quantize(format, &format!("{options} mr-gptq")).unwrap();
        let (plain, rotated) =
            (Written::open(&folder.path(&format!("{format}-gptq"))), Written::open(&folder.path(format)));
        let input = Input::open(&folder.path("in")).unwrap();
        for module in input.modules.iter().filter(|module| module.role == Role::Linear) {
            let (plain, rotated) = (plain.matrix(module).unwrap(), rotated.matrix(module).unwrap());
            assert_eq!(plain.scheme, rotated.scheme);
            assert_ne!(plain, rotated, "{format} {}", module.name);
        }
    }
}

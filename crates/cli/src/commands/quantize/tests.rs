//! `marlin quantize` on the tiny random models of the parity tests.

use std::fs;

use clap::Parser;
use marlin_models::{LoadOptions, Model};
use marlin_ops::{Weight, WeightData};
use marlin_quantize::{Role, rtn};
use serde_json::json;
use tempfile::TempDir;

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
            WeightData::Dense(_) | WeightData::Exl3(_) => None,
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
        folder.refuses("--format int4", &["down_proj", "NaN"]);
        folder.refuses("--format int4 --calibration TEXT", &["down_proj", "NaN"]);
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

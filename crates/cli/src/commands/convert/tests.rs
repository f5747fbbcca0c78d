use super::*;

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/imports/models")
}

fn convert(input: &Path, output: &Path, to: &str) -> Result<()> {
    let to = target(to).map_err(anyhow::Error::msg)?;
    run(ConvertArgs { input: input.to_owned(), output: output.to_owned(), to, group: None })
}

/// Every matrix of a folder, decoded, and the names of the forms.
fn weights(dir: &Path) -> BTreeMap<String, (&'static str, Vec<f32>)> {
    let config = ModelConfig::from_dir(dir).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let mut all = BTreeMap::new();
    for module in config.linear_modules() {
        let (n, k) = (module.out_features, module.in_features);
        let weight = if checkpoint.has_module(&module.name) {
            checkpoint.weight(&config.quantization, &module.name, n, k, module.bias).unwrap()
        } else {
            let (prefix, rest) = module.name.split_once(".experts.").unwrap();
            let (e, projection) = rest.split_once('.').unwrap();
            let stack = checkpoint.experts(&config.quantization, &format!("{prefix}.experts"), 4, 64, 64).unwrap();
            let expert = stack.into_iter().nth(e.parse().unwrap()).unwrap();
            match projection {
                "gate_proj" => expert.gate,
                "up_proj" => expert.up,
                _ => expert.down,
            }
        };
        all.insert(module.name, (weight.format_name(), weight.to_f32().unwrap()));
    }
    all
}

#[test]
fn native_folders_hold_the_same_weights() {
    let root = tempfile::tempdir().unwrap();
    let mut count = 0;
    for entry in std::fs::read_dir(models()).unwrap() {
        let input = entry.unwrap().path();
        let output = root.path().join(input.file_name().unwrap());
        convert(&input, &output, "native").unwrap();
        assert_eq!(weights(&output), weights(&input), "{}", input.display());
        let config = ModelConfig::from_dir(&output).unwrap();
        assert_eq!(config.quantization.method(), None);
        let checkpoint = Checkpoint::open(&output).unwrap();
        for tensor in config.vector_tensors() {
            checkpoint.vector(&tensor.name, tensor.len).unwrap();
        }
        weights(&output);
        // A second conversion changes nothing.
        let again = root.path().join("again");
        convert(&output, &again, "native").unwrap();
        for file in ["model.safetensors", "config.json"] {
            assert_eq!(std::fs::read(again.join(file)).unwrap(), std::fs::read(output.join(file)).unwrap());
        }
        std::fs::remove_dir_all(&again).unwrap();
        count += 1;
    }
    assert_eq!(count, 9);
}

#[test]
fn dense_folders_hold_the_rounded_weights() {
    let root = tempfile::tempdir().unwrap();
    for (name, to, dtype) in [("awq", "f16", DType::F16), ("mlx_moe", "bf16", DType::BF16), ("fp8", "f32", DType::F32)]
    {
        let (input, output) = (models().join(name), root.path().join(name));
        convert(&input, &output, to).unwrap();
        let source = weights(&input);
        for (module, (form, values)) in weights(&output) {
            let exact = &source[&module].1;
            let rounded = HostTensor::from_f32_as(dtype, &[exact.len()], exact).unwrap().to_f32().unwrap();
            assert_eq!((form, &values), (dtype.name(), &rounded), "{module}");
        }
        let text = std::fs::read_to_string(output.join("config.json")).unwrap();
        let config: Value = serde_json::from_str(&text).unwrap();
        assert!(config.get("quantization").is_none() && config.get("quantization_config").is_none());
        assert!(["float16", "bfloat16", "float32"].contains(&config["torch_dtype"].as_str().unwrap()));
    }
}

#[test]
fn formats_are_rounded_to_and_refusals_leave_nothing() {
    let root = tempfile::tempdir().unwrap();
    let (input, output) = (models().join("gptq"), root.path().join("out"));
    convert(&input, &output, "int8").unwrap();
    let (source, found) = (weights(&input), weights(&output));
    for (module, (form, values)) in &found {
        let exact = &source[module].1;
        if module.ends_with("_proj") {
            assert_eq!(*form, "int8", "{module}");
            let amax = exact.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let error = values.iter().zip(exact).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(error > 0.0 && error <= amax / 250.0, "{module}: {error} of {amax}");
        } else {
            assert_eq!((*form, values), (source[module].0, exact), "{module}");
        }
    }
    let message = convert(&input, &output, "native").unwrap_err().to_string();
    assert!(message.contains("exists already"), "{message}");
    assert!(target("q4_k").unwrap_err().contains("only imported"));
    assert!(target("int5").unwrap_err().contains("or native, f32"));
    // A damaged input leaves no output behind.
    let damaged = root.path().join("damaged");
    std::fs::create_dir(&damaged).unwrap();
    std::fs::copy(input.join("config.json"), damaged.join("config.json")).unwrap();
    let mut file = std::fs::read(input.join("model.safetensors")).unwrap();
    let name = b"model.layers.1.mlp.down_proj.qzeros";
    let at = file.windows(name.len()).position(|window| window == name).unwrap();
    file[at + name.len() - 1] = b'x';
    std::fs::write(damaged.join("model.safetensors"), file).unwrap();
    let message = convert(&damaged, &root.path().join("none"), "native").unwrap_err().to_string();
    assert!(message.contains("`model.layers.1.mlp.down_proj.qzeros` is missing"), "{message}");
    let left: Vec<_> = std::fs::read_dir(root.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

/// EXL3 tensors are copied; other formats get a head in the precision of EXL3's own runtime.
#[test]
fn exl3_is_kept_or_decoded() {
    let root = tempfile::tempdir().unwrap();
    let input = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden_exl3/tiny_llama");
    let source = weights(&input);
    let (native, int4) = (root.path().join("native"), root.path().join("int4"));
    convert(&input, &native, "native").unwrap();
    assert_eq!(weights(&native), source);
    let (before, after) = (Checkpoint::open(&input).unwrap(), Checkpoint::open(&native).unwrap());
    assert!(before.names().eq(after.names()));
    for name in before.names() {
        let (before, after) = (before.tensor(name).unwrap(), after.tensor(name).unwrap());
        assert_eq!(
            (before.dtype(), before.dims(), before.bytes()),
            (after.dtype(), after.dims(), after.bytes()),
            "{name}"
        );
    }
    let read = |dir: &Path, name: &str| std::fs::read(dir.join(name)).unwrap();
    assert_eq!(read(&native, "quantization_config.json"), read(&input, "quantization_config.json"));
    assert_eq!(read(&native, "tokenizer.json"), read(&input, "tokenizer.json"));
    assert_eq!(ModelConfig::json(&native).unwrap().1, ModelConfig::json(&input).unwrap().1);

    convert(&input, &int4, "int4").unwrap();
    assert_eq!(ModelConfig::from_dir(&int4).unwrap().quantization.method(), None);
    assert!(!int4.join("quantization_config.json").exists());
    for (module, (form, values)) in weights(&int4) {
        let (before, exact) = &source[&module];
        match module.as_str() {
            "model.embed_tokens" => assert_eq!((form, &values), (*before, exact)),
            "lm_head" => {
                let rounded = HostTensor::from_f32_as(DType::F16, &[exact.len()], exact).unwrap();
                assert_eq!((*before, form, values), ("exl3", "F16", rounded.to_f32().unwrap()));
            }
            _ => assert_eq!((*before, form), ("exl3", "int4_s4"), "{module}"),
        }
    }
}

/// AutoGPTQ gives every module a bias; those in activation order keep it.
#[test]
fn biases_that_no_config_declares_are_kept() {
    let root = tempfile::tempdir().unwrap();
    let (input, output) = (root.path().join("in"), root.path().join("out"));
    let source = models().join("gptq_act_order");
    let checkpoint = Checkpoint::open(&source).unwrap();
    let mut writer = Writer::create(&input).unwrap();
    for name in checkpoint.names() {
        writer.host_tensor(name, &checkpoint.tensor(name).unwrap()).unwrap();
    }
    let module = "model.layers.1.mlp.down_proj";
    let bias: Vec<f32> = (0..64).map(|n| n as f32 / 64.0).collect();
    writer.host_tensor(&format!("{module}.bias"), &HostTensor::from_f32(&[64], &bias).unwrap()).unwrap();
    writer.finish(&ModelConfig::json(&source).unwrap().1).unwrap();

    convert(&input, &output, "native").unwrap();
    assert_eq!(weights(&output), weights(&source));
    let (config, checkpoint) = (ModelConfig::from_dir(&output).unwrap(), Checkpoint::open(&output).unwrap());
    let weight = checkpoint.weight(&config.quantization, module, 64, 96, false).unwrap();
    assert_eq!((weight.format_name(), weight.bias), ("int4_s4", Some(bias)));
    assert!(weight.input_order.is_some(), "sorted by group");
    let again = root.path().join("again");
    convert(&output, &again, "native").unwrap();
    for file in ["model.safetensors", "config.json"] {
        assert_eq!(std::fs::read(again.join(file)).unwrap(), std::fs::read(output.join(file)).unwrap());
    }
    let message = convert(&input, &root.path().join("dense"), "f16").unwrap_err().to_string();
    assert!(message.contains(module) && message.contains("--to native keeps it"), "{message}");
}

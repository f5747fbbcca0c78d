use marlin_formats::{DType, Format, QuantizedMatrix, Scheme};
use marlin_models::{Checkpoint, GenerationConfig, ModelError, QuantizationConfig, Tokenizer, Writer};

use super::*;

fn with_file(file: &[u8], check: impl Fn(&Checkpoint)) {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "model.safetensors", file);
    check(&Checkpoint::open(dir.path()).unwrap());
}

fn plain() -> QuantizationConfig {
    QuantizationConfig::default()
}

#[test]
fn missing_tensor_wrong_shape_wrong_dtype() {
    let header = r#"{"b.weight":{"dtype":"U8","shape":[2,3],"data_offsets":[24,30]},
        "a.weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}"#;
    with_file(&safetensors(header, &[0; 30]), |checkpoint| {
        let message = |n, k, module| checkpoint.weight(&plain(), module, n, k, false).unwrap_err().to_string();
        checkpoint.weight(&plain(), "a", 2, 3, false).unwrap();
        let found = message(3, 2, "a");
        assert_names(&found, &["model.safetensors", "`a.weight`", "[2, 3]", "[3, 2]"]);
        assert_names(&message(2, 3, "b"), &["model.safetensors", "`b.weight`", "U8", "BF16"]);
        assert_names(&message(2, 3, "c"), &["`c.weight`", "missing"]);
        let found = checkpoint.weight(&plain(), "a", 2, 3, true).unwrap_err().to_string();
        assert_names(&found, &["`a.bias`", "missing"]);
        assert!(checkpoint.release("c").is_err());
    });
}

#[test]
fn non_finite_weights_name_their_element() {
    for (bad, name) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        for at in [0, 1023, 1024, 3000, 4095] {
            let mut values = vec![0.5f32; 4096];
            values[at] = bad;
            with_file(&f32_file(&[("w.weight", &[64, 64], &values)]), |checkpoint| {
                let error = checkpoint.weight(&plain(), "w", 64, 64, false).unwrap_err();
                assert!(matches!(error, ModelError::NonFinite { index, .. } if index == at));
                let parts = ["model.safetensors", "`w.weight`", name, &format!("element {at};")];
                assert_names(&error.to_string(), &parts);
            });
        }
    }
    // The same in 16 bits, in a norm, and in fused experts.
    for (dtype, bits) in [("F16", 0x7C00u16), ("F16", 0xFE00), ("BF16", 0x7F80), ("BF16", 0xFFC0)] {
        let header = format!(r#"{{"n":{{"dtype":"{dtype}","shape":[3],"data_offsets":[0,6]}}}}"#);
        let data: Vec<u8> = [0x3C00, 0x0001, bits].iter().flat_map(|v: &u16| v.to_le_bytes()).collect();
        with_file(&safetensors(&header, &data), |checkpoint| {
            let error = checkpoint.vector("n", 3).unwrap_err();
            assert!(matches!(error, ModelError::NonFinite { index: 2, .. }), "{dtype} {bits:x}");
        });
    }
    let mut down = vec![0.0; 24];
    down[17] = f32::NAN;
    let file = f32_file(&[("e.gate_up_proj", &[2, 6, 4], &[0.0; 48]), ("e.down_proj", &[2, 4, 3], &down)]);
    with_file(&file, |checkpoint| {
        let error = checkpoint.experts(&plain(), "e", 2, 4, 3).unwrap_err();
        assert_names(&error.to_string(), &["`e.down_proj`", "element 17;"]);
    });
}

#[test]
fn fused_experts_are_views_of_the_right_slices() {
    let gate_up: Vec<f32> = (0..48).map(|v| v as f32).collect();
    let down: Vec<f32> = (100..124).map(|v| v as f32).collect();
    let file = f32_file(&[("e.gate_up_proj", &[2, 6, 4], &gate_up), ("e.down_proj", &[2, 4, 3], &down)]);
    with_file(&file, |checkpoint| {
        let experts = checkpoint.experts(&plain(), "e", 2, 4, 3).unwrap();
        assert_eq!(experts[0].gate.to_f32().unwrap(), gate_up[..12]);
        assert_eq!(experts[0].up.to_f32().unwrap(), gate_up[12..24]);
        assert_eq!(experts[1].gate.to_f32().unwrap(), gate_up[24..36]);
        assert_eq!(experts[1].up.to_f32().unwrap(), gate_up[36..]);
        assert_eq!(experts[1].down.to_f32().unwrap(), down[12..]);
        assert_eq!(checkpoint.unused().count(), 0);
        let error = checkpoint.experts(&plain(), "e", 3, 4, 3).unwrap_err().to_string();
        assert_names(&error, &["`e.gate_up_proj`", "[3, 6, 4]"]);
        let error = checkpoint.experts(&plain(), "f", 2, 4, 3).unwrap_err().to_string();
        assert_names(&error, &["`f.0.gate_proj.weight`"]);
    });
}

/// A folder with one native matrix, changed by `damage` before it is written.
fn quantized(format: Format, damage: impl Fn(&mut QuantizedMatrix), check: impl Fn(&Checkpoint, &QuantizationConfig)) {
    let scheme = Scheme::with_default_group(format);
    let weight: Vec<f32> = (0..4 * 64).map(|i| (i % 13) as f32 - 6.0).collect();
    let mut matrix = QuantizedMatrix::encode(scheme, &weight, 4, 64).unwrap();
    damage(&mut matrix);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let mut writer = Writer::create(&out).unwrap();
    writer.matrix("m", &matrix, None).unwrap();
    writer.finish(&json!({})).unwrap();
    let config = QuantizationConfig::new(scheme, Default::default(), &[r"re:x\.".into()]).unwrap();
    check(&Checkpoint::open(&out).unwrap(), &config);
}

#[test]
fn damaged_native_weights() {
    let message = |checkpoint: &Checkpoint, config: &QuantizationConfig, n, k| {
        checkpoint.weight(config, "m", n, k, false).unwrap_err().to_string()
    };
    quantized(
        Format::Int4S4,
        |_| (),
        |checkpoint, config| {
            checkpoint.weight(config, "m", 4, 64, false).unwrap();
            assert_names(&message(checkpoint, config, 4, 72), &["model.safetensors", "`m.mm.q`", "[8, 4]", "[9, 4]"]);
            assert_names(&message(checkpoint, &plain(), 4, 64), &["quantization_config.modules.m", "missing"]);
            // A config of another format does not fit the stored scales.
            let nvfp4 = Scheme::with_default_group(Format::Nvfp4);
            let other = QuantizationConfig::new(nvfp4, Default::default(), &[]).unwrap();
            assert_names(&message(checkpoint, &other, 4, 64), &["`m.mm.s`", "F16", "U8"]);
            let asymmetric = Scheme::with_default_group(Format::Int4U4);
            let other = QuantizationConfig::new(asymmetric, Default::default(), &[]).unwrap();
            assert_names(&message(checkpoint, &other, 4, 64), &["`m.mm.z`", "missing"]);
            let ignored = QuantizationConfig::new(asymmetric, Default::default(), &["re:[a-m]$".into()]).unwrap();
            assert_names(&message(checkpoint, &ignored, 4, 64), &["modules.m", "ignored"]);
        },
    );
    for (format, bits) in [(Format::Fp4E2m1, 0x7C01u16), (Format::Fp4E2m1, 0x7C00), (Format::Mxfp4, 0xFF)] {
        quantized(
            format,
            |m| m.scales[3] = bits,
            |checkpoint, config| {
                assert_names(&message(checkpoint, config, 4, 64), &["model.safetensors", "`m`", "n=3", "scale"]);
            },
        );
    }
    quantized(
        Format::Int4U4,
        |m| m.zeros[1] = 0x7E00,
        |checkpoint, config| {
            assert_names(&message(checkpoint, config, 4, 64), &["model.safetensors", "`m`", "n=1", "zero"]);
        },
    );
    quantized(
        Format::Nvfp4,
        |m| m.tensor_scale = Some(f32::NAN),
        |checkpoint, config| {
            assert_names(&message(checkpoint, config, 4, 64), &["model.safetensors", "`m`", "tensor scale"]);
        },
    );
}

#[test]
fn damaged_orders_of_rows() {
    let scheme = Scheme::with_default_group(Format::Int4S4);
    let matrix = QuantizedMatrix::encode(scheme, &[0.5; 4 * 64], 4, 64).unwrap();
    let natural: Vec<u32> = (0..64).collect();
    let changed = |at: usize, channel: u32| {
        let mut order = natural.clone();
        order[at] = channel;
        order
    };
    let bytes = |order: &[u32]| -> Vec<u8> { order.iter().flat_map(|v| v.to_le_bytes()).collect() };
    let cases: [(DType, Vec<u32>, &[&str]); 4] = [
        (DType::U32, changed(5, 6), &["`m.mm.o`", "[6] is 6 once more"]),
        (DType::U32, changed(63, 64), &["`m.mm.o`", "[63] is 64, there are 64 channels"]),
        (DType::U32, natural[..63].to_vec(), &["`m.mm.o`", "[63]", "[64]"]),
        (DType::I32, natural.clone(), &["`m.mm.o`", "I32", "U32"]),
    ];
    for (dtype, order, parts) in cases {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model");
        let mut writer = Writer::create(&out).unwrap();
        writer.matrix("m", &matrix, None).unwrap();
        writer.tensor("m.mm.o", dtype, &[order.len()], &bytes(&order)).unwrap();
        writer.finish(&json!({})).unwrap();
        let config = QuantizationConfig::new(scheme, Default::default(), &[]).unwrap();
        let error = Checkpoint::open(&out).unwrap().weight(&config, "m", 4, 64, false).unwrap_err().to_string();
        assert_names(&error, &[&["model.safetensors"], parts].concat());
    }
}

#[test]
fn stacked_native_experts_are_read_by_slice() {
    // formats.md 0.4: a leading expert axis on each tensor.
    let scheme = Scheme::with_default_group(Format::Int8);
    let matrix = |e: usize, n: usize, k: usize| {
        let weight: Vec<f32> = (0..n * k).map(|i| ((i * 7 + e * 3) % 11) as f32 - 5.0).collect();
        QuantizedMatrix::encode(scheme, &weight, n, k).unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let mut writer = Writer::create(&out).unwrap();
    for (name, n, k) in [("gate_proj", 3, 4), ("up_proj", 3, 4), ("down_proj", 4, 3)] {
        let both = [matrix(0, n, k), matrix(1, n, k)];
        let codes: Vec<u8> = both.iter().flat_map(|m| &m.codes).flat_map(|v| v.to_le_bytes()).collect();
        let scales: Vec<u8> = both.iter().flat_map(|m| &m.scales).flat_map(|v| v.to_le_bytes()).collect();
        let (q, s) = (format!("e.{name}.mm.q"), format!("e.{name}.mm.s"));
        writer.tensor(&q, DType::U32, &[2, scheme.code_rows(k), n], &codes).unwrap();
        writer.tensor(&s, DType::F16, &[2, scheme.groups(k), n], &scales).unwrap();
    }
    let orders: Vec<u8> = [0u32, 1, 2, 2, 0, 1].iter().flat_map(|v| v.to_le_bytes()).collect();
    writer.tensor("e.down_proj.mm.o", DType::U32, &[2, 3], &orders).unwrap();
    writer.finish(&json!({})).unwrap();
    let config = QuantizationConfig::new(scheme, Default::default(), &[]).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    let experts = checkpoint.experts(&config, "e", 2, 4, 3).unwrap();
    for (e, expert) in experts.iter().enumerate() {
        assert_eq!(expert.up.to_f32().unwrap(), matrix(e, 3, 4).decode().unwrap());
        let stored = matrix(e, 4, 3).decode().unwrap();
        let order = [[0, 1, 2], [2, 0, 1]][e];
        for (row, stored) in expert.down.to_f32().unwrap().chunks(3).zip(stored.chunks(3)) {
            assert_eq!(order.map(|channel: usize| row[channel]), stored);
        }
    }
    let error = checkpoint.experts(&config, "e", 3, 4, 3).unwrap_err().to_string();
    assert_names(&error, &["`e.gate_proj.mm.q`", "[3, 1, 3]"]);
}

#[test]
fn missing_companion_files() {
    let dir = tempfile::tempdir().unwrap();
    let error = Tokenizer::from_dir(dir.path()).unwrap_err().to_string();
    assert_names(&error, &["tokenizer.json", "not found"]);
    assert_eq!(GenerationConfig::from_dir(dir.path()).unwrap(), GenerationConfig::default());
    for (field, value) in [
        ("temperature", json!(-0.5)),
        ("temperature", json!("warm")),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-1)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("eos_token_id", json!([1, -2])),
        ("eos_token_id", json!(4_294_967_296u64)),
    ] {
        write(dir.path(), "generation_config.json", json!({ field: value }).to_string().as_bytes());
        let error = GenerationConfig::from_dir(dir.path()).unwrap_err().to_string();
        assert_names(&error, &["generation_config.json", &format!("`{field}`")]);
    }
    let good = json!({"eos_token_id": [5, 7], "temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": true});
    write(dir.path(), "generation_config.json", good.to_string().as_bytes());
    let config = GenerationConfig::from_dir(dir.path()).unwrap();
    assert_eq!(config.eos_token_ids, [5, 7]);
    assert_eq!((config.temperature, config.top_k, config.top_p), (Some(0.6), Some(20), Some(0.95)));
}

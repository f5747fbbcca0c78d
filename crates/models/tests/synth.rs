//! Synthetic models: the tensors that the architecture needs, no others, with sane values.

use std::path::Path;

use marlin_formats::exl3::Codebook;
use marlin_formats::{DType, Format};
use marlin_models::{
    Checkpoint, HeadFormat, ModelConfig, ModelError, ModuleKind, SynthOptions, SynthTrellis, synth, synth_presets,
};
use marlin_ops::WeightData;

fn deviation(values: &[f32]) -> f32 {
    let mean_square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
    mean_square.sqrt()
}

/// Reads every tensor the config asks for; all others are an error.
fn read_all(dir: &Path) -> (ModelConfig, Checkpoint) {
    let config = ModelConfig::from_dir(dir).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    for module in config.linear_modules() {
        let (n, k) = (module.out_features, module.in_features);
        let weight = checkpoint.weight(&config.quantization, &module.name, n, k, module.bias).unwrap();
        let found = deviation(&weight.to_f32().unwrap()) * (k as f32).sqrt();
        assert!((0.7..1.4).contains(&found), "{}: deviation {found} / sqrt(K)", module.name);
        if module.kind == ModuleKind::Router {
            assert!(matches!(weight.data, WeightData::Dense(_)));
        }
    }
    for vector in config.vector_tensors() {
        let values = checkpoint.vector(&vector.name, vector.len).unwrap();
        assert!(vector.correction_bias || values.iter().all(|&v| v == 1.0), "{}", vector.name);
    }
    checkpoint.check_all_used(|_| false).unwrap();
    (config, checkpoint)
}

#[test]
fn every_tiny_preset_in_every_format() {
    let tiny: Vec<_> = synth_presets().iter().filter(|name| name.starts_with("tiny-")).collect();
    assert_eq!(tiny.len(), 6);
    for (i, name) in tiny.into_iter().enumerate() {
        // Every architecture plain and in two formats; every format in the first.
        for (j, format) in [None].into_iter().chain(Format::ALL.map(Some)).enumerate() {
            if i > 0 && j > 0 && j % 6 != i {
                continue;
            }
            let dir = tempfile::tempdir().unwrap();
            let out = dir.path().join("model");
            let options = SynthOptions { format, ..SynthOptions::default() };
            let mut calls = 0;
            let summary = synth(name, &options, &out, |done, total| {
                calls += 1;
                assert!(done == calls && done <= total);
            });
            let (config, checkpoint) = read_all(&out);
            assert_eq!(checkpoint.total_bytes(), summary.unwrap().bytes, "{name} {format:?}");
            assert_eq!(config.quantization.is_empty(), format.is_none());
        }
    }
}

#[test]
fn trellis_weights_of_every_codebook() {
    let tiny: Vec<_> = synth_presets().iter().filter(|name| name.starts_with("tiny-")).collect();
    for (i, name) in tiny.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model");
        let expected = SynthTrellis { bits: 1 + i as u32, codebook: Codebook::ALL[i % 3] };
        let summary =
            synth(name, &SynthOptions { trellis: Some(expected), ..SynthOptions::default() }, &out, |_, _| ());
        let bytes = summary.unwrap().bytes;
        let (config, checkpoint) = read_all(&out);
        assert_eq!(checkpoint.total_bytes(), bytes, "{name}");
        let quantization = std::fs::read_to_string(out.join("config.json")).unwrap();
        let head_bits = if config.tie_word_embeddings { 16 } else { expected.bits };
        assert!(quantization.contains(&format!("\"head_bits\": {head_bits}")), "{name}: {quantization}");
        for module in config.linear_modules() {
            let (n, k) = (module.out_features, module.in_features);
            let weight = checkpoint.weight(&config.quantization, &module.name, n, k, module.bias).unwrap();
            let found = deviation(&weight.to_f32().unwrap()) * (k as f32).sqrt();
            assert!((0.95..1.05).contains(&found), "{name} {}: deviation {found} / sqrt(K)", module.name);
            match (module.kind, weight.data) {
                (ModuleKind::Router | ModuleKind::Embedding, WeightData::Dense(_)) => {}
                (_, WeightData::Exl3(found)) => {
                    let found = SynthTrellis { bits: found.bits, codebook: found.codebook };
                    assert_eq!(found, expected, "{name} {}", module.name);
                }
                _ => panic!("{name}: {} is not EXL3", module.name),
            }
        }
    }
}

#[test]
fn heads_dtypes_and_overrides() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let options = SynthOptions {
        format: Some(Format::Int4S4),
        group_size: Some(32),
        head: HeadFormat::Native(Format::Int8),
        dtype: DType::F16,
        layers: Some(1),
        hidden_size: Some(200),
        intermediate_size: Some(264),
        vocab_size: Some(300),
        context: Some(99),
        ..SynthOptions::default()
    };
    synth("tiny-qwen3", &options, &out, |_, _| ()).unwrap();
    let (config, checkpoint) = read_all(&out);
    assert_eq!((config.num_layers, config.hidden_size, config.vocab_size), (1, 200, 300));
    assert_eq!(config.max_position_embeddings, 99);
    // Tied: the embedding is the head.
    let scheme = config.quantization.scheme("model.embed_tokens", 300, 200).unwrap();
    assert_eq!(scheme.format, Format::Int8);
    assert_eq!(checkpoint.get("model.norm.weight").unwrap().dtype, DType::F16);
    let plain_head = SynthOptions {
        head: HeadFormat::Plain,
        ..SynthOptions { format: Some(Format::Nf3), ..SynthOptions::default() }
    };
    let out = dir.path().join("plain-head");
    synth("tiny-llama", &plain_head, &out, |_, _| ()).unwrap();
    let (config, checkpoint) = read_all(&out);
    assert!(config.quantization.is_ignored("lm_head") && config.quantization.is_ignored("model.embed_tokens"));
    assert_eq!(checkpoint.get("lm_head.weight").unwrap().dtype, DType::BF16);
}

#[test]
fn same_seed_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str, seed| {
        let out = dir.path().join(name);
        let options = SynthOptions { seed, format: Some(Format::Fp4E2m1), ..SynthOptions::default() };
        synth("tiny-glm-4.7-flash", &options, &out, |_, _| ()).unwrap();
        std::fs::read(out.join("model.safetensors")).unwrap()
    };
    let first = make("a", 1);
    assert_eq!(first, make("b", 1));
    assert_ne!(first, make("c", 2));
}

#[test]
fn refusals_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let refused = |name: &str, options: SynthOptions, part: &str| {
        let error = synth(name, &options, &out, |_, _| ()).unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    };
    refused("qwen4", SynthOptions::default(), "valid: glm-4.7-flash, qwen3-0.6b");
    let layers = Some(0);
    refused("tiny-qwen3", SynthOptions { layers, ..SynthOptions::default() }, "`num_hidden_layers`");
    let (format, group_size) = (Some(Format::Int3), Some(24));
    refused("tiny-qwen3", SynthOptions { format, group_size, ..SynthOptions::default() }, "group_size 24");
    let format = Some(Format::Int4S4);
    let trellis = Some(SynthTrellis { bits: 9, codebook: Codebook::Mul1 });
    refused("tiny-qwen3", SynthOptions { trellis, ..SynthOptions::default() }, "9 is not 1 to 8");
    let trellis = Some(SynthTrellis { bits: 3, codebook: Codebook::Mul1 });
    refused("tiny-qwen3", SynthOptions { trellis, format, ..SynthOptions::default() }, "EXL3 has no other format");
    let head = HeadFormat::Native(Format::Int8);
    refused("tiny-llama", SynthOptions { trellis, head, ..SynthOptions::default() }, "int8 cannot stand beside EXL3");
    let dtype = DType::U8;
    refused("tiny-qwen3", SynthOptions { dtype, ..SynthOptions::default() }, "U8");
    std::fs::create_dir(&out).unwrap();
    let error = synth("tiny-qwen3", &SynthOptions::default(), &out, |_, _| ()).unwrap_err();
    assert!(matches!(error, ModelError::OutputExists { path } if path == out));
}

#[test]
fn published_shapes_have_published_sizes() {
    // Parameters in millions, embeddings included once when tied: the models' own cards.
    for (name, expected) in [
        ("qwen3-0.6b", 596),
        ("qwen3-4b", 4022),
        ("qwen3-30b-a3b", 30_532),
        ("llama-3.2-1b", 1236),
        ("llama-3.1-8b", 8030),
        ("deepseek-v2-lite", 15_706),
        ("deepseek-v3", 671_026),
    ] {
        let config = marlin_models::synth_config(name).unwrap();
        let weights = config.linear_modules().into_iter().map(|m| m.out_features * m.in_features);
        let vectors = config.vector_tensors().into_iter().map(|v| v.len);
        let millions = (weights.chain(vectors).sum::<usize>() as f64 / 1e6).round() as usize;
        assert_eq!(millions, expected, "{name}");
    }
}

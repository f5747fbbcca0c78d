//! Checkpoints written by other projects' tools: the same weights as those tools decode, and the same logits.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::parity::check_imported_on;
use common::{imported_folders, max_difference};
use half::{bf16, f16};
use marlin_cpu::{Cpu, CpuOptions};
use marlin_models::{Checkpoint, ModelConfig, QuantizationConfig};
use marlin_ops::oracle::Oracle;
use marlin_ops::{HostTensor, Weight};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// What every golden module is held in; a module that becomes dense without being listed so is a loss of memory.
const FORMS: &[(&str, &str)] = &[
    ("awq_gemm", "int4_u4"),
    ("awq_gemv", "int4_u4"),
    ("bnb_fp4", "BF16"),
    ("bnb_fp4-double", "BF16"),
    ("bnb_int8", "affine8"),
    ("bnb_nf4", "nf4"),
    ("bnb_nf4-double", "BF16"),
    ("bnb_nf4-rows", "F16"),
    ("ct_fp8-channel", "fp8_e4m3"),
    ("ct_fp8-tensor", "fp8_e4m3"),
    ("ct_int1-sym", "int2_u2"),
    ("ct_int2-asym", "int2_u2"),
    ("ct_int2-sym", "int2_u2"),
    ("ct_int3-asym", "int3_u3"),
    ("ct_int3-sym", "int3_u3"),
    ("ct_int4-asym", "int4_u4"),
    ("ct_int4-channel-f32", "F32"),
    ("ct_int4-sym", "int4_s4"),
    ("ct_int5-asym", "affine5"),
    ("ct_int5-sym", "affine5"),
    ("ct_int6-asym", "affine6"),
    ("ct_int6-sym", "affine6"),
    ("ct_int7-asym", "int8_asym"),
    ("ct_int7-sym", "int8_asym"),
    ("ct_int8-asym", "int8_asym"),
    ("ct_int8-sym", "int8"),
    ("ct_mxfp4", "mxfp4"),
    ("ct_mxfp8", "fp8_e4m3"),
    ("ct_nvfp4", "nvfp4"),
    ("fp8_block", "fp8_e4m3_f32"),
    ("fp8_tensor", "fp8_e4m3_f32"),
    ("gptq_act_order", "int4_s4"),
    ("gptq_channel", "int4_s4"),
    ("gptq_p-3", "int3_u3"),
    ("gptq_p-5", "affine5"),
    ("gptq_p-6", "affine6"),
    ("gptq_p-7", "int8_asym"),
    ("gptq_v1-3", "int3_u3"),
    ("gptq_v1-4", "int4_u4"),
    ("gptq_v1-8", "int8_asym"),
    ("gptq_v1-zeros", "int4_u4"),
    ("gptq_v2-2", "int2_u2"),
    ("gptq_v2-3", "int3_u3"),
    ("gptq_v2-4", "int4_u4"),
    ("gptq_v2-8", "int8_asym"),
    ("mlx-2-32", "affine2"),
    ("mlx-2-64", "affine2"),
    ("mlx-3-32", "affine3"),
    ("mlx-3-64", "affine3"),
    ("mlx-4-32", "affine4"),
    ("mlx-4-64", "affine4"),
    ("mlx-5-32", "affine5"),
    ("mlx-5-64", "affine5"),
    ("mlx-6-32", "affine6"),
    ("mlx-6-64", "affine6"),
    ("mlx-8-32", "affine8"),
    ("mlx-8-64", "affine8"),
    ("mlx-mxfp4", "mxfp4"),
    ("mlx-mxfp8", "fp8_e4m3"),
    ("mlx-nvfp4", "nvfp4"),
];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/imports").join(name)
}

/// The config of a golden module, from its file's metadata, and the largest difference allowed.
fn module_config(path: &Path) -> (QuantizationConfig, f32) {
    let bytes = std::fs::read(path).unwrap();
    let (_, metadata) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = metadata.metadata().as_ref().unwrap();
    let config: Value = serde_json::from_str(&metadata["config"]).unwrap();
    let config = match config.get("mlx") {
        Some(mlx) => json!({"quantization": mlx}),
        None => json!({"quantization_config": config}),
    };
    (QuantizationConfig::from_config(path, &config).unwrap(), metadata["limit"].parse().unwrap())
}

/// `values` rounded to the dtype of `like`.
fn rounded(values: &[f32], like: &HostTensor) -> Vec<f32> {
    HostTensor::from_f32_as(like.dtype(), like.dims(), values).unwrap().to_f32().unwrap()
}

#[test]
fn modules_decode_to_the_tools_values() {
    let mut forms = BTreeMap::new();
    for entry in std::fs::read_dir(folder("modules")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let (config, limit) = module_config(&path);
        let checkpoint = Checkpoint::open_file(&path).unwrap();
        let expected = checkpoint.tensor("expected").unwrap();
        let [n, k] = *expected.dims() else { panic!("{name}") };
        let weight = checkpoint.weight(&config, "m", n, k, false).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(checkpoint.unused().count(), 0, "{name}: {:?}", checkpoint.unused().next());
        let found = rounded(&weight.to_f32().unwrap(), &expected);
        let wanted = expected.to_f32().unwrap();
        let scale = wanted.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(scale > 0.01, "{name}: the golden values say nothing");
        let error = max_difference(&found, &wanted);
        assert!(error <= limit * scale, "{name}: {error:e} of {scale:e}");
        assert_eq!(weight.bias.is_some(), name == "gptq_act_order", "{name}");
        assert_eq!(weight.input_order.is_some(), name == "gptq_act_order", "{name}");
        forms.insert(name, weight.format_name());
    }
    let expected: BTreeMap<String, &str> = FORMS.iter().map(|(name, form)| ((*name).to_owned(), *form)).collect();
    assert_eq!(forms, expected);
}

#[test]
fn ambiguous_zero_points_are_reported() {
    let path = folder("modules/gptq_v1-zeros.safetensors");
    let checkpoint = Checkpoint::open_file(&path).unwrap();
    checkpoint.weight(&module_config(&path).0, "m", 64, 64, false).unwrap();
    let warnings = checkpoint.take_warnings();
    assert!(warnings.len() == 1 && warnings[0].contains("m: zero points of 0"), "{warnings:?}");
    assert!(checkpoint.take_warnings().is_empty());
}

#[test]
fn stacked_mxfp4_experts_equal_transformers() {
    let checkpoint = Checkpoint::open_file(&folder("gpt_oss_experts.safetensors")).unwrap();
    let config = json!({"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}});
    let config = QuantizationConfig::from_config(Path::new("config.json"), &config).unwrap();
    let experts = checkpoint.experts(&config, "e", 2, 64, 32).unwrap();
    let expected = |name: &str| checkpoint.tensor(&format!("{name}.expected")).unwrap().to_f32().unwrap();
    let (gate_up, down) = (expected("gate_up_proj"), expected("down_proj"));
    let bias = checkpoint.tensor("e.gate_up_proj_bias").unwrap().to_f32().unwrap();
    for (e, expert) in experts.iter().enumerate() {
        let rows: Vec<&[f32]> = gate_up[e * 64 * 64..][..64 * 64].chunks(64).collect();
        let every_other =
            |first: usize| rows.iter().skip(first).step_by(2).copied().flatten().copied().collect::<Vec<_>>();
        assert_eq!(expert.gate.to_f32().unwrap(), every_other(0));
        assert_eq!(expert.up.to_f32().unwrap(), every_other(1));
        assert_eq!(expert.down.to_f32().unwrap(), down[e * 64 * 32..][..64 * 32]);
        assert_eq!(expert.up.format_name(), "mxfp4");
        assert_eq!(expert.up.bias.as_ref().unwrap()[3], bias[e * 64 + 7]);
    }
    assert_eq!(checkpoint.unused().count(), 0);
}

/// Block scales in BF16, bytes (E8M0) and f32, with blocks that the matrix does not fill.
#[test]
fn fp8_blocks_may_be_partial() {
    let (n, k) = (130, 132);
    let codes: Vec<u8> = (0..n * k).map(|i| (i * 37 % 127) as u8 | ((i % 3 == 0) as u8) << 7).collect();
    let grids: [(&str, Vec<u8>, [f32; 4]); 3] = [
        ("F32", [0.3f32, 1.7, 0.011, 2.5].iter().flat_map(|v| v.to_le_bytes()).collect(), [0.3, 1.7, 0.011, 2.5]),
        (
            "BF16",
            [0.5f32, 3.0, 0.25, 1.5].iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            [0.5, 3.0, 0.25, 1.5],
        ),
        ("F8_E8M0", vec![126, 128, 127, 100], [0.5, 2.0, 1.0, 2.0f32.powi(-27)]),
    ];
    let config = json!({"quantization_config": {"quant_method": "FP8", "weight_block_size": [128, 128]}});
    let config = QuantizationConfig::from_config(Path::new("config.json"), &config).unwrap();
    for (dtype, bytes, scales) in grids {
        let header = json!({
            "m.weight": {"dtype": "F8_E4M3", "shape": [n, k], "data_offsets": [0, n * k]},
            "m.weight_scale_inv": {"dtype": dtype, "shape": [2, 2], "data_offsets": [n * k, n * k + bytes.len()]},
        });
        let header = header.to_string();
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &codes, &bytes].concat();
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let weight = checkpoint.weight(&config, "m", n, k, false).unwrap();
        let values = weight.to_f32().unwrap();
        for (i, &value) in values.iter().enumerate() {
            let block = i / k / 128 * 2 + i % k / 128;
            let expected = marlin_formats::fp8::e4m3::decode(codes[i]) * scales[block];
            assert_eq!(value.to_bits(), expected.to_bits(), "{dtype} {i}");
        }
        assert!(matches!(weight.format_name(), "fp8_e4m3" | "fp8_e4m3_f32"), "{dtype}");
    }
}

/// The layout of the Marlin kernel by its published permutation, both groupings.
#[test]
fn marlin_layout_is_the_plain_one() {
    let (n, k) = (256, 128);
    let code = |n: usize, k: usize| ((n * 7 + k * 3 + n * k / 5) % 16) as u32;
    // The permutation as the packer builds it: tiles of 16x16, 1024 codes a permutation.
    let mut order = Vec::new();
    for i in 0..32 {
        let mut lane = Vec::new();
        for block in [0, 1] {
            for row in [2 * (i % 4), 2 * (i % 4) + 1, 2 * (i % 4 + 4), 2 * (i % 4 + 4) + 1] {
                lane.push(16 * row + i / 4 + 8 * block);
            }
        }
        for j in 0..4 {
            order.extend(lane.iter().map(|at| at + 256 * j));
        }
    }
    let interleave = [0, 2, 4, 6, 1, 3, 5, 7];
    let order: Vec<usize> = order.chunks(8).flat_map(|c| interleave.map(|i| c[i])).collect();
    let mut words = Vec::new();
    for a in 0..k / 16 {
        // Row a of tiles: tile by tile, each row-major along K then N.
        let row: Vec<u32> = (0..16 * n).map(|at| code(at / 256 * 16 + at % 16, 16 * a + at % 256 / 16)).collect();
        let permuted: Vec<u32> = row.chunks(1024).flat_map(|c| order.iter().map(|&i| c[i])).collect();
        words.extend(permuted.chunks(8).map(|c| c.iter().rev().fold(0u32, |word, &q| word << 4 | q)));
    }
    let scale = |n: usize| f16::from_f32(0.25 + n as f32 / 64.0);
    let single: Vec<usize> = (0..4).flat_map(|i| [0, 1, 8, 9, 16, 17, 24, 25].map(|j| 2 * i + j)).collect();
    let scales: Vec<u8> = (0..n).flat_map(|at| scale(at / 32 * 32 + single[at % 32]).to_le_bytes()).collect();
    let codes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let header = json!({
        "m.B": {"dtype": "I32", "shape": [k / 16, 2 * n], "data_offsets": [0, codes.len()]},
        "m.s": {"dtype": "F16", "shape": [1, n], "data_offsets": [codes.len(), codes.len() + scales.len()]},
    });
    let header = header.to_string();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &codes, &scales].concat();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("model.safetensors"), file).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let config = json!({"quantization_config": {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}});
    let config = QuantizationConfig::from_config(Path::new("config.json"), &config).unwrap();
    let weight: Weight = checkpoint.weight(&config, "m", n, k, false).unwrap();
    assert_eq!(weight.format_name(), "int4_s4");
    for (i, value) in weight.to_f32().unwrap().into_iter().enumerate() {
        let expected = (code(i / k, i % k) as f32 - 8.0) * scale(i / k).to_f32();
        assert_eq!(value, expected, "{i}");
    }
}

#[test]
fn models_have_the_logits_of_the_tools_weights() {
    let folders = imported_folders();
    assert_eq!(folders.len(), 9);
    for dir in folders {
        assert!(ModelConfig::from_dir(&dir).unwrap().quantization.method().is_some(), "{}", dir.display());
    }
    check_imported_on(&Arc::new(Oracle::new()));
    check_imported_on(&Arc::new(Cpu::new(CpuOptions { exact: true, ..CpuOptions::default() }).unwrap()));
}

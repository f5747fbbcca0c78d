//! A checkpoint that ExLlamaV3 wrote: its weights and logits, and files that are not valid.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::parity::check_exl3_on;
use marlin_cpu::{Cpu, CpuOptions, Isa};
use marlin_models::{Checkpoint, ModelConfig, ModelError};
use marlin_ops::WeightData;
use marlin_ops::oracle::Oracle;
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

fn tiny_llama() -> PathBuf {
    common::exl3().0
}

#[test]
fn the_oracle_gives_the_logits_of_the_runtime() {
    check_exl3_on(&Arc::new(Oracle::new()));
}

/// In both modes, on every instruction set of this machine.
#[test]
fn the_cpu_gives_the_logits_of_the_runtime() {
    for isa in [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Neon] {
        for exact in [true, false] {
            match Cpu::new(CpuOptions { exact, isa, ..CpuOptions::default() }) {
                Ok(cpu) => check_exl3_on(&Arc::new(cpu)),
                // Only the portable one exists on every machine.
                Err(error) => assert_ne!(isa, Isa::Portable, "{error}"),
            }
        }
    }
}

#[test]
fn bit_rates_and_sizes_are_those_of_the_file() {
    let dir = tiny_llama();
    let config = ModelConfig::from_dir(&dir).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    for module in config.linear_modules().iter().filter(|module| module.name != "model.embed_tokens") {
        let (n, k) = (module.out_features, module.in_features);
        let weight = checkpoint.weight(&config.quantization, &module.name, n, k, false).unwrap();
        let WeightData::Exl3(matrix) = &weight.data else { panic!("{}: {}", module.name, weight.format_name()) };
        assert_eq!(matrix.bits, if module.name == "lm_head" { 6 } else { 3 }, "{}", module.name);
        assert_eq!((weight.out_features(), weight.in_features()), (n, k), "{}", module.name);
    }
}

/// A copy of the golden folder whose tensors `edit` changes.
fn edited(edit: impl Fn(&str, &mut Edited)) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    let dir = tiny_llama();
    fs::copy(dir.join("config.json"), copy.path().join("config.json")).unwrap();
    let bytes = fs::read(dir.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors = Vec::new();
    for (name, tensor) in file.tensors() {
        let mut changed = Edited {
            name: name.clone(),
            dtype: tensor.dtype(),
            shape: tensor.shape().to_vec(),
            data: tensor.data().to_vec(),
            dropped: false,
        };
        edit(&name, &mut changed);
        if !changed.dropped {
            tensors.push(changed);
        }
    }
    let views = tensors.iter().map(|t| (t.name.clone(), TensorView::new(t.dtype, t.shape.clone(), &t.data).unwrap()));
    safetensors::serialize_to_file(views, None, &copy.path().join("model.safetensors")).unwrap();
    copy
}

struct Edited {
    name: String,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
    dropped: bool,
}

const MODULE: &str = "model.layers.0.self_attn.k_proj";

fn load(dir: &Path) -> marlin_models::Result<WeightData> {
    let config = ModelConfig::from_dir(dir)?;
    Ok(Checkpoint::open(dir)?.weight(&config.quantization, MODULE, 128, 256, false)?.data)
}

fn refusal(edit: impl Fn(&str, &mut Edited)) -> String {
    let copy = edited(edit);
    let error = load(copy.path()).unwrap_err();
    assert!(!matches!(error, ModelError::Io { .. }), "{error}");
    error.to_string()
}

fn only(suffix: &str, change: impl Fn(&mut Edited)) -> impl Fn(&str, &mut Edited) {
    let target = format!("{MODULE}.{suffix}");
    move |name, tensor| {
        if name == target {
            change(tensor);
        }
    }
}

#[test]
fn damaged_modules_are_refused_by_name() {
    for (refused, words) in [
        (refusal(only("suh", |t| t.dropped = true)), "k_proj.suh` is missing"),
        (refusal(only("svh", |t| t.dropped = true)), "k_proj.svh` is missing"),
        (refusal(only("mul1", |t| t.data[0] ^= 1)), "k_proj.mul1`: another multiplier"),
        (refusal(only("trellis", |t| t.shape = vec![16, 8, 3, 16])), "k_proj.trellis` has shape"),
        (refusal(only("trellis", |t| (t.shape, t.data) = (vec![16, 8, 0], Vec::new()))), "k_proj.trellis` has shape"),
        (
            refusal(only("trellis", |t| (t.shape[2], t.data) = (144, vec![0; 16 * 8 * 144 * 2]))),
            "expected [16, 8, 128]",
        ),
        (refusal(only("trellis", |t| (t.shape[2], t.data) = (47, vec![0; 16 * 8 * 47 * 2]))), "expected [16, 8, 32]"),
        (refusal(only("trellis", |t| t.dtype = safetensors::Dtype::U16)), "has dtype U16, expected I16"),
        (refusal(only("suh", |t| (t.data[6], t.data[7]) = (0, 0x7C))), "not a valid F16 scale"),
        (refusal(only("svh", |t| (t.shape, t.data) = (vec![256], vec![0; 512]))), "k_proj.svh` has shape"),
        (refusal(only("mul1", |t| t.name = format!("{MODULE}.scale"))), "pre-release EXL3 is not supported"),
        (refusal(only("trellis", |t| t.name = format!("{MODULE}.slice.0.trellis"))), "a layer in slices"),
    ] {
        assert!(refused.contains(words), "{refused}");
        assert!(refused.contains("model.safetensors") || refused.contains("is missing"), "{refused}");
    }
}

#[test]
fn markers_choose_the_codebook() {
    let copy = edited(only("mul1", |t| t.dropped = true));
    let WeightData::Exl3(matrix) = load(copy.path()).unwrap() else { panic!("not EXL3") };
    assert_eq!(matrix.codebook.name(), "3inst");
    let copy = edited(only("mul1", |t| {
        t.name = format!("{MODULE}.mcg");
        t.data = 0xCBAC_1FEDu32.to_le_bytes().to_vec();
    }));
    let WeightData::Exl3(matrix) = load(copy.path()).unwrap() else { panic!("not EXL3") };
    assert_eq!(matrix.codebook.name(), "mcg");
}

#[test]
fn packed_signs_of_the_earliest_files_are_read() {
    let copy = edited(only("suh", |t| {
        t.name = format!("{MODULE}.su");
        t.dtype = safetensors::Dtype::I16;
        t.shape = vec![16];
        t.data = [0x8005u16; 16].iter().flat_map(|word| word.to_le_bytes()).collect();
    }));
    let WeightData::Exl3(matrix) = load(copy.path()).unwrap() else { panic!("not EXL3") };
    let negative: Vec<usize> = (0..16).filter(|&i| matrix.suh[i] == 0xBC00).collect();
    assert_eq!(negative, [0, 2, 15]);
    assert!(matrix.suh.iter().all(|&bits| bits & 0x7FFF == 0x3C00));
}

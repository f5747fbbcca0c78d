//! Damaged and malicious files: each gives an error that names the file and the key or tensor.

use std::sync::Arc;

use marlin_models::{Checkpoint, LoadOptions, Model, ModelConfig};
use marlin_ops::oracle::Oracle;

use crate::file::{ARRAY, F32, GgufSpec, Q4_0, STRING, text};

/// What opening and loading the bytes says.
fn outcome(bytes: &[u8]) -> Result<(), String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    let load = || {
        let checkpoint = Checkpoint::open(&path)?;
        let config = ModelConfig::from_dir(&path)?;
        Model::load(Arc::new(Oracle::new()), &checkpoint, config, LoadOptions::default()).map(|_| ())
    };
    load().map_err(|e| e.to_string())
}

#[track_caller]
fn assert_refused(bytes: &[u8], parts: &[&str]) {
    let error = outcome(bytes).unwrap_err();
    for part in ["model.gguf"].iter().chain(parts) {
        assert!(error.contains(part), "`{error}` does not name `{part}`");
    }
}

fn with(edit: impl FnOnce(&mut GgufSpec)) -> Vec<u8> {
    let mut spec = GgufSpec::llama();
    edit(&mut spec);
    spec.bytes()
}

#[test]
fn the_valid_file_loads() {
    assert_eq!(outcome(&GgufSpec::llama().bytes()), Ok(()));
}

/// Whatever is cut off, the file is refused; nothing panics.
#[test]
fn every_truncation_is_refused() {
    let bytes = GgufSpec::llama().bytes();
    for len in 0..bytes.len() {
        assert!(outcome(&bytes[..len]).is_err(), "{len} of {} bytes", bytes.len());
    }
}

/// No single damaged byte of the header panics.
#[test]
fn damaged_headers_do_not_panic() {
    let spec = GgufSpec::llama().key(
        "some.array",
        ARRAY,
        &[&STRING.to_le_bytes()[..], &1u64.to_le_bytes(), &text("x")].concat(),
    );
    let bytes = spec.bytes();
    let header = bytes.len() - spec.tensors.iter().map(|t| t.data.len().next_multiple_of(32)).sum::<usize>();
    for at in 0..header {
        for value in [0x00, 0x7F, 0x80, 0xFF] {
            let mut damaged = bytes.clone();
            damaged[at] = value;
            // Some edits are harmless (a name of the metadata that nothing reads).
            let _ = outcome(&damaged);
        }
    }
}

#[test]
fn headers_that_lie() {
    let bytes = GgufSpec::llama().bytes();
    let patched = |at: usize, patch: &[u8]| {
        let mut bytes = bytes.clone();
        bytes[at..at + patch.len()].copy_from_slice(patch);
        bytes
    };
    assert_refused(&patched(0, b"GGML"), &["does not start with `GGUF`"]);
    assert_refused(&patched(4, &1u32.to_le_bytes()), &["version 1"]);
    assert_refused(&patched(4, &4u32.to_le_bytes()), &["version 4"]);
    assert_refused(&patched(4, &3u32.to_be_bytes()), &["big-endian"]);
    assert_refused(&patched(8, &u64::MAX.to_le_bytes()), &["number of tensors"]);
    assert_refused(&patched(8, &1_000_000u64.to_le_bytes()), &["number of tensors is 1000000"]);
    assert_refused(&patched(16, &(1u64 << 40).to_le_bytes()), &["number of metadata keys"]);
    assert_refused(&patched(24, &u64::MAX.to_le_bytes()), &["metadata key", "bytes"]);
}

#[test]
fn metadata_that_lies() {
    let array = |element: u32, count: u64| [&element.to_le_bytes()[..], &count.to_le_bytes()].concat();
    let with_key = |kind: u32, value: &[u8]| GgufSpec::llama().key("some.key", kind, value).bytes();
    assert_refused(&with_key(77, &[]), &["some.key", "type 77"]);
    assert_refused(&with_key(7, &[2]), &["some.key", "boolean"]);
    assert_refused(&with_key(STRING, &u64::MAX.to_le_bytes()), &["some.key", "string"]);
    assert_refused(&with_key(STRING, &[&1u64.to_le_bytes()[..], &[0xFF]].concat()), &["some.key", "UTF-8"]);
    assert_refused(&with_key(ARRAY, &array(4, u64::MAX)), &["some.key", "length"]);
    assert_refused(&with_key(ARRAY, &array(8, 1 << 60)), &["some.key", "length"]);
    assert_refused(&with_key(ARRAY, &array(9, 1)), &["some.key", "arrays"]);
    assert_refused(&with_key(ARRAY, &array(77, 1)), &["some.key", "77"]);
    assert_refused(&with(|spec| spec.keys.push(spec.keys[0].clone())), &["general.architecture", "twice"]);
    assert_refused(&with(|spec| spec.keys.push((String::new(), 0, vec![0]))), &["key has 0 bytes"]);
    for alignment in [0u32, 3, 48] {
        let spec = GgufSpec::llama().u32("general.alignment", alignment);
        assert_refused(&spec.bytes(), &["general.alignment", "power of two"]);
    }
    // A valid other alignment.
    let mut spec = GgufSpec::llama().u32("general.alignment", 64);
    spec.alignment = Some(64);
    assert_eq!(outcome(&spec.bytes()), Ok(()));
}

#[test]
fn tensors_that_lie() {
    let first = |edit: fn(&mut crate::file::TensorSpec)| with(|spec| edit(&mut spec.tensors[0]));
    let name = "token_embd.weight";
    assert_refused(&first(|t| t.extents = vec![]), &[name, "0 dimensions"]);
    assert_refused(&first(|t| t.extents = vec![1; 5]), &[name, "5 dimensions"]);
    assert_refused(&first(|t| t.extents = vec![0, 6]), &[name, "dimensions"]);
    assert_refused(&first(|t| t.extents = vec![u64::MAX, 2]), &[name, "dimensions"]);
    assert_refused(&first(|t| t.extents = vec![1 << 40, 1 << 40]), &[name, "dimensions"]);
    assert_refused(&first(|t| t.extents = vec![1 << 40, 4]), &["truncated"]);
    assert_refused(&first(|t| t.kind = Q4_0), &[name, "blocks of 32"]);
    assert_refused(&first(|t| t.kind = 16), &[name, "IQ2_XXS", "not supported"]);
    assert_refused(&first(|t| t.kind = 9), &[name, "Q8_1"]);
    assert_refused(&first(|t| t.kind = 1000), &[name, "unknown type 1000"]);
    assert_refused(&first(|t| t.offset = Some(32)), &[name, "offset 32, expected 0"]);
    assert_refused(&with(|spec| spec.tensors[1].offset = Some(0)), &["output_norm.weight", "offset 0"]);
    assert_refused(&with(|spec| spec.tensors[1].offset = Some(97)), &["output_norm.weight", "offset 97"]);
    assert_refused(&with(|spec| spec.tensors[1].offset = Some(u64::MAX)), &["output_norm.weight", "offset"]);
    assert_refused(&with(|spec| spec.tensors[1].name = name.into()), &[name, "twice"]);
    assert_refused(&first(|t| t.name = "x".repeat(64)), &["64 bytes"]);
    assert_refused(&first(|t| t.name = String::new()), &["0 bytes"]);
}

#[test]
fn models_that_contradict_themselves() {
    let llama = GgufSpec::llama;
    let number = |name: &str, value: u32| llama().u32(name, value).bytes();
    assert_refused(&llama().without("general.architecture").bytes(), &["general.architecture", "missing"]);
    assert_refused(&llama().text("general.architecture", "mamba").bytes(), &["mamba", "supported: llama"]);
    assert_refused(&llama().u32("general.architecture", 1).bytes(), &["general.architecture", "string"]);
    assert_refused(&llama().without("llama.block_count").bytes(), &["llama.block_count", "missing"]);
    assert_refused(&llama().without("llama.attention.head_count").bytes(), &["llama.attention.head_count"]);
    assert_refused(&llama().text("llama.block_count", "1").bytes(), &["llama.block_count"]);
    assert_refused(&number("llama.attention.head_count", 0), &["head_count"]);
    assert_refused(&number("llama.attention.head_count", u32::MAX), &["head_count"]);
    assert_refused(&number("llama.attention.head_count_kv", 3), &["num_key_value_heads"]);
    assert_refused(&number("llama.attention.value_length", 8), &["llama.attention.value_length"]);
    assert_refused(&number("llama.rope.dimension_count", 64), &["llama.rope.dimension_count"]);
    assert_refused(&number("llama.block_count", 2), &["model.layers.1."]);
    assert_refused(&number("llama.block_count", u32::MAX), &["num_hidden_layers"]);
    assert_refused(&number("llama.embedding_length", 8), &["blk.0.attn_k.weight", "2 rows"]);
    assert_refused(&number("llama.nextn_predict_layers", 3), &["nextn_predict_layers"]);
    assert_refused(&llama().u32("llama.expert_count", 8).bytes(), &["llama.expert_count"]);
    assert_refused(&llama().text("llama.rope.scaling.type", "longrope").bytes(), &["llama.rope.scaling.type"]);
    assert_refused(&llama().f32("llama.rope.scaling.attn_factor", 2.0).bytes(), &["llama.rope.scaling.attn_factor"]);
    assert_refused(&llama().floats("rope_freqs.weight", &[1]).bytes(), &["rope_freqs.weight"]);
    assert_refused(&llama().floats("rope_freqs.weight", &[9]).bytes(), &["rope_freqs.weight"]);
    assert_refused(&llama().without("token_embd.weight").bytes(), &["token_embd.weight", "missing"]);
    assert_refused(&llama().without("blk.0.ffn_up.weight").bytes(), &["mlp.up_proj.weight", "missing"]);
    assert_refused(&llama().floats("blk.0.extra.weight", &[4]).bytes(), &["blk.0.extra.weight", "not part"]);
    assert_refused(&llama().floats("blk.0.ffn_up.weight", &[4, 9]).bytes(), &["blk.0.ffn_up.weight", "[9, 4]"]);
    assert_refused(&llama().floats("output_norm.weight", &[5]).bytes(), &["model.norm.weight", "[5]"]);
    assert_refused(&llama().floats("blk.0.ffn_gate_exps.weight", &[4, 8, 3]).bytes(), &["ffn_gate_exps", "3 experts"]);
    let integers = llama().tensor("blk.0.ffn_up.weight", &[4, 8], 26, &[0; 128]);
    assert_refused(&integers.bytes(), &["blk.0.ffn_up.weight", "I32"]);
    let nan: Vec<u8> = f32::NAN.to_le_bytes().repeat(32);
    assert_refused(&llama().tensor("blk.0.ffn_up.weight", &[4, 8], F32, &nan).bytes(), &["blk.0.ffn_up.weight", "NaN"]);
}

/// Scales of blocks that are not finite, or not permitted.
#[test]
fn blocks_with_impossible_scales() {
    for (kind, name, bytes) in
        [(2, "Q4_0", 18), (12, "Q4_K", 144), (14, "Q6_K", 210), (39, "MXFP4", 17), (40, "NVFP4", 36)]
    {
        let columns = match kind {
            2 | 39 => 32,
            40 => 64,
            _ => 256,
        };
        let spec = GgufSpec::llama().tensor("blk.0.ffn_up.weight", &[columns, 1], kind, &vec![0xFF; bytes]);
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint::open(&spec.write(dir.path(), "model.gguf")).unwrap();
        let scheme = marlin_models::QuantizationConfig::default();
        let weight = checkpoint.weight(&scheme, "model.layers.0.mlp.up_proj", 1, columns as usize, false);
        let error = weight.unwrap_err().to_string();
        assert!(error.contains("blk.0.ffn_up.weight") && error.contains("model.gguf"), "{name}: {error}");
    }
}

/// The factor of an NVFP4 tensor can lead beyond f32 though every stored number is finite.
#[test]
fn nvfp4_products_beyond_f32_are_refused() {
    let block = [&[0x7E; 4][..], &[0x77; 32]].concat();
    let spec = GgufSpec::llama().tensor("blk.0.ffn_up.weight", &[64, 1], 40, &block);
    let weight = |scale: f32| {
        let spec = spec.clone().tensor("blk.0.ffn_up.scale", &[1], F32, &scale.to_le_bytes());
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = Checkpoint::open(&spec.write(dir.path(), "model.gguf")).unwrap();
        let scheme = marlin_models::QuantizationConfig::default();
        let weight = checkpoint.weight(&scheme, "model.layers.0.mlp.up_proj", 1, 64, false);
        weight.map(|weight| weight.to_f32().unwrap()).map_err(|e| e.to_string())
    };
    assert_eq!(weight(0.37).unwrap(), [6.0 * (448.0 * 0.37); 64]);
    for scale in [3e38, 1.1e37] {
        let error = weight(scale).unwrap_err();
        assert!(error.contains("blk.0.ffn_up.weight") && error.contains("model.gguf"), "{scale}: {error}");
    }
}

/// What the fuzzer starts from is valid, so that its edits reach past the header.
#[test]
fn fuzz_seeds_are_valid() {
    let seeds = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/gguf");
    let mut models = 0;
    for seed in std::fs::read_dir(seeds).unwrap() {
        let bytes = std::fs::read(seed.unwrap().path()).unwrap();
        match outcome(&bytes) {
            Ok(()) => models += 1,
            // Files of tensors or metadata alone.
            Err(error) => assert!(error.contains("general.architecture") && error.contains("missing"), "{error}"),
        }
    }
    assert_eq!(models, 6);
}

//! Values of every block type, row orders, and where files are found.

use marlin_models::{Checkpoint, GenerationConfig, MlpConfig, ModelConfig, QuantizationConfig, Tokenizer};
use marlin_ops::Weight;
use safetensors::SafeTensors;

use crate::file::GgufSpec;
use crate::golden;

/// Names and ids of the block types.
const TYPES: [(&str, u32); 14] = [
    ("Q4_0", 2),
    ("Q4_1", 3),
    ("Q5_0", 6),
    ("Q5_1", 7),
    ("Q8_0", 8),
    ("Q2_K", 10),
    ("Q3_K", 11),
    ("Q4_K", 12),
    ("Q5_K", 13),
    ("Q6_K", 14),
    ("IQ4_NL", 20),
    ("IQ4_XS", 23),
    ("MXFP4", 39),
    ("NVFP4", 40),
];

fn weight(spec: &GgufSpec, module: &str, n: usize, k: usize) -> marlin_models::Result<Weight> {
    let dir = tempfile::tempdir().unwrap();
    let path = spec.write(dir.path(), "model.gguf");
    Checkpoint::open(&path)?.weight(&QuantizationConfig::default(), module, n, k, false)
}

/// Random bytes of every type decode to the gguf package's values: bit for bit, but for the sign of zero in FP4.
#[test]
fn blocks_decode_to_the_reference() {
    let bytes = std::fs::read(golden("types.safetensors")).unwrap();
    let goldens = SafeTensors::deserialize(&bytes).unwrap();
    for (name, id) in TYPES {
        let blocks = goldens.tensor(&format!("{name}.blocks")).unwrap();
        let values = goldens.tensor(&format!("{name}.values")).unwrap();
        let (n, k) = (values.shape()[0], values.shape()[1]);
        let spec = GgufSpec::llama().tensor("blk.0.ffn_up.weight", &[k as u64, n as u64], id, blocks.data());
        let weight = weight(&spec, "model.layers.0.mlp.up_proj", n, k).unwrap();
        assert!(weight.format_name() != "F32", "{name} is kept in blocks");
        let expected = values.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b));
        let fp4 = name.ends_with("FP4");
        for (i, (found, expected)) in weight.to_f32().unwrap().into_iter().zip(expected).enumerate() {
            let same = found.to_bits() == expected.to_bits() || (fp4 && found == 0.0 && expected == 0.0);
            assert!(same, "{name} element {i}: {found:e}, expected {expected:e}");
        }
    }
}

/// Blocks of `llama` queries are reordered as rows, without touching what they hold.
#[test]
fn interleaved_heads_become_halves() {
    let row = |r: u8| [&[0x00, 0x3C][..], &[0x88 + r; 16]].concat();
    let data: Vec<u8> = (0..4).flat_map(row).collect();
    let spec = GgufSpec::llama().u32("llama.embedding_length", 32).u32("llama.attention.key_length", 4);
    let spec = spec.without("blk.0.attn_k.weight").tensor("blk.0.attn_q.weight", &[32, 4], 2, &data);
    let values = weight(&spec, "model.layers.0.self_attn.q_proj", 4, 32).unwrap().to_f32().unwrap();
    let firsts: Vec<f32> = values.iter().step_by(32).copied().collect();
    assert_eq!(firsts, [0.0, 2.0, 1.0, 3.0]);

    let f32_rows: Vec<u8> = (0..8u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let spec =
        GgufSpec::llama().u32("llama.attention.key_length", 4).tensor("blk.0.attn_k.weight", &[2, 4], 0, &f32_rows);
    let values = weight(&spec, "model.layers.0.self_attn.k_proj", 4, 2).unwrap().to_f32().unwrap();
    assert_eq!(values, [0.0, 1.0, 4.0, 5.0, 2.0, 3.0, 6.0, 7.0]);
    // The same through the plain tensor calls.
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::open(&spec.write(dir.path(), "model.gguf")).unwrap();
    let name = "model.layers.0.self_attn.k_proj.weight";
    assert_eq!(checkpoint.tensor(name).unwrap().to_f32().unwrap(), values);
    assert_eq!(checkpoint.dense(name, &[4, 2]).unwrap().to_f32().unwrap(), values);
}

/// A fused projection holds queries, keys and values one after another.
#[test]
fn fused_projections_are_taken_apart() {
    let spec = GgufSpec::llama().without("blk.0.attn_q.weight").without("blk.0.attn_k.weight");
    let rows: Vec<u8> = (0..32u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let spec = spec.without("blk.0.attn_v.weight").tensor("blk.0.attn_qkv.weight", &[4, 8], 0, &rows);
    let firsts = |name: &str, n: usize| -> Vec<f32> {
        let weight = weight(&spec, &format!("model.layers.0.self_attn.{name}"), n, 4).unwrap();
        weight.to_f32().unwrap().into_iter().step_by(4).collect()
    };
    assert_eq!(firsts("q_proj", 4), [0.0, 4.0, 8.0, 12.0]);
    assert_eq!(firsts("k_proj", 2), [16.0, 20.0]);
    assert_eq!(firsts("v_proj", 2), [24.0, 28.0]);
}

/// Gate rows come first in each expert of a fused stack.
#[test]
fn fused_experts_are_taken_apart() {
    let rows: Vec<u8> = (0..24u32).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let spec =
        GgufSpec::llama().u32("llama.expert_count", 2).tensor("blk.0.ffn_gate_up_exps.weight", &[2, 6, 2], 0, &rows);
    let values =
        |name: &str| weight(&spec, &format!("model.layers.0.mlp.experts.1.{name}"), 3, 2).unwrap().to_f32().unwrap();
    assert_eq!(values("gate_proj"), [12.0, 13.0, 14.0, 15.0, 16.0, 17.0]);
    assert_eq!(values("up_proj"), [18.0, 19.0, 20.0, 21.0, 22.0, 23.0]);
}

#[test]
fn a_folder_with_one_file_is_that_file() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(golden("qwen3.gguf"), dir.path().join("any.gguf")).unwrap();
    let config = ModelConfig::from_dir(dir.path()).unwrap();
    assert_eq!(config.path, dir.path().join("any.gguf"));
    assert_eq!(config.eos_token_ids.len(), 2);
    assert!(config.tie_word_embeddings);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.get("model.embed_tokens.weight").unwrap().encoding, "F32");
    assert!(Tokenizer::from_dir(dir.path()).is_ok());
    assert_eq!(GenerationConfig::from_dir(dir.path()).unwrap(), GenerationConfig::default());

    std::fs::copy(golden("qwen3.gguf"), dir.path().join("other.gguf")).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("2 GGUF models") && error.contains("any.gguf"), "{error}");
    // safetensors win, however many GGUF files lie beside them.
    std::fs::write(dir.path().join("model.safetensors"), "").unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("model.safetensors") && error.contains("truncated"), "{error}");
}

#[test]
fn sampling_keys_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let spec = GgufSpec::llama().f32("general.sampling.temp", 0.6).u32("general.sampling.top_k", 20);
    let path = spec.write(dir.path(), "model.gguf");
    let config = GenerationConfig::from_dir(&path).unwrap();
    assert_eq!((config.temperature, config.top_k, config.top_p), (Some(0.6), Some(20), None));
}

/// Files of GLM-4.7-Flash without the keys of its routing: sigmoid, normalised weights of the chosen experts. They are told
/// by their vocabulary and blocks.
#[test]
fn old_files_of_glm_route_as_the_model_does() {
    let spec = |vocabulary: u64, blocks: u32| {
        let key = |name: &str| format!("deepseek2.{name}");
        let lengths =
            [("context_length", 64), ("embedding_length", 2), ("feed_forward_length", 8), ("expert_count", 4)];
        let heads = [("attention.head_count", 2), ("attention.head_count_kv", 1), ("attention.kv_lora_rank", 4)];
        let keys = [("attention.key_length", 8), ("attention.value_length", 4), ("rope.dimension_count", 4)];
        let experts = [("expert_used_count", 2), ("expert_feed_forward_length", 4), ("leading_dense_block_count", 1)];
        let spec = GgufSpec::default()
            .text("general.architecture", "deepseek2")
            .f32("deepseek2.attention.layer_norm_rms_epsilon", 1e-5)
            .u32("deepseek2.block_count", blocks)
            .floats("token_embd.weight", &[2, vocabulary]);
        let all = lengths.into_iter().chain(heads).chain(keys).chain(experts);
        all.fold(spec, |spec, (name, value)| spec.u32(&key(name), value))
    };
    let routing = |spec: &GgufSpec| {
        let dir = tempfile::tempdir().unwrap();
        let config = ModelConfig::from_dir(&spec.write(dir.path(), "model.gguf")).unwrap();
        let MlpConfig::Moe { routing, .. } = config.layers.last().unwrap().mlp else { panic!("no experts") };
        (config.architecture.model_type(), routing.norm_topk_prob)
    };
    for blocks in [47, 48] {
        assert_eq!(routing(&spec(154_880, blocks)), ("glm4_moe_lite", true));
    }
    let told = spec(154_880, 47).key("deepseek2.expert_weights_norm", 7, &[0]);
    assert_eq!(routing(&told), ("glm4_moe_lite", false));
    assert_eq!(routing(&spec(154_880, 46)), ("deepseek_v2", false));
    assert_eq!(routing(&spec(1000, 47).u32("deepseek2.expert_gating_func", 2)), ("deepseek_v3", false));
}

/// A model in two files: the first holds the metadata.
#[test]
fn split_models_are_read_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let whole = GgufSpec::llama();
    let part = |number: u32| {
        let spec = if number == 0 { whole.clone() } else { GgufSpec::default() };
        spec.u32("split.no", number).u32("split.count", 2).u32("split.tensors.count", whole.tensors.len() as u32)
    };
    let (mut first, mut second) = (part(0), part(1));
    second.tensors = first.tensors.split_off(4);
    let path = first.write(dir.path(), "m-00001-of-00002.gguf");
    let error = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(error.contains("m-00002-of-00002.gguf") && error.contains("not found"), "{error}");
    second.write(dir.path(), "m-00002-of-00002.gguf");
    for path in [path.as_path(), dir.path()] {
        assert_eq!(Checkpoint::open(path).unwrap().names().count(), whole.tensors.len());
    }
    second.u32("split.no", 5).write(dir.path(), "m-00002-of-00002.gguf");
    let error = Checkpoint::open(&path).unwrap_err().to_string();
    assert!(error.contains("split.no") && error.contains("m-00002"), "{error}");
    let error = Checkpoint::open(&dir.path().join("m-00002-of-00002.gguf")).unwrap_err().to_string();
    assert!(error.contains("split.no"), "{error}");
}

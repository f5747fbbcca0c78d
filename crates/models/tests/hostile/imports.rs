//! Damaged checkpoints of other projects.

use marlin_models::{Checkpoint, ModelConfig, QuantizationConfig};
use marlin_ops::Weight;

use super::*;

/// A tensor of a file to be written.
#[derive(Clone)]
struct Stored {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    data: Vec<u8>,
}

fn tensor(name: &str, dtype: &'static str, shape: &[usize], data: Vec<u8>) -> Stored {
    Stored { name: format!("m.{name}"), dtype, shape: shape.to_vec(), data }
}

fn halves(count: usize, bits: u16) -> Vec<u8> {
    (0..count).flat_map(|_| bits.to_le_bytes()).collect()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn words(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// Module `m`, `[n, k]`, or the message of what is wrong with it.
fn read(config: &Value, tensors: &[Stored], n: usize, k: usize) -> Result<Weight, String> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for Stored { name, dtype, shape, data: bytes } in tensors {
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [data.len(), data.len() + bytes.len()]});
        header.insert(name.clone(), entry);
        data.extend(bytes);
    }
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "model.safetensors", &safetensors(&Value::Object(header).to_string(), &data));
    let config = QuantizationConfig::from_config(Path::new("config.json"), config).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    checkpoint.weight(&config, "m", n, k, false).map_err(|error| {
        let message = error.to_string();
        assert_names(&message, &[dir.path().to_str().unwrap(), "`m"]);
        message
    })
}

/// Each change of valid tensors gives an error with these parts; `None` removes the tensor.
fn refuses(config: Value, valid: &[Stored], n: usize, k: usize, changes: &[(&str, Option<Stored>, &[&str])]) {
    let config = if config.get("quantization").is_some() { config } else { json!({"quantization_config": config}) };
    read(&config, valid, n, k).unwrap();
    for (name, change, parts) in changes {
        let name = format!("m.{name}");
        let mut tensors: Vec<Stored> = valid.iter().filter(|t| t.name != name).cloned().collect();
        tensors.extend(change.clone());
        match read(&config, &tensors, n, k) {
            Ok(_) => panic!("{name} {parts:?} was accepted"),
            Err(message) => assert_names(&message, parts),
        }
    }
}

#[test]
fn gptq() {
    let (n, k) = (16, 64);
    let valid = [
        tensor("qweight", "I32", &[8, 16], vec![0x77; 512]),
        tensor("qzeros", "I32", &[2, 2], vec![0x77; 16]),
        tensor("scales", "F16", &[2, 16], halves(32, 0x2C00)),
        tensor("g_idx", "I32", &[64], words(&[vec![0; 32], vec![1; 32]].concat())),
    ];
    let index = |at: usize, value: i32| {
        let mut index = [vec![0; 32], vec![1; 32]].concat();
        index[at] = value;
        Some(tensor("g_idx", "I32", &[64], words(&index)))
    };
    let mut nan = halves(32, 0x2C00);
    nan[11] = 0x7E;
    refuses(
        json!({"quant_method": "gptq", "bits": 4, "group_size": 32}),
        &valid,
        n,
        k,
        &[
            ("qzeros", None, &["`m.qzeros` is missing"]),
            ("scales", None, &["`m.scales` is missing"]),
            (
                "qweight",
                Some(tensor("qweight", "I32", &[7, 16], vec![0; 448])),
                &["`m.qweight` has shape [7, 16]", "[16, 64]"],
            ),
            ("qweight", Some(tensor("qweight", "F32", &[8, 16], vec![0; 512])), &["`m.qweight` has dtype F32", "I32"]),
            ("qweight", Some(tensor("qweight", "I32", &[10, 16], vec![0; 640])), &["`m.qweight`", "5-bit", "gptq_p"]),
            ("qzeros", Some(tensor("qzeros", "I32", &[2, 3], vec![0; 24])), &["`m.qzeros` has shape [2, 3]", "[2, 2]"]),
            ("scales", Some(tensor("scales", "F16", &[2, 16], nan)), &["`m.scales` holds NaN at element 5"]),
            ("scales", Some(tensor("scales", "F16", &[16, 2], halves(32, 0x2C00))), &["`m.scales` has shape [16, 2]"]),
            ("scales", Some(tensor("scales", "F16", &[3, 16], halves(48, 0x2C00))), &["`m.scales` has 3 groups"]),
            ("scales", Some(tensor("scales", "F16", &[0, 16], vec![])), &["`m.scales` has shape [0, 16]"]),
            ("g_idx", index(40, 2), &["`m.g_idx` puts channel 40 into group 2, there are 2"]),
            ("g_idx", index(3, -1), &["`m.g_idx` puts channel 3 into group -1"]),
            ("g_idx", index(0, i32::MIN), &["`m.g_idx` puts channel 0"]),
            ("g_idx", Some(tensor("g_idx", "I32", &[63], vec![0; 252])), &["`m.g_idx` has shape [63]"]),
        ],
    );
    let marlin = [tensor("B", "I32", &[8, 512], vec![0x31; 16384]), tensor("s", "F16", &[1, 256], halves(256, 0x2C00))];
    refuses(
        json!({"quant_method": "gptq", "checkpoint_format": "marlin"}),
        &marlin,
        256,
        128,
        &[
            ("B", Some(tensor("B", "I32", &[8, 511], vec![0; 16352])), &["`m.B` has shape [8, 511]"]),
            ("s", Some(tensor("s", "F16", &[3, 256], halves(768, 0))), &["`m.s` has 3 groups"]),
        ],
    );
}

/// Format and order of a weight `[16, k]` of these codes, `[k]` a row, whose values are checked: `(code - middle)` times the scale
/// of the channel's group.
fn grouped(
    config: &Value,
    tensors: &[Stored],
    code: impl Fn(usize, usize) -> i32,
    groups: &[i32],
) -> (&'static str, Option<Vec<u32>>) {
    let weight = read(config, tensors, 16, groups.len()).unwrap();
    for (at, value) in weight.to_f32().unwrap().into_iter().enumerate() {
        let (n, k) = (at / groups.len(), at % groups.len());
        assert_eq!(value, code(n, k) as f32 * SCALES[groups[k] as usize], "{n} {k}");
    }
    (weight.format_name(), weight.input_order.map(|order| order.channels().to_vec()))
}

const SCALES: [f32; 2] = [1.0 / 16.0, 0.25];

/// The bits of [`SCALES`], each `count` times.
fn scales(count: usize) -> Vec<u8> {
    [halves(count, 0x2C00), halves(count, 0x3400)].concat()
}

/// Channels of a group need not be neighbours, but groups of other lengths than the config says have no native form.
#[test]
fn groups_of_gptq() {
    for (bits, zeros, format) in [(4, 0x77, "int4_s4"), (8, 0x7F, "int8")] {
        let per_word = 32 / bits;
        let config = json!({"quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": 64}});
        let weight = |group: &dyn Fn(usize) -> i32| {
            let groups: Vec<i32> = (0..96).map(group).collect();
            let rows = 96 / per_word;
            let codes: Vec<i32> = (0..rows as i32 * 16).map(|at| at.wrapping_mul(0x1234_5677) ^ 0x0765_4321).collect();
            let stored = [
                tensor("qweight", "I32", &[rows, 16], words(&codes)),
                tensor("qzeros", "I32", &[2, 16 / per_word], vec![zeros; 8 * 16 / per_word]),
                tensor("scales", "F16", &[2, 16], scales(16)),
                tensor("g_idx", "I32", &[96], words(&groups)),
            ];
            let field =
                |n: usize, k: usize| codes[k / per_word * 16 + n] >> (bits * (k % per_word)) & ((1 << bits) - 1);
            grouped(&config, &stored, |n, k| field(n, k) - (1 << (bits - 1)), &groups)
        };
        assert_eq!(weight(&|k| (k / 64) as i32), (format, None));
        // Two of three channels in the first group; the last one is shorter.
        let of_group = |last: bool| (0..96u32).filter(move |k| (k % 3 == 2) == last);
        let sorted: Vec<u32> = of_group(false).chain(of_group(true)).collect();
        assert_eq!(weight(&|k| i32::from(k % 3 == 2)), (format, Some(sorted)));
        assert_eq!(weight(&|k| i32::from(k > 64)), ("F16", None));
    }
}

#[test]
fn groups_of_compressed_tensors() {
    let arguments = json!({"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 32});
    let group = json!({"targets": ["Linear"], "weights": arguments, "format": "pack-quantized"});
    let config = json!({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": group}}});
    let codes: Vec<i32> = (0..16 * 8i32).map(|at| at.wrapping_mul(0x1234_5677) ^ 0x0765_4321).collect();
    let groups: Vec<i32> = (0..64).map(|k| 1 - k % 2).collect();
    let stored = [
        tensor("weight_packed", "I32", &[16, 8], words(&codes)),
        tensor("weight_scale", "F16", &[16, 2], (0..16).flat_map(|_| scales(1)).collect()),
        tensor("weight_shape", "I64", &[2], [16i64, 64].iter().flat_map(|v| v.to_le_bytes()).collect()),
        tensor("weight_g_idx", "I32", &[64], words(&groups)),
    ];
    let code = |n: usize, k: usize| (codes[n * 8 + k / 8] >> (4 * (k % 8)) & 15) - 8;
    let sorted: Vec<u32> = (1..64).step_by(2).chain((0..64).step_by(2)).collect();
    assert_eq!(grouped(&config, &stored, code, &groups), ("int4_s4", Some(sorted)));
}

#[test]
fn awq() {
    let valid = [
        tensor("qweight", "I32", &[64, 2], vec![0x77; 512]),
        tensor("qzeros", "I32", &[2, 2], vec![0x77; 16]),
        tensor("scales", "F16", &[2, 16], halves(32, 0x2C00)),
    ];
    refuses(
        json!({"quant_method": "awq", "bits": 4, "group_size": 32}),
        &valid,
        16,
        64,
        &[
            ("scales", None, &["`m.scales` is missing"]),
            (
                "qweight",
                Some(tensor("qweight", "I32", &[64, 3], vec![0; 768])),
                &["`m.qweight` has shape [64, 3]", "gemv"],
            ),
            ("qzeros", Some(tensor("qzeros", "I32", &[1, 2], vec![0; 8])), &["`m.qzeros` has shape [1, 2]"]),
            ("scales", Some(tensor("scales", "F16", &[3, 16], halves(48, 0))), &["`m.scales` has 3 groups"]),
            ("scales", Some(tensor("scales", "F16", &[2, 16], halves(32, 0x7C00))), &["`m.scales` holds inf"]),
        ],
    );
}

#[test]
fn compressed_tensors() {
    let config = |bits: u32| {
        let weights =
            json!({"num_bits": bits, "type": "int", "symmetric": false, "strategy": "group", "group_size": 32});
        json!({"quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}})
    };
    let shape = |n: i64, k: i64| Some(tensor("weight_shape", "I64", &[2], [n.to_le_bytes(), k.to_le_bytes()].concat()));
    let valid = [
        tensor("weight_packed", "I32", &[16, 8], vec![0x77; 512]),
        tensor("weight_scale", "BF16", &[16, 2], halves(32, 0x3C00)),
        tensor("weight_zero_point", "I32", &[2, 2], vec![0x77; 16]),
        shape(16, 64).unwrap(),
    ];
    refuses(
        config(4),
        &valid,
        16,
        64,
        &[
            ("weight_scale", None, &["`m.weight_scale` is missing"]),
            ("weight_shape", shape(64, 16), &["`m.weight_shape` holds [64, 16]", "[16, 64]"]),
            ("weight_shape", shape(-1, 64), &["`m.weight_shape` holds [-1, 64]"]),
            (
                "weight_packed",
                Some(tensor("weight_packed", "I32", &[16, 7], vec![0; 448])),
                &["`m.weight_packed` has shape [16, 7]"],
            ),
            (
                "weight_zero_point",
                Some(tensor("weight_zero_point", "I32", &[3, 2], vec![0; 24])),
                &["`m.weight_zero_point` has shape"],
            ),
            (
                "weight_scale",
                Some(tensor("weight_scale", "BF16", &[16, 3], halves(48, 0))),
                &["`m.weight_scale` has 3 groups"],
            ),
            (
                "weight_scale",
                Some(tensor("weight_scale", "BF16", &[16, 2], halves(32, 0x7FC0))),
                &["`m.weight_scale` holds NaN"],
            ),
            (
                "weight_g_idx",
                Some(tensor("weight_g_idx", "I32", &[64], words(&[7; 64]))),
                &["`m.weight_g_idx` puts channel 0"],
            ),
        ],
    );
    let nvfp4 = [
        tensor("weight_packed", "U8", &[4, 32], vec![0x31; 128]),
        tensor("weight_scale", "F8_E4M3", &[4, 4], vec![0x40; 16]),
        tensor("weight_global_scale", "F32", &[1], floats(&[672.0])),
    ];
    refuses(
        config(4),
        &nvfp4,
        4,
        64,
        &[
            ("weight_global_scale", None, &["`m.weight_global_scale` is missing"]),
            (
                "weight_global_scale",
                Some(tensor("weight_global_scale", "F32", &[1], floats(&[0.0]))),
                &["tensor scale 0 is not finite"],
            ),
            (
                "weight_global_scale",
                Some(tensor("weight_global_scale", "F32", &[2], floats(&[1.0, 2.0]))),
                &["has shape [2]"],
            ),
            (
                "weight_scale",
                Some(tensor("weight_scale", "F8_E4M3", &[4, 4], vec![0x7F; 16])),
                &["not a valid E4M3 scale"],
            ),
            (
                "weight_scale",
                Some(tensor("weight_scale", "F8_E4M3", &[4, 4], vec![0x85; 16])),
                &["not a valid E4M3 scale"],
            ),
        ],
    );
    let other = json!({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"g": {"targets": ["re:.*attn"], "weights": {"num_bits": 4}}}}});
    assert_names(&read(&other, &valid, 16, 64).unwrap_err(), &["`m.weight_packed`", "no target of config_groups"]);
}

#[test]
fn fp8() {
    let valid = [
        tensor("weight", "F8_E4M3", &[192, 64], vec![0x31; 12288]),
        tensor("weight_scale_inv", "F32", &[2, 1], floats(&[0.5, 0.25])),
    ];
    let mut nan = vec![0x31; 12288];
    nan[700] = 0xFF;
    refuses(
        json!({"quant_method": "fp8", "weight_block_size": [128, 128]}),
        &valid,
        192,
        64,
        &[
            ("weight_scale_inv", None, &["`m.weight_scale` is missing"]),
            (
                "weight_scale_inv",
                Some(tensor("weight_scale_inv", "F32", &[2, 2], floats(&[1.0; 4]))),
                &["`m.weight_scale_inv` has shape [2, 2]", "no blocks"],
            ),
            (
                "weight_scale_inv",
                Some(tensor("weight_scale_inv", "F32", &[0, 1], vec![])),
                &["`m.weight_scale_inv` has shape [0, 1]"],
            ),
            (
                "weight_scale_inv",
                Some(tensor("weight_scale_inv", "F32", &[2, 1], floats(&[1.0, f32::NAN]))),
                &["holds NaN at element 1"],
            ),
            (
                "weight_scale_inv",
                Some(tensor("weight_scale_inv", "F8_E8M0", &[2, 1], vec![127, 255])),
                &["holds NaN (255) at element 1"],
            ),
            ("weight", Some(tensor("weight", "F8_E4M3", &[192, 64], nan)), &["`m.weight` holds NaN at element 700"]),
            (
                "weight",
                Some(tensor("weight", "F8_E4M3", &[64, 192], vec![0; 12288])),
                &["`m.weight` has shape [64, 192]"],
            ),
        ],
    );
}

#[test]
fn mlx() {
    let valid = [
        tensor("weight", "U32", &[4, 8], vec![0x31; 128]),
        tensor("scales", "F16", &[4, 2], halves(8, 0x2C00)),
        tensor("biases", "F16", &[4, 2], halves(8, 0x2C00)),
    ];
    refuses(
        json!({"quantization": {"group_size": 32, "bits": 4}}),
        &valid,
        4,
        64,
        &[
            ("biases", None, &["`m.scales` has dtype F16", "without `biases`"]),
            ("scales", None, &["`m.scales` is missing"]),
            ("scales", Some(tensor("scales", "F16", &[4, 3], halves(12, 0))), &["`m.scales` has shape [4, 3]"]),
            ("scales", Some(tensor("scales", "F16", &[4, 0], vec![])), &["`m.scales` has shape [4, 0]"]),
            ("biases", Some(tensor("biases", "F16", &[4, 1], halves(4, 0))), &["`m.biases` has shape [4, 1]"]),
            ("biases", Some(tensor("biases", "F16", &[4, 2], halves(8, 0xFC00))), &["`m.biases` holds -inf"]),
            ("weight", Some(tensor("weight", "U32", &[4, 7], vec![0; 112])), &["`m.weight` has shape [4, 7]"]),
        ],
    );
    let mx = [tensor("weight", "U32", &[4, 8], vec![0x31; 128]), tensor("scales", "U8", &[4, 2], vec![120; 8])];
    refuses(
        json!({"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}),
        &mx,
        4,
        64,
        &[
            ("scales", Some(tensor("scales", "U8", &[4, 2], vec![255; 8])), &["m", "scale"]),
            ("scales", Some(tensor("scales", "U8", &[4, 1], vec![120; 4])), &["`m.weight`", "no known mode"]),
        ],
    );
}

#[test]
fn bitsandbytes() {
    let (n, k) = (4, 64);
    let state = |text: &str| {
        Some(tensor("weight.quant_state.bitsandbytes__nf4", "U8", &[text.len()], text.as_bytes().to_vec()))
    };
    let good = r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [4, 64]}"#;
    let map: Vec<f32> = (0..16).map(|i| i as f32 / 8.0 - 1.0).collect();
    let valid = [
        tensor("weight", "U8", &[128, 1], vec![0x31; 128]),
        tensor("weight.absmax", "F32", &[4], floats(&[0.5; 4])),
        tensor("weight.quant_map", "F32", &[16], floats(&map)),
        state(good).unwrap(),
    ];
    let state_name = "weight.quant_state.bitsandbytes__nf4";
    refuses(
        json!({"quant_method": "bitsandbytes", "load_in_4bit": true}),
        &valid,
        n,
        k,
        &[
            (state_name, None, &["`m.weight`", "quant_state.bitsandbytes__nf4"]),
            (state_name, state("{"), &["does not hold JSON"]),
            (state_name, state(r#"{"blocksize": 0, "dtype": "float16"}"#), &["says blocksize 0"]),
            (state_name, state(r#"{"blocksize": 64, "dtype": "int8"}"#), &["says dtype \"int8\""]),
            (
                state_name,
                state(r#"{"blocksize": 64, "dtype": "float16", "shape": [64, 4]}"#),
                &["says shape [64,4]", "[4, 64]"],
            ),
            (
                state_name,
                state(r#"{"blocksize": 32, "dtype": "float16"}"#),
                &["`m.weight.absmax` has shape [4]", "[8]"],
            ),
            (
                "weight",
                Some(tensor("weight", "U8", &[127, 1], vec![0; 127])),
                &["`m.weight` has shape [127, 1]", "128 bytes"],
            ),
            ("weight.absmax", None, &["`m.weight.absmax` is missing"]),
            ("weight.absmax", Some(tensor("weight.absmax", "F32", &[4], floats(&[f32::NAN; 4]))), &["holds NaN"]),
            (
                "weight.quant_map",
                Some(tensor("weight.quant_map", "F32", &[15], floats(&[0.0; 15]))),
                &["`m.weight.quant_map`"],
            ),
            (
                "weight.nested_absmax",
                Some(tensor("weight.nested_absmax", "F32", &[1], floats(&[1.0]))),
                &["says nested_"],
            ),
        ],
    );
    let int8 = [tensor("weight", "I8", &[4, 64], vec![3; 256]), tensor("SCB", "F32", &[4], floats(&[1.0; 4]))];
    refuses(
        json!({"quant_method": "bitsandbytes", "load_in_8bit": true}),
        &int8,
        n,
        k,
        &[
            ("SCB", None, &["`m.SCB` is missing"]),
            ("weight_format", Some(tensor("weight_format", "U8", &[], vec![1])), &["`m.weight_format` is [1]"]),
        ],
    );
}

#[test]
fn configs_of_other_methods() {
    let refused = |config: Value, parts: &[&str]| {
        let config = json!({"quantization_config": config});
        let message = QuantizationConfig::from_config(Path::new("dir/config.json"), &config).unwrap_err().to_string();
        assert_names(&message, &["dir/config.json"]);
        assert_names(&message, parts);
    };
    refused(json!({"quant_method": "gptq", "bits": 16}), &["quantization_config.bits` is 16"]);
    refused(json!({"quant_method": "gptq", "group_size": 0}), &["quantization_config.group_size` is 0"]);
    refused(
        json!({"quant_method": "gptq", "checkpoint_format": "bitblas"}),
        &["checkpoint_format` `bitblas` is not supported"],
    );
    refused(json!({"quant_method": "awq", "version": "gemv_fast"}), &["version` `gemv_fast` is not supported"]);
    refused(json!({"quant_method": "awq", "bits": 3}), &["bits` is 3, AWQ has 4"]);
    refused(json!({"quant_method": "compressed-tensors"}), &["config_groups` is missing"]);
    refused(
        json!({"quant_method": "compressed-tensors", "format": "marlin-24"}),
        &["format` `marlin-24` is not supported"],
    );
    let bits = json!({"a": {"targets": ["Linear"], "weights": {"num_bits": 9}}});
    refused(
        json!({"quant_method": "compressed-tensors", "config_groups": bits}),
        &["config_groups.a.weights.num_bits` is 9"],
    );
    let pattern = json!({"a": {"targets": ["re:("], "weights": {"num_bits": 4}}});
    refused(
        json!({"quant_method": "compressed-tensors", "config_groups": pattern}),
        &["config_groups.a.targets` holds `re:(`"],
    );
    refused(json!({"quant_method": "fp8", "weight_block_size": [128]}), &["weight_block_size` is not two"]);
    refused(json!({"quant_method": "fp8", "weight_block_size": [0, 128]}), &["weight_block_size` is not two"]);
    refused(json!({"quant_method": "fp8", "fmt": "e4m3fnuz"}), &["fmt` `e4m3fnuz` is not supported"]);
    let mlx = json!({"quantization": {"group_size": 64, "bits": 4, "mode": "sinq"}});
    let message = QuantizationConfig::from_config(Path::new("config.json"), &mlx).unwrap_err().to_string();
    assert_names(&message, &["quantization.mode` `sinq` is not supported"]);
}

/// AutoGPTQ once wrote its description into a file of its own.
#[test]
fn quantize_config_is_found_beside_config() {
    let dir = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/qwen3-base/config.json");
    std::fs::copy(golden, dir.path().join("config.json")).unwrap();
    assert_eq!(ModelConfig::from_dir(dir.path()).unwrap().quantization.method(), None);
    write(dir.path(), "quantize_config.json", br#"{"bits": 4, "group_size": 128, "desc_act": false}"#);
    assert_eq!(ModelConfig::from_dir(dir.path()).unwrap().quantization.method(), Some("gptq"));
    write(dir.path(), "quantize_config.json", br#"{"bits": 4, "group_size": "x"}"#);
    let message = ModelConfig::from_dir(dir.path()).unwrap_err().to_string();
    assert_names(&message, &["quantize_config.json", "group_size"]);
}

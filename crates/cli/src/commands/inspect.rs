//! `marlin inspect`: what a model folder holds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use marlin_formats::DType;
use marlin_models::{AttentionConfig, Checkpoint, LinearModule, MlpConfig, ModelConfig, ModuleKind};
use serde::Serialize;

use crate::bundled;

/// Arguments of `marlin inspect`.
#[derive(Args)]
pub struct InspectArgs {
    /// Model folder or GGUF file
    dir: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Linear layers stored in one format.
#[derive(Default, Serialize)]
struct FormatUse {
    modules: usize,
    weights: u64,
    bytes: u64,
    bits_per_weight: f64,
}

#[derive(Serialize)]
struct TensorLine {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
}

#[derive(Serialize)]
struct Inspection {
    model: String,
    architecture: &'static str,
    layers: usize,
    hidden_size: usize,
    vocab_size: usize,
    attention: String,
    experts: Option<String>,
    max_position_embeddings: usize,
    parameters: u64,
    /// Per format or dtype, embeddings and head included.
    formats: BTreeMap<String, FormatUse>,
    /// Of the quantized linear layers together; null when none is.
    quantized_bits_per_weight: Option<f64>,
    /// Of the whole file.
    bits_per_weight: f64,
    weights_bytes: u64,
    /// KV cache in 16-bit values.
    kv_cache_bytes_per_token: usize,
    tensors: Vec<TensorLine>,
}

/// Prints the inspection.
pub fn run(args: InspectArgs) -> Result<()> {
    let dir = bundled::model_dir(Some(&args.dir))?;
    let config = ModelConfig::from_dir(&dir)?;
    let checkpoint = Checkpoint::open(&dir)?;
    let inspection = inspect(&args.dir.display().to_string(), &config, &checkpoint)?;
    if args.json {
        print_line!("{}", serde_json::to_string(&inspection)?);
    } else {
        print_text(&inspection)?;
    }
    Ok(())
}

fn inspect(model: &str, config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Inspection> {
    let mut formats: BTreeMap<String, FormatUse> = BTreeMap::new();
    let (mut quantized_weights, mut quantized_bytes) = (0u64, 0u64);
    let mut parameters: u64 = config.vector_tensors().iter().map(|v| v.len as u64).sum();
    for module in config.linear_modules() {
        let Stored { format: name, bytes, quantized } = stored(config, checkpoint, &module)?;
        let weights = (module.out_features * module.in_features) as u64;
        parameters += weights;
        if quantized {
            quantized_weights += weights;
            quantized_bytes += bytes;
        }
        let entry = formats.entry(name).or_default();
        entry.modules += 1;
        entry.weights += weights;
        entry.bytes += bytes;
    }
    for entry in formats.values_mut() {
        entry.bits_per_weight = 8.0 * entry.bytes as f64 / entry.weights as f64;
    }
    let tensors = checkpoint.names().filter_map(|name| {
        let info = checkpoint.get(name)?;
        Some(TensorLine { name: name.to_owned(), dtype: info.encoding, shape: info.shape.to_vec() })
    });
    Ok(Inspection {
        model: model.to_owned(),
        architecture: config.architecture.model_type(),
        layers: config.num_layers,
        hidden_size: config.hidden_size,
        vocab_size: config.vocab_size,
        attention: attention_text(&config.attention),
        experts: experts_text(config),
        max_position_embeddings: config.max_position_embeddings,
        parameters,
        formats,
        quantized_bits_per_weight: (quantized_weights > 0)
            .then(|| 8.0 * quantized_bytes as f64 / quantized_weights as f64),
        bits_per_weight: 8.0 * checkpoint.total_bytes() as f64 / parameters as f64,
        weights_bytes: checkpoint.total_bytes(),
        kv_cache_bytes_per_token: config.num_layers * 2 * cache_values(&config.attention),
        tensors: tensors.collect(),
    })
}

/// How a linear module is stored.
struct Stored {
    /// Format and group, or dtype.
    format: String,
    /// Its share of the tensors that hold it.
    bytes: u64,
    quantized: bool,
}

/// Finds a module's tensors: its own, or for a routed expert those of all experts, native or dense with fused gate and up.
fn stored(config: &ModelConfig, checkpoint: &Checkpoint, module: &LinearModule) -> Result<Stored> {
    if let Some((name, bytes)) = checkpoint.gguf_encoding(&module.name, module.out_features, module.in_features) {
        let quantized = !matches!(name, "F32" | "F16" | "BF16");
        return Ok(Stored { format: name.to_lowercase(), bytes, quantized });
    }
    let stack = module.name.split_once(".experts.").and_then(|(prefix, rest)| {
        let (_, projection) = rest.split_once('.')?;
        Some((format!("{prefix}.experts"), projection))
    });
    let native = |name: &str| checkpoint.contains(&format!("{name}.mm.q"));
    let stacked = stack.as_ref().map(|(experts, projection)| format!("{experts}.{projection}"));
    let holder = [Some(&module.name), stacked.as_ref()].into_iter().flatten().find(|name| native(name));
    if let Some(holder) = holder {
        let scheme = config.quantization.scheme(holder, module.out_features, module.in_features)?;
        let tensors =
            checkpoint.module_tensors(&format!("{holder}.mm")).map(|(_, info)| info.bytes as u64).sum::<u64>();
        let experts = match checkpoint.get(&format!("{holder}.mm.q")) {
            Some(info) if *holder != module.name => info.shape.first().map_or(1, |&experts| experts.max(1) as u64),
            _ => 1,
        };
        let format = format!("{} group {}", scheme.format.name(), scheme.group_size);
        return Ok(Stored { format, bytes: tensors / experts, quantized: true });
    }
    if let Some(imported) = imported(config, checkpoint, module) {
        return Ok(imported);
    }
    let own = format!("{}.weight", module.name);
    let tensor = match stack {
        Some((experts, "down_proj")) if !checkpoint.contains(&own) => format!("{experts}.down_proj"),
        Some((experts, _)) if !checkpoint.contains(&own) => format!("{experts}.gate_up_proj"),
        _ => own,
    };
    let dtype = checkpoint.tensor(&tensor)?.dtype();
    let bytes = (module.out_features * module.in_features * dtype.size_in_bytes()) as u64;
    Ok(Stored { format: dtype.name().to_lowercase(), bytes, quantized: false })
}

/// A module in another project's form: its own tensors, or its share of a stack of experts.
fn imported(config: &ModelConfig, checkpoint: &Checkpoint, module: &LinearModule) -> Option<Stored> {
    let method = config.quantization.method()?;
    if let Some(stored) = block_experts(checkpoint, module).filter(|_| method == "mxfp4") {
        return Some(stored);
    }
    let stack = module.name.split_once(".experts.").and_then(|(mlp, rest)| {
        let (_, projection) = rest.split_once('.')?;
        Some(format!("{mlp}.switch_mlp.{projection}"))
    });
    let own = checkpoint.has_module(&module.name);
    let holder = if own { module.name.clone() } else { stack.filter(|stack| checkpoint.has_module(stack))? };
    let float = |dtype| matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    if own && checkpoint.get(&format!("{holder}.weight")).is_some_and(|info| float(info.dtype)) {
        return None;
    }
    let experts = match (&module.kind, own) {
        (ModuleKind::Expert, false) => config.layers.get(module.layer?).map_or(1, |layer| match layer.mlp {
            MlpConfig::Moe { experts, .. } => experts as u64,
            MlpConfig::Dense { .. } => 1,
        }),
        _ => 1,
    };
    let bias = format!("{holder}.bias");
    let sizes =
        || checkpoint.module_tensors(&holder).filter(|(name, _)| *name != bias).map(|(_, info)| info.bytes as u64);
    // The codes are the largest tensor by far.
    let weights = (module.out_features * module.in_features) as u64 * experts;
    let bits = (8.0 * sizes().max().unwrap_or(0) as f64 / weights as f64).round();
    Some(Stored { format: format!("{method} {bits}-bit"), bytes: sizes().sum::<u64>() / experts, quantized: true })
}

/// A routed expert in the stacks of MXFP4 blocks, which hold gate and up together.
fn block_experts(checkpoint: &Checkpoint, module: &LinearModule) -> Option<Stored> {
    let (mlp, rest) = module.name.split_once(".experts.")?;
    let (tensor, projections) = match rest.split_once('.')?.1 {
        "down_proj" => ("down_proj", 1),
        _ => ("gate_up_proj", 2),
    };
    let part = |suffix: &str| checkpoint.get(&format!("{mlp}.experts.{tensor}_{suffix}"));
    let (blocks, scales) = (part("blocks")?, part("scales")?);
    let share = projections * blocks.shape.first().map_or(1, |&experts| experts.max(1) as u64);
    let bytes = (blocks.bytes + scales.bytes) as u64 / share;
    Some(Stored { format: "mxfp4 4-bit".to_owned(), bytes, quantized: true })
}

/// Cached values per token and layer.
fn cache_values(attention: &AttentionConfig) -> usize {
    match *attention {
        AttentionConfig::Gqa { kv_heads, head_dim, .. } => 2 * kv_heads * head_dim,
        AttentionConfig::Mla { kv_lora_rank, qk_rope_head_dim, .. } => kv_lora_rank + qk_rope_head_dim,
    }
}

fn attention_text(attention: &AttentionConfig) -> String {
    match *attention {
        AttentionConfig::Gqa { heads, kv_heads, head_dim, .. } => {
            format!("{heads} heads, {kv_heads} key/value heads of {head_dim}")
        }
        AttentionConfig::Mla { heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, .. } => {
            format!(
                "latent, {heads} heads of {qk_nope_head_dim} + {qk_rope_head_dim} (values {v_head_dim}), rank {kv_lora_rank}"
            )
        }
    }
}

/// The first mixture-of-experts layer in words.
fn experts_text(config: &ModelConfig) -> Option<String> {
    let layers = config.layers.iter().filter(|l| matches!(l.mlp, MlpConfig::Moe { .. })).count();
    config.layers.iter().find_map(|layer| match &layer.mlp {
        MlpConfig::Moe { experts, intermediate, routing, shared_intermediate, .. } => {
            let shared = shared_intermediate.map_or(String::new(), |width| format!(" + shared {width}"));
            Some(format!("{experts} of width {intermediate}{shared}, {} per token, in {layers} layers", routing.top_k))
        }
        MlpConfig::Dense { .. } => None,
    })
}

fn print_text(inspection: &Inspection) -> Result<()> {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    print_line!("model         {}", inspection.model);
    print_line!("architecture  {}", inspection.architecture);
    print_line!("layers        {} of width {}", inspection.layers, inspection.hidden_size);
    print_line!("attention     {}", inspection.attention);
    if let Some(experts) = &inspection.experts {
        print_line!("experts       {experts}");
    }
    print_line!("vocabulary    {}", inspection.vocab_size);
    print_line!("context       {} tokens", inspection.max_position_embeddings);
    print_line!("parameters    {:.1} M", inspection.parameters as f64 / 1e6);
    print_line!(
        "memory        {:.1} MB weights ({:.3} bits per parameter), {:.1} KB of 16-bit cache per token",
        megabytes(inspection.weights_bytes),
        inspection.bits_per_weight,
        inspection.kv_cache_bytes_per_token as f64 / 1e3
    );
    print_line!(
        "\n{:<24} {:>8} {:>12} {:>12} {:>16}",
        "format",
        "modules",
        "weights (M)",
        "size (MB)",
        "bits per weight"
    );
    for (name, format) in &inspection.formats {
        print_line!(
            "{name:<24} {:>8} {:>12.2} {:>12.2} {:>16.3}",
            format.modules,
            format.weights as f64 / 1e6,
            megabytes(format.bytes),
            format.bits_per_weight
        );
    }
    print_line!("\n{} tensors", inspection.tensors.len());
    for tensor in &inspection.tensors {
        print_line!("{:<72} {:<8} {:?}", tensor.name, tensor.dtype, tensor.shape);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use marlin_models::{QuantizationConfig, SynthOptions, Writer, synth};
    use marlin_ops::{Weight, WeightData};

    use super::*;

    /// Codes with everything beside them: GPTQ's scales, zero points and group index; MLX's scales and offsets.
    #[test]
    fn imported_modules_are_counted_with_their_companions() {
        let models = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/imports/models");
        // A bf16 scale and offset per 32 weights; GPTQ's 16 + 4 bits, and 32 a channel for the group index. 14 projections,
        // or in 2 layers 4 and 12 of experts, and the two of the vocabulary.
        for (name, format, modules, bits) in
            [("mlx", "mlx 4-bit", 16, 5.0), ("mlx_moe", "mlx 4-bit", 34, 5.0), ("gptq", "gptq 4-bit", 14, 5.125)]
        {
            let dir = models.join(name);
            let (config, checkpoint) = (ModelConfig::from_dir(&dir).unwrap(), Checkpoint::open(&dir).unwrap());
            let inspection = inspect(name, &config, &checkpoint).unwrap();
            let found = &inspection.formats[format];
            assert_eq!(found.modules, modules, "{name}");
            assert!((found.bits_per_weight - bits).abs() < 1e-9, "{name} {}", found.bits_per_weight);
            assert_eq!(inspection.quantized_bits_per_weight, Some(found.bits_per_weight), "{name}");
        }
    }

    /// The blocks of a GGUF file, written natively: as many bytes as their formats say, both levels of scales among them.
    #[test]
    fn every_native_tensor_is_counted() {
        let root = tempfile::tempdir().unwrap();
        let output = root.path().join("out");
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tests/golden_gguf/blocks.gguf");
        let (config, checkpoint) = (ModelConfig::from_dir(&file).unwrap(), Checkpoint::open(&file).unwrap());
        let mut writer = Writer::create(&output).unwrap();
        let mut schemes = BTreeMap::new();
        let mut plain = Vec::new();
        let mut bits: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        for module in config.linear_modules() {
            let (n, k) = (module.out_features, module.in_features);
            let Weight { data, input_order, .. } =
                checkpoint.weight(&config.quantization, &module.name, n, k, false).unwrap();
            match data {
                WeightData::Quantized(matrix) => {
                    let scheme = matrix.scheme;
                    let sums = bits.entry(format!("{} group {}", scheme.format.name(), scheme.group_size)).or_default();
                    sums.0 += scheme.bits_per_weight(k, n) * (n * k) as f64;
                    sums.1 += (n * k) as f64;
                    writer.matrix(&module.name, &matrix, input_order.as_ref()).unwrap();
                    schemes.insert(module.name, scheme);
                }
                WeightData::Dense(values) => {
                    writer.host_tensor(&format!("{}.weight", module.name), &values).unwrap();
                    plain.push(module.name);
                }
                WeightData::Exl3(_) | WeightData::Grid(_) => panic!("{} is in tiles", module.name),
            }
        }
        for vector in config.vector_tensors() {
            writer.host_tensor(&vector.name, &checkpoint.dense(&vector.name, &[vector.len]).unwrap()).unwrap();
        }
        let default = *schemes.values().next().unwrap();
        let mut json = ModelConfig::json(&file).unwrap().1;
        json["quantization_config"] = QuantizationConfig::new(default, schemes, &plain).unwrap().to_json();
        writer.finish(&json).unwrap();
        let (config, checkpoint) = (ModelConfig::from_dir(&output).unwrap(), Checkpoint::open(&output).unwrap());
        let inspection = inspect("model", &config, &checkpoint).unwrap();
        for name in ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"] {
            assert!(bits.keys().any(|format| format.starts_with(name)), "{name}: {bits:?}");
        }
        for (format, (bits, weights)) in bits {
            let found = inspection.formats[&format].bits_per_weight;
            assert!((found - bits / weights).abs() < 1e-9, "{format}: {found}, expected {}", bits / weights);
        }
    }

    /// Experts stacked as gpt-oss stores them, gate and up in one tensor.
    #[test]
    fn stacks_of_blocks_are_counted() {
        let root = tempfile::tempdir().unwrap();
        let (input, output) = (root.path().join("in"), root.path().join("out"));
        synth("tiny-qwen3-moe", &SynthOptions::default(), &input, |_, _| {}).unwrap();
        let (config, checkpoint) = (ModelConfig::from_dir(&input).unwrap(), Checkpoint::open(&input).unwrap());
        let mut writer = Writer::create(&output).unwrap();
        for name in checkpoint.names().filter(|name| !name.contains(".experts.")) {
            writer.host_tensor(name, &checkpoint.tensor(name).unwrap()).unwrap();
        }
        let mut modules = 0;
        for (i, layer) in config.layers.iter().enumerate() {
            let MlpConfig::Moe { experts, intermediate, .. } = layer.mlp else { continue };
            modules += 3 * experts;
            let hidden = config.hidden_size;
            for (name, n, k) in [("gate_up_proj", 2 * intermediate, hidden), ("down_proj", hidden, intermediate)] {
                let name = format!("model.layers.{i}.mlp.experts.{name}");
                let mut tensor = |suffix: &str, dtype: DType, dims: &[usize]| {
                    let bytes = vec![0; dims.iter().product::<usize>() * dtype.size_in_bytes()];
                    writer.tensor(&format!("{name}_{suffix}"), dtype, dims, &bytes).unwrap();
                };
                tensor("blocks", DType::U8, &[experts, n, k / 32, 16]);
                tensor("scales", DType::U8, &[experts, n, k / 32]);
                tensor("bias", DType::BF16, &[experts, n]);
            }
        }
        let mut json = ModelConfig::json(&input).unwrap().1;
        json["quantization_config"] = serde_json::json!({"quant_method": "mxfp4"});
        writer.finish(&json).unwrap();
        let (config, checkpoint) = (ModelConfig::from_dir(&output).unwrap(), Checkpoint::open(&output).unwrap());
        let inspection = inspect("model", &config, &checkpoint).unwrap();
        let found = &inspection.formats["mxfp4 4-bit"];
        assert_eq!((found.modules, found.bits_per_weight), (modules, 4.25));
        assert_eq!(inspection.quantized_bits_per_weight, Some(4.25));
    }

    /// Experts stored one by one, and the same stacked along a leading axis.
    #[test]
    fn stacked_experts_are_counted_like_single_ones() {
        let root = tempfile::tempdir().unwrap();
        let (single, stacked) = (root.path().join("single"), root.path().join("stacked"));
        let options = SynthOptions { format: Some("nvfp4".parse().unwrap()), ..SynthOptions::default() };
        synth("tiny-qwen3-moe", &options, &single, |_, _| {}).unwrap();
        let config = ModelConfig::from_dir(&single).unwrap();
        let checkpoint = Checkpoint::open(&single).unwrap();

        let mut stacks: BTreeMap<String, (usize, Vec<u8>)> = BTreeMap::new();
        let mut writer = Writer::create(&stacked).unwrap();
        for name in checkpoint.names() {
            let tensor = checkpoint.tensor(name).unwrap();
            match name.split_once(".experts.").and_then(|(prefix, rest)| Some((prefix, rest.split_once('.')?))) {
                Some((prefix, (_, part))) => {
                    let stack = stacks.entry(format!("{prefix}.experts.{part}")).or_default();
                    stack.0 += 1;
                    stack.1.extend(tensor.bytes());
                }
                None => writer.host_tensor(name, &tensor).unwrap(),
            }
        }
        for (name, (experts, bytes)) in &stacks {
            let (prefix, part) = name.split_once(".experts.").unwrap();
            let one = checkpoint.tensor(&format!("{prefix}.experts.0.{part}")).unwrap();
            let dims = [&[*experts], one.dims()].concat();
            writer.tensor(name, one.dtype(), &dims, bytes).unwrap();
        }
        let text = std::fs::read_to_string(single.join("config.json")).unwrap();
        writer.finish(&serde_json::from_str(&text).unwrap()).unwrap();

        let formats = |dir: &std::path::Path| {
            let checkpoint = Checkpoint::open(dir).unwrap();
            let inspection = inspect("model", &config, &checkpoint).unwrap();
            serde_json::to_value((inspection.formats, inspection.quantized_bits_per_weight)).unwrap()
        };
        assert_eq!(formats(&stacked), formats(&single));
    }
}

//! `marlin inspect`: what a model folder holds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use marlin_models::{AttentionConfig, Checkpoint, LinearModule, MlpConfig, ModelConfig};
use serde::Serialize;

use crate::bundled;

/// Arguments of `marlin inspect`.
#[derive(Args)]
pub struct InspectArgs {
    /// Model folder
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
        Some(TensorLine { name: name.to_owned(), dtype: info.dtype.name(), shape: info.shape.to_vec() })
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
    let stack = module.name.split_once(".experts.").and_then(|(prefix, rest)| {
        let (_, projection) = rest.split_once('.')?;
        Some((format!("{prefix}.experts"), projection))
    });
    let native = |name: &str| checkpoint.contains(&format!("{name}.mm.q"));
    let stacked = stack.as_ref().map(|(experts, projection)| format!("{experts}.{projection}"));
    let holder = [Some(&module.name), stacked.as_ref()].into_iter().flatten().find(|name| native(name));
    if let Some(holder) = holder {
        let scheme = config.quantization.scheme(holder, module.out_features, module.in_features)?;
        let parts = ["q", "s", "z", "gs"].map(|part| tensor_bytes(checkpoint, &format!("{holder}.mm.{part}")));
        let experts = match checkpoint.get(&format!("{holder}.mm.q")) {
            Some(info) if *holder != module.name => info.shape.first().map_or(1, |&experts| experts.max(1) as u64),
            _ => 1,
        };
        let format = format!("{} group {}", scheme.format.name(), scheme.group_size);
        return Ok(Stored { format, bytes: parts.iter().sum::<u64>() / experts, quantized: true });
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

/// Stored size of a tensor, 0 if there is none.
fn tensor_bytes(checkpoint: &Checkpoint, name: &str) -> u64 {
    let size = |shape: &[usize], bytes: usize| shape.iter().product::<usize>() as u64 * bytes as u64;
    checkpoint.get(name).map_or(0, |info| size(info.shape, info.dtype.size_in_bytes()))
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
    use marlin_models::{SynthOptions, Writer, synth};

    use super::*;

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

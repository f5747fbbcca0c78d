//! Quantized checkpoints of other projects, one file a method: the stored tensors of a module become a [`Weight`].
//!
//! A module keeps its codes wherever a native format holds codes, scales and zero points exactly; each file says what
//! becomes dense instead. Values are not rounded to the source's dtype where codes are kept: products are f32.

mod awq;
mod bitsandbytes;
mod codes;
mod compressed_tensors;
mod exl3;
mod fp8;
mod gptq;
mod grid;
mod marlin;
mod mlx;
mod mxfp4;
mod stored;

use marlin_formats::DType;
use marlin_ops::{ExpertWeights, Weight};
use serde_json::Value;

use crate::Checkpoint;
use crate::config::{Fields, read_json};
use crate::error::Result;
use stored::Stored;

/// How another project quantized a checkpoint.
#[derive(Clone, Debug)]
pub(crate) enum Method {
    Gptq(gptq::Config),
    Awq(awq::Config),
    CompressedTensors(compressed_tensors::Config),
    Fp8(fp8::Config),
    Mxfp4,
    BitsAndBytes,
    Mlx,
    /// Its tensors say everything: which modules are quantized, at how many bits, with which codebook.
    Exl3,
}

/// `quant_method`s that are read, beside the native one.
pub(crate) const QUANT_METHODS: [&str; 8] =
    ["exl3", "gptq", "awq", "compressed-tensors", "fp8", "fbgemm_fp8", "mxfp4", "bitsandbytes"];

impl Method {
    /// Reads `quantization_config` of a `quant_method`; `None` for an unknown one.
    pub(crate) fn read(method: &str, fields: &Fields<'_>) -> Result<Option<Self>> {
        let format = fields.optional_string("checkpoint_format")?.or(fields.optional_string("format")?);
        Ok(Some(match method.to_lowercase().as_str() {
            // GPTQModel writes AWQ's layout under both names.
            "gptq" if format == Some("gemm") => Method::Awq(awq::Config::read(fields)?),
            "gptq" => Method::Gptq(gptq::Config::read(fields)?),
            "awq" => Method::Awq(awq::Config::read(fields)?),
            "compressed-tensors" | "compressed_tensors" => {
                Method::CompressedTensors(compressed_tensors::Config::read(fields)?)
            }
            "fp8" | "fbgemm_fp8" => Method::Fp8(fp8::Config::read(fields)?),
            "mxfp4" => Method::Mxfp4,
            "bitsandbytes" => Method::BitsAndBytes,
            "exl3" => Method::Exl3,
            _ => return Ok(None),
        }))
    }

    /// What a config without `quantization_config` tells: MLX's own `quantization`, or AutoGPTQ's
    /// `quantize_config.json` beside it.
    pub(crate) fn beside(fields: &Fields<'_>) -> Result<Option<Self>> {
        if let Some(mlx) = fields.child("quantization")? {
            return Self::mlx(&mlx);
        }
        let path = fields.path().with_file_name("quantize_config.json");
        if !path.exists() {
            return Ok(None);
        }
        let json: Value = read_json(&path, "AutoGPTQ describes its checkpoints in it")?;
        Ok(Some(Method::Gptq(gptq::Config::read(&Fields::new(&path, &json)?)?)))
    }

    /// MLX, when the object has its fields.
    pub(crate) fn mlx(fields: &Fields<'_>) -> Result<Option<Self>> {
        if fields.get("group_size").is_none() || fields.get("bits").is_none() {
            return Ok(None);
        }
        const MODES: [&str; 4] = ["affine", "mxfp4", "nvfp4", "mxfp8"];
        if let Some(mode) = fields.optional_string("mode")?.filter(|mode| !MODES.contains(mode)) {
            return Err(fields.error("mode", format!("`{mode}` is not supported; supported: {}", MODES.join(", "))));
        }
        Ok(Some(Method::Mlx))
    }

    /// The method's name in tables.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Method::Gptq(_) => "gptq",
            Method::Awq(_) => "awq",
            Method::CompressedTensors(_) => "compressed-tensors",
            Method::Fp8(_) => "fp8",
            Method::Mxfp4 => "mxfp4",
            Method::BitsAndBytes => "bitsandbytes",
            Method::Mlx => "mlx",
            Method::Exl3 => "exl3",
        }
    }

    /// The weight of `module`, `[n, k]`, without bias; `None` when it is stored plain.
    pub(crate) fn weight(&self, checkpoint: &Checkpoint, module: &str, n: usize, k: usize) -> Result<Option<Weight>> {
        let stored = Stored::whole(checkpoint, module);
        match self {
            Method::Gptq(config) => config.weight(&stored, n, k),
            Method::Awq(config) => config.weight(&stored, n, k),
            Method::CompressedTensors(config) => config.weight(&stored, n, k),
            Method::Fp8(config) => config.weight(&stored, n, k),
            Method::Mxfp4 => Ok(None),
            Method::BitsAndBytes => bitsandbytes::weight(&stored, n, k),
            Method::Mlx => mlx::weight(&stored, n, k),
            Method::Exl3 if checkpoint.is_exl3(module) => checkpoint.exl3_weight(module, n, k).map(Some),
            Method::Exl3 => Ok(None),
        }
    }

    /// The routed experts below `prefix` where the method stacks them in its own way, else `None`.
    pub(crate) fn experts(
        &self,
        checkpoint: &Checkpoint,
        prefix: &str,
        experts: usize,
        hidden: usize,
        intermediate: usize,
    ) -> Result<Option<Vec<ExpertWeights>>> {
        match self {
            Method::Mxfp4 => mxfp4::experts(checkpoint, prefix, experts, hidden, intermediate),
            Method::Mlx => mlx::experts(checkpoint, prefix, experts, hidden, intermediate),
            _ => Ok(None),
        }
    }
}

/// A group size field: -1 (one group a column) and absent are `None`.
fn group_size(fields: &Fields<'_>, name: &str) -> Result<Option<usize>> {
    match fields.get(name).map(|v| (v, v.as_i64())) {
        None | Some((_, Some(-1))) => Ok(None),
        Some((_, Some(size))) if size > 0 => Ok(usize::try_from(size).ok()),
        Some((other, _)) => Err(fields.error(name, format!("is {other}, expected a whole number above 0, or -1"))),
    }
}

/// The group size that gives `groups` groups of `k` channels: the config's if it does, else what the tensors say.
fn resolve_group_size(named: Option<usize>, groups: usize, k: usize) -> Option<usize> {
    match named {
        Some(size) if k.div_ceil(size) == groups => Some(size),
        _ if groups == 1 => Some(k),
        _ => (groups > 0 && k.is_multiple_of(groups)).then(|| k / groups),
    }
}

/// Scales `[G, N]` of however many groups are stored.
fn column_scales(stored: &Stored<'_>, suffix: &str, n: usize) -> Result<(Vec<f32>, DType)> {
    let shape = stored.shape(suffix)?;
    match shape {
        [groups, columns] if *columns == n && *groups > 0 => {
            let floats = stored.floats(suffix, shape)?;
            Ok((floats.values, floats.dtype))
        }
        _ => Err(stored.error(suffix, format!("has shape {shape:?}, expected [groups, {n}]"))),
    }
}

/// One part of a stacked float tensor `.weight`.
fn dense_slice(stored: &Stored<'_>, n: usize, k: usize) -> Result<Weight> {
    let floats = stored.floats(".weight", &[n, k])?;
    grid::dense(stored, ".weight", floats.dtype, n, k, &floats.values)
}

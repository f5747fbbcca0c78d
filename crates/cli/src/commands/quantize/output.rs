//! The folder being written, put together from the finished parts.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use anyhow::{Result, bail};
use marlin_formats::DType;
use marlin_formats::exl3::{Codebook, Exl3Matrix, HADAMARD, tile};
use marlin_models::{WriteSummary, Writer};
use marlin_ops::HostTensor;
use marlin_quantize::{Assignment, Part, QuantizedWeight, Staging, Target};
use serde_json::Value;

use super::input::Input;
use super::recipe::Recipe;

/// A tensor that was written.
pub(super) struct Stored {
    pub(super) name: String,
    pub(super) dtype: DType,
    pub(super) dims: Vec<usize>,
    pub(super) bytes: usize,
}

/// The folder being written.
pub(super) struct Output {
    writer: Writer,
    /// What is stored besides native weights.
    stored: Vec<Stored>,
}

impl Output {
    pub(super) fn create(path: &std::path::Path, staging: &Staging) -> Result<Self> {
        Ok(Self { writer: Writer::create_in(path, &staging.model_dir())?, stored: Vec::new() })
    }

    /// Copies every tensor that is not quantized and not among `changed`, as stored; fused experts become one tensor a
    /// projection.
    pub(super) fn copy_plain(
        &mut self,
        input: &Input,
        assignments: &[Assignment],
        changed: &HashSet<String>,
    ) -> Result<()> {
        let tensor_of = |suffix: &str| -> HashMap<String, &Assignment> {
            assignments.iter().map(|a| (format!("{}.{suffix}", a.module.name), a)).collect()
        };
        let (by_weight, by_bias) = (tensor_of("weight"), tensor_of("bias"));
        let fused: HashSet<&str> = input.checkpoint.names().filter(|name| input.is_fused(name)).collect();
        for name in input.checkpoint.names() {
            let quantized = by_weight.get(name).is_some_and(|a| a.target.is_some());
            let Some(info) = input.checkpoint.get(name) else { continue };
            if quantized || fused.contains(name) || changed.contains(name) || input.is_left_out(name) {
                continue;
            }
            let mut tensor = match info.dtype {
                _ if input.checkpoint.rotation_changes(name) => match by_weight.get(name) {
                    Some(assignment) => input.plain_weight(&assignment.module)?,
                    None => {
                        HostTensor::from_f32(info.shape, &input.checkpoint.vector(name, info.shape.iter().product())?)?
                    }
                },
                DType::F32 | DType::F16 | DType::BF16 => input.checkpoint.dense(name, info.shape)?,
                _ => input.checkpoint.tensor(name)?,
            };
            if let Some(Target::Exl3 { .. }) = by_bias.get(name).and_then(|a| a.target) {
                tensor = exl3_bias(name, &tensor)?;
            }
            self.tensor(name, &tensor)?;
            input.checkpoint.release(name)?;
        }
        for Assignment { module, target, .. } in assignments {
            let name = format!("{}.weight", module.name);
            if target.is_none() && input.slices.contains_key(&module.name) && !changed.contains(&name) {
                let tensor = input.plain_weight(module)?;
                self.tensor(&name, &tensor)?;
                input.release(module)?;
            }
        }
        Ok(())
    }

    /// Writes what a step of the quantizer made.
    pub(super) fn part(&mut self, part: &Part) -> Result<()> {
        for changed in &part.changed {
            self.tensor(&changed.tensor, &HostTensor::from_f32(&changed.dims, &changed.values)?)?;
        }
        for (module, weight) in &part.weights {
            match weight {
                QuantizedWeight::Grouped(matrix) => self.writer.matrix(module, matrix, None)?,
                QuantizedWeight::Exl3(matrix) => {
                    for (name, tensor) in exl3_tensors(matrix)? {
                        self.tensor(&format!("{module}.{name}"), &tensor)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn tensor(&mut self, name: &str, tensor: &HostTensor) -> Result<()> {
        self.writer.host_tensor(name, tensor)?;
        self.stored.push(Stored {
            name: name.to_owned(),
            dtype: tensor.dtype(),
            dims: tensor.dims().to_vec(),
            bytes: tensor.bytes().len(),
        });
        Ok(())
    }

    /// Writes the configuration and the tokenizer and gives the folder its name.
    pub(super) fn finish(
        mut self,
        input: &Input,
        recipe: &Recipe,
        assignments: &[Assignment],
        staging: &mut Staging,
    ) -> Result<WriteSummary> {
        let (quantization, beside) = recipe.config(assignments, &self.stored)?;
        let mut config = input.written_config();
        match &mut config {
            Value::Object(object) => {
                object.insert("quantization_config".to_owned(), quantization);
            }
            _ => bail!("{}: config.json is not an object", input.dir.display()),
        }
        self.writer.copy_assets(&input.dir)?;
        if let Some(beside) = beside {
            self.writer.file("quantization_config.json", format!("{beside:#}\n").as_bytes())?;
        }
        staging.set_assembled(&Writer::config_text(&config))?;
        match self.writer.finish(&config) {
            Ok(summary) => Ok(summary),
            Err(error) => {
                staging.clear_assembled()?;
                Err(error.into())
            }
        }
    }
}

/// The tensors of an EXL3 module by suffix: the trellis, the scales and, but for the first codebook, its marker.
fn exl3_tensors(matrix: &Exl3Matrix) -> Result<Vec<(&'static str, HostTensor)>> {
    let words = |dtype, dims: &[usize], words: &[u16]| {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        HostTensor::new(dtype, dims, Arc::new(bytes), 0)
    };
    let (k, n) = (matrix.padded_in(), matrix.padded_out());
    let tiles = [k / tile::SIDE, n / tile::SIDE, tile::words(matrix.bits)];
    let mut tensors = vec![
        ("suh", words(DType::F16, &[k], &matrix.suh)?),
        ("svh", words(DType::F16, &[n], &matrix.svh)?),
        ("trellis", words(DType::I16, &tiles, &matrix.trellis)?),
    ];
    if let Codebook::Mcg | Codebook::Mul1 = matrix.codebook {
        let marker = matrix.codebook.multiplier().to_le_bytes().to_vec();
        tensors.push((matrix.codebook.name(), HostTensor::new(DType::I32, &[], Arc::new(marker), 0)?));
    }
    Ok(tensors)
}

/// The bias of an EXL3 module: f16, padded like its outputs.
fn exl3_bias(name: &str, bias: &HostTensor) -> Result<HostTensor> {
    let mut values = bias.to_f32()?;
    values.resize(values.len().next_multiple_of(HADAMARD), 0.0);
    if let Some(n) = values.iter().position(|value| value.abs() >= 65520.0) {
        bail!("tensor `{name}`: element {n} is {}, beyond the f16 that EXL3 stores", values[n]);
    }
    Ok(HostTensor::from_f32_as(DType::F16, &[values.len()], &values)?)
}

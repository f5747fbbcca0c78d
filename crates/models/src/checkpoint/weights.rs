//! Weights of linear layers, norms and experts from stored tensors, plain or native quantized.

use marlin_formats::exl3::HADAMARD;
use marlin_formats::{DType, QuantizedMatrix, ScaleKind, Scheme, Shift};
use marlin_ops::{ExpertWeights, HostTensor, InputOrder, Weight, WeightData};

use super::{Checkpoint, Entry};
use crate::QuantizationConfig;
use crate::error::{ModelError, Result};

/// Float dtypes of plain weights.
const FLOAT: &str = "F32, F16 or BF16";

/// `{module}.mm.o`: the channels of a native matrix's rows, `[K]` U32, where they do not follow one another.
pub(crate) const INPUT_ORDER: &str = "o";

/// The tensors `{module}.mm.*` of a native matrix: codes, scales, zero points or offsets, multipliers of two-level scales
/// and minima, tensor scale, order of the rows.
pub(crate) const NATIVE_TENSORS: [&str; 7] = ["q", "s", "z", "ss", "sz", "gs", INPUT_ORDER];

/// The dtype in which the native container stores the scales, zero points and offsets of groups.
pub(crate) fn group_dtype(kind: ScaleKind) -> DType {
    match kind {
        ScaleKind::F16 => DType::F16,
        ScaleKind::F32 => DType::F32,
        ScaleKind::E4m3 | ScaleKind::E8m0 | ScaleKind::F16U8 => DType::U8,
        ScaleKind::F16I8 => DType::I8,
    }
}

/// One slice of a tensor that may be stacked along a leading expert axis.
#[derive(Clone, Copy)]
enum Part {
    /// The whole tensor.
    Whole,
    /// Slice `index` of `count`.
    Slice { index: usize, count: usize },
}

impl Checkpoint {
    /// A plain float tensor of the given shape, all values finite. The view is not copied.
    ///
    /// # Errors
    /// Missing, another shape or dtype, or a NaN or infinity: each names the file and the tensor.
    pub fn dense(&self, name: &str, shape: &[usize]) -> Result<HostTensor> {
        let entry = self.entry(name)?;
        self.check_shape(name, entry, shape)?;
        self.finite_view(name, entry, shape, 0)
    }

    /// A plain float vector (a norm, a bias, a router correction) as f32, all values finite.
    ///
    /// # Errors
    /// As [`Checkpoint::dense`].
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let entry = self.entry(name)?;
        let tensor = self.dense(name, &[len])?;
        let mut values = tensor.to_f32().map_err(ModelError::tensor(entry.file.path(), name))?;
        self.release(name)?;
        if let Some(rotation) = &self.rotation {
            rotation.fold_vector(name, &mut values);
        }
        Ok(values)
    }

    /// The weight of a linear module, `[out_features, in_features]`: native quantized when `{module}.mm.q` is stored, from
    /// another project's tensors when `quantization` names its method and the module has them, else `{module}.weight`; with `{module}.bias` when `bias`. A plain weight is a view: [`Checkpoint::release`] it
    /// once repacked. A quantized one is copied and released here.
    ///
    /// # Errors
    /// A missing tensor, another shape or dtype, NaN or infinity, a scheme that `quantization_config` does not give or
    /// that the stored scales contradict, an order of rows that is no permutation: each names the file and the tensor.
    pub fn weight(
        &self,
        quantization: &QuantizationConfig,
        module: &str,
        out_features: usize,
        in_features: usize,
        bias: bool,
    ) -> Result<Weight> {
        let weight = self.stored_weight(quantization, self.stored_module(module), out_features, in_features, bias)?;
        self.rotated_weight(module, weight)
    }

    /// [`Checkpoint::weight`] as it is stored, but for the bias.
    fn stored_weight(
        &self,
        quantization: &QuantizationConfig,
        module: &str,
        out_features: usize,
        in_features: usize,
        bias: bool,
    ) -> Result<Weight> {
        let codes = format!("{module}.mm.q");
        let weight = if let Some(weight) = self.gguf_weight(module, out_features, in_features)? {
            weight
        } else if self.contains(&codes) {
            let scheme = quantization.scheme(module, out_features, in_features)?;
            self.quantized(module, scheme, out_features, in_features, Part::Whole)?
        } else if let Some(weight) = quantization.import(self, module, out_features, in_features)? {
            self.release_prefix(&format!("{module}."))?;
            weight
        } else {
            let name = format!("{module}.weight");
            let entry = self.entry(&name)?;
            let values = self.dense(&name, &[out_features, in_features])?;
            plain_weight(&name, entry, values)?
        };
        let name = format!("{module}.bias");
        // AutoGPTQ gives every module a bias.
        if !bias && (quantization.is_empty() || !self.contains(&name)) {
            return Ok(weight);
        }
        let entry = self.entry(&name)?;
        // Biases of EXL3 modules are padded like their outputs.
        let padded = out_features.next_multiple_of(HADAMARD);
        let len =
            if matches!(weight.data, WeightData::Exl3(_)) && entry.shape == [padded] { padded } else { out_features };
        let mut values = self.vector(&name, len)?;
        values.truncate(out_features);
        weight.with_bias(values).map_err(ModelError::tensor(entry.file.path(), &name))
    }

    /// The routed experts of a layer. `prefix` is `model.layers.{i}.mlp.experts`. Three stored forms are read: one
    /// module an expert (`{prefix}.{e}.gate_proj`, ...), transformers' fused `{prefix}.gate_up_proj [E, 2I, H]` (gate
    /// rows first) with `{prefix}.down_proj [E, H, I]`, and native quantized `{prefix}.gate_proj.mm.q [E, ..]`, ....
    /// Beside them the stacks of MLX and gpt-oss.
    ///
    /// # Errors
    /// As [`Checkpoint::weight`].
    pub fn experts(
        &self,
        quantization: &QuantizationConfig,
        prefix: &str,
        experts: usize,
        hidden: usize,
        intermediate: usize,
    ) -> Result<Vec<ExpertWeights>> {
        if let Some(stack) = quantization.import_experts(self, prefix, experts, hidden, intermediate)? {
            return Ok(stack);
        }
        if self.contains(&format!("{prefix}.gate_up_proj")) {
            return self.fused_experts(prefix, experts, hidden, intermediate);
        }
        let stacked = self.contains(&format!("{prefix}.gate_proj.mm.q"));
        (0..experts)
            .map(|e| {
                let projection = |name: &str, n: usize, k: usize| {
                    if !stacked {
                        return self.weight(quantization, &format!("{prefix}.{e}.{name}"), n, k, false);
                    }
                    let module = format!("{prefix}.{name}");
                    let scheme = quantization.scheme(&module, n, k)?;
                    let part = Part::Slice { index: e, count: experts };
                    self.quantized(&module, scheme, n, k, part)
                };
                Ok(ExpertWeights {
                    gate: projection("gate_proj", intermediate, hidden)?,
                    up: projection("up_proj", intermediate, hidden)?,
                    down: projection("down_proj", hidden, intermediate)?,
                })
            })
            .collect()
    }

    fn fused_experts(
        &self,
        prefix: &str,
        experts: usize,
        hidden: usize,
        intermediate: usize,
    ) -> Result<Vec<ExpertWeights>> {
        let (gate_up, down) = (format!("{prefix}.gate_up_proj"), format!("{prefix}.down_proj"));
        let gate_up_entry = self.entry(&gate_up)?;
        let down_entry = self.entry(&down)?;
        self.check_shape(&gate_up, gate_up_entry, &[experts, 2 * intermediate, hidden])?;
        self.check_shape(&down, down_entry, &[experts, hidden, intermediate])?;
        // Checked as wholes, so that an error's index is the element of the stored tensor.
        self.finite_view(&gate_up, gate_up_entry, &gate_up_entry.shape, 0)?;
        self.finite_view(&down, down_entry, &down_entry.shape, 0)?;
        let part = |name: &str, entry: &Entry, n: usize, k: usize, index: usize| {
            let offset = index * n * k * entry.dtype.size_in_bytes();
            plain_weight(name, entry, self.view(name, entry, &[n, k], offset)?)
        };
        (0..experts)
            .map(|e| {
                let rotated = |name: &str, weight| self.rotated_weight(&format!("{prefix}.{e}.{name}"), weight);
                Ok(ExpertWeights {
                    gate: rotated("gate_proj", part(&gate_up, gate_up_entry, intermediate, hidden, 2 * e)?)?,
                    up: rotated("up_proj", part(&gate_up, gate_up_entry, intermediate, hidden, 2 * e + 1)?)?,
                    down: rotated("down_proj", part(&down, down_entry, hidden, intermediate, e)?)?,
                })
            })
            .collect()
    }

    /// A native quantized matrix (formats.md 0.4), copied out of the file and released.
    fn quantized(
        &self,
        module: &str,
        scheme: Scheme,
        out_features: usize,
        in_features: usize,
        part: Part,
    ) -> Result<Weight> {
        let group_dims = [scheme.groups(in_features), out_features];
        let super_dims = [scheme.super_blocks(in_features), out_features];
        let two_level = scheme.format.scale_kind().is_two_level();
        let has_shifts = scheme.format.shift() != Shift::None;
        let codes = self.native(module, "q", &[DType::U32], &[scheme.code_rows(in_features), out_features], part)?;
        let dtype = group_dtype(scheme.format.scale_kind());
        let words = |stored: bool, suffix: &str, dtype: DType, dims: &[usize; 2]| -> Result<Vec<u16>> {
            match stored {
                true => Ok(words(&self.native(module, suffix, &[dtype], dims, part)?)),
                false => Ok(Vec::new()),
            }
        };
        let scales = words(true, "s", dtype, &group_dims)?;
        let zeros = words(has_shifts, "z", dtype, &group_dims)?;
        let super_scales = words(two_level, "ss", DType::F16, &super_dims)?;
        let super_minima = words(two_level && has_shifts, "sz", DType::F16, &super_dims)?;
        let tensor_scale = match scheme.format {
            marlin_formats::Format::Nvfp4 => Some(self.native(module, "gs", &[DType::F32], &[1], part)?),
            _ => None,
        };
        let codes_name = format!("{module}.mm.q");
        let entry = self.entry(&codes_name)?;
        let of_tensor = |source| ModelError::tensor(entry.file.path(), &codes_name)(source);
        let matrix = QuantizedMatrix {
            scheme,
            in_features,
            out_features,
            codes: codes.to_u32().map_err(of_tensor)?,
            scales,
            zeros,
            super_scales,
            super_minima,
            tensor_scale: match &tensor_scale {
                Some(scale) => scale.to_f32().map_err(of_tensor)?.first().copied(),
                None => None,
            },
        };
        let weight = Weight::quantized(matrix).map_err(ModelError::tensor(entry.file.path(), module))?;
        let order_name = format!("{module}.mm.{INPUT_ORDER}");
        let weight = if self.contains(&order_name) {
            let channels = self.native(module, INPUT_ORDER, &[DType::U32], &[in_features], part)?;
            let order = channels.to_u32().and_then(InputOrder::new);
            let path = self.entry(&order_name)?.file.path();
            order.and_then(|order| weight.with_input_order(order)).map_err(ModelError::tensor(path, &order_name))?
        } else {
            weight
        };
        self.release_native(module, part)?;
        Ok(weight)
    }

    /// Tensor `{module}.mm.{suffix}` of the given shape, without the leading expert axis of `part`.
    fn native(
        &self,
        module: &str,
        suffix: &str,
        dtypes: &[DType; 1],
        shape: &[usize],
        part: Part,
    ) -> Result<HostTensor> {
        let name = format!("{module}.mm.{suffix}");
        let entry = self.entry(&name)?;
        self.check_dtype(&name, entry, dtypes[0])?;
        match part {
            Part::Whole => {
                self.check_shape(&name, entry, shape)?;
                self.view(&name, entry, shape, 0)
            }
            Part::Slice { index, count } => {
                let stacked: Vec<usize> = [count].into_iter().chain(shape.iter().copied()).collect();
                self.check_shape(&name, entry, &stacked)?;
                self.view(&name, entry, shape, index * (entry.len / count))
            }
        }
    }

    /// Drops the pages of a module's native tensors, of one slice where they are stacked.
    fn release_native(&self, module: &str, part: Part) -> Result<()> {
        for suffix in NATIVE_TENSORS {
            let Some(entry) = self.tensors.get(&format!("{module}.mm.{suffix}")) else {
                continue;
            };
            let (start, len) = match part {
                Part::Whole => (entry.start, entry.len),
                Part::Slice { index, count } => {
                    let len = entry.len / count;
                    (entry.start + index * len, len)
                }
            };
            entry.file.release(start, len)?;
        }
        Ok(())
    }

    /// A view of a tensor of the given dtype and shape.
    pub(crate) fn typed(&self, name: &str, dtype: DType, shape: &[usize]) -> Result<HostTensor> {
        let entry = self.entry(name)?;
        self.check_dtype(name, entry, dtype)?;
        self.check_shape(name, entry, shape)?;
        self.view(name, entry, shape, 0)
    }

    fn check_dtype(&self, name: &str, entry: &Entry, expected: DType) -> Result<()> {
        if entry.dtype == expected {
            return Ok(());
        }
        Err(ModelError::TensorDType {
            path: entry.file.path().to_owned(),
            tensor: name.to_owned(),
            found: entry.dtype.name().to_owned(),
            expected: expected.name(),
        })
    }

    fn check_shape(&self, name: &str, entry: &Entry, expected: &[usize]) -> Result<()> {
        if entry.shape == expected {
            return Ok(());
        }
        Err(ModelError::TensorShape {
            path: entry.file.path().to_owned(),
            tensor: name.to_owned(),
            found: entry.shape.clone(),
            expected: expected.to_vec(),
        })
    }

    fn not_float(&self, name: &str, entry: &Entry) -> ModelError {
        ModelError::TensorDType {
            path: entry.file.path().to_owned(),
            tensor: name.to_owned(),
            found: entry.encoding().to_owned(),
            expected: FLOAT,
        }
    }

    fn finite_view(&self, name: &str, entry: &Entry, shape: &[usize], offset: usize) -> Result<HostTensor> {
        if entry.encoding() != entry.dtype.name() {
            return Err(self.not_float(name, entry));
        }
        let tensor = self.view(name, entry, shape, offset)?;
        self.finite(name, entry, tensor)
    }

    /// `tensor`, after a look at all its values.
    pub(super) fn finite(&self, name: &str, entry: &Entry, tensor: HostTensor) -> Result<HostTensor> {
        let non_finite = match entry.dtype {
            DType::F32 => first_non_finite(tensor.bytes(), f32::from_le_bytes),
            DType::F16 => first_non_finite(tensor.bytes(), |b| half::f16::from_le_bytes(b).to_f32()),
            DType::BF16 => first_non_finite(tensor.bytes(), |b| half::bf16::from_le_bytes(b).to_f32()),
            _ => return Err(self.not_float(name, entry)),
        };
        match non_finite {
            None => Ok(tensor),
            Some((index, value)) => {
                Err(ModelError::NonFinite { path: entry.file.path().to_owned(), tensor: name.to_owned(), index, value })
            }
        }
    }
}

/// Bytes zero-extended, or the 16-bit words of wider values.
fn words(tensor: &HostTensor) -> Vec<u16> {
    match tensor.dtype().size_in_bytes() {
        1 => tensor.bytes().iter().map(|&byte| u16::from(byte)).collect(),
        _ => tensor.bytes().as_chunks::<2>().0.iter().map(|&word| u16::from_le_bytes(word)).collect(),
    }
}

fn plain_weight(name: &str, entry: &Entry, values: HostTensor) -> Result<Weight> {
    Weight::dense(values).map_err(ModelError::tensor(entry.file.path(), name))
}

/// First NaN or infinity among little-endian values. Blocks are tested without a branch per element first.
fn first_non_finite<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Option<(usize, f32)> {
    const BLOCK: usize = 1024;
    let (values, _) = bytes.as_chunks::<N>();
    for (b, block) in values.chunks(BLOCK).enumerate() {
        let all_finite = block.iter().fold(true, |ok, &v| ok & value(v).is_finite());
        if !all_finite {
            let found = block.iter().map(|&v| value(v)).enumerate();
            return found.filter(|(_, v)| !v.is_finite()).map(|(i, v)| (b * BLOCK + i, v)).next();
        }
    }
    None
}

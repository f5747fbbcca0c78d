//! A part as one safetensors file: its tensors numbered, and what they are as one JSON object in the
//! metadata.

use std::borrow::Cow;
use std::collections::HashMap;

use marlin_formats::exl3::{Codebook, Exl3Matrix};
use marlin_formats::{Format, QuantizedMatrix, Scheme};
use safetensors::tensor::{Dtype, SafeTensors, View};
use serde::{Deserialize, Serialize};

use crate::job::SourceError;
use crate::part::{Changed, Notes, Part, QuantizedWeight};

/// The metadata entry.
const HEADER: &str = "part";

#[derive(Serialize, Deserialize)]
struct Header {
    /// Fingerprint of the job.
    job: String,
    index: usize,
    weights: Vec<WeightHeader>,
    changed: Vec<ChangedHeader>,
    /// Length of each vector of scales.
    scales: Vec<usize>,
    notes: Notes,
}

#[derive(Serialize, Deserialize)]
struct WeightHeader {
    module: String,
    out_features: usize,
    in_features: usize,
    kind: Kind,
}

#[derive(Serialize, Deserialize)]
enum Kind {
    Grouped { format: String, group_size: usize },
    Exl3 { codebook: String, bits: u32 },
}

#[derive(Serialize, Deserialize)]
struct ChangedHeader {
    tensor: String,
    dims: Vec<usize>,
}

/// A vector of the file.
struct Tensor {
    dtype: Dtype,
    shape: [usize; 1],
    bytes: Vec<u8>,
}

impl View for &Tensor {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

#[derive(Default)]
struct Tensors(Vec<(String, Tensor)>);

impl Tensors {
    fn add<T: Copy, const N: usize>(&mut self, name: String, dtype: Dtype, values: &[T], bytes: impl Fn(T) -> [u8; N]) {
        let tensor =
            Tensor { dtype, shape: [values.len()], bytes: values.iter().flat_map(|&value| bytes(value)).collect() };
        self.0.push((name, tensor));
    }

    fn add_weight(&mut self, i: usize, weight: &QuantizedWeight) -> Kind {
        let name = |suffix: &str| format!("weight.{i}.{suffix}");
        match weight {
            QuantizedWeight::Grouped(matrix) => {
                self.add(name("codes"), Dtype::U32, &matrix.codes, u32::to_le_bytes);
                self.add(name("scales"), Dtype::U16, &matrix.scales, u16::to_le_bytes);
                self.add(name("zeros"), Dtype::U16, &matrix.zeros, u16::to_le_bytes);
                self.add(name("super_scales"), Dtype::U16, &matrix.super_scales, u16::to_le_bytes);
                self.add(name("super_minima"), Dtype::U16, &matrix.super_minima, u16::to_le_bytes);
                let tensor_scale: Vec<f32> = matrix.tensor_scale.into_iter().collect();
                self.add(name("tensor_scale"), Dtype::F32, &tensor_scale, f32::to_le_bytes);
                let Scheme { format, group_size } = matrix.scheme;
                Kind::Grouped { format: format.name().to_owned(), group_size }
            }
            QuantizedWeight::Exl3(matrix) => {
                self.add(name("trellis"), Dtype::U16, &matrix.trellis, u16::to_le_bytes);
                self.add(name("suh"), Dtype::U16, &matrix.suh, u16::to_le_bytes);
                self.add(name("svh"), Dtype::U16, &matrix.svh, u16::to_le_bytes);
                Kind::Exl3 { codebook: matrix.codebook.name().to_owned(), bits: matrix.bits }
            }
        }
    }
}

/// The bytes of the file.
pub(super) fn encode(part: &Part, job: &str, index: usize) -> Result<Vec<u8>, SourceError> {
    let mut tensors = Tensors::default();
    let mut weights = Vec::new();
    for (i, (module, weight)) in part.weights.iter().enumerate() {
        let kind = tensors.add_weight(i, weight);
        let (out_features, in_features) = (weight.out_features(), weight.in_features());
        weights.push(WeightHeader { module: module.clone(), out_features, in_features, kind });
    }
    for (i, changed) in part.changed.iter().enumerate() {
        tensors.add(format!("changed.{i}"), Dtype::F32, &changed.values, f32::to_le_bytes);
    }
    for (i, scales) in part.scales.iter().enumerate() {
        tensors.add(format!("scales.{i}"), Dtype::F32, scales, f32::to_le_bytes);
    }
    let changed = part.changed.iter().map(|c| ChangedHeader { tensor: c.tensor.clone(), dims: c.dims.clone() });
    let header = Header {
        job: job.to_owned(),
        index,
        weights,
        changed: changed.collect(),
        scales: part.scales.iter().map(Vec::len).collect(),
        notes: part.notes.clone(),
    };
    let metadata = HashMap::from([(HEADER.to_owned(), serde_json::to_string(&header)?)]);
    Ok(safetensors::serialize(tensors.0.iter().map(|(name, tensor)| (name, tensor)), Some(metadata))?)
}

/// The part in the bytes of a file, or why it cannot be what [`encode`] made for this job.
pub(super) fn decode(bytes: &[u8], job: &str, index: usize) -> Result<Part, String> {
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
    let text = metadata.metadata().as_ref().and_then(|entries| entries.get(HEADER));
    let text = text.ok_or("its metadata do not say what it holds")?;
    let header: Header = serde_json::from_str(text).map_err(|e| e.to_string())?;
    if header.job != job || header.index != index {
        return Err("it belongs to another job".to_owned());
    }
    let file = File(SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?);
    let mut part = Part { notes: header.notes, ..Part::default() };
    for (i, weight) in header.weights.iter().enumerate() {
        let found = file.weight(i, weight).map_err(|reason| format!("`{}`: {reason}", weight.module))?;
        part.weights.push((weight.module.clone(), found));
    }
    for (i, ChangedHeader { tensor, dims }) in header.changed.into_iter().enumerate() {
        let values = file.values(&format!("changed.{i}"), Dtype::F32, f32::from_le_bytes)?;
        let elements = dims.iter().try_fold(1usize, |product, &d| product.checked_mul(d));
        if elements != Some(values.len()) {
            return Err(format!("`{tensor}` has {} values for shape {dims:?}", values.len()));
        }
        part.changed.push(Changed { tensor, dims, values });
    }
    for (i, len) in header.scales.into_iter().enumerate() {
        let scales = file.values(&format!("scales.{i}"), Dtype::F32, f32::from_le_bytes)?;
        if scales.len() != len {
            return Err(format!("scales.{i} holds {} values, expected {len}", scales.len()));
        }
        part.scales.push(scales);
    }
    Ok(part)
}

struct File<'a>(SafeTensors<'a>);

impl File<'_> {
    fn weight(&self, i: usize, header: &WeightHeader) -> Result<QuantizedWeight, String> {
        let name = |suffix: &str| format!("weight.{i}.{suffix}");
        let halves = |suffix: &str| self.values(&name(suffix), Dtype::U16, u16::from_le_bytes);
        let &WeightHeader { out_features, in_features, ref kind, .. } = header;
        let weight = match kind {
            Kind::Grouped { format, group_size } => {
                let format: Format = format.parse().map_err(|e| format!("{e}"))?;
                let tensor_scale = self.values(&name("tensor_scale"), Dtype::F32, f32::from_le_bytes)?;
                QuantizedWeight::Grouped(QuantizedMatrix {
                    scheme: Scheme::new(format, *group_size).map_err(|e| e.to_string())?,
                    in_features,
                    out_features,
                    codes: self.values(&name("codes"), Dtype::U32, u32::from_le_bytes)?,
                    scales: halves("scales")?,
                    zeros: halves("zeros")?,
                    super_scales: halves("super_scales")?,
                    super_minima: halves("super_minima")?,
                    tensor_scale: tensor_scale.first().copied(),
                })
            }
            Kind::Exl3 { codebook, bits } => QuantizedWeight::Exl3(Exl3Matrix {
                codebook: Codebook::from_name(codebook).ok_or_else(|| format!("no codebook is called `{codebook}`"))?,
                bits: *bits,
                in_features,
                out_features,
                trellis: halves("trellis")?,
                suh: halves("suh")?,
                svh: halves("svh")?,
            }),
        };
        weight.validate().map_err(|e| e.to_string())?;
        Ok(weight)
    }

    fn values<T, const N: usize>(
        &self,
        name: &str,
        dtype: Dtype,
        value: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, String> {
        let tensor = self.0.tensor(name).map_err(|e| e.to_string())?;
        if tensor.dtype() != dtype {
            return Err(format!("{name} is {:?}, expected {dtype:?}", tensor.dtype()));
        }
        let (values, _) = tensor.data().as_chunks::<N>();
        Ok(values.iter().map(|&bytes| value(bytes)).collect())
    }
}

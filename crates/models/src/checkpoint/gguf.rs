//! GGUF tensors behind the names and shapes of a Hugging Face checkpoint.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use marlin_formats::{DType, FormatError, QuantizedMatrix};
use marlin_ops::{HostTensor, Weight};

use super::{Checkpoint, Entry};
use crate::error::{ModelError, Result};
use crate::gguf::{self, AttentionRows, BlockType, GgmlType, GgufModel, TensorRecord};

/// What an entry of a GGUF file is beside its bytes.
#[derive(Debug)]
pub(super) struct GgufTensor {
    /// Name in the file.
    name: String,
    pub(super) kind: GgmlType,
    order: RowOrder,
}

/// The order of a tensor's rows.
#[derive(Clone, Copy, Debug, PartialEq)]
enum RowOrder {
    Plain,
    /// Heads of this many rows, each stored for interleaved rotation (query and key projections of `llama` files).
    Interleaved {
        head: usize,
    },
    /// Queries, keys and values in one.
    Fused(AttentionRows),
}

/// Consecutive rows of a stored tensor that are one module's weight.
struct Rows<'a> {
    entry: &'a Entry,
    tensor: &'a GgufTensor,
    first: usize,
    /// Rows of the whole tensor, or of one expert of a stack.
    of: usize,
    /// Width of interleaved heads.
    head: Option<usize>,
    /// What `.scale` tensors of NVFP4 weights share a name with, and the expert.
    stem: String,
    index: usize,
}

impl Checkpoint {
    /// Adds the tensors of a GGUF model.
    pub(super) fn add_gguf(&mut self, path: &Path) -> Result<()> {
        let model = GgufModel::open(path)?;
        let metadata = model.metadata();
        let rows = gguf::attention_rows(&metadata)?;
        let experts = gguf::expert_count(&metadata)?;
        for (part, record) in model.tensors().filter(|(_, record)| record.name != gguf::ROPE_FACTORS) {
            let path = part.file.path();
            let name = gguf::hugging_face(&record.name).unwrap_or_else(|| record.name.clone());
            if let Some(other) = self.tensors.get(&name) {
                let other = other.file.path().to_owned();
                return Err(ModelError::DuplicateTensor { path: path.to_owned(), tensor: record.name.clone(), other });
            }
            if let (true, &[stacked, _, _]) = (name.contains(".mlp.experts."), &record.shape[..])
                && experts != Some(stacked as u64)
            {
                let reason = format!("tensor `{}` holds {stacked} experts, the metadata says {experts:?}", record.name);
                return Err(ModelError::Gguf { path: path.to_owned(), reason });
            }
            let entry = Entry {
                file: Arc::clone(&part.file),
                dtype: match record.kind {
                    GgmlType::Plain(dtype) => dtype,
                    GgmlType::Block(_) => DType::U8,
                },
                shape: record.shape.clone(),
                start: record.start,
                len: record.len,
                used: AtomicBool::new(false),
                gguf: Some(GgufTensor {
                    name: record.name.clone(),
                    kind: record.kind,
                    order: row_order(path, &name, record, rows.as_ref())?,
                }),
            };
            self.tensors.insert(name, entry);
        }
        Ok(())
    }

    /// The block type (or dtype) and the stored bytes of a linear module of a GGUF file; `None` when it is not in one.
    pub fn gguf_encoding(&self, module: &str, out_features: usize, in_features: usize) -> Option<(&'static str, u64)> {
        if let Some(rows) = self.rows(module, out_features) {
            let bytes = out_features * rows.tensor.row_bytes(in_features);
            return Some((rows.tensor.kind.name(), bytes as u64));
        }
        let (keys, values) = self.latent_kv(module)?;
        Some((values.gguf.as_ref()?.kind.name(), (keys.len + values.len) as u64))
    }

    /// The weight of a linear module `[out_features, in_features]` without bias; `None` when no GGUF tensor holds it.
    pub(super) fn gguf_weight(&self, module: &str, out_features: usize, in_features: usize) -> Result<Option<Weight>> {
        if let Some(rows) = self.rows(module, out_features) {
            return self.rows_weight(&rows, out_features, in_features).map(Some);
        }
        match self.latent_kv(module) {
            Some((keys, values)) => self.joined_kv(keys, values, out_features, in_features).map(Some),
            None => Ok(None),
        }
    }

    /// Where a module's rows are: a tensor of its own, an expert of a stack, or a part of a fused projection.
    fn rows(&self, module: &str, n: usize) -> Option<Rows<'_>> {
        let find = |stem: &str| {
            let entry = self.tensors.get(&format!("{stem}.weight"))?;
            Some((entry, entry.gguf.as_ref()?))
        };
        let whole = |stem: String, index: usize, of: usize, offset: usize| {
            let (entry, tensor) = find(&stem)?;
            let head = if let RowOrder::Interleaved { head } = tensor.order { Some(head) } else { None };
            let first = index.checked_mul(of)?.checked_add(offset)?;
            Some(Rows { entry, tensor, first, of, head, stem, index })
        };
        if let Some(rows) = whole(module.to_owned(), 0, n, 0) {
            return Some(rows);
        }
        let (prefix, name) = module.rsplit_once('.')?;
        if let Some((prefix, Ok(expert))) = prefix.rsplit_once('.').map(|(p, e)| (p, e.parse::<usize>())) {
            let fused = || format!("{prefix}.gate_up_proj");
            return whole(format!("{prefix}.{name}"), expert, n, 0).or_else(|| match name {
                "gate_proj" => whole(fused(), expert, 2 * n, 0),
                "up_proj" => whole(fused(), expert, 2 * n, n),
                _ => None,
            });
        }
        let stem = format!("{prefix}.qkv_proj");
        let (entry, tensor) = find(&stem)?;
        let RowOrder::Fused(rows) = tensor.order else { return None };
        let (q, kv, head) = (rows.query, rows.key, rows.interleaved.then_some(rows.head));
        let (first, head) = match name {
            "q_proj" => (0, head),
            "k_proj" => (q, head),
            "v_proj" => (q + kv, None),
            _ => return None,
        };
        Some(Rows { entry, tensor, first, of: q + 2 * kv, head, stem, index: 0 })
    }

    /// The factor that `{stem}.scale` gives an NVFP4 tensor, or one expert of a stack; 1 without one.
    fn nvfp4_scale(&self, rows: &Rows<'_>) -> Result<f32> {
        // What activations are quantized with is not used.
        if let Some(entry) = self.tensors.get(&format!("{}.input_scale", rows.stem)) {
            entry.used.store(true, Ordering::Relaxed);
        }
        let name = format!("{}.scale", rows.stem);
        let Some(entry) = self.tensors.get(&name) else { return Ok(1.0) };
        let len = if rows.entry.shape.len() > 2 { rows.entry.shape[0] } else { 1 };
        let scale = self.vector(&name, len)?.get(rows.index).copied().unwrap_or(0.0);
        match scale > 0.0 {
            true => Ok(scale),
            false => {
                let reason = format!("tensor `{name}` holds the scale {scale}, which must be above 0");
                Err(ModelError::Gguf { path: entry.file.path().to_owned(), reason })
            }
        }
    }

    fn rows_weight(&self, rows: &Rows<'_>, n: usize, k: usize) -> Result<Weight> {
        let Rows { entry, tensor, first, of, head, .. } = *rows;
        let path = entry.file.path();
        let last = first.checked_add(n);
        let whole_heads = head.is_none_or(|head| n.is_multiple_of(head));
        let fits = match entry.shape[..] {
            [stored, width] => stored == of && width == k,
            [_, stored, width] => stored == of && width == k,
            _ => false,
        };
        if !fits || !whole_heads || last.is_none_or(|last| last > tensor.rows(entry)) {
            return Err(ModelError::TensorShape {
                path: path.to_owned(),
                tensor: tensor.name.clone(),
                found: entry.shape.clone(),
                expected: vec![of, k],
            });
        }
        let of_tensor = |source| ModelError::tensor(path, &tensor.name)(source);
        match tensor.kind {
            GgmlType::Plain(dtype) => {
                let values = match head {
                    None => self.view(&tensor.name, entry, &[n, k], first * k * dtype.size_in_bytes())?,
                    Some(head) => tensor.halves(entry, first, &[n, k], head)?,
                };
                Weight::dense(self.finite(&tensor.name, entry, values)?).map_err(of_tensor)
            }
            GgmlType::Block(kind) => {
                entry.used.store(true, Ordering::Relaxed);
                let row_bytes = tensor.row_bytes(k);
                let (start, len) = (entry.start + first * row_bytes, n * row_bytes);
                let bytes = &(*entry.file).as_ref()[start..start + len];
                let row = |r| &bytes[stored_row(r, head) * row_bytes..][..row_bytes];
                let scale = if kind == BlockType::Nvfp4 { self.nvfp4_scale(rows)? } else { 1.0 };
                let divisor = gguf::nvfp4_divisor(scale);
                let matrix = gguf::matrix(kind, n, k, (0..n).map(row), divisor.unwrap_or(1.0));
                let matrix = matrix.map_err(|e| of_tensor(e.into()))?;
                entry.file.release(start, len)?;
                if divisor.is_some() {
                    return Weight::quantized(matrix).map_err(of_tensor);
                }
                // No divisor gives the products exactly: the values are kept instead.
                let values = scaled(&matrix, scale).map_err(|e| of_tensor(e.into()))?;
                if let Some(index) = values.iter().position(|value| !value.is_finite()) {
                    let (path, tensor, value) = (path.to_owned(), tensor.name.clone(), values[index]);
                    return Err(ModelError::NonFinite { path, tensor, index: first * k + index, value });
                }
                HostTensor::from_f32(&[n, k], &values).and_then(Weight::dense).map_err(of_tensor)
            }
        }
    }

    /// The two tensors that `kv_b_proj` is split into.
    fn latent_kv(&self, module: &str) -> Option<(&Entry, &Entry)> {
        let prefix = module.strip_suffix(".kv_b_proj")?;
        let part = |name: &str| self.tensors.get(&format!("{prefix}.{name}.weight")).filter(|e| e.gguf.is_some());
        Some((part("k_b_proj")?, part("v_b_proj")?))
    }

    /// `kv_b_proj` from its keys, stored transposed `[heads, rank, nope]`, and its values `[heads, value, rank]`.
    /// Quantized parts are decoded: the groups of the transposed one run across the rows.
    fn joined_kv(&self, keys: &Entry, values: &Entry, n: usize, rank: usize) -> Result<Weight> {
        let (key_name, key_kind, key_values) = self.decoded_stack(keys)?;
        let (_, value_kind, value_values) = self.decoded_stack(values)?;
        let wrong = |entry: &Entry, expected: Vec<usize>| ModelError::TensorShape {
            path: entry.file.path().to_owned(),
            tensor: entry.gguf.as_ref().map_or(String::new(), |tensor| tensor.name.clone()),
            found: entry.shape.clone(),
            expected,
        };
        let (&[heads, key_rank, nope], &[value_heads, width, value_rank]) = (&keys.shape[..], &values.shape[..]) else {
            return Err(wrong(keys, vec![0, rank, 0]));
        };
        if key_rank != rank || heads * nope > n {
            return Err(wrong(keys, vec![heads, rank, nope]));
        }
        if value_heads != heads || value_rank != rank || heads * (nope + width) != n {
            return Err(wrong(values, vec![heads, n / heads - nope, rank]));
        }
        let mut joined = Vec::with_capacity(n * rank);
        for (key, value) in key_values.chunks_exact(rank * nope).zip(value_values.chunks_exact(width * rank)) {
            joined.extend((0..nope * rank).map(|i| key[i % rank * nope + i / rank]));
            joined.extend_from_slice(value);
        }
        let dtype = match (key_kind, value_kind) {
            (GgmlType::Plain(a), GgmlType::Plain(b)) if a == b => a,
            _ => DType::F32,
        };
        let weight = HostTensor::from_f32_as(dtype, &[n, rank], &joined).and_then(Weight::dense);
        weight.map_err(ModelError::tensor(keys.file.path(), key_name))
    }

    /// All values of a tensor `[heads, rows, columns]`.
    fn decoded_stack<'a>(&self, entry: &'a Entry) -> Result<(&'a str, GgmlType, Vec<f32>)> {
        let Some(tensor) = &entry.gguf else { unreachable!("the caller looked for GGUF tensors") };
        let (rows, k) = (tensor.rows(entry), entry.shape.last().copied().unwrap_or(0));
        let of = entry.shape.iter().rev().nth(1).copied().unwrap_or(0);
        let rows_of = Rows { entry, tensor, first: 0, of, head: None, stem: String::new(), index: 0 };
        let weight = self.rows_weight(&rows_of, rows, k)?;
        let values = weight.to_f32().map_err(ModelError::tensor(entry.file.path(), &tensor.name))?;
        entry.file.release(entry.start, entry.len)?;
        Ok((&tensor.name, tensor.kind, values))
    }
}

/// How the rows of tensor `hugging_face` lie, given the attention's dimensions.
fn row_order(path: &Path, hugging_face: &str, record: &TensorRecord, rows: Option<&AttentionRows>) -> Result<RowOrder> {
    let module = hugging_face.rsplit_once('.').map_or(hugging_face, |(module, _)| module);
    let projection = module.rsplit_once(".self_attn.").map(|(_, projection)| projection);
    let (order, unit) = match (rows, projection) {
        (Some(rows), Some("qkv_proj")) => (RowOrder::Fused(*rows), rows.query + 2 * rows.key),
        (Some(rows), Some("q_proj" | "k_proj")) if rows.interleaved => {
            (RowOrder::Interleaved { head: rows.head }, rows.head)
        }
        _ => return Ok(RowOrder::Plain),
    };
    let stored = record.shape.first().copied().unwrap_or(0);
    if stored.is_multiple_of(unit) {
        return Ok(order);
    }
    let reason = format!("tensor `{}` has {stored} rows, not a multiple of {unit} as the metadata asks", record.name);
    Err(ModelError::Gguf { path: path.to_owned(), reason })
}

impl GgufTensor {
    /// Rows of all leading dimensions together.
    fn rows(&self, entry: &Entry) -> usize {
        entry.shape.iter().rev().skip(1).product()
    }

    /// Bytes of `k` elements, whole blocks.
    fn row_bytes(&self, k: usize) -> usize {
        k / self.kind.block_elements() * self.kind.block_bytes()
    }

    /// A copy of rows with each head's interleaved rows brought to two halves.
    fn halves(&self, entry: &Entry, first: usize, dims: &[usize], head: usize) -> Result<HostTensor> {
        entry.used.store(true, Ordering::Relaxed);
        let row_bytes = dims[1..].iter().product::<usize>() * entry.dtype.size_in_bytes();
        let rows = &(*entry.file).as_ref()[entry.start + first * row_bytes..][..dims[0] * row_bytes];
        let source = |r| &rows[stored_row(r, Some(head)) * row_bytes..][..row_bytes];
        let copy: Vec<u8> = (0..dims[0]).flat_map(source).copied().collect();
        HostTensor::new(entry.dtype, dims, Arc::new(copy), 0).map_err(ModelError::tensor(entry.file.path(), &self.name))
    }

    /// The whole tensor in the published order of its rows, `None` when it is stored so, or in blocks.
    pub(super) fn reordered(&self, entry: &Entry, dims: &[usize]) -> Option<Result<HostTensor>> {
        match (self.order, self.kind) {
            (RowOrder::Interleaved { head }, GgmlType::Plain(_)) if dims == entry.shape => {
                Some(self.halves(entry, 0, dims, head))
            }
            _ => None,
        }
    }

    /// The dimensions of the stored bytes of a block type.
    pub(super) fn byte_dims(&self, entry: &Entry) -> Vec<usize> {
        let mut dims = entry.shape.clone();
        if let (GgmlType::Block(_), Some(last)) = (self.kind, dims.last_mut()) {
            *last = self.row_bytes(*last);
        }
        dims
    }
}

/// The stored row of row `r`: a head's rows `2i` and `2i + 1` are rows `i` and `head/2 + i` of the published model.
fn stored_row(r: usize, head: Option<usize>) -> usize {
    let Some(head) = head else { return r };
    let (start, within) = (r / head * head, r % head);
    let (side, pair) = (within / (head / 2), within % (head / 2));
    start + 2 * pair + side
}

/// NVFP4 values `[N, K]` with the tensor's factor multiplied into the block scales.
fn scaled(matrix: &QuantizedMatrix, scale: f32) -> std::result::Result<Vec<f32>, FormatError> {
    let (n, k, size) = (matrix.out_features, matrix.in_features, matrix.scheme.group_size);
    let format = matrix.scheme.format;
    let mut values = Vec::with_capacity(n * k);
    for row in 0..n {
        for group in 0..k / size {
            let factor = matrix.group(row, group)?.scale * scale;
            let columns = group * size..(group + 1) * size;
            values.extend(columns.map(|column| format.value(matrix.code(row, column), 0.0) * factor));
        }
    }
    Ok(values)
}

//! Weights in device memory.

use cubecl::prelude::*;
use marlin_formats::{QuantizedMatrix, ScaleKind};
use marlin_ops::{ExpertWeights, HostTensor, Result, Weight, WeightData};

use crate::decode::{Decoder, Scale};
use crate::{Buffer, Gpu};

/// A linear layer on a GPU, K-major; see [`crate::decode`].
pub struct GpuWeight {
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    pub(crate) decoder: Decoder,
    /// `[word rows, N]`.
    pub(crate) words: Buffer,
    pub(crate) word_count: usize,
    /// `[G, N]`, f16 or bytes.
    pub(crate) scales: Buffer,
    pub(crate) scale_count: usize,
    /// `[G, N]` f16.
    pub(crate) zeros: Buffer,
    pub(crate) zero_count: usize,
    /// Values of codes or of scale bytes, 256 f32 where the decoder looks them up.
    pub(crate) table: Buffer,
    pub(crate) table_len: usize,
    /// `[N]` f32.
    pub(crate) bias: Option<Buffer>,
}

/// The routed experts of a layer on a GPU.
pub struct GpuExperts {
    pub(crate) experts: Vec<GpuExpert>,
}

/// The three projections of one expert.
pub(crate) struct GpuExpert {
    pub(crate) gate: GpuWeight,
    pub(crate) up: GpuWeight,
    pub(crate) down: GpuWeight,
}

/// A weight's bytes as the device takes them.
struct Packed {
    decoder: Decoder,
    words: Vec<u32>,
    scales: Vec<u8>,
    scale_count: usize,
    zeros: Vec<u16>,
    table: Vec<f32>,
}

impl GpuWeight {
    /// Uploads a host weight.
    pub(crate) fn new<R: Runtime>(gpu: &Gpu<R>, weight: &Weight) -> Result<Self> {
        const OP: &str = "prepare_weight";
        let (in_features, out_features) = (weight.in_features(), weight.out_features());
        let packed = match &weight.data {
            WeightData::Dense(tensor) => pack_dense(tensor, out_features, in_features)?,
            WeightData::Quantized(matrix) => pack_quantized(matrix)?,
        };
        let bias = weight.bias.as_ref().map(|bias| gpu.create_f32(OP, bias)).transpose()?;
        Ok(Self {
            in_features,
            out_features,
            decoder: packed.decoder,
            word_count: packed.words.len().max(1),
            words: gpu.create_u32(OP, &packed.words)?,
            scale_count: packed.scale_count.max(1),
            scales: gpu.create(OP, &packed.scales)?,
            zero_count: packed.zeros.len().max(1),
            zeros: gpu.create(OP, bytemuck::cast_slice(&packed.zeros))?,
            table_len: packed.table.len().max(1),
            table: gpu.create_f32(OP, &packed.table)?,
            bias,
        })
    }

    /// Units along K, the last one possibly padded.
    pub(crate) fn units(&self) -> usize {
        self.in_features.div_ceil(self.decoder.unit())
    }
}

impl GpuExperts {
    /// Uploads the experts of a layer.
    pub(crate) fn new<R: Runtime>(gpu: &Gpu<R>, experts: &[ExpertWeights]) -> Result<Self> {
        let upload = |expert: &ExpertWeights| {
            Ok(GpuExpert {
                gate: GpuWeight::new(gpu, &expert.gate)?,
                up: GpuWeight::new(gpu, &expert.up)?,
                down: GpuWeight::new(gpu, &expert.down)?,
            })
        };
        Ok(Self { experts: experts.iter().map(upload).collect::<Result<_>>()? })
    }
}

/// `[N, K]` to words `[units, N]`, one f32 or two 16-bit values each; an odd last feature is paired with 0.
fn pack_dense(tensor: &HostTensor, n: usize, k: usize) -> Result<Packed> {
    let decoder = Decoder::dense(tensor.dtype());
    let units = k.div_ceil(decoder.unit());
    let mut words = vec![0u32; units * n];
    if decoder.unit() == 1 {
        for (column, row) in tensor.to_f32()?.chunks_exact(k.max(1)).enumerate() {
            for (unit, value) in row.iter().enumerate() {
                words[unit * n + column] = value.to_bits();
            }
        }
    } else {
        for (column, row) in tensor.to_u16_bits()?.chunks_exact(k.max(1)).enumerate() {
            for (unit, pair) in row.chunks(2).enumerate() {
                let high = pair.get(1).copied().unwrap_or(0);
                words[unit * n + column] = u32::from(pair[0]) | u32::from(high) << 16;
            }
        }
    }
    Ok(Packed { decoder, words, scales: Vec::new(), scale_count: 0, zeros: Vec::new(), table: Vec::new() })
}

fn pack_quantized(matrix: &QuantizedMatrix) -> Result<Packed> {
    let decoder = Decoder::quantized(matrix.scheme);
    let format = matrix.scheme.format;
    let scales = match format.scale_kind() {
        ScaleKind::F16 => bytemuck::cast_slice(&matrix.scales).to_vec(),
        ScaleKind::E4m3 | ScaleKind::E8m0 => matrix.scales.iter().map(|&bits| bits as u8).collect(),
    };
    let table = if decoder.scale == Scale::Byte {
        let value =
            |byte: u16| format.group_from_bits(byte, 0, matrix.tensor_scale).map_or(f32::NAN, |group| group.scale);
        (0..256).map(value).collect()
    } else {
        (0..=255).map(|code| format.value(code, 0.0)).collect()
    };
    Ok(Packed {
        decoder,
        words: matrix.codes.clone(),
        scales,
        scale_count: matrix.scales.len(),
        zeros: matrix.zeros.clone(),
        table,
    })
}

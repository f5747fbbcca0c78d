//! Weights in device memory.

use std::borrow::Cow;

use cubecl::prelude::*;
use marlin_formats::exl3::{Exl3Matrix, HADAMARD};
use marlin_formats::grid::GridMatrix;
use marlin_formats::{QuantizedMatrix, ScaleKind, Shift};
use marlin_ops::{HostTensor, Result, Weight, WeightData};
use rayon::prelude::*;

use crate::decode::{Codes, Decoder, PADDED, Scale, Trellis};
use crate::linear::input_order::DeviceOrder;
pub use crate::moe::GpuExperts;
use crate::{Buffer, Gpu};

/// A linear layer on a GPU, K-major; see `decode`. EXL3 has its tiles in `words`, suh in `scales` and svh in `zeros`.
pub struct GpuWeight {
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    pub(crate) decoder: Decoder,
    /// `[word rows, N]`.
    pub(crate) words: Buffer,
    pub(crate) word_count: usize,
    /// `[G, N]`, f16, f32 or bytes.
    pub(crate) scales: Buffer,
    pub(crate) scale_count: usize,
    /// Zero points or offsets, `[G, N]`, of the type of the scales.
    pub(crate) zeros: Buffer,
    pub(crate) zero_count: usize,
    /// Values of codes or of scale bytes, 256 f32 where the decoder looks them up.
    pub(crate) table: Buffer,
    pub(crate) table_len: usize,
    /// `[N]` f32.
    pub(crate) bias: Option<Buffer>,
    /// Where products read their features in x; experts have theirs in [`GpuExperts`].
    pub(crate) input_order: Option<DeviceOrder>,
}

/// A weight's bytes as the device takes them.
pub(crate) struct Packed {
    pub(crate) decoder: Decoder,
    pub(crate) words: Vec<u32>,
    pub(crate) scales: Vec<u8>,
    pub(crate) scale_count: usize,
    pub(crate) zeros: Vec<u8>,
    pub(crate) zero_count: usize,
    pub(crate) table: Vec<f32>,
}

impl GpuWeight {
    /// Uploads a host weight.
    pub(crate) fn new<R: Runtime>(gpu: &Gpu<R>, weight: &Weight) -> Result<Self> {
        const OP: &str = "prepare_weight";
        let (in_features, out_features) = (weight.in_features(), weight.out_features());
        let packed = pack(weight)?;
        let bias = weight.bias.as_ref().map(|bias| gpu.create_f32(OP, bias)).transpose()?;
        Ok(Self {
            in_features,
            out_features,
            decoder: packed.decoder,
            word_count: packed.words.len().max(1),
            words: gpu.create_u32(OP, &packed.words)?,
            scale_count: packed.scale_count.max(1),
            scales: gpu.create(OP, &packed.scales)?,
            zero_count: packed.zero_count.max(1),
            zeros: gpu.create(OP, &packed.zeros)?,
            table_len: packed.table.len().max(1),
            table: gpu.create_f32(OP, &packed.table)?,
            bias,
            input_order: weight.input_order.as_ref().map(|order| DeviceOrder::new(gpu, order)).transpose()?,
        })
    }

    /// K as the words have it.
    pub(crate) fn padded_in(&self) -> usize {
        if self.decoder.is_trellis() { self.in_features.next_multiple_of(HADAMARD) } else { self.in_features }
    }

    /// N as the words have it.
    pub(crate) fn padded_out(&self) -> usize {
        if self.decoder.is_trellis() { self.out_features.next_multiple_of(HADAMARD) } else { self.out_features }
    }

    /// Units along K, the last one possibly padded.
    pub(crate) fn units(&self) -> usize {
        self.padded_in().div_ceil(self.decoder.unit())
    }
}

/// A weight's bytes in the layout of [`GpuWeight`].
pub(crate) fn pack(weight: &Weight) -> Result<Packed> {
    match &weight.data {
        WeightData::Dense(tensor) => pack_dense(tensor, weight.out_features(), weight.in_features()),
        WeightData::Quantized(matrix) => pack_quantized(matrix),
        WeightData::Exl3(matrix) => Ok(pack_exl3(matrix)),
        WeightData::Grid(matrix) => pack_grid(matrix),
    }
}

/// `[N, K]` to words `[units, N]`, one f32 or two 16-bit values each; an odd last feature is paired with 0.
fn pack_dense(tensor: &HostTensor, n: usize, k: usize) -> Result<Packed> {
    let decoder = Decoder::dense(tensor.dtype());
    let units = k.next_multiple_of(PADDED) / decoder.unit();
    let words = if decoder.unit() == 1 {
        let values = tensor.to_f32()?;
        transposed(n, units, |column, unit| values[column * k..][..k].get(unit).map_or(0, |value| value.to_bits()))
    } else {
        let values = tensor.to_u16_bits()?;
        transposed(n, units, |column, unit| {
            let value = |feature: usize| values[column * k..][..k].get(feature).map_or(0, |&bits| u32::from(bits));
            value(2 * unit) | value(2 * unit + 1) << 16
        })
    };
    let (scales, zeros, table) = (Vec::new(), Vec::new(), Vec::new());
    Ok(Packed { decoder, words, scales, scale_count: 0, zeros, zero_count: 0, table })
}

/// Words `[units, n]` of values that lie column by column, in blocks that stay in a core's cache.
fn transposed(n: usize, units: usize, word: impl Fn(usize, usize) -> u32 + Sync) -> Vec<u32> {
    const BLOCK: usize = 64;
    let mut words = vec![0; units * n];
    words.par_chunks_mut((BLOCK * n).max(1)).enumerate().for_each(|(block, words)| {
        for first in (0..n).step_by(BLOCK) {
            for (i, row) in words.chunks_exact_mut(n).enumerate() {
                for (column, out) in (first..n.min(first + BLOCK)).zip(&mut row[first..]) {
                    *out = word(column, block * BLOCK + i);
                }
            }
        }
    });
    words
}

fn pack_quantized(matrix: &QuantizedMatrix) -> Result<Packed> {
    let decoder = Decoder::quantized(matrix.scheme);
    let format = matrix.scheme.format;
    let (scales, zeros) = match format.scale_kind() {
        ScaleKind::F16 | ScaleKind::F32 => {
            (bytemuck::cast_slice(&matrix.scales).to_vec(), bytemuck::cast_slice(&matrix.zeros).to_vec())
        }
        ScaleKind::E4m3 | ScaleKind::E8m0 => (matrix.scales.iter().map(|&bits| bits as u8).collect(), Vec::new()),
        ScaleKind::F16U8 | ScaleKind::F16I8 => multiplied_out(matrix)?,
    };
    let groups = matrix.scheme.groups(matrix.in_features) * matrix.out_features;
    let table = if decoder.scale == Scale::Byte {
        let value =
            |byte: u16| format.group_from_bits(byte, 0, matrix.tensor_scale).map_or(f32::NAN, |group| group.scale);
        (0..256).map(value).collect()
    } else {
        (0..=255).map(|code| format.value(code, 0.0)).collect()
    };
    Ok(Packed {
        decoder,
        words: pad(&codes(matrix, decoder), decoder, matrix.out_features, matrix.in_features),
        scales,
        scale_count: groups,
        zeros,
        zero_count: if format.shift() == Shift::None { 0 } else { groups },
        table,
    })
}

/// Two-level scales and offsets as the bytes of f32, `[G, N]`.
fn multiplied_out(matrix: &QuantizedMatrix) -> Result<(Vec<u8>, Vec<u8>)> {
    let (mut scales, mut offsets) = (Vec::new(), Vec::new());
    for g in 0..matrix.scheme.groups(matrix.in_features) {
        for n in 0..matrix.out_features {
            let group = matrix.group(n, g)?;
            scales.extend(group.scale.to_le_bytes());
            if matrix.scheme.format.has_offsets() {
                offsets.extend(group.offset.to_le_bytes());
            }
        }
    }
    Ok((scales, offsets))
}

/// The words of the codes in the decoder's layout.
fn codes(matrix: &QuantizedMatrix, decoder: Decoder) -> Cow<'_, [u32]> {
    let (stored, n, k) = (matrix.scheme.format.layout(), matrix.out_features, matrix.in_features);
    match decoder.codes {
        Codes::Packed(layout) if layout != stored => {
            let mut words = vec![0; layout.rows(k) * n];
            let mut column = vec![0; k];
            for i in 0..n {
                stored.load_column(&matrix.codes, n, i, &mut column);
                layout.store_column(&column, &mut words, n, i);
            }
            Cow::Owned(words)
        }
        _ => Cow::Borrowed(&matrix.codes),
    }
}

/// The tiles as words, suh as scales and svh as zero points.
fn pack_exl3(matrix: &Exl3Matrix) -> Packed {
    let trellis = Trellis { bits: matrix.bits as usize, codebook: matrix.codebook };
    Packed {
        decoder: Decoder::trellis(trellis),
        words: matrix.trellis.chunks_exact(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16).collect(),
        scales: bytemuck::cast_slice(&matrix.suh).to_vec(),
        scale_count: matrix.suh.len(),
        zeros: bytemuck::cast_slice(&matrix.svh).to_vec(),
        zero_count: matrix.svh.len(),
        table: trellis.table(),
    }
}

/// Grid codes with the signs folded into codes and scales.
fn pack_grid(matrix: &GridMatrix) -> Result<Packed> {
    let grid = matrix.folded()?;
    let decoder = Decoder::grid(grid.layout, grid.group_size);
    Ok(Packed {
        decoder,
        words: pad(&grid.words, decoder, matrix.out_features, matrix.in_features),
        scales: bytemuck::cast_slice(&grid.scales).to_vec(),
        scale_count: grid.scales.len(),
        zeros: Vec::new(),
        zero_count: 0,
        table: grid.levels.to_vec(),
    })
}

/// Codes of whole units up to a multiple of [`PADDED`] features; those beyond K, of unspecified value, become 0.
fn pad(codes: &[u32], decoder: Decoder, n: usize, k: usize) -> Vec<u32> {
    let Codes::Packed(layout) = decoder.codes else { return codes.to_vec() };
    let mut words = codes.to_vec();
    let valid = k % decoder.unit();
    if valid > 0 && n > 0 {
        // A column of codes of ones, packed.
        let mut masks = vec![0; decoder.words()];
        layout.store_column(&vec![((1u32 << layout.bits()) - 1) as u8; valid], &mut masks, 1, 0);
        let first = words.len() - masks.len() * n;
        for (row, mask) in words[first..].chunks_exact_mut(n).zip(masks) {
            row.iter_mut().for_each(|word| *word &= mask);
        }
    }
    words.resize(k.next_multiple_of(PADDED) / decoder.unit() * decoder.words() * n, 0);
    words
}

#[cfg(test)]
mod tests {
    use marlin_formats::DType;

    use super::*;

    #[test]
    fn dense_words_lie_feature_by_feature() {
        for (n, k) in [(1, 1), (3, 64), (64, 129), (130, 131), (0, 5), (5, 0)] {
            let values: Vec<f32> = (0..n * k).map(|i| i as f32).collect();
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let tensor = HostTensor::from_f32_as(dtype, &[n, k], &values).unwrap();
                let words = pack_dense(&tensor, n, k).unwrap().words;
                let bits = |column: usize, feature: usize| match dtype {
                    _ if feature >= k => 0,
                    DType::F32 => values[column * k + feature].to_bits(),
                    _ => u32::from(tensor.to_u16_bits().unwrap()[column * k + feature]),
                };
                let per_word = 4 / dtype.size_in_bytes();
                assert_eq!(words.len(), k.next_multiple_of(PADDED) / per_word * n, "{dtype:?} [{n}, {k}]");
                for (unit, column) in (0..words.len()).map(|i| (i / n, i % n)) {
                    let low = bits(column, unit * per_word);
                    let high = if per_word == 2 { bits(column, 2 * unit + 1) << 16 } else { 0 };
                    assert_eq!(words[unit * n + column], low | high, "{dtype:?} [{n}, {k}]: unit {unit} of {column}");
                }
            }
        }
    }
}

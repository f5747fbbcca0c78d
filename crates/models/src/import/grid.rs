//! From the codes and scales of an imported module to the native format that holds them without loss.

use half::f16;
use marlin_formats::pack::Layout;
use marlin_formats::{DType, Format, QuantizedMatrix, Scheme, fp8, store_f32};
use marlin_ops::{HostTensor, InputOrder, OpError, Weight};

use super::codes::{pack_native, transpose_bytes, unpack_native};
use super::stored::Stored;
use crate::error::Result;

/// The codes of one module.
pub(super) enum Codes {
    /// Native K-major words `[words, N]` of 2-, 4- or 8-bit codes, LSB first.
    Words(Vec<u32>),
    /// `[N, K]`.
    Unpacked(Vec<u8>),
}

/// Unsigned integer codes and what makes weights of them: `W[n, k] = (q[n, k] - zero[g, n]) * scale[g, n]` with
/// `g = k / group_size`.
pub(super) struct IntGrid {
    pub bits: u32,
    pub out_features: usize,
    pub in_features: usize,
    pub group_size: usize,
    pub codes: Codes,
    /// `[G, N]`.
    pub scales: Vec<f32>,
    /// `[G, N]`, whole numbers.
    pub zeros: Vec<f32>,
    /// The type that the source computes weights in.
    pub dtype: DType,
}

impl IntGrid {
    /// The weight, in the first of these forms that is exact: f16 scales and zero points, f32 scales and offsets, dense
    /// values in the source's dtype. `suffix` names the tensor of codes.
    pub(super) fn into_weight(self, stored: &Stored<'_>, suffix: &str) -> Result<Weight> {
        let refused = stored.refused(suffix);
        let (n, k) = (self.out_features, self.in_features);
        if let Some((format, group_size)) = self.f16_format() {
            let half = |values: &[f32]| values.iter().map(|&v| f16::from_f32(v).to_bits()).collect::<Vec<_>>();
            let scales = half(&self.scales);
            let zeros = if format.has_zeros() { half(&self.zeros) } else { Vec::new() };
            let mut codes = self.codes.pack(self.bits, format.layout(), n, k);
            if format == Format::Int8 {
                // Offset binary to two's complement; rows past K become padding again.
                codes.iter_mut().for_each(|word| *word ^= 0x8080_8080);
                clear_padding(&mut codes, n, k);
            }
            let scheme = Scheme { format, group_size };
            return quantized(scheme, k, n, codes, scales, zeros, None).map_err(refused);
        }
        let group_size = self.group_size;
        match self.exact_offsets() {
            Some(offsets) => {
                let Self { bits, out_features, in_features, codes, scales, dtype, .. } = self;
                let affine = Affine { bits, out_features, in_features, group_size, codes, scales, offsets, dtype };
                affine.into_weight(stored, suffix)
            }
            None => self.dense(stored, suffix, |k| k / group_size),
        }
    }

    /// [`IntGrid::into_weight`] where channel `k` is in group `groups[k]`: the channels of a group become neighbours. Groups that
    /// are not as long as `group_size` says, but for the last, make the weight dense.
    pub(super) fn into_ordered_weight(self, stored: &Stored<'_>, suffix: &str, groups: &[usize]) -> Result<Weight> {
        let mut channels: Vec<usize> = (0..groups.len()).collect();
        channels.sort_by_key(|&k| groups[k]);
        if channels.iter().enumerate().any(|(row, &k)| groups[k] != row / self.group_size) {
            return self.dense(stored, suffix, |k| groups[k]);
        }
        let (bits, n, k) = (self.bits, self.out_features, self.in_features);
        let codes = self.codes.unpack(bits, n, k);
        let sorted = codes.chunks_exact(k).flat_map(|row| channels.iter().map(|&k| row[k])).collect();
        let weight = Self { codes: Codes::Unpacked(sorted), ..self }.into_weight(stored, suffix)?;
        let order = InputOrder::new(channels.into_iter().map(|k| k as u32).collect());
        order.and_then(|order| weight.with_input_order(order)).map_err(stored.refused(suffix))
    }

    /// The values in the source's dtype, rounded once, where channel `k` is in group `group(k)`.
    fn dense(self, stored: &Stored<'_>, suffix: &str, group: impl Fn(usize) -> usize) -> Result<Weight> {
        let (n, k) = (self.out_features, self.in_features);
        let codes = self.codes.unpack(self.bits, n, k);
        let values = decode(&codes, [n, k], group, |q, at| (f32::from(q) - self.zeros[at]) * self.scales[at]);
        dense(stored, suffix, self.dtype, n, k, &values)
    }

    /// The format with f16 scales that holds the grid.
    fn f16_format(&self) -> Option<(Format, usize)> {
        let middle = (1u32 << (self.bits - 1)) as f32;
        let symmetric = self.zeros.iter().all(|&z| z == middle);
        let format = match (self.bits, symmetric) {
            (0..=2, _) => Format::Int2U2,
            (3, _) => Format::Int3U3,
            (4, true) => Format::Int4S4,
            (4, false) => Format::Int4U4,
            // More bits than codes need would cost memory; the forms with 5 and 6 bits have f32 scales.
            (8, true) => Format::Int8,
            (7 | 8, _) => Format::Int8Asym,
            _ => return None,
        };
        let group_size = native_group_size(format, self.group_size, self.in_features)?;
        self.scales.iter().all(|&s| is_f16(s)).then_some((format, group_size))
    }

    /// The f32 offsets of the same weights, if the product and the sum round to the very value.
    fn exact_offsets(&self) -> Option<Vec<f32>> {
        let offset = |(&s, &z): (&f32, &f32)| {
            let offset = 0.0 - z * s;
            let exact = |q: u32| q as f32 * s + offset == (q as f32 - z) * s;
            (0..1u32 << self.bits).all(exact).then_some(offset)
        };
        self.scales.iter().zip(&self.zeros).map(offset).collect()
    }
}

impl Codes {
    fn pack(self, bits: u32, layout: Layout, n: usize, k: usize) -> Vec<u32> {
        match self {
            Codes::Words(words) if layout.bits() == bits => words,
            codes => pack_native(&codes.unpack(bits, n, k), layout, n, k),
        }
    }

    fn unpack(self, bits: u32, n: usize, k: usize) -> Vec<u8> {
        match self {
            Codes::Words(words) => unpack_native(&words, bits, n, k),
            Codes::Unpacked(codes) => codes,
        }
    }
}

/// Codes with an f32 scale and offset a group, `[G, N]`: `q * scale + offset`.
pub(super) struct Affine {
    pub bits: u32,
    pub out_features: usize,
    pub in_features: usize,
    pub group_size: usize,
    pub codes: Codes,
    pub scales: Vec<f32>,
    pub offsets: Vec<f32>,
    /// The type that the source rounds weights to.
    pub dtype: DType,
}

impl Affine {
    /// The weight: native where the group size allows it, else dense values in the source's dtype.
    pub(super) fn into_weight(self, stored: &Stored<'_>, suffix: &str) -> Result<Weight> {
        let (n, k) = (self.out_features, self.in_features);
        let native =
            affine_format(self.bits).and_then(|format| Some((format, native_group_size(format, self.group_size, k)?)));
        if let Some((format, group_size)) = native {
            let codes = self.codes.pack(self.bits, format.layout(), n, k);
            let scheme = Scheme { format, group_size };
            let (scales, offsets) = (halves(&self.scales), halves(&self.offsets));
            return quantized(scheme, k, n, codes, scales, offsets, None).map_err(stored.refused(suffix));
        }
        let codes = self.codes.unpack(self.bits, n, k);
        let value = |q, at: usize| f32::from(q) * self.scales[at] + self.offsets[at];
        let values = decode(&codes, [n, k], |k| k / self.group_size, value);
        dense(stored, suffix, self.dtype, n, k, &values)
    }
}

/// E4M3FN bytes `[N, K]` with one f32 scale a group of `group_size` along K, `[G, N]`: the weight in the first of these
/// forms that holds it: f16 scales, f32 scales, dense f32.
pub(super) fn fp8_weight(
    stored: &Stored<'_>,
    suffix: &str,
    [n, k]: [usize; 2],
    group_size: usize,
    bytes: &[u8],
    scales: &[f32],
) -> Result<Weight> {
    if let Some(index) = bytes.iter().position(|b| b & 0x7F == 0x7F) {
        return Err(stored.error(suffix, format!("holds NaN at element {index}; weights must be finite")));
    }
    let f16_scales = scales.iter().all(|&s| is_f16(s));
    let format = if f16_scales { Format::Fp8E4m3 } else { Format::Fp8E4m3F32 };
    if let Some(group_size) = native_group_size(format, group_size, k) {
        let scales = match f16_scales {
            true => scales.iter().map(|&s| f16::from_f32(s).to_bits()).collect(),
            false => halves(scales),
        };
        let codes = transpose_bytes(bytes, n);
        let matrix = quantized(Scheme { format, group_size }, k, n, codes, scales, Vec::new(), None);
        return matrix.map_err(stored.refused(suffix));
    }
    let values = decode(bytes, [n, k], |k| k / group_size, |b, at| fp8::e4m3::decode(b) * scales[at]);
    dense(stored, suffix, DType::F32, n, k, &values)
}

/// `value(code, index)` of every code `[N, K]`, the index that of its group in `[G, N]`: channel `k` is in `group(k)`.
fn decode(
    codes: &[u8],
    [n, k]: [usize; 2],
    group: impl Fn(usize) -> usize,
    value: impl Fn(u8, usize) -> f32,
) -> Vec<f32> {
    let mut values = Vec::with_capacity(n * k);
    for (row, codes) in codes.chunks_exact(k).enumerate() {
        values.extend(codes.iter().enumerate().map(|(i, &code)| value(code, group(i) * n + row)));
    }
    values
}

/// Dense values `[N, K]`, each rounded once to `dtype`; all must stay finite.
pub(super) fn dense(
    stored: &Stored<'_>,
    suffix: &str,
    dtype: DType,
    n: usize,
    k: usize,
    values: &[f32],
) -> Result<Weight> {
    let refused = stored.refused(suffix);
    let tensor = HostTensor::from_f32_as(dtype, &[n, k], values).map_err(&refused)?;
    let rounded = tensor.to_f32().map_err(&refused)?;
    if let Some(index) = rounded.iter().position(|v| !v.is_finite()) {
        let reason = format!("stands for {} at element {index}, beyond {}", values[index], dtype.name());
        return Err(stored.error(suffix, reason));
    }
    Weight::dense(tensor).map_err(refused)
}

/// A native matrix from its K-major parts; zeros or offsets may be empty.
pub(super) fn quantized(
    scheme: Scheme,
    in_features: usize,
    out_features: usize,
    codes: Vec<u32>,
    scales: Vec<u16>,
    zeros: Vec<u16>,
    tensor_scale: Option<f32>,
) -> std::result::Result<Weight, OpError> {
    Weight::quantized(QuantizedMatrix {
        scheme,
        in_features,
        out_features,
        codes,
        scales,
        zeros,
        super_scales: Vec::new(),
        super_minima: Vec::new(),
        tensor_scale,
    })
}

/// The group size to store: as given where it is whole packing units, or one group a column.
pub(super) fn native_group_size(format: Format, group_size: usize, in_features: usize) -> Option<usize> {
    let unit = format.layout().codes_per_unit();
    let group_size = if group_size >= in_features { in_features.next_multiple_of(unit) } else { group_size };
    format.check_group_size(group_size).is_ok().then_some(group_size)
}

fn affine_format(bits: u32) -> Option<Format> {
    Some(match bits {
        1 | 2 => Format::Affine2,
        3 => Format::Affine3,
        4 => Format::Affine4,
        5 => Format::Affine5,
        6 => Format::Affine6,
        7 | 8 => Format::Affine8,
        _ => return None,
    })
}

/// Whether a value is exactly an f16.
pub(super) fn is_f16(value: f32) -> bool {
    f16::from_f32(value).to_f32() == value
}

/// f32 values as pairs of halves, the low one first.
pub(super) fn halves(values: &[f32]) -> Vec<u16> {
    let mut words = vec![0; 2 * values.len()];
    values.iter().enumerate().for_each(|(i, &v)| store_f32(&mut words, i, v));
    words
}

/// Zeroes the bytes of rows `k..` of the last words.
fn clear_padding(words: &mut [u32], n: usize, k: usize) {
    if !k.is_multiple_of(4) {
        let kept = (1u32 << (8 * (k % 4))) - 1;
        let last = words.len() - n;
        words[last..].iter_mut().for_each(|word| *word &= kept);
    }
}

//! Weights for the cases: every code, irregular scales and zeros, garbage in the padding.

use std::fmt;

use half::f16;
use marlin_formats::exl3::{Codebook, Exl3Matrix, HADAMARD, tile};
use marlin_formats::grid::{self, GridMatrix};
use marlin_formats::{DType, Format, QuantizedMatrix, ScaleKind, Scheme, Shift, store_f32};
use marlin_ops::{HostTensor, InputOrder, Result, Weight, WeightData};

use crate::random::Random;

/// How a weight is stored.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Storage {
    Dense(DType),
    Quantized(Format, usize),
    /// Quantized, with rows in the order of this number.
    Ordered(Format, usize, u32),
    Exl3(Codebook, u32),
    /// Bits and group size.
    Grid(u32, usize),
}

impl Storage {
    /// Whether activations are rotated, which backends may round.
    pub(crate) fn rotates(&self) -> bool {
        matches!(self, Storage::Exl3(..))
    }

    /// The order of its rows, if it has one of its own.
    pub(crate) fn input_order(&self, k: usize) -> Option<InputOrder> {
        match self {
            Storage::Ordered(_, _, number) => Some(input_order(*number, k)),
            _ => None,
        }
    }
}

impl fmt::Display for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Storage::Dense(dtype) => write!(f, "{}", dtype.name().to_lowercase()),
            Storage::Quantized(format, group_size) => write!(f, "{format}:g{group_size}"),
            Storage::Ordered(format, group_size, order) => write!(f, "{format}:g{group_size}:order{order}"),
            Storage::Exl3(codebook, bits) => write!(f, "exl3:{}:{bits}", codebook.name()),
            Storage::Grid(bits, group_size) => write!(f, "grid:{bits}:g{group_size}"),
        }
    }
}

/// Which group scales are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scales {
    /// Around 1/32.
    Usual,
    /// As usual, every other group 0.
    SomeZero,
    /// The largest that the stored type has (2^60 for E8M0 and f32, to stay inside f32).
    Large,
    /// The smallest ones (2^-117 for E8M0 and 2^-80 for f32, where products are still normal).
    Tiny,
}

pub(crate) const DENSE: [Storage; 3] =
    [Storage::Dense(DType::F32), Storage::Dense(DType::F16), Storage::Dense(DType::BF16)];

/// Group sizes that the cases use with a format.
pub(crate) fn group_sizes(format: Format) -> Vec<usize> {
    let sizes = [16, 32, 64, 128, 256, 24, 96];
    sizes.into_iter().filter(|&g| format.check_group_size(g).is_ok()).collect()
}

/// A random `[n, k]` weight.
pub(crate) fn random_weight(
    storage: Storage,
    n: usize,
    k: usize,
    scales: Scales,
    random: &mut Random,
) -> Result<Weight> {
    match storage {
        Storage::Dense(dtype) => {
            let values: Vec<f32> = random.normals(n * k).iter().map(|v| v / 8.0).collect();
            Weight::dense(HostTensor::from_f32_as(dtype, &[n, k], &values)?)
        }
        Storage::Grid(bits, group_size) => Weight::grid(grid_matrix(bits, group_size, [n, k], scales, random)?),
        Storage::Quantized(format, group_size) => {
            let mut code = |_: usize, _: usize| finite_code(format, random.word());
            let codes: Vec<Vec<u8>> = (0..n).map(|n| (0..k).map(|k| code(n, k)).collect()).collect();
            Weight::quantized(matrix(format, group_size, &codes, scales, random)?)
        }
        Storage::Ordered(format, group_size, order) => {
            let weight = random_weight(Storage::Quantized(format, group_size), n, k, scales, random)?;
            weight.with_input_order(input_order(order, k))
        }
        Storage::Exl3(codebook, bits) => {
            // Every stream of bits is a tile. Outputs in the padding have scales too: they must not matter.
            let (padded_k, padded_n) = (k.next_multiple_of(HADAMARD), n.next_multiple_of(HADAMARD));
            let words = padded_k / tile::SIDE * (padded_n / tile::SIDE) * tile::words(bits);
            let mut scale = |size: f32| {
                let magnitude = size * (0.75 + 0.5 * random.unit());
                f16::from_f32(if random.below(2) == 0 { magnitude } else { -magnitude }).to_bits()
            };
            let suh = (0..padded_k).map(|_| scale(1.0 / 8.0)).collect();
            let mut svh: Vec<u16> = (0..padded_n).map(|_| scale(1.0)).collect();
            // An output that is its bias.
            svh[n / 2] = if n > 2 { 0 } else { svh[n / 2] };
            let trellis = (0..words).map(|_| random.word() as u16).collect();
            Weight::exl3(Exl3Matrix { codebook, bits, in_features: k, out_features: n, trellis, suh, svh })
        }
    }
}

/// Order `number` of k channels, whatever the weight.
fn input_order(number: u32, k: usize) -> InputOrder {
    InputOrder::new(Random::of(&format!("order {number} of {k}")).distinct(k, k)).expect("channels are distinct")
}

/// Random codes, padding included, signs and grid.
fn grid_matrix(
    bits: u32,
    group_size: usize,
    [n, k]: [usize; 2],
    scales: Scales,
    random: &mut Random,
) -> Result<GridMatrix> {
    let bytes = k.div_ceil(grid::SIDE) * n.div_ceil(grid::SIDE) * grid::tile_bytes(bits);
    // Values are of about the same size at every rate.
    let step = 8.0 / (1u32 << bits) as f32;
    let mut scale = |i: usize| match scales {
        Scales::SomeZero if i % 2 == 1 => 0.0,
        _ => (0.5 + random.unit()) / 32.0 * step * magnitude(scales),
    };
    let scales = (0..k.div_ceil(group_size) * n).map(&mut scale).collect();
    let tiles = (0..bytes).map(|_| random.word() as u8).collect();
    let mut signs = |count: usize| (0..count).map(|_| if random.below(2) == 0 { 1.0 } else { -1.0 }).collect();
    let (su, sv) = (signs(k), signs(n));
    let factor = [1.0, grid::CODEBOOK_FACTOR][random.below(2)];
    let grid = grid::uniform(bits, factor)?;
    Ok(GridMatrix { bits, in_features: k, out_features: n, group_size, tiles, scales, su, sv, grid })
}

/// `|code part| + |offset|` of every weight, `[n, k]`; just `|w|` in formats without offsets.
pub(crate) fn sizes_of_parts(weight: &Weight) -> Result<Vec<f32>> {
    let WeightData::Quantized(matrix) = &weight.data else { return weight.to_f32() };
    let (n, k) = (matrix.out_features, matrix.in_features);
    let mut w = matrix.decode()?;
    for (n, row) in w.chunks_exact_mut(k).enumerate() {
        for (g, group) in row.chunks_mut(matrix.scheme.group_size).enumerate() {
            let offset = matrix.group(n, g)?.offset;
            group.iter_mut().for_each(|w| *w = (*w - offset).abs() + offset.abs());
        }
    }
    let w = Weight::dense(HostTensor::from_f32(&[n, k], &w)?)?;
    match &weight.input_order {
        Some(order) => w.with_input_order(order.clone())?.to_f32(),
        None => w.to_f32(),
    }
}

/// A weight in which every input feature k meets every code: `code(n, k) = (n + k) mod codes`.
pub(crate) fn all_codes(format: Format, k: usize, random: &mut Random) -> Result<Weight> {
    let codes = 1u32 << format.code_bits();
    let columns: Vec<Vec<u8>> =
        (0..codes).map(|n| (0..k as u32).map(|k| finite_code(format, n + k)).collect()).collect();
    let group_size = group_sizes(format)[0];
    Weight::quantized(matrix(format, group_size, &columns, Scales::Usual, random)?)
}

/// The code of these bits, or 1 where they stand for NaN or infinity.
fn finite_code(format: Format, bits: u32) -> u8 {
    let code = (bits & ((1 << format.code_bits()) - 1)) as u8;
    if format.value(code, 0.0).is_finite() { code } else { 1 }
}

/// Packs `codes[n][k]` with random groups; padding gets random bits, NaN codes included.
fn matrix(
    format: Format,
    group_size: usize,
    codes: &[Vec<u8>],
    scales: Scales,
    random: &mut Random,
) -> Result<QuantizedMatrix> {
    let scheme = Scheme::new(format, group_size)?;
    let (n, k) = (codes.len(), codes[0].len());
    let layout = format.layout();
    let mut words = vec![0; scheme.code_rows(k) * n];
    for (column, codes) in codes.iter().enumerate() {
        let mut padded = codes.clone();
        let mask = (1u32 << format.code_bits()) - 1;
        padded.resize_with(k.next_multiple_of(layout.codes_per_unit()), || {
            (random.word() & mask) as u8 | mask as u8 >> 1
        });
        layout.store_column(&padded, &mut words, n, column);
    }
    let (groups, blocks) = (scheme.groups(k) * n, scheme.super_blocks(k) * n);
    let (has_shifts, offsets) = (format.shift() != Shift::None, format.has_offsets());
    Ok(QuantizedMatrix {
        scheme,
        in_features: k,
        out_features: n,
        codes: words,
        scales: (0..groups).flat_map(|i| scale_words(format, scales, i, random)).collect(),
        zeros: match has_shifts {
            true => (0..groups).flat_map(|_| shift_words(format, scales, random)).collect(),
            false => Vec::new(),
        },
        super_scales: (0..blocks).map(|_| super_bits(scales, random)).collect(),
        super_minima: match offsets {
            true => (0..blocks).map(|_| super_bits(scales, random)).collect(),
            false => Vec::new(),
        },
        tensor_scale: (format == Format::Nvfp4).then_some(37.5),
    })
}

/// The stored words of a group's scale.
fn scale_words(format: Format, scales: Scales, index: usize, random: &mut Random) -> Vec<u16> {
    let small = random.below(4) as u16;
    let bits = match (format.scale_kind(), scales) {
        (ScaleKind::F32, Scales::SomeZero) if index % 2 == 1 => return vec![0; 2],
        (_, Scales::SomeZero) if index % 2 == 1 && format.scale_kind() != ScaleKind::E8m0 => 0,
        (ScaleKind::F16, Scales::Large) => 0x7BFF - small,
        (ScaleKind::F16, Scales::Tiny) => 1 + small,
        (ScaleKind::F16, _) => f16::from_f32((0.5 + random.unit()) / 32.0).to_bits(),
        (ScaleKind::F32, _) => return halves((0.5 + random.unit()) / 32.0 * magnitude(scales)),
        (ScaleKind::E4m3, Scales::Large) => 0x7E - small,
        (ScaleKind::E4m3, Scales::Tiny) => 1 + small,
        (ScaleKind::E4m3, _) => 0x20 + random.below(0x30) as u16,
        (ScaleKind::E8m0, Scales::Large) => 187 - small,
        (ScaleKind::E8m0, Scales::Tiny) => 10 + small,
        // E8M0 has no zero.
        (ScaleKind::E8m0, _) => 118 + small,
        // Of both signs where it is two's complement.
        (ScaleKind::F16U8 | ScaleKind::F16I8, _) => random.below(256) as u16,
    };
    vec![bits]
}

/// The stored words of a zero point in steps of 1/8, of a minimum's byte, or of an offset of about half the levels.
fn shift_words(format: Format, scales: Scales, random: &mut Random) -> Vec<u16> {
    let levels = (1usize << format.code_bits()) - 1;
    let offset = |random: &mut Random| -(random.unit() * levels as f32) / 32.0;
    match (format.scale_kind(), format.has_offsets()) {
        (_, false) => vec![f16::from_f32(random.below(8 * levels) as f32 / 8.0).to_bits()],
        (ScaleKind::F16, true) => vec![f16::from_f32(offset(random)).to_bits()],
        (ScaleKind::F32, true) => halves(offset(random) * magnitude(scales)),
        (_, true) => vec![random.below(256) as u16],
    }
}

/// f16 bits that bytes are multiplied with.
fn super_bits(scales: Scales, random: &mut Random) -> u16 {
    let small = random.below(4) as u16;
    match scales {
        Scales::Large => 0x7BFF - small,
        Scales::Tiny => 1 + small,
        _ => f16::from_f32((0.5 + random.unit()) / 4096.0).to_bits(),
    }
}

/// What f32 scales are multiplied with: products and their differences stay normal.
fn magnitude(scales: Scales) -> f32 {
    match scales {
        Scales::Large => 2f32.powi(60),
        Scales::Tiny => 2f32.powi(-80),
        _ => 1.0,
    }
}

/// The two words of an f32.
fn halves(value: f32) -> Vec<u16> {
    let mut words = vec![0; 2];
    store_f32(&mut words, 0, value);
    words
}

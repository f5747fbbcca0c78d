//! The weight layout: tiles of sixteen output columns, repacked once at load. A line holds one code word, scale or value
//! for each column of a tile, so a lane is a column and no kernel sums across lanes.
//!
//! - codes: `[tiles][code_rows][16]` u32, the native words; rows are padded to whole blocks of 32 input features;
//! - scales, zeros and offsets: `[tiles][groups][16]` in their stored type;
//! - dense values: `[tiles][K][16]` in the stored dtype;
//! - EXL3: see [`exl3`]; grid codes: see [`grid`].
//!
//! Padding columns hold zeros. The last word of a planar unit is stored with its bits in the layout's [`CodeOrder`], so
//! that high bits meet their low bits with shifts alone.

pub(crate) mod exl3;
pub(crate) mod grid;

use std::ops::Range;

use bytemuck::Zeroable;
use half::f16;
use marlin_formats::pack::Layout;
use marlin_formats::{DType, Levels, QuantizedMatrix, SUPER_BLOCK, ScaleKind, Scheme, Shift, load_f32};
use marlin_ops::activation::ACTIVATION_BLOCK;
use marlin_ops::{ExpertWeights, HostTensor, InputOrder, OpError, Result, Weight, WeightData};

use self::exl3::{Exl3, SPAN};
use self::grid::Grid;
use crate::Cpu;
use crate::arena::Array;
use crate::pool::Pool;
use crate::simd::{LANES, Line};

/// A linear layer in column tiles.
pub struct PackedWeight {
    pub(crate) in_features: usize,
    pub(crate) out_features: usize,
    pub(crate) values: Values,
    pub(crate) bias: Option<Vec<f32>>,
    /// The channels that products read, if not one after the other.
    pub(crate) input_order: Option<InputOrder>,
}

/// The routed experts of a layer.
pub struct PackedExperts(pub(crate) Vec<PackedExpert>);

/// The three projections of one expert. Gate and up read channels in the same order.
pub(crate) struct PackedExpert {
    pub(crate) gate: PackedWeight,
    pub(crate) up: PackedWeight,
    pub(crate) down: PackedWeight,
}

impl PackedExpert {
    /// Tiles of the hidden vector that are computed together.
    pub(crate) fn hidden_step(&self) -> usize {
        self.gate.step().max(self.up.step())
    }
}

/// Stored values of a weight.
pub(crate) enum Values {
    F32(Array<Line<f32>>),
    F16(Array<[u16; LANES]>),
    BF16(Array<[u16; LANES]>),
    Quantized(Box<Quantized>),
    Exl3(Exl3),
    Grid(Grid),
}

/// Codes, scales and zeros of a weight.
pub(crate) struct Quantized {
    pub(crate) scheme: Scheme,
    /// Lines of codes per tile.
    pub(crate) code_rows: usize,
    /// Lines of scales per tile.
    pub(crate) groups: usize,
    pub(crate) codes: Array<Line<u32>>,
    pub(crate) scales: Scales,
    /// Zero points or offsets, where the format has them.
    pub(crate) shifts: Option<Scales>,
    /// Value of a code at zero point 0, by its low four bits; formats of at most four bits.
    pub(crate) levels: [f32; LANES],
    /// How bytes become levels; 8-bit floats only.
    pub(crate) byte_floats: Option<ByteFloats>,
}

/// How 8-bit floats become levels.
pub(crate) enum ByteFloats {
    /// All are finite: their bits are those of an f32 with another exponent bias.
    Finite,
    /// Some are not: the value of each byte.
    Table(Box<[f32; 256]>),
}

impl ByteFloats {
    fn new(matrix: &QuantizedMatrix) -> Option<Self> {
        let format = matrix.scheme.format;
        if !matches!(format.levels(), Levels::E4m3 | Levels::E5m2) {
            return None;
        }
        let table: [f32; 256] = std::array::from_fn(|code| format.value(code as u8, 0.0));
        // Codes that are no numbers are those that have all of these bits.
        let spoilt = (0..=u8::MAX).filter(|&code| !table[usize::from(code)].is_finite());
        let bits = u32::from_le_bytes([spoilt.fold(u8::MAX, |all, code| all & code); 4]);
        // A word with such a code lacks none of them in that byte.
        let lacking = |word: &u32| !word & bits;
        let has_zero_byte = |word: u32| word.wrapping_sub(0x0101_0101) & !word & 0x8080_8080;
        let is_finite = |words: &[u32]| words.iter().map(lacking).fold(0, |all, word| all | has_zero_byte(word)) == 0;
        Some(if matrix.codes.chunks(1024).all(is_finite) { Self::Finite } else { Self::Table(Box::new(table)) })
    }
}

/// Group scales, zero points or offsets.
pub(crate) enum Scales {
    /// f16 bits.
    F16(Array<[u16; LANES]>),
    F32(Array<Line<f32>>),
    /// Bytes, two's complement where `signed`, times the f16 bits of their super-blocks of `2^shift` groups.
    TwoLevel {
        bytes: Array<[u8; LANES]>,
        signed: bool,
        supers: Array<[u16; LANES]>,
        shift: u32,
    },
    /// Bytes with the multiplier that each stands for (tensor scale included).
    Byte {
        bytes: Array<[u8; LANES]>,
        table: Box<[f32; 256]>,
    },
}

/// Where the codes of a block of 32 input features come to lie when its words are split into eight vectors of four
/// bytes per column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CodeOrder {
    /// 4-bit words: even codes of a word, then odd ones.
    Nibbles,
    /// 8-bit words: as stored.
    Bytes,
    /// 2-bit words: every fourth code, four times.
    Pairs,
}

impl CodeOrder {
    /// All orders.
    pub(crate) const ALL: [Self; 3] = [Self::Nibbles, Self::Bytes, Self::Pairs];

    /// The input feature, within its block of 32, of byte `b` of vector `v`.
    pub(crate) const fn feature(self, v: usize, b: usize) -> usize {
        match self {
            Self::Nibbles => 8 * (v / 2) + 2 * b + v % 2,
            Self::Bytes => 4 * v + b,
            Self::Pairs => 16 * (v / 4) + 4 * b + v % 4,
        }
    }

    /// The order of a packing.
    pub(crate) fn of(layout: Layout) -> Self {
        match layout {
            Layout::Bits4 | Layout::Planar5 | Layout::Planar6 => Self::Nibbles,
            Layout::Bits8 => Self::Bytes,
            Layout::Bits2 | Layout::Planar3 => Self::Pairs,
        }
    }
}

impl PackedWeight {
    /// Repacks a host weight for a device.
    pub(crate) fn new(cpu: &Cpu, weight: Weight) -> Result<Self> {
        let (in_features, out_features) = (weight.in_features(), weight.out_features());
        let values = match weight.data {
            WeightData::Dense(tensor) => pack_dense(cpu, &tensor, out_features, in_features)?,
            WeightData::Quantized(matrix) => Values::Quantized(Box::new(pack_quantized(cpu, matrix)?)),
            WeightData::Exl3(matrix) => {
                matrix.validate()?;
                Values::Exl3(Exl3::new(cpu, &matrix)?)
            }
            WeightData::Grid(matrix) => Values::Grid(Grid::new(cpu, &matrix)?),
        };
        Ok(Self { in_features, out_features, values, bias: weight.bias, input_order: weight.input_order })
    }

    /// Addresses of the large arrays that products read, from tile `tile` on.
    pub(crate) fn addresses(&self, tile: usize) -> [Range<usize>; 3] {
        let line = tile * self.in_features;
        match &self.values {
            Values::F32(lines) => [addresses(&lines[line..]), 0..0, 0..0],
            Values::F16(lines) | Values::BF16(lines) => [addresses(&lines[line..]), 0..0, 0..0],
            Values::Quantized(q) => {
                let group = tile * q.groups;
                let shifts = q.shifts.as_ref().map_or(0..0, |shifts| shifts.addresses(group));
                [addresses(&q.codes[tile * q.code_rows..]), q.scales.addresses(group), shifts]
            }
            Values::Exl3(q) => [addresses(q.words_from(tile)), 0..0, 0..0],
            Values::Grid(q) => [addresses(q.codes_from(tile)), addresses(&q.scales[tile * q.groups..]), 0..0],
        }
    }

    /// Tiles of sixteen output columns.
    pub(crate) fn tiles(&self) -> usize {
        self.out_features.div_ceil(LANES)
    }

    /// Tiles that are computed together whatever they belong to.
    pub(crate) fn step(&self) -> usize {
        match &self.values {
            Values::Exl3(_) => SPAN,
            _ => 1,
        }
    }

    /// Input features of the stored matrix.
    pub(crate) fn stored_features(&self) -> usize {
        match &self.values {
            Values::Exl3(q) => q.suh.len(),
            _ => self.in_features,
        }
    }

    /// Whether tiles of both can be computed together, for the same rows: quantized in the same way.
    pub(crate) fn pairs_with(&self, other: &Self) -> bool {
        match (&self.values, &other.values) {
            (Values::Quantized(a), Values::Quantized(b)) => a.scheme == b.scheme && a.code_rows == b.code_rows,
            _ => false,
        }
    }

    /// Bytes held by the repacked values, their order and the bias.
    pub fn size_in_bytes(&self) -> usize {
        let values = match &self.values {
            Values::F32(lines) => size_of_val(&lines[..]),
            Values::F16(lines) | Values::BF16(lines) => size_of_val(&lines[..]),
            Values::Quantized(q) => {
                let shifts = q.shifts.as_ref().map_or(0, Scales::size_in_bytes);
                size_of_val(&q.codes[..]) + q.scales.size_in_bytes() + shifts
            }
            Values::Exl3(q) => q.size_in_bytes(),
            Values::Grid(q) => q.size_in_bytes(),
        };
        let order = self.input_order.as_ref().map_or(0, |order| size_of_val(order.channels()));
        values + order + self.bias.as_ref().map_or(0, |b| size_of_val(&b[..]))
    }

    /// Bias of a tile's columns, 0 where there is none.
    pub(crate) fn bias_line(&self, tile: usize) -> [f32; LANES] {
        let mut line = [0.0; LANES];
        if let Some(bias) = &self.bias {
            let columns = self.columns(tile);
            line[..columns].copy_from_slice(&bias[tile * LANES..][..columns]);
        }
        line
    }

    /// Columns of a tile that exist.
    pub(crate) fn columns(&self, tile: usize) -> usize {
        (self.out_features - tile * LANES).min(LANES)
    }

    /// Decodes output column `n` into `out` (K values).
    pub(crate) fn column(&self, n: usize, out: &mut [f32]) {
        let (tile, lane, k) = (n / LANES, n % LANES, self.in_features);
        match &self.values {
            Values::F32(lines) => {
                for (out, line) in out.iter_mut().zip(&lines[tile * k..]) {
                    *out = line.0[lane];
                }
            }
            Values::F16(lines) => {
                for (out, line) in out.iter_mut().zip(&lines[tile * k..]) {
                    *out = f16::from_bits(line[lane]).to_f32();
                }
            }
            Values::BF16(lines) => {
                for (out, line) in out.iter_mut().zip(&lines[tile * k..]) {
                    *out = f32::from_bits(u32::from(line[lane]) << 16);
                }
            }
            Values::Quantized(q) => q.column(tile, lane, out),
            Values::Exl3(q) => q.column(n, out),
            Values::Grid(q) => q.column(tile, lane, out),
        }
    }
}

impl Quantized {
    /// Lines of codes of a tile.
    pub(crate) fn tile_codes(&self, tile: usize) -> &[Line<u32>] {
        &self.codes[tile * self.code_rows..][..self.code_rows]
    }

    fn column(&self, tile: usize, lane: usize, out: &mut [f32]) {
        let format = self.scheme.format;
        let layout = format.layout();
        let (unit, words) = (layout.codes_per_unit(), layout.words_per_unit());
        let codes = self.tile_codes(tile);
        for (g, out) in out.chunks_mut(self.scheme.group_size).enumerate() {
            let line = tile * self.groups + g;
            let scale = self.scales.value(line, lane);
            let shift = self.shifts.as_ref().map(|shifts| shifts.value(line, lane));
            let (zero, offset) = match format.has_offsets() {
                true => (0.0, shift),
                false => (shift.unwrap_or(0.0), None),
            };
            for (i, out) in out.iter_mut().enumerate() {
                let k = g * self.scheme.group_size + i;
                let code = unit_code(layout, |w| codes[k / unit * words + w].0[lane], k % unit);
                let product = format.value(code as u8, zero) * scale;
                *out = offset.map_or(product, |offset| product + offset);
            }
        }
    }
}

impl Scales {
    /// The value of a column in group line `line`.
    fn value(&self, line: usize, lane: usize) -> f32 {
        match self {
            Scales::F16(lines) => f16::from_bits(lines[line][lane]).to_f32(),
            Scales::F32(lines) => lines[line].0[lane],
            Scales::Byte { bytes, table } => table[usize::from(bytes[line][lane])],
            Scales::TwoLevel { bytes, signed, supers, shift } => {
                let byte = bytes[line][lane];
                let factor = if *signed { f32::from(byte as i8) } else { f32::from(byte) };
                f16::from_bits(supers[line >> shift][lane]).to_f32() * factor
            }
        }
    }

    /// Addresses of the numbers of the groups from group line `line` on.
    fn addresses(&self, line: usize) -> Range<usize> {
        match self {
            Scales::F16(lines) => addresses(&lines[line..]),
            Scales::F32(lines) => addresses(&lines[line..]),
            Scales::Byte { bytes, .. } | Scales::TwoLevel { bytes, .. } => addresses(&bytes[line..]),
        }
    }

    fn size_in_bytes(&self) -> usize {
        match self {
            Scales::F16(lines) => size_of_val(&lines[..]),
            Scales::F32(lines) => size_of_val(&lines[..]),
            Scales::Byte { bytes, .. } => size_of_val(&bytes[..]),
            Scales::TwoLevel { bytes, supers, .. } => size_of_val(&bytes[..]) + size_of_val(&supers[..]),
        }
    }
}

fn addresses<T>(elements: &[T]) -> Range<usize> {
    let range = elements.as_ptr_range();
    range.start.addr()..range.end.addr()
}

/// Code `i` of a repacked unit; bits above it are not cleared where units are single words.
fn unit_code(layout: Layout, word: impl Fn(usize) -> u32, i: usize) -> u32 {
    let (low, high) = (layout.low_bits() as usize, layout.high_bits());
    let code = word(i * low / 32) >> (i * low % 32);
    if high == 0 {
        return code;
    }
    let bits = word(layout.words_per_unit() - 1) >> high_position(layout, i) & ((1 << high) - 1);
    code & ((1 << low) - 1) | bits << low
}

/// Where the high bits of code `i` of a unit lie in its repacked last word: byte b holds those of the codes that come to
/// byte b of the vectors of the layout's [`CodeOrder`].
pub(crate) const fn high_position(layout: Layout, i: usize) -> usize {
    let (v, b) = match layout {
        Layout::Planar3 => (4 * (i / 16) + i % 4, i % 16 / 4),
        _ => (2 * (i / 8) + i % 2, i % 8 / 2),
    };
    8 * b + layout.high_bits() as usize * v
}

fn pack_dense(cpu: &Cpu, tensor: &HostTensor, n: usize, k: usize) -> Result<Values> {
    let lines = n.div_ceil(LANES) * k;
    let bytes = tensor.bytes();
    match tensor.dtype() {
        DType::F32 => {
            let mut out = cpu.arena.zeros::<Line<f32>>(lines)?;
            transpose(&cpu.pool, bytes, k, &mut out, |line, lane, v| {
                line.0[lane] = f32::from_le_bytes(v);
            });
            Ok(Values::F32(out))
        }
        dtype @ (DType::F16 | DType::BF16) => {
            let mut out = cpu.arena.zeros::<[u16; LANES]>(lines)?;
            transpose(&cpu.pool, bytes, k, &mut out, |line, lane, v| {
                line[lane] = u16::from_le_bytes(v);
            });
            Ok(match dtype {
                DType::F16 => Values::F16(out),
                _ => Values::BF16(out),
            })
        }
        found => Err(OpError::DType { operation: "weight", operand: "values", found, expected: "F32, F16 or BF16" }),
    }
}

/// Writes element (n, k) of a row-major `[N, K]` matrix to lane n % 16 of line k of tile n / 16.
fn transpose<const SIZE: usize, L: Send>(
    pool: &Pool,
    bytes: &[u8],
    k: usize,
    out: &mut [L],
    set: impl Fn(&mut L, usize, [u8; SIZE]) + Sync + Send,
) {
    let (elements, _) = bytes.as_chunks::<SIZE>();
    pool.for_chunks(out, k, |tile, lines| {
        let rows = elements[tile * LANES * k..].chunks_exact(k.max(1));
        for (lane, row) in rows.take(LANES).enumerate() {
            for (line, &v) in lines.iter_mut().zip(row) {
                set(line, lane, v);
            }
        }
    });
}

fn pack_quantized(cpu: &Cpu, mut matrix: QuantizedMatrix) -> Result<Quantized> {
    let (scheme, n, k) = (matrix.scheme, matrix.out_features, matrix.in_features);
    let format = scheme.format;
    let blocks = k.div_ceil(ACTIVATION_BLOCK);
    let code_rows = format.layout().rows(blocks * ACTIVATION_BLOCK);
    // Whole blocks of 32, or of 256 with two-level scales, also where a block has several groups.
    let block = if format.scale_kind().is_two_level() { SUPER_BLOCK } else { ACTIVATION_BLOCK };
    let groups = scheme.groups(k).next_multiple_of(block.div_ceil(scheme.group_size));
    let byte_floats = ByteFloats::new(&matrix);
    // Given back before there is room for scales too: the largest matrix decides how much memory loading takes.
    let words = std::mem::take(&mut matrix.codes);
    let codes = tile_codes(cpu, &words, n, format.layout(), code_rows)?;
    drop(words);
    let mask = (1u32 << format.code_bits().min(4)) - 1;
    Ok(Quantized {
        scheme,
        code_rows,
        groups,
        codes,
        scales: tile_scales(cpu, &matrix, &matrix.scales, &matrix.super_scales, groups)?,
        shifts: match format.shift() {
            Shift::None => None,
            // Minima are negative offsets.
            Shift::Zero | Shift::Offset => {
                let supers: Vec<u16> = matrix.super_minima.iter().map(|bits| bits ^ 0x8000).collect();
                Some(tile_scales(cpu, &matrix, &matrix.zeros, &supers, groups)?)
            }
        },
        levels: std::array::from_fn(|i| format.value((i as u32 & mask) as u8, 0.0)),
        byte_floats,
    })
}

/// Native words `[rows, N]` in column tiles, `code_rows` lines each.
fn tile_codes(cpu: &Cpu, words: &[u32], n: usize, layout: Layout, code_rows: usize) -> Result<Array<Line<u32>>> {
    let mut codes = cpu.arena.zeros::<Line<u32>>(n.div_ceil(LANES) * code_rows)?;
    cpu.pool.for_chunks(&mut codes, code_rows, |tile, lines| {
        let rows = words.chunks_exact(n);
        for (r, (line, row)) in lines.iter_mut().zip(rows).enumerate() {
            let row = &row[tile * LANES..n.min((tile + 1) * LANES)];
            line.0[..row.len()].copy_from_slice(row);
            if layout.high_bits() > 0 && (r + 1) % layout.words_per_unit() == 0 {
                line.0 = line.0.map(|word| reorder_high_bits(layout, word));
            }
        }
    });
    Ok(codes)
}

/// Scales, zero points or offsets in column tiles, `groups` lines each.
fn tile_scales(cpu: &Cpu, matrix: &QuantizedMatrix, stored: &[u16], supers: &[u16], groups: usize) -> Result<Scales> {
    let n = matrix.out_features;
    let kind = matrix.scheme.format.scale_kind();
    let set = |line: &mut [u16; LANES], lane: usize, v| line[lane] = v;
    let set_byte = |line: &mut [u8; LANES], lane: usize, v| line[lane] = v as u8;
    Ok(match kind {
        ScaleKind::F16 => Scales::F16(tile_rows(cpu, stored, n, groups, set)?),
        ScaleKind::E4m3 | ScaleKind::E8m0 => {
            Scales::Byte { bytes: tile_rows(cpu, stored, n, groups, set_byte)?, table: scale_table(matrix)? }
        }
        ScaleKind::F32 => {
            let (pairs, _) = stored.as_chunks::<2>();
            Scales::F32(tile_rows(cpu, pairs, n, groups, |line: &mut Line<f32>, lane, pair| {
                line.0[lane] = load_f32(&pair, 0)
            })?)
        }
        ScaleKind::F16U8 | ScaleKind::F16I8 => {
            let per_block = SUPER_BLOCK / matrix.scheme.group_size;
            Scales::TwoLevel {
                bytes: tile_rows(cpu, stored, n, groups, set_byte)?,
                signed: kind == ScaleKind::F16I8,
                supers: tile_rows(cpu, supers, n, groups / per_block, set)?,
                shift: per_block.ilog2(),
            }
        }
    })
}

/// `[G, N]` row-major to `[tiles][groups][16]`, padding zero.
fn tile_rows<V: Copy, L: Zeroable + Copy>(
    cpu: &Cpu,
    source: &[V],
    n: usize,
    groups: usize,
    set: impl Fn(&mut L, usize, V),
) -> Result<Array<L>> {
    let mut out = cpu.arena.zeros::<L>(n.div_ceil(LANES) * groups)?;
    for (g, row) in source.chunks_exact(n).enumerate() {
        for (tile, columns) in row.chunks(LANES).enumerate() {
            let line = &mut out[tile * groups + g];
            for (lane, &v) in columns.iter().enumerate() {
                set(line, lane, v);
            }
        }
    }
    Ok(out)
}

/// The multiplier of each valid scale byte; invalid bytes do not occur in a validated matrix.
fn scale_table(matrix: &QuantizedMatrix) -> Result<Box<[f32; 256]>> {
    let mut table = Box::new([f32::NAN; 256]);
    for &bits in &matrix.scales {
        let entry = &mut table[usize::from(bits & 255)];
        if entry.is_nan() {
            let format = matrix.scheme.format;
            *entry = format.group_from_bits(bits, 0, matrix.tensor_scale)?.scale;
        }
    }
    // Padding columns have byte 0 and must decode to a finite value.
    if table[0].is_nan() {
        table[0] = 0.0;
    }
    Ok(table)
}

fn reorder_high_bits(layout: Layout, word: u32) -> u32 {
    let bits = layout.high_bits() as usize;
    let field = |i: usize| word >> (bits * i) & ((1 << bits) - 1);
    (0..layout.codes_per_unit()).fold(0, |out, i| out | field(i) << high_position(layout, i))
}

impl PackedExperts {
    /// Repacks all experts.
    pub(crate) fn new(cpu: &Cpu, experts: Vec<ExpertWeights>) -> Result<Self> {
        let pack = |expert: ExpertWeights| -> Result<PackedExpert> {
            Ok(PackedExpert {
                gate: PackedWeight::new(cpu, expert.gate)?,
                up: PackedWeight::new(cpu, expert.up)?,
                down: PackedWeight::new(cpu, expert.down)?,
            })
        };
        Ok(Self(experts.into_iter().map(pack).collect::<Result<_>>()?))
    }
}

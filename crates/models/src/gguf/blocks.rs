//! GGUF blocks as native matrices: the same codes, scales and minima, bit for bit, in the K-major layout.

use marlin_formats::fp8::e4m3;
use marlin_formats::{Format, FormatError, Group, QuantizedMatrix, Scheme, StoredGroups};

use super::types::BlockType;

/// Unpacked codes and groups of a matrix, `[N, K]` and `[N, G]`; what a type does not have stays empty.
#[derive(Default)]
struct Parts {
    codes: Vec<u8>,
    /// One f16 a group or super-block.
    scales: Vec<u16>,
    /// One f16 a group or super-block: offsets, or multipliers of `minima`.
    shifts: Vec<u16>,
    /// One byte a group.
    bytes: Vec<u8>,
    /// One byte a group.
    minima: Vec<u8>,
}

/// The matrix `[out_features, in_features]` whose rows, `in_features` long, are the given runs of blocks.
///
/// `tensor_divisor` is what NVFP4's scales are divided by (see [`nvfp4_divisor`]), 1 for the other types.
///
/// # Errors
/// A scale that is not finite, as [`QuantizedMatrix::from_stored`].
///
/// # Panics
/// When a row is shorter than its blocks.
pub(crate) fn matrix<'a>(
    kind: BlockType,
    out_features: usize,
    in_features: usize,
    rows: impl Iterator<Item = &'a [u8]>,
    tensor_divisor: f32,
) -> Result<QuantizedMatrix, FormatError> {
    let mut parts = Parts::default();
    parts.codes.reserve_exact(out_features * in_features);
    let (_, block_bytes) = kind.size();
    for block in rows.flat_map(|row| row.chunks_exact(block_bytes)) {
        parts.push(kind, block);
    }
    let Parts { codes, scales, shifts, bytes, minima } = &parts;
    let (format, group_size) = format(kind);
    let scheme = Scheme::new(format, group_size)?;
    let groups = match kind {
        BlockType::Mxfp4 | BlockType::Nvfp4 => {
            let tensor_scale = (kind == BlockType::Nvfp4).then_some(tensor_divisor);
            let group = |&byte: &u8| format.group_from_bits(u16::from(byte), 0, tensor_scale);
            let groups = bytes.iter().map(group).collect::<Result<Vec<Group>, _>>()?;
            return QuantizedMatrix::from_codes(scheme, in_features, out_features, codes, &groups, tensor_scale);
        }
        _ if bytes.is_empty() => StoredGroups::F16 { scales, shifts },
        _ => StoredGroups::TwoLevel { super_scales: scales, super_minima: shifts, scales: bytes, minima },
    };
    QuantizedMatrix::from_stored(scheme, in_features, out_features, codes, &groups)
}

/// The native format and group of a block type.
fn format(kind: BlockType) -> (Format, usize) {
    match kind {
        BlockType::Q4_0 => (Format::Int4S4, 32),
        BlockType::Q4_1 => (Format::Q4_1, 32),
        BlockType::Q5_0 => (Format::Q5_0, 32),
        BlockType::Q5_1 => (Format::Q5_1, 32),
        BlockType::Q8_0 => (Format::Int8, 32),
        BlockType::Q2K => (Format::Q2K, 16),
        BlockType::Q3K => (Format::Q3K, 16),
        BlockType::Q4K => (Format::Q4K, 32),
        BlockType::Q5K => (Format::Q5K, 32),
        BlockType::Q6K => (Format::Q6K, 16),
        BlockType::Iq4Nl => (Format::Iq4Nl, 32),
        BlockType::Iq4Xs => (Format::Iq4Xs, 32),
        BlockType::Mxfp4 => (Format::Mxfp4, 32),
        BlockType::Nvfp4 => (Format::Nvfp4, 16),
    }
}

/// A divisor of E4M3 block scales that gives, for every one of them, exactly what multiplying with `scale` gives.
pub(crate) fn nvfp4_divisor(scale: f32) -> Option<f32> {
    let divisor = 1.0 / scale;
    let exact = |code: u8| e4m3::decode(code) / divisor == e4m3::decode(code) * scale;
    (divisor.is_finite() && divisor > 0.0 && (0..0x7F).all(exact)).then_some(divisor)
}

impl Parts {
    /// Takes one block apart.
    fn push(&mut self, kind: BlockType, block: &[u8]) {
        let half = |at: usize| u16::from_le_bytes([block[at], block[at + 1]]);
        match kind {
            BlockType::Q4_0 | BlockType::Iq4Nl => {
                self.scales.push(half(0));
                self.nibbles(&block[2..18]);
            }
            BlockType::Q4_1 => {
                self.scales.push(half(0));
                self.shifts.push(half(2));
                self.nibbles(&block[4..20]);
            }
            BlockType::Q5_0 => {
                self.scales.push(half(0));
                self.fifth_bits(&block[2..6], &block[6..22]);
            }
            BlockType::Q5_1 => {
                self.scales.push(half(0));
                self.shifts.push(half(2));
                self.fifth_bits(&block[4..8], &block[8..24]);
            }
            BlockType::Q8_0 => {
                self.scales.push(half(0));
                self.codes.extend_from_slice(&block[2..34]);
            }
            BlockType::Mxfp4 => {
                self.bytes.push(block[0]);
                self.nibbles(&block[1..17]);
            }
            BlockType::Nvfp4 => {
                // 0x7F, NaN elsewhere, stands for 0 here.
                self.bytes.extend(block[..4].iter().map(|&scale| if scale == 0x7F { 0 } else { scale }));
                block[4..].chunks_exact(8).for_each(|codes| self.nibbles(codes));
            }
            BlockType::Q2K => {
                self.scales.push(half(80));
                self.shifts.push(half(82));
                self.bytes.extend(block[..16].iter().map(|s| s & 15));
                self.minima.extend(block[..16].iter().map(|s| s >> 4));
                self.codes.extend((0..256).map(|i| two_bits(&block[16..80], i)));
            }
            BlockType::Q3K => self.q3_k(block, half(108)),
            BlockType::Q4K => {
                self.scales.push(half(0));
                self.shifts.push(half(2));
                self.six_bit_scales(&block[4..16]);
                block[16..].chunks_exact(32).for_each(|codes| self.nibbles(codes));
            }
            BlockType::Q5K => {
                self.scales.push(half(0));
                self.shifts.push(half(2));
                self.six_bit_scales(&block[4..16]);
                let (high, low) = block[16..].split_at(32);
                self.codes.extend((0..256).map(|i| {
                    let (group, lane) = (i / 32, i % 32);
                    let nibble = low[32 * (group / 2) + lane] >> (4 * (group % 2)) & 15;
                    nibble | (high[lane] >> group & 1) << 4
                }));
            }
            BlockType::Q6K => {
                self.scales.push(half(208));
                self.bytes.extend_from_slice(&block[192..208]);
                let (low, high) = (&block[..128], &block[128..192]);
                self.codes.extend((0..256).map(|i| {
                    let (side, column, lane) = (i / 128, i % 128 / 32, i % 32);
                    let nibble = low[64 * side + 32 * (column % 2) + lane] >> (4 * (column / 2)) & 15;
                    nibble | (high[32 * side + lane] >> (2 * column) & 3) << 4
                }));
            }
            BlockType::Iq4Xs => {
                self.scales.push(half(0));
                let high = half(2);
                self.bytes.extend((0..8).map(|b| {
                    let scale = block[4 + b / 2] >> (4 * (b % 2)) & 15 | ((high >> (2 * b) & 3) as u8) << 4;
                    scale.wrapping_sub(32)
                }));
                block[8..].chunks_exact(16).for_each(|codes| self.nibbles(codes));
            }
        }
    }

    /// Low nibbles of all bytes, then the high ones.
    fn nibbles(&mut self, bytes: &[u8]) {
        self.codes.extend(bytes.iter().map(|b| b & 15));
        self.codes.extend(bytes.iter().map(|b| b >> 4));
    }

    /// [`Parts::nibbles`] of 16 bytes with a fifth bit for each of the 32 codes.
    fn fifth_bits(&mut self, bits: &[u8], bytes: &[u8]) {
        let start = self.codes.len();
        self.nibbles(bytes);
        for (i, code) in self.codes[start..].iter_mut().enumerate() {
            *code |= (bits[i / 8] >> (i % 8) & 1) << 4;
        }
    }

    /// The eight 6-bit scales and minima of Q4_K and Q5_K.
    fn six_bit_scales(&mut self, s: &[u8]) {
        for g in 0..8 {
            let (scale, minimum) = match g {
                0..4 => (s[g] & 63, s[g + 4] & 63),
                _ => (s[g + 4] & 15 | s[g - 4] >> 6 << 4, s[g + 4] >> 4 | s[g] >> 6 << 4),
            };
            self.bytes.push(scale);
            self.minima.push(minimum);
        }
    }

    fn q3_k(&mut self, block: &[u8], scale: u16) {
        let (high, low, s) = (&block[..32], &block[32..96], &block[96..108]);
        self.scales.push(scale);
        self.bytes.extend((0..16).map(|g| {
            let nibble = if g < 8 { s[g] & 15 } else { s[g - 8] >> 4 };
            (nibble | (s[8 + g % 4] >> (2 * (g / 4)) & 3) << 4).wrapping_sub(32)
        }));
        self.codes.extend((0..256).map(|i| two_bits(low, i) | (high[i % 32] >> (i / 32) & 1) << 2));
    }
}

/// Code `i` of Q2_K's and Q3_K's 64 bytes of low bits.
fn two_bits(bytes: &[u8], i: usize) -> u8 {
    bytes[32 * (i / 128) + i % 32] >> (2 * (i % 128 / 32)) & 3
}

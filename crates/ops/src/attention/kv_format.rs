//! Storage of cached keys and values (formats.md section 8.1): floats, or codes with an f16 scale for each token and
//! head. A row is quantized once, when it is written, and never rescaled.

use half::f16;
use marlin_formats::{DType, fp4, fp8};

/// How the rows of a cache are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvFormat {
    /// f32.
    F32,
    /// f16.
    F16,
    /// bf16.
    BF16,
    /// E4M3FN bytes, `s = f16(amax / 448)`.
    Fp8,
    /// Two's complement bytes in -127..=127, `s = f16(amax / 127)`.
    Int8,
    /// Nibbles of value `code - 8`, `s = f16(amax / 7)`.
    Int4,
    /// E2M1 nibbles, `s = f16(amax / 6)`.
    Fp4,
}

impl KvFormat {
    /// All formats.
    pub const ALL: [Self; 7] = [Self::F32, Self::F16, Self::BF16, Self::Fp8, Self::Int8, Self::Int4, Self::Fp4];

    /// Short name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::BF16 => "bf16",
            Self::Fp8 => "fp8",
            Self::Int8 => "int8",
            Self::Int4 => "int4",
            Self::Fp4 => "fp4",
        }
    }

    /// Element type of the rows; U32 words of codes, the first in the lowest bits, where the format is quantized.
    pub const fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
            _ => DType::U32,
        }
    }

    /// Whether rows are codes with scales.
    pub const fn is_quantized(self) -> bool {
        matches!(self, Self::Fp8 | Self::Int8 | Self::Int4 | Self::Fp4)
    }

    /// Values of an element of the rows.
    pub const fn per_element(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Fp8 | Self::Int8 => 4,
            Self::Int4 | Self::Fp4 => 8,
        }
    }

    /// Elements of a row of `width` values; the last word is filled with codes of 0.
    pub const fn row_elements(self, width: usize) -> usize {
        width.div_ceil(self.per_element())
    }

    /// What the largest value of a row is divided by.
    pub const fn largest(self) -> f32 {
        match self {
            Self::Fp8 => fp8::e4m3::MAX,
            Self::Int8 => 127.0,
            Self::Int4 => 7.0,
            Self::Fp4 => fp4::MAX,
            Self::F32 | Self::F16 | Self::BF16 => 1.0,
        }
    }

    /// The code nearest to `t = x / s`, ties to even, saturated. Float formats have no codes.
    pub fn encode(self, t: f32) -> u8 {
        match self {
            Self::Fp8 => fp8::e4m3::encode(t),
            Self::Int8 => t.round_ties_even().clamp(-127.0, 127.0) as i8 as u8,
            Self::Int4 => (t.round_ties_even().clamp(-8.0, 7.0) + 8.0) as u8,
            Self::Fp4 => fp4::encode(t),
            Self::F32 | Self::F16 | Self::BF16 => 0,
        }
    }

    /// The value of a code, before its scale.
    pub fn decode(self, code: u8) -> f32 {
        match self {
            Self::Fp8 => fp8::e4m3::decode(code),
            Self::Int8 => f32::from(code as i8),
            Self::Int4 => f32::from(code & 15) - 8.0,
            Self::Fp4 => fp4::decode(code),
            Self::F32 | Self::F16 | Self::BF16 => 0.0,
        }
    }

    /// The scale of a row whose largest magnitude is `amax`: 0 for a row of zeros, at least 2^-24 otherwise. None above
    /// the range of f16.
    pub fn scale(self, amax: f32) -> Option<f16> {
        if amax == 0.0 {
            return Some(f16::ZERO);
        }
        let scale = f16::from_f32(amax / self.largest());
        scale.is_finite().then(|| if scale == f16::ZERO { f16::from_bits(1) } else { scale })
    }

    /// Code `i` of a row of words.
    pub fn code(self, words: &[u32], i: usize) -> u8 {
        let (per, bits) = (self.per_element(), 32 / self.per_element());
        (words[i / per] >> (i % per * bits)) as u8 & ((1u16 << bits) - 1) as u8
    }

    /// Codes to a row of words.
    pub fn pack(self, codes: &[u8]) -> Vec<u32> {
        let (per, bits) = (self.per_element(), 32 / self.per_element());
        let word = |codes: &[u8]| {
            let code = |i: usize| codes.get(i).copied().unwrap_or_else(|| self.encode(0.0));
            (0..per).map(|i| u32::from(code(i)) << (i * bits)).sum()
        };
        codes.chunks(per).map(word).collect()
    }

    /// Scale and words of a row. None when a value is not finite or the scale is above the range of f16.
    pub fn quantize(self, row: &[f32]) -> Option<(f16, Vec<u32>)> {
        let amax = row.iter().map(|x| x.abs()).fold(0.0, f32::max);
        if row.iter().any(|x| !x.is_finite()) {
            return None;
        }
        let scale = self.scale(amax)?;
        let divisor = scale.to_f32();
        let code = |x: &f32| self.encode(if divisor == 0.0 { 0.0 } else { x / divisor });
        Some((scale, self.pack(&row.iter().map(code).collect::<Vec<_>>())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vector 8a of formats.md.
    #[test]
    fn row_of_the_specification() {
        let row = [0.11, -2.3, 0.875, 4.1, -0.02, 1.6, -3.3, 0.0];
        let quantize = |format: KvFormat| {
            let (scale, words) = format.quantize(&row).unwrap();
            (scale.to_bits(), words)
        };
        let bytes = |bytes: [u8; 8]| -> Vec<u32> {
            bytes.chunks(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        };
        assert_eq!(quantize(KvFormat::Fp8), (0x20B0, bytes([0x54, 0xF8, 0x6C, 0x7E, 0xC1, 0x73, 0xFB, 0x00])));
        let codes = [3, -71, 27, 127, -1, 50, -102, 0].map(|code: i8| code as u8);
        assert_eq!(quantize(KvFormat::Int8), (0x2822, bytes(codes)));
        assert_eq!(quantize(KvFormat::Int4), (0x38B0, vec![0x82B8_F948]));
        let (scale, words) = quantize(KvFormat::Fp4);
        assert_eq!(scale, 0x3977);
        let values: Vec<f32> = (0..8).map(|i| KvFormat::Fp4.decode(KvFormat::Fp4.code(&words, i))).collect();
        assert_eq!(values, [0, 13, 3, 7, 8, 4, 14, 0].map(fp4::decode));
        let out = KvFormat::Fp8.decode(0xF8) * f16::from_bits(0x20B0).to_f32();
        assert_eq!(out, -2.34375);
    }

    /// Vector 8c: scales at and near the floor.
    #[test]
    fn tiny_rows() {
        let row = [1e-6, -2e-6, 0.0, 5e-7, 3e-6, -1e-6, 2.5e-6, 0.0];
        let codes = |format: KvFormat| {
            let (scale, words) = format.quantize(&row).unwrap();
            (scale.to_bits(), (0..8).map(|i| format.code(&words, i)).collect::<Vec<_>>())
        };
        assert_eq!(codes(KvFormat::Fp8), (1, vec![0x58, 0xE0, 0x00, 0x50, 0x65, 0xD8, 0x62, 0x00]));
        assert_eq!(codes(KvFormat::Int8), (1, [17, -34, 0, 8, 50, -17, 42, 0].map(|code: i8| code as u8).to_vec()));
        assert_eq!(codes(KvFormat::Int4), (7, vec![10, 3, 8, 9, 15, 6, 14, 8]));
        assert_eq!(codes(KvFormat::Fp4), (8, vec![4, 14, 0, 2, 7, 12, 7, 0]));
    }

    #[test]
    fn refused_and_empty_rows() {
        for format in KvFormat::ALL.into_iter().filter(|format| format.is_quantized()) {
            assert_eq!(format.quantize(&[0.0; 3]).unwrap().0, f16::ZERO);
            assert_eq!(format.quantize(&[1.0, f32::NAN]), None);
            assert_eq!(format.quantize(&[1.0, f32::INFINITY]), None);
            assert_eq!(format.quantize(&[1e9]), None);
            // The padding of the last word.
            let (_, words) = format.quantize(&[1.0]).unwrap();
            assert_eq!(words.len(), 1);
            assert!((1..format.per_element()).all(|i| format.decode(format.code(&words, i)) == 0.0));
        }
    }
}

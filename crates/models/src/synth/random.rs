//! Streams of random tensor values, written piece by piece.

use std::io::{self, Write};

use half::{bf16, f16};
use marlin_formats::{DType, Format, Levels, ScaleKind, Scheme, Shift, fp8};
use marlin_ops::rng::{Stream, philox4x32};

use crate::checkpoint::group_dtype;

/// Values per piece.
const PIECE: usize = 1 << 16;

/// The middle of the bytes of two-level scales, and that of their minima.
const SUB_SCALE: u8 = 48;

/// Random words that depend on the seed, the tensor and the position alone.
pub(super) struct Words {
    key: [u32; 2],
    tensor: u32,
    part: u32,
}

impl Words {
    /// The stream of tensor number `tensor`; `part` tells codes from scales.
    pub(super) fn new(seed: u64, tensor: u32, part: u32) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], tensor, part }
    }

    /// Fills `words` with words `start..` of the stream; `start` is a multiple of 4.
    fn fill(&self, start: u64, words: &mut [u32]) {
        for (i, four) in words.chunks_mut(4).enumerate() {
            let block = start / 4 + i as u64;
            // The stream's number and the part share a word; the block counter takes two.
            let counter = [block as u32, (block >> 32) as u32, self.tensor, Stream::Weights as u32 | self.part << 8];
            four.copy_from_slice(&philox4x32(self.key, counter)[..four.len()]);
        }
    }

    /// Writes `count` words, each turned into bytes by `value(index, word)`.
    pub(super) fn write<const N: usize>(
        &self,
        sink: &mut dyn Write,
        count: usize,
        value: impl Fn(usize, u32) -> [u8; N],
    ) -> io::Result<()> {
        let mut words = vec![0; PIECE.min(count)];
        let mut bytes = Vec::with_capacity(words.len() * N);
        for start in (0..count).step_by(PIECE) {
            let words = &mut words[..PIECE.min(count - start)];
            self.fill(start as u64, words);
            bytes.clear();
            bytes.extend(words.iter().enumerate().flat_map(|(i, &word)| value(start + i, word)));
            sink.write_all(&bytes)?;
        }
        Ok(())
    }
}

/// Writes `count` values of about normal distribution with the given standard deviation, as F32, F16 or BF16.
pub(super) fn write_normal(
    sink: &mut dyn Write,
    words: &Words,
    dtype: DType,
    count: usize,
    deviation: f32,
) -> io::Result<()> {
    // The sum of a word's four bytes has mean 510 and variance 4 (256^2 - 1) / 12.
    let scale = deviation / (65_535.0f32 / 3.0).sqrt();
    let value = move |word: u32| {
        let sum: u32 = word.to_le_bytes().into_iter().map(u32::from).sum();
        (sum as f32 - 510.0) * scale
    };
    match dtype {
        DType::F32 => words.write(sink, count, |_, w| value(w).to_le_bytes()),
        DType::F16 => words.write(sink, count, |_, w| f16::from_f32(value(w)).to_le_bytes()),
        _ => words.write(sink, count, |_, w| bf16::from_f32(value(w)).to_le_bytes()),
    }
}

/// Random codes and matching scales of one native matrix, with weights of a wanted standard deviation.
pub(super) struct RandomMatrix {
    scheme: Scheme,
    in_features: usize,
    out_features: usize,
    /// Scale that gives the wanted deviation.
    scale: f32,
    /// The middle of an unsigned grid.
    zero: f32,
    /// What a random byte becomes in 8-bit formats, so that no code is NaN, infinite or one that writers never emit.
    bytes: [u8; 256],
}

impl RandomMatrix {
    pub(super) fn new(scheme: Scheme, out_features: usize, in_features: usize, deviation: f32) -> Self {
        let format = scheme.format;
        let zero = match format.levels() {
            Levels::Minus { half: 0 } => (1u32 << (format.code_bits() - 1)) as f32,
            _ => 0.0,
        };
        let bytes = std::array::from_fn(|b| match format {
            Format::Fp8E4m3 | Format::Fp8E4m3F32 => fp8::e4m3::encode((b as f32 - 127.5) / 128.0),
            Format::Fp8E5m2 => fp8::e5m2::encode((b as f32 - 127.5) / 128.0),
            Format::Int8 if b == 0x80 => 0x81,
            _ => b as u8,
        });
        let codes = 1usize << format.code_bits();
        let square = |code: &u8| f64::from(format.value(*code, 0.0) - zero).powi(2);
        let mean_square = bytes[..codes].iter().map(square).sum::<f64>() / codes as f64;
        Self { scheme, in_features, out_features, scale: deviation / mean_square.sqrt() as f32, zero, bytes }
    }

    /// Shape of the codes, `[code_rows, N]`.
    pub(super) fn code_dims(&self) -> [usize; 2] {
        [self.scheme.code_rows(self.in_features), self.out_features]
    }

    /// Shape of scales and zeros, `[G, N]`.
    pub(super) fn group_dims(&self) -> [usize; 2] {
        [self.scheme.groups(self.in_features), self.out_features]
    }

    /// Packed u32 words, codes past K zero.
    pub(super) fn write_codes(&self, sink: &mut dyn Write, words: &Words) -> io::Result<()> {
        let layout = self.scheme.format.layout();
        let (unit, per_unit) = (layout.codes_per_unit(), layout.words_per_unit());
        let [rows, n] = self.code_dims();
        let used = match self.in_features % unit {
            0 => unit,
            tail => tail,
        };
        // Bits of the last unit's words that hold codes: a column of all-ones codes, packed.
        let mut masks = vec![0; per_unit];
        layout.store_column(&vec![((1u32 << layout.bits()) - 1) as u8; used], &mut masks, 1, 0);
        let last_unit = rows - per_unit;
        words.write(sink, rows * n, |index, word| {
            let row = index / n;
            let word = match layout.bits() {
                8 => u32::from_le_bytes(word.to_le_bytes().map(|b| self.bytes[usize::from(b)])),
                _ => word,
            };
            match row.checked_sub(last_unit) {
                Some(i) => (word & masks[i]).to_le_bytes(),
                None => word.to_le_bytes(),
            }
        })
    }

    /// Group scales as stored, varied by a quarter around the wanted one.
    pub(super) fn write_scales(&self, sink: &mut dyn Write, words: &Words) -> io::Result<()> {
        let count = self.group_dims().iter().product();
        let varied = |word: u32| self.scale * (0.75 + 0.5 * (word >> 8) as f32 / (1 << 24) as f32);
        match self.scheme.format.scale_kind() {
            ScaleKind::F16 => words.write(sink, count, |_, w| f16::from_f32(varied(w)).to_le_bytes()),
            ScaleKind::E4m3 => {
                let divisor = self.tensor_scale().unwrap_or(1.0);
                words.write(sink, count, |_, w| [fp8::e4m3::encode(varied(w) * divisor)])
            }
            ScaleKind::E8m0 => words.write(sink, count, |_, w| {
                let exponent = varied(w).log2().round().clamp(-127.0, 127.0);
                [(exponent + 127.0) as u8]
            }),
            ScaleKind::F32 => words.write(sink, count, |_, w| varied(w).to_le_bytes()),
            // Three quarters to five quarters of SUB_SCALE.
            ScaleKind::F16U8 | ScaleKind::F16I8 => words.write(sink, count, |_, w| [36 + (w >> 8) as u8 % 25]),
        }
    }

    /// Stored dtype of the scales, and of zero points or offsets.
    pub(super) fn scale_dtype(&self) -> DType {
        group_dtype(self.scheme.format.scale_kind())
    }

    /// The bytes of the zero point or offset of every group, where the format has them.
    pub(super) fn zeros(&self) -> Option<Vec<u8>> {
        let format = self.scheme.format;
        match (format.shift(), format.scale_kind()) {
            (Shift::None, _) => None,
            (_, kind) if kind.is_two_level() => Some(vec![SUB_SCALE]),
            (Shift::Offset, ScaleKind::F32) => Some((-self.zero * self.scale).to_le_bytes().to_vec()),
            (Shift::Offset, _) => Some(f16::from_f32(-self.zero * self.scale).to_le_bytes().to_vec()),
            (Shift::Zero, _) => Some(f16::from_f32(self.zero).to_le_bytes().to_vec()),
        }
    }

    /// Shape of the multipliers of two-level scales, `[super-blocks, N]`.
    pub(super) fn super_dims(&self) -> [usize; 2] {
        [self.scheme.super_blocks(self.in_features), self.out_features]
    }

    /// The bytes of the f16 multipliers of every super-block, of scales and of minima, with their tensors' suffixes.
    pub(super) fn supers(&self) -> Vec<(&'static str, [u8; 2])> {
        let bytes = |value: f32| f16::from_f32(value / f32::from(SUB_SCALE)).to_le_bytes();
        let format = self.scheme.format;
        match (format.scale_kind().is_two_level(), format.has_offsets()) {
            (false, _) => Vec::new(),
            (true, false) => vec![("ss", bytes(self.scale))],
            (true, true) => vec![("ss", bytes(self.scale)), ("sz", bytes(self.scale * self.zero))],
        }
    }

    /// NVFP4's divisor: it puts the E4M3 scales around 64, where they are precise.
    pub(super) fn tensor_scale(&self) -> Option<f32> {
        (self.scheme.format == Format::Nvfp4).then_some(64.0 / self.scale)
    }
}

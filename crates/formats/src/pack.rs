//! Codes in u32 words, in the native K-major layout `[words, N]`.
//!
//! 2-, 4- and 8-bit codes lie LSB first along K: code `i` of a word is at bits `[b*i, b*(i+1))`.
//! 3-bit codes are planar: 32 codes take three words, the low two bits of codes 0..16, those of
//! codes 16..32, then bit 2 of all 32, so that no code straddles a word.

/// How the codes of one column lie in u32 words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// 16 two-bit codes a word.
    Bits2,
    /// 32 three-bit codes in three words, two bit planes.
    Planar3,
    /// 8 four-bit codes a word.
    Bits4,
    /// 4 eight-bit codes a word.
    Bits8,
}

impl Layout {
    /// Bits of one code.
    pub const fn bits(self) -> u32 {
        match self {
            Layout::Bits2 => 2,
            Layout::Planar3 => 3,
            Layout::Bits4 => 4,
            Layout::Bits8 => 8,
        }
    }

    /// Codes in the smallest whole unit: one word, or three words for the planar layout.
    pub const fn codes_per_unit(self) -> usize {
        match self {
            Layout::Bits2 => 16,
            Layout::Planar3 => 32,
            Layout::Bits4 => 8,
            Layout::Bits8 => 4,
        }
    }

    /// Words in the smallest whole unit.
    pub const fn words_per_unit(self) -> usize {
        match self {
            Layout::Planar3 => 3,
            _ => 1,
        }
    }

    /// u32 rows that hold `in_features` codes a column, the last unit padded.
    pub const fn rows(self, in_features: usize) -> usize {
        in_features.div_ceil(self.codes_per_unit()) * self.words_per_unit()
    }

    /// Packs the codes of column `n` into `words`, `[rows, out_features]`; padding is code 0.
    ///
    /// Every code must fit [`Layout::bits`] bits.
    ///
    /// # Panics
    /// When `words` is too short for the column.
    pub fn store_column(self, codes: &[u8], words: &mut [u32], out_features: usize, n: usize) {
        debug_assert!(codes.iter().all(|&c| u32::from(c) < 1 << self.bits()));
        let mut at = n;
        for unit in codes.chunks(self.codes_per_unit()) {
            match self {
                Layout::Planar3 => {
                    for word in pack_planar3(unit) {
                        words[at] = word;
                        at += out_features;
                    }
                }
                _ => {
                    words[at] = pack_word(unit, self.bits());
                    at += out_features;
                }
            }
        }
    }

    /// Unpacks the first `codes.len()` codes of column `n` of `words`, `[rows, out_features]`.
    ///
    /// # Panics
    /// When `words` is too short for the column.
    pub fn load_column(self, words: &[u32], out_features: usize, n: usize, codes: &mut [u8]) {
        let mut at = n;
        for unit in codes.chunks_mut(self.codes_per_unit()) {
            match self {
                Layout::Planar3 => {
                    let planes = [words[at], words[at + out_features], words[at + 2 * out_features]];
                    for (i, code) in unit.iter_mut().enumerate() {
                        *code = planar3_code(planes, i);
                    }
                    at += 3 * out_features;
                }
                _ => {
                    let (mut word, bits) = (words[at], self.bits());
                    for code in unit {
                        *code = (word & ((1 << bits) - 1)) as u8;
                        word >>= bits;
                    }
                    at += out_features;
                }
            }
        }
    }

    /// The code at input feature `k` of column `n` of `words`, `[rows, out_features]`.
    ///
    /// # Panics
    /// When the position lies outside `words`.
    pub fn code(self, words: &[u32], out_features: usize, n: usize, k: usize) -> u8 {
        let (unit, i) = (k / self.codes_per_unit(), k % self.codes_per_unit());
        let word = |row: usize| words[row * out_features + n];
        match self {
            Layout::Planar3 => planar3_code([word(3 * unit), word(3 * unit + 1), word(3 * unit + 2)], i),
            _ => (word(unit) >> (self.bits() as usize * i) & ((1 << self.bits()) - 1)) as u8,
        }
    }
}

/// One word of LSB-first codes, at most `32 / bits` of them.
#[inline]
fn pack_word(codes: &[u8], bits: u32) -> u32 {
    codes.iter().rev().fold(0, |word, &code| (word << bits) | u32::from(code))
}

/// The three words of at most 32 three-bit codes.
#[inline]
fn pack_planar3(codes: &[u8]) -> [u32; 3] {
    let mut planes = [0; 3];
    for (i, &code) in codes.iter().enumerate() {
        planes[i / 16] |= u32::from(code & 3) << (2 * (i % 16));
        planes[2] |= u32::from(code >> 2) << i;
    }
    planes
}

/// Code `i` of the 32 in three planar words.
#[inline]
fn planar3_code(planes: [u32; 3], i: usize) -> u8 {
    let low = planes[i / 16] >> (2 * (i % 16)) & 3;
    let high = planes[2] >> i & 1;
    (low | high << 2) as u8
}

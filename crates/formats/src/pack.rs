//! Codes in u32 words, in the native K-major layout `[words, N]`.
//!
//! 2-, 4- and 8-bit codes lie LSB first along K: code `i` of a word is at bits `[b*i, b*(i+1))`.
//! 3-, 5- and 6-bit codes are planar, so that no code straddles a word: a unit is the words of the low 2 (3-bit) or
//! 4 (5- and 6-bit) bits of its codes, then one word of the remaining 1 or 2 high bits of each, LSB first as well.

/// How the codes of one column lie in u32 words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// 16 two-bit codes a word.
    Bits2,
    /// 32 three-bit codes in three words: two of two bits each, one of bit 2.
    Planar3,
    /// 8 four-bit codes a word.
    Bits4,
    /// 32 five-bit codes in five words: four of four bits each, one of bit 4.
    Planar5,
    /// 16 six-bit codes in three words: two of four bits each, one of bits 4 and 5.
    Planar6,
    /// 4 eight-bit codes a word.
    Bits8,
}

impl Layout {
    /// Bits of one code.
    pub const fn bits(self) -> u32 {
        self.low_bits() + self.high_bits()
    }

    /// Bits of one code in the low words of a unit.
    pub const fn low_bits(self) -> u32 {
        match self {
            Layout::Bits2 | Layout::Planar3 => 2,
            Layout::Bits4 | Layout::Planar5 | Layout::Planar6 => 4,
            Layout::Bits8 => 8,
        }
    }

    /// Bits of one code in the last word of a unit: 0, 1 or 2.
    pub const fn high_bits(self) -> u32 {
        match self {
            Layout::Bits2 | Layout::Bits4 | Layout::Bits8 => 0,
            Layout::Planar3 | Layout::Planar5 => 1,
            Layout::Planar6 => 2,
        }
    }

    /// Codes in the smallest whole unit: one word, or what fills the word of high bits.
    pub const fn codes_per_unit(self) -> usize {
        match self.high_bits() {
            0 => 32 / self.low_bits() as usize,
            high => 32 / high as usize,
        }
    }

    /// Words in the smallest whole unit.
    pub const fn words_per_unit(self) -> usize {
        self.codes_per_unit() * self.bits() as usize / 32
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
            for word in &self.pack_unit(unit)[..self.words_per_unit()] {
                words[at] = *word;
                at += out_features;
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
            let mut loaded = [0; MAX_UNIT_WORDS];
            for word in &mut loaded[..self.words_per_unit()] {
                *word = words[at];
                at += out_features;
            }
            for (i, code) in unit.iter_mut().enumerate() {
                *code = self.unit_code(|w| loaded[w], i);
            }
        }
    }

    /// The code at input feature `k` of column `n` of `words`, `[rows, out_features]`.
    ///
    /// # Panics
    /// When the position lies outside `words`.
    pub fn code(self, words: &[u32], out_features: usize, n: usize, k: usize) -> u8 {
        let (unit, i) = (k / self.codes_per_unit(), k % self.codes_per_unit());
        self.unit_code(|w| words[(unit * self.words_per_unit() + w) * out_features + n], i)
    }

    /// The words of at most one unit of codes.
    #[inline]
    fn pack_unit(self, codes: &[u8]) -> [u32; MAX_UNIT_WORDS] {
        let mut words = [0; MAX_UNIT_WORDS];
        let (low, high) = (self.low_bits() as usize, self.high_bits() as usize);
        for (i, &code) in codes.iter().enumerate() {
            let code = u32::from(code);
            words[i * low / 32] |= (code & ((1 << low) - 1)) << (i * low % 32);
            if high > 0 {
                words[self.words_per_unit() - 1] |= code >> low << (i * high);
            }
        }
        words
    }

    /// Code `i` of a unit whose words are given.
    #[inline]
    fn unit_code(self, word: impl Fn(usize) -> u32, i: usize) -> u8 {
        let (low, high) = (self.low_bits() as usize, self.high_bits() as usize);
        let mut code = word(i * low / 32) >> (i * low % 32) & ((1 << low) - 1);
        if high > 0 {
            code |= (word(self.words_per_unit() - 1) >> (i * high) & ((1 << high) - 1)) << low;
        }
        code as u8
    }
}

/// Words of the largest unit.
const MAX_UNIT_WORDS: usize = 5;

//! Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011). A draw depends only on its key and counter.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Four random words for `(key, counter)`.
pub fn philox4x32(key: [u32; 2], counter: [u32; 4]) -> [u32; 4] {
    let mut c = counter;
    let mut k = key;
    for round in 0..10 {
        if round > 0 {
            k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
        }
        let p0 = u64::from(MULTIPLIERS[0]) * u64::from(c[0]);
        let p1 = u64::from(MULTIPLIERS[1]) * u64::from(c[2]);
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
    }
    c
}

/// What a stream of random words is used for; keeps uses apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Stream {
    /// The uniform draw of a categorical sample.
    Categorical = 1,
    /// The per-token noise of a Gumbel sample.
    Gumbel = 2,
    /// Synthetic weights.
    Weights = 3,
    /// Signs that a rotation gives to input features.
    InputSigns = 4,
    /// Signs that a rotation gives to output features.
    OutputSigns = 5,
}

/// Word `index` of the stream for `(seed, row, step)`.
pub fn random_word(seed: u64, stream: Stream, row: u32, step: u32, index: u32) -> u32 {
    let key = [seed as u32, (seed >> 32) as u32];
    philox4x32(key, [index / 4, row, step, stream as u32])[(index % 4) as usize]
}

/// Gumbel noise `-ln(-ln(1 - U))` of a random word, `U = min((word + 1/2) 2^-32, 1 - 2^-24)`: from -2.8 to 22.9.
pub fn gumbel(word: u32) -> f64 {
    let u = ((f64::from(word) + 0.5) / 4_294_967_296.0).min(1.0 - 1.0 / 16_777_216.0);
    -(-(-u).ln_1p()).ln()
}

/// A uniform value in [0, 1) with 32 random bits.
pub fn uniform(word: u32) -> f64 {
    f64::from(word) / 4_294_967_296.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        assert_eq!(philox4x32([0; 2], [0; 4]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32([u32::MAX; 2], [u32::MAX; 4]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox4x32([0xa4093822, 0x299f31d0], [0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn gumbel_limits() {
        // U = 2^-33, 1/2 and 1 - 2^-24.
        for (word, expected) in [(0, 33.0 * 2f64.ln()), (1 << 31, 0.366_512_920_3), (u32::MAX, -2.811_540_9)] {
            assert!((gumbel(word) - expected).abs() < 1e-6, "{word}: {}", gumbel(word));
        }
    }

    #[test]
    fn uniform_is_below_one() {
        assert_eq!(uniform(0), 0.0);
        assert!(uniform(u32::MAX) < 1.0);
    }
}

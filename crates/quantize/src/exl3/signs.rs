//! The random signs of a rotation.

use marlin_ops::rng::{Stream, random_word};

/// Signs of the padded input features of the input `name`, `[count]` of 1 and -1.
pub(super) fn inputs(seed: u64, name: &str, count: usize) -> Vec<f64> {
    signs(seed, Stream::InputSigns, name, count)
}

/// Signs of the padded output features of module `name`, `[count]` of 1 and -1.
pub(super) fn outputs(seed: u64, name: &str, count: usize) -> Vec<f64> {
    signs(seed, Stream::OutputSigns, name, count)
}

fn signs(seed: u64, stream: Stream, name: &str, count: usize) -> Vec<f64> {
    // FNV-1a.
    let hash = name
        .bytes()
        .fold(0xCBF2_9CE4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01B3));
    let word = |i: usize| random_word(seed, stream, hash as u32, (hash >> 32) as u32, (i / 32) as u32);
    (0..count).map(|i| if word(i) >> (i % 32) & 1 == 0 { 1.0 } else { -1.0 }).collect()
}

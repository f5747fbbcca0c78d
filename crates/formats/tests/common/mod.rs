//! Helpers shared by the format tests. Each test binary uses a part of them.
#![allow(dead_code)]

use half::f16;
use marlin_formats::{Format, Group, QuantizedMatrix, Scheme};

/// Encodes one column (N = 1).
pub fn encode_column(format: Format, group_size: usize, weights: &[f32]) -> QuantizedMatrix {
    let scheme = Scheme::new(format, group_size).unwrap();
    let matrix = QuantizedMatrix::encode(scheme, weights, 1, weights.len()).unwrap();
    matrix.validate().unwrap();
    matrix
}

/// The stored codes of output feature 0.
pub fn codes(matrix: &QuantizedMatrix) -> Vec<u8> {
    (0..matrix.in_features).map(|k| matrix.code(0, k)).collect()
}

/// The bytes of the packed words in memory order.
pub fn bytes(matrix: &QuantizedMatrix) -> Vec<u8> {
    matrix.codes.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The bit patterns of values rounded to f16.
pub fn f16_bits(values: &[f32]) -> Vec<u16> {
    values.iter().map(|&v| f16::from_f32(v).to_bits()).collect()
}

/// The bit patterns of f32 values, which tell 0 from -0.
pub fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// A group with an arbitrary f32 multiplier, for external scale conventions.
pub fn group_with_scale(scale: f32) -> Group {
    Group { scale_bits: 0, zero_bits: 0, scale, zero: 0.0, offset: 0.0 }
}

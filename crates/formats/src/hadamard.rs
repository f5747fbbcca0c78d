//! The Hadamard transform in f64, for formats that rotate weights and for quantizers that do so.

/// Orthonormal transform of the first axis of `x`, `[n, stride]` with n a power of two, in natural (Sylvester) order:
/// `H[i][j] = (-1)^popcount(i & j) / sqrt(n)`.
///
/// # Panics
/// If the length is no such multiple of `stride`.
#[inline]
pub fn hadamard(x: &mut [f64], stride: usize) {
    let whole = stride > 0 && x.len().is_multiple_of(stride) && (x.len() / stride).is_power_of_two();
    assert!(whole, "{} values in columns of {stride} have no Hadamard transform", x.len());
    let mut width = stride;
    while width < x.len() {
        for pair in x.chunks_exact_mut(2 * width) {
            let (first, second) = pair.split_at_mut(width);
            for (a, b) in first.iter_mut().zip(second) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        width *= 2;
    }
    let norm = ((x.len() / stride) as f64).sqrt();
    x.iter_mut().for_each(|v| *v /= norm);
}

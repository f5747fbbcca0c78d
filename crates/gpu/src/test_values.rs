//! The device of tests, their values, and how far results are off.

#[cfg(feature = "cuda")]
pub(crate) type TestDevice = crate::Cuda;

#[cfg(not(feature = "cuda"))]
pub(crate) type TestDevice = crate::Vulkan;

/// The device in its exact mode.
pub(crate) fn exact_device() -> TestDevice {
    #[cfg(feature = "cuda")]
    let device = crate::cuda(None);
    #[cfg(not(feature = "cuda"))]
    let device = crate::vulkan(None);
    device.unwrap().with_exact(true)
}

/// Random numbers below 2^24.
pub(crate) fn random(count: usize, seed: u32) -> Vec<u32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    (0..count).map(|_| next()).collect()
}

/// Values in [-1/2, 1/2).
pub(crate) fn values(count: usize, seed: u32) -> Vec<f32> {
    random(count, seed).into_iter().map(|word| word as f32 / 16_777_216.0 - 0.5).collect()
}

/// The norm of the error as a share of that of what was expected.
pub(crate) fn relative_norm(found: &[f64], expected: &[f64]) -> f64 {
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(f, e)| f - e)) / norm(&mut expected.iter().copied())
}

/// Every row of so many columns is at most `bound` off, as [`relative_norm`] counts.
pub(crate) fn assert_rows(what: &str, found: &[f64], expected: &[f64], columns: usize, bound: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (row, (found, expected)) in found.chunks_exact(columns).zip(expected.chunks_exact(columns)).enumerate() {
        let error = relative_norm(found, expected);
        assert!(error <= bound, "{what}: row {row} is {error:e} off");
    }
}

//! Deterministic data for the tests.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub mod chain;

use marlin_quantize::Hessian;

/// SplitMix64, good enough for test data.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1).
    pub fn uniform(&mut self) -> f64 {
        ((self.next() >> 12) as f64 + 0.5) / (1u64 << 52) as f64
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * self.uniform().ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.uniform()).cos()) as f32
    }

    pub fn normals(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.normal()).collect()
    }
}

/// `[rows, k]` activations of rank-deficient-plus-noise shape with uneven channel sizes, like the
/// inputs of a transformer's linear layers.
pub fn correlated(random: &mut Random, rows: usize, k: usize) -> Vec<f32> {
    let factors = (k / 4).max(1);
    let mixing = random.normals(factors * k);
    let size: Vec<f32> = (0..k).map(|_| (0.7 * random.normal()).exp()).collect();
    let mut x = vec![0.0f32; rows * k];
    for row in x.chunks_exact_mut(k) {
        for f in 0..factors {
            let z = random.normal() / (factors as f32).sqrt();
            for (x, m) in row.iter_mut().zip(&mixing[f * k..][..k]) {
                *x += z * m;
            }
        }
        for (x, size) in row.iter_mut().zip(&size) {
            *x = (*x + 0.2 * random.normal()) * size;
        }
    }
    x
}

pub fn hessian_of(activations: &[f32], k: usize) -> Hessian {
    let mut hessian = Hessian::new(k).unwrap();
    hessian.accumulate(activations).unwrap();
    hessian
}

/// `H = c I` exactly.
pub fn identity_hessian(k: usize) -> Hessian {
    let mut x = vec![0.0f32; k * k];
    for i in 0..k {
        x[i * k + i] = 1.0;
    }
    hessian_of(&x, k)
}

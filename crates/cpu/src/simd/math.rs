//! Vector functions built on [`Simd`].

use super::Simd;

/// e^x with a relative error near 1e-7: 0 below the subnormals, +inf above the range, NaN for NaN.
///
/// Range reduction by n = rint(x log2 e) with a two-part ln 2, a degree-7 Taylor polynomial on |r| <= 0.3466 (its
/// remainder is below 6e-9), and the scale 2^n applied in two factors so that subnormal results round once.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    let x = s.min(s.splat(100.0), s.max(s.splat(-110.0), x));
    let n = s.round_i(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let nf = s.to_f32(n);
    // ln 2 = 355/512 - 2.12194440e-4: the first has 9 bits, so n times it is exact.
    let r = s.fma(nf, s.splat(-355.0 / 512.0), x);
    let r = s.fma(nf, s.splat(2.121_944_4e-4), r);
    let mut p = s.splat(1.0 / 5040.0);
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = s.fma(p, r, s.splat(c));
    }
    // A NaN reaches p through r.
    s.times_power_of_two(p, n)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::{Kernel, LANES, Level};

    struct Exp<'a>(&'a mut [f32; LANES]);

    impl Kernel for Exp<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            s.store(exp(s, s.load(self.0)), self.0);
        }
    }

    #[test]
    fn exp_is_accurate_over_its_range() {
        for level in Level::all() {
            for i in 0..20_000 {
                let x = (i as f32 - 10_000.0) * 0.0087;
                let mut lanes = [x; LANES];
                level.run(Exp(&mut lanes));
                let expected = f64::from(x).exp();
                let error = (f64::from(lanes[0]) / expected - 1.0).abs();
                assert!(error < 1.5e-7, "{level:?} exp({x}) is off by {error:e}");
                assert_eq!(lanes, [lanes[0]; LANES]);
            }
        }
    }

    #[test]
    fn exp_at_the_ends() {
        for level in Level::all() {
            let mut lanes = [0.0; LANES];
            let x = [f32::NEG_INFINITY, -200.0, -103.0, 0.0, 88.7, 89.0, f32::INFINITY, f32::NAN];
            lanes[..8].copy_from_slice(&x);
            level.run(Exp(&mut lanes));
            assert_eq!(lanes[..2], [0.0; 2]);
            assert_eq!(lanes[2], f32::from_bits(1), "half a subnormal step rounds up");
            assert_eq!(lanes[3], 1.0);
            assert!((f64::from(lanes[4]) / f64::from(88.7f32).exp() - 1.0).abs() < 1.5e-7);
            assert_eq!(lanes[5..7], [f32::INFINITY; 2]);
            assert!(lanes[7].is_nan());
        }
    }
}

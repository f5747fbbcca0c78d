use std::arch::x86_64::*;

use super::{Kernel, LANES, Simd};

/// AVX2 with FMA and F16C; a vector is two registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx2(());

impl Avx2 {
    /// The only constructor: proof that the machine has the features that [`Avx2::run`] enables.
    pub(crate) fn detect() -> Option<Self> {
        let found =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }

    /// Runs a kernel with the features on.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        fn with_features<K: Kernel>(s: Avx2, kernel: K) -> K::Output {
            kernel.run(s)
        }
        // SAFETY: `self` exists, so `detect` found these features.
        unsafe { with_features(self, kernel) }
    }
}

/// One intrinsic on values; `self` proves that it exists.
macro_rules! intrinsic {
    ($call:expr) => {{
        // SAFETY: a value of `Avx2` exists only where `detect` found the features of this instruction.
        unsafe { $call }
    }};
}

/// Loads or stores within an array of sixteen elements.
macro_rules! memory {
    ($call:expr) => {{
        // SAFETY: the features as above; both halves lie within the referenced array and may be unaligned.
        unsafe { $call }
    }};
}

/// Applies a two-operand intrinsic to both halves.
macro_rules! halves {
    ($f:ident, $a:expr, $b:expr) => {
        intrinsic!([$f($a[0], $b[0]), $f($a[1], $b[1])])
    };
}

impl Simd for Avx2 {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    const WIDE: bool = false;

    #[inline(always)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,f16c")]
        #[inline(never)]
        fn with_features<K: Kernel>(s: Avx2, kernel: K) -> K::Output {
            kernel.run(s)
        }
        intrinsic!(with_features(self, kernel))
    }

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        intrinsic!([_mm256_set1_ps(v); 2])
    }

    #[inline(always)]
    fn load(self, v: &[f32; LANES]) -> Self::F {
        let p = v.as_ptr();
        memory!([_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))])
    }

    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; LANES]) {
        let p = out.as_mut_ptr();
        memory!({
            _mm256_storeu_ps(p, v[0]);
            _mm256_storeu_ps(p.add(8), v[1]);
        })
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_add_ps, a, b)
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_sub_ps, a, b)
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_mul_ps, a, b)
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_div_ps, a, b)
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        intrinsic!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1]),])
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_max_ps, a, b)
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        halves!(_mm256_min_ps, a, b)
    }

    #[inline(always)]
    fn reduce_add(self, v: Self::F) -> f32 {
        intrinsic!({
            let eight = _mm256_add_ps(v[0], v[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }

    #[inline(always)]
    fn reduce_max(self, v: Self::F) -> f32 {
        intrinsic!({
            let eight = _mm256_max_ps(v[0], v[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        })
    }

    #[inline(always)]
    fn splat_i(self, v: i32) -> Self::I {
        intrinsic!([_mm256_set1_epi32(v); 2])
    }

    #[inline(always)]
    fn load_i(self, v: &[u32; LANES]) -> Self::I {
        let p = v.as_ptr();
        memory!([_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast()),])
    }

    #[inline(always)]
    fn store_i(self, v: Self::I, out: &mut [u32; LANES]) {
        let p = out.as_mut_ptr();
        memory!({
            _mm256_storeu_si256(p.cast(), v[0]);
            _mm256_storeu_si256(p.add(8).cast(), v[1]);
        })
    }

    #[inline(always)]
    fn prefetch<T>(self, data: &[T], index: usize) {
        if let Some(element) = data.get(index) {
            intrinsic!(_mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(element).cast()));
        }
    }

    #[inline(always)]
    fn load_u8(self, v: &[u8; LANES]) -> Self::I {
        let bytes = memory!(_mm_loadu_si128(v.as_ptr().cast()));
        intrinsic!([_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes)),])
    }

    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        halves!(_mm256_and_si256, a, b)
    }

    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        halves!(_mm256_or_si256, a, b)
    }

    #[inline(always)]
    fn xor(self, a: Self::I, b: Self::I) -> Self::I {
        halves!(_mm256_xor_si256, a, b)
    }

    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        halves!(_mm256_add_epi32, a, b)
    }

    #[inline(always)]
    fn shr(self, v: Self::I, n: u32) -> Self::I {
        halves!(_mm256_srlv_epi32, v, self.splat_i(n as i32))
    }

    #[inline(always)]
    fn sar(self, v: Self::I, n: u32) -> Self::I {
        halves!(_mm256_srav_epi32, v, self.splat_i(n as i32))
    }

    #[inline(always)]
    fn shl(self, v: Self::I, n: u32) -> Self::I {
        halves!(_mm256_sllv_epi32, v, self.splat_i(n as i32))
    }

    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        intrinsic!([_mm256_cvtepi32_ps(v[0]), _mm256_cvtepi32_ps(v[1])])
    }

    #[inline(always)]
    fn round_i(self, v: Self::F) -> Self::I {
        intrinsic!([_mm256_cvtps_epi32(v[0]), _mm256_cvtps_epi32(v[1])])
    }

    #[inline(always)]
    fn bits_to_f32(self, v: Self::I) -> Self::F {
        intrinsic!([_mm256_castsi256_ps(v[0]), _mm256_castsi256_ps(v[1])])
    }

    #[inline(always)]
    fn load_f16(self, v: &[u16; LANES]) -> Self::F {
        let p = v.as_ptr();
        memory!([_mm256_cvtph_ps(_mm_loadu_si128(p.cast())), _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),])
    }

    #[inline(always)]
    fn load_bf16(self, v: &[u16; LANES]) -> Self::F {
        let p = v.as_ptr();
        let wide = memory!([
            _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())),
            _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast())),
        ]);
        self.bits_to_f32(self.shl(wide, 16))
    }

    #[inline(always)]
    fn lut16(self, table: &[f32; LANES], index: Self::I) -> Self::F {
        let [low, high] = self.load(table);
        // Bit 3 moves to the sign, which selects the upper half of the table.
        let upper = self.bits_to_f32(self.shl(index, 28));
        intrinsic!([
            _mm256_blendv_ps(
                _mm256_permutevar8x32_ps(low, index[0]),
                _mm256_permutevar8x32_ps(high, index[0]),
                upper[0],
            ),
            _mm256_blendv_ps(
                _mm256_permutevar8x32_ps(low, index[1]),
                _mm256_permutevar8x32_ps(high, index[1]),
                upper[1],
            ),
        ])
    }

    #[inline(always)]
    fn lut256(self, table: &[f32; 256], index: Self::I) -> Self::F {
        let index = self.and(index, self.splat_i(255));
        let p = table.as_ptr();
        // SAFETY: the features as above; every index is below 256, the length of the table.
        unsafe { [_mm256_i32gather_ps::<4>(p, index[0]), _mm256_i32gather_ps::<4>(p, index[1])] }
    }

    #[inline(always)]
    fn lut16_bytes(self, table: &[u8; LANES], index: Self::I) -> Self::I {
        let table = memory!(_mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast())));
        intrinsic!([_mm256_shuffle_epi8(table, index[0]), _mm256_shuffle_epi8(table, index[1]),])
    }

    #[inline(always)]
    fn dot4(self, acc: Self::I, u: Self::I, x: i32) -> Self::I {
        // u <= 127 keeps every pair of products inside i16.
        intrinsic!({
            let (x, ones) = (_mm256_set1_epi32(x), _mm256_set1_epi16(1));
            let low = _mm256_madd_epi16(_mm256_maddubs_epi16(u[0], x), ones);
            let high = _mm256_madd_epi16(_mm256_maddubs_epi16(u[1], x), ones);
            [_mm256_add_epi32(acc[0], low), _mm256_add_epi32(acc[1], high)]
        })
    }

    #[inline(always)]
    fn dot4_wide(self, acc: Self::I, u: Self::I, x: i32) -> Self::I {
        // Even and odd bytes as 16-bit values: pair sums of maddubs would saturate.
        intrinsic!({
            let x = _mm256_set1_epi32(x);
            let (even, odd) = (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)), _mm256_srai_epi16::<8>(x));
            let mask = _mm256_set1_epi16(0xFF);
            let mut out = acc;
            for (out, u) in out.iter_mut().zip(u) {
                let low = _mm256_madd_epi16(_mm256_and_si256(u, mask), even);
                let high = _mm256_madd_epi16(_mm256_srli_epi16::<8>(u), odd);
                *out = _mm256_add_epi32(*out, _mm256_add_epi32(low, high));
            }
            out
        })
    }

    #[inline(always)]
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I {
        halves!(_mm256_mullo_epi32, a, b)
    }

    #[inline(always)]
    fn sum_bytes(self, v: Self::I) -> Self::I {
        intrinsic!({
            let (bytes, words) = (_mm256_set1_epi8(1), _mm256_set1_epi16(1));
            let low = _mm256_madd_epi16(_mm256_maddubs_epi16(v[0], bytes), words);
            let high = _mm256_madd_epi16(_mm256_maddubs_epi16(v[1], bytes), words);
            [low, high]
        })
    }

    #[inline(always)]
    fn dot2(self, acc: Self::I, pairs: Self::I, x: i32) -> Self::I {
        let x = intrinsic!([_mm256_set1_epi32(x); 2]);
        self.add_i(acc, halves!(_mm256_madd_epi16, pairs, x))
    }

    #[inline(always)]
    fn round_f16(self, v: Self::F) -> Self::F {
        intrinsic!([
            _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[0])),
            _mm256_cvtph_ps(_mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v[1])),
        ])
    }

    #[inline(always)]
    fn butterfly<const STRIDE: usize>(self, v: Self::F) -> Self::F {
        if STRIDE == 8 {
            return intrinsic!([_mm256_add_ps(v[0], v[1]), _mm256_sub_ps(v[0], v[1])]);
        }
        let mut signs = [1.0; LANES];
        for (lane, sign) in signs.iter_mut().enumerate() {
            if lane & STRIDE != 0 {
                *sign = -1.0;
            }
        }
        let other = match STRIDE {
            1 => intrinsic!([_mm256_permute_ps::<0xB1>(v[0]), _mm256_permute_ps::<0xB1>(v[1])]),
            2 => intrinsic!([_mm256_permute_ps::<0x4E>(v[0]), _mm256_permute_ps::<0x4E>(v[1])]),
            _ => intrinsic!([_mm256_permute2f128_ps::<1>(v[0], v[0]), _mm256_permute2f128_ps::<1>(v[1], v[1])]),
        };
        self.fma(v, self.load(&signs), other)
    }

    #[inline(always)]
    fn load_halves(self, low: &[u32; LANES / 2], high: &[u32; LANES / 2]) -> Self::I {
        memory!([_mm256_loadu_si256(low.as_ptr().cast()), _mm256_loadu_si256(high.as_ptr().cast())])
    }

    #[inline(always)]
    fn shr_halves(self, v: Self::I, counts: [u32; 2]) -> Self::I {
        intrinsic!([
            _mm256_srlv_epi32(v[0], _mm256_set1_epi32(counts[0] as i32)),
            _mm256_srlv_epi32(v[1], _mm256_set1_epi32(counts[1] as i32)),
        ])
    }

    #[inline(always)]
    fn shl_halves(self, v: Self::I, counts: [u32; 2]) -> Self::I {
        intrinsic!([
            _mm256_sllv_epi32(v[0], _mm256_set1_epi32(counts[0] as i32)),
            _mm256_sllv_epi32(v[1], _mm256_set1_epi32(counts[1] as i32)),
        ])
    }
}

use std::arch::x86_64::*;

use super::{Kernel, LANES, Simd};

/// AVX-512 with VNNI.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The only constructor: proof that the machine has the features that [`Avx512::run`] enables.
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Self(()))
    }

    /// Runs a kernel with the features on.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
        fn with_features<K: Kernel>(s: Avx512, kernel: K) -> K::Output {
            kernel.run(s)
        }
        // SAFETY: `self` exists, so `detect` found these features.
        unsafe { with_features(self, kernel) }
    }
}

/// One intrinsic on values; `self` proves that it exists.
macro_rules! intrinsic {
    ($call:expr) => {{
        // SAFETY: a value of `Avx512` exists only where `detect` found the features of this instruction.
        unsafe { $call }
    }};
}

/// One load or store of a whole array.
macro_rules! memory {
    ($call:expr) => {{
        // SAFETY: the features as above; the reference covers all bytes accessed, and the access may be unaligned.
        unsafe { $call }
    }};
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    const WIDE: bool = true;

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        intrinsic!(_mm512_set1_ps(v))
    }

    #[inline(always)]
    fn load(self, v: &[f32; LANES]) -> Self::F {
        memory!(_mm512_loadu_ps(v.as_ptr()))
    }

    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; LANES]) {
        memory!(_mm512_storeu_ps(out.as_mut_ptr(), v))
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        intrinsic!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        intrinsic!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn reduce_add(self, v: Self::F) -> f32 {
        intrinsic!(_mm512_reduce_add_ps(v))
    }

    #[inline(always)]
    fn reduce_max(self, v: Self::F) -> f32 {
        intrinsic!(_mm512_reduce_max_ps(v))
    }

    #[inline(always)]
    fn splat_i(self, v: i32) -> Self::I {
        intrinsic!(_mm512_set1_epi32(v))
    }

    #[inline(always)]
    fn load_i(self, v: &[u32; LANES]) -> Self::I {
        memory!(_mm512_loadu_si512(v.as_ptr().cast()))
    }

    #[inline(always)]
    fn store_i(self, v: Self::I, out: &mut [u32; LANES]) {
        memory!(_mm512_storeu_si512(out.as_mut_ptr().cast(), v))
    }

    #[inline(always)]
    fn load_u8(self, v: &[u8; LANES]) -> Self::I {
        memory!(_mm512_cvtepu8_epi32(_mm_loadu_si128(v.as_ptr().cast())))
    }

    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        intrinsic!(_mm512_and_si512(a, b))
    }

    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        intrinsic!(_mm512_or_si512(a, b))
    }

    #[inline(always)]
    fn xor(self, a: Self::I, b: Self::I) -> Self::I {
        intrinsic!(_mm512_xor_si512(a, b))
    }

    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        intrinsic!(_mm512_add_epi32(a, b))
    }

    #[inline(always)]
    fn shr(self, v: Self::I, n: u32) -> Self::I {
        intrinsic!(_mm512_srlv_epi32(v, _mm512_set1_epi32(n as i32)))
    }

    #[inline(always)]
    fn sar(self, v: Self::I, n: u32) -> Self::I {
        intrinsic!(_mm512_srav_epi32(v, _mm512_set1_epi32(n as i32)))
    }

    #[inline(always)]
    fn shl(self, v: Self::I, n: u32) -> Self::I {
        intrinsic!(_mm512_sllv_epi32(v, _mm512_set1_epi32(n as i32)))
    }

    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        intrinsic!(_mm512_cvtepi32_ps(v))
    }

    #[inline(always)]
    fn round_i(self, v: Self::F) -> Self::I {
        intrinsic!(_mm512_cvtps_epi32(v))
    }

    #[inline(always)]
    fn bits_to_f32(self, v: Self::I) -> Self::F {
        intrinsic!(_mm512_castsi512_ps(v))
    }

    #[inline(always)]
    fn load_f16(self, v: &[u16; LANES]) -> Self::F {
        memory!(_mm512_cvtph_ps(_mm256_loadu_si256(v.as_ptr().cast())))
    }

    #[inline(always)]
    fn load_bf16(self, v: &[u16; LANES]) -> Self::F {
        let wide = memory!(_mm512_cvtepu16_epi32(_mm256_loadu_si256(v.as_ptr().cast())));
        self.bits_to_f32(self.shl(wide, 16))
    }

    #[inline(always)]
    fn lut16(self, table: &[f32; LANES], index: Self::I) -> Self::F {
        intrinsic!(_mm512_permutexvar_ps(index, self.load(table)))
    }

    #[inline(always)]
    fn lut256(self, table: &[f32; 256], index: Self::I) -> Self::F {
        let index = self.and(index, self.splat_i(255));
        // SAFETY: the features as above; every index is below 256, the length of the table.
        unsafe { _mm512_i32gather_ps::<4>(index, table.as_ptr()) }
    }

    #[inline(always)]
    fn lut16_bytes(self, table: &[u8; LANES], index: Self::I) -> Self::I {
        let table = memory!(_mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast())));
        intrinsic!(_mm512_shuffle_epi8(table, index))
    }

    #[inline(always)]
    fn dot4(self, acc: Self::I, u: Self::I, x: i32) -> Self::I {
        intrinsic!(_mm512_dpbusd_epi32(acc, u, _mm512_set1_epi32(x)))
    }

    #[inline(always)]
    fn dot4_wide(self, acc: Self::I, u: Self::I, x: i32) -> Self::I {
        self.dot4(acc, u, x)
    }
}

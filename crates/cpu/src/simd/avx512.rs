use std::arch::x86_64::*;

use super::trellis::{self, Gather, TrellisRow};
use super::{Kernel, LANES, Simd};

/// AVX-512 with VNNI, and with the byte permutations of VBMI where the parameter says so.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Avx512<const VBMI: bool = false>(());

impl Avx512<true> {
    /// Runs a kernel with the features on.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
        fn with_features<K: Kernel>(s: Avx512<true>, kernel: K) -> K::Output {
            kernel.run(s)
        }
        // SAFETY: `self` exists, so `detect` and `with_vbmi` found these features.
        unsafe { with_features(self, kernel) }
    }
}

impl Avx512 {
    /// The same with VBMI if the machine has it.
    #[inline]
    pub(crate) fn with_vbmi(self) -> Option<Avx512<true>> {
        is_x86_feature_detected!("avx512vbmi").then_some(Avx512(()))
    }

    /// Whether the sum of a lane's bytes takes fewer cycles as a product with ones than by `vdbpsadbw`, which is two
    /// operations on AMD's Zen 5. Only AMD's processors have SSE4a; others keep `vdbpsadbw`.
    #[inline]
    pub(crate) fn sums_bytes_by_products(self) -> bool {
        is_x86_feature_detected!("sse4a")
    }

    /// Proof that the machine has the features that [`Avx512::run`] enables; [`Avx512::with_vbmi`], the only other way to
    /// a value, adds one.
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

/// Lanes whose values the compiler knows: shifts by a vector from memory would be guarded against counts above 31.
macro_rules! constants {
    ($v:expr) => {{
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = $v.map(|v| v as i32);
        intrinsic!(_mm512_setr_epi32(a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p))
    }};
}

impl<const VBMI: bool> Simd for Avx512<VBMI> {
    type F = __m512;
    type I = __m512i;
    const WIDE: bool = true;

    #[inline(always)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")]
        #[inline(never)]
        fn with_features<const VBMI: bool, K: Kernel>(s: Avx512<VBMI>, kernel: K) -> K::Output {
            kernel.run(s)
        }
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi,avx2,fma,f16c")]
        #[inline(never)]
        fn with_vbmi<const VBMI: bool, K: Kernel>(s: Avx512<VBMI>, kernel: K) -> K::Output {
            kernel.run(s)
        }
        // SAFETY: `self` exists, so `detect` found the features, and `with_vbmi` found VBMI where it is on.
        unsafe { if VBMI { with_vbmi(self, kernel) } else { with_features(self, kernel) } }
    }

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
    fn transpose(self, v: [Self::F; LANES]) -> [Self::F; LANES] {
        // No closures here: they would be compiled without the features.
        let mut quads = v;
        // Within 128-bit lanes: columns c, 4 + c, 8 + c, 12 + c of rows 4 g .. 4 g + 4 come to `quads[4 g + c]`.
        for g in [0, 4, 8, 12] {
            let (a, b, c, d) = (v[g], v[g + 1], v[g + 2], v[g + 3]);
            let low =
                intrinsic!((_mm512_castps_pd(_mm512_unpacklo_ps(a, b)), _mm512_castps_pd(_mm512_unpacklo_ps(c, d))));
            let high =
                intrinsic!((_mm512_castps_pd(_mm512_unpackhi_ps(a, b)), _mm512_castps_pd(_mm512_unpackhi_ps(c, d))));
            quads[g] = intrinsic!(_mm512_castpd_ps(_mm512_unpacklo_pd(low.0, low.1)));
            quads[g + 1] = intrinsic!(_mm512_castpd_ps(_mm512_unpackhi_pd(low.0, low.1)));
            quads[g + 2] = intrinsic!(_mm512_castpd_ps(_mm512_unpacklo_pd(high.0, high.1)));
            quads[g + 3] = intrinsic!(_mm512_castpd_ps(_mm512_unpackhi_pd(high.0, high.1)));
        }
        // Then the lanes themselves, even and odd ones at a time.
        let mut out = quads;
        for i in 0..4 {
            let (a, b, c, d) = (quads[i], quads[4 + i], quads[8 + i], quads[12 + i]);
            let even = intrinsic!((_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0x88>(c, d)));
            let odd = intrinsic!((_mm512_shuffle_f32x4::<0xDD>(a, b), _mm512_shuffle_f32x4::<0xDD>(c, d)));
            out[i] = intrinsic!(_mm512_shuffle_f32x4::<0x88>(even.0, even.1));
            out[4 + i] = intrinsic!(_mm512_shuffle_f32x4::<0x88>(odd.0, odd.1));
            out[8 + i] = intrinsic!(_mm512_shuffle_f32x4::<0xDD>(even.0, even.1));
            out[12 + i] = intrinsic!(_mm512_shuffle_f32x4::<0xDD>(odd.0, odd.1));
        }
        out
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
    fn prefetch<T>(self, data: &[T], index: usize) {
        if let Some(element) = data.get(index) {
            intrinsic!(_mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(element).cast()));
        }
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
    fn times_power_of_two(self, v: Self::F, n: Self::I) -> Self::F {
        intrinsic!(_mm512_scalef_ps(v, _mm512_cvtepi32_ps(n)))
    }

    #[inline(always)]
    fn low_bytes(self, v: Self::I) -> [u8; LANES] {
        let mut out = [0; LANES];
        memory!(_mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(v)));
        out
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

    #[inline(always)]
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I {
        intrinsic!(_mm512_mullo_epi32(a, b))
    }

    #[inline(always)]
    fn sum_bytes(self, v: Self::I) -> Self::I {
        self.add_byte_sums(intrinsic!(_mm512_setzero_si512()), v)
    }

    #[inline(always)]
    fn add_byte_sums(self, acc: Self::I, v: Self::I) -> Self::I {
        intrinsic!(_mm512_dpbusd_epi32(acc, v, _mm512_set1_epi8(1)))
    }

    #[inline(always)]
    fn sum_byte_pairs(self, a: Self::I, b: Self::I) -> Self::I {
        // Differences from 0, summed over four bytes; both halves of a lane get the same sum.
        intrinsic!({
            let zero = _mm512_setzero_si512();
            _mm512_mask_dbsad_epu8::<0>(_mm512_dbsad_epu8::<0>(a, zero), 0xAAAA_AAAA, b, zero)
        })
    }

    #[inline(always)]
    fn dot2(self, acc: Self::I, pairs: Self::I, x: i32) -> Self::I {
        intrinsic!(_mm512_dpwssd_epi32(acc, pairs, _mm512_set1_epi32(x)))
    }

    #[inline(always)]
    fn dot_bytes(self, acc: Self::I, v: Self::I, x: i32) -> Self::I {
        let (sums, x) = intrinsic!((_mm512_maddubs_epi16(v, _mm512_set1_epi8(1)), _mm512_set1_epi32(x)));
        // SAFETY: this level has AVX-512 VNNI.
        unsafe { add_products(acc, sums, x) }
    }

    #[inline(always)]
    fn round_f16(self, v: Self::F) -> Self::F {
        intrinsic!(_mm512_cvtph_ps(_mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v)))
    }

    #[inline(always)]
    fn butterfly<const STRIDE: usize>(self, v: Self::F) -> Self::F {
        let mut signs = [1.0; LANES];
        for (lane, sign) in signs.iter_mut().enumerate() {
            if lane & STRIDE != 0 {
                *sign = -1.0;
            }
        }
        let other = match STRIDE {
            1 => intrinsic!(_mm512_permute_ps::<0xB1>(v)),
            2 => intrinsic!(_mm512_permute_ps::<0x4E>(v)),
            4 => intrinsic!(_mm512_shuffle_f32x4::<0xB1>(v, v)),
            _ => intrinsic!(_mm512_shuffle_f32x4::<0x4E>(v, v)),
        };
        self.fma(v, self.load(&signs), other)
    }

    #[inline(always)]
    fn load_halves(self, low: &[u32; LANES / 2], high: &[u32; LANES / 2]) -> Self::I {
        memory!(_mm512_inserti64x4::<1>(
            _mm512_castsi256_si512(_mm256_loadu_si256(low.as_ptr().cast())),
            _mm256_loadu_si256(high.as_ptr().cast())
        ))
    }

    #[inline(always)]
    fn shr_halves(self, v: Self::I, [low, high]: [u32; 2]) -> Self::I {
        let counts = [[low; LANES / 2], [high; LANES / 2]];
        let counts = self.load_halves(&counts[0], &counts[1]);
        intrinsic!(_mm512_srlv_epi32(v, counts))
    }

    #[inline(always)]
    fn shl_halves(self, v: Self::I, [low, high]: [u32; 2]) -> Self::I {
        let counts = [[low; LANES / 2], [high; LANES / 2]];
        let counts = self.load_halves(&counts[0], &counts[1]);
        intrinsic!(_mm512_sllv_epi32(v, counts))
    }

    #[inline(always)]
    fn trellis_states<const BITS: usize>(self, tile: &[TrellisRow; BITS], pair: usize) -> [Self::I; 2] {
        if !VBMI {
            return trellis::states(self, tile, pair);
        }
        // Each lane gets four bytes that hold its two states.
        let permutation = Gather::<BITS>::permutation(pair);
        let index = memory!(_mm512_loadu_si512(Gather::<BITS>::BYTES[permutation].as_ptr().cast()));
        let window = if BITS == 1 {
            let rows = memory!(_mm512_broadcast_i64x4(_mm256_loadu_si256(tile[0].0.as_ptr().cast())));
            // SAFETY: VBMI is on, so `with_vbmi` found the feature.
            unsafe { _mm512_permutexvar_epi8(index, rows) }
        } else {
            let [first, second] = Gather::<BITS>::ROWS[permutation];
            let rows: &[TrellisRow; 2] = tile[first..first + 2].first_chunk().expect("two rows");
            let first_rows = memory!(_mm512_loadu_si512(rows.as_ptr().cast()));
            if first == second {
                // SAFETY: VBMI is on, so `with_vbmi` found the feature.
                unsafe { _mm512_permutexvar_epi8(index, first_rows) }
            } else {
                let rows: &[TrellisRow; 2] = tile[second..second + 2].first_chunk().expect("two rows");
                let second_rows = memory!(_mm512_loadu_si512(rows.as_ptr().cast()));
                // SAFETY: VBMI is on, so `with_vbmi` found the feature.
                unsafe { _mm512_permutex2var_epi8(first_rows, index, second_rows) }
            }
        };
        let [even, odd] = &Gather::<BITS>::SHIFTS[pair / 4];
        let (even, odd, mask) = (constants!(even), constants!(odd), self.splat_i(0xFFFF));
        intrinsic!([
            _mm512_and_si512(_mm512_srlv_epi32(window, even), mask),
            _mm512_and_si512(_mm512_srlv_epi32(window, odd), mask),
        ])
    }
}

/// `_mm512_dpwssd_epi32`, of which the compiler makes a product and an addition where one follows the other.
#[inline]
#[target_feature(enable = "avx512f,avx512vnni")]
fn add_products(mut acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the instruction is one of the features above and changes `acc` alone.
    unsafe {
        std::arch::asm!("vpdpwssd {0}, {1}, {2}", inout(zmm_reg) acc, in(zmm_reg) a, in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    acc
}

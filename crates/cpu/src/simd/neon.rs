use std::arch::aarch64::*;
use std::arch::asm;

use super::{Kernel, LANES, Simd};

/// Registers of a vector.
const PARTS: usize = 4;
/// Lanes of a register.
const PART: usize = LANES / PARTS;

/// NEON with the dot-product instructions; a vector is four registers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Neon(());

impl Neon {
    /// The only constructor: proof that the machine has the features that [`Neon::run`] enables.
    pub(crate) fn detect() -> Option<Self> {
        let found =
            std::arch::is_aarch64_feature_detected!("neon") && std::arch::is_aarch64_feature_detected!("dotprod");
        found.then_some(Self(()))
    }

    /// Runs a kernel with the features on.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon,dotprod")]
        fn with_features<K: Kernel>(s: Neon, kernel: K) -> K::Output {
            kernel.run(s)
        }
        // SAFETY: `self` exists, so `detect` found these features.
        unsafe { with_features(self, kernel) }
    }
}

/// One intrinsic on values; `self` proves that it exists.
macro_rules! intrinsic {
    ($call:expr) => {{
        // SAFETY: a value of `Neon` exists only where `detect` found the features of this instruction.
        unsafe { $call }
    }};
}

/// Loads or stores within an array.
macro_rules! memory {
    ($call:expr) => {{
        // SAFETY: the features as above; every access lies within the referenced array, and NEON needs no alignment
        // beyond that of an element.
        unsafe { $call }
    }};
}

/// Applies an intrinsic to each register of its operands.
macro_rules! parts {
    ($f:ident $(::<$n:literal>)?, $($v:expr),+) => {
        intrinsic!([
            $f $(::<$n>)? ($($v[0]),+),
            $f $(::<$n>)? ($($v[1]),+),
            $f $(::<$n>)? ($($v[2]),+),
            $f $(::<$n>)? ($($v[3]),+),
        ])
    };
}

/// `acc + sum of four i8 x i8 products` per lane. The intrinsic `vdotq_s32` is not stable.
#[inline(always)]
fn sdot(mut acc: uint32x4_t, a: uint32x4_t, b: uint32x4_t) -> uint32x4_t {
    // SAFETY: only `Neon` calls this, which exists where `detect` found the instruction; it touches registers alone.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {acc:v}.4s, {a:v}.16b, {b:v}.16b",
            acc = inout(vreg) acc,
            a = in(vreg) a,
            b = in(vreg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    acc
}

/// Widens four binary16. The intrinsic `vcvt_f32_f16` is stable only since 1.94.
#[inline(always)]
fn widen_f16(v: uint16x4_t) -> float32x4_t {
    let out;
    // SAFETY: every aarch64 machine with NEON has the instruction; it touches registers alone.
    unsafe {
        asm!(
            "fcvtl {out:v}.4s, {v:v}.4h",
            out = lateout(vreg) out,
            v = in(vreg) v,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    out
}

/// Rounds four f32 to binary16 and widens them again.
#[inline(always)]
fn round_to_f16(v: float32x4_t) -> float32x4_t {
    let out;
    // SAFETY: every aarch64 machine with NEON has the instructions; they touch registers alone.
    unsafe {
        asm!(
            "fcvtn {out:v}.4h, {v:v}.4s",
            "fcvtl {out:v}.4s, {out:v}.4h",
            out = lateout(vreg) out,
            v = in(vreg) v,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    out
}

impl Simd for Neon {
    type F = [float32x4_t; PARTS];
    type I = [uint32x4_t; PARTS];
    const WIDE: bool = false;

    #[inline(always)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon,dotprod")]
        #[inline(never)]
        fn with_features<K: Kernel>(s: Neon, kernel: K) -> K::Output {
            kernel.run(s)
        }
        intrinsic!(with_features(self, kernel))
    }

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        intrinsic!([vdupq_n_f32(v); PARTS])
    }

    #[inline(always)]
    fn load(self, v: &[f32; LANES]) -> Self::F {
        let p = v.as_ptr();
        memory!([vld1q_f32(p), vld1q_f32(p.add(4)), vld1q_f32(p.add(8)), vld1q_f32(p.add(12))])
    }

    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; LANES]) {
        let p = out.as_mut_ptr();
        for (i, v) in v.into_iter().enumerate() {
            memory!(vst1q_f32(p.add(PART * i), v));
        }
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        parts!(vaddq_f32, a, b)
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        parts!(vsubq_f32, a, b)
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        parts!(vmulq_f32, a, b)
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        parts!(vdivq_f32, a, b)
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        parts!(vfmaq_f32, c, a, b)
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        // `fmax` would return NaN where one operand is.
        let greater = parts!(vcgtq_f32, a, b);
        parts!(vbslq_f32, greater, a, b)
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        let less = parts!(vcltq_f32, a, b);
        parts!(vbslq_f32, less, a, b)
    }

    #[inline(always)]
    fn reduce_add(self, v: Self::F) -> f32 {
        intrinsic!({
            let four = vaddq_f32(vaddq_f32(v[0], v[2]), vaddq_f32(v[1], v[3]));
            vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
        })
    }

    #[inline(always)]
    fn reduce_max(self, v: Self::F) -> f32 {
        intrinsic!(vmaxvq_f32(vmaxq_f32(vmaxq_f32(v[0], v[2]), vmaxq_f32(v[1], v[3]))))
    }

    #[inline(always)]
    fn splat_i(self, v: i32) -> Self::I {
        intrinsic!([vdupq_n_u32(v as u32); PARTS])
    }

    #[inline(always)]
    fn load_i(self, v: &[u32; LANES]) -> Self::I {
        let p = v.as_ptr();
        memory!([vld1q_u32(p), vld1q_u32(p.add(4)), vld1q_u32(p.add(8)), vld1q_u32(p.add(12))])
    }

    #[inline(always)]
    fn store_i(self, v: Self::I, out: &mut [u32; LANES]) {
        let p = out.as_mut_ptr();
        for (i, v) in v.into_iter().enumerate() {
            memory!(vst1q_u32(p.add(PART * i), v));
        }
    }

    #[inline(always)]
    fn load_u8(self, v: &[u8; LANES]) -> Self::I {
        let bytes = memory!(vld1q_u8(v.as_ptr()));
        intrinsic!({
            let (low, high) = (vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
            [vmovl_u16(vget_low_u16(low)), vmovl_high_u16(low), vmovl_u16(vget_low_u16(high)), vmovl_high_u16(high)]
        })
    }

    #[inline(always)]
    fn and(self, a: Self::I, b: Self::I) -> Self::I {
        parts!(vandq_u32, a, b)
    }

    #[inline(always)]
    fn or(self, a: Self::I, b: Self::I) -> Self::I {
        parts!(vorrq_u32, a, b)
    }

    #[inline(always)]
    fn xor(self, a: Self::I, b: Self::I) -> Self::I {
        parts!(veorq_u32, a, b)
    }

    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        parts!(vaddq_u32, a, b)
    }

    #[inline(always)]
    fn shr(self, v: Self::I, n: u32) -> Self::I {
        // A negative count shifts right.
        let n = intrinsic!([vdupq_n_s32(-(n as i32)); PARTS]);
        parts!(vshlq_u32, v, n)
    }

    #[inline(always)]
    fn sar(self, v: Self::I, n: u32) -> Self::I {
        let n = intrinsic!([vdupq_n_s32(-(n as i32)); PARTS]);
        let v = parts!(vreinterpretq_s32_u32, v);
        let v = parts!(vshlq_s32, v, n);
        parts!(vreinterpretq_u32_s32, v)
    }

    #[inline(always)]
    fn shl(self, v: Self::I, n: u32) -> Self::I {
        let n = intrinsic!([vdupq_n_s32(n as i32); PARTS]);
        parts!(vshlq_u32, v, n)
    }

    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        let v = parts!(vreinterpretq_s32_u32, v);
        parts!(vcvtq_f32_s32, v)
    }

    #[inline(always)]
    fn round_i(self, v: Self::F) -> Self::I {
        let v = parts!(vcvtnq_s32_f32, v);
        parts!(vreinterpretq_u32_s32, v)
    }

    #[inline(always)]
    fn bits_to_f32(self, v: Self::I) -> Self::F {
        parts!(vreinterpretq_f32_u32, v)
    }

    #[inline(always)]
    fn low_bytes(self, v: Self::I) -> [u8; LANES] {
        let mut out = [0; LANES];
        let bytes = intrinsic!({
            let low = vcombine_u16(vmovn_u32(v[0]), vmovn_u32(v[1]));
            let high = vcombine_u16(vmovn_u32(v[2]), vmovn_u32(v[3]));
            vcombine_u8(vmovn_u16(low), vmovn_u16(high))
        });
        memory!(vst1q_u8(out.as_mut_ptr(), bytes));
        out
    }

    #[inline(always)]
    fn load_f16(self, v: &[u16; LANES]) -> Self::F {
        let p = v.as_ptr();
        let bits = memory!([vld1_u16(p), vld1_u16(p.add(4)), vld1_u16(p.add(8)), vld1_u16(p.add(12))]);
        [widen_f16(bits[0]), widen_f16(bits[1]), widen_f16(bits[2]), widen_f16(bits[3])]
    }

    #[inline(always)]
    fn load_bf16(self, v: &[u16; LANES]) -> Self::F {
        let p = v.as_ptr();
        let bits = memory!([vld1_u16(p), vld1_u16(p.add(4)), vld1_u16(p.add(8)), vld1_u16(p.add(12))]);
        self.bits_to_f32(parts!(vshll_n_u16::<16>, bits))
    }

    #[inline(always)]
    fn lut16(self, table: &[f32; LANES], index: Self::I) -> Self::F {
        let p = table.as_ptr().cast::<u8>();
        let table = memory!(uint8x16x4_t(vld1q_u8(p), vld1q_u8(p.add(16)), vld1q_u8(p.add(32)), vld1q_u8(p.add(48))));
        let index = self.and(index, self.splat_i(15));
        let mut out = self.splat(0.0);
        for (out, index) in out.iter_mut().zip(index) {
            // The four bytes of element i are bytes 4 i to 4 i + 3 of the table.
            intrinsic!({
                let bytes = vmlaq_u32(vdupq_n_u32(0x0302_0100), index, vdupq_n_u32(0x0404_0404));
                *out = vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)));
            });
        }
        out
    }

    #[inline(always)]
    fn lut256(self, table: &[f32; 256], index: Self::I) -> Self::F {
        let mut indices = [0; LANES];
        self.store_i(index, &mut indices);
        self.load(&indices.map(|i| table[(i & 255) as usize]))
    }

    #[inline(always)]
    fn lut16_bytes(self, table: &[u8; LANES], index: Self::I) -> Self::I {
        let table = [memory!(vld1q_u8(table.as_ptr())); PARTS];
        let index = parts!(vreinterpretq_u8_u32, index);
        let bytes = parts!(vqtbl1q_u8, table, index);
        parts!(vreinterpretq_u32_u8, bytes)
    }

    #[inline(always)]
    fn dot4(self, acc: Self::I, u: Self::I, x: i32) -> Self::I {
        // u <= 127 is the same number as i8.
        let x = intrinsic!(vdupq_n_u32(x as u32));
        [sdot(acc[0], u[0], x), sdot(acc[1], u[1], x), sdot(acc[2], u[2], x), sdot(acc[3], u[3], x)]
    }

    #[inline(always)]
    fn dot4_wide(self, acc: Self::I, u: Self::I, x: i32) -> Self::I {
        // Flipping the top bit makes i8 of u - 128; 2 * 64 times the sum of x puts the 128 back.
        let (x4, half) = intrinsic!((vdupq_n_u32(x as u32), vdupq_n_u32(0x4040_4040)));
        let offset = sdot(sdot(intrinsic!(vdupq_n_u32(0)), half, x4), half, x4);
        let signed = self.xor(u, self.splat_i(0x8080_8080u32 as i32));
        self.dot4(self.add_i(acc, [offset; PARTS]), signed, x)
    }

    #[inline(always)]
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I {
        parts!(vmulq_u32, a, b)
    }

    #[inline(always)]
    fn sum_bytes(self, v: Self::I) -> Self::I {
        let bytes = parts!(vreinterpretq_u8_u32, v);
        let words = parts!(vpaddlq_u8, bytes);
        parts!(vpaddlq_u16, words)
    }

    #[inline(always)]
    fn dot2(self, acc: Self::I, pairs: Self::I, x: i32) -> Self::I {
        // Even and odd halves, widened, times each of the two.
        let (x0, x1) = (i32::from(x as i16) as u32, (x >> 16) as u32);
        let (x0, x1) = intrinsic!(([vdupq_n_u32(x0); PARTS], [vdupq_n_u32(x1); PARTS]));
        let even = self.sar(self.shl(pairs, 16), 16);
        let acc = parts!(vmlaq_u32, acc, even, x0);
        let odd = self.sar(pairs, 16);
        parts!(vmlaq_u32, acc, odd, x1)
    }

    #[inline(always)]
    fn round_f16(self, v: Self::F) -> Self::F {
        [round_to_f16(v[0]), round_to_f16(v[1]), round_to_f16(v[2]), round_to_f16(v[3])]
    }

    #[inline(always)]
    fn load_halves(self, low: &[u32; LANES / 2], high: &[u32; LANES / 2]) -> Self::I {
        let (low, high) = (low.as_ptr(), high.as_ptr());
        memory!([vld1q_u32(low), vld1q_u32(low.add(4)), vld1q_u32(high), vld1q_u32(high.add(4))])
    }

    #[inline(always)]
    fn shr_halves(self, v: Self::I, [low, high]: [u32; 2]) -> Self::I {
        // A negative count shifts right.
        let counts = intrinsic!([vdupq_n_s32(-(low as i32)), vdupq_n_s32(-(high as i32))]);
        let n = [counts[0], counts[0], counts[1], counts[1]];
        parts!(vshlq_u32, v, n)
    }

    #[inline(always)]
    fn shl_halves(self, v: Self::I, [low, high]: [u32; 2]) -> Self::I {
        let counts = intrinsic!([vdupq_n_s32(low as i32), vdupq_n_s32(high as i32)]);
        let n = [counts[0], counts[0], counts[1], counts[1]];
        parts!(vshlq_u32, v, n)
    }
}

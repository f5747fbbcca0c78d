use half::f16;

use super::{Kernel, LANES, Simd};

/// Plain Rust lanes: the definition the other sets are tested against.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Portable;

macro_rules! lanewise {
    ($name:ident, $ty:ty, |$a:ident, $b:ident| $body:expr) => {
        #[inline(always)]
        fn $name(self, a: [$ty; LANES], b: [$ty; LANES]) -> [$ty; LANES] {
            let mut out = a;
            for (out, b) in out.iter_mut().zip(b) {
                let ($a, $b) = (*out, b);
                *out = $body;
            }
            out
        }
    };
}

impl Simd for Portable {
    type F = [f32; LANES];
    type I = [u32; LANES];
    const WIDE: bool = false;

    #[inline(always)]
    fn unrolls(self) -> bool {
        false
    }

    #[inline(never)]
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, v: f32) -> Self::F {
        [v; LANES]
    }

    #[inline(always)]
    fn load(self, v: &[f32; LANES]) -> Self::F {
        *v
    }

    #[inline(always)]
    fn store(self, v: Self::F, out: &mut [f32; LANES]) {
        *out = v;
    }

    lanewise!(add, f32, |a, b| a + b);
    lanewise!(sub, f32, |a, b| a - b);
    lanewise!(mul, f32, |a, b| a * b);
    lanewise!(div, f32, |a, b| a / b);
    lanewise!(max, f32, |a, b| if a > b { a } else { b });
    lanewise!(min, f32, |a, b| if a < b { a } else { b });
    lanewise!(and, u32, |a, b| a & b);
    lanewise!(or, u32, |a, b| a | b);
    lanewise!(xor, u32, |a, b| a ^ b);
    lanewise!(add_i, u32, |a, b| a.wrapping_add(b));

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        self.add(self.mul(a, b), c)
    }

    #[inline(always)]
    fn reduce_add(self, v: Self::F) -> f32 {
        let mut v = v;
        for width in [8, 4, 2, 1] {
            for i in 0..width {
                v[i] += v[i + width];
            }
        }
        v[0]
    }

    #[inline(always)]
    fn reduce_max(self, v: Self::F) -> f32 {
        v.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn splat_i(self, v: i32) -> Self::I {
        [v as u32; LANES]
    }

    #[inline(always)]
    fn load_i(self, v: &[u32; LANES]) -> Self::I {
        *v
    }

    #[inline(always)]
    fn store_i(self, v: Self::I, out: &mut [u32; LANES]) {
        *out = v;
    }

    #[inline(always)]
    fn load_u8(self, v: &[u8; LANES]) -> Self::I {
        v.map(u32::from)
    }

    #[inline(always)]
    fn shr(self, v: Self::I, n: u32) -> Self::I {
        v.map(|v| v >> n)
    }

    #[inline(always)]
    fn sar(self, v: Self::I, n: u32) -> Self::I {
        v.map(|v| (v as i32 >> n) as u32)
    }

    #[inline(always)]
    fn shl(self, v: Self::I, n: u32) -> Self::I {
        v.map(|v| v << n)
    }

    #[inline(always)]
    fn to_f32(self, v: Self::I) -> Self::F {
        v.map(|v| v as i32 as f32)
    }

    #[inline(always)]
    fn round_i(self, v: Self::F) -> Self::I {
        v.map(|v| v.round_ties_even() as i32 as u32)
    }

    #[inline(always)]
    fn bits_to_f32(self, v: Self::I) -> Self::F {
        v.map(f32::from_bits)
    }

    #[inline(always)]
    fn load_f16(self, v: &[u16; LANES]) -> Self::F {
        v.map(|v| f16::from_bits(v).to_f32())
    }

    #[inline(always)]
    fn load_bf16(self, v: &[u16; LANES]) -> Self::F {
        v.map(|v| f32::from_bits(u32::from(v) << 16))
    }

    #[inline(always)]
    fn lut16(self, table: &[f32; LANES], index: Self::I) -> Self::F {
        index.map(|i| table[(i & 15) as usize])
    }

    #[inline(always)]
    fn lut256(self, table: &[f32; 256], index: Self::I) -> Self::F {
        index.map(|i| table[(i & 255) as usize])
    }

    #[inline(always)]
    fn lut16_bytes(self, table: &[u8; LANES], index: Self::I) -> Self::I {
        index.map(|i| u32::from_le_bytes(i.to_le_bytes().map(|b| table[usize::from(b & 15)])))
    }

    #[inline(always)]
    fn dot4(self, acc: Self::I, u: Self::I, x: i32) -> Self::I {
        let x = x.to_le_bytes().map(|b| i32::from(b as i8));
        let mut out = acc;
        for (out, u) in out.iter_mut().zip(u) {
            let u = u.to_le_bytes().map(i32::from);
            let dot = u[0] * x[0] + u[1] * x[1] + u[2] * x[2] + u[3] * x[3];
            *out = out.wrapping_add(dot as u32);
        }
        out
    }

    #[inline(always)]
    fn dot4_wide(self, acc: Self::I, u: Self::I, x: i32) -> Self::I {
        self.dot4(acc, u, x)
    }

    lanewise!(mul_i, u32, |a, b| a.wrapping_mul(b));

    #[inline(always)]
    fn sum_bytes(self, v: Self::I) -> Self::I {
        v.map(|v| v.to_le_bytes().into_iter().map(u32::from).sum())
    }

    #[inline(always)]
    fn dot2(self, acc: Self::I, pairs: Self::I, x: i32) -> Self::I {
        let (x0, x1) = (i32::from(x as i16), x >> 16);
        let mut out = acc;
        for (out, pair) in out.iter_mut().zip(pairs) {
            let dot = i32::from(pair as i16) * x0 + (pair as i32 >> 16) * x1;
            *out = out.wrapping_add(dot as u32);
        }
        out
    }

    #[inline(always)]
    fn round_f16(self, v: Self::F) -> Self::F {
        v.map(|v| f16::from_f32(v).to_f32())
    }

    #[inline(always)]
    fn load_halves(self, low: &[u32; LANES / 2], high: &[u32; LANES / 2]) -> Self::I {
        std::array::from_fn(|lane| if lane < LANES / 2 { low[lane] } else { high[lane - LANES / 2] })
    }

    #[inline(always)]
    fn shr_halves(self, v: Self::I, counts: [u32; 2]) -> Self::I {
        std::array::from_fn(|lane| v[lane].checked_shr(counts[lane / (LANES / 2)]).unwrap_or(0))
    }

    #[inline(always)]
    fn shl_halves(self, v: Self::I, counts: [u32; 2]) -> Self::I {
        std::array::from_fn(|lane| v[lane].checked_shl(counts[lane / (LANES / 2)]).unwrap_or(0))
    }
}

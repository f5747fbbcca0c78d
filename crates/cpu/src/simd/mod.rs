//! Sixteen-lane vectors behind one trait. A kernel is written once against [`Simd`] and compiled for every instruction
//! set; [`Level::run`] enters it with the target features switched on.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod level;
pub(crate) mod math;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(test)]
mod tests;
pub(crate) mod trellis;

use bytemuck::Zeroable;
pub(crate) use level::Level;
use trellis::TrellisRow;

/// Lanes of every vector: output columns of a weight tile.
pub(crate) const LANES: usize = 16;

/// Bytes of a cache line.
pub(crate) const LINE_BYTES: usize = 64;

/// One cache line of lanes.
#[derive(Clone, Copy, Debug, PartialEq, Zeroable)]
#[repr(C, align(64))]
pub(crate) struct Line<T>(pub(crate) [T; LANES]);

impl<T: Copy + Default> Default for Line<T> {
    fn default() -> Self {
        Self([T::default(); LANES])
    }
}

/// Starts to bring the cache line at an address, which may be any, into the second-level cache.
#[inline(always)]
pub(crate) fn prefetch_address(address: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let address = std::ptr::without_provenance::<i8>(address);
        // SAFETY: SSE is part of x86-64, and a prefetch reads nothing that the program could see: of addresses that it
        // may not read the processor takes no notice.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address) }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a prefetch reads nothing that the program could see: of addresses that it may not read the processor takes
    // no notice.
    unsafe {
        std::arch::asm!("prfm pldl2keep, [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}

/// A computation generic over the instruction set. `run` and what it calls must be `#[inline(always)]`, so that it is
/// compiled with the features of the set it runs on.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;

    /// Runs on one instruction set.
    fn run<S: Simd>(self, s: S) -> Self::Output;
}

/// Operations on sixteen f32 lanes (`F`) and sixteen 32-bit integer lanes (`I`). A value of an implementing type proves
/// that the machine has the instruction set.
pub(crate) trait Simd: Copy + Send + Sync + 'static {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen 32-bit integers, or 64 bytes.
    type I: Copy;
    /// True with 32 vector registers of 64 bytes: kernels block more rows.
    const WIDE: bool;

    /// Whether loops over the parts of a trellis tile are unrolled, which makes their shifts constants.
    #[inline(always)]
    fn unrolls(self) -> bool {
        true
    }

    /// Runs a kernel as a function of its own, so that it has all registers to itself and is compiled once.
    fn outlined<K: Kernel>(self, kernel: K) -> K::Output;

    fn splat(self, v: f32) -> Self::F;
    fn load(self, v: &[f32; LANES]) -> Self::F;
    fn store(self, v: Self::F, out: &mut [f32; LANES]);
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a b + c`, fused where the set has it.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a > b ? a : b`; b when either is NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a < b ? a : b`; b when either is NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Sum of all lanes in a fixed order.
    fn reduce_add(self, v: Self::F) -> f32;
    /// Largest lane; no lane may be NaN.
    fn reduce_max(self, v: Self::F) -> f32;

    /// Lane j of vector i to lane i of vector j.
    #[inline(always)]
    fn transpose(self, v: [Self::F; LANES]) -> [Self::F; LANES] {
        // No closures around vectors: they would be compiled without the features.
        let mut rows = [[0.0; LANES]; LANES];
        for (row, v) in rows.iter_mut().zip(v) {
            self.store(v, row);
        }
        let mut out = v;
        for (j, out) in out.iter_mut().enumerate() {
            *out = self.load(&rows.map(|row| row[j]));
        }
        out
    }

    fn splat_i(self, v: i32) -> Self::I;
    fn load_i(self, v: &[u32; LANES]) -> Self::I;
    fn store_i(self, v: Self::I, out: &mut [u32; LANES]);
    /// Starts to bring `data[index]` closer, if there is such an element.
    #[inline(always)]
    fn prefetch<T>(self, data: &[T], index: usize) {
        let _ = (data, index);
    }
    fn load_u8(self, v: &[u8; LANES]) -> Self::I;
    fn and(self, a: Self::I, b: Self::I) -> Self::I;
    fn or(self, a: Self::I, b: Self::I) -> Self::I;
    fn xor(self, a: Self::I, b: Self::I) -> Self::I;
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Logical shift right by `n < 32`.
    fn shr(self, v: Self::I, n: u32) -> Self::I;
    /// Arithmetic shift right by `n < 32`.
    fn sar(self, v: Self::I, n: u32) -> Self::I;
    /// Shift left by `n < 32`.
    fn shl(self, v: Self::I, n: u32) -> Self::I;
    /// i32 to f32.
    fn to_f32(self, v: Self::I) -> Self::F;
    /// f32 to i32, to nearest even; lanes must fit.
    fn round_i(self, v: Self::F) -> Self::I;
    fn bits_to_f32(self, v: Self::I) -> Self::F;
    /// `v 2^n`, rounded once, for |n| up to 250 and v between 1/2 and 2 (or NaN).
    #[inline(always)]
    fn times_power_of_two(self, v: Self::F, n: Self::I) -> Self::F {
        // Two factors, each of them a normal number.
        let half = self.sar(n, 1);
        let minus_half = self.add_i(self.xor(half, self.splat_i(-1)), self.splat_i(1));
        let rest = self.add_i(n, minus_half);
        let bias = self.splat_i(127);
        let first = self.bits_to_f32(self.shl(self.add_i(half, bias), 23));
        let second = self.bits_to_f32(self.shl(self.add_i(rest, bias), 23));
        self.mul(self.mul(v, first), second)
    }
    /// The lowest byte of each lane.
    #[inline(always)]
    fn low_bytes(self, v: Self::I) -> [u8; LANES] {
        let mut lanes = [0; LANES];
        self.store_i(v, &mut lanes);
        lanes.map(|lane| lane as u8)
    }

    /// Widens binary16 bits.
    fn load_f16(self, v: &[u16; LANES]) -> Self::F;
    /// Widens bfloat16 bits.
    fn load_bf16(self, v: &[u16; LANES]) -> Self::F;
    /// `table[lane & 15]`.
    fn lut16(self, table: &[f32; LANES], index: Self::I) -> Self::F;
    /// `table[lane]`; lanes below 256.
    fn lut256(self, table: &[f32; 256], index: Self::I) -> Self::F;
    /// `table[byte]` for each of the 64 bytes; bytes below 16.
    fn lut16_bytes(self, table: &[u8; LANES], index: Self::I) -> Self::I;
    /// `acc + sum of four u8 x i8 products` per lane; the four i8 of `x` are the same for all lanes. Bytes of `u` at
    /// most 127, so that they are their own value as i8 too: codes of 2 to 6 bits stay below 64.
    fn dot4(self, acc: Self::I, u: Self::I, x: i32) -> Self::I;
    /// [`Simd::dot4`] for any bytes of `u`.
    fn dot4_wide(self, acc: Self::I, u: Self::I, x: i32) -> Self::I;

    /// Low 32 bits of the products.
    fn mul_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Sum of the four bytes of each lane.
    fn sum_bytes(self, v: Self::I) -> Self::I;
    /// `acc + ` [`Simd::sum_bytes`] of `v`.
    #[inline(always)]
    fn add_byte_sums(self, acc: Self::I, v: Self::I) -> Self::I {
        self.add_i(acc, self.sum_bytes(v))
    }
    /// [`Simd::sum_bytes`] of `a` in the low halves of the lanes, of `b` in the high ones.
    #[inline(always)]
    fn sum_byte_pairs(self, a: Self::I, b: Self::I) -> Self::I {
        self.or(self.sum_bytes(a), self.shl(self.sum_bytes(b), 16))
    }
    /// `acc + sum of two i16 x i16 products` per lane, modulo 2^32; the two i16 of `x` are the same for all lanes. Not
    /// all four of a lane and `x` may be -2^15.
    fn dot2(self, acc: Self::I, pairs: Self::I, x: i32) -> Self::I;
    /// `acc + x * ` [`Simd::sum_bytes`] of `v` per lane, modulo 2^32; both halves of `x` are the same i16.
    #[inline(always)]
    fn dot_bytes(self, acc: Self::I, v: Self::I, x: i32) -> Self::I {
        self.dot2(acc, self.sum_bytes(v), x)
    }
    /// Rounds to binary16, to nearest even, and widens again.
    fn round_f16(self, v: Self::F) -> Self::F;
    /// Lanes l and `l + STRIDE` become their sum and their difference; `STRIDE` is 1, 2, 4 or 8.
    #[inline(always)]
    fn butterfly<const STRIDE: usize>(self, v: Self::F) -> Self::F {
        let mut lanes = [0.0; LANES];
        self.store(v, &mut lanes);
        for lane in (0..LANES).filter(|lane| lane & STRIDE == 0) {
            (lanes[lane], lanes[lane + STRIDE]) =
                (lanes[lane] + lanes[lane + STRIDE], lanes[lane] - lanes[lane + STRIDE]);
        }
        self.load(&lanes)
    }
    /// `low` in the first eight lanes, `high` in the others.
    fn load_halves(self, low: &[u32; LANES / 2], high: &[u32; LANES / 2]) -> Self::I;
    /// Logical shift right of the first eight lanes and of the others, each by at most 32.
    fn shr_halves(self, v: Self::I, counts: [u32; 2]) -> Self::I;
    /// Shift left of the first eight lanes and of the others, each by at most 32.
    fn shl_halves(self, v: Self::I, counts: [u32; 2]) -> Self::I;
    /// The states of rows `2 pair` and `2 pair + 1` of a tile, one column a lane; see [`trellis`].
    #[inline(always)]
    fn trellis_states<const BITS: usize>(self, tile: &[TrellisRow; BITS], pair: usize) -> [Self::I; 2] {
        trellis::states(self, tile, pair)
    }
}

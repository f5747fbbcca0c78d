//! 4-bit codes as operands of tensor-core products.
//!
//! A word holds the codes of eight input features of one column, lowest bits first. One mask takes the codes 4 apart: pair
//! p of a word are its codes p and p + 4, in the two halves of a register. The order in which a product sums over K is
//! free, so x is permuted to the same pairs ([`pair_up`]) and the weights stay as they are stored.
//!
//! The products are `m16n8k16` with the weights as the 16-row operand. Lane `4 g + t` of a plane holds four words: K words
//! `4 s + t` of columns `4 g .. 4 g + 4` of the plane's 32 columns, one 16-byte load. Columns 4 g and 4 g + 1 are rows g
//! and g + 8 of the first product, the other two those of a second.

use cubecl::ir::{ElemType, FloatKind};
use cubecl::prelude::*;
use half::f16;

/// What the codes stand for before scaling.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) enum Code {
    /// code - 8.
    Int4,
    /// code - zero point.
    Int4Zero,
    /// E2M1.
    Fp4,
}

/// The type that products are made in.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) enum Operand {
    F16,
    BF16,
}

impl Operand {
    /// The element type that kernels see.
    pub(super) const fn elem(self) -> ElemType {
        ElemType::Float(match self {
            Self::F16 => FloatKind::F16,
            Self::BF16 => FloatKind::BF16,
        })
    }

    /// The run-time operand `magic` of [`decode_word`]: a constant that the compiler must not take apart, so that masking
    /// and combining is one instruction.
    pub(super) const fn magic(self, code: Code) -> u32 {
        match (code, self) {
            // The upper half of every byte.
            (Code::Fp4, _) => 0xf0f0_f0f0,
            // 128: its last mantissa bit counts 1, so that a code put there is added to it.
            (Code::Int4, Self::BF16) => 0x4300_4300,
            // 1024, likewise.
            (Code::Int4 | Code::Int4Zero, _) => 0x6400_6400,
        }
    }

    /// What sums of products with decoded codes are to be multiplied by.
    pub(super) const fn factor(self, code: Code) -> f32 {
        match (code, self) {
            // The bits of E2M1 at the head of an f16 have the value 2^-14: the exponent's bias is 15 instead of 1.
            (Code::Fp4, Self::F16) => 16384.0,
            _ => 1.0,
        }
    }
}

/// The four pairs of a word, to be scaled by [`Operand::factor`]. `zero` is the column's zero point in f16, twice.
#[cube]
pub(super) fn decode_word<F: Float>(
    word: u32,
    zero: u32,
    magic: u32,
    #[comptime] code: Code,
    #[comptime] operand: Operand,
) -> Array<Vector<F, Const<2>>> {
    if comptime!(code == Code::Fp4) {
        fp4::<F>(word, magic, operand)
    } else if comptime!(operand == Operand::F16) {
        int4_f16::<F>(word, zero, magic, code)
    } else if comptime!(code == Code::Int4Zero) {
        round_pairs::<F>(&int4_f16::<f16>(word, zero, magic, code))
    } else {
        int4_bf16::<F>(word, magic)
    }
}

/// [`decode_word`] of E2M1.
#[cube]
fn fp4<F: Float>(word: u32, magic: u32, #[comptime] operand: Operand) -> Array<Vector<F, Const<2>>> {
    let mut out = Array::<Vector<F, Const<2>>>::new(4usize);
    // Every other code becomes a byte like the head of an f16: the sign in bit 7, the magnitude in bits 3 to 1.
    let even = (((word << 4u32) ^ (word << 1u32)) & magic) ^ (word << 1u32);
    let odd = ((word ^ (word >> 3u32)) & magic) ^ (word >> 3u32);
    out[0] = fp4_pair::<F>(even << 8u32, operand);
    out[1] = fp4_pair::<F>(odd << 8u32, operand);
    out[2] = fp4_pair::<F>(even, operand);
    out[3] = fp4_pair::<F>(odd, operand);
    out
}

/// [`decode_word`] of integers in f16.
#[cube]
fn int4_f16<F: Float>(word: u32, zero: u32, magic: u32, #[comptime] code: Code) -> Array<Vector<F, Const<2>>> {
    let mut out = Array::<Vector<F, Const<2>>>::new(4usize);
    let one = Vector::<F, Const<2>>::new(F::new(comptime!(if code == Code::Int4 { 1032.0 } else { 1024.0 })));
    let sixteenth = Vector::<F, Const<2>>::new(F::new(0.0625));
    let shifted = Vector::<F, Const<2>>::new(F::new(comptime!(if code == Code::Int4 { -72.0 } else { -64.0 })));
    #[unroll]
    for h in 0..2usize {
        let w = word >> comptime!(8 * h as u32);
        let low = Vector::<F, Const<2>>::reinterpret((w & 0x000f_000fu32) | magic) - one;
        // Four bits higher, 16 times the code was added.
        let high = Vector::<F, Const<2>>::reinterpret((w & 0x00f0_00f0u32) | magic) * sixteenth + shifted;
        if comptime!(code == Code::Int4Zero) {
            out[comptime!(2 * h)] = low - Vector::<F, Const<2>>::reinterpret(zero);
            out[comptime!(2 * h + 1)] = high - Vector::<F, Const<2>>::reinterpret(zero);
        } else {
            out[comptime!(2 * h)] = low;
            out[comptime!(2 * h + 1)] = high;
        }
    }
    out
}

/// [`decode_word`] of `code - 8` in bf16.
#[cube]
fn int4_bf16<F: Float>(word: u32, magic: u32) -> Array<Vector<F, Const<2>>> {
    let mut out = Array::<Vector<F, Const<2>>>::new(4usize);
    #[unroll]
    for p in 0..4usize {
        let w = word >> comptime!(4 * p as u32);
        out[p] = Vector::<F, Const<2>>::reinterpret((w & 0x000f_000fu32) | magic)
            - Vector::<F, Const<2>>::new(F::new(136.0));
    }
    out
}

/// Four pairs rounded to another type.
#[cube]
fn round_pairs<F: Float>(levels: &Array<Vector<f16, Const<2>>>) -> Array<Vector<F, Const<2>>> {
    let mut out = Array::<Vector<F, Const<2>>>::new(4usize);
    #[unroll]
    for p in 0..4usize {
        let mut pair = Vector::<F, Const<2>>::empty();
        #[unroll]
        for i in 0..2usize {
            pair.insert(i, F::cast_from(f32::cast_from(levels[p].extract(i))));
        }
        out[p] = pair;
    }
    out
}

/// Two E2M1 codes whose signs are at bits 15 and 31, their magnitudes at 9 and 25; other bits are none of theirs.
#[cube]
fn fp4_pair<F: Float>(bits: u32, #[comptime] operand: Operand) -> Vector<F, Const<2>> {
    if comptime!(operand == Operand::F16) {
        Vector::<F, Const<2>>::reinterpret(bits & 0x8e00_8e00u32)
    } else {
        let bits = (bits & 0x8000_8000u32) | ((bits >> 3u32) & 0x01c0_01c0u32);
        // The bias is 127 instead of 1: 2^-126 is too small for the products to stay exact.
        Vector::<F, Const<2>>::reinterpret(bits)
            * Vector::<F, Const<2>>::new(F::new(comptime!(f32::from_bits(253 << 23))))
    }
}

/// Eight 16-bit values x0..x7 as the pairs (x0, x4), (x1, x5), (x2, x6), (x3, x7).
#[cube]
pub(super) fn pair_up(x: Vector<u32, Const<4>>) -> Vector<u32, Const<4>> {
    let mut out = Vector::<u32, Const<4>>::empty();
    #[unroll]
    for i in 0..2usize {
        let a = x.extract(i);
        let b = x.extract(comptime!(i + 2));
        out.insert(comptime!(2 * i), (a & 0xffffu32) | (b << 16u32));
        out.insert(comptime!(2 * i + 1), (a >> 16u32) | (b & 0xffff_0000u32));
    }
    out
}

/// The f16 values of neighbouring columns, widened.
#[cube]
pub(super) fn widen_scales<S: Size>(raw: Vector<u32, S>, #[comptime] columns: usize) -> Array<f32> {
    let mut out = Array::<f32>::new(columns);
    #[unroll]
    for i in 0..comptime!(columns / 2) {
        let pair = Vector::<f16, Const<2>>::reinterpret(raw.extract(i));
        out[comptime!(2 * i)] = f32::cast_from(pair.extract(0usize));
        out[comptime!(2 * i + 1)] = f32::cast_from(pair.extract(1usize));
    }
    out
}

/// The f16 zero points of neighbouring columns, each twice.
#[cube]
pub(super) fn double_zeros<S: Size>(raw: Vector<u32, S>, #[comptime] columns: usize) -> Array<u32> {
    let mut out = Array::<u32>::new(columns);
    #[unroll]
    for i in 0..comptime!(columns / 2) {
        let pair = raw.extract(i);
        out[comptime!(2 * i)] = (pair & 0xffffu32) | (pair << 16u32);
        out[comptime!(2 * i + 1)] = (pair >> 16u32) | (pair & 0xffff_0000u32);
    }
    out
}

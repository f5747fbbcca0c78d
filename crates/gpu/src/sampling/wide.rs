//! Sums of weights as 64-bit integers in two words: exact in any order, and on devices without such integers.

use cubecl::prelude::*;

/// `high * 2^32 + low`.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Wide {
    pub(super) high: u32,
    pub(super) low: u32,
}

/// Most weights of at most 1 whose sum stays below 2^63.
pub(super) const MOST_TERMS: usize = 1 << 19;

/// A weight in [0, 1] in steps of 2^-44.
#[cube]
pub(super) fn fixed(weight: f32) -> Wide {
    let scaled = weight * 4096.0f32;
    let high = f32::floor(scaled);
    Wide { high: u32::cast_from(high), low: u32::cast_from((scaled - high) * 4_294_967_296.0f32) }
}

/// What `sum = .. + addend` carries over to the next word.
#[cube]
pub(super) fn carry(sum: u32, addend: u32) -> u32 {
    select(sum < addend, 1u32, 0u32.runtime())
}

#[cube]
pub(super) fn add(a: &Wide, b: &Wide) -> Wide {
    let low = a.low + b.low;
    Wide { high: a.high + b.high + carry(low, b.low), low }
}

/// `a - b`, not negative.
#[cube]
pub(super) fn subtract(a: &Wide, b: &Wide) -> Wide {
    Wide { high: a.high - b.high - select(a.low < b.low, 1u32, 0u32.runtime()), low: a.low - b.low }
}

#[cube]
pub(super) fn less(a: &Wide, b: &Wide) -> bool {
    a.high < b.high || (a.high == b.high && a.low < b.low)
}

/// The largest integer that is at most `fraction / 2^32 * total`, or with `below` the largest that is less (or 0).
#[cube]
pub(super) fn share(total: &Wide, fraction: u32, below: bool) -> Wide {
    let lost = total.low * fraction;
    let middle = total.high * fraction;
    let low = total.low.mul_hi(fraction) + middle;
    let high = total.high.mul_hi(fraction) + carry(low, middle);
    let borrow = below && lost == 0u32 && (high > 0u32 || low > 0u32);
    let share = Wide { high, low };
    subtract(&share, &Wide { high: 0u32.runtime(), low: select(borrow, 1u32, 0u32.runtime()) })
}

/// `a / b` below 16 in steps of 2^-28, by long division.
#[cube]
pub(super) fn quotient(a: &Wide, b: &Wide) -> u32 {
    let mut high = a.high;
    let mut low = a.low;
    let mut quotient = 0u32.runtime();
    let mut bit = 0u32.runtime();
    while bit <= 28u32 {
        if bit > 0u32 {
            high = (high << 1u32) | (low >> 31u32);
            low <<= 1u32;
            quotient <<= 1u32;
        }
        // Once, but for the integer part.
        while !less(&Wide { high, low }, b) {
            let left = subtract(&Wide { high, low }, b);
            high = left.high;
            low = left.low;
            quotient += 1u32;
        }
        bit += 1u32;
    }
    quotient
}

//! One step of the Viterbi search over all states, the only hot loop of the quantizer.
//!
//! It is written once over arrays of sixteen states, with only `+ - * <` in a fixed order, and compiled for every
//! instruction set: the results are the same bit for bit. The compiler may not fuse a product and a sum.

use marlin_formats::exl3::Codebook;

use super::aligned::Aligned;

/// States handled at once.
const LANES: usize = 16;

/// 16-bit words of the trellis.
const WORDS: usize = 1 << 16;

/// The instruction set that the search runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// What the build itself assumes.
    Portable,
    /// AVX2.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
}

impl Isa {
    /// Every set, slowest first.
    pub const ALL: [Self; 3] = [Self::Portable, Self::Avx2, Self::Avx512];

    /// Whether this machine has it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        match self {
            Self::Portable => true,
            Self::Avx2 => is_x86_feature_detected!("avx2"),
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }

    /// The fastest set that this machine has.
    pub fn best() -> Self {
        Self::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Self::Portable)
    }
}

/// The steps of one codebook at one bit rate on one instruction set.
///
/// A state is the low `16 - bits` bits of a word, and the words that lead into state `s` are `m 2^(16 - bits) + s` for
/// `m < 2^bits`; each comes from state `word >> bits`.
pub(super) struct Steps {
    isa: Isa,
    bits: usize,
    /// Value of every word, `[states / LANES, 2^bits (m), LANES]`: the order in which a step reads them.
    values: Aligned,
}

impl Steps {
    /// The steps on `isa`, or on what the build assumes when the machine lacks it.
    pub(super) fn new(codebook: Codebook, bits: usize, isa: Isa) -> Self {
        let isa = if isa.is_available() { isa } else { Isa::Portable };
        let mut steps = Self { isa, bits, values: Aligned::zeros(WORDS) };
        for word in 0..=u16::MAX {
            let index = steps.index(word);
            steps.values[index] = codebook.value(word).to_f32();
        }
        steps
    }

    fn index(&self, word: u16) -> usize {
        let (m, state) = (usize::from(word) / self.states(), usize::from(word) % self.states());
        (((state / LANES) << self.bits) + m) * LANES + state % LANES
    }

    /// `2^(16 - bits)`.
    pub(super) fn states(&self) -> usize {
        WORDS >> self.bits
    }

    /// The value of a word.
    pub(super) fn value(&self, word: u16) -> f32 {
        self.values[self.index(word)]
    }

    /// `after[s] = min over m of before[word >> bits] + (value(word) - x)^2`, `word = m 2^(16 - bits) + s`.
    pub(super) fn run(&self, x: f32, before: &[f32], after: &mut [f32]) {
        match self.isa {
            Isa::Portable => step(Plain, self.bits, &self.values, x, before, after),
            // SAFETY: `Steps::new` keeps this set only when the machine has it.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => unsafe { step_avx2(self.bits, &self.values, x, before, after) },
            // SAFETY: `Steps::new` keeps this set only when the machine has it.
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => unsafe { step_avx512(self.bits, &self.values, x, before, after) },
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::Avx512 => unreachable!("not available here"),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn step_avx2(bits: usize, values: &[f32], x: f32, before: &[f32], after: &mut [f32]) {
    step(x86::Avx2(()), bits, values, x, before, after);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn step_avx512(bits: usize, values: &[f32], x: f32, before: &[f32], after: &mut [f32]) {
    step(x86::Avx512(()), bits, values, x, before, after);
}

/// How the costs of predecessors come to the states that they lead to.
trait Repeat: Copy {
    /// Every cost for `LANES / SHARED` states in turn.
    fn repeat<const SHARED: usize>(self, costs: &[f32; SHARED]) -> [f32; LANES];
}

#[derive(Clone, Copy)]
struct Plain;

impl Repeat for Plain {
    #[inline(always)]
    fn repeat<const SHARED: usize>(self, costs: &[f32; SHARED]) -> [f32; LANES] {
        std::array::from_fn(|lane| costs[lane * SHARED / LANES])
    }
}

/// Permutations that the compiler does not find by itself.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{LANES, Plain, Repeat};

    /// Made only in functions compiled with AVX2.
    #[derive(Clone, Copy)]
    pub(super) struct Avx2(pub(super) ());

    impl Repeat for Avx2 {
        #[inline(always)]
        fn repeat<const SHARED: usize>(self, costs: &[f32; SHARED]) -> [f32; LANES] {
            let Some(costs) = costs.first_chunk::<8>() else { return Plain.repeat(costs) };
            // SAFETY: a value of this type proves AVX2; eight f32 are read from an array of eight, and two vectors are as
            // large as the result.
            unsafe {
                let costs = _mm256_loadu_ps(costs.as_ptr());
                let low = _mm256_permutevar8x32_ps(costs, _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3));
                let high = _mm256_permutevar8x32_ps(costs, _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7));
                std::mem::transmute([low, high])
            }
        }
    }

    /// Made only in functions compiled with AVX-512.
    #[derive(Clone, Copy)]
    pub(super) struct Avx512(pub(super) ());

    impl Repeat for Avx512 {
        #[inline(always)]
        fn repeat<const SHARED: usize>(self, costs: &[f32; SHARED]) -> [f32; LANES] {
            // SAFETY: a value of this type proves AVX-512; eight or four f32 are read from an array of as many, and a vector
            // is as large as the result.
            unsafe {
                let repeated = if let Some(costs) = costs.first_chunk::<8>() {
                    let order = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
                    _mm512_permutexvar_ps(order, _mm512_castps256_ps512(_mm256_loadu_ps(costs.as_ptr())))
                } else if let Some(costs) = costs.first_chunk::<4>() {
                    let order = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
                    _mm512_permutexvar_ps(order, _mm512_castps128_ps512(_mm_loadu_ps(costs.as_ptr())))
                } else {
                    return Plain.repeat(costs);
                };
                std::mem::transmute(repeated)
            }
        }
    }
}

#[inline(always)]
fn step<R: Repeat>(r: R, bits: usize, values: &[f32], x: f32, before: &[f32], after: &mut [f32]) {
    match bits {
        1 => step_of::<R, 1, 8>(r, values, x, before, after),
        2 => step_of::<R, 2, 4>(r, values, x, before, after),
        3 => step_of::<R, 3, 2>(r, values, x, before, after),
        4 => step_of::<R, 4, 1>(r, values, x, before, after),
        5 => step_of::<R, 5, 1>(r, values, x, before, after),
        6 => step_of::<R, 6, 1>(r, values, x, before, after),
        7 => step_of::<R, 7, 1>(r, values, x, before, after),
        8 => step_of::<R, 8, 1>(r, values, x, before, after),
        _ => unreachable!("options are checked to have 1 to 8 bits"),
    }
}

/// `SHARED` predecessors per `m` lead into sixteen states.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "the plain form is the one that becomes vector code")]
fn step_of<R: Repeat, const BITS: usize, const SHARED: usize>(
    repeat: R,
    values: &[f32],
    x: f32,
    before: &[f32],
    after: &mut [f32],
) {
    const { assert!(SHARED == if BITS < 4 { LANES >> BITS } else { 1 }) };
    let states = WORDS >> BITS;
    assert!(values.len() == WORDS && before.len() == states && after.len() == states);
    let (blocks, _) = after.as_chunks_mut::<LANES>();
    for (i, (after, values)) in blocks.iter_mut().zip(values.chunks_exact(LANES << BITS)).enumerate() {
        let mut least = [f32::INFINITY; LANES];
        let mut first = (i * LANES) >> BITS;
        for values in values.as_chunks::<LANES>().0 {
            let costs = repeat.repeat::<SHARED>(before[first..].first_chunk().expect("a predecessor is a state"));
            for lane in 0..LANES {
                let error = values[lane] - x;
                let cost = costs[lane] + error * error;
                least[lane] = if cost < least[lane] { cost } else { least[lane] };
            }
            first += states >> BITS;
        }
        *after = least;
    }
}

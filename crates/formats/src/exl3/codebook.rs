//! The three procedural codebooks: a 16-bit state to an f16 value.

use half::f16;

/// How a 16-bit trellis state becomes a value. Chosen per tensor by marker tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codebook {
    /// A linear congruence, then the sum of two f16 built from its halves.
    ThreeInst,
    /// A product, then the sum of two f16 built from its halves.
    Mcg,
    /// A product, then the sum of its bytes mapped to about (-3.45, 3.35).
    Mul1,
}

impl Codebook {
    /// All codebooks.
    pub const ALL: [Self; 3] = [Self::ThreeInst, Self::Mcg, Self::Mul1];

    /// What 1 in the sum of bytes adds to a value of [`Codebook::Mul1`] before it is rounded: the f16 with bits 0x1EEE.
    pub const MUL1_STEP: f32 = 1774.0 / 262_144.0;

    /// What is added to 1024 and the sum of bytes in steps: the f16 with bits 0xC931.
    pub const MUL1_OFFSET: f32 = -10.382_812_5;

    /// The value of byte sum 510, that of the middle, before it is rounded.
    pub const MUL1_MIDDLE: f32 = 1534.0 * Self::MUL1_STEP + Self::MUL1_OFFSET;

    /// Standard deviation of the values over all states, to three digits.
    pub const fn deviation(self) -> f32 {
        match self {
            Self::ThreeInst | Self::Mcg => 1.244,
            Self::Mul1 => 1.0,
        }
    }

    /// The name in `quantization_config`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::ThreeInst => "3inst",
            Self::Mcg => "mcg",
            Self::Mul1 => "mul1",
        }
    }

    /// The codebook of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|codebook| codebook.name() == name)
    }

    /// The multiplier of the state modulo 2^32; that of `Mcg` and `Mul1` is the value of the marker tensor.
    pub const fn multiplier(self) -> u32 {
        match self {
            Self::ThreeInst => 89_226_354,
            Self::Mcg => 0xCBAC_1FED,
            Self::Mul1 => 0x83DC_D12D,
        }
    }

    /// What is added to the product.
    pub const fn increment(self) -> u32 {
        match self {
            Self::ThreeInst => 64_248_484,
            Self::Mcg | Self::Mul1 => 0,
        }
    }

    /// The value of a state, exactly as f16.
    #[inline]
    pub fn value(self, state: u16) -> f16 {
        let x = u32::from(state).wrapping_mul(self.multiplier()).wrapping_add(self.increment());
        match self {
            Self::ThreeInst | Self::Mcg => {
                // Signs, the low two exponent bits and the mantissas stay; magnitudes come to lie in [2^-3, 2).
                let x = (x & 0x8FFF_8FFF) ^ 0x3B60_3B60;
                let (low, high) = (f16::from_bits(x as u16), f16::from_bits((x >> 16) as u16));
                f16::from_f32(low.to_f32() + high.to_f32())
            }
            Self::Mul1 => {
                let sum = x.to_le_bytes().iter().map(|&byte| u16::from(byte)).sum();
                Self::mul1_value(sum)
            }
        }
    }

    /// The value of [`Codebook::Mul1`] for a sum of four bytes (0 to 1020): a fused multiply-add in f16.
    #[inline]
    pub fn mul1_value(sum: u16) -> f16 {
        // 1024 + sum and the step have 11 bits each: the product is exact in f32, and so is its rounding to f16 once.
        f16::from_f32((1024.0 + f32::from(sum)) * Self::MUL1_STEP + Self::MUL1_OFFSET)
    }

    /// The values of all 65,536 states.
    pub fn table(self) -> Vec<f16> {
        (0..=u16::MAX).map(|state| self.value(state)).collect()
    }
}

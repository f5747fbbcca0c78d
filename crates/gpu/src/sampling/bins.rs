//! Sums by digit of a radix search, in shared memory.

use cubecl::prelude::*;

use super::wide::{Wide, add, carry, less, subtract};

/// Bits of a digit.
pub(super) const DIGIT: u32 = 11;

/// Values of a digit.
pub(super) const BINS: usize = 1 << DIGIT;

/// Bins that are summed by one unit.
const GROUP: usize = 32;

const GROUPS: usize = BINS / GROUP;

/// One sum for each value of a digit.
#[derive(CubeType)]
pub(super) struct Bins {
    high: Shared<[Atomic<u32>]>,
    low: Shared<[Atomic<u32>]>,
    group_high: Shared<[u32]>,
    group_low: Shared<[u32]>,
}

/// A bin and what is left of a target at its start.
#[derive(CubeType, Clone, Copy)]
pub(super) struct Place {
    pub(super) bin: u32,
    pub(super) left: Wide,
}

#[cube]
impl Bins {
    /// Unspecified sums.
    pub(super) fn new() -> Bins {
        Bins {
            high: Shared::<[Atomic<u32>]>::new_slice(BINS),
            low: Shared::<[Atomic<u32>]>::new_slice(BINS),
            group_high: Shared::<[u32]>::new_slice(GROUPS),
            group_low: Shared::<[u32]>::new_slice(GROUPS),
        }
    }

    /// All sums become 0.
    pub(super) fn clear(&mut self) {
        sync_cube();
        // The number of units divides that of bins.
        for round in 0..BINS / CUBE_DIM as usize {
            let bin = round * CUBE_DIM as usize + UNIT_POS as usize;
            self.high[bin].store(0u32);
            self.low[bin].store(0u32);
        }
        sync_cube();
    }

    /// Adds to a bin.
    pub(super) fn add(&mut self, bin: u32, term: Wide) {
        let mut high = term.high;
        if term.low > 0u32 {
            let before = self.low[bin as usize].fetch_add(term.low);
            high += carry(before + term.low, term.low);
        }
        if high > 0u32 {
            self.high[bin as usize].fetch_add(high);
        }
    }

    /// Completes the sums; returns that of all bins.
    pub(super) fn total(&mut self) -> Wide {
        sync_cube();
        // All units take part in every round, if only to repeat the last group: atomics in a loop that some planes leave
        // earlier than others end the whole kernel on software Vulkan.
        for round in 0..GROUPS.runtime().div_ceil(CUBE_DIM as usize) {
            let place = round * CUBE_DIM as usize + UNIT_POS as usize;
            let group = select(place < GROUPS, place, GROUPS - 1);
            let mut high = 0u32.runtime();
            let mut low = 0u32.runtime();
            for i in 0..GROUP {
                let sum = add(&Wide { high, low }, &self.bin(group * GROUP + i));
                high = sum.high;
                low = sum.low;
            }
            if place < GROUPS {
                self.group_high[group] = high;
                self.group_low[group] = low;
            }
        }
        sync_cube();
        let mut high = 0u32.runtime();
        let mut low = 0u32.runtime();
        for group in 0..GROUPS {
            let sum = add(&Wide { high, low }, &self.group(group));
            high = sum.high;
            low = sum.low;
        }
        Wide { high, low }
    }

    /// The sum of a bin.
    pub(super) fn bin(&self, bin: usize) -> Wide {
        Wide { high: self.high[bin].load(), low: self.low[bin].load() }
    }

    fn group(&self, group: usize) -> Wide {
        Wide { high: self.group_high[group], low: self.group_low[group] }
    }

    /// The first bin up to which the sums exceed `target`, which is less than all of them together.
    pub(super) fn locate(&self, target: &Wide) -> Place {
        let mut high = target.high;
        let mut low = target.low;
        let mut group = 0usize.runtime();
        while group < GROUPS - 1 && !less(&Wide { high, low }, &self.group(group)) {
            let left = subtract(&Wide { high, low }, &self.group(group));
            high = left.high;
            low = left.low;
            group += 1;
        }
        let mut bin = group * GROUP;
        while bin < group * GROUP + (GROUP - 1) && !less(&Wide { high, low }, &self.bin(bin)) {
            let left = subtract(&Wide { high, low }, &self.bin(bin));
            high = left.high;
            low = left.low;
            bin += 1;
        }
        Place { bin: bin as u32, left: Wide { high, low } }
    }
}

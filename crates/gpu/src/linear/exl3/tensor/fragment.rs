//! Tiles as operands of tensor-core products: the order of a tile is that of the 16-row operand of `m16n8k16` with the
//! weights' columns as its rows, so lane `t` decodes its eight positions `8 t` to `8 t + 7` into the four registers of one
//! product.
//!
//! The states of a lane are windows of 16 bits in a stream of `7 bits + 16`. It is moved into whole registers first, by as
//! many bits as the lane needs; from there on all places are known at compile time. What decodes a tile is bound by integer
//! instructions: most states are moved up by products with powers of two that the compiler does not know, and tensor cores also
//! make the sums of halves and of bytes.

use cubecl::cmma::MmaDefinition;
use cubecl::prelude::*;
use half::f16;
use marlin_formats::exl3::Codebook;

use crate::decode::Trellis;
use crate::decode::exl3::{CHANGED, KEPT, product};

/// First bits of the registers that a lane's stream is moved to, by bit rate. With 3 and 4 bits two registers that overlap
/// hold all states whole.
const STARTS: [&[usize]; 8] = [&[0], &[0], &[0, 5], &[0, 12], &[0, 32], &[0, 32], &[0, 32, 64], &[0, 32, 64]];

/// Positions whose states are moved down and masked: two of eight, so that the pipe of products and that of shifts and logic
/// have about as much to do.
const MASKED: [usize; 2] = [2, 5];

impl Trellis {
    /// Consecutive words that a lane reads, cyclically.
    pub(super) const fn lane_words(self) -> usize {
        if self.bits < 5 { 2 } else { 3 }
    }

    /// Where states end relative to the first bit of the lane before the first of them.
    const fn lead(self) -> usize {
        16 - self.bits
    }

    const fn starts(self) -> &'static [usize] {
        STARTS[self.bits - 1]
    }

    /// The register that holds the state of position `j` whole, or the first of two.
    fn register(self, j: usize) -> (usize, bool) {
        let bit = j * self.bits;
        let starts = self.starts();
        match starts.iter().position(|&start| start <= bit && bit + 16 <= start + 32) {
            Some(register) => (register, true),
            None => (bit / 32, false),
        }
    }
}

/// Word `i` of a lane within a tile; they follow each other cyclically.
#[cube]
pub(super) fn lane_word(lane: usize, #[comptime] i: usize, #[comptime] t: Trellis) -> usize {
    (first_bit(lane, t) / 32usize + i) % comptime!(t.tile_words())
}

/// The first bit of a lane's stream within a tile.
#[cube]
fn first_bit(lane: usize, #[comptime] t: Trellis) -> usize {
    (lane * comptime!(8 * t.bits) + comptime!(256 * t.bits - t.lead())) % comptime!(256 * t.bits)
}

/// What every lane decodes with, known at run time only so that the compiler does not take it apart.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
pub(super) struct Constants {
    /// [`crate::decode::exl3::KEPT`].
    kept: u32,
    /// The factors that move the states of positions 1 to 7 to the upper half of their registers; 0 where they are there,
    /// lie in two registers or in the lower half, or are masked.
    power1: u32,
    power2: u32,
    power3: u32,
    power4: u32,
    power5: u32,
    power6: u32,
    power7: u32,
}

impl Trellis {
    /// The argument of kernels that decode.
    pub(super) fn constants<R: Runtime>(self) -> ConstantsLaunch<R> {
        let [p1, p2, p3, p4, p5, p6, p7] = std::array::from_fn(|i| {
            let (register, whole) = self.register(i + 1);
            let up = (i + 1) * self.bits - self.starts()[register];
            if whole && up > 0 && up < 16 && !MASKED.contains(&(i + 1)) { 1 << up } else { 0 }
        });
        ConstantsLaunch::new(KEPT, p1, p2, p3, p4, p5, p6, p7)
    }
}

/// What a lane decodes with.
#[derive(CubeType)]
pub(super) struct Lane {
    /// The first of the 32 bits of its first word that are the lane's.
    offset: u32,
    kept: u32,
    /// Of [`selector`].
    selector: Vector<u32, Const<2>>,
    powers: Array<u32>,
}

/// A lane's part of the matrix that makes `m16n8k16` (or `m16n8k32`) add up the halves (or bytes) of each register of the
/// 16-row operand: column 2 t the first (second) register of lane t of a row, column 2 t + 1 the third (fourth).
#[cube]
fn selector(lane: u32, #[comptime] codebook: Codebook) -> Vector<u32, Const<2>> {
    let ones = comptime!(if codebook == Codebook::Mul1 { 0x0101_0101u32 } else { 0x3c00_3c00 });
    let (g, t) = (lane / 4u32, lane % 4u32);
    let mut selector = Vector::<u32, Const<2>>::empty();
    selector.insert(0usize, select(g == 2u32 * t, ones.runtime(), 0u32));
    selector.insert(1usize, select(g == 2u32 * t + 1u32, ones.runtime(), 0u32));
    selector
}

/// What this unit of a plane decodes with.
#[cube]
pub(super) fn new_lane(constants: &Constants, #[comptime] t: Trellis) -> Lane {
    let mut powers = Array::<u32>::new(7usize);
    powers[0] = constants.power1;
    powers[1] = constants.power2;
    powers[2] = constants.power3;
    powers[3] = constants.power4;
    powers[4] = constants.power5;
    powers[5] = constants.power6;
    powers[6] = constants.power7;
    let offset = (first_bit(UNIT_POS_X as usize, t) % 32usize) as u32;
    Lane { offset, kept: constants.kept, selector: selector(UNIT_POS_X, t.codebook), powers }
}

/// The four registers of a lane; its words are those from `first` on.
#[cube]
pub(super) fn decode_lane(
    words: &Array<u32>,
    lane: &Lane,
    #[comptime] first: usize,
    #[comptime] t: Trellis,
) -> Array<Vector<f16, Const<2>>> {
    let aligned = align(words, lane, first, t);
    let mut out = Array::<Vector<f16, Const<2>>>::new(4usize);
    #[unroll]
    for pair in 0..2usize {
        let columns = if comptime!(t.codebook == Codebook::Mul1) {
            byte_sums(&aligned, lane, pair, t)
        } else {
            half_sums(&aligned, lane, pair, t)
        };
        out[comptime!(2 * pair)] = columns[0];
        out[comptime!(2 * pair + 1)] = columns[1];
    }
    out
}

/// The registers that a lane's stream is moved to; its words are those from `first` on.
#[cube]
pub(super) fn align(words: &Array<u32>, lane: &Lane, #[comptime] first: usize, #[comptime] t: Trellis) -> Array<u32> {
    let mut aligned = Array::<u32>::new(comptime!(t.starts().len()));
    #[unroll]
    for i in 0..comptime!(t.starts().len()) {
        let start = comptime!(t.starts()[i]);
        let pair = comptime!(start / 32);
        // Starts that are no multiples of 32 are so small that they stay within the first two words.
        let down = comptime!((32 - start % 32) as u32) - lane.offset;
        let high = u64::cast_from(words[comptime!(first + pair)]) << 32u64;
        let low = if comptime!(pair + 1 < t.lane_words()) {
            u64::cast_from(words[comptime!(first + pair + 1)])
        } else {
            0u64.runtime()
        };
        aligned[i] = u32::cast_from((high | low) >> u64::cast_from(down));
    }
    aligned
}

/// The products of four states of a lane: rows 0 and 1 from the lane's, or 8 and 9 in the second pair, each of column 0,
/// then of column 8. The order is that of the registers of a product's operand with a register for each.
#[cube]
fn pair_products(aligned: &Array<u32>, lane: &Lane, #[comptime] pair: usize, #[comptime] t: Trellis) -> Array<u32> {
    let mut products = Array::<u32>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        let j = comptime!(2 * pair + i / 2 + i % 2 * 4);
        products[i] = product(lane_state(aligned, lane, j, t), t.codebook);
    }
    products
}

/// The state of position `j` of a lane.
#[cube]
fn lane_state(aligned: &Array<u32>, lane: &Lane, #[comptime] j: usize, #[comptime] t: Trellis) -> u32 {
    let (register, whole) = comptime!(t.register(j));
    let up = comptime!((j * t.bits - t.starts()[register]) as u32);
    if comptime!(whole && up == 16) {
        aligned[register] & 0xffffu32
    } else if comptime!(whole && up == 0) {
        aligned[register] >> 16u32
    } else if comptime!(whole && MASKED.contains(&j)) {
        (aligned[register] >> comptime!(16 - up)) & 0xffffu32
    } else if comptime!(whole) {
        (aligned[register] * lane.powers[comptime!(j - 1)]) >> 16u32
    } else {
        ((aligned[register] << up) | (aligned[comptime!(register + 1)] >> comptime!(32 - up))) >> 16u32
    }
}

/// Pairs of values of [`Codebook::ThreeInst`] or [`Codebook::Mcg`].
#[cube]
fn half_sums(
    aligned: &Array<u32>,
    lane: &Lane,
    #[comptime] pair: usize,
    #[comptime] t: Trellis,
) -> Array<Vector<f16, Const<2>>> {
    let mma = MmaDefinition::<f16, f16, f16>::new(16usize, 8usize, 16usize);
    let products = pair_products(aligned, lane, pair, t);
    let mut halves = Array::<Vector<f16, Const<2>>>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        // The first and third register give the first pair.
        halves[i] = Vector::<f16, Const<2>>::reinterpret((products[i] & lane.kept) ^ CHANGED);
    }
    let mut ones = Array::<Vector<f16, Const<2>>>::new(2usize);
    ones[0] = Vector::<f16, Const<2>>::reinterpret(lane.selector.extract(0usize));
    ones[1] = Vector::<f16, Const<2>>::reinterpret(lane.selector.extract(1usize));
    let mut zero = Array::<Vector<f16, Const<2>>>::new(2usize);
    zero[0] = Vector::<f16, Const<2>>::new(f16::new(0.0));
    zero[1] = Vector::<f16, Const<2>>::new(f16::new(0.0));
    // The sum of two halves is rounded once, to f16.
    mma.execute(&halves, &ones, &zero)
}

/// The bytes of four states of [`Codebook::Mul1`], as registers of the 16-row operand of `m16n8k32`.
#[cube]
pub(super) fn lane_bytes(
    aligned: &Array<u32>,
    lane: &Lane,
    #[comptime] pair: usize,
    #[comptime] t: Trellis,
) -> Array<Vector<u8, Const<4>>> {
    let products = pair_products(aligned, lane, pair, t);
    let mut bytes = Array::<Vector<u8, Const<4>>>::new(4usize);
    #[unroll]
    for i in 0..4usize {
        bytes[i] = Vector::<u8, Const<4>>::reinterpret(products[i]);
    }
    bytes
}

/// Pairs of values of [`Codebook::Mul1`].
#[cube]
fn byte_sums(
    aligned: &Array<u32>,
    lane: &Lane,
    #[comptime] pair: usize,
    #[comptime] t: Trellis,
) -> Array<Vector<f16, Const<2>>> {
    let mma = MmaDefinition::<u8, u8, i32>::new(16usize, 8usize, 32usize);
    let bytes = lane_bytes(aligned, lane, pair, t);
    let mut ones = Array::<Vector<u8, Const<4>>>::new(2usize);
    ones[0] = Vector::<u8, Const<4>>::reinterpret(lane.selector.extract(0usize));
    ones[1] = Vector::<u8, Const<4>>::reinterpret(lane.selector.extract(1usize));
    // 1024 as f16, whose last mantissa bit counts 1.
    let mut start = Array::<Vector<i32, Const<2>>>::new(2usize);
    start[0] = Vector::<i32, Const<2>>::new(0x6400i32);
    start[1] = Vector::<i32, Const<2>>::new(0x6400i32);
    let sums = mma.execute(&bytes, &ones, &start);
    let mut out = Array::<Vector<f16, Const<2>>>::new(2usize);
    #[unroll]
    for i in 0..2usize {
        let pair = u32::cast_from(sums[i].extract(1usize)) * 65_536u32 + u32::cast_from(sums[i].extract(0usize));
        // A fused multiply-add.
        out[i] = Vector::<f16, Const<2>>::reinterpret(pair)
            * Vector::<f16, Const<2>>::new(f16::new(Codebook::MUL1_STEP))
            + Vector::<f16, Const<2>>::new(f16::new(Codebook::MUL1_OFFSET));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every state of every lane lies where [`lane_state`] looks for it, in the words that the lane reads.
    #[test]
    fn states_lie_in_the_registers() {
        for bits in 1..=8 {
            let t = Trellis { bits, codebook: Codebook::Mcg };
            for lane in 0..32 {
                let offset = (8 * bits * lane + 256 * bits - t.lead()) % 32;
                for (i, &start) in t.starts().iter().enumerate() {
                    assert!(start % 32 + offset <= 32 || start % 32 == 0, "{bits} bits, lane {lane}, register {i}");
                }
                let last = offset + 7 * bits + 16;
                assert!(last <= 32 * t.lane_words(), "{bits} bits, lane {lane}");
                for j in 0..8 {
                    let (register, whole) = t.register(j);
                    let bit = j * bits - t.starts()[register];
                    assert!(bit + 16 <= if whole { 32 } else { 64 }, "{bits} bits, position {j}");
                    assert!(whole || register + 1 < t.starts().len(), "{bits} bits, position {j}");
                }
            }
        }
    }
}

#[cfg(all(test, any(feature = "vulkan", feature = "cuda")))]
mod device_tests {
    use marlin_ops::{Device, HostTensor};

    use super::*;
    use crate::linear::exl3::rotate::LANES;
    use crate::test_values::exact_device;
    use crate::test_values::random;

    /// `out [lane, pair, register]` of a tile.
    #[cube(launch_unchecked)]
    fn products_of_lanes(words: &[u32], out: &mut [u32], constants: Constants, #[comptime] t: Trellis) {
        let lane = new_lane(&constants, t);
        let mut own = Array::<u32>::new(comptime!(t.lane_words()));
        #[unroll]
        for i in 0..comptime!(t.lane_words()) {
            own[i] = words[lane_word(UNIT_POS_X as usize, i, t)];
        }
        let aligned = align(&own, &lane, 0usize, t);
        #[unroll]
        for pair in 0..2usize {
            let products = pair_products(&aligned, &lane, pair, t);
            #[unroll]
            for i in 0..4usize {
                out[UNIT_POS_X as usize * 8usize + comptime!(4 * pair + i)] = products[i];
            }
        }
    }

    /// Lanes find all their states, with tensor cores or without.
    #[test]
    fn lanes_have_the_products_of_their_states() {
        let gpu = exact_device();
        for (codebook, bits) in Codebook::ALL.into_iter().flat_map(|codebook| (1..=8).map(move |bits| (codebook, bits)))
        {
            let t = Trellis { bits, codebook };
            let halves = random(2 * t.tile_words(), 71);
            let words: Vec<u32> = halves.as_chunks().0.iter().map(|[low, high]| low ^ (high << 8)).collect();
            let input = gpu.upload(&HostTensor::from_u32(&[words.len()], &words).unwrap()).unwrap();
            let out = gpu.upload(&HostTensor::from_u32(&[8 * LANES], &[0; 8 * LANES]).unwrap()).unwrap();
            // SAFETY: the words are those of a tile, and the output has eight products of each lane.
            unsafe {
                products_of_lanes::launch_unchecked(
                    gpu.client(),
                    CubeCount::new_single(),
                    CubeDim::new_1d(LANES as u32),
                    input.buffer().arg(words.len()),
                    out.buffer().arg(8 * LANES),
                    t.constants(),
                    t,
                );
            }
            let found = gpu.read_u32(&out).unwrap();
            for (at, &found) in found.iter().enumerate() {
                let (lane, pair, i) = (at / 8, at / 4 % 2, at % 4);
                let position = 8 * lane + 2 * pair + i / 2 + i % 2 * 4;
                let state = state(&words, position, bits);
                let expected = state.wrapping_mul(codebook.multiplier()).wrapping_add(codebook.increment());
                assert_eq!(found, expected, "{codebook:?} {bits} bits, position {position}");
            }
        }
    }

    /// The 16 bits that end with the symbol of a position, bit by bit.
    fn state(words: &[u32], position: usize, bits: usize) -> u32 {
        let count = 32 * words.len();
        (0..16).fold(0, |state, i| {
            let bit = ((position + 1) * bits + count + i - 16) % count;
            state << 1 | words[bit / 32] >> (31 - bit % 32) & 1
        })
    }
}

//! States of EXL3 tiles in lanes.
//!
//! A tile of b bits has 8 b u32 words, their most significant bit first. The 4 b bytes that start with word b c hold the
//! symbols of columns c and c + 8, four row pairs of each: word w of them is element c of row w here, so that eight lanes
//! find their own stream one below the other. What precedes a stream is the last word of the stream before it.

use bytemuck::Zeroable;

use super::{LANES, Simd};

/// Column pairs of a tile.
const COLUMNS: usize = LANES / 2;

/// One word of each column pair.
#[derive(Clone, Copy, Debug, Default, Zeroable)]
#[repr(C, align(32))]
pub(crate) struct TrellisRow(pub(crate) [u32; COLUMNS]);

/// Row pairs of a tile.
pub(crate) const PAIRS: usize = 8;

/// The number of bits from the start of a column pair's stream to the end of row pair `pair` of its first or second
/// column (`half`).
pub(crate) const fn window_end(bits: usize, pair: usize, half: usize) -> usize {
    8 * bits * (pair % 4) + 2 * bits * (pair / 4 + 2 * half + 1)
}

/// The two states of every column that end with rows `2 pair` and `2 pair + 1`, by shifts alone.
#[inline(always)]
pub(super) fn states<S: Simd, const BITS: usize>(s: S, tile: &[TrellisRow; BITS], pair: usize) -> [S::I; 2] {
    let ends = [window_end(BITS, pair, 0), window_end(BITS, pair, 1)];
    // Row of the last bit of a window, and the number of bits that the window has there.
    let rows = ends.map(|end| (end - 1) / 32);
    let inside = [ends[0] - 32 * rows[0], ends[1] - 32 * rows[1]];
    let last = s.load_halves(&tile[rows[0]].0, &tile[rows[1]].0);
    let mut window = s.shr_halves(last, inside.map(|inside| 32 - inside as u32));
    if inside[0] < 16 + BITS || inside[1] < 16 + BITS {
        let end = &tile[BITS - 1].0;
        let wrapped = [end[7], end[0], end[1], end[2], end[3], end[4], end[5], end[6]];
        let before = |row: usize| if row == 0 { &wrapped } else { &tile[row - 1].0 };
        let first = s.load_halves(before(rows[0]), before(rows[1]));
        window = s.or(window, s.shl_halves(first, inside.map(|inside| inside as u32)));
    }
    let mask = s.splat_i(0xFFFF);
    [s.and(s.shr(window, BITS as u32), mask), s.and(window, mask)]
}

/// Where the byte permutation of a row pair takes the windows of all lanes from.
#[cfg(target_arch = "x86_64")]
pub(super) struct Gather<const BITS: usize>;

#[cfg(target_arch = "x86_64")]
impl<const BITS: usize> Gather<BITS> {
    /// The row pair whose permutation serves row pair `pair`.
    pub(super) const fn permutation(pair: usize) -> usize {
        if BITS <= SHARED_BITS { pair % 4 } else { pair }
    }

    /// The two pairs of rows to permute from.
    pub(super) const ROWS: &'static [[usize; 2]; PAIRS] = &gather_rows(BITS);
    /// For each byte of the lanes its place there: 0 to 63 in the first pair of rows, 64 to 127 in the second.
    pub(super) const BYTES: &'static [[u8; 4 * LANES]; PAIRS] = &gather_bytes(BITS);
    /// Bits behind the first and behind the second state in each lane, of the first and of the last four row pairs.
    pub(super) const SHIFTS: &'static [[[u32; LANES]; 2]; 2] = &gather_shifts(BITS);
}

/// Bytes of a stream up to the end of the four that a lane gets. Up to 4 bits a weight they hold the windows of row
/// pairs p and p + 4.
#[cfg(target_arch = "x86_64")]
const fn window_bytes(bits: usize, pair: usize, half: usize) -> usize {
    let last = if bits <= SHARED_BITS { pair % 4 + 4 } else { pair };
    window_end(bits, last, half).div_ceil(8)
}

/// The highest rate at which two row pairs share a permutation.
#[cfg(target_arch = "x86_64")]
const SHARED_BITS: usize = 4;

#[cfg(target_arch = "x86_64")]
const fn gather_shifts(bits: usize) -> [[[u32; LANES]; 2]; 2] {
    let mut shifts = [[[0; LANES]; 2]; 2];
    let mut i = 0;
    while i < 4 * LANES {
        let (quarter, state, lane) = (i / 2 / LANES, i / LANES % 2, i % LANES);
        // Streams of the four row pairs are whole bytes apart.
        let (pair, half) = (4 * quarter, lane / COLUMNS);
        let behind = 8 * window_bytes(bits, pair, half) - window_end(bits, pair, half) + bits * (1 - state);
        assert!(behind + 16 <= 32, "four bytes do not hold the state");
        shifts[quarter][state][lane] = behind as u32;
        i += 1;
    }
    shifts
}

#[cfg(target_arch = "x86_64")]
const fn gather_rows(bits: usize) -> [[usize; 2]; PAIRS] {
    let mut rows = [[0; 2]; PAIRS];
    let last = bits.saturating_sub(2);
    let mut pair = 0;
    while pair < PAIRS {
        let (first, end) = (window_bytes(bits, pair, 0), window_bytes(bits, pair, 1));
        rows[pair] = if bits <= SHARED_BITS {
            [0, last]
        } else if first < 4 {
            // The stream before, then the first words.
            [last, 0]
        } else {
            let row = (first - 4) / 4;
            let row = if row < last { row } else { last };
            match (end - 1) / 4 {
                next if next < row + 2 => [row, row],
                next if next < last => [row, next],
                _ => [row, last],
            }
        };
        pair += 1;
    }
    rows
}

#[cfg(target_arch = "x86_64")]
const fn gather_bytes(bits: usize) -> [[u8; 4 * LANES]; PAIRS] {
    let rows = gather_rows(bits);
    let mut bytes = [[0; 4 * LANES]; PAIRS];
    let mut i = 0;
    while i < PAIRS * 4 * LANES {
        let (pair, lane, byte) = (i / (4 * LANES), i / 4 % LANES, i % 4);
        // Byte 0 of a lane is the last of its window. A window may start in the stream before.
        let position = 4 * bits + window_bytes(bits, pair, lane / COLUMNS) - 1 - byte;
        let (column, position) = match position < 4 * bits {
            true => ((lane + COLUMNS - 1) % COLUMNS, position),
            false => (lane % COLUMNS, position - 4 * bits),
        };
        let (row, place) = (position / 4, 4 * column + 3 - position % 4);
        let [first, second] = rows[pair];
        bytes[pair][i % (4 * LANES)] = if row >= first && row < first + 2 {
            ((row - first) * 4 * COLUMNS + place) as u8
        } else {
            assert!(row >= second && row < second + 2, "a window is spread over more than two pairs of rows");
            ((row - second) * 4 * COLUMNS + place + 4 * LANES) as u8
        };
        i += 1;
    }
    bytes
}

#[cfg(test)]
mod tests {
    use marlin_formats::exl3::tile;

    use super::*;
    use crate::simd::{Kernel, Level};

    struct States<'a, const BITS: usize>(&'a [TrellisRow; BITS]);

    impl<const BITS: usize> Kernel for States<'_, BITS> {
        type Output = [[[u32; LANES]; 2]; PAIRS];

        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> Self::Output {
            let mut out = [[[0; LANES]; 2]; PAIRS];
            for (pair, out) in out.iter_mut().enumerate() {
                let [even, odd] = s.trellis_states(self.0, pair);
                s.store_i(even, &mut out[0]);
                s.store_i(odd, &mut out[1]);
            }
            out
        }
    }

    fn check<const BITS: usize>() {
        for seed in 0..20u32 {
            let words: Vec<u16> =
                (0..16 * BITS as u32).map(|i| ((i + 977 * seed).wrapping_mul(2_654_435_761) >> 13) as u16).collect();
            let mut rows = [TrellisRow::default(); BITS];
            for (i, word) in words.as_chunks::<2>().0.iter().enumerate() {
                rows[i % BITS].0[i / BITS] = u32::from(word[0]) | u32::from(word[1]) << 16;
            }
            let expected = tile::states(&words).unwrap();
            for level in Level::all() {
                for found in [level.run(States(&rows)), level.run_trellis(States(&rows))] {
                    for (position, state) in expected.into_iter().enumerate() {
                        let (row, column) = tile::element(position);
                        let state = u32::from(state);
                        assert_eq!(found[row / 2][row % 2][column], state, "{level:?} {BITS} bits, {row}, {column}");
                    }
                }
            }
        }
    }

    #[test]
    fn states_of_every_rate() {
        check::<1>();
        check::<2>();
        check::<3>();
        check::<4>();
        check::<5>();
        check::<6>();
        check::<7>();
        check::<8>();
    }
}

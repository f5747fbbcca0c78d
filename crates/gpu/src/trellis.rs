//! The search for EXL3 codes: a launch for each step of Viterbi's algorithm over all tiles, so that the end of a launch is
//! the only barrier that the steps need.

use cubecl::prelude::*;
use half::f16;
use marlin_formats::exl3::{Codebook, tile};
use marlin_ops::Result;
use marlin_ops::trellis::{FIRST_START, Path, PathSearch, Tile};

use crate::launch::{UNITS, cubes, cubes_for, units};
use crate::{Buffer, Gpu};

const OP: &str = "search_paths";

/// Positions of a tile.
const POSITIONS: usize = tile::WEIGHTS;
/// Tiles of a batch: their choices are at most half a GiB.
const MOST_TILES: usize = 512;
/// States that a unit takes at a time.
const QUAD: usize = 4;
/// More than any sum of squared errors, and nothing to what is added to it.
const UNREACHABLE: f32 = 1e30;

/// What the kernels are compiled for.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct Search {
    /// Bits a weight, 1 to 8.
    bits: usize,
}

impl Search {
    const fn states(self) -> usize {
        1 << (16 - self.bits)
    }

    /// Bits that keep the choice of a state among its predecessors.
    const fn choice_bits(self) -> usize {
        self.bits.next_power_of_two()
    }

    /// States whose choices share a word.
    const fn states_per_word(self) -> usize {
        32 / self.choice_bits()
    }

    /// Words of choices that a step of a tile makes.
    const fn choice_words(self) -> usize {
        self.states() / self.states_per_word()
    }
}

/// Where the costs before a step come from.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
enum Before {
    /// The step before.
    Stored,
    /// The first pass starts in all states.
    AllStates,
    /// The second starts in the closing state of its tile.
    ClosingState,
}

/// The cost of a state before a step.
#[cube]
fn cost_before(
    costs: &[f32],
    closing: &[u32],
    tile: usize,
    state: usize,
    #[comptime] s: Search,
    #[comptime] from: Before,
) -> f32 {
    if comptime!(from == Before::Stored) {
        costs[tile * comptime!(s.states()) + state]
    } else if comptime!(from == Before::AllStates) {
        f32::new(0.0)
    } else {
        select(closing[tile] == state as u32, 0.0f32.runtime(), UNREACHABLE.runtime())
    }
}

/// One step of all tiles: `after[state] = min over m of before[word >> bits] + (value(word) - x)^2`, and which m it was.
/// `values` has two f16 a word, `choices` is `[tiles, choice_words]`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn step(
    targets: &[f32],
    values: &[u32],
    before: &[f32],
    closing: &[u32],
    after: &mut [f32],
    choices: &mut [u32],
    tiles: u32,
    position: u32,
    choices_start: u32,
    #[comptime] s: Search,
    #[comptime] from: Before,
) {
    let unit = ABSOLUTE_POS;
    let words = comptime!(s.choice_words());
    if unit < tiles as usize * words {
        let tile = unit / words;
        let x = targets[tile * POSITIONS + position as usize];
        let first = unit % words * comptime!(s.states_per_word());
        let mut chosen = 0u32.runtime();
        #[unroll]
        for quad in 0..comptime!(s.states_per_word() / QUAD) {
            let state = first + comptime!(quad * QUAD);
            let mut best = Array::<f32>::new(QUAD);
            let mut choice = Array::<u32>::new(QUAD);
            #[unroll]
            for i in 0..QUAD {
                best[i] = UNREACHABLE.runtime();
                choice[i] = 0u32.runtime();
            }
            for m in 0..comptime!(1u32 << s.bits) {
                let word = m as usize * comptime!(s.states()) + state;
                #[unroll]
                for pair in 0..comptime!(QUAD / 2) {
                    // Two words in a row have the same predecessor.
                    let predecessor = (word + comptime!(2 * pair)) >> comptime!(s.bits);
                    let cost = cost_before(before, closing, tile, predecessor, s, from);
                    let halves = Vector::<f16, Const<2>>::reinterpret(values[word / 2usize + pair]);
                    #[unroll]
                    for half in 0..2usize {
                        let i = comptime!(2 * pair + half);
                        let error = f32::cast_from(halves.extract(half)) - x;
                        let cost = cost + error * error;
                        let better = cost < best[i];
                        best[i] = select(better, cost, best[i]);
                        choice[i] = select(better, m, choice[i]);
                    }
                }
            }
            #[unroll]
            for i in 0..QUAD {
                after[tile * comptime!(s.states()) + state + i] = best[i];
                chosen |= choice[i] << comptime!(((quad * QUAD + i) * s.choice_bits()) as u32);
            }
        }
        choices[choices_start as usize + unit] = chosen;
    }
}

/// The word that leads to `state` after step `t`.
#[cube]
fn chosen_word(choices: &[u32], tiles: u32, tile: usize, t: usize, state: usize, #[comptime] s: Search) -> u32 {
    let words = comptime!(s.choice_words());
    let per_word = comptime!(s.states_per_word());
    let word = choices[(t * tiles as usize + tile) * words + state / per_word];
    let shift = (state % per_word) as u32 * comptime!(s.choice_bits() as u32);
    let m = (word >> shift) & comptime!((1u32 << s.bits) - 1u32);
    m * comptime!(s.states() as u32) + state as u32
}

/// Follows the best path of the first pass from its cheapest end to the state before position 0; a cube a tile.
#[cube(launch_unchecked)]
fn close(costs: &[f32], choices: &[u32], closing: &mut [u32], tiles: u32, #[comptime] s: Search) {
    let mut least = Shared::<[f32]>::new_slice(UNITS as usize);
    let mut states = Shared::<[u32]>::new_slice(UNITS as usize);
    let tile = CUBE_POS;
    if tile < tiles as usize {
        let start = tile * comptime!(s.states());
        let unit = UNIT_POS as usize;
        let mut cost = UNREACHABLE.runtime();
        let mut state = 0u32.runtime();
        let mut i = unit;
        while i < comptime!(s.states()) {
            let other = costs[start + i];
            if other < cost {
                cost = other;
                state = i as u32;
            }
            i += UNITS as usize;
        }
        least[unit] = cost;
        states[unit] = state;
        sync_cube();
        if unit == 0usize {
            for i in 1..UNITS as usize {
                let other = least[i];
                if other < cost || (other == cost && states[i] < state) {
                    cost = other;
                    state = states[i];
                }
            }
            for i in 0..comptime!(POSITIONS - FIRST_START) {
                let t = comptime!(POSITIONS - 1).runtime() - i;
                state = chosen_word(choices, tiles, tile, t, state as usize, s) >> comptime!(s.bits as u32);
            }
            closing[tile] = state;
        }
    }
}

/// Follows the best path of the second pass from the closing state; a unit a tile.
#[cube(launch_unchecked)]
fn trace(choices: &[u32], closing: &[u32], paths: &mut [u32], tiles: u32, #[comptime] s: Search) {
    let tile = ABSOLUTE_POS;
    if tile < tiles as usize {
        let mut state = closing[tile];
        for i in 0..POSITIONS {
            let t = comptime!(POSITIONS - 1).runtime() - i;
            let word = chosen_word(choices, tiles, tile, t, state as usize, s);
            paths[tile * POSITIONS + t] = word;
            state = word >> comptime!(s.bits as u32);
        }
    }
}

/// Memory of a batch.
struct Batch {
    tiles: usize,
    targets: Buffer,
    values: Buffer,
    /// Before and after a step, in turn.
    costs: [Buffer; 2],
    /// `[positions, tiles, choice_words]`.
    choices: Buffer,
    /// State before position 0 of each tile.
    closing: Buffer,
    paths: Buffer,
}

impl<R: Runtime> Gpu<R> {
    fn search_batch(&self, s: Search, values: &Buffer, targets: &[Tile]) -> Result<Vec<Path>> {
        let tiles = targets.len();
        let rounded: Vec<f32> = targets.as_flattened().iter().map(|&x| f16::from_f32(x).to_f32()).collect();
        let words = |count: usize| self.allocate(OP, count * size_of::<u32>());
        let batch = Batch {
            tiles,
            targets: self.create_f32(OP, &rounded)?,
            values: values.clone(),
            costs: [words(tiles * s.states())?, words(tiles * s.states())?],
            choices: words(POSITIONS * tiles * s.choice_words())?,
            closing: words(tiles)?,
            paths: words(tiles * POSITIONS)?,
        };
        self.forward(s, &batch, FIRST_START, Before::AllStates);
        // SAFETY: the buffers hold what the kernel's documentation says, of `tiles` tiles; further cubes do nothing.
        unsafe {
            close::launch_unchecked::<R>(
                self.client(),
                cubes(tiles),
                units(),
                batch.costs[POSITIONS % 2].arg(tiles * s.states()),
                batch.choices.arg(POSITIONS * tiles * s.choice_words()),
                batch.closing.arg(tiles),
                tiles as u32,
                s,
            );
        }
        self.forward(s, &batch, 0, Before::ClosingState);
        // SAFETY: as above; further units do nothing.
        unsafe {
            trace::launch_unchecked::<R>(
                self.client(),
                cubes_for(tiles),
                units(),
                batch.choices.arg(POSITIONS * tiles * s.choice_words()),
                batch.closing.arg(tiles),
                batch.paths.arg(tiles * POSITIONS),
                tiles as u32,
                s,
            );
        }
        let bytes = self.read(OP, &batch.paths, tiles * POSITIONS * size_of::<u32>())?;
        let words: Vec<u16> = bytes.as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b) as u16).collect();
        Ok(words.as_chunks::<POSITIONS>().0.to_vec())
    }

    /// One pass over all positions, cyclically from `start`.
    fn forward(&self, s: Search, batch: &Batch, start: usize, from: Before) {
        let tiles = batch.tiles;
        for t in 0..POSITIONS {
            let from = if t == 0 { from } else { Before::Stored };
            // SAFETY: the buffers hold what the kernel's documentation says, of `tiles` tiles; units beyond do nothing.
            unsafe {
                step::launch_unchecked::<R>(
                    self.client(),
                    cubes_for(tiles * s.choice_words()),
                    units(),
                    batch.targets.arg(tiles * POSITIONS),
                    batch.values.arg(1 << 15),
                    batch.costs[t % 2].arg(tiles * s.states()),
                    batch.closing.arg(tiles),
                    batch.costs[(t + 1) % 2].arg(tiles * s.states()),
                    batch.choices.arg(POSITIONS * tiles * s.choice_words()),
                    tiles as u32,
                    ((start + t) % POSITIONS) as u32,
                    (t * tiles * s.choice_words()) as u32,
                    s,
                    from,
                );
            }
        }
    }
}

impl<R: Runtime> PathSearch for Gpu<R> {
    fn tiles_at_once(&self, bits: u32) -> usize {
        let s = Search { bits: bits as usize };
        let bytes = (POSITIONS * s.choice_words()).max(s.states()) * size_of::<u32>();
        let most = self.properties().memory.max_page_size / bytes as u64;
        usize::try_from(most).unwrap_or(MOST_TILES).clamp(1, MOST_TILES)
    }

    fn run_search_paths(&self, codebook: Codebook, bits: u32, targets: &[Tile]) -> Result<Vec<Path>> {
        let s = Search { bits: bits as usize };
        let values: Vec<u16> = codebook.table().into_iter().map(f16::to_bits).collect();
        let values = self.create(OP, bytemuck::cast_slice(&values))?;
        let mut paths = Vec::with_capacity(targets.len());
        for targets in targets.chunks(self.tiles_at_once(bits)) {
            paths.extend(self.search_batch(s, &values, targets)?);
        }
        Ok(paths)
    }
}

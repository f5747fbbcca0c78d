//! The search for EXL3 codes: Viterbi's algorithm, a cube a tile.

use std::sync::PoisonError;

use cubecl::prelude::*;
use half::f16;
use marlin_formats::exl3::{Codebook, tile};
use marlin_ops::trellis::{FIRST_START, Path, PathSearch, Tile};
use marlin_ops::{Device, Result};

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

    /// Quads of states whose choices share a word. They are [`Search::quad_distance`] states apart, so that neighbouring
    /// units have neighbouring quads.
    const fn quads_per_word(self) -> usize {
        32 / self.choice_bits() / QUAD
    }

    /// Words of choices that a step of a tile makes.
    const fn choice_words(self) -> usize {
        self.states() / QUAD / self.quads_per_word()
    }

    const fn quad_distance(self) -> usize {
        QUAD * self.choice_words()
    }
}

/// Where a pass starts.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
enum Start {
    /// The first pass: in all states.
    AllStates,
    /// The second: in the closing state of its tile.
    ClosingState,
}

/// Steps `first` to `first + count - 1` of a pass, a cube a tile: `after[state] = min over m of before[word >> bits] +
/// (value(word) - x)^2`, and which m it was. `values` has two f16 a word, `costs` is `[2, tiles, states]`, where the costs
/// before step t are in half `t % 2`, and `choices` is `[positions, tiles, choice_words]`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn forward(
    targets: &[f32],
    values: &[u32],
    costs: &mut [f32],
    choices: &mut [u32],
    tiles: u32,
    first: u32,
    count: u32,
    #[comptime] s: Search,
    #[comptime] start: Start,
) {
    let tile = CUBE_POS;
    if tile < tiles as usize {
        let tiles = tiles as usize;
        let states = comptime!(s.states());
        let words = comptime!(s.choice_words());
        for t in first..first + count {
            let before = (t as usize % 2usize * tiles + tile) * states;
            let after = ((t as usize + 1usize) % 2usize * tiles + tile) * states;
            let position = match comptime!(start) {
                Start::AllStates => (t as usize + FIRST_START) % POSITIONS,
                Start::ClosingState => t as usize,
            };
            let x = targets[tile * POSITIONS + position];
            let mut i = UNIT_POS as usize;
            while i < words {
                choices[(t as usize * tiles + tile) * words + i] = step(values, costs, before, after, x, i * QUAD, s);
                i += CUBE_DIM as usize;
            }
            sync_storage();
        }
    }
}

/// The costs before the first step of a pass.
#[cube(launch_unchecked)]
fn begin(closing: &[u32], costs: &mut [f32], tiles: u32, #[comptime] s: Search, #[comptime] start: Start) {
    let i = ABSOLUTE_POS;
    let states = comptime!(s.states());
    if i < tiles as usize * states {
        costs[i] = match comptime!(start) {
            Start::AllStates => f32::new(0.0),
            Start::ClosingState => {
                select(closing[i / states] == (i % states) as u32, 0.0f32.runtime(), UNREACHABLE.runtime())
            }
        };
    }
}

/// One step of the states that share a word of choices, the first of them `first`; returns that word.
#[cube]
fn step(
    values: &[u32],
    costs: &mut [f32],
    before: usize,
    after: usize,
    x: f32,
    first: usize,
    #[comptime] s: Search,
) -> u32 {
    let mut chosen = 0u32.runtime();
    #[unroll]
    for quad in 0..comptime!(s.quads_per_word()) {
        let state = first + comptime!(quad * s.quad_distance());
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
                let cost = costs[before + ((word + comptime!(2 * pair)) >> comptime!(s.bits))];
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
            costs[after + state + i] = best[i];
            chosen |= choice[i] << comptime!(((quad * QUAD + i) * s.choice_bits()) as u32);
        }
    }
    chosen
}

/// The word that leads to `state` after step `t`.
#[cube]
fn chosen_word(choices: &[u32], tiles: u32, tile: usize, t: usize, state: usize, #[comptime] s: Search) -> u32 {
    let words = comptime!(s.choice_words());
    let word = choices[(t * tiles as usize + tile) * words + state / QUAD % words];
    let place = state / comptime!(s.quad_distance()) * QUAD + state % QUAD;
    let shift = place as u32 * comptime!(s.choice_bits() as u32);
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
    /// `[2, tiles, states]`.
    costs: Buffer,
    /// `[positions, tiles, choice_words]`.
    choices: Buffer,
    /// State before position 0 of each tile.
    closing: Buffer,
    paths: Buffer,
}

impl<R: Runtime> Gpu<R> {
    fn search_batch(&self, s: Search, values: &Buffer, targets: &[Tile]) -> Result<Vec<Path>> {
        // Whatever the number of threads, the device keeps the memory of one batch.
        let _turn = self.searching.lock().unwrap_or_else(PoisonError::into_inner);
        let tiles = targets.len();
        let rounded: Vec<f32> = targets.as_flattened().iter().map(|&x| f16::from_f32(x).to_f32()).collect();
        let words = |count: usize| self.allocate(OP, count * size_of::<u32>());
        let batch = Batch {
            tiles,
            targets: self.create_f32(OP, &rounded)?,
            values: values.clone(),
            costs: words(2 * tiles * s.states())?,
            choices: words(POSITIONS * tiles * s.choice_words())?,
            closing: words(tiles)?,
            paths: words(tiles * POSITIONS)?,
        };
        self.pass(s, &batch, Start::AllStates);
        // SAFETY: the buffers hold what the kernel's documentation says, of `tiles` tiles; further cubes do nothing.
        unsafe {
            close::launch_unchecked::<R>(
                self.client(),
                cubes(tiles),
                units(),
                batch.costs.arg(2 * tiles * s.states()),
                batch.choices.arg(POSITIONS * tiles * s.choice_words()),
                batch.closing.arg(tiles),
                tiles as u32,
                s,
            );
        }
        self.pass(s, &batch, Start::ClosingState);
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

    /// One pass over all positions.
    fn pass(&self, s: Search, batch: &Batch, start: Start) {
        let tiles = batch.tiles;
        // SAFETY: the buffers hold what the kernel's documentation says, of `tiles` tiles; units beyond do nothing.
        unsafe {
            begin::launch_unchecked::<R>(
                self.client(),
                cubes_for(tiles * s.states()),
                units(),
                batch.closing.arg(tiles),
                batch.costs.arg(2 * tiles * s.states()),
                tiles as u32,
                s,
                start,
            );
        }
        let (steps, step_units) = self.step_launch();
        for first in (0..POSITIONS).step_by(steps) {
            // SAFETY: as above; further cubes do nothing.
            unsafe {
                forward::launch_unchecked::<R>(
                    self.client(),
                    cubes(tiles),
                    CubeDim::new_1d(step_units),
                    batch.targets.arg(tiles * POSITIONS),
                    batch.values.arg(1 << 15),
                    batch.costs.arg(2 * tiles * s.states()),
                    batch.choices.arg(POSITIONS * tiles * s.choice_words()),
                    tiles as u32,
                    first as u32,
                    steps as u32,
                    s,
                    start,
                );
            }
        }
    }

    /// Steps of a launch of [`forward`] and units of its cubes. On CUDA all steps, and so many units that values and costs
    /// of the tiles at work stay in the first-level cache. Elsewhere barriers do not cover memory outside of the cube
    /// (Metal), or not for sure (Vulkan drivers), so that only the end of a launch separates two steps.
    fn step_launch(&self) -> (usize, u32) {
        match Device::name(self) {
            "cuda" => (POSITIONS, 1024),
            _ => (1, self.properties().hardware.max_cube_dim.0.min(256)),
        }
    }

    fn search_in_batches(&self, codebook: Codebook, s: Search, targets: &[Tile], batch: usize) -> Result<Vec<Path>> {
        let values: Vec<u16> = codebook.table().into_iter().map(f16::to_bits).collect();
        let values = self.create(OP, bytemuck::cast_slice(&values))?;
        let mut paths = Vec::with_capacity(targets.len());
        for targets in targets.chunks(batch) {
            paths.extend(self.search_batch(s, &values, targets)?);
        }
        Ok(paths)
    }
}

impl<R: Runtime> PathSearch for Gpu<R> {
    fn tiles_at_once(&self, bits: u32) -> usize {
        let s = Search { bits: bits as usize };
        let bytes = POSITIONS * s.choice_words() * size_of::<u32>();
        let most = self.properties().memory.max_page_size / bytes as u64;
        usize::try_from(most).unwrap_or(MOST_TILES).clamp(1, MOST_TILES)
    }

    fn run_search_paths(&self, codebook: Codebook, bits: u32, targets: &[Tile]) -> Result<Vec<Path>> {
        let s = Search { bits: bits as usize };
        self.search_in_batches(codebook, s, targets, self.tiles_at_once(bits))
    }
}

#[cfg(all(test, feature = "vulkan"))]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn batches_and_threads_change_nothing() {
        let device = crate::vulkan(None).unwrap();
        let target = |i: usize| ((i * 7919 + i / 5) % 1009) as f32 / 300.0 - 1.7;
        let targets: [Tile; 5] = std::array::from_fn(|t| std::array::from_fn(|p| target(t * POSITIONS + p)));
        let search = |targets: &[Tile], batch: usize| {
            device.search_in_batches(Codebook::Mcg, Search { bits: 6 }, targets, batch).unwrap()
        };
        let alone: Vec<Path> = targets.iter().flat_map(|target| search(&[*target], 1)).collect();
        assert!((1..5).all(|t| alone[t] != alone[0]));
        thread::scope(|scope| {
            let threads: Vec<_> =
                [2, 5, 1].map(|batch| scope.spawn(move || search(&targets, batch))).into_iter().collect();
            threads.into_iter().for_each(|thread| assert!(thread.join().unwrap() == alone));
        });
        assert!(search(&[], 2).is_empty());
    }
}

//! Stable counting sort of assignments by expert: counts of each expert in blocks of assignments, exclusive prefixes
//! over blocks and experts, and the scatter. No atomics, so the order is the same in every run.

use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::{Result, Tensor};

use super::dot::masked;
use crate::Gpu;
use crate::fault::{Fault, record};
use crate::launch::cubes;

/// Assignments of a block; units of a cube.
const BLOCK: usize = 256;

/// The sum over units up to and including this one; `memory` holds [`BLOCK`] values and then all sums.
#[cube]
fn inclusive_sum(memory: &mut [u32], value: u32) -> u32 {
    let unit = UNIT_POS as usize;
    memory[unit] = value;
    sync_cube();
    #[unroll]
    for stage in 0..comptime!(BLOCK.ilog2() as usize) {
        let step = comptime!(1usize << stage);
        let mut lower = 0u32.runtime();
        if unit >= step {
            lower = memory[unit - step];
        }
        sync_cube();
        memory[unit] += lower;
        sync_cube();
    }
    memory[unit]
}

/// Checks the ids and counts them: `counts [E, blocks]`, and for each assignment how many of its block come before it
/// in its expert. One cube a block.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn count_blocks(
    ids: &[u32],
    counts: &mut [u32],
    ranks: &mut [u32],
    faults: &mut [Atomic<u32>],
    assignments: u32,
    top_k: u32,
    experts: u32,
    blocks: u32,
    zero: u32,
) {
    let mut block_ids = Shared::<[u32]>::new_slice(BLOCK);
    if CUBE_POS < blocks as usize {
        let unit = UNIT_POS as usize;
        let shift = masked(zero);
        let a = CUBE_POS * BLOCK + unit;
        block_ids[unit] = u32::MAX;
        check_id(ids, faults, a, top_k as usize, experts, a < assignments as usize);
        if a < assignments as usize {
            block_ids[unit] = ids[a];
        }
        sync_cube();
        // All units count together: there are no branches around the loops.
        let own = block_ids[unit];
        let mut before = 0u32.runtime();
        for other in 0..BLOCK {
            before += u32::cast_from(block_ids[other + shift] == own) & u32::cast_from(other < unit);
        }
        if a < assignments as usize {
            ranks[a] = before;
        }
        for round in 0..(experts as usize).div_ceil(BLOCK) {
            let e = round * BLOCK + unit;
            let mut count = 0u32.runtime();
            for other in 0..BLOCK {
                count += u32::cast_from(block_ids[other + shift] == e as u32);
            }
            if e < experts as usize {
                counts[e * blocks as usize + CUBE_POS] = count;
            }
        }
    }
}

/// Where `checked`, records an expert that does not exist, or that the token has already.
#[cube]
pub(super) fn check_id(ids: &[u32], faults: &mut [Atomic<u32>], a: usize, top_k: usize, experts: u32, checked: bool) {
    let own = select(checked, a, 0usize.runtime());
    let id = ids[own];
    if checked && id >= experts {
        record(faults, comptime!(Fault::ExpertId), own);
    }
    let first = own / top_k * top_k;
    for s in 0..top_k {
        let before = first + s < own;
        let other = select(before, first + s, own);
        if checked && before && ids[other] == id {
            record(faults, comptime!(Fault::ExpertTwice), own);
        }
    }
}

/// Makes each expert's counts their exclusive prefix over blocks. One cube an expert.
#[cube(launch_unchecked)]
fn scan_blocks(counts: &mut [u32], totals: &mut [u32], experts: u32, blocks: u32) {
    let mut memory = Shared::<[u32]>::new_slice(BLOCK);
    let expert = CUBE_POS;
    if expert < experts as usize {
        let start = expert * blocks as usize;
        let mut carry = 0u32.runtime();
        let mut first = 0usize.runtime();
        while first < blocks as usize {
            let block = first + UNIT_POS as usize;
            let mut count = 0u32.runtime();
            if block < blocks as usize {
                count = counts[start + block];
            }
            let sum = inclusive_sum(&mut memory, count);
            if block < blocks as usize {
                counts[start + block] = carry + sum - count;
            }
            carry += memory[BLOCK - 1];
            sync_cube();
            first += BLOCK;
        }
        if UNIT_POS == 0 {
            totals[expert] = carry;
        }
    }
}

/// `offsets [E + 1]`, the exclusive prefix of the totals. One cube.
#[cube(launch_unchecked)]
fn scan_experts(totals: &[u32], offsets: &mut [u32], experts: u32) {
    let mut memory = Shared::<[u32]>::new_slice(BLOCK);
    if CUBE_POS == 0usize {
        let mut carry = 0u32.runtime();
        let mut first = 0usize.runtime();
        while first < experts as usize {
            let e = first + UNIT_POS as usize;
            let mut count = 0u32.runtime();
            if e < experts as usize {
                count = totals[e];
            }
            let sum = inclusive_sum(&mut memory, count);
            if e < experts as usize {
                offsets[e] = carry + sum - count;
            }
            carry += memory[BLOCK - 1];
            sync_cube();
            first += BLOCK;
        }
        if UNIT_POS == 0 {
            offsets[experts as usize] = carry;
        }
    }
}

/// Sorted rows: `inverse` holds ranks within blocks before and rows after. One unit an assignment.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn scatter(
    ids: &[u32],
    counts: &[u32],
    offsets: &[u32],
    permutation: &mut [u32],
    inverse: &mut [u32],
    assignments: u32,
    experts: u32,
    blocks: u32,
) {
    if CUBE_POS < blocks as usize {
        let a = CUBE_POS * BLOCK + UNIT_POS as usize;
        if a < assignments as usize {
            let id = ids[a];
            if id < experts {
                let row = offsets[id as usize] + counts[id as usize * blocks as usize + CUBE_POS] + inverse[a];
                inverse[a] = row;
                permutation[row as usize] = a as u32;
            }
        }
    }
}

/// Tiles of at most `tile_rows` sorted rows of one expert: `tiles [most, 2]` are expert and first row, the rest
/// [`u32::MAX`]. One cube.
#[cube(launch_unchecked)]
fn list_tiles(offsets: &[u32], tiles: &mut [u32], experts: u32, most: u32, tile_rows: u32) {
    let mut memory = Shared::<[u32]>::new_slice(BLOCK);
    if CUBE_POS == 0usize {
        let mut carry = 0u32.runtime();
        let mut first = 0usize.runtime();
        while first < experts as usize {
            let e = first + UNIT_POS as usize;
            let mut start = 0u32.runtime();
            let mut count = 0u32.runtime();
            if e < experts as usize {
                start = offsets[e];
                count = (offsets[e + 1usize] - start + tile_rows - 1u32) / tile_rows;
            }
            let at = carry + inclusive_sum(&mut memory, count) - count;
            for i in 0..count {
                tiles[2usize * (at + i) as usize] = e as u32;
                tiles[2usize * (at + i) as usize + 1usize] = start + i * tile_rows;
            }
            carry += memory[BLOCK - 1];
            sync_cube();
            first += BLOCK;
        }
        let mut tile = carry + UNIT_POS;
        while tile < most {
            tiles[2usize * tile as usize] = u32::MAX;
            tile += comptime!(BLOCK as u32);
        }
    }
}

/// Buffers of a sort: `offsets [E + 1]`, `permutation [T k]`, `inverse [T k]`.
pub(super) struct Sorted<'a, R: Runtime> {
    pub(super) offsets: &'a Tensor<Gpu<R>>,
    pub(super) permutation: &'a Tensor<Gpu<R>>,
    pub(super) inverse: &'a Tensor<Gpu<R>>,
}

impl<R: Runtime> Gpu<R> {
    /// Sorts the assignments `ids [T, k]` by expert.
    pub(super) fn group(
        &self,
        operation: &'static str,
        ids: &Tensor<Self>,
        experts: usize,
        sorted: &Sorted<'_, R>,
    ) -> Result<()> {
        let assignments = ids.elements();
        let blocks = assignments.div_ceil(BLOCK);
        let counts = self.scratch(operation, DType::U32, &[experts, blocks.max(1)])?;
        let totals = self.scratch(operation, DType::U32, &[experts])?;
        let dim = CubeDim::new_1d(BLOCK as u32);
        let arg = |tensor: &Tensor<Self>| tensor.buffer().arg(tensor.elements());
        // SAFETY: ids, permutation and inverse hold `assignments` elements, counts experts times blocks, totals
        // `experts`, offsets one more; ids outside the layer are not used as an index, and rows of the others are
        // below `assignments`.
        unsafe {
            if assignments > 0 {
                count_blocks::launch_unchecked::<R>(
                    self.client(),
                    cubes(blocks),
                    dim,
                    arg(ids),
                    arg(&counts),
                    arg(sorted.inverse),
                    self.faults(),
                    assignments as u32,
                    ids.columns() as u32,
                    experts as u32,
                    blocks as u32,
                    0,
                );
            }
            scan_blocks::launch_unchecked::<R>(
                self.client(),
                cubes(experts),
                dim,
                arg(&counts),
                arg(&totals),
                experts as u32,
                blocks as u32,
            );
            scan_experts::launch_unchecked::<R>(
                self.client(),
                cubes(1),
                dim,
                arg(&totals),
                arg(sorted.offsets),
                experts as u32,
            );
            if assignments > 0 {
                scatter::launch_unchecked::<R>(
                    self.client(),
                    cubes(blocks),
                    dim,
                    arg(ids),
                    arg(&counts),
                    arg(sorted.offsets),
                    arg(sorted.permutation),
                    arg(sorted.inverse),
                    assignments as u32,
                    experts as u32,
                    blocks as u32,
                );
            }
        }
        Ok(())
    }

    /// The tiles of at most `tile_rows` rows, and how many there are room for.
    pub(super) fn tiles(
        &self,
        operation: &'static str,
        offsets: &Tensor<Self>,
        assignments: usize,
        tile_rows: usize,
    ) -> Result<(Tensor<Self>, usize)> {
        let experts = offsets.elements() - 1;
        // Each expert with rows has at most one tile that is not full.
        let most = assignments / tile_rows + experts.min(assignments);
        let tiles = self.scratch(operation, DType::U32, &[most, 2])?;
        // SAFETY: offsets hold one element more than there are experts, and the tiles of all are at most `most`.
        unsafe {
            list_tiles::launch_unchecked::<R>(
                self.client(),
                cubes(1),
                CubeDim::new_1d(BLOCK as u32),
                offsets.buffer().arg(experts + 1),
                tiles.buffer().arg(2 * most),
                experts as u32,
                most as u32,
                tile_rows as u32,
            );
        }
        Ok((tiles, most))
    }
}

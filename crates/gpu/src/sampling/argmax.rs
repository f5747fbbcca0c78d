//! Argmax: the best of each chunk of a row, then of the chunks.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::{Result, Tensor};

use super::order::{BAD, BANNED, cube_max_word, key_of};
use crate::Gpu;
use crate::element::{Storage, load};
use crate::fault::{self, Fault};
use crate::launch::{UNITS, cubes, units};

/// Logits of a chunk that one unit reads.
const PER_UNIT: usize = 16;

/// Logits of a chunk.
const CHUNK: usize = PER_UNIT * UNITS as usize;

/// `best[row, chunk] = (key, id)` of the first maximum; NaN and +inf are faults.
#[cube(launch_unchecked)]
fn best_of_chunks<E: Numeric>(
    logits: &[E],
    best: &mut [u32],
    faults: &mut [Atomic<u32>],
    rows: u32,
    columns: u32,
    chunks: u32,
    #[comptime] storage: Storage,
    #[comptime] bad_logit: Fault,
    #[define(E)] _element: ElemType,
) {
    let row = CUBE_POS / chunks as usize;
    if row < rows as usize {
        let first = (CUBE_POS % chunks as usize) * CHUNK;
        let start = row * columns as usize;
        let mut key = 0u32.runtime();
        let mut id = u32::MAX.runtime();
        #[unroll]
        for j in 0..PER_UNIT {
            let i = first + j * UNITS as usize + UNIT_POS as usize;
            if i < columns as usize {
                let other = key_of(load::<E>(logits, start + i, storage));
                if other == BAD {
                    fault::record(faults, bad_logit, start + i);
                }
                if other > key {
                    key = other;
                    id = i as u32;
                }
            }
        }
        let largest = cube_max_word(key, UNITS as usize);
        // The smallest id is the largest complement.
        let id = !cube_max_word(select(key == largest, !id, 0u32.runtime()), UNITS as usize);
        if UNIT_POS == 0 {
            best[2usize * CUBE_POS] = largest;
            best[2usize * CUBE_POS + 1usize] = id;
        }
    }
}

/// `ids[row]` from the bests of its chunks; a row of only -inf is a fault.
#[cube(launch_unchecked)]
fn best_of_rows(
    best: &[u32],
    ids: &mut [u32],
    faults: &mut [Atomic<u32>],
    rows: u32,
    chunks: u32,
    #[comptime] empty_row: Fault,
) {
    let row = CUBE_POS;
    if row < rows as usize {
        let start = row * chunks as usize;
        let mut key = 0u32.runtime();
        let mut id = u32::MAX.runtime();
        let mut i = UNIT_POS as usize;
        while i < chunks as usize {
            let other = best[2usize * (start + i)];
            if other > key {
                key = other;
                id = best[2usize * (start + i) + 1usize];
            }
            i += UNITS as usize;
        }
        let largest = cube_max_word(key, UNITS as usize);
        let id = !cube_max_word(select(key == largest, !id, 0u32.runtime()), UNITS as usize);
        if UNIT_POS == 0 {
            ids[row] = id;
            if largest == BANNED {
                fault::record(faults, empty_row, row);
            }
        }
    }
}

/// Enqueues [`marlin_ops::SamplingOps::argmax`]; the faults are those of a bad logit and of a row of only -inf.
pub(super) fn launch<R: Runtime>(
    gpu: &Gpu<R>,
    logits: &Tensor<Gpu<R>>,
    ids: &mut Tensor<Gpu<R>>,
    [bad_logit, empty_row]: [Fault; 2],
) -> Result<()> {
    let (rows, columns) = (logits.rows(), logits.columns());
    if rows == 0 {
        return Ok(());
    }
    let chunks = columns.div_ceil(CHUNK);
    let best = gpu.scratch("argmax", DType::U32, &[rows, chunks, 2])?;
    let storage = Storage::of(logits.dtype());
    // SAFETY: logits hold rows * columns elements, `best` two words per chunk, ids one per row; kernels stay within.
    unsafe {
        best_of_chunks::launch_unchecked::<R>(
            gpu.client(),
            cubes(rows * chunks),
            units(),
            logits.buffer().arg(logits.elements()),
            best.buffer().arg(best.elements()),
            gpu.faults(),
            rows as u32,
            columns as u32,
            chunks as u32,
            storage,
            bad_logit,
            storage.elem(),
        );
        best_of_rows::launch_unchecked::<R>(
            gpu.client(),
            cubes(rows),
            units(),
            best.buffer().arg(best.elements()),
            ids.buffer().arg(rows),
            gpu.faults(),
            rows as u32,
            chunks as u32,
            empty_row,
        );
    }
    Ok(())
}

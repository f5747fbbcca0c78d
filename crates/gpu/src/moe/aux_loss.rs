//! The load-balancing loss: probabilities of all tokens, then one cube an expert adds up its column in an order that
//! depends on the shape alone, then the loss.

use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::Result;
use marlin_ops::moe::AuxLossArgs;

use crate::Gpu;
use crate::fault::{Fault, record};
use crate::launch::{UNITS, cubes, units};
use crate::math::exp;
use crate::reduce::{cube_max, cube_sum};

const OP: &str = "moe_aux_loss";

/// Above all finite values.
const MOST: f32 = 3.402_823_4e38;

/// `probabilities [T, E]`, zeros for a masked token. One cube a token.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn token_probabilities(
    logits: &[f32],
    ids: &[u32],
    mask: &[u32],
    probabilities: &mut [f32],
    faults: &mut [Atomic<u32>],
    tokens: u32,
    experts: u32,
    slots: u32,
    masks: u32,
) {
    let token = CUBE_POS;
    if token < tokens as usize {
        let experts = experts as usize;
        let start = token * experts;
        let counts = masks == 0u32 || mask[select(masks == 0u32, 0usize, token)] != 0u32;
        let mut largest = f32::NEG_INFINITY.runtime();
        let mut bad = f32::new(0.0);
        let mut e = UNIT_POS as usize;
        while e < experts {
            let z = logits[start + e];
            // Neither NaN nor +inf is at most the largest finite value.
            bad = select(z <= MOST, bad, f32::new(1.0));
            largest = select(z > largest, z, largest);
            e += UNITS as usize;
        }
        let largest = cube_max(largest, UNITS as usize);
        let bad = cube_max(bad, UNITS as usize);
        let is_bad = bad > 0.0f32 || largest < -MOST;
        let base = select(is_bad, 0.0f32.runtime(), largest);
        let mut sum = f32::new(0.0);
        let mut e = UNIT_POS as usize;
        while e < experts {
            sum += exp(logits[start + e] - base);
            e += UNITS as usize;
        }
        let sum = cube_sum(sum, UNITS as usize);
        let mut e = UNIT_POS as usize;
        while e < experts {
            let p = exp(logits[start + e] - base) / sum;
            probabilities[start + e] = select(counts, p, f32::new(0.0));
            e += UNITS as usize;
        }
        let first = token * slots as usize;
        let mut wrong = u32::MAX.runtime();
        for s in 0..slots as usize {
            let a = first + slots as usize - 1usize - s;
            wrong = select(ids[a] < experts as u32, wrong, a as u32);
        }
        if UNIT_POS == 0 && counts && is_bad {
            record(faults, comptime!(Fault::AuxLogit), token);
        }
        if UNIT_POS == 0 && counts && wrong != u32::MAX {
            record(faults, comptime!(Fault::AuxId), wrong as usize);
        }
    }
}

/// `load[e]` and `counts[e]` of one expert a cube.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn expert_loads(
    probabilities: &[f32],
    ids: &[u32],
    mask: &[u32],
    load: &mut [f32],
    counts: &mut [u32],
    tokens: u32,
    experts: u32,
    slots: u32,
    masks: u32,
) {
    let expert = CUBE_POS;
    if expert < experts as usize {
        let mut sum = f32::new(0.0);
        let mut t = UNIT_POS as usize;
        while t < tokens as usize {
            sum += probabilities[t * experts as usize + expert];
            t += UNITS as usize;
        }
        let sum = cube_sum(sum, UNITS as usize);
        let mut count = 0u32.runtime();
        let mut a = UNIT_POS as usize;
        while a < (tokens * slots) as usize {
            let counted = masks == 0u32 || mask[select(masks == 0u32, 0usize, a / slots as usize)] != 0u32;
            count += u32::cast_from(counted && ids[a] == expert as u32);
            a += UNITS as usize;
        }
        let count = cube_count(count);
        if UNIT_POS == 0 {
            load[expert] = sum;
            counts[expert] = count;
        }
    }
}

/// `loss = E sum_e (counts[e] / T') (load[e] / T')`. One cube.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn balance(
    load: &[f32],
    counts: &[u32],
    mask: &[u32],
    loss: &mut [f32],
    faults: &mut [Atomic<u32>],
    tokens: u32,
    experts: u32,
    masks: u32,
) {
    if CUBE_POS == 0usize {
        let mut count = 0u32.runtime();
        let mut t = UNIT_POS as usize;
        while t < tokens as usize {
            let counted = masks == 0u32 || mask[select(masks == 0u32, 0usize, t)] != 0u32;
            count += u32::cast_from(counted);
            t += UNITS as usize;
        }
        let counted = cube_count(count);
        let per_token = f32::cast_from(counted);
        let mut sum = f32::new(0.0);
        let mut e = UNIT_POS as usize;
        while e < experts as usize {
            sum += (f32::cast_from(counts[e]) / per_token) * (load[e] / per_token);
            e += UNITS as usize;
        }
        let sum = cube_sum(sum, UNITS as usize);
        if UNIT_POS == 0 {
            if counted == 0u32 {
                record(faults, comptime!(Fault::AuxMask), 0usize.runtime());
            }
            loss[0] = f32::cast_from(experts) * sum;
        }
    }
}

/// The sum over all units, known to each of them.
#[cube]
fn cube_count(value: u32) -> u32 {
    let mut partial = Shared::<[u32]>::new_slice(comptime!(UNITS as usize));
    let sum = plane_sum(value);
    if UNIT_POS % PLANE_DIM == 0 {
        partial[(UNIT_POS / PLANE_DIM) as usize] = sum;
    }
    sync_cube();
    let mut total = 0u32.runtime();
    for plane in 0..CUBE_DIM.div_ceil(PLANE_DIM) {
        total += partial[plane as usize];
    }
    // The memory may be written again at once.
    sync_cube();
    total
}

/// Enqueues [`marlin_ops::MoeOps::moe_aux_loss`].
pub(super) fn launch<R: Runtime>(gpu: &Gpu<R>, args: &AuxLossArgs<'_, Gpu<R>>) -> Result<()> {
    let (tokens, experts, slots) = (args.logits.rows(), args.logits.columns(), args.ids.columns());
    let probabilities = gpu.scratch(OP, DType::F32, &[tokens, experts])?;
    let masks = u32::from(args.mask.is_some());
    let mask = || args.mask.map_or_else(|| gpu.unread(), |mask| mask.buffer().arg(tokens));
    let ids = || args.ids.buffer().arg(args.ids.elements().max(1));
    // SAFETY: logits and probabilities hold tokens * experts elements, ids tokens * slots, the mask `tokens`, loads and
    // counts `experts`; the kernels stay within.
    unsafe {
        token_probabilities::launch_unchecked::<R>(
            gpu.client(),
            cubes(tokens),
            units(),
            args.logits.buffer().arg(args.logits.elements()),
            ids(),
            mask(),
            probabilities.buffer().arg(probabilities.elements()),
            gpu.faults(),
            tokens as u32,
            experts as u32,
            slots as u32,
            masks,
        );
        expert_loads::launch_unchecked::<R>(
            gpu.client(),
            cubes(experts),
            units(),
            probabilities.buffer().arg(probabilities.elements()),
            ids(),
            mask(),
            args.load.buffer().arg(experts),
            args.counts.buffer().arg(experts),
            tokens as u32,
            experts as u32,
            slots as u32,
            masks,
        );
        balance::launch_unchecked::<R>(
            gpu.client(),
            cubes(1),
            units(),
            args.load.buffer().arg(experts),
            args.counts.buffer().arg(experts),
            mask(),
            args.loss.buffer().arg(1),
            gpu.faults(),
            tokens as u32,
            experts as u32,
            masks,
        );
    }
    Ok(())
}

//! Penalties and temperature.

use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::Result;
use marlin_ops::sampling::LogitsProcessArgs;

use super::order::{BAD, BANNED, cube_max_word, key_of};
use crate::fault::{self, Fault};
use crate::launch::{UNITS, cubes, cubes_for, units};
use crate::{Buffer, Gpu};

/// Processes every logit; `listed` ids ascend, each with the times it was generated. `finite[cube]` tells whether a
/// logit of the cube is not -inf.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn process(
    logits: &mut [f32],
    ids: &[u32],
    counts: &[u32],
    finite: &mut [u32],
    faults: &mut [Atomic<u32>],
    columns: u32,
    listed: u32,
    repetition: f32,
    frequency: f32,
    presence: f32,
    temperature: f32,
) {
    let i = ABSOLUTE_POS;
    let mut key = BANNED.runtime();
    if i < columns as usize {
        let mut l = logits[i];
        key = key_of(l);
        if key == BAD {
            fault::record(faults, Fault::ProcessLogit, i);
        }
        // The first place whose id is not below i.
        let mut low = 0u32.runtime();
        let mut high = listed;
        while low < high {
            let middle = (low + high) / 2u32;
            if ids[middle as usize] < i as u32 {
                low = middle + 1u32;
            } else {
                high = middle;
            }
        }
        if low < listed && ids[low as usize] == i as u32 {
            let count = counts[low as usize];
            l = select(l > 0.0f32, l / repetition, l * repetition);
            l -= frequency * f32::cast_from(count);
            l -= select(count > 0u32, presence, f32::new(0.0));
        }
        logits[i] = l / temperature;
    }
    let largest = cube_max_word(key, UNITS as usize);
    if UNIT_POS == 0 {
        finite[CUBE_POS] = select(largest == BANNED, 0u32, 1u32.runtime());
    }
}

/// A row without a finite logit is a fault.
#[cube(launch_unchecked)]
fn expect_finite(finite: &[u32], faults: &mut [Atomic<u32>], count: u32) {
    let mut any = 0u32.runtime();
    let mut i = UNIT_POS as usize;
    while i < count as usize {
        any |= finite[i];
        i += UNITS as usize;
    }
    let largest = cube_max_word(any, UNITS as usize);
    if largest == 0u32 && UNIT_POS == 0 {
        fault::record(faults, Fault::ProcessEmpty, 0usize.runtime());
    }
}

/// Every id of the prompt or the generated ones, ascending, and the times it was generated.
fn tally(prompt: &[u32], generated: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let mut all: Vec<(u32, u32)> =
        prompt.iter().map(|&id| (id, 0)).chain(generated.iter().map(|&id| (id, 1))).collect();
    all.sort_unstable();
    let runs = all.chunk_by(|a, b| a.0 == b.0);
    runs.map(|run| (run[0].0, run.iter().map(|(_, count)| count).sum::<u32>())).unzip()
}

/// Enqueues [`marlin_ops::SamplingOps::process_logits`].
pub(super) fn launch<R: Runtime>(gpu: &Gpu<R>, args: LogitsProcessArgs<'_, Gpu<R>>) -> Result<()> {
    const OP: &str = "logits_process";
    let columns = args.logits.elements();
    let wished = args.process;
    let penalised =
        wished.repetition_penalty != 1.0 || wished.frequency_penalty != 0.0 || wished.presence_penalty != 0.0;
    // Without penalties no id is told from another, and the tokens so far need not be sent.
    let (ids, counts) = if penalised { tally(args.prompt, args.generated) } else { Default::default() };
    let listed = ids.len();
    let send = |words: &[u32]| if listed == 0 { Ok(None) } else { gpu.create_u32(OP, words).map(Some) };
    let (ids, counts) = (send(&ids)?, send(&counts)?);
    let list = |words: &Option<Buffer>| words.as_ref().map_or_else(|| gpu.unread(), |words| words.arg(listed));
    // As many as the grid has cubes, which may round up.
    let CubeCount::Static(x, y, _) = cubes_for(columns) else { unreachable!("the count is known") };
    let grid = (x * y) as usize;
    let finite = gpu.scratch(OP, DType::U32, &[grid])?;
    // SAFETY: logits hold `columns` elements, ids and counts `listed`, `finite` one for each cube.
    unsafe {
        process::launch_unchecked::<R>(
            gpu.client(),
            cubes_for(columns),
            units(),
            args.logits.buffer().arg(columns),
            list(&ids),
            list(&counts),
            finite.buffer().arg(grid),
            gpu.faults(),
            columns as u32,
            listed as u32,
            wished.repetition_penalty,
            wished.frequency_penalty,
            wished.presence_penalty,
            wished.temperature,
        );
        expect_finite::launch_unchecked::<R>(
            gpu.client(),
            cubes(1),
            units(),
            finite.buffer().arg(grid),
            gpu.faults(),
            grid as u32,
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::tally;

    #[test]
    fn ids_once_with_generated_counts() {
        assert_eq!(tally(&[9, 3, 3], &[7, 3, 7]), (vec![3, 7, 9], vec![1, 2, 0]));
        assert_eq!(tally(&[], &[]), (vec![], vec![]));
    }
}

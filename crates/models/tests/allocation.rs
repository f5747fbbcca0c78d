//! A decoded token allocates nothing once the first ones have warmed the scratch memory.

mod common;

use std::alloc::System;
use std::path::Path;
use std::sync::Arc;

use common::load;
use marlin_cpu::{Cpu, CpuOptions};
use marlin_models::{KvCache, Logits};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Tokens of a stretch; the first stretch brings every scratch buffer to its size.
const TOKENS: u32 = 64;
const STRETCHES: u32 = 6;

// One test: the counts are of the whole process.
#[test]
fn decoding_does_not_allocate() {
    let bundled = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/marlin-stories-int4");
    let exl3 = common::exl3().0;
    let folders = [bundled, common::golden_folder("qwen3-base"), common::golden_folder("qwen3_moe-base"), exl3];
    for dir in folders {
        for (exact, threads) in [(false, 1), (false, 2), (true, 2)] {
            let options = CpuOptions { exact, threads: Some(threads), ..CpuOptions::default() };
            let model = load(&Arc::new(Cpu::new(options).unwrap()), &dir, 512);
            let mut cache = KvCache::new(&model, (STRETCHES * TOKENS) as usize).unwrap();
            let mut scratch = model.scratch(1).unwrap();
            let mut feed = |token: u32| {
                model.forward(&[token], &mut cache, &mut scratch, Logits::Last).unwrap();
            };
            // A thread that was late to its first task sizes its buffers later: some stretch must be free of that.
            let counts: Vec<_> = (0..STRETCHES)
                .map(|stretch| {
                    let region = Region::new(ALLOCATOR);
                    (stretch * TOKENS..(stretch + 1) * TOKENS).map(|i| i % 50).for_each(&mut feed);
                    region.change().allocations + region.change().reallocations
                })
                .collect();
            assert!(counts.contains(&0), "{}, exact {exact}, {threads} threads: {counts:?}", dir.display());
            if threads == 1 {
                assert!(counts[1..].iter().all(|&count| count == 0), "{}, exact {exact}: {counts:?}", dir.display());
            }
        }
    }
}

//! `cargo run --release -p marlin-gpu --features cuda --example search`: how fast the first CUDA device searches for EXL3
//! codes, in microseconds a tile; that it finds the right ones is `verify`'s matter.

use std::time::Instant;

use anyhow::Result;
use marlin_formats::exl3::{Codebook, tile};
use marlin_ops::PathSearch;
use marlin_ops::rng::{Stream, random_word, uniform};
use marlin_ops::trellis::Tile;

/// Calls that are measured; the median counts.
const CALLS: usize = 5;

fn targets(count: usize) -> Vec<Tile> {
    let draw = |i: u32| uniform(random_word(1, Stream::Weights, 0, 0, i)) - 0.5;
    let target = |i: usize| (0..4).map(|j| draw((4 * i + j) as u32)).sum::<f64>() as f32;
    (0..count).map(|t| std::array::from_fn(|p| target(t * tile::WEIGHTS + p))).collect()
}

fn main() -> Result<()> {
    let device = marlin_gpu::cuda(None)?;
    println!("bits  tiles  us a tile");
    for bits in 1..=8 {
        for count in [64, device.tiles_at_once(bits) / 2, device.tiles_at_once(bits)] {
            let targets = targets(count);
            device.search_paths(Codebook::Mul1, bits, &targets)?;
            let mut seconds = Vec::new();
            for _ in 0..CALLS {
                let start = Instant::now();
                device.search_paths(Codebook::Mul1, bits, &targets)?;
                seconds.push(start.elapsed().as_secs_f64());
            }
            seconds.sort_by(f64::total_cmp);
            println!("{bits:4}  {count:5}  {:9.2}", seconds[CALLS / 2] / count as f64 * 1e6);
        }
    }
    Ok(())
}

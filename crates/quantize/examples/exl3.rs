//! Speed of the EXL3 encoder: `cargo run --release -p marlin-quantize --example exl3`.
//!
//! Prints the time one core needs for a tile of 256 weights, for every bit rate and instruction set, and the mean squared
//! error of normal weights; then the time all cores need for a matrix, with calibration, scale search and error feedback.

use std::time::Instant;

use marlin_formats::exl3::{Codebook, tile};
use marlin_ops::rng::{Stream, random_word, uniform};
use marlin_quantize::exl3::{Encoder, Exl3Inputs, Exl3Options, Isa, exl3};
use marlin_quantize::{Hessian, Result};

/// Rows and columns of the matrix.
const SIZE: usize = 768;

/// Twelve uniform values are close enough to a normal one.
fn weights(seed: u64) -> [f32; tile::WEIGHTS] {
    std::array::from_fn(|i| {
        let draws = (0..12).map(|j| uniform(random_word(seed, Stream::Weights, 0, 0, (12 * i + j) as u32)));
        (draws.sum::<f64>() - 6.0) as f32
    })
}

fn main() -> Result<()> {
    tiles();
    matrix()
}

fn matrix() -> Result<()> {
    let weight: Vec<f32> = (0..(SIZE * SIZE / tile::WEIGHTS) as u64).flat_map(weights).collect();
    let mut hessian = Hessian::new(SIZE)?;
    hessian.accumulate(&(0..3 * SIZE as u64).flat_map(|i| weights(!i)).collect::<Vec<f32>>())?;
    for bits in [2, 3, 4] {
        let options = Exl3Options { bits, ..Exl3Options::default() };
        let start = Instant::now();
        let inputs = Exl3Inputs::new(&hessian, "input", &options)?;
        let prepared = start.elapsed().as_secs_f64();
        let quantized = exl3(None, &inputs, "module", &weight, SIZE, SIZE, &options)?;
        let seconds = start.elapsed().as_secs_f64();
        let error = quantized.proxy_error;
        println!(
            "{SIZE} x {SIZE}, {bits} bits: {seconds:.2} s ({prepared:.3} s for the Hessian), proxy error {error:.5}"
        );
    }
    Ok(())
}

fn tiles() {
    let codebook = Codebook::Mcg;
    let tiles: Vec<_> = (0..24).map(weights).collect();
    println!("bits  set        ms a tile  tiles/s  mean squared error");
    for bits in 1..=8 {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.is_available()) {
            let encoder = Encoder::on(codebook, bits, isa);
            let mut workspace = encoder.workspace();
            encoder.encode(&tiles[0], &mut workspace);
            let mut least = f64::INFINITY;
            let mut error = 0.0;
            for tile in &tiles {
                let start = Instant::now();
                let path = encoder.encode(tile, &mut workspace);
                least = least.min(start.elapsed().as_secs_f64());
                error += path.iter().zip(tile).map(|(&w, x)| f64::from(encoder.value(w) - x).powi(2)).sum::<f64>();
            }
            let error = error / (tiles.len() * tile::WEIGHTS) as f64;
            println!("{bits:4}  {:9}  {:9.2}  {:7.0}  {error:.6}", format!("{isa:?}"), 1e3 * least, 1.0 / least);
        }
    }
}

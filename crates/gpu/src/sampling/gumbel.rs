//! Draws by Gumbel noise: logits with noise of (row, token, step), then their argmax. One unit four ids, which share a
//! block of random words.

use cubecl::ir::ElemType;
use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_ops::Result;
use marlin_ops::rng::Stream;
use marlin_ops::sampling::DrawArgs;

use super::argmax;
use crate::Gpu;
use crate::element::{Storage, load};
use crate::fault::Fault;
use crate::launch::{cubes_for, units};
use crate::math::{ln, ln_1p_negative};

const OP: &str = "sample_gumbel";

/// `out[row, v] = logits[row, v] + g`; NaN and infinities stay.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn add_noise<E: Numeric>(
    logits: &[E],
    draws: &[u32],
    out: &mut [f32],
    rows: u32,
    columns: u32,
    seed_low: u32,
    seed_high: u32,
    #[comptime] storage: Storage,
    #[define(E)] _element: ElemType,
) {
    let columns = columns as usize;
    let blocks = columns.div_ceil(4usize);
    if ABSOLUTE_POS < rows as usize * blocks {
        let row = ABSOLUTE_POS / blocks;
        let block = ABSOLUTE_POS % blocks;
        let words = philox(seed_low, seed_high, block as u32, draws[2usize * row], draws[2usize * row + 1usize]);
        #[unroll]
        for i in 0..4usize {
            let v = 4usize * block + i;
            let inside = v < columns;
            let logit = load::<E>(logits, row * columns + select(inside, v, 0usize), storage);
            let value = logit + noise(words[i]);
            if inside {
                out[row * columns + v] = value;
            }
        }
    }
}

/// Four words of the Gumbel stream, as [`marlin_ops::rng::philox4x32`] defines them.
#[cube]
fn philox(seed_low: u32, seed_high: u32, block: u32, row: u32, step: u32) -> Array<u32> {
    let mut c0 = block;
    let mut c1 = row;
    let mut c2 = step;
    let mut c3 = comptime!(Stream::Gumbel as u32).runtime();
    let mut k0 = seed_low;
    let mut k1 = seed_high;
    #[unroll]
    for _ in 0..10usize {
        let high0 = c0.mul_hi(0xD251_1F53u32);
        let low0 = c0 * 0xD251_1F53u32;
        let high1 = c2.mul_hi(0xCD9E_8D57u32);
        let low1 = c2 * 0xCD9E_8D57u32;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E37_79B9u32;
        k1 += 0xBB67_AE85u32;
    }
    let mut words = Array::<u32>::new(4usize);
    words[0] = c0;
    words[1] = c1;
    words[2] = c2;
    words[3] = c3;
    words
}

/// `-ln(-ln(1 - U))`, `U = min((word + 1/2) 2^-32, 1 - 2^-24)`. From U = 1/2 on, 1 - U comes from the complement of the
/// word, which loses nothing.
#[cube]
fn noise(word: u32) -> f32 {
    let u = (f32::cast_from(word) + 0.5f32) * 2.328_306_4e-10f32;
    let rest = (f32::cast_from(!word) + 0.5f32) * 2.328_306_4e-10f32;
    let rest = select(rest < 5.960_464_5e-8f32, f32::new(5.960_464_5e-8), rest);
    let exponential = select(word < 0x8000_0000u32, ln_1p_negative(u), -ln(rest));
    -ln(exponential)
}

/// Enqueues [`marlin_ops::SamplingOps::sample_gumbel`].
pub(super) fn launch<R: Runtime>(gpu: &Gpu<R>, args: DrawArgs<'_, Gpu<R>>) -> Result<()> {
    let (rows, columns) = (args.values.rows(), args.values.columns());
    if rows == 0 {
        return Ok(());
    }
    let draws: Vec<u32> = args.rows.iter().zip(args.steps).flat_map(|(&row, &step)| [row, step]).collect();
    let draws = gpu.create_u32(OP, &draws)?;
    let noisy = gpu.scratch(OP, DType::F32, &[rows, columns])?;
    let storage = Storage::of(args.values.dtype());
    // SAFETY: logits and their copies hold rows * columns elements, draws two a row; the kernel stays within.
    unsafe {
        add_noise::launch_unchecked::<R>(
            gpu.client(),
            cubes_for(rows * columns.div_ceil(4)),
            units(),
            args.values.buffer().arg(args.values.elements()),
            draws.arg(2 * rows),
            noisy.buffer().arg(noisy.elements()),
            rows as u32,
            columns as u32,
            args.seed as u32,
            (args.seed >> 32) as u32,
            storage,
            storage.elem(),
        );
    }
    argmax::launch(gpu, &noisy, args.ids, [Fault::GumbelLogit, Fault::GumbelEmpty])
}

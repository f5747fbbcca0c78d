//! Rotated rows of f32 or bf16 as f16. f16 lacks their range, so each row is first multiplied with a power of two that brings
//! its largest value just below f16's; its products are multiplied with one over it afterwards, both exactly. Of a value x of a
//! row whose largest is m, one f16 keeps all but 2^-11 |x| + 2^-39 m and the sum of two all but 2^-22 |x| + 2^-39 m; rows whose
//! largest is below 2^-112 lose more.

use cubecl::prelude::*;
use marlin_formats::DType;
use marlin_formats::exl3::HADAMARD;
use marlin_ops::{Result, Tensor};

use crate::halves::{TOP, inverse, power};
use crate::launch::{UNITS, cubes, units};
use crate::linear::exl3::rotate::{Channels, LANES, first_channel, high_words, low_words, place};
use crate::reduce::{cube_max, max_of};
use crate::{Buffer, Gpu};

/// The f16 that stand for a value of a rotated row.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub(super) enum Parts {
    /// The value itself: x was f16.
    Plain,
    /// The value times its row's power of two.
    Scaled,
    /// That, and what its rounding leaves.
    Split,
}

impl Parts {
    /// Those of rows of this type.
    pub(super) fn of<R: Runtime>(gpu: &Gpu<R>, x: DType) -> Self {
        match x {
            DType::F16 => Self::Plain,
            _ if gpu.is_exact() => Self::Split,
            _ => Self::Scaled,
        }
    }

    /// How many.
    pub(super) const fn count(self) -> usize {
        match self {
            Self::Plain | Self::Scaled => 1,
            Self::Split => 2,
        }
    }

    /// Whether rows have powers.
    pub(super) const fn scaled(self) -> bool {
        !matches!(self, Self::Plain)
    }
}

/// Vectors that a unit loads at once.
const AT_ONCE: usize = 4;

/// `out [part, row, k]`, of one or two parts, of rows times their powers, in the order of `channels`, and one over the powers; a
/// cube for each row.
#[cube(launch_unchecked)]
fn split_rows(
    x: &[Vector<f32, Const<2>>],
    out: &mut [Vector<u32, Const<2>>],
    inverses: &mut [f32],
    rows: u32,
    k: u32,
    #[comptime] parts: usize,
    #[comptime] channels: Channels,
) {
    let (row, rows, pairs) = (CUBE_POS, rows as usize, k as usize / 2);
    if row < rows {
        let mut largest = f32::new(0.0);
        let mut first = UNIT_POS as usize;
        while first < pairs {
            #[unroll]
            for j in 0..AT_ONCE {
                let wanted = first + comptime!(j * UNITS as usize);
                // The last pair counts several times.
                let pair = x[row * pairs + select(wanted < pairs, wanted, pairs - 1usize)];
                largest = max_of(largest, f32::abs(pair.extract(0usize)));
                largest = max_of(largest, f32::abs(pair.extract(1usize)));
            }
            first += comptime!(AT_ONCE * UNITS as usize);
        }
        let power = power(cube_max(largest, UNITS as usize), TOP);
        if UNIT_POS == 0 {
            inverses[row] = inverse(power);
        }
        let mut i = UNIT_POS as usize;
        while i < pairs / 2 {
            let (block, lane) = (i / LANES, i % LANES);
            let from = row * pairs + (block * HADAMARD + first_channel(lane, channels)) / 2usize;
            let near = x[from];
            let far = x[from + comptime!(channels.offset(2) / 2)];
            let mut values = Array::<f32>::new(4usize);
            #[unroll]
            for j in 0..2usize {
                values[j] = near.extract(j) * power;
                values[comptime!(2 + j)] = far.extract(j) * power;
            }
            let to = row * (pairs / 2usize) + block * LANES + place(lane, channels);
            out[to] = high_words(&values);
            if comptime!(parts == 2) {
                out[rows * (pairs / 2usize) + to] = low_words(&values);
            }
            i += UNITS as usize;
        }
    }
}

/// Enqueues the kernel for rows `[M, K]`, K a multiple of 128: `[parts, M, K]` f16 and `[M]` f32.
pub(super) fn split<R: Runtime>(
    gpu: &Gpu<R>,
    operation: &'static str,
    x: &Tensor<Gpu<R>>,
    parts: Parts,
    channels: Channels,
) -> Result<(Tensor<Gpu<R>>, Buffer)> {
    let (m, k) = (x.rows(), x.columns());
    let out = gpu.scratch(operation, DType::F16, &[parts.count(), m, k])?;
    let inverses = gpu.scratch(operation, DType::F32, &[m])?;
    // SAFETY: x holds m rows of k, whole blocks of 128, the output as many values for each part and the inverses m.
    unsafe {
        split_rows::launch_unchecked::<R>(
            gpu.client(),
            cubes(m),
            units(),
            x.buffer().arg(m * k / 2),
            out.buffer().arg(out.elements() / 4),
            inverses.buffer().arg(m),
            m as u32,
            k as u32,
            parts.count(),
            channels,
        );
    }
    Ok((out, inverses.buffer().clone()))
}

//! What measurements need of a device.

use std::time::Instant;

use cubecl::prelude::*;
use marlin_ops::{Backend, Device, Result};

use crate::Gpu;
use crate::launch::{cubes_for, units};
use crate::traffic::Traffic;

/// Bytes of each of the two buffers of a copy, far more than caches hold.
const COPY_BYTES: usize = 1 << 28;
/// Samples of a rate; the median counts.
const SAMPLES: usize = 5;
/// Least seconds of a sample: the time to wait for the device is small against it.
const SAMPLE_SECONDS: f64 = 0.02;

/// A device that counts what it does and can be measured against itself.
pub trait Measured: Backend {
    /// What was launched and copied since the device was opened.
    fn traffic(&self) -> Traffic;

    /// Whether the steps of [`Device::run_step`] are recorded from now on, where the device can: CUDA devices are opened
    /// with it on. Returns what holds.
    fn use_graphs(&self, on: bool) -> bool;

    /// Whether the caller records launches in a graph of its own: memory is then taken unchecked, a check would break it.
    fn recorded_by_caller(&self, on: bool);

    /// Bytes read and written a second by plain copies of device memory; takes half a GiB of it meanwhile.
    ///
    /// # Errors
    /// The device's own (out of memory).
    fn copy_bytes_per_s(&self) -> Result<f64>;
}

#[cube(launch_unchecked)]
fn copy_lines(from: &[Vector<u32, Const<4>>], to: &mut [Vector<u32, Const<4>>], count: u32) {
    if ABSOLUTE_POS < count as usize {
        to[ABSOLUTE_POS] = from[ABSOLUTE_POS];
    }
}

impl<R: Runtime> Measured for Gpu<R> {
    fn traffic(&self) -> Traffic {
        self.counters().totals()
    }

    fn use_graphs(&self, on: bool) -> bool {
        self.steps.use_graphs(on && self.can_record())
    }

    fn recorded_by_caller(&self, on: bool) {
        self.steps.set_recording(on);
    }

    fn copy_bytes_per_s(&self) -> Result<f64> {
        const OP: &str = "copy";
        let bytes = COPY_BYTES.min(self.properties().memory.max_page_size as usize / 16 * 16);
        let [from, to] = [self.allocate(OP, bytes)?, self.allocate(OP, bytes)?];
        let lines = bytes / 16;
        let seconds = |copies: usize| -> Result<f64> {
            self.synchronize()?;
            let start = Instant::now();
            for _ in 0..copies {
                // SAFETY: both buffers hold `lines` lines of four words.
                unsafe {
                    copy_lines::launch_unchecked::<R>(
                        self.client(),
                        cubes_for(lines),
                        units(),
                        from.arg(lines * 4),
                        to.arg(lines * 4),
                        lines as u32,
                    );
                }
            }
            self.synchronize()?;
            Ok(start.elapsed().as_secs_f64())
        };
        // The first compiles the kernel.
        seconds(1)?;
        let copies = (SAMPLE_SECONDS / seconds(1)?).ceil().clamp(1.0, 1000.0) as usize;
        let mut samples = (0..SAMPLES).map(|_| seconds(copies)).collect::<Result<Vec<_>>>()?;
        samples.sort_by(f64::total_cmp);
        Ok(2.0 * (copies * bytes) as f64 / samples[SAMPLES / 2])
    }
}

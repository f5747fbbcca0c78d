//! What the machine could do at most: the rates that kernels are measured against.

use std::hint::black_box;
use std::time::{Duration, Instant};

use marlin_ops::Result;
use marlin_ops::profile::Roofline;

use crate::Cpu;
use crate::arena::{Arena, Array, Pages};
use crate::simd::{Kernel, LANES, Line, Simd};

/// Repetitions; the best counts.
const REPEATS: usize = 5;
/// Bytes read, far more than caches hold.
const READ_BYTES: usize = 1 << 28;
/// Steps of the arithmetic loops.
const STEPS: usize = 1 << 20;
/// Independent sums with 32 vector registers of 64 bytes, enough to cover the latency of an instruction.
const WIDE_CHAINS: usize = 12;
/// The same where sixteen lanes take several registers.
const CHAINS: usize = 5;

/// Plain reads of memory by all threads of a device, each going through its own part of one buffer from start to end: the
/// yardstick of kernels that wait for memory. Holds [`PlainReads::BYTES`] of memory.
pub struct PlainReads<'a> {
    cpu: &'a Cpu,
    data: Array<Line<u32>>,
}

impl PlainReads<'_> {
    /// Bytes that a pass reads.
    pub const BYTES: usize = READ_BYTES;

    /// The time of one pass.
    pub fn pass(&self) -> Duration {
        let share = self.data.len().div_ceil(self.cpu.threads());
        self.cpu.time_on_all_threads(|i| {
            let end = self.data.len().min((i + 1) * share);
            self.cpu.level.run(Read(&self.data[end.min(i * share)..end]));
        })
    }
}

impl Cpu {
    /// Takes the memory that plain reads go through; weights have theirs in [`Pages::Huge`].
    ///
    /// # Errors
    /// A device error where there is not enough memory.
    pub fn plain_reads(&self, pages: Pages) -> Result<PlainReads<'_>> {
        let mut data = Arena::new(pages).zeros::<Line<u32>>(READ_BYTES / size_of::<Line<u32>>())?;
        data.fill(Line([1; LANES]));
        Ok(PlainReads { cpu: self, data })
    }

    /// Measures what the threads and instructions of this device can do at most; takes less than a second, and 256 MiB
    /// while it runs.
    ///
    /// # Errors
    /// A device error where there is not enough memory.
    pub fn roofline(&self) -> Result<Roofline> {
        let reads = self.plain_reads(Pages::Huge)?;
        let read = fastest(|| reads.pass());
        drop(reads);
        let chains = self.level.run(Chains);
        let per_second = |ops_per_lane: usize, seconds: f64| {
            (STEPS * chains * LANES * ops_per_lane * self.threads()) as f64 / seconds
        };
        Ok(Roofline {
            read_bytes_per_s: READ_BYTES as f64 / read,
            f32_flops_per_s: per_second(2, fastest(|| self.time_on_all_threads(|_| self.level.run(Products)))),
            int8_ops_per_s: per_second(8, fastest(|| self.time_on_all_threads(|_| self.level.run(Dots)))),
        })
    }

    /// The time of one call per thread.
    fn time_on_all_threads(&self, work: impl Fn(usize) + Sync + Send) -> Duration {
        let mut slots = vec![(); self.threads()];
        let start = Instant::now();
        self.pool.for_chunks(&mut slots, 1, |i, _| work(i));
        start.elapsed()
    }
}

/// Seconds of the best of some runs.
fn fastest(run: impl Fn() -> Duration) -> f64 {
    (0..REPEATS).map(|_| run().as_secs_f64()).fold(f64::INFINITY, f64::min)
}

/// Reads lines.
struct Read<'a>(&'a [Line<u32>]);

impl Kernel for Read<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut sums = [s.splat_i(0); 8];
        for lines in self.0.as_chunks::<8>().0 {
            for (sum, line) in sums.iter_mut().zip(lines) {
                *sum = s.add_i(*sum, s.load_i(&line.0));
            }
        }
        finish(s, sums);
    }
}

/// How many independent sums the arithmetic loops keep.
struct Chains;

impl Kernel for Chains {
    type Output = usize;

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> usize {
        if S::WIDE { WIDE_CHAINS } else { CHAINS }
    }
}

/// f32 products added up on registers.
struct Products;

impl Kernel for Products {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if S::WIDE { products::<S, WIDE_CHAINS>(s) } else { products::<S, CHAINS>(s) }
    }
}

// Each step reads one factor anew and each chain has its own other factor: no product can be computed just once.

#[inline(always)]
fn products<S: Simd, const N: usize>(s: S) {
    let (mut a, b) = ([s.splat(0.0); N], Line([0.25; LANES]));
    for (i, a) in a.iter_mut().enumerate() {
        *a = s.splat(black_box(i as f32));
    }
    let mut sums = [s.splat(0.0); N];
    for _ in 0..STEPS {
        let b = s.load(&black_box(&b).0);
        for (sum, a) in sums.iter_mut().zip(a) {
            *sum = s.fma(a, b, *sum);
        }
    }
    let mut total = s.splat(0.0);
    for sum in sums {
        total = s.add(total, sum);
    }
    black_box(s.reduce_add(total));
}

/// Dot products on registers.
struct Dots;

impl Kernel for Dots {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if S::WIDE { dots::<S, WIDE_CHAINS>(s) } else { dots::<S, CHAINS>(s) }
    }
}

#[inline(always)]
fn dots<S: Simd, const N: usize>(s: S) {
    let (mut bytes, x) = ([s.splat_i(0); N], 0x0403_0201);
    for (i, bytes) in bytes.iter_mut().enumerate() {
        *bytes = s.splat_i(black_box(0x0102_0304 + i as i32));
    }
    let mut sums = [s.splat_i(0); N];
    for _ in 0..STEPS {
        let x = *black_box(&x);
        for (sum, bytes) in sums.iter_mut().zip(bytes) {
            *sum = s.dot4(*sum, bytes, x);
        }
    }
    finish(s, sums);
}

#[inline(always)]
fn finish<S: Simd, const N: usize>(s: S, sums: [S::I; N]) {
    let total = sums.into_iter().fold(s.splat_i(0), |a, b| s.add_i(a, b));
    let mut out = Line::default();
    s.store_i(total, &mut out.0);
    black_box(out);
}

#[cfg(test)]
mod tests {
    use crate::{Cpu, CpuOptions};

    #[test]
    fn bounds_are_positive() {
        let cpu = Cpu::new(CpuOptions { threads: Some(2), ..CpuOptions::default() }).unwrap();
        let bounds = cpu.roofline().unwrap();
        assert!(bounds.read_bytes_per_s > 1e8 && bounds.read_bytes_per_s.is_finite());
        assert!(bounds.f32_flops_per_s > 1e8 && bounds.f32_flops_per_s.is_finite());
        assert!(bounds.int8_ops_per_s > 1e8 && bounds.int8_ops_per_s.is_finite());
    }
}

//! What the machine could do at most: the rates that kernels are measured against.

use std::hint::black_box;
use std::time::Instant;

use crate::Cpu;
use crate::simd::{Kernel, LANES, Line, Simd};

/// Repetitions; the best counts.
const REPEATS: usize = 5;
/// Bytes read, far more than caches hold.
const READ_BYTES: usize = 1 << 28;
/// Steps of the arithmetic loop.
const STEPS: usize = 1 << 20;
/// Independent sums, enough to cover the latency of a dot product.
const CHAINS: usize = 12;

/// Upper bounds of this machine with the threads and instructions of a [`Cpu`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roofline {
    /// Bytes per second that plain reads of memory reach.
    pub read_bytes_per_s: f64,
    /// 8-bit multiplications and additions per second of dot products on registers (two for each product).
    pub int8_ops_per_s: f64,
}

impl Cpu {
    /// Measures both bounds with all threads; takes about a second and 256 MiB.
    pub fn roofline(&self) -> Roofline {
        let data = vec![Line([1u32; LANES]); READ_BYTES / size_of::<Line<u32>>()];
        let share = data.len().div_ceil(self.threads());
        let read = self.fastest(|i| {
            let end = data.len().min((i + 1) * share);
            self.level.run(Read(&data[end.min(i * share)..end]));
        });
        let dots = self.fastest(|_| self.level.run(Dots));
        let ops = STEPS * CHAINS * LANES * 8 * self.threads();
        Roofline { read_bytes_per_s: READ_BYTES as f64 / read, int8_ops_per_s: ops as f64 / dots }
    }

    /// Seconds that one call per thread takes at best.
    fn fastest(&self, work: impl Fn(usize) + Sync + Send) -> f64 {
        let mut slots = vec![(); self.threads()];
        let times = (0..REPEATS).map(|_| {
            let start = Instant::now();
            self.pool.for_chunks(&mut slots, 1, |i, _| work(i));
            start.elapsed().as_secs_f64()
        });
        times.fold(f64::INFINITY, f64::min)
    }
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

/// Dot products on registers.
struct Dots;

impl Kernel for Dots {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (bytes, x) = (s.splat_i(black_box(0x0102_0304)), black_box(0x0403_0201));
        let mut sums = [s.splat_i(0); CHAINS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = s.dot4(*sum, bytes, x);
            }
        }
        finish(s, sums);
    }
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
        let bounds = cpu.roofline();
        assert!(bounds.read_bytes_per_s > 1e8 && bounds.read_bytes_per_s.is_finite());
        assert!(bounds.int8_ops_per_s > 1e8 && bounds.int8_ops_per_s.is_finite());
    }
}

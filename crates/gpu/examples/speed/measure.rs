//! Inputs and clocks.

use std::time::Instant;

use anyhow::{Result, anyhow};
use cubecl::cuda::{CudaDevice, CudaRuntime};
use cubecl::future::block_on;
use cubecl::prelude::*;
use cubecl::server::Handle;
use half::f16;
use marlin_formats::exl3::{Codebook, Exl3Matrix};
use marlin_formats::{DType, Format, QuantizedMatrix, Scheme};
use marlin_gpu::{Cuda, Measured};
use marlin_ops::{Device, HostTensor, Tensor, Weight};

/// Bytes that no cache holds: buffers are rotated until they add up to this.
const BEYOND_CACHE: usize = 256 << 20;

/// Seconds before samples.
const WARM_UP: f64 = 0.1;

/// The device and its clock.
pub struct Bench {
    pub gpu: Cuda,
    client: ComputeClient<CudaRuntime>,
}

#[cube(launch_unchecked)]
fn copy(from: &[Vector<u32, Const<4>>], to: &mut [Vector<u32, Const<4>>]) {
    to[ABSOLUTE_POS] = from[ABSOLUTE_POS];
}

#[cube(launch_unchecked)]
fn fill(to: &mut [u32]) {
    let i = ABSOLUTE_POS as u32;
    to[ABSOLUTE_POS] = i ^ (i << 13u32) ^ (i << 22u32);
}

#[cube(launch_unchecked)]
fn nothing(to: &mut [u32]) {
    if ABSOLUTE_POS == 0 {
        to[0] = 1u32;
    }
}

impl Bench {
    pub fn new(exact: bool) -> Result<Self> {
        let gpu = marlin_gpu::cuda(Some(0))?.with_exact(exact);
        Ok(Self { gpu, client: CudaRuntime::client(&CudaDevice::new(0)) })
    }

    pub fn synchronize(&self) -> Result<()> {
        block_on(self.client.sync()).map_err(|e| anyhow!("{e}"))
    }

    /// Seconds a launch: the median of 9 samples of a graph of `launches`, replayed for 10 ms each.
    pub fn graph_seconds(&self, launches: usize, launch: impl Fn(usize) -> Result<()>) -> Result<f64> {
        let graph = self.capture(launches, launch)?;
        // SAFETY: callers hold the buffers until this function returns, and nothing else uses them.
        let replay = || unsafe { graph.replay() };
        let seconds = self.repeat_seconds(|_| {
            replay();
            Ok(())
        })?;
        Ok(seconds / launches as f64)
    }

    /// Seconds a run, enqueued one by one: the median of 9 samples of 10 ms each; of 3 where a run takes more than 0.1 s.
    pub fn repeat_seconds(&self, run: impl Fn(usize) -> Result<()>) -> Result<f64> {
        let sample = |runs: usize| -> Result<f64> {
            self.synchronize()?;
            let start = Instant::now();
            (0..runs).try_for_each(&run)?;
            self.synchronize()?;
            Ok(start.elapsed().as_secs_f64() / runs as f64)
        };
        let first = sample(1)?;
        // The first run may compile, which takes less than this.
        let once = if first > 2.0 { first } else { sample(2)? };
        let runs = (0.01 / once).ceil().max(1.0) as usize;
        // A device that waited for a compilation has slowed down.
        let start = Instant::now();
        while start.elapsed().as_secs_f64() < WARM_UP {
            sample(runs)?;
        }
        median((0..if once > 0.1 { 3 } else { 9 }).map(|_| sample(runs)).collect::<Result<_>>()?)
    }

    fn capture(
        &self,
        launches: usize,
        launch: impl Fn(usize) -> Result<()>,
    ) -> Result<cubecl::client::Graph<CudaRuntime>> {
        let failure = |e: cubecl::server::ServerError| anyhow!("{e}");
        // Nothing may be compiled nor fail in the capture. Only a synchronization reports failures.
        launch(0)?;
        self.synchronize()?;
        self.client.graph_prepare().map_err(failure)?;
        (0..launches).try_for_each(&launch)?;
        self.synchronize()?;
        self.gpu.recorded_by_caller(true);
        self.client.start_capture().map_err(failure)?;
        let recorded = (0..launches).try_for_each(&launch);
        let graph = self.client.stop_capture().map_err(failure);
        self.gpu.recorded_by_caller(false);
        recorded.and(graph)
    }

    /// Bytes read and written a second by a copy of 1 GiB.
    pub fn copy_rate(&self) -> Result<f64> {
        let bytes = 1usize << 30;
        let buffers = [self.client.empty(bytes), self.client.empty(bytes)];
        let words = bytes / 4;
        for buffer in &buffers {
            // SAFETY: one unit a word.
            unsafe {
                fill::launch_unchecked::<CudaRuntime>(
                    &self.client,
                    cubes(words),
                    CubeDim::new_1d(256),
                    arg(buffer, words),
                );
            }
        }
        let seconds = self.graph_seconds(4, |i| {
            let (from, to) = (&buffers[i % 2], &buffers[(i + 1) % 2]);
            // SAFETY: one unit for every four words.
            unsafe {
                copy::launch_unchecked::<CudaRuntime>(
                    &self.client,
                    cubes(words / 4),
                    CubeDim::new_1d(256),
                    arg(from, words),
                    arg(to, words),
                );
            }
            Ok(())
        })?;
        Ok(2.0 * bytes as f64 / seconds)
    }

    /// Seconds of an empty launch: on its own, and in a graph.
    #[allow(dead_code)]
    pub fn launch_seconds(&self) -> Result<(f64, f64)> {
        let buffer = self.client.empty(4096);
        let launch = |_| {
            // SAFETY: only the first unit writes.
            unsafe {
                nothing::launch_unchecked::<CudaRuntime>(
                    &self.client,
                    CubeCount::Static(1, 1, 1),
                    CubeDim::new_1d(32),
                    arg(&buffer, 32),
                );
            }
            Ok(())
        };
        let alone = self.repeat_seconds(|_| (0..1000).try_for_each(launch))? / 1000.0;
        Ok((alone, self.graph_seconds(1000, launch)?))
    }

    /// An output that nothing was written to.
    #[allow(dead_code)]
    pub fn nans(&self, dtype: DType, dims: &[usize]) -> Result<Tensor<Cuda>> {
        Ok(self.gpu.upload(&HostTensor::from_f32_as(dtype, dims, &vec![f32::NAN; dims.iter().product()])?)?)
    }

    /// Normal values on the device.
    pub fn normals(&self, dtype: DType, dims: &[usize], random: &mut Random) -> Result<Tensor<Cuda>> {
        let values: Vec<f32> = (0..dims.iter().product()).map(|_| random.normal()).collect();
        Ok(self.gpu.upload(&HostTensor::from_f32_as(dtype, dims, &values)?)?)
    }
}

fn cubes(units: usize) -> CubeCount {
    CubeCount::Static((units / 256) as u32, 1, 1)
}

fn arg(handle: &Handle, len: usize) -> BufferArg<CudaRuntime> {
    // SAFETY: callers pass at most the buffer's elements.
    unsafe { BufferArg::from_raw_parts(handle.clone(), len) }
}

/// How many buffers of `bytes` are beyond every cache.
pub fn rotation(bytes: usize) -> usize {
    BEYOND_CACHE.div_ceil(bytes).max(2)
}

fn median(mut samples: Vec<f64>) -> Result<f64> {
    samples.sort_by(f64::total_cmp);
    samples.get(samples.len() / 2).copied().ok_or_else(|| anyhow!("no samples"))
}

/// Xorshift.
pub struct Random(pub u64);

impl Random {
    pub fn word(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as u32
    }

    /// In [0, 1).
    pub fn uniform(&mut self) -> f32 {
        (self.word() >> 8) as f32 / (1 << 24) as f32
    }

    /// Roughly normal: the sum of four uniform values.
    pub fn normal(&mut self) -> f32 {
        (0..4).map(|_| self.uniform() - 0.5).sum::<f32>() * 1.732
    }

    /// A weight of random codes, scales around 0.01, one in 16 of them 0, and, where the format has them, zero points of a
    /// quarter's precision.
    pub fn weight(&mut self, format: Format, group_size: usize, n: usize, k: usize) -> Result<Weight> {
        let scheme = Scheme::new(format, group_size)?;
        let groups = scheme.groups(k) * n;
        let scale = |random: &mut Self| match random.word() % 16 {
            0 => 0,
            _ => f16::from_f32(0.005 + 0.01 * random.uniform()).to_bits(),
        };
        let zero = |random: &mut Self| f16::from_f32((random.word() % 64) as f32 * 0.25).to_bits();
        Ok(Weight::quantized(QuantizedMatrix {
            scheme,
            in_features: k,
            out_features: n,
            codes: (0..scheme.code_rows(k) * n).map(|_| self.word()).collect(),
            scales: (0..groups).map(|_| scale(self)).collect(),
            zeros: if format.has_zeros() { (0..groups).map(|_| zero(self)).collect() } else { Vec::new() },
            super_scales: Vec::new(),
            super_minima: Vec::new(),
            tensor_scale: None,
        })?)
    }

    /// An EXL3 weight of random states and scales around 1 and 0.01; K and N are multiples of 128.
    #[allow(dead_code)]
    pub fn trellis(&mut self, codebook: Codebook, bits: u32, n: usize, k: usize) -> Result<Weight> {
        let mut scales = |count: usize, around: f32| -> Vec<u16> {
            let mut scale = || {
                let size = around * (0.5 + self.uniform());
                f16::from_f32(if self.word().is_multiple_of(2) { size } else { -size }).to_bits()
            };
            (0..count).map(|_| scale()).collect()
        };
        let (suh, svh) = (scales(k, 1.0), scales(n, 0.01));
        let trellis = (0..k * n * bits as usize / 16).map(|_| self.word() as u16).collect();
        Ok(Weight::exl3(Exl3Matrix { codebook, bits, in_features: k, out_features: n, trellis, suh, svh })?)
    }
}

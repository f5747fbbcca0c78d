//! Where the time of a model goes: calls, seconds, bytes and FLOPs of every operation, on every backend.
//!
//! The provided methods of the families report to the device's [`Profiler`] while it records. Counts follow from the
//! arguments: what an ideal implementation moves and computes, each operand read once and each result written once. A
//! backend that reads data again, or rounds up to whole tiles, takes longer; its counts stay the same.
//!
//! | operation | FLOPs | bytes, besides the activations in and out |
//! |---|---|---|
//! | `linear` | `2 M N K` | weight |
//! | `projections` | `2 M N K` for each weight, the norm 4 per element of x | weights, norm weights |
//! | `gated_up` | `4 M N K`, the norm 4 per element of x | both weights, norm weights |
//! | `embedding` | 0 | one row of the table a token |
//! | `attention` | `2 (D + Dv)` per query head and visible (query, key) pair, mask aside | cache rows that some query sees, mask, sinks |
//! | `mla_prefill` | `2 r H (n + v)` per cache row, `2 H (n + R + v)` per pair | cache rows, `kv_b` |
//! | `mla_decode` | `2 r H (n + v)` per query, `2 H (2r + R)` per pair | cache rows, `kv_b` |
//! | `kv_write`, `mla_latent_write` | 0; of the latter the norm and the rotation | rows written to the cache |
//! | `moe_route` | 4 per logit | correction bias |
//! | `moe_group` | 0 | |
//! | `moe_expert_mlp` | `6 hidden intermediate + 2 hidden` per assignment | the chosen experts, each once |
//! | `moe_combine` | 2 per element of the rows | |
//! | `rms_norm`, `layer_norm` | 4 and 7 per element, 1 more with a residual | norm weights |
//! | `rope` | 6 per rotated pair | cos and sin of each token |
//! | `hadamard` | `log2(n)` per element of a block of n (a Paley factor q counts `q - 1`), 1 for each scale | scales |
//! | `argmax`, `logits_process`, `sample` | 0, 1 and 3 per logit | |
//! | `convert` | 0 | |
//! | `dequantize` | 0 | the decoded part of the weight |
//!
//! Epilogues (bias, activation, residual) and functions such as `exp` within matrix products and attention count nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::{Device, Result, Tensor};

/// What the products of an operation are computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arithmetic {
    /// Decoded weights times f32 activations.
    F32,
    /// Integer codes times int8 activations ([`crate::activation`]).
    Int8,
    /// Integer values of a codebook times i16 activations.
    Int16,
}

/// An operation as the profiler tells it from others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Family, as the file of its trait is called.
    pub family: &'static str,
    /// Name.
    pub name: &'static str,
    /// Format of the weights that it reads, `mixed` for several, none without weights.
    pub weights: Option<&'static str>,
}

impl Operation {
    /// An operation on activations alone.
    pub(crate) const fn new(family: &'static str, name: &'static str) -> Self {
        Self { family, name, weights: None }
    }

    /// The operation on weights of this format.
    pub(crate) const fn with_weights(self, format: &'static str) -> Self {
        Self { weights: Some(format), ..self }
    }
}

/// Bytes moved and operations done, by the rules of [this module](self).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Stored bytes of weights read.
    pub weight_bytes: u64,
    /// Bytes read from KV caches.
    pub cache_bytes: u64,
    /// All other bytes: activations and tables read, results and cache rows written.
    pub activation_bytes: u64,
    /// Multiplications and additions in f32.
    pub f32_flops: u64,
    /// Multiplications and additions of int8 dot products.
    pub int8_flops: u64,
    /// Multiplications and additions of i16 dot products.
    pub int16_flops: u64,
}

impl Cost {
    /// All bytes.
    pub fn bytes(&self) -> u64 {
        self.weight_bytes + self.cache_bytes + self.activation_bytes
    }

    /// All multiplications and additions.
    pub fn flops(&self) -> u64 {
        self.f32_flops + self.int8_flops + self.int16_flops
    }

    pub(crate) fn add_activations<D: Device>(mut self, tensors: &[&Tensor<D>]) -> Self {
        self.activation_bytes += tensors.iter().map(|t| t.size_in_bytes() as u64).sum::<u64>();
        self
    }

    pub(crate) fn add_weights(mut self, bytes: usize) -> Self {
        self.weight_bytes += bytes as u64;
        self
    }

    pub(crate) fn add_cache(mut self, bytes: usize) -> Self {
        self.cache_bytes += bytes as u64;
        self
    }

    pub(crate) fn add_flops(mut self, arithmetic: Arithmetic, flops: usize) -> Self {
        match arithmetic {
            Arithmetic::F32 => self.f32_flops += flops as u64,
            Arithmetic::Int8 => self.int8_flops += flops as u64,
            Arithmetic::Int16 => self.int16_flops += flops as u64,
        }
        self
    }
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.weight_bytes += other.weight_bytes;
        self.cache_bytes += other.cache_bytes;
        self.activation_bytes += other.activation_bytes;
        self.f32_flops += other.f32_flops;
        self.int8_flops += other.int8_flops;
        self.int16_flops += other.int16_flops;
    }
}

/// What a machine can do at most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Roofline {
    /// Bytes per second that plain reads of memory reach.
    pub read_bytes_per_s: f64,
    /// f32 multiplications and additions per second (two for each fused one).
    pub f32_flops_per_s: f64,
    /// 8-bit multiplications and additions per second of dot products (two for each product); of 16-bit ones, of which a
    /// register holds half as many, half of that.
    pub int8_ops_per_s: f64,
}

impl Roofline {
    /// The least time that the bytes or the operations of `cost` take, whichever is longer. Data in caches comes faster
    /// than from memory, so that a small operation may take less than this.
    pub fn least_seconds(&self, cost: &Cost) -> f64 {
        let memory = cost.bytes() as f64 / self.read_bytes_per_s;
        let integer = cost.int8_flops as f64 + 2.0 * cost.int16_flops as f64;
        memory.max(cost.f32_flops as f64 / self.f32_flops_per_s + integer / self.int8_ops_per_s)
    }
}

/// Totals of one operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Record {
    /// Which.
    pub operation: Operation,
    /// Calls that had something to do.
    pub calls: u64,
    /// Their time.
    pub seconds: f64,
    /// Their bytes and FLOPs.
    pub cost: Cost,
}

/// Collects the records of a device. Idle until [`Profiler::start`]; while idle it costs each operation one load.
#[derive(Default)]
pub struct Profiler {
    recording: AtomicBool,
    records: Mutex<Vec<Record>>,
}

impl Profiler {
    /// Forgets what was recorded and records from now on.
    pub fn start(&self) {
        self.lock().clear();
        self.recording.store(true, Ordering::Relaxed);
    }

    /// Ends the recording: the totals of each operation since [`Profiler::start`], in the order of their first calls.
    pub fn take(&self) -> Vec<Record> {
        self.recording.store(false, Ordering::Relaxed);
        std::mem::take(&mut *self.lock())
    }

    /// Between [`Profiler::start`] and [`Profiler::take`].
    pub fn is_recording(&self) -> bool {
        self.recording.load(Ordering::Relaxed)
    }

    fn add(&self, operation: Operation, seconds: f64, cost: Cost) {
        let mut records = self.lock();
        let index = records.iter().position(|r| r.operation == operation).unwrap_or_else(|| {
            records.push(Record { operation, calls: 0, seconds: 0.0, cost: Cost::default() });
            records.len() - 1
        });
        let record = &mut records[index];
        record.calls += 1;
        record.seconds += seconds;
        record.cost += cost;
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Record>> {
        // Totals are changed in place, one at a time: a panic elsewhere leaves them whole.
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The profiler of a device that is recording.
pub(crate) fn recorder<D: Device>(device: &D) -> Option<&Profiler> {
    device.profiler().filter(|profiler| profiler.is_recording())
}

/// Runs the body of a checked operation, on record if the device's profiler is recording; failures are not recorded.
pub(crate) fn run<D: Device, A>(
    device: &D,
    operation: Operation,
    args: A,
    cost: impl FnOnce(&A) -> Cost,
    body: impl FnOnce(&D, A) -> Result<()>,
) -> Result<()> {
    let Some(profiler) = recorder(device) else {
        return body(device, args);
    };
    let cost = cost(&args);
    device.synchronize()?;
    let start = Instant::now();
    body(device, args)?;
    device.synchronize()?;
    profiler.add(operation, start.elapsed().as_secs_f64(), cost);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_per_operation_between_start_and_take() {
        let profiler = Profiler::default();
        let linear = Operation::new("linear", "linear");
        let cost = Cost::default().add_weights(3).add_flops(Arithmetic::Int8, 5);
        assert!(!profiler.is_recording());
        profiler.start();
        assert!(profiler.is_recording());
        profiler.add(linear.with_weights("int8"), 0.5, cost);
        profiler.add(linear.with_weights("F32"), 1.0, Cost::default().add_cache(7));
        profiler.add(linear.with_weights("int8"), 0.25, cost);
        let records = profiler.take();
        let [int8, f32] = &records[..] else { panic!("{records:?}") };
        let twice = Cost { weight_bytes: 6, int8_flops: 10, ..Cost::default() };
        assert_eq!((int8.calls, int8.seconds, int8.cost), (2, 0.75, twice));
        assert_eq!((f32.calls, f32.cost.bytes(), f32.operation.weights), (1, 7, Some("F32")));
        assert!(profiler.take().is_empty() && !profiler.is_recording());
    }

    #[test]
    fn the_slower_of_memory_and_arithmetic_bounds() {
        let roofline = Roofline { read_bytes_per_s: 10.0, f32_flops_per_s: 100.0, int8_ops_per_s: 400.0 };
        let cost = Cost {
            weight_bytes: 10,
            cache_bytes: 5,
            activation_bytes: 5,
            f32_flops: 100,
            int8_flops: 100,
            int16_flops: 50,
        };
        assert_eq!(roofline.least_seconds(&cost), 2.0);
        assert_eq!(roofline.least_seconds(&Cost { f32_flops: 200, ..cost }), 2.5);
    }
}

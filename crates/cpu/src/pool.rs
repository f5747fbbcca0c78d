//! The thread pool: one per [`crate::Cpu`]. Work is split so that no result depends on who computes it.

use marlin_ops::{OpError, Result};
use rayon::prelude::*;

/// Worker threads; with one thread everything runs on the caller.
pub(crate) struct Pool {
    workers: Option<rayon::ThreadPool>,
    threads: usize,
}

impl Pool {
    /// A pool of `threads`, or of all cores.
    pub(crate) fn new(threads: Option<usize>) -> Result<Self> {
        let threads = match threads {
            Some(0) => return Err(OpError::value("cpu", "threads", "is 0")),
            Some(n) => n,
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        if threads == 1 {
            let workers = None;
            return Ok(Self { workers, threads });
        }
        let workers = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("marlin-cpu-{i}"))
            .build()
            .map_err(|e| OpError::Device {
                operation: "cpu",
                reason: format!("cannot start {threads} threads: {e}"),
            })?;
        Ok(Self { workers: Some(workers), threads })
    }

    /// Number of threads.
    pub(crate) fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `f(i, chunk)` for consecutive chunks of `len` elements, the last one possibly shorter.
    pub(crate) fn for_chunks<T: Send>(&self, data: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync + Send) {
        let len = len.max(1);
        match &self.workers {
            Some(workers) if data.len() > len => workers.install(|| {
                let chunks = data.par_chunks_mut(len).enumerate().with_max_len(1);
                chunks.for_each(|(i, chunk)| f(i, chunk));
            }),
            _ => {
                for (i, chunk) in data.chunks_mut(len).enumerate() {
                    f(i, chunk);
                }
            }
        }
    }

    /// Calls `f` for every item.
    pub(crate) fn for_items<T: Send>(&self, items: Vec<T>, f: impl Fn(T) + Sync + Send) {
        match &self.workers {
            Some(workers) if items.len() > 1 => {
                workers.install(|| items.into_par_iter().with_max_len(1).for_each(f));
            }
            _ => items.into_iter().for_each(f),
        }
    }

    /// Length of a chunk that gives each thread a few of `total` units.
    pub(crate) fn grain(&self, total: usize) -> usize {
        total.div_ceil(4 * self.threads).max(1)
    }
}

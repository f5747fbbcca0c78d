//! Counts of what a device was given to do.

use std::sync::atomic::{AtomicU64, Ordering};

/// What a device was given to do since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Kernels, those of repeated records included.
    pub launches: u64,
    /// Records repeated.
    pub replays: u64,
    /// Copies from the host.
    pub writes: u64,
    /// Their bytes.
    pub written_bytes: u64,
    /// Copies to the host; each waits.
    pub reads: u64,
    /// Their bytes, without the fault record that comes along.
    pub read_bytes: u64,
}

impl Traffic {
    /// What was added since `earlier`.
    pub fn since(&self, earlier: &Self) -> Self {
        Self {
            launches: self.launches - earlier.launches,
            replays: self.replays - earlier.replays,
            writes: self.writes - earlier.writes,
            written_bytes: self.written_bytes - earlier.written_bytes,
            reads: self.reads - earlier.reads,
            read_bytes: self.read_bytes - earlier.read_bytes,
        }
    }
}

/// The running counts.
#[derive(Default)]
pub(crate) struct Counters {
    launches: AtomicU64,
    replays: AtomicU64,
    writes: AtomicU64,
    written_bytes: AtomicU64,
    reads: AtomicU64,
    read_bytes: AtomicU64,
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

impl Counters {
    pub(crate) fn launched(&self) {
        add(&self.launches, 1);
    }

    /// A record of this many launches was repeated.
    pub(crate) fn replayed(&self, launches: u64) {
        add(&self.launches, launches);
        add(&self.replays, 1);
    }

    /// Forgets the launches since there were `before`, which were recorded but not run; returns how many.
    pub(crate) fn take_back(&self, before: u64) -> u64 {
        let count = self.totals().launches - before;
        self.launches.fetch_sub(count, Ordering::Relaxed);
        count
    }

    pub(crate) fn wrote(&self, bytes: usize) {
        add(&self.writes, 1);
        add(&self.written_bytes, bytes as u64);
    }

    pub(crate) fn read(&self, bytes: usize) {
        add(&self.reads, 1);
        add(&self.read_bytes, bytes as u64);
    }

    pub(crate) fn totals(&self) -> Traffic {
        let [launches, replays, writes, written_bytes, reads, read_bytes] =
            [&self.launches, &self.replays, &self.writes, &self.written_bytes, &self.reads, &self.read_bytes]
                .map(|counter| counter.load(Ordering::Relaxed));
        Traffic { launches, replays, writes, written_bytes, reads, read_bytes }
    }
}

//! The thread pool: one per [`crate::Cpu`]. Work is split so that no result depends on who computes it.
//!
//! A decoded token passes hundreds of parallel regions, microseconds apart, so threads that have nothing to do spin for
//! a while before they sleep, and a region is over as soon as its work is: threads that come late find it closed.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};

use marlin_ops::{OpError, Result};

use crate::ahead::{self, Reads};

/// Turns of a waiting loop before it gives its core away; about a tenth of a millisecond.
const SPINS: usize = 1 << 13;

/// Worker threads, one fewer than asked for: the caller works too. With one thread everything runs on the caller.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held by the caller of a region.
    region: Mutex<()>,
}

/// A region's work: called on every thread that takes part, rarely twice, with the thread's number; it returns when
/// nothing is left to take.
type Work<'a> = dyn Fn(usize) + Sync + 'a;

/// Multiplications that are worth sharing: some microseconds.
const LEAST_WORK: usize = 1 << 19;

/// Stretches that chunks are handed out from: threads go through neighbouring chunks in order, as memory likes it.
const STRETCHES: usize = 16;

/// The part of what is left of a stretch that [`Pool::for_parts`] hands out at once, as its divisor.
const PART: usize = 3;

/// A value with cache lines of its own: what one thread writes does not disturb those that read its neighbours.
#[derive(Default)]
#[repr(align(128))]
struct Apart<T>(T);

#[derive(Default)]
struct Shared {
    /// What the caller of a region writes.
    region: Apart<Region>,
    /// Workers inside the open region, or that look whether there is one.
    inside: Apart<AtomicUsize>,
    /// Workers that sleep.
    asleep: Apart<AtomicUsize>,
    stop: AtomicBool,
    /// The first panic of a worker.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Default)]
struct Region {
    /// Regions opened so far; idle workers watch it.
    opened: AtomicUsize,
    /// The open region's work, null without one.
    work: AtomicPtr<&'static Work<'static>>,
}

/// A stretch: its owner takes from the front, threads that are through with theirs from the back.
struct Stretch<'a, T> {
    left: Mutex<Left<'a, T>>,
    /// Nothing is left: there is no need for the lock, which would take the owner's cache line away.
    is_empty: AtomicBool,
}

impl<'a, T> Stretch<'a, T> {
    fn new(first: usize, rest: &'a mut [T], unit: usize) -> Self {
        Self { is_empty: AtomicBool::new(rest.is_empty()), left: Mutex::new(Left { first, rest, unit }) }
    }

    /// What `take` takes; it is not asked once nothing is left.
    fn take<P>(&self, take: impl FnOnce(&mut Left<'a, T>) -> Option<P>) -> Option<P> {
        if self.is_empty.load(Ordering::Relaxed) {
            return None;
        }
        let mut left = spin_lock(&self.left);
        let part = take(&mut left);
        if left.rest.is_empty() {
            self.is_empty.store(true, Ordering::Relaxed);
        }
        part
    }
}

/// What is left of a stretch.
struct Left<'a, T> {
    /// The unit that `rest` begins with.
    first: usize,
    rest: &'a mut [T],
    /// Elements of a unit.
    unit: usize,
}

impl<'a, T> Left<'a, T> {
    fn units(&self) -> usize {
        self.rest.len().div_ceil(self.unit)
    }

    /// The first `take(units)` units and the number of the first of them.
    fn take_front(&mut self, take: impl Fn(usize) -> usize) -> Option<(usize, &'a mut [T])> {
        let count = take(self.units());
        let part = self.rest.split_off_mut(..self.rest.len().min(count * self.unit)).filter(|part| !part.is_empty())?;
        let first = self.first;
        self.first += count;
        Some((first, part))
    }

    /// The last `take(units)` units and the number of the first of them.
    fn take_back(&mut self, take: impl Fn(usize) -> usize) -> Option<(usize, &'a mut [T])> {
        let kept = self.units().checked_sub(take(self.units()))?;
        let part = self.rest.split_off_mut(kept * self.unit..).filter(|part| !part.is_empty())?;
        Some((self.first + kept, part))
    }
}

thread_local! {
    /// Whether this thread is inside a region, of whichever pool.
    static BUSY: Cell<bool> = const { Cell::new(false) };
}

/// Locks data that is held for some nanoseconds only: without the system's help, which would cost microseconds.
fn spin_lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    for _ in 0..SPINS {
        match mutex.try_lock() {
            Ok(guard) => return guard,
            Err(TryLockError::Poisoned(guard)) => return guard.into_inner(),
            Err(TryLockError::WouldBlock) => std::hint::spin_loop(),
        }
    }
    // Its holder has lost its core.
    lock(mutex)
}

/// Locks data that a panic cannot leave inconsistent.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// A pool of `threads`, or of all cores.
    pub(crate) fn new(threads: Option<usize>) -> Result<Self> {
        let threads = match threads {
            Some(0) => return Err(OpError::value("cpu", "threads", "is 0")),
            Some(n) => n,
            None => thread::available_parallelism().map_or(1, usize::from),
        };
        let mut pool = Self { shared: Arc::default(), workers: Vec::new(), region: Mutex::new(()) };
        for i in 1..threads {
            let shared = pool.shared.clone();
            let builder = thread::Builder::new().name(format!("marlin-cpu-{i}"));
            let worker = builder.spawn(move || shared.serve(i)).map_err(|e| OpError::Device {
                operation: "cpu",
                reason: format!("cannot start {threads} threads: {e}"),
            })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Number of threads.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `f(i, chunk)` for consecutive chunks of `len` elements, the last one possibly shorter.
    pub(crate) fn for_chunks<T: Send>(&self, data: &mut [T], len: usize, f: impl Fn(usize, &mut [T]) + Sync + Send) {
        self.for_chunks_of(usize::MAX, data, len, f);
    }

    /// [`Pool::for_chunks`] of about `work` multiplications in all, on this thread where they take less time than
    /// waking the others.
    pub(crate) fn for_chunks_of<T: Send>(
        &self,
        work: usize,
        data: &mut [T],
        len: usize,
        f: impl Fn(usize, &mut [T]) + Sync + Send,
    ) {
        self.share(work, data, len, |_| (), |_| 1, f);
    }

    /// Calls `f(first, part)` for parts of whole units of `unit` elements, `first` their first unit; `data` may end
    /// within a unit. Parts shrink towards the end of the work, so that threads end together. `work` is as in
    /// [`Pool::for_chunks_of`]; `reads` says what a thread reads that goes on from a unit, which each remembers.
    pub(crate) fn for_parts<T: Send>(
        &self,
        work: usize,
        data: &mut [T],
        unit: usize,
        reads: impl Fn(usize) -> Reads + Sync,
        f: impl Fn(usize, &mut [T]) + Sync + Send,
    ) {
        if work < LEAST_WORK || self.workers.is_empty() {
            if !data.is_empty() {
                f(0, data);
            }
            return;
        }
        let begin = |first| ahead::begin(reads(first));
        self.share(work, data, unit, begin, |left| left.div_ceil(PART), f);
    }

    /// Calls `f(first, units)` for disjoint parts of `data`, `take(left)` units each where `left` are left of a stretch.
    /// Before that each thread calls `begin` with the first unit of its stretch, if that has any.
    fn share<T: Send>(
        &self,
        work: usize,
        data: &mut [T],
        unit: usize,
        begin: impl Fn(usize) + Sync,
        take: impl Fn(usize) -> usize + Sync,
        f: impl Fn(usize, &mut [T]) + Sync,
    ) {
        let unit = unit.max(1);
        let units = data.len().div_ceil(unit);
        let count = self.threads().min(STRETCHES);
        let per_stretch = units.div_ceil(count);
        let mut rest = data;
        let stretches: [_; STRETCHES] = std::array::from_fn(|i| {
            let rest = rest.split_off_mut(..rest.len().min(per_stretch * unit)).unwrap_or_default();
            Apart(Stretch::new(i * per_stretch, rest, unit))
        });
        self.run(units > 1 && work >= LEAST_WORK, &|thread| {
            let own = thread % count;
            if own * per_stretch < units {
                begin(own * per_stretch);
            }
            while let Some((first, part)) = stretches[own].0.take(|left| left.take_front(&take)) {
                f(first, part);
            }
            for other in (1..count).map(|i| (own + i) % count) {
                while let Some((first, part)) = stretches[other].0.take(|left| left.take_back(&take)) {
                    f(first, part);
                }
            }
        });
    }

    /// Calls `f` for every item.
    pub(crate) fn for_items<T: Send>(&self, items: Vec<T>, f: impl Fn(T) + Sync + Send) {
        let several = items.len() > 1;
        let items = Mutex::new(items.into_iter());
        self.run(several, &|_| {
            while let Some(item) = { lock(&items).next() } {
                f(item);
            }
        });
    }

    /// Length of a chunk that gives each thread a few of `total` units.
    pub(crate) fn grain(&self, total: usize) -> usize {
        total.div_ceil(8 * self.threads()).max(1)
    }

    /// Runs `work` on this thread and, if it is `shared` and the pool is free, on all others.
    fn run(&self, shared: bool, work: &Work<'_>) {
        // Inside a region, and while another thread has the workers, the caller works alone.
        if !shared || self.workers.is_empty() || BUSY.get() {
            return work(0);
        }
        let _region = match self.region.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(guard)) => guard.into_inner(),
            Err(TryLockError::WouldBlock) => return work(0),
        };
        let open = OpenRegion::new(&self.shared, &work);
        if self.shared.asleep.0.load(Ordering::SeqCst) > 0 {
            self.workers.iter().for_each(|worker| worker.thread().unpark());
        }
        BUSY.set(true);
        let outcome = catch_unwind(AssertUnwindSafe(|| work(0)));
        BUSY.set(false);
        drop(open);
        let panic = lock(&self.shared.panic).take();
        if let Some(panic) = outcome.err().or(panic) {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.region.0.opened.fetch_add(1, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker's panics were caught and handed on.
            let _ = worker.join();
        }
    }
}

/// A region that workers may enter; dropping it closes it and waits for those inside.
struct OpenRegion<'a>(&'a Shared);

impl<'a> OpenRegion<'a> {
    /// `work` must stay until the region is dropped.
    fn new(shared: &'a Shared, work: &'a &Work<'_>) -> Self {
        let work = std::ptr::from_ref(work).cast_mut().cast();
        shared.region.0.work.store(work, Ordering::SeqCst);
        shared.region.0.opened.fetch_add(1, Ordering::SeqCst);
        Self(shared)
    }
}

impl Drop for OpenRegion<'_> {
    fn drop(&mut self) {
        self.0.region.0.work.store(std::ptr::null_mut(), Ordering::SeqCst);
        let empty = || self.0.inside.0.load(Ordering::SeqCst) == 0;
        ahead::fetch_until(empty);
        wait_until(empty);
    }
}

/// Spins, then lets other threads run in between.
fn wait_until(mut done: impl FnMut() -> bool) {
    for turn in 0.. {
        if done() {
            return;
        }
        if turn < SPINS { std::hint::spin_loop() } else { thread::yield_now() }
    }
}

impl Shared {
    /// The life of worker number `thread`.
    fn serve(&self, thread: usize) {
        BUSY.set(true);
        let mut seen = 0;
        while !self.stop.load(Ordering::SeqCst) {
            seen = self.next_region(seen);
            // First inside, then the look: who closes a region first takes the work away, then counts who is inside.
            self.inside.0.fetch_add(1, Ordering::SeqCst);
            // SAFETY: the pointer is null or that of an open region. `OpenRegion` keeps what it points to borrowed, and
            // when it is dropped makes the pointer null and waits until nobody is inside; this thread is, so either it
            // finds null here or the region waits for it. The lifetimes that the cast made static end no earlier.
            if let Some(work) = unsafe { self.region.0.work.load(Ordering::SeqCst).as_ref() } {
                if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(thread))) {
                    lock(&self.panic).get_or_insert(panic);
                }
                // It may be a later region than the one that woke this thread; none can open after it yet.
                seen = self.region.0.opened.load(Ordering::SeqCst);
            }
            self.inside.0.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Waits for a region after number `seen`.
    fn next_region(&self, seen: usize) -> usize {
        let opened = || self.region.0.opened.load(Ordering::SeqCst);
        ahead::fetch_until(|| opened() != seen);
        for _ in 0..SPINS {
            if opened() != seen {
                return opened();
            }
            std::hint::spin_loop();
        }
        // A region opened before the count rises is seen here; one opened after it wakes the thread.
        self.asleep.0.fetch_add(1, Ordering::SeqCst);
        while opened() == seen {
            thread::park();
        }
        self.asleep.0.fetch_sub(1, Ordering::SeqCst);
        opened()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(threads: usize) -> Pool {
        Pool::new(Some(threads)).unwrap()
    }

    #[test]
    fn every_chunk_once_in_its_place() {
        for threads in [1, 2, 5, STRETCHES + 4] {
            let pool = pool(threads);
            for len in [0, 1, 7, 64] {
                let mut data = vec![0; 50];
                pool.for_chunks(&mut data, len, |i, chunk| {
                    assert!(chunk.len() <= len.max(1));
                    chunk.iter_mut().enumerate().for_each(|(j, v)| *v += i * len.max(1) + j);
                });
                assert!(data.into_iter().eq(0..50));
                let mut data = vec![0; 50];
                pool.for_parts(
                    usize::MAX,
                    &mut data,
                    len,
                    |_| Reads::default(),
                    |first, part| {
                        let start = first * len.max(1);
                        assert!(part.len().is_multiple_of(len.max(1)) || start + part.len() == 50);
                        part.iter_mut().enumerate().for_each(|(j, v)| *v += start + j);
                    },
                );
                assert!(data.into_iter().eq(0..50));
            }
            let seen: Vec<AtomicUsize> = (0..40).map(|_| AtomicUsize::new(0)).collect();
            pool.for_items((0..40).collect(), |i: usize| {
                seen[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(seen.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
        assert!(Pool::new(Some(0)).is_err());
    }

    #[test]
    fn sleeping_workers_wake_and_share_the_work() {
        let pool = pool(2);
        for pause_ms in [0, 20] {
            thread::sleep(std::time::Duration::from_millis(pause_ms));
            // Each chunk waits for the other, so one thread alone would never end.
            let started = AtomicUsize::new(0);
            pool.for_chunks(&mut [(); 2], 1, |_, _| {
                started.fetch_add(1, Ordering::SeqCst);
                wait_until(|| started.load(Ordering::SeqCst) == 2);
            });
        }
    }

    #[test]
    fn regions_within_regions_and_of_several_callers() {
        let pool = pool(3);
        let total = AtomicUsize::new(0);
        let nested = || {
            pool.for_chunks(&mut [(); 8], 1, |_, _| {
                pool.for_chunks(&mut [(); 8], 1, |_, _| {
                    total.fetch_add(1, Ordering::Relaxed);
                });
            });
        };
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| (0..20).for_each(|_| nested()));
            }
        });
        assert_eq!(total.into_inner(), 3 * 20 * 64);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = pool(2);
        for bad in 0..2 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                let started = AtomicUsize::new(0);
                pool.for_chunks(&mut [(); 2], 1, |i, _| {
                    started.fetch_add(1, Ordering::SeqCst);
                    wait_until(|| started.load(Ordering::SeqCst) == 2);
                    assert!(i != bad, "chunk {i}");
                });
            }));
            let message = *caught.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(message, format!("chunk {bad}"));
        }
        let mut data = [1; 4];
        pool.for_chunks(&mut data, 1, |_, chunk| chunk[0] += 1);
        assert_eq!(data, [2; 4]);
    }

    /// `cargo test --release -p marlin-cpu hand_off -- --ignored --nocapture`: microseconds of an empty region.
    #[test]
    #[ignore = "a measurement"]
    fn hand_off() {
        const REGIONS: u32 = 20_000;
        let threads = thread::available_parallelism().map_or(2, usize::from).max(2);
        let rayon = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let pool = pool(threads);
        // A decode step does a little by itself between its regions.
        let pause = || (0..200).for_each(|_| std::hint::spin_loop());
        let time = |name: &str, region: &dyn Fn()| {
            let start = std::time::Instant::now();
            (0..REGIONS).for_each(|_| {
                pause();
                region();
            });
            println!("{name:28} {:6.2} us", start.elapsed().as_secs_f64() * 1e6 / f64::from(REGIONS));
        };
        let touch = |v: &mut [u64]| v.iter_mut().for_each(|v| *v += 1);
        time("nothing", &|| ());
        time("this pool", &|| pool.for_chunks(&mut vec![0u64; 64], 32, |_, v| touch(v)));
        use rayon::prelude::*;
        let chunks = || vec![0u64; 64].par_chunks_mut(32).with_max_len(1).for_each(touch);
        time("rayon, from outside", &|| rayon.install(chunks));
        rayon.install(|| time("rayon, from a worker", &chunks));
    }
}

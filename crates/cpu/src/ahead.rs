//! What a thread will read next. Every token goes through the same weights in the same order, so each thread remembers
//! which stretch of memory it read after which, and fetches the start of the next one into its second-level cache while
//! it waits for others: decoding waits for memory, and nothing else would read it meanwhile.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

use crate::simd::{LINE_BYTES, prefetch_address};

/// Bytes of a stretch that are fetched: a part of the smallest second-level caches, and of a wait.
const MOST_BYTES: usize = 128 << 10;
/// Lines fetched between two looks at whether the wait is over.
const LINES: usize = 8;
/// Stretches remembered; more belong to models long gone.
const MOST_STRETCHES: usize = 1 << 14;

/// The start of what a thread reads: addresses of arrays that are read side by side.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Reads([Range<usize>; 6]);

impl Reads {
    /// The first bytes of some arrays, of each the same part.
    pub(crate) fn of(arrays: impl Iterator<Item = Range<usize>> + Clone) -> Self {
        let total: usize = arrays.clone().map(|array| array.len()).sum();
        let mut out = Self::default();
        for (out, array) in out.0.iter_mut().zip(arrays) {
            let len = (array.len() as u64 * MOST_BYTES.min(total) as u64 / total.max(1) as u64) as usize;
            *out = array.start..array.start + len;
        }
        out
    }

    /// What it is known by.
    fn key(&self) -> usize {
        self.0[0].start
    }
}

/// What one thread remembers.
#[derive(Default)]
struct Ahead {
    latest: usize,
    followers: HashMap<usize, Reads>,
    /// What is left to fetch.
    next: Reads,
}

impl Ahead {
    fn begin(&mut self, reads: Reads) {
        if self.followers.len() >= MOST_STRETCHES {
            self.followers.clear();
        }
        let key = reads.key();
        self.followers.insert(std::mem::replace(&mut self.latest, key), reads);
        self.next = self.followers.get(&key).cloned().unwrap_or_default();
    }

    /// Lines fetched until nothing was left or `done`.
    fn fetch_until(&mut self, done: impl Fn() -> bool) -> usize {
        let mut lines = 0;
        for array in &mut self.next.0 {
            while array.start < array.end && !done() {
                for _ in 0..LINES {
                    prefetch_address(array.start);
                    array.start += LINE_BYTES;
                }
                lines += LINES;
            }
        }
        lines
    }
}

thread_local! {
    static AHEAD: RefCell<Ahead> = RefCell::default();
}

/// Calls `f` with what this thread remembers; while a thread ends it may have forgotten everything.
fn with_ahead(f: impl FnOnce(&mut Ahead)) {
    let _ = AHEAD.try_with(|ahead| ahead.try_borrow_mut().map(|mut ahead| f(&mut ahead)));
}

/// This thread starts to read `reads`.
pub(crate) fn begin(reads: Reads) {
    with_ahead(|ahead| ahead.begin(reads));
}

/// Fetches what this thread will read next, if that is known, until there is nothing left to fetch or `done`.
pub(crate) fn fetch_until(done: impl Fn() -> bool) {
    with_ahead(|ahead| {
        ahead.fetch_until(done);
    });
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn reads(start: usize, len: usize) -> Reads {
        Reads::of([start..start + len, 2 * start..2 * start + len / 8].into_iter())
    }

    #[test]
    fn what_followed_is_fetched() {
        let mut ahead = Ahead::default();
        // Nothing lies at these addresses: fetching reads nothing.
        let sizes = [(1 << 20, 64 << 10), (3 << 20, 1 << 20), (5 << 20, 0)];
        for round in 0..3 {
            for (i, &(start, len)) in sizes.iter().enumerate() {
                ahead.begin(reads(start, len));
                let (next, next_len) = sizes[(i + 1) % 3];
                match (round, i) {
                    (0, _) => assert_eq!(ahead.next, Reads::default()),
                    _ => assert_eq!(ahead.next, reads(next, next_len)),
                }
                if round > 0 {
                    let fetched = LINE_BYTES * ahead.fetch_until(|| false);
                    let expected = (next_len + next_len / 8).min(MOST_BYTES);
                    assert!(fetched >= expected.saturating_sub(1) && fetched <= expected + 2 * LINES * LINE_BYTES);
                    assert_eq!(ahead.fetch_until(|| false), 0);
                }
            }
        }
        // After another model, the new order counts.
        ahead.begin(reads(9 << 20, 4096));
        ahead.begin(reads(1 << 20, 64 << 10));
        ahead.begin(reads(9 << 20, 4096));
        assert_eq!(ahead.next, reads(1 << 20, 64 << 10));
    }

    #[test]
    fn an_interrupted_fetch_goes_on_later() {
        let mut ahead = Ahead::default();
        for _ in 0..2 {
            ahead.begin(reads(1 << 20, 8192));
        }
        let looks = Cell::new(0);
        let first = ahead.fetch_until(|| looks.replace(looks.get() + 1) >= 3);
        assert_eq!(first, 3 * LINES);
        assert_eq!(first + ahead.fetch_until(|| false), (8192 + 1024) / LINE_BYTES);
    }

    #[test]
    fn the_number_remembered_is_bounded() {
        let mut ahead = Ahead::default();
        for i in 1..3 * MOST_STRETCHES {
            ahead.begin(reads(i << 12, 4096));
            assert!(ahead.followers.len() <= MOST_STRETCHES);
        }
    }
}

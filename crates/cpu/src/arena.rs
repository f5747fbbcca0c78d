//! Memory for weights. Arrays are cut from large anonymous maps for which huge pages are asked: with pages of 4 KiB each
//! of them costs a walk through the page tables and stops the prefetchers of some cores. Weights are often smaller than a
//! huge page (2 MiB), so they share maps; a map goes back to the system with the last of its arrays, the latest not before
//! the arena.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use bytemuck::Zeroable;
use marlin_ops::{OpError, Result};
use memmap2::MmapMut;

use crate::simd::LINE_BYTES;

/// Bytes of a map for several arrays.
const SHARED: usize = 32 << 20;
/// Arrays from here on have maps of their own.
const LARGE: usize = SHARED / 2;
/// Bytes of a huge page on x86-64, and on AArch64 with pages of 4 KiB.
const HUGE: usize = 2 << 20;

/// What memory is asked of the system. On Linux; others choose for themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pages {
    /// Huge pages, where the system has them to give.
    #[default]
    Huge,
    /// Pages of the usual size.
    Small,
}

/// Where arrays come from.
#[derive(Default)]
pub(crate) struct Arena {
    pages: Pages,
    open: Mutex<Option<Rest>>,
}

/// What is left of a map.
struct Rest {
    map: Arc<MmapMut>,
    start: NonNull<u8>,
    left: usize,
}

// SAFETY: nothing else points to the bytes from `start`, and they may be used from any thread.
unsafe impl Send for Rest {}

/// Elements in memory of an [`Arena`].
pub(crate) struct Array<T> {
    start: NonNull<T>,
    len: usize,
    /// Keeps the memory; none for no bytes.
    _map: Option<Arc<MmapMut>>,
    _elements: PhantomData<T>,
}

// SAFETY: an array is the only owner of its elements, as a `Vec` is.
unsafe impl<T: Send> Send for Array<T> {}
// SAFETY: as above; a shared array gives shared references only.
unsafe impl<T: Sync> Sync for Array<T> {}

impl Arena {
    pub(crate) fn new(pages: Pages) -> Self {
        Self { pages, ..Self::default() }
    }

    /// `len` elements of zeros. A device error where the system has no memory left.
    pub(crate) fn zeros<T: Zeroable + Copy>(&self, len: usize) -> Result<Array<T>> {
        const { assert!(align_of::<T>() <= LINE_BYTES) };
        let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| bytes <= isize::MAX as usize - HUGE - LINE_BYTES);
        let bytes = bytes.ok_or_else(|| no_memory(format!("{len} elements")))?.next_multiple_of(LINE_BYTES);
        if bytes == 0 {
            return Ok(Array { start: NonNull::dangling(), len, _map: None, _elements: PhantomData });
        }
        let (map, start) = if bytes >= LARGE {
            Rest::new(bytes, self.pages)?.cut(bytes)
        } else {
            let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
            let rest = match open.take() {
                Some(rest) if rest.left >= bytes => rest,
                _ => Rest::new(SHARED, self.pages)?,
            };
            open.insert(rest).cut(bytes)
        };
        Ok(Array { start: start.cast(), len, _map: Some(map), _elements: PhantomData })
    }
}

impl Rest {
    /// A map with room for `len` bytes of zeros from a multiple of [`HUGE`] on.
    fn new(len: usize, pages: Pages) -> Result<Self> {
        let mut map = MmapMut::map_anon(len + HUGE).map_err(|e| no_memory(format!("{len} bytes: {e}")))?;
        // A wish: systems without huge pages refuse it and lose speed alone.
        #[cfg(target_os = "linux")]
        let _ = map.advise(match pages {
            Pages::Huge => memmap2::Advice::HugePage,
            Pages::Small => memmap2::Advice::NoHugePage,
        });
        #[cfg(not(target_os = "linux"))]
        let _ = pages;
        let skipped = map.as_ptr().align_offset(HUGE);
        let start = NonNull::from(&mut map[skipped..skipped + len]).cast();
        Ok(Self { map: Arc::new(map), start, left: len })
    }

    /// Takes the first `len` bytes, at most as many as are left; a multiple of [`LINE_BYTES`].
    fn cut(&mut self, len: usize) -> (Arc<MmapMut>, NonNull<u8>) {
        assert!(len <= self.left);
        let start = self.start;
        // SAFETY: `start` has `left` bytes of the map behind it, and `len` is not larger.
        self.start = unsafe { start.add(len) };
        self.left -= len;
        (self.map.clone(), start)
    }
}

fn no_memory(what: String) -> OpError {
    OpError::Device { operation: "allocate", reason: format!("no memory for {what}") }
}

impl<T> Deref for Array<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `start` is aligned, and the map holds `len` elements there that are zeros, which `zeros` asks to be
        // valid, or were written since; they belong to this array alone and live as long as `_map`.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Array<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; `self` is borrowed for as long as the elements.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_lie_apart_start_as_zeros_and_outlive_the_arena() {
        let arena = Arena::new(Pages::Huge);
        let lens = [1, 0, 5, 1 << 20, SHARED / 8 - 3, SHARED / 4 + 1, 7];
        let mut arrays: Vec<Array<u64>> = Vec::new();
        for round in 0..3 {
            for (i, &len) in lens.iter().enumerate() {
                let mut array = arena.zeros::<u64>(len).unwrap();
                assert!(array.len() == len && array.iter().all(|&v| v == 0));
                assert!(array.as_ptr().addr().is_multiple_of(if len == 0 { 8 } else { LINE_BYTES }));
                array.fill(1 + (round * lens.len() + i) as u64);
                arrays.push(array);
            }
            // Maps that are still in use stay.
            arrays.swap_remove(round);
        }
        drop(arena);
        let mut marks: Vec<u64> = arrays.iter().filter_map(|array| array.first().copied()).collect();
        for array in &arrays {
            assert!(array.iter().all(|v| Some(v) == array.first()));
        }
        marks.sort_unstable();
        marks.dedup();
        assert_eq!(marks.len(), arrays.iter().filter(|array| !array.is_empty()).count());
        std::thread::spawn(move || drop(arrays)).join().unwrap();
    }

    /// The flags of the map that an address lies in, as Linux lists them.
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    fn flags_of_map(address: usize) -> String {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let holds = |line: &str| {
            let (start, end) = line.split_once(' ')?.0.split_once('-')?;
            let [start, end] = [start, end].map(|text| usize::from_str_radix(text, 16));
            Some((start.ok()?..end.ok()?).contains(&address))
        };
        let map = maps.lines().skip_while(|line| holds(line) != Some(true));
        map.into_iter().find_map(|line| line.strip_prefix("VmFlags:")).unwrap().to_owned()
    }

    #[test]
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    fn pages_are_asked_of_the_system() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            println!("SKIPPED: this system has no huge pages to ask for");
            return;
        }
        for (pages, flag) in [(Pages::Huge, "hg"), (Pages::Small, "nh")] {
            let arena = Arena::new(pages);
            // In a shared map, and in one of its own.
            for len in [100, LARGE] {
                let array = arena.zeros::<u8>(len).unwrap();
                let flags = flags_of_map(array.as_ptr().addr());
                assert!(flags.split_whitespace().any(|found| found == flag), "{pages:?} {len}: {flags}");
            }
        }
    }

    #[test]
    fn more_than_there_is_is_an_error() {
        let arena = Arena::default();
        for len in [usize::MAX, usize::MAX / 8, isize::MAX as usize / 8] {
            let error = arena.zeros::<u64>(len).err().map(|e| e.to_string());
            assert!(error.as_ref().is_some_and(|e| e.contains("no memory for")), "{error:?}");
        }
        assert_eq!(arena.zeros::<u64>(1).unwrap()[0], 0);
    }
}

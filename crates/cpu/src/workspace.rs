//! Scratch memory kept between calls, so that a decoding step does not allocate once it is warm.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::linear::{ActivationBlock, DoubledCodes, RotatedBlock};
use crate::sampling::Candidate;
use crate::simd::Line;

/// Idle buffers of one element type.
pub(crate) struct Shelf<T>(Mutex<Vec<Vec<T>>>);

impl<T: Clone + Default> Shelf<T> {
    /// `len` elements with unspecified contents.
    pub(crate) fn take(&self, len: usize) -> Scratch<'_, T> {
        let mut buffer = self.lock().pop().unwrap_or_default();
        if buffer.len() < len {
            buffer.resize(len, T::default());
        }
        Scratch { shelf: self, buffer, len }
    }
}

impl<T> Shelf<T> {
    /// Calls `f` with an empty list.
    pub(crate) fn lend<R>(&self, f: impl FnOnce(&mut Vec<T>) -> R) -> R {
        let mut list = self.lock().pop().unwrap_or_default();
        list.clear();
        let result = f(&mut list);
        self.lock().push(list);
        result
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<T>>> {
        // Idle buffers carry no state that a panic could break.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Default for Shelf<T> {
    fn default() -> Self {
        Self(Mutex::new(Vec::new()))
    }
}

/// A buffer on loan; it goes back to its shelf when dropped.
pub(crate) struct Scratch<'a, T> {
    shelf: &'a Shelf<T>,
    buffer: Vec<T>,
    len: usize,
}

impl<T> Deref for Scratch<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.buffer[..self.len]
    }
}

impl<T> DerefMut for Scratch<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.buffer[..self.len]
    }
}

impl<T> Drop for Scratch<'_, T> {
    fn drop(&mut self) {
        self.shelf.lock().push(std::mem::take(&mut self.buffer));
    }
}

/// All shelves of a device.
#[derive(Default)]
pub(crate) struct Workspace {
    /// Rows of activations and tiles of caches.
    pub(crate) floats: Shelf<f32>,
    /// Sums of weight tiles.
    pub(crate) lines: Shelf<Line<f32>>,
    /// Decoded code panels.
    pub(crate) codes: Shelf<Line<u32>>,
    /// Quantized activations.
    pub(crate) blocks: Shelf<ActivationBlock>,
    /// Rotated and quantized activations.
    pub(crate) rotated: Shelf<RotatedBlock>,
    /// Every second pair of their codes, each code twice.
    pub(crate) doubled: Shelf<DoubledCodes>,
    /// Index lists.
    pub(crate) indices: Shelf<u32>,
    /// Tokens to sample from.
    pub(crate) candidates: Shelf<Candidate>,
    /// Router scores.
    pub(crate) doubles: Shelf<f64>,
}

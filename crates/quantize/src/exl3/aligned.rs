//! Arrays that start with a cache line, so that no vector of a loop spans two.

use std::ops::{Deref, DerefMut};

const LINE: usize = 64;

/// f32 values that start at a multiple of 64 bytes.
pub(super) struct Aligned {
    buffer: Vec<f32>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub(super) fn zeros(len: usize) -> Self {
        let spare = LINE / size_of::<f32>() - 1;
        let buffer = vec![0.0f32; len + spare];
        let start = buffer.as_ptr().align_offset(LINE).min(spare);
        Self { buffer, start, len }
    }
}

impl Deref for Aligned {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.buffer[self.start..][..self.len]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.buffer[self.start..][..self.len]
    }
}

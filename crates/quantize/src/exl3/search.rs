//! Where tiles are encoded: on a device that has a search for them, or on the CPU.

use std::sync::{Mutex, PoisonError};

use marlin_formats::exl3::Codebook;
use marlin_ops::PathSearch;
use marlin_ops::trellis::{Path, Tile};

use super::viterbi::{Encoder, Workspace};
use crate::Result;

/// Tiles below which a large GPU takes as long for fewer.
const WORTHWHILE: usize = 128;

/// The search with one codebook at one bit rate.
pub(super) struct Search<'a> {
    codebook: Codebook,
    device: Option<&'a dyn PathSearch>,
    encoder: Encoder,
    /// As many as threads asked for at the same time.
    workspaces: Mutex<Vec<Workspace>>,
}

impl<'a> Search<'a> {
    pub(super) fn new(codebook: Codebook, bits: u32, device: Option<&'a dyn PathSearch>) -> Self {
        Self { codebook, device, encoder: Encoder::new(codebook, bits), workspaces: Mutex::default() }
    }

    /// Bits a weight.
    pub(super) fn bits(&self) -> u32 {
        self.encoder.bits()
    }

    /// The value of a word of a path.
    pub(super) fn value(&self, word: u16) -> f32 {
        self.encoder.value(word)
    }

    /// Of `count` tiles that do not depend on each other, as many as one call should get: on the CPU one, so that each
    /// thread has its own, on a device half of them, so that one half is prepared while the other is encoded, unless the
    /// halves are so small that they take as long as the whole.
    pub(super) fn batch(&self, count: usize) -> usize {
        let Some(device) = self.device else {
            return 1;
        };
        let half = count.div_ceil(2);
        device.tiles_at_once(self.bits()).min(if half < WORTHWHILE { count } else { half }).max(1)
    }

    /// Of `count` columns of tiles, as many as should be in memory at the same time.
    pub(super) fn columns_at_once(&self, count: usize) -> usize {
        match self.device {
            Some(_) => 2 * self.batch(count),
            // Each thread holds one, whatever their number.
            None => count.max(1),
        }
    }

    /// The paths of some tiles, all finite as f16.
    pub(super) fn paths(&self, targets: &[Tile]) -> Result<Vec<Path>> {
        if let Some(device) = self.device {
            return Ok(device.search_paths(self.codebook, self.bits(), targets)?);
        }
        let free = || self.workspaces.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = free().pop();
        let mut workspace = taken.unwrap_or_else(|| self.encoder.workspace());
        let paths = targets.iter().map(|target| self.encoder.encode(target, &mut workspace)).collect();
        free().push(workspace);
        Ok(paths)
    }
}

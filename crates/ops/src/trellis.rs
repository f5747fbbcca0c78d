//! The search behind EXL3 quantizers: the path through the trellis whose values come closest to a tile.

use half::f16;
use marlin_formats::exl3::{Codebook, tile};

use crate::{OpError, Result};

/// Numbers to encode, in the order of positions; finite as f16, to which a search rounds them.
pub type Tile = [f32; tile::WEIGHTS];

/// Words (16-bit states) of all positions of a tile; the cycle is closed.
pub type Path = [u16; tile::WEIGHTS];

/// Where the first pass starts, so that it forgets its start before it reaches position 0.
pub const FIRST_START: usize = tile::WEIGHTS / 2;

/// A device that encodes tiles.
///
/// Words `m 2^(16 - bits) + s`, `m < 2^bits`, lead into state `s`, each from state `word >> bits`. Two passes of Viterbi's
/// algorithm over all 256 positions, with the sum of squared errors as cost, accumulated in f32: the first starts at
/// [`FIRST_START`] in all states and chooses the state before position 0, the second starts and ends there. Of equal
/// costs the smallest `m` counts, then the smallest state.
pub trait PathSearch: Send + Sync {
    /// Tiles that keep the device busy and fit into its memory, at 1 to 8 bits.
    fn tiles_at_once(&self, bits: u32) -> usize;

    /// The paths of some tiles, in their order.
    ///
    /// # Errors
    /// Bits outside 1 to 8, a target that is not finite as f16, a failure of the device.
    fn search_paths(&self, codebook: Codebook, bits: u32, targets: &[Tile]) -> Result<Vec<Path>> {
        const OP: &str = "search_paths";
        if !(1..=8).contains(&bits) {
            return Err(OpError::value(OP, "bits", format!("is {bits}, expected 1 to 8")));
        }
        for (i, tile) in targets.iter().enumerate() {
            if let Some(position) = tile.iter().position(|&x| !f16::from_f32(x).is_finite()) {
                let reason = format!("[{i}, {position}] is {}, not finite as f16", tile[position]);
                return Err(OpError::value(OP, "targets", reason));
            }
        }
        self.run_search_paths(codebook, bits, targets)
    }

    /// [`PathSearch::search_paths`] after the checks.
    ///
    /// # Errors
    /// A failure of the device.
    fn run_search_paths(&self, codebook: Codebook, bits: u32, targets: &[Tile]) -> Result<Vec<Path>>;
}

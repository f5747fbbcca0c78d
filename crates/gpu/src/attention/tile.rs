//! Shapes of an attention kernel, and which one a call gets.

use crate::launch::UNITS;

/// An attention kernel: which part of the queries and keys a cube holds at once, and how the keys are shared out.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct AttentionKernel {
    /// Rows of a cube, a power of two up to 64: the query heads that share a key head, of one or more queries.
    pub q_tile: usize,
    /// Keys in shared memory at once, a power of two.
    pub kv_tile: usize,
    /// Columns in shared memory at once, a power of two of at least 16.
    pub chunk: usize,
    /// Ranges of keys, each of its own cubes; above 1 a second kernel joins them. At most [`AttentionKernel::MOST_SPLITS`].
    pub splits: usize,
}

impl AttentionKernel {
    /// Most ranges of keys.
    pub const MOST_SPLITS: usize = UNITS as usize;

    /// The tile for this many rows.
    pub(super) fn for_rows(rows: usize) -> Self {
        let q_tile = rows.next_power_of_two().clamp(1, 64);
        let (kv_tile, chunk) = match q_tile {
            1..=4 => (128, 32),
            8 | 16 => (64, 64),
            32 => (32, 64),
            _ => (32, 32),
        };
        Self { q_tile, kv_tile, chunk, splits: 1 }
    }

    /// As many ranges of `keys` keys, of about `least` or more, as keep a device busy that runs `wanted` cubes at once.
    pub(super) fn with_splits(self, cubes: usize, keys: usize, least: usize, wanted: usize) -> Self {
        let most = keys.div_ceil(least).clamp(1, Self::MOST_SPLITS);
        Self { splits: (wanted / cubes.max(1)).clamp(1, most), ..self }
    }

    /// Rows of a unit in products.
    pub(super) const fn unit_rows(self) -> usize {
        if self.q_tile < 4 { self.q_tile } else { 4 }
    }

    /// Keys of a unit in products of queries and keys.
    pub(super) const fn unit_keys(self) -> usize {
        self.q_tile * self.kv_tile / (UNITS as usize * self.unit_rows())
    }

    /// Groups of rows.
    pub(super) const fn row_groups(self) -> usize {
        self.q_tile / self.unit_rows()
    }

    /// Quarters of a row of a chunk.
    pub(super) const fn quads(self) -> usize {
        self.chunk / 4
    }

    /// Distance of rows in shared memory, in quarters; odd, so that a column meets all banks.
    pub(super) const fn pitch(self) -> usize {
        self.quads() + 1
    }

    /// Parts of the keys in products of probabilities and values.
    pub(super) const fn slices(self) -> usize {
        UNITS as usize / (self.quads() * self.row_groups())
    }

    /// Distance of the rows of scores.
    pub(super) const fn score_pitch(self) -> usize {
        self.kv_tile + 4
    }

    /// Bytes of shared memory; the order of the slices is the compiler's, so each counts in multiples of the largest
    /// alignment.
    pub(super) const fn shared_bytes(self) -> usize {
        let (scores, factors) = (self.q_tile * self.score_pitch() * 4, self.q_tile * 4);
        (self.q_tile + self.kv_tile) * self.pitch() * 16 + scores.next_multiple_of(16) + factors.next_multiple_of(16)
    }

    /// Why this is no kernel, if it is none.
    pub(super) fn defect(self, shared_memory: usize) -> Option<String> {
        let powers = [self.q_tile, self.kv_tile, self.chunk].iter().all(|n| n.is_power_of_two());
        let units = UNITS as usize;
        if !powers || self.q_tile > 64 || self.chunk < 16 {
            return Some("q_tile, kv_tile and chunk must be powers of two, q_tile <= 64, chunk >= 16".into());
        }
        if self.splits == 0 || self.splits > Self::MOST_SPLITS {
            return Some(format!("splits must be in 1..={}", Self::MOST_SPLITS));
        }
        if self.unit_keys() == 0 {
            return Some(format!("q_tile * kv_tile must be at least {units} * min(q_tile, 4)"));
        }
        if self.slices() == 0 || self.slices() > self.kv_tile {
            return Some(format!("{units} units do not divide into rows of {} columns", self.chunk));
        }
        // The slices' sums are joined in the memory of the tiles.
        if units * self.unit_rows() > (self.q_tile + self.kv_tile) * self.pitch() {
            return Some("the tiles are too small".into());
        }
        let bytes = self.shared_bytes();
        (bytes > shared_memory).then(|| format!("{bytes} bytes of shared memory, the device has {shared_memory}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_kernels_are_kernels() {
        for rows in 1..200 {
            let kernel = AttentionKernel::for_rows(rows);
            assert_eq!(kernel.defect(32 << 10), None, "{kernel:?}");
            assert_eq!(kernel.quads() * kernel.row_groups() * kernel.slices(), UNITS as usize);
        }
        let kernel = AttentionKernel::for_rows(8);
        assert_eq!(kernel.with_splits(8, 1000, 64, 512).splits, 16);
        assert_eq!(kernel.with_splits(8, 100_000, 64, 512).splits, 64);
        assert_eq!(kernel.with_splits(1000, 100_000, 64, 512).splits, 1);
        assert!(AttentionKernel { chunk: 48, ..kernel }.defect(32 << 10).is_some());
        assert!(AttentionKernel { kv_tile: 512, ..kernel }.defect(32 << 10).is_some());
        assert!(AttentionKernel { kv_tile: 16, ..kernel }.defect(32 << 10).is_some());
        assert!(AttentionKernel { splits: 0, ..kernel }.defect(32 << 10).is_some());
    }
}

//! Read-only mapped files.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{ModelError, Result};

/// A file mapped read-only for its whole life.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    /// Maps `path`.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(ModelError::io(path))?;
        // SAFETY: the map is read-only and private. As with every mapped checkpoint, the file must not be truncated
        // while it is open; another process that does so ends this one with SIGBUS.
        let map = unsafe { Mmap::map(&file) }.map_err(ModelError::io(path))?;
        Ok(Self { path: path.to_owned(), map })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Lets the system drop the pages of a range; they come back from the file when read again.
    #[cfg(unix)]
    pub(crate) fn release(&self, start: usize, len: usize) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        // SAFETY: the mapping is private, file-backed and never written, so dropped pages are re-read from the file
        // with the same contents; existing references stay valid.
        unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, len) }
            .map_err(ModelError::io(&self.path))
    }

    /// Nothing to do where pages cannot be advised away.
    #[cfg(not(unix))]
    pub(crate) fn release(&self, _start: usize, _len: usize) -> Result<()> {
        Ok(())
    }
}

impl AsRef<[u8]> for MappedFile {
    fn as_ref(&self) -> &[u8] {
        &self.map
    }
}

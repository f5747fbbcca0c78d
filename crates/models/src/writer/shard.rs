//! One safetensors file written front to back although its header comes first: small shards wait in memory, larger
//! ones leave room for the header and fill it in at the end, padded with the spaces that the format permits.

use std::io::{self, SeekFrom, Write};
use std::path::PathBuf;

use marlin_formats::DType;
use serde_json::json;

use super::OutputFile;
use crate::error::{ModelError, Result};

/// Data kept in memory before the shard goes to its file.
const SPOOL_BYTES: usize = 32 << 20;
/// Write size once it does.
const FLUSH_BYTES: usize = 4 << 20;
/// Room for the header of a shard that did not fit in memory.
const HEADER_ROOM: usize = 1 << 20;
/// Start and end of every header.
const HEADER_START: &str = r#"{"__metadata__":{"format":"pt"}"#;

pub(super) struct Shard {
    path: PathBuf,
    file: Box<dyn OutputFile>,
    header: String,
    tensors: Vec<String>,
    data_len: u64,
    pending: Vec<u8>,
    spilled: bool,
}

impl Shard {
    pub(super) fn new(path: PathBuf, file: Box<dyn OutputFile>) -> Self {
        Self {
            path,
            file,
            header: HEADER_START.to_owned(),
            tensors: Vec::new(),
            data_len: 0,
            pending: Vec::new(),
            spilled: false,
        }
    }

    /// Data bytes so far.
    pub(super) fn data_len(&self) -> u64 {
        self.data_len
    }

    /// Whether the header can take another tensor.
    pub(super) fn has_room_for(&self, name: &str, dtype: DType, dims: &[usize], len: u64) -> bool {
        self.header.len() + self.entry(name, dtype, dims, len).len() < HEADER_ROOM
    }

    /// Appends one tensor of `len` bytes.
    pub(super) fn write(
        &mut self,
        name: &str,
        dtype: DType,
        dims: &[usize],
        len: u64,
        fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        let entry = self.entry(name, dtype, dims, len);
        let start = self.data_len;
        if let Err(e) = fill(self) {
            return Err(ModelError::io(&self.path)(e));
        }
        let written = self.data_len - start;
        if written != len {
            let reason = format!("`{name}`: {written} bytes were written for shape {dims:?}, expected {len}");
            return Err(ModelError::request("tensor", reason));
        }
        self.header.push_str(&entry);
        self.tensors.push(name.to_owned());
        Ok(())
    }

    /// Completes the file on disk; its path and tensor names.
    pub(super) fn close(mut self) -> Result<(PathBuf, Vec<String>)> {
        match self.write_out() {
            Ok(()) => Ok((self.path, self.tensors)),
            Err(e) => Err(ModelError::io(&self.path)(e)),
        }
    }

    fn write_out(&mut self) -> io::Result<()> {
        self.header.push('}');
        let room = match self.spilled {
            true => HEADER_ROOM,
            false => self.header.len().next_multiple_of(8),
        };
        let padding = room - self.header.len();
        self.header.extend(std::iter::repeat_n(' ', padding));
        if self.spilled {
            self.flush()?;
            self.file.seek(SeekFrom::Start(0))?;
        }
        self.file.write_all(&(room as u64).to_le_bytes())?;
        self.file.write_all(self.header.as_bytes())?;
        if !self.spilled {
            self.file.write_all(&self.pending)?;
        }
        self.file.flush()?;
        self.file.sync()
    }

    fn entry(&self, name: &str, dtype: DType, dims: &[usize], len: u64) -> String {
        let offsets = [self.data_len, self.data_len + len];
        let value = json!({"dtype": dtype.name(), "shape": dims, "data_offsets": offsets});
        format!(",{}:{value}", json!(name))
    }
}

impl Write for Shard {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !self.spilled && self.pending.len() + bytes.len() > SPOOL_BYTES {
            self.file.seek(SeekFrom::Start(8 + HEADER_ROOM as u64))?;
            self.spilled = true;
            self.flush()?;
        }
        if self.spilled && bytes.len() >= FLUSH_BYTES {
            self.flush()?;
            self.file.write_all(bytes)?;
        } else {
            self.pending.extend_from_slice(bytes);
            if self.spilled && self.pending.len() >= FLUSH_BYTES {
                self.flush()?;
            }
        }
        self.data_len += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.spilled {
            self.file.write_all(&self.pending)?;
            self.pending.clear();
            self.pending.shrink_to(FLUSH_BYTES);
        }
        Ok(())
    }
}

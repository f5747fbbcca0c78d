//! Writes a model folder so that a half-written one never looks finished.

mod shard;

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Seek, Write};
use std::path::{Path, PathBuf};

use marlin_formats::{DType, QuantizedMatrix};
use marlin_ops::{HostTensor, InputOrder};
use serde_json::{Value, json};

use crate::checkpoint::{NATIVE_TENSORS, group_dtype};
use crate::error::{ModelError, Result};
use shard::Shard;

/// Data bytes after which a shard is closed.
const SHARD_BYTES: u64 = 2 << 30;

/// Files that travel with a model's weights, copied when present.
const ASSETS: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// An open output file.
trait OutputFile: Write + Seek + Send {
    /// Forces the contents to the disk.
    fn sync(&mut self) -> io::Result<()>;
}

impl OutputFile for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

/// Creates a file of the folder; tests put a full disk here.
type OpenFile = Box<dyn Fn(&Path) -> io::Result<Box<dyn OutputFile>> + Send>;

/// What a finished folder holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteSummary {
    /// Tensors written.
    pub tensors: usize,
    /// Bytes of tensor data.
    pub bytes: u64,
    /// Safetensors files.
    pub shards: usize,
}

/// Writes a Hugging Face model folder in a sibling `{name}.partial-{pid}`, which [`Writer::finish`] renames to its
/// final name after everything is on disk. Dropped before that, or after any error, it removes what it wrote.
///
/// Tensors stream into shards of at most 2 GiB (one tensor may exceed it); memory stays below about 64 MiB.
pub struct Writer {
    out: PathBuf,
    partial: PathBuf,
    open: OpenFile,
    shard_bytes: u64,
    shard: Option<Shard>,
    /// Temporary file and tensor names of every closed shard.
    closed: Vec<(PathBuf, Vec<String>)>,
    names: HashSet<String>,
    bytes: u64,
    failed: bool,
}

impl Writer {
    /// Starts a folder that will be `out`.
    ///
    /// # Errors
    /// [`ModelError::OutputExists`], or the system's refusal.
    pub fn create(out: &Path) -> Result<Self> {
        let open = |path: &Path| -> io::Result<Box<dyn OutputFile>> { Ok(Box::new(File::create_new(path)?)) };
        Self::with_files(out, Box::new(open), SHARD_BYTES)
    }

    /// The same with the folder `partial`, which must not exist, in place of the sibling until then; both on one file
    /// system.
    ///
    /// # Errors
    /// As [`Writer::create`].
    pub fn create_in(out: &Path, partial: &Path) -> Result<Self> {
        let open = |path: &Path| -> io::Result<Box<dyn OutputFile>> { Ok(Box::new(File::create_new(path)?)) };
        refuse_existing(out)?;
        Self::in_folder(out, partial.to_owned(), Box::new(open), SHARD_BYTES)
    }

    fn with_files(out: &Path, open: OpenFile, shard_bytes: u64) -> Result<Self> {
        refuse_existing(out)?;
        let Some(name) = out.file_name() else {
            return Err(ModelError::request("output folder", format!("{} has no name", out.display())));
        };
        let mut partial_name = name.to_owned();
        partial_name.push(format!(".partial-{}", std::process::id()));
        Self::in_folder(out, out.with_file_name(partial_name), open, shard_bytes)
    }

    fn in_folder(out: &Path, partial: PathBuf, open: OpenFile, shard_bytes: u64) -> Result<Self> {
        fs::create_dir(&partial).map_err(ModelError::io(out))?;
        Ok(Self {
            out: out.to_owned(),
            partial,
            open,
            shard_bytes,
            shard: None,
            closed: Vec::new(),
            names: HashSet::new(),
            bytes: 0,
            failed: false,
        })
    }

    /// Writes one tensor from its little-endian bytes.
    ///
    /// # Errors
    /// As [`Writer::tensor_with`].
    pub fn tensor(&mut self, name: &str, dtype: DType, dims: &[usize], bytes: &[u8]) -> Result<()> {
        self.tensor_with(name, dtype, dims, |sink| sink.write_all(bytes))
    }

    /// Writes one tensor, whose little-endian bytes `fill` writes piece by piece.
    ///
    /// # Errors
    /// A name written before, a shape that overflows, more or fewer bytes than the shape, or an I/O error with the
    /// file (the disk is full). After an error the writer only accepts being dropped.
    pub fn tensor_with(
        &mut self,
        name: &str,
        dtype: DType,
        dims: &[usize],
        fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        self.guard(|writer| writer.write_tensor(name, dtype, dims, fill))
    }

    /// Writes a host tensor.
    ///
    /// # Errors
    /// As [`Writer::tensor_with`].
    pub fn host_tensor(&mut self, name: &str, tensor: &HostTensor) -> Result<()> {
        self.tensor(name, tensor.dtype(), tensor.dims(), tensor.bytes())
    }

    /// Writes the native tensors of module `module` (formats.md 0.4): `.mm.q`, `.mm.s`, and where the format has
    /// them `.mm.z` (zero points or offsets), `.mm.ss` and `.mm.sz` (multipliers of two-level scales and minima), `.mm.gs`.
    /// With an order `.mm.o`, the channels of the rows, `[K]` U32.
    ///
    /// # Errors
    /// As [`Writer::tensor_with`].
    pub fn matrix(&mut self, module: &str, matrix: &QuantizedMatrix, order: Option<&InputOrder>) -> Result<()> {
        let (scheme, n) = (matrix.scheme, matrix.out_features);
        let code_dims = [scheme.code_rows(matrix.in_features), n];
        let group_dims = [scheme.groups(matrix.in_features), n];
        let name = |suffix: &str| format!("{module}.mm.{suffix}");
        let [q, s, z, ss, sz, gs, o] = NATIVE_TENSORS;
        self.tensor_with(&name(q), DType::U32, &code_dims, |sink| {
            write_values(sink, &matrix.codes, |v| v.to_le_bytes())
        })?;
        let dtype = group_dtype(scheme.format.scale_kind());
        let super_dims = [scheme.super_blocks(matrix.in_features), n];
        for (suffix, values, dtype, dims) in [
            (s, &matrix.scales, dtype, &group_dims),
            (z, &matrix.zeros, dtype, &group_dims),
            (ss, &matrix.super_scales, DType::F16, &super_dims),
            (sz, &matrix.super_minima, DType::F16, &super_dims),
        ] {
            if !values.is_empty() {
                self.tensor_with(&name(suffix), dtype, dims, |sink| match dtype.size_in_bytes() {
                    1 => write_values(sink, values, |v| [v as u8]),
                    _ => write_values(sink, values, |v| v.to_le_bytes()),
                })?;
            }
        }
        if let Some(scale) = matrix.tensor_scale {
            self.tensor(&name(gs), DType::F32, &[1], &scale.to_le_bytes())?;
        }
        let Some(channels) = order.map(InputOrder::channels) else { return Ok(()) };
        self.tensor_with(&name(o), DType::U32, &[channels.len()], |sink| {
            write_values(sink, channels, |v| v.to_le_bytes())
        })
    }

    /// Copies the tokenizer, chat template and generation settings of another model folder, where present.
    ///
    /// # Errors
    /// An I/O error with the file.
    pub fn copy_assets(&mut self, from: &Path) -> Result<()> {
        if let Some(file) = crate::gguf::find(from)? {
            return self.gguf_assets(&file);
        }
        self.guard(|writer| {
            for asset in ASSETS {
                let source = from.join(asset);
                if source.exists() {
                    let contents = fs::read(&source).map_err(ModelError::io(&source))?;
                    writer.write_file(asset, &contents)?;
                }
            }
            Ok(())
        })
    }

    /// What a GGUF file holds beside its weights, in the files of a folder.
    fn gguf_assets(&mut self, file: &Path) -> Result<()> {
        let mut files = vec![
            ("tokenizer.json", crate::gguf::tokenizer_json(file)?.to_string()),
            ("generation_config.json", crate::gguf::generation_json(file)?.to_string()),
        ];
        if let Some((template, tokens)) = crate::gguf::chat_template(file)? {
            files.push(("chat_template.jinja", template));
            files.push(("tokenizer_config.json", Value::Object(tokens).to_string()));
        }
        files.into_iter().try_for_each(|(name, contents)| self.file(name, contents.as_bytes()))
    }

    /// Writes a further file of the folder.
    ///
    /// # Errors
    /// An I/O error with the file; a name written before.
    pub fn file(&mut self, name: &str, contents: &[u8]) -> Result<()> {
        self.guard(|writer| writer.write_file(name, contents))
    }

    /// The contents of the `config.json` that [`Writer::finish`] writes.
    pub fn config_text(config: &Value) -> String {
        pretty(config)
    }

    /// Writes `config.json` and the shard index, forces everything to disk and gives the folder its final name.
    ///
    /// # Errors
    /// An earlier error, an I/O error with the file, or [`ModelError::OutputExists`] when the folder appeared since.
    pub fn finish(mut self, config: &Value) -> Result<WriteSummary> {
        self.guard(|writer| {
            writer.close_shard()?;
            writer.name_shards()?;
            writer.write_file("config.json", pretty(config).as_bytes())?;
            sync_dir(&writer.partial)?;
            refuse_existing(&writer.out)?;
            fs::rename(&writer.partial, &writer.out).map_err(ModelError::io(&writer.out))
        })?;
        // From here on the drop has nothing to remove.
        self.partial = PathBuf::new();
        match self.out.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent)?,
            _ => sync_dir(Path::new("."))?,
        }
        Ok(WriteSummary { tensors: self.names.len(), bytes: self.bytes, shards: self.closed.len() })
    }

    /// Runs a step unless an earlier one failed, and remembers failure.
    fn guard(&mut self, step: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if self.failed {
            let reason = format!("{} cannot be completed: an earlier write failed", self.out.display());
            return Err(ModelError::request("output folder", reason));
        }
        let result = step(self);
        self.failed = result.is_err();
        result
    }

    fn write_tensor(
        &mut self,
        name: &str,
        dtype: DType,
        dims: &[usize],
        fill: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        if !self.names.insert(name.to_owned()) {
            return Err(ModelError::DuplicateTensor {
                path: self.out.clone(),
                tensor: name.to_owned(),
                other: self.out.clone(),
            });
        }
        let elements = dims.iter().try_fold(1u64, |product, &d| product.checked_mul(d as u64));
        let Some(len) = elements.and_then(|n| n.checked_mul(dtype.size_in_bytes() as u64)) else {
            return Err(ModelError::request("tensor", format!("`{name}`: shape {dims:?} overflows")));
        };
        let full = self.shard.as_ref().is_some_and(|shard| {
            shard.data_len() > 0 && shard.data_len() + len > self.shard_bytes
                || !shard.has_room_for(name, dtype, dims, len)
        });
        if full {
            self.close_shard()?;
        }
        let shard = match &mut self.shard {
            Some(shard) => shard,
            none => {
                let path = self.partial.join(format!("shard-{}.tmp", self.closed.len()));
                let file = (self.open)(&path).map_err(ModelError::io(&path))?;
                none.insert(Shard::new(path, file))
            }
        };
        shard.write(name, dtype, dims, len, fill)?;
        self.bytes += len;
        Ok(())
    }

    fn close_shard(&mut self) -> Result<()> {
        if let Some(shard) = self.shard.take() {
            self.closed.push(shard.close()?);
        }
        Ok(())
    }

    /// Gives shards their final names, now that their number is known, and writes the index.
    fn name_shards(&mut self) -> Result<()> {
        let count = self.closed.len();
        let mut weight_map = BTreeMap::new();
        for (i, (path, tensors)) in self.closed.iter().enumerate() {
            let name = match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            fs::rename(path, self.partial.join(&name)).map_err(ModelError::io(path))?;
            weight_map.extend(tensors.iter().map(|tensor| (tensor.as_str(), name.clone())));
        }
        if count <= 1 {
            return Ok(());
        }
        let index = json!({"metadata": {"total_size": self.bytes}, "weight_map": weight_map});
        self.write_file("model.safetensors.index.json", pretty(&index).as_bytes())
    }

    fn write_file(&self, name: &str, contents: &[u8]) -> Result<()> {
        let path = self.partial.join(name);
        let write = || -> io::Result<()> {
            let mut file = (self.open)(&path)?;
            file.write_all(contents)?;
            file.sync()
        };
        write().map_err(ModelError::io(&path))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.partial.as_os_str().is_empty() {
            self.shard = None;
            // A drop cannot report; what stays behind is named `.partial-` and is not a model folder.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

fn refuse_existing(out: &Path) -> Result<()> {
    match fs::symlink_metadata(out) {
        Ok(_) => Err(ModelError::OutputExists { path: out.to_owned() }),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(ModelError::io(out)(e)),
    }
}

/// Forces a folder's entries to disk, where folders can be opened.
fn sync_dir(path: &Path) -> Result<()> {
    if cfg!(unix) {
        let dir = File::open(path).map_err(ModelError::io(path))?;
        dir.sync_all().map_err(ModelError::io(path))?;
    }
    Ok(())
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// Writes values as little-endian bytes through a small buffer.
fn write_values<T: Copy, const N: usize>(
    sink: &mut dyn Write,
    values: &[T],
    bytes: impl Fn(T) -> [u8; N],
) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(N * values.len().min(1 << 16));
    for chunk in values.chunks(1 << 16) {
        buffer.clear();
        buffer.extend(chunk.iter().flat_map(|&v| bytes(v)));
        sink.write_all(&buffer)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;

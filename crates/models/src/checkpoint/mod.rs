//! Tensors of a Hugging Face folder, memory-mapped.

mod gguf;
mod header;
mod rotated;
mod weights;

pub(crate) use weights::{NATIVE_TENSORS, group_dtype};

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use marlin_formats::DType;
use marlin_ops::HostTensor;
use serde_json::Value;

use crate::config::read_json;
use crate::error::{ModelError, Result};
use crate::mmap::MappedFile;
use crate::rotation::Rotation;

/// Type, shape and file of a stored tensor.
#[derive(Clone, Copy, Debug)]
pub struct TensorInfo<'a> {
    /// Element type.
    pub dtype: DType,
    /// Dimensions, slowest first.
    pub shape: &'a [usize],
    /// The file that holds it.
    pub file: &'a Path,
    /// Bytes in the file.
    pub bytes: usize,
    /// The dtype's name, or that of the blocks that a GGUF file stores: the dtype is U8 then, the shape counts weights.
    pub encoding: &'static str,
}

/// A stored tensor and whether anything has read it.
#[derive(Debug)]
struct Entry {
    file: Arc<MappedFile>,
    dtype: DType,
    shape: Vec<usize>,
    start: usize,
    len: usize,
    used: AtomicBool,
    /// What a GGUF file says beyond that.
    gguf: Option<gguf::GgufTensor>,
}

impl Entry {
    fn info(&self) -> TensorInfo<'_> {
        TensorInfo {
            dtype: self.dtype,
            shape: &self.shape,
            file: self.file.path(),
            bytes: self.len,
            encoding: self.encoding(),
        }
    }
}

/// The tensors of one model, mapped from `model.safetensors`, from the shards that `model.safetensors.index.json`
/// names, or from a GGUF file, whose tensors get their Hugging Face names. Opening checks every header against its file;
/// nothing is copied.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    tensors: BTreeMap<String, Entry>,
    warnings: Mutex<Vec<String>>,
    /// What is folded into everything that is read as a weight or a vector.
    rotation: Option<Rotation>,
}

impl Checkpoint {
    /// Opens the tensors of a model folder, or of a GGUF file: the one that is named, or the only one of a folder
    /// without safetensors. As in transformers, `model.safetensors` wins over an index.
    ///
    /// # Errors
    /// Neither file present, a shard missing, outside the folder or without a tensor the index promises, a tensor in
    /// two shards, and everything that [`Checkpoint::open_file`] refuses.
    pub fn open(dir: &Path) -> Result<Self> {
        let single = dir.join("model.safetensors");
        let index = dir.join("model.safetensors.index.json");
        let mut checkpoint = Self::empty(dir);
        if let Some(file) = crate::gguf::find(dir)? {
            checkpoint.add_gguf(&file)?;
        } else if single.exists() {
            checkpoint.add_file(&single)?;
        } else if index.exists() {
            checkpoint.add_shards(dir, &index)?;
        } else {
            return Err(ModelError::MissingFile {
                path: single,
                needed_for: "a model folder holds it or model.safetensors.index.json with shards",
            });
        }
        Ok(checkpoint)
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// A file that is missing, truncated, longer than its tensors, or whose header is not valid: a length beyond the
    /// file, a shape that overflows or contradicts its byte range, overlapping ranges or holes, an unknown dtype.
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut checkpoint = Self::empty(path);
        checkpoint.add_file(path)?;
        Ok(checkpoint)
    }

    fn empty(path: &Path) -> Self {
        Self { path: path.to_owned(), tensors: BTreeMap::new(), warnings: Mutex::default(), rotation: None }
    }

    fn add_shards(&mut self, dir: &Path, index: &Path) -> Result<()> {
        let json = read_json(index, "the shards are listed in it")?;
        let Some(Value::Object(weight_map)) = json.get("weight_map") else {
            return Err(ModelError::config(index, "weight_map", "is missing or not an object"));
        };
        let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in weight_map {
            let field = || format!("weight_map.{tensor}");
            let Some(shard) = shard.as_str() else {
                return Err(ModelError::config(index, field(), "is not a file name"));
            };
            let mut parts = Path::new(shard).components();
            let plain = matches!(parts.next(), Some(Component::Normal(_))) && parts.next().is_none();
            if !plain || shard.contains(['/', '\\']) {
                let reason = format!("is `{shard}`, not the name of a file in the folder");
                return Err(ModelError::config(index, field(), reason));
            }
            shards.entry(shard).or_default().push(tensor);
        }
        for (shard, tensors) in shards {
            let path = dir.join(shard);
            if !path.exists() {
                return Err(ModelError::MissingFile { path, needed_for: "model.safetensors.index.json names it" });
            }
            self.add_file(&path)?;
            for tensor in tensors {
                if self.tensors.get(tensor).is_none_or(|e| e.file.path() != path) {
                    return Err(ModelError::MissingTensor { path, tensor: tensor.to_owned() });
                }
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        let file = Arc::new(MappedFile::open(path)?);
        for entry in header::parse(path, (*file).as_ref())? {
            if let Some(other) = self.tensors.get(&entry.name) {
                return Err(ModelError::DuplicateTensor {
                    path: path.to_owned(),
                    tensor: entry.name,
                    other: other.file.path().to_owned(),
                });
            }
            let stored = Entry {
                file: Arc::clone(&file),
                dtype: entry.dtype,
                shape: entry.shape,
                start: entry.start,
                len: entry.len,
                used: AtomicBool::new(false),
                gguf: None,
            };
            self.tensors.insert(entry.name, stored);
        }
        Ok(())
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Type, shape and file of a tensor.
    pub fn get(&self, name: &str) -> Option<TensorInfo<'_>> {
        self.tensors.get(name).map(Entry::info)
    }

    /// Whether a tensor is stored.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Whether any tensor of a module is stored, in whatever format.
    pub fn has_module(&self, module: &str) -> bool {
        self.module_tensors(module).next().is_some()
    }

    /// The tensors of a module, `{module}.*`, by name.
    pub fn module_tensors(&self, module: &str) -> impl Iterator<Item = (&str, TensorInfo<'_>)> {
        let prefix = format!("{module}.");
        let entries = self.tensors.range(prefix.clone()..).take_while(move |(name, _)| name.starts_with(&prefix));
        entries.map(|(name, entry)| (name.as_str(), entry.info()))
    }

    /// Takes what the user should know about the modules read so far: places where published files are ambiguous.
    pub fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.warnings.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn warn(&self, text: String) {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    /// A view of a stored tensor; marks it used. Nothing is copied (but rows that a GGUF file keeps in another order)
    /// and the values are not looked at. Blocks of a GGUF file come as rows of bytes.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], or [`ModelError::Tensor`] for a rank above 4.
    pub fn tensor(&self, name: &str) -> Result<HostTensor> {
        let entry = self.entry(name)?;
        match &entry.gguf {
            Some(tensor) => self.view(name, entry, &tensor.byte_dims(entry), 0),
            None => self.view(name, entry, &entry.shape, 0),
        }
    }

    /// Lets the system drop the pages of a tensor that has been repacked, so that they stop counting as resident.
    /// Views stay valid and are read from the file again when used.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`], or the system's refusal.
    pub fn release(&self, name: &str) -> Result<()> {
        let entry = self.entry(name)?;
        entry.file.release(entry.start, entry.len)
    }

    /// [`Checkpoint::release`] for every tensor whose name starts with `prefix`.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn release_prefix(&self, prefix: &str) -> Result<()> {
        self.tensors
            .range(prefix.to_owned()..)
            .take_while(|(name, _)| name.starts_with(prefix))
            .try_for_each(|(_, entry)| entry.file.release(entry.start, entry.len))
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|e| e.len as u64).sum()
    }

    /// Tensors that nothing has read, with their files.
    pub fn unused(&self) -> impl Iterator<Item = (&str, &Path)> {
        self.tensors
            .iter()
            .filter(|(_, entry)| !entry.used.load(Ordering::Relaxed))
            .map(|(name, entry)| (name.as_str(), entry.file.path()))
    }

    /// Refuses tensors that nothing has read, but for those that `tolerated` accepts.
    ///
    /// # Errors
    /// [`ModelError::ExtraTensor`] for the first by name.
    pub fn check_all_used(&self, tolerated: impl Fn(&str) -> bool) -> Result<()> {
        let mut extra = self.unused().filter(|(name, _)| !tolerated(name));
        match extra.next() {
            None => Ok(()),
            Some((tensor, path)) => Err(ModelError::ExtraTensor {
                path: path.to_owned(),
                tensor: tensor.to_owned(),
                count: 1 + extra.count(),
            }),
        }
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors
            .get(name)
            .ok_or_else(|| ModelError::MissingTensor { path: self.path.clone(), tensor: name.to_owned() })
    }

    /// A view of `dims` elements from `offset` bytes into the tensor; marks it used.
    fn view(&self, name: &str, entry: &Entry, dims: &[usize], offset: usize) -> Result<HostTensor> {
        entry.used.store(true, Ordering::Relaxed);
        if let Some(reordered) = entry.gguf.as_ref().and_then(|tensor| tensor.reordered(entry, dims)) {
            return reordered;
        }
        let bytes = Arc::clone(&entry.file);
        HostTensor::new(entry.dtype, dims, bytes, entry.start + offset)
            .map_err(ModelError::tensor(entry.file.path(), name))
    }
}

impl Entry {
    /// The name of the dtype or block type.
    fn encoding(&self) -> &'static str {
        self.gguf.as_ref().map_or(self.dtype.name(), |tensor| tensor.kind.name())
    }
}

//! The folder in which a job keeps its finished parts, so that it can be taken up again after it
//! was killed.
//!
//! ```text
//! OUT.partial/state.json           what the job is: its fingerprint
//! OUT.partial/part-00003.safetensors
//! OUT.partial/model/               the folder that becomes OUT, while it is assembled
//! OUT.partial/lock                 held while a process works here
//! ```
//!
//! Every file is written under another name, forced to disk and renamed: it is whole or absent.

mod codec;

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::job::{PartStore, SourceError};
use crate::part::Part;

/// Version of the folder's layout and of everything that decides about the values in it.
const VERSION: u32 = 1;

const STATE: &str = "state.json";
const LOCK: &str = "lock";
const MODEL: &str = "model";

/// Why a staging folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StagingError {
    /// The system's refusal: a full disk, missing permission.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Another process works there.
    #[error("{path}: another process is working in this folder", path = path.display())]
    Busy {
        /// The folder.
        path: PathBuf,
    },
    /// A folder with other contents.
    #[error("{path}: holds `{found}`, which is not of an unfinished job", path = path.display())]
    Foreign {
        /// The folder.
        path: PathBuf,
        /// A file in it.
        found: String,
    },
    /// The unfinished work of another job.
    #[error("{path}: holds the unfinished work of another job: {differences}", path = path.display())]
    OtherJob {
        /// The folder.
        path: PathBuf,
        /// What differs.
        differences: String,
    },
    /// A file that cannot be what was written.
    #[error("{path}: damaged: {reason}", path = path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> StagingError {
    let path = path.to_owned();
    |source| StagingError::Io { path, source }
}

type Result<T> = std::result::Result<T, StagingError>;

/// Everything that the result of a job depends on, by name, in words or as a hash.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(BTreeMap<String, String>);

impl Fingerprint {
    /// Adds a fact.
    pub fn add(&mut self, name: &str, value: impl ToString) {
        self.0.insert(name.to_owned(), value.to_string());
    }

    /// 64-bit FNV-1a of `bytes` as hexadecimal digits, for facts too long to spell out.
    pub fn hash(bytes: &[u8]) -> String {
        let hash = bytes
            .iter()
            .fold(0xCBF2_9CE4_8422_2325u64, |hash, &b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01B3));
        format!("{hash:016x}")
    }

    /// What differs from `now`, in words.
    fn differences(&self, now: &Self) -> String {
        let names: std::collections::BTreeSet<&String> = self.0.keys().chain(now.0.keys()).collect();
        let word = |value: Option<&String>| value.map_or_else(|| "not given".to_owned(), |value| format!("`{value}`"));
        let differences = names.into_iter().filter(|&name| self.0.get(name) != now.0.get(name));
        let words: Vec<String> = differences
            .map(|name| format!("{name} was {}, now {}", word(self.0.get(name)), word(now.0.get(name))))
            .collect();
        words.join("; ")
    }

    fn id(&self) -> String {
        let facts: String = self.0.iter().map(|(name, value)| format!("{name}\0{value}\0")).collect();
        Self::hash(facts.as_bytes())
    }
}

/// `state.json`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    version: u32,
    /// Hash of the model folder's `config.json`, once it is about to get its final name.
    assembled: Option<String>,
    job: Fingerprint,
}

/// A file being written.
trait StagedFile: Write {
    /// Forces the contents to the disk.
    fn sync(&mut self) -> io::Result<()>;
}

impl StagedFile for File {
    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

/// Creates a file of the folder; tests put a full disk here.
type CreateFile = Box<dyn Fn(&Path) -> io::Result<Box<dyn StagedFile>> + Send>;

/// The folder of a job's finished parts.
pub struct Staging {
    dir: PathBuf,
    /// Locked as long as it is open; the system lets go when the process dies.
    _lock: File,
    state: State,
    id: String,
    create: CreateFile,
}

impl Staging {
    /// The staging folder of the output folder `out`: `OUT.partial` beside it.
    pub fn dir_of(out: &Path) -> Option<PathBuf> {
        let mut name = out.file_name()?.to_owned();
        name.push(".partial");
        Some(out.with_file_name(name))
    }

    /// Takes up the job in `dir`, or starts one there.
    ///
    /// # Errors
    /// [`StagingError::OtherJob`] when the fingerprint differs, [`StagingError::Busy`],
    /// [`StagingError::Foreign`], [`StagingError::Damaged`], or the system's refusal.
    pub fn open(dir: &Path, fingerprint: &Fingerprint) -> Result<Self> {
        let create = |path: &Path| -> io::Result<Box<dyn StagedFile>> { Ok(Box::new(File::create(path)?)) };
        Self::with_files(dir, fingerprint, Box::new(create))
    }

    fn with_files(dir: &Path, fingerprint: &Fingerprint, create: CreateFile) -> Result<Self> {
        let lock = enter(dir)?;
        let fresh = State { version: VERSION, assembled: None, job: fingerprint.clone() };
        let mut staging = Self { dir: dir.to_owned(), _lock: lock, state: fresh, id: fingerprint.id(), create };
        match read_state(dir)? {
            Some(state) => {
                if state.version != VERSION || state.job != *fingerprint {
                    let differences = match state.version {
                        VERSION => state.job.differences(fingerprint),
                        other => format!("its layout version is {other}, this program's {VERSION}"),
                    };
                    return Err(StagingError::OtherJob { path: dir.to_owned(), differences });
                }
                staging.state = state;
                // What is still here did not get its final name.
                if staging.state.assembled.is_some() && staging.model_dir().exists() {
                    staging.clear_assembled()?;
                }
                staging.remove_unfinished()?;
            }
            None => staging.write_state()?,
        }
        Ok(staging)
    }

    /// Removes the folder of a job with everything in it, if it is there.
    ///
    /// # Errors
    /// As [`Staging::open`], but for the fingerprint and damage.
    pub fn discard(dir: &Path) -> Result<()> {
        match fs::symlink_metadata(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(e) => Err(io_error(dir)(e)),
            Ok(_) => {
                let lock = enter(dir)?;
                remove_all(dir, lock)
            }
        }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the model folder is assembled; not there unless an earlier run was killed at it.
    pub fn model_dir(&self) -> PathBuf {
        self.dir.join(MODEL)
    }

    /// Whether any part is stored.
    pub fn has_parts(&self) -> bool {
        self.contains(0)
    }

    /// Whether `out` is the model folder, which an earlier process gave its final name before it was killed; told by its
    /// `config.json`.
    ///
    /// # Errors
    /// The system's refusal to read that file.
    pub fn is_published(&self, out: &Path) -> Result<bool> {
        let Some(hash) = &self.state.assembled else { return Ok(false) };
        let path = out.join("config.json");
        match fs::read(&path) {
            Ok(bytes) => Ok(Fingerprint::hash(&bytes) == *hash),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
            Err(e) => Err(io_error(&path)(e)),
        }
    }

    /// Notes that the model folder, with this `config.json`, gets its final name next.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn set_assembled(&mut self, config_json: &str) -> Result<()> {
        self.state.assembled = Some(Fingerprint::hash(config_json.as_bytes()));
        self.write_state()
    }

    /// Notes that the model folder did not get its final name.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn clear_assembled(&mut self) -> Result<()> {
        self.state.assembled = None;
        self.write_state()
    }

    /// Removes the folder.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn remove(self) -> Result<()> {
        remove_all(&self.dir, self._lock)
    }

    /// Removes what an interrupted run was writing.
    fn remove_unfinished(&self) -> Result<()> {
        for (path, name) in entries(&self.dir)? {
            if name.ends_with(".tmp") {
                fs::remove_file(&path).map_err(io_error(&path))?;
            }
        }
        let model = self.model_dir();
        match fs::remove_dir_all(&model) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error(&model)(e)),
            _ => Ok(()),
        }
    }

    fn write_state(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.state).map_err(|e| io_error(&self.dir)(e.into()))?;
        self.write_file(STATE, text.as_bytes())
    }

    /// Writes a file so that it is whole or absent.
    fn write_file(&self, name: &str, contents: &[u8]) -> Result<()> {
        let path = self.dir.join(name);
        let unfinished = self.dir.join(format!("{name}.tmp"));
        let write = || -> io::Result<()> {
            let mut file = (self.create)(&unfinished)?;
            file.write_all(contents)?;
            file.sync()?;
            drop(file);
            fs::rename(&unfinished, &path)?;
            if cfg!(unix) {
                File::open(&self.dir)?.sync_all()?;
            }
            Ok(())
        };
        write().map_err(|source| {
            // What could not be written must not fill the disk; the error is what counts.
            let _ = fs::remove_file(&unfinished);
            StagingError::Io { path, source }
        })
    }

    fn part_path(&self, index: usize) -> PathBuf {
        self.dir.join(part_name(index))
    }
}

impl PartStore for Staging {
    fn contains(&self, index: usize) -> bool {
        self.part_path(index).exists()
    }

    fn load(&mut self, index: usize) -> std::result::Result<Part, SourceError> {
        let path = self.part_path(index);
        let bytes = fs::read(&path).map_err(io_error(&path))?;
        let part = codec::decode(&bytes, &self.id, index);
        Ok(part.map_err(|reason| StagingError::Damaged { path, reason })?)
    }

    fn store(&mut self, index: usize, part: &Part) -> std::result::Result<(), SourceError> {
        let bytes = codec::encode(part, &self.id, index)?;
        Ok(self.write_file(&part_name(index), &bytes)?)
    }
}

fn part_name(index: usize) -> String {
    format!("part-{index:05}.safetensors")
}

/// Makes the folder if need be, checks that it holds nothing foreign and locks it.
fn enter(dir: &Path) -> Result<File> {
    match fs::create_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(io_error(dir)(e)),
        _ => {}
    }
    for (_, name) in entries(dir)? {
        let known = [STATE, LOCK, MODEL].contains(&name.as_str())
            || name.ends_with(".tmp")
            || name.starts_with("part-") && name.ends_with(".safetensors");
        if !known {
            return Err(StagingError::Foreign { path: dir.to_owned(), found: name });
        }
    }
    let path = dir.join(LOCK);
    let lock = File::create(&path).map_err(io_error(&path))?;
    match lock.try_lock() {
        Ok(()) => Ok(lock),
        Err(TryLockError::WouldBlock) => Err(StagingError::Busy { path: dir.to_owned() }),
        Err(TryLockError::Error(e)) => Err(io_error(&path)(e)),
    }
}

/// `None` when there is none yet.
fn read_state(dir: &Path) -> Result<Option<State>> {
    let path = dir.join(STATE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let part = entries(dir)?.into_iter().find(|(_, name)| name.starts_with("part-"));
            return match part.filter(|(_, name)| !name.ends_with(".tmp")) {
                None => Ok(None),
                Some(_) => Err(StagingError::Damaged { path, reason: "it is missing, but there are parts".into() }),
            };
        }
        Err(e) => return Err(io_error(&path)(e)),
    };
    serde_json::from_slice(&bytes).map(Some).map_err(|e| StagingError::Damaged { path, reason: e.to_string() })
}

/// Removes the folder, the state last, so that a killed removal can be recognised.
fn remove_all(dir: &Path, lock: File) -> Result<()> {
    for (path, name) in entries(dir)? {
        let removed = match name.as_str() {
            STATE | LOCK => Ok(()),
            MODEL => fs::remove_dir_all(&path),
            _ => fs::remove_file(&path),
        };
        removed.map_err(io_error(&path))?;
    }
    for name in [STATE, LOCK] {
        let path = dir.join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error(&path)(e)),
            _ => {}
        }
    }
    drop(lock);
    fs::remove_dir(dir).map_err(io_error(dir))
}

fn entries(dir: &Path) -> Result<Vec<(PathBuf, String)>> {
    let list = || -> io::Result<Vec<(PathBuf, String)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            found.push((entry.path(), entry.file_name().to_string_lossy().into_owned()));
        }
        found.sort();
        Ok(found)
    };
    list().map_err(io_error(dir))
}

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use marlin_formats::exl3::{Codebook, Exl3Matrix};
use marlin_formats::{Format, Scheme};

use super::*;
use crate::part::{Changed, Notes, QuantizedWeight};
use crate::{ScaleSearch, rtn};

/// A file on a disk with `left` bytes free.
struct LimitedFile {
    file: File,
    left: Arc<AtomicU64>,
}

impl Write for LimitedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let left = self.left.load(Ordering::SeqCst);
        let take = (bytes.len() as u64).min(left);
        if take == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.left.store(left - take, Ordering::SeqCst);
        self.file.write(&bytes[..take as usize])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl StagedFile for LimitedFile {
    fn sync(&mut self) -> io::Result<()> {
        self.file.sync()
    }
}

fn limited(dir: &Path, free: u64) -> Result<Staging> {
    let left = Arc::new(AtomicU64::new(free));
    let create = move |path: &Path| -> io::Result<Box<dyn StagedFile>> {
        Ok(Box::new(LimitedFile { file: File::create(path)?, left: Arc::clone(&left) }))
    };
    Staging::with_files(dir, &job("int3"), Box::new(create))
}

fn job(format: &str) -> Fingerprint {
    let mut job = Fingerprint::default();
    job.add("format", format);
    job.add("bits", 3);
    job
}

fn part() -> Part {
    let weight: Vec<f32> = (0..128 * 128).map(|i| ((i * 37 % 101) as f32 - 50.0) / 64.0).collect();
    let grouped = |format| {
        let scheme = Scheme::with_default_group(format);
        QuantizedWeight::Grouped(rtn(scheme, &weight, 128, 128, ScaleSearch::Range).unwrap())
    };
    let exl3 = QuantizedWeight::Exl3(Exl3Matrix {
        codebook: Codebook::Mcg,
        bits: 2,
        in_features: 100,
        out_features: 120,
        trellis: (0..8 * 8 * 32).map(|i| (i * 12345 % 65536) as u16).collect(),
        suh: vec![0x3C00; 128],
        svh: vec![0xBC00; 128],
    });
    let weights = [grouped(Format::Int4U4), grouped(Format::Nvfp4), exl3, grouped(Format::Int3)];
    Part {
        weights: weights.into_iter().enumerate().map(|(i, weight)| (format!("layers.0.m{i}"), weight)).collect(),
        changed: vec![Changed { tensor: "norm.weight".into(), dims: vec![2, 3], values: vec![0.1; 6] }],
        scales: vec![vec![1.5, -0.0, f32::MIN_POSITIVE], Vec::new()],
        notes: Notes {
            without_rows: vec!["a".into()],
            few_rows: vec![("b".into(), 7)],
            damped: vec![("c".into(), 0.25)],
        },
    }
}

fn names(dir: &Path) -> Vec<String> {
    entries(dir).unwrap().into_iter().map(|(_, name)| name).collect()
}

#[test]
fn parts_come_back_as_they_were() {
    let root = tempfile::tempdir().unwrap();
    let dir = Staging::dir_of(&root.path().join("out")).unwrap();
    assert_eq!(dir, root.path().join("out.partial"));
    let mut staging = Staging::open(&dir, &job("int3")).unwrap();
    assert!(!staging.has_parts());
    staging.store(0, &part()).unwrap();
    staging.store(1, &Part::default()).unwrap();
    drop(staging);
    // What a killed process leaves besides.
    fs::write(dir.join("part-00002.safetensors.tmp"), "half").unwrap();
    fs::create_dir(dir.join("model")).unwrap();
    fs::write(dir.join("model/shard-0.tmp"), "half").unwrap();

    let mut staging = Staging::open(&dir, &job("int3")).unwrap();
    assert_eq!(names(&dir), ["lock", "part-00000.safetensors", "part-00001.safetensors", "state.json"]);
    assert!(staging.has_parts() && staging.contains(1) && !staging.contains(2));
    assert_eq!(staging.load(0).unwrap(), part());
    assert_eq!(staging.load(1).unwrap(), Part::default());
    let out = root.path().join("out");
    assert!(!staging.is_published(&out).unwrap());
    // Killed before and after the model folder was renamed.
    for renamed in [false, true] {
        fs::create_dir(staging.model_dir()).unwrap();
        fs::write(staging.model_dir().join("config.json"), "{}").unwrap();
        staging.set_assembled("{}").unwrap();
        if renamed {
            fs::rename(staging.model_dir(), &out).unwrap();
        }
        for _ in 0..2 {
            drop(staging);
            staging = Staging::open(&dir, &job("int3")).unwrap();
            assert!(!staging.model_dir().exists());
            // Without the rename, a folder that came there otherwise is another.
            fs::create_dir_all(&out).unwrap();
            fs::write(out.join("config.json"), "{}").unwrap();
            assert_eq!(staging.is_published(&out).unwrap(), renamed);
            if !renamed {
                fs::remove_dir_all(&out).unwrap();
            }
        }
    }
    for other in ["", "{\"a\": 1}"] {
        fs::write(out.join("config.json"), other).unwrap();
        assert!(!staging.is_published(&out).unwrap());
    }
    fs::remove_dir_all(&out).unwrap();
    assert!(!staging.is_published(&out).unwrap());
    fs::write(&out, "a file").unwrap();
    assert!(!staging.is_published(&out).unwrap());
    staging.remove().unwrap();
    assert!(!dir.exists());
}

#[test]
fn other_jobs_foreign_folders_and_busy_ones_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("out.partial");
    let mut staging = Staging::open(&dir, &job("int3")).unwrap();
    staging.store(0, &part()).unwrap();
    assert!(matches!(Staging::open(&dir, &job("int3")), Err(StagingError::Busy { .. })));
    assert!(matches!(Staging::discard(&dir), Err(StagingError::Busy { .. })));
    drop(staging);
    let message = Staging::open(&dir, &job("int4")).err().unwrap().to_string();
    assert!(message.contains("out.partial: holds the unfinished work of another job"), "{message}");
    assert!(message.ends_with("format was `int3`, now `int4`"), "{message}");
    assert!(dir.join("part-00000.safetensors").exists());
    Staging::discard(&dir).unwrap();
    Staging::discard(&dir).unwrap();
    assert!(!dir.exists());

    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("thesis.txt"), "").unwrap();
    for error in [Staging::open(&dir, &job("int3")).err(), Staging::discard(&dir).err()] {
        assert!(matches!(error, Some(StagingError::Foreign { found, .. }) if found == "thesis.txt"));
    }
    assert_eq!(names(&dir), ["thesis.txt"]);
}

#[test]
fn damaged_files_are_named() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("out.partial");
    let mut staging = Staging::open(&dir, &job("int3")).unwrap();
    staging.store(0, &part()).unwrap();
    let path = dir.join("part-00000.safetensors");
    let whole = fs::read(&path).unwrap();
    // Every truncation and a wrong part.
    for len in [0, 7, 8, 100, 1000, whole.len() - 1] {
        fs::write(&path, &whole[..len]).unwrap();
        let message = staging.load(0).unwrap_err().to_string();
        assert!(message.contains("part-00000.safetensors: damaged"), "{len}: {message}");
    }
    fs::write(dir.join("part-00001.safetensors"), &whole).unwrap();
    assert!(staging.load(1).unwrap_err().to_string().contains("another job"));
    // Any changed byte of the header is refused or changes nothing but names and numbers it holds.
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for at in 0..8 + header {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        fs::write(&path, &bytes).unwrap();
        if let Ok(found) = staging.load(0) {
            assert!(found != part() || bytes[at].is_ascii_whitespace() || whole[at] == b' ', "byte {at}");
        }
    }
    drop(staging);
    fs::write(dir.join("state.json"), "{").unwrap();
    let message = Staging::open(&dir, &job("int3")).err().unwrap().to_string();
    assert!(message.contains("state.json: damaged"), "{message}");
    fs::remove_file(dir.join("state.json")).unwrap();
    let message = Staging::open(&dir, &job("int3")).err().unwrap().to_string();
    assert!(message.contains("state.json: damaged: it is missing"), "{message}");
}

#[test]
fn a_full_disk_keeps_the_finished_parts() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("out.partial");
    let state = {
        Staging::open(&dir, &job("int3")).unwrap();
        fs::read(dir.join("state.json")).unwrap().len() as u64
    };
    let size = codec::encode(&part(), &job("int3").id(), 0).unwrap().len() as u64;
    for free in [0, 1, size - 1, size, size + 1, 2 * size - 1] {
        Staging::discard(&dir).unwrap();
        let mut staging = limited(&dir, state + free).unwrap();
        let stored = (0..2).take_while(|&index| staging.store(index, &part()).is_ok()).count();
        assert_eq!(stored as u64, free / size);
        let error = staging.store(stored, &part()).unwrap_err().to_string();
        assert!(error.contains(&format!("part-0000{stored}.safetensors")), "{error}");
        drop(staging);
        let mut staging = Staging::open(&dir, &job("int3")).unwrap();
        assert_eq!(staging.has_parts(), stored > 0);
        assert!((0..stored).all(|index| staging.load(index).unwrap() == part()));
        assert!(names(&dir).iter().all(|name| !name.ends_with(".tmp")));
    }
    Staging::discard(&dir).unwrap();
    assert!(matches!(limited(&dir, state - 1).err(), Some(StagingError::Io { .. })));
}

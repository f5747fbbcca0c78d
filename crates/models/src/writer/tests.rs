use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use marlin_formats::{DType, Format, QuantizedMatrix, ScaleKind, Scheme, Shift, StoredGroups};

use super::*;
use crate::{Checkpoint, QuantizationConfig};

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

impl Seek for LimitedFile {
    fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

impl OutputFile for LimitedFile {
    fn sync(&mut self) -> io::Result<()> {
        self.file.sync()
    }
}

fn limited(out: &Path, free: u64, shard_bytes: u64) -> Writer {
    let left = Arc::new(AtomicU64::new(free));
    let open = move |path: &Path| -> io::Result<Box<dyn OutputFile>> {
        Ok(Box::new(LimitedFile { file: File::create_new(path)?, left: Arc::clone(&left) }))
    };
    Writer::with_files(out, Box::new(open), shard_bytes).unwrap()
}

fn entries(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = names.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Six tensors of 4000 bytes, then the folder is finished.
fn write_model(mut writer: Writer) -> Result<WriteSummary> {
    for i in 0..6u8 {
        writer.tensor(&format!("t{i}"), DType::U8, &[40, 100], &[i; 4000])?;
    }
    writer.finish(&json!({"model_type": "llama"}))
}

#[test]
fn a_full_disk_leaves_nothing_wherever_it_strikes() {
    // Needed: 6 x 4000 bytes of data, headers, index and config.
    for free in [0, 1, 3000, 8000, 24_000, 24_200] {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model");
        let error = write_model(limited(&out, free, 9000)).unwrap_err();
        let ModelError::Io { path, source } = &error else {
            panic!("{free}: {error}");
        };
        assert_eq!(source.kind(), io::ErrorKind::StorageFull);
        assert!(path.starts_with(dir.path()) && error.to_string().contains("model.partial-"));
        assert_eq!(entries(dir.path()), [""; 0], "{free} bytes free");
    }
}

#[test]
fn shards_and_index_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let summary = write_model(limited(&out, u64::MAX, 9000)).unwrap();
    assert_eq!((summary.tensors, summary.bytes, summary.shards), (6, 24_000, 3));
    assert_eq!(entries(dir.path()), ["model"]);
    assert_eq!(
        entries(&out),
        [
            "config.json",
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json",
        ]
    );
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_eq!(checkpoint.names().count(), 6);
    for i in 0..6u8 {
        let tensor = checkpoint.tensor(&format!("t{i}")).unwrap();
        assert_eq!(tensor.dims(), [40, 100]);
        assert!(tensor.bytes().iter().all(|&b| b == i));
    }
}

#[test]
fn a_tensor_larger_than_memory_allows_streams() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let mut writer = Writer::create(&out).unwrap();
    writer.tensor("small", DType::F32, &[1], &1.5f32.to_le_bytes()).unwrap();
    // 40 MiB in pieces, past the spool, the last piece odd.
    let len = (40 << 20) + 3;
    writer
        .tensor_with("large", DType::U8, &[len], |sink| {
            let pieces = (0..len).step_by(5_000_000);
            pieces.into_iter().try_for_each(|start| {
                let piece: Vec<u8> = (start..len.min(start + 5_000_000)).map(|i| i as u8).collect();
                sink.write_all(&piece)
            })
        })
        .unwrap();
    writer.tensor("last", DType::F32, &[1], &2.5f32.to_le_bytes()).unwrap();
    writer.finish(&json!({})).unwrap();
    let checkpoint = Checkpoint::open(&out).unwrap();
    assert_eq!(checkpoint.tensor("small").unwrap().to_f32().unwrap(), [1.5]);
    assert_eq!(checkpoint.tensor("last").unwrap().to_f32().unwrap(), [2.5]);
    let large = checkpoint.tensor("large").unwrap();
    assert!(large.bytes().iter().enumerate().all(|(i, &b)| b == i as u8));
}

#[test]
fn an_existing_folder_is_refused_and_untouched() {
    let dir = tempfile::tempdir().unwrap();
    let error = Writer::create(dir.path()).err().unwrap();
    assert!(matches!(&error, ModelError::OutputExists { path } if path == dir.path()));
    // One that appears while writing is refused at the end.
    let out = dir.path().join("model");
    let writer = Writer::create(&out).unwrap();
    fs::create_dir(&out).unwrap();
    assert!(matches!(writer.finish(&json!({})), Err(ModelError::OutputExists { .. })));
    assert_eq!(entries(dir.path()), ["model"]);
}

#[test]
fn a_dropped_or_failed_writer_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("model");
    let mut writer = Writer::create(&out).unwrap();
    writer.tensor("a", DType::U8, &[2], &[1, 2]).unwrap();
    drop(writer);
    assert_eq!(entries(dir.path()), [""; 0]);
    let mut writer = Writer::create(&out).unwrap();
    let error = writer.tensor("a", DType::F32, &[2], &[0; 7]).unwrap_err();
    assert!(error.to_string().contains("`a`: 7 bytes"), "{error}");
    let error = writer.finish(&json!({})).unwrap_err();
    assert!(error.to_string().contains("an earlier write failed"), "{error}");
    assert_eq!(entries(dir.path()), [""; 0]);
    let mut writer = Writer::create(&out).unwrap();
    writer.tensor("a", DType::U8, &[1], &[0]).unwrap();
    assert!(matches!(
        writer.tensor("a", DType::U8, &[1], &[0]),
        Err(ModelError::DuplicateTensor { tensor, .. }) if tensor == "a"
    ));
}

/// A matrix of an imported format: values of their own everywhere.
fn stored(scheme: Scheme, n: usize, k: usize) -> QuantizedMatrix {
    let (format, groups, blocks) = (scheme.format, scheme.groups(k) * n, scheme.super_blocks(k) * n);
    let codes: Vec<u8> = (0..n * k).map(|i| (i % 61 % (1 << format.code_bits())) as u8).collect();
    let count = |stored: bool, count: usize| if stored { count } else { 0 };
    let shifts = count(format.shift() != Shift::None, groups);
    let floats = |count: usize, factor: f32| (0..count).map(|i| (i as f32 + 0.1) * factor).collect::<Vec<_>>();
    let halves = |count: usize, first: u16| (0..count as u16).map(|i| first + i).collect::<Vec<_>>();
    let bytes = |count: usize, first: u8| (0..count as u8).map(|i| first.wrapping_add(5 * i)).collect::<Vec<_>>();
    let (scales, offsets) = (floats(groups, 0.3), floats(shifts, -0.7));
    let (half_scales, half_shifts) = (halves(groups, 0x3000), halves(shifts, 0xB100));
    let (byte_scales, minima) = (bytes(groups, 200), bytes(shifts, 7));
    let super_minima = halves(count(format.has_offsets(), blocks), 0x2500);
    let groups = match format.scale_kind() {
        ScaleKind::F16 => StoredGroups::F16 { scales: &half_scales, shifts: &half_shifts },
        ScaleKind::F32 => StoredGroups::F32 { scales: &scales, offsets: &offsets },
        _ => StoredGroups::TwoLevel {
            super_scales: &halves(blocks, 0x2400),
            super_minima: &super_minima,
            scales: &byte_scales,
            minima: &minima,
        },
    };
    QuantizedMatrix::from_stored(scheme, k, n, &codes, &groups).unwrap()
}

#[test]
fn every_format_reads_back_as_written() {
    // Two-level formats have a second, short super-block.
    let (n, k) = (6, 328);
    let weight: Vec<f32> = (0..n * k).map(|i| ((i * 37 % 101) as f32 - 50.0) / 64.0).collect();
    for format in Format::ALL {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("model");
        let group_size = format.check_group_size(64).map_or(format.default_group_size(), |()| 64);
        let scheme = Scheme::new(format, group_size).unwrap();
        let matrix = match format.can_encode() {
            true => QuantizedMatrix::encode(scheme, &weight, n, k).unwrap(),
            false => stored(scheme, n, k),
        };
        let config = QuantizationConfig::new(scheme, Default::default(), &["lm_head".into()]).unwrap();
        let mut writer = Writer::create(&out).unwrap();
        writer.matrix("m.proj", &matrix, None).unwrap();
        writer.finish(&json!({"quantization_config": config.to_json()})).unwrap();

        let text = fs::read(out.join("config.json")).unwrap();
        let json: Value = serde_json::from_slice(&text).unwrap();
        let config = QuantizationConfig::from_config(&out, &json).unwrap();
        let checkpoint = Checkpoint::open(&out).unwrap();
        let read = checkpoint.weight(&config, "m.proj", n, k, false).unwrap();
        let marlin_ops::WeightData::Quantized(read) = read.data else {
            panic!("{format}: read as dense");
        };
        assert_eq!(read, matrix, "{format}");
        assert_eq!(checkpoint.unused().count(), 0, "{format}");
    }
}

//! Kernels that Metal would refuse, recorded: each must be noticed.

use std::fs;
use std::path::{Path, PathBuf};

use cubecl::prelude::*;

use super::*;

/// Copies through shared memory.
#[cube(launch_unchecked)]
fn copy_shared(values: &mut [f32], #[comptime] slots: usize) {
    let mut shared = Shared::<[f32]>::new_slice(slots);
    shared[UNIT_POS as usize] = values[UNIT_POS as usize];
    sync_cube();
    values[UNIT_POS as usize] = shared[slots - 1 - UNIT_POS as usize];
}

/// Metal has no f64.
#[cube(launch_unchecked)]
fn add_f64(values: &mut [f32]) {
    let value = f64::cast_from(values[UNIT_POS as usize]);
    values[UNIT_POS as usize] = f32::cast_from(value + value);
}

fn record_copies(slots: &[usize]) -> Recording {
    let (gpu, recording) = msl();
    let buffer = gpu.create_f32("test", &[0.0; 32]).unwrap();
    for &slots in slots {
        // SAFETY: 32 units have an element each, of the buffer and of shared memory; nothing is executed.
        unsafe {
            let count = CubeCount::Static(1, 1, 1);
            copy_shared::launch_unchecked::<MslRecorder>(
                gpu.client(),
                count,
                CubeDim::new_1d(32),
                buffer.arg(32),
                slots,
            );
        }
    }
    recording
}

#[test]
fn kernels_are_kept_once_and_large_ones_are_defects() {
    let recording = record_copies(&[64, 64, 8192, 8193]);
    assert_eq!(recording.launches(), 4);
    let bytes: Vec<_> = recording.kernels().iter().map(|kernel| kernel.threadgroup_bytes).collect();
    assert_eq!(bytes, [256, 32_768, 32_772]);
    for (kernel, bytes) in recording.kernels().iter().zip(bytes) {
        assert!(kernel.text.contains(&format!("[{bytes}];")), "{}", kernel.text);
    }
    let faults = recording.faults();
    assert_eq!(faults.len(), 1, "{faults:?}");
    assert!(faults[0].contains("copy_shared") && faults[0].contains("32772 bytes of threadgroup memory"), "{faults:?}");
}

#[test]
fn types_that_metal_lacks_are_faults() {
    let (gpu, recording) = msl();
    let buffer = gpu.create_f32("test", &[0.0; 32]).unwrap();
    // SAFETY: 32 units have an element each; nothing is executed.
    unsafe {
        let count = CubeCount::Static(1, 1, 1);
        add_f64::launch_unchecked::<MslRecorder>(gpu.client(), count, CubeDim::new_1d(32), buffer.arg(32));
    }
    let faults = recording.faults();
    assert!(!faults.is_empty() && faults.iter().all(|fault| fault.contains("add_f64")), "{faults:?}");
}

/// A path that does not exist, for one test.
fn new_folder(test: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("marlin-msl-{test}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    folder
}

#[test]
fn a_folder_is_written_whole_or_not_at_all() {
    let kernels = record_copies(&[64, 128]).kernels();
    let parent = new_folder("whole");
    fs::create_dir(&parent).unwrap();
    let folder = parent.join("msl");
    let paths = write_msl(&folder, &kernels).unwrap();
    assert_eq!(paths.len(), 2);
    for (path, kernel) in paths.iter().zip(&kernels) {
        let text = fs::read_to_string(path).unwrap();
        assert!(text.starts_with("// record::tests::copy_shared: 32x1x1 threads,"), "{text}");
        assert!(text.contains(kernel.text.trim()));
    }

    let refused = |folder: &Path, kernels: &[MslKernel], words: &str| {
        let error = write_msl(folder, kernels).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    refused(&folder, &kernels, "msl: output folder exists already");
    refused(&parent.join("absent/msl"), &kernels, "absent: ");
    refused(Path::new("/absent/.."), &kernels, "/absent/..: ");
    // Two kernels of one name: the second file cannot be new.
    refused(&parent.join("twice"), &[kernels[0].clone(), kernels[0].clone()], "copy_shared");
    let left: Vec<_> = fs::read_dir(&parent).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["msl"]);
    fs::remove_dir_all(&parent).unwrap();
}

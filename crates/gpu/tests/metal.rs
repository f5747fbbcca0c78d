//! Every kernel that the conformance suite launches, as Metal would compile it. What the suite says of the results does
//! not matter here: the recorder runs nothing.

use std::path::Path;
use std::process::Command;

use marlin_conformance::{VerifyOptions, verify};
use marlin_gpu::record::{msl, write_msl};

#[test]
fn every_kernel_is_metal() {
    let (recorder, recording) = msl();
    verify(&recorder, &VerifyOptions::default());
    let kernels = recording.kernels();
    println!("{} launches, {} kernels", recording.launches(), kernels.len());
    assert!(!kernels.is_empty());

    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("msl");
    if folder.exists() {
        std::fs::remove_dir_all(&folder).unwrap();
    }
    let files = write_msl(&folder, &kernels).unwrap();
    assert_eq!(files.len(), kernels.len());

    let mut faults: Vec<_> =
        recording.errors().iter().map(|error| format!("{}: {}", error.name, error.reason)).collect();
    for kernel in &kernels {
        faults.extend(kernel.defects().iter().map(|defect| format!("{}: {defect}", kernel.file_stem())));
    }
    assert!(faults.is_empty(), "{} faults\n{}", faults.len(), faults.join("\n"));

    let check = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tools/metal/check.sh");
    let status = Command::new(check).arg(&folder).status().unwrap();
    assert!(status.success(), "clang refuses kernels in {}", folder.display());
}

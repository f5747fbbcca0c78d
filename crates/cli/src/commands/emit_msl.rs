//! `marlin kernels --emit msl`: the kernels of the conformance suite in the Metal Shading Language.

use std::path::Path;

use anyhow::{Result, bail};
use marlin_conformance::{Family, VerifyOptions, verify};
use marlin_gpu::record::{expect_new, msl, write_msl};

use super::progress_bar;

/// Runs the suite on a device that records Metal kernels, and writes each distinct one as a file into the new folder.
pub fn emit(dir: &Path) -> Result<()> {
    expect_new(dir)?;
    let (recorder, recording) = msl();
    let progress = progress_bar(Family::ALL.len() as u64, "families");
    for family in Family::ALL {
        // Nothing is executed, so the results mean nothing.
        verify(&recorder, &VerifyOptions { families: Some(vec![family]), ..VerifyOptions::default() });
        progress.inc(1);
    }
    progress.finish_and_clear();
    let faults = recording.faults();
    if !faults.is_empty() {
        bail!("Metal would refuse {} kernels: {}", faults.len(), faults.join("; "));
    }
    let files = write_msl(dir, &recording.kernels())?;
    print_line!("{}: {} kernels", dir.display(), files.len());
    Ok(())
}

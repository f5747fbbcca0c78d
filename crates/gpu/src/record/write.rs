//! Recorded kernels as files.

use std::io;
use std::path::{Path, PathBuf};

use super::MslKernel;

/// Writes one file `NAME.HASH.metal` for each kernel into a folder, which is made if need be; returns their paths.
///
/// # Errors
/// What the file system says.
pub fn write_msl(folder: &Path, kernels: &[MslKernel]) -> io::Result<Vec<PathBuf>> {
    std::fs::create_dir_all(folder)?;
    kernels
        .iter()
        .map(|kernel| {
            let path = folder.join(kernel.file_stem() + ".metal");
            std::fs::write(&path, with_heading(kernel))?;
            Ok(path)
        })
        .collect()
}

/// The text under a few lines that say what it is.
fn with_heading(kernel: &MslKernel) -> String {
    let [x, y, z] = kernel.cube_dim;
    format!(
        "// {}: {x}x{y}x{z} threads, {} bytes of threadgroup memory\n// {}\n{}\n",
        kernel.name,
        kernel.threadgroup_bytes,
        kernel.configuration,
        kernel.text.trim_matches('\n'),
    )
}

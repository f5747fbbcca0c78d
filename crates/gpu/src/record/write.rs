//! Recorded kernels as files.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use super::MslKernel;

/// Why kernels were not written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The output folder exists.
    #[error("{}: output folder exists already; choose another or remove it", path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
    /// A path such as `..`.
    #[error("{}: not a name for a new folder", path.display())]
    NoName {
        /// The path.
        path: PathBuf,
    },
    /// What the file system says.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl WriteError {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

/// Writes one file `NAME.HASH.metal` for each kernel into a new folder; returns their paths. The folder appears when it
/// is complete, and after an error nothing of it stays.
///
/// # Errors
/// [`WriteError`], which names the path.
pub fn write_msl(folder: &Path, kernels: &[MslKernel]) -> Result<Vec<PathBuf>, WriteError> {
    expect_new(folder)?;
    let mut partial_name = folder.file_name().unwrap_or_default().to_owned();
    partial_name.push(format!(".partial-{}", std::process::id()));
    let partial = folder.with_file_name(partial_name);
    fs::create_dir(&partial).map_err(WriteError::io(folder))?;
    let written = write_files(&partial, kernels).and_then(|names| {
        expect_new(folder)?;
        fs::rename(&partial, folder).map_err(WriteError::io(folder))?;
        Ok(names.into_iter().map(|name| folder.join(name)).collect())
    });
    if written.is_err() {
        // The first error counts; what stays behind is named `.partial-`.
        let _ = fs::remove_dir_all(&partial);
    }
    written
}

/// Whether [`write_msl`] may make this folder: it must not exist, but the folder that holds it must.
///
/// # Errors
/// [`WriteError`], which names the path.
pub fn expect_new(folder: &Path) -> Result<(), WriteError> {
    if folder.file_name().is_none() {
        return Err(WriteError::NoName { path: folder.to_owned() });
    }
    match fs::symlink_metadata(folder) {
        Ok(_) => Err(WriteError::Exists { path: folder.to_owned() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = folder.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
            fs::metadata(parent).map(drop).map_err(WriteError::io(parent))
        }
        Err(error) => Err(WriteError::io(folder)(error)),
    }
}

fn write_files(folder: &Path, kernels: &[MslKernel]) -> Result<Vec<String>, WriteError> {
    let write = |kernel: &MslKernel| {
        let name = kernel.file_stem() + ".metal";
        let path = folder.join(&name);
        // New, so that two kernels of one name are an error.
        let file = File::create_new(&path);
        file.and_then(|mut file| file.write_all(with_heading(kernel).as_bytes())).map_err(WriteError::io(&path))?;
        Ok(name)
    };
    kernels.iter().map(write).collect()
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

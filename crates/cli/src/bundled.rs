//! The model that is used when none is named.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};

/// Folder of the bundled 3-bit story model inside the repository.
const BUNDLED: &str = "models/marlin-stories-exl3";

/// `given`, or the bundled model: beside the executable, above the working directory, or in the workspace that this
/// binary was built from.
///
/// # Errors
/// A `given` path that is neither a folder nor a GGUF file; no bundled model.
pub fn model_dir(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = given {
        match dir.is_dir() {
            true => return Ok(dir.to_path_buf()),
            false if is_gguf(dir) => return Ok(dir.to_path_buf()),
            false if dir.exists() => bail!("{}: not a folder; a model is a folder or a .gguf file", dir.display()),
            false => bail!("{}: no such folder or file", dir.display()),
        }
    }
    candidates()
        .find(|dir| dir.join("config.json").is_file())
        .ok_or_else(|| anyhow!("the bundled model ({BUNDLED}) was not found; name a model folder with --model DIR"))
}

/// A file with the name of a GGUF model; what it holds is seen when it is opened.
fn is_gguf(path: &Path) -> bool {
    path.is_file() && path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf"))
}

fn candidates() -> impl Iterator<Item = PathBuf> {
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let executable = std::env::current_exe().ok();
    let working = std::env::current_dir().ok();
    std::iter::once(built_from.canonicalize().unwrap_or(built_from))
        .chain(
            [executable, working]
                .into_iter()
                .flatten()
                .flat_map(|path| path.ancestors().map(Path::to_path_buf).collect::<Vec<_>>()),
        )
        .map(|root| root.join(BUNDLED))
}

//! The model that is used when none is named.

use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};

/// Folder of the bundled 4-bit story model inside the repository.
const BUNDLED: &str = "models/marlin-stories-int4";

/// `given`, or the bundled model: beside the executable, above the working directory, or in the workspace that this
/// binary was built from.
///
/// # Errors
/// A `given` path that is not a folder; no bundled model.
pub fn model_dir(given: Option<&Path>) -> Result<PathBuf> {
    if let Some(dir) = given {
        match dir.is_dir() {
            true => return Ok(dir.to_path_buf()),
            false if dir.exists() => bail!("{}: not a folder; a model is a folder", dir.display()),
            false => bail!("{}: no such folder", dir.display()),
        }
    }
    candidates()
        .find(|dir| dir.join("config.json").is_file())
        .ok_or_else(|| anyhow!("the bundled model ({BUNDLED}) was not found; name a model folder with --model DIR"))
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

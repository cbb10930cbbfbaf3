//! Files that are whole or not there: written under a temporary name, synced, renamed.

use crate::{Error, Result};
use std::fs::File;
use std::path::Path;

/// Writes `bytes` to `path` atomically.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |part| std::fs::write(part, bytes))
}

/// Lets `fill` write a file under a temporary name, then makes it visible under `path` in one step.
pub(crate) fn write_with(path: &Path, fill: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".part");
    let part = path.with_file_name(name);
    let result = (|| {
        // what writes the file may choose other permissions than the user's umask does (safetensors takes 0600)
        let permissions = File::create(&part)?.metadata()?.permissions();
        fill(&part)?;
        std::fs::set_permissions(&part, permissions)?;
        File::open(&part)?.sync_all()?;
        std::fs::rename(&part, path)?;
        path.parent().map_or(Ok(()), |directory| File::open(directory)?.sync_all())
    })();
    result.map_err(|e| {
        // a half-written file must not stay behind to fill the disk
        let _ = std::fs::remove_file(&part);
        Error::io(path, e)
    })
}

/// Pretty JSON, atomically.
pub(crate) fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| Error::io(path, e.into()))?;
    text.push(b'\n');
    write(path, &text)
}

/// Parses a JSON file.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_slice(&text).map_err(|e| Error::RunDirectory { path: path.to_path_buf(), message: format!("not what a run writes there: {e}") })
}

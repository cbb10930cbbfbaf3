//! The data directory: prune jobs, the models they made, and which model is current. It is the truth; memory is a copy.
//!
//! ```text
//! current.json            which model is served
//! jobs.lock               held by the server that runs the jobs
//! jobs/<id>/job.json      what was asked for, and how far it is
//! jobs/<id>/calibration.txt   a corpus that came with the request
//! jobs/<id>/log.txt       what the job printed on stderr
//! jobs/<id>/run/          the run, and at its end the checkpoint
//! ```

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// A place on disk that can be written, or couldn't when it was asked.
#[derive(Debug, Clone)]
pub struct DataDir {
    root: PathBuf,
}

/// The disk said no; the text says where and what can be done.
#[derive(Debug, thiserror::Error)]
#[error("{} can't be {what}: {source}{}", path.display(), hint(source))]
pub struct StorageError {
    path: PathBuf,
    what: &'static str,
    source: io::Error,
}

/// Why this process does not run the jobs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LockError {
    /// Another one does.
    #[error("another server runs the jobs of {0}: ask that one")]
    Taken(String),
    /// The disk said no.
    #[error("{0}")]
    Storage(String),
}

impl StorageError {
    fn new(path: &Path, what: &'static str, source: io::Error) -> Self {
        Self { path: path.to_path_buf(), what, source }
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; free some space, or choose another place with --data-dir",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => "; make it writable for this user, or choose another place with --data-dir",
        _ => "",
    }
}

impl DataDir {
    /// A directory that need not exist yet.
    pub fn new(root: &Path) -> Self {
        Self { root: std::path::absolute(root).unwrap_or_else(|_| root.to_path_buf()) }
    }

    /// All jobs.
    pub fn jobs(&self) -> PathBuf {
        self.root.join("jobs")
    }

    /// One job's directory.
    pub fn job(&self, id: &str) -> PathBuf {
        self.jobs().join(id)
    }

    /// One job's run: at its end, its checkpoint.
    pub fn run(&self, id: &str) -> PathBuf {
        self.job(id).join("run")
    }

    /// Takes the right to run this directory's jobs, which one process can have. It is kept as long as the file is open.
    ///
    /// # Errors
    /// See [`LockError`].
    pub fn lock(&self) -> Result<File, LockError> {
        let path = self.root.join("jobs.lock");
        let failed = |source| LockError::Storage(StorageError::new(&path, "written", source).to_string());
        fs::create_dir_all(&self.root).map_err(failed)?;
        let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => Ok(file),
            Err(fs::TryLockError::WouldBlock) => Err(LockError::Taken(self.root.display().to_string())),
            Err(fs::TryLockError::Error(source)) => Err(failed(source)),
        }
    }

    /// Which model is current.
    pub fn current(&self) -> PathBuf {
        self.root.join("current.json")
    }
}

/// Writes a file whole or not at all: beside its place, to the disk, then renamed.
///
/// # Errors
/// What the disk says, with a hint.
pub fn write(path: &Path, contents: &[u8]) -> Result<(), StorageError> {
    let failed = |source| StorageError::new(path, "written", source);
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).map_err(failed)?;
    let part = path.with_extension("part");
    let written = File::create(&part).and_then(|mut file| {
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&part, path)
    });
    if written.is_err() {
        // half a file is of no use; the first error is the one to report
        let _ = fs::remove_file(&part);
    }
    written.map_err(failed)?;
    // the rename itself must survive a power cut; not every file system lets a directory be synced
    let _ = File::open(directory).and_then(|d| d.sync_all());
    Ok(())
}

/// [`write()`], as JSON.
///
/// # Errors
/// What the disk says, with a hint.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<(), StorageError> {
    let json = serde_json::to_vec_pretty(value).map_err(|e| StorageError::new(path, "written", e.into()))?;
    write(path, &json)
}

/// Reads JSON; `None` if there is no such file.
///
/// # Errors
/// It can't be read, or is something else.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StorageError> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StorageError::new(path, "read", error)),
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| StorageError::new(path, "read", e.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn what_was_written_can_be_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b/c.json");
        assert!(read_json::<Value>(&path).unwrap().is_none());
        write_json(&path, &json!({"x": 1})).unwrap();
        write_json(&path, &json!({"x": 2})).unwrap();
        assert_eq!(read_json::<Value>(&path).unwrap().unwrap()["x"], 2);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "no temporary file is left");
        fs::write(&path, "{").unwrap();
        assert!(read_json::<Value>(&path).is_err());
    }

    #[test]
    fn one_process_runs_the_jobs() {
        let directory = tempfile::tempdir().unwrap();
        let data = DataDir::new(&directory.path().join("new"));
        let lock = data.lock().unwrap();
        assert!(matches!(data.lock(), Err(LockError::Taken(_))));
        drop(lock);
        assert!(data.lock().is_ok());
    }

    #[test]
    fn a_place_that_is_no_directory_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let error = write(&file.join("x.json"), b"{}").unwrap_err().to_string();
        assert!(error.contains("x.json can't be written"), "{error}");
    }
}

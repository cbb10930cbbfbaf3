//! Files that are whole or not there: written under a temporary name, synced, renamed.
//!
//! Several processes may share a directory, and write the same file at once: each has a temporary file of its own, `NAME.PROCESS-TIME.part`, locked as
//! long as it is written. One that nobody holds is what a kill left behind; it goes when `NAME` is written again.

use crate::{Error, Result};
use std::fs::{DirEntry, File};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How old a temporary file without a lock must be to be taken for left behind: its writer takes the lock right after making it.
const TO_LOCK: Duration = Duration::from_secs(5);

/// Writes `bytes` to `path` atomically.
///
/// # Errors
/// [`Error::Io`] for a full disk or a directory that isn't there or can't be written.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |part| std::fs::write(part, bytes))
}

/// Lets `fill` write a file under a temporary name, then makes it visible under `path` in one step.
pub(crate) fn write_with(path: &Path, fill: impl FnOnce(&Path) -> std::io::Result<()>) -> Result<()> {
    remove_leftovers(path);
    let part = temporary(path);
    let made = File::create_new(&part).map_err(|e| Error::io(path, e))?;
    let result = (|| {
        // (where a file system has no locks, nothing is taken for left behind)
        let _ = made.try_lock();
        // what writes the file may choose other permissions than the user's umask does (safetensors takes 0600)
        let permissions = made.metadata()?.permissions();
        fill(&part)?;
        std::fs::set_permissions(&part, permissions)?;
        // what writes the file may put another in its place (safetensors does)
        let filled = File::open(&part)?;
        let _ = filled.try_lock();
        filled.sync_all()?;
        std::fs::rename(&part, path)?;
        File::open(directory(path))?.sync_all()
    })();
    result.map_err(|e| {
        // a half-written file must not stay behind to fill the disk
        let _ = std::fs::remove_file(&part);
        Error::io(path, e)
    })
}

/// Where a file is; of a bare name, here.
fn directory(path: &Path) -> &Path {
    path.parent().filter(|d| !d.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A name beside `path` that no other process has, nor another file of this one.
fn temporary(path: &Path) -> PathBuf {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{}-{time:x}.part", std::process::id()));
    path.with_file_name(name)
}

/// Whether `name` is one that [`temporary`] gave to `file`.
fn is_temporary(name: &str, file: &str) -> bool {
    let own = name.strip_prefix(file).and_then(|rest| rest.strip_prefix('.')).and_then(|rest| rest.strip_suffix(".part"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
    own.and_then(|own| own.split_once('-')).is_some_and(|(process, time)| is_number(process) && is_number(time))
}

/// Removes temporary files of `path` whose writers are dead. What can't be removed is left to the next one who writes it.
fn remove_leftovers(path: &Path) {
    let Some(file) = path.file_name().and_then(|name| name.to_str()) else { return };
    let Ok(entries) = std::fs::read_dir(directory(path)) else { return };
    let is_leftover = |entry: &DirEntry| entry.file_name().to_str().is_some_and(|name| is_temporary(name, file)) && is_abandoned(&entry.path());
    for entry in entries.flatten().filter(is_leftover) {
        let _ = std::fs::remove_file(entry.path());
    }
}

/// Whether nobody writes a temporary file any more: the lock goes with the process that held it, wherever that ran.
fn is_abandoned(part: &Path) -> bool {
    let Ok(file) = File::options().write(true).open(part) else { return false };
    let age = file.metadata().and_then(|m| m.modified()).ok().and_then(|time| time.elapsed().ok());
    age.is_some_and(|age| age > TO_LOCK) && file.try_lock().is_ok()
}

/// Pretty JSON, atomically.
///
/// # Errors
/// As [`write`].
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(|e| Error::io(path, e.into()))?;
    text.push(b'\n');
    write(path, &text)
}

/// Parses a JSON file.
///
/// # Errors
/// [`Error::Io`] for a file that can't be read, [`Error::RunDirectory`] for one that holds something else.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    serde_json::from_slice(&text).map_err(|e| Error::RunDirectory { path: path.to_path_buf(), message: format!("not what a run writes there: {e}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = std::fs::read_dir(directory).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_a_dead_writer_left_goes_and_what_a_living_one_writes_stays() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let an_hour_ago = SystemTime::now() - Duration::from_secs(3600);
        let made = |name: &str, old: bool| {
            let file = File::create_new(at(name)).unwrap();
            if old {
                file.set_modified(an_hour_ago).unwrap();
            }
            file
        };
        drop(made("a.json.1-1f.part", true));
        drop(made("a.json.2-1f.part", false));
        let living = made("a.json.3-1f.part", true);
        living.try_lock().unwrap();
        // of another file, and not ours
        drop(made("b.json.1-1f.part", true));
        drop(made("a.json.part", true));
        write(&at("a.json"), b"whole").unwrap();
        let left = ["a.json", "a.json.2-1f.part", "a.json.3-1f.part", "a.json.part", "b.json.1-1f.part"];
        assert_eq!(names(directory.path()), left);
        drop(living);
        write(&at("a.json"), b"whole").unwrap();
        assert!(!at("a.json.3-1f.part").exists());
        assert_eq!(std::fs::read(at("a.json")).unwrap(), b"whole");
    }

    #[test]
    fn two_who_write_the_same_file_at_once_do_not_meet() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        write_with(&path, |outer| {
            std::fs::write(outer, "out")?;
            write_with(&path, |inner| std::fs::write(inner, "inner")).map_err(std::io::Error::other)?;
            assert_eq!(std::fs::read_to_string(&path)?, "inner");
            std::fs::write(outer, "outer")
        })
        .unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "outer");
        assert_eq!(names(directory.path()), ["file"]);
        // a failure leaves nothing behind
        let failed = write_with(&path, |part| std::fs::write(part, "half").and(Err(std::io::Error::other("no more"))));
        assert!(failed.is_err());
        assert_eq!(names(directory.path()), ["file"]);
    }
}

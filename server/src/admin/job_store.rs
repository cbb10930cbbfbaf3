//! All jobs: every change is on disk before anyone hears of it.

use crate::admin::job::{Job, State};
use crate::data_dir::{self, DataDir, StorageError};
use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;

/// The jobs of one data directory.
#[derive(Debug)]
pub struct JobStore {
    data: DataDir,
    jobs: Mutex<Jobs>,
    /// A job was added, or the runner is to end.
    wake_runner: Condvar,
}

#[derive(Debug, Default)]
struct Jobs {
    entries: BTreeMap<String, Entry>,
    stopping: bool,
}

impl Jobs {
    fn put(&mut self, job: Job) {
        if let Some(entry) = self.entries.get_mut(&job.id) {
            if entry.job != job {
                entry.job = job.clone();
                entry.changes.send_replace(job);
            }
        } else {
            self.entries.insert(job.id.clone(), Entry::new(job));
        }
    }
}

/// A job and those who watch it.
#[derive(Debug)]
struct Entry {
    job: Job,
    changes: watch::Sender<Job>,
}

impl Entry {
    fn new(job: Job) -> Self {
        Self { changes: watch::Sender::new(job.clone()), job }
    }
}

impl JobStore {
    /// Reads the jobs of a data directory. Jobs that can't be read are left alone, with a warning.
    pub fn open(data: DataDir) -> Self {
        let store = Self { data, jobs: Mutex::default(), wake_runner: Condvar::new() };
        store.refresh();
        store
    }

    /// Reads them again: another process may have changed them.
    pub fn refresh(&self) {
        let mut jobs = self.lock();
        for directory in std::fs::read_dir(self.data.jobs()).into_iter().flatten().flatten() {
            match data_dir::read_json::<Job>(&directory.path().join("job.json")) {
                Ok(Some(job)) => jobs.put(job),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "a job is left out"),
            }
        }
    }

    /// For the process that runs the jobs from now on: takes up again what was interrupted.
    pub fn recover(&self) {
        self.refresh();
        for entry in self.lock().entries.values_mut() {
            entry.job.recover();
            entry.changes.send_replace(entry.job.clone());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where they are kept.
    pub fn data(&self) -> &DataDir {
        &self.data
    }

    /// All jobs, oldest first.
    pub fn list(&self) -> Vec<Job> {
        self.lock().entries.values().map(|e| e.job.clone()).collect()
    }

    /// One job.
    pub fn get(&self, id: &str) -> Option<Job> {
        self.lock().entries.get(id).map(|e| e.job.clone())
    }

    /// One job, and everything that happens to it.
    pub fn watch(&self, id: &str) -> Option<watch::Receiver<Job>> {
        self.lock().entries.get(id).map(|e| e.changes.subscribe())
    }

    /// Adds a job, unless there is one with the same idempotency key: then that one is returned, and `false`.
    ///
    /// # Errors
    /// It can't be written; then it was not added.
    pub fn add(&self, job: Job) -> Result<(Job, bool), StorageError> {
        let mut jobs = self.lock();
        let same = |entry: &&Entry| job.idempotency_key.is_some() && entry.job.idempotency_key == job.idempotency_key;
        if let Some(entry) = jobs.entries.values().find(same) {
            return Ok((entry.job.clone(), false));
        }
        self.save(&job)?;
        jobs.entries.insert(job.id.clone(), Entry::new(job.clone()));
        self.wake_runner.notify_all();
        Ok((job, true))
    }

    /// Changes a job on disk and then in memory.
    ///
    /// # Errors
    /// It can't be written. Memory has the change all the same: what happened has happened.
    pub fn update(&self, id: &str, change: impl FnOnce(&mut Job)) -> Result<(), StorageError> {
        let mut jobs = self.lock();
        let Some(entry) = jobs.entries.get_mut(id) else { return Ok(()) };
        change(&mut entry.job);
        let saved = self.save(&entry.job);
        entry.changes.send_replace(entry.job.clone());
        saved
    }

    /// Notes what a job says about itself. Not worth the disk: a restarted job says it again.
    pub fn progress(&self, id: &str, progress: serde_json::Value) {
        if let Some(entry) = self.lock().entries.get_mut(id) {
            entry.job.progress = Some(progress);
            entry.changes.send_replace(entry.job.clone());
        }
    }

    /// Cancels a job that waits. False if it doesn't wait (any more).
    ///
    /// # Errors
    /// It can't be written.
    pub fn cancel_queued(&self, id: &str) -> Result<bool, StorageError> {
        let mut jobs = self.lock();
        let Some(entry) = jobs.entries.get_mut(id).filter(|e| e.job.state == State::Queued) else { return Ok(false) };
        entry.job.end(State::Cancelled, None);
        entry.changes.send_replace(entry.job.clone());
        self.save(&entry.job)?;
        Ok(true)
    }

    /// For the runner: waits for the oldest job that waits, and marks it as running. `None` when the server stops.
    pub fn next(&self) -> Option<Job> {
        let mut jobs = self.lock();
        loop {
            if jobs.stopping {
                return None;
            }
            if let Some(entry) = jobs.entries.values_mut().find(|e| e.job.state == State::Queued) {
                entry.job.start();
                if let Err(error) = self.save(&entry.job) {
                    entry.job.end(State::Failed, Some(error.to_string()));
                    entry.changes.send_replace(entry.job.clone());
                    continue;
                }
                entry.changes.send_replace(entry.job.clone());
                return Some(entry.job.clone());
            }
            jobs = self.wake_runner.wait(jobs).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends the runner.
    pub fn stop(&self) {
        self.lock().stopping = true;
        self.wake_runner.notify_all();
    }

    /// The server is ending.
    pub fn is_stopping(&self) -> bool {
        self.lock().stopping
    }

    fn save(&self, job: &Job) -> Result<(), StorageError> {
        data_dir::write_json(&self.data.job(&job.id).join("job.json"), job)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::job::{PruneRequest, new_id};

    fn job(key: Option<&str>) -> Job {
        let request = PruneRequest { model: "base".into(), options: serde_json::Map::new(), calibration: None, calibration_sha256: None, activate: false };
        Job::new(new_id(), request, key.map(str::to_string))
    }

    #[test]
    fn a_restart_finds_every_job_and_takes_up_what_ran() {
        let directory = tempfile::tempdir().unwrap();
        let data = DataDir::new(directory.path());
        let store = JobStore::open(data.clone());
        let (first, _) = store.add(job(None)).unwrap();
        let (second, _) = store.add(job(None)).unwrap();
        let running = store.next().unwrap();
        store.update(&running.id, |job| job.end(State::Done, None)).unwrap();
        let interrupted = store.next().unwrap();
        drop(store);
        std::fs::create_dir_all(data.job("broken")).unwrap();
        std::fs::write(data.job("broken").join("job.json"), "{").unwrap();

        let store = JobStore::open(data);
        assert_eq!(store.list().len(), 2);
        assert_eq!(store.get(&interrupted.id).unwrap().state, State::Running, "it may run in another process");
        store.recover();
        assert_eq!(store.get(&running.id).unwrap().state, State::Done);
        assert_eq!(store.get(&interrupted.id).unwrap().state, State::Queued);
        assert_eq!(store.next().unwrap().attempts, 2);
        assert!([first.id, second.id].contains(&running.id));
    }

    #[test]
    fn an_idempotency_key_makes_one_job() {
        let directory = tempfile::tempdir().unwrap();
        let store = JobStore::open(DataDir::new(directory.path()));
        let (first, new) = store.add(job(Some("k"))).unwrap();
        let (again, newer) = store.add(job(Some("k"))).unwrap();
        assert!(new && !newer && first.id == again.id);
        assert!(store.add(job(None)).unwrap().1 && store.add(job(None)).unwrap().1);
    }

    #[test]
    fn what_waits_can_be_cancelled_and_then_does_not_run() {
        let directory = tempfile::tempdir().unwrap();
        let store = JobStore::open(DataDir::new(directory.path()));
        let (one, _) = store.add(job(None)).unwrap();
        assert!(store.cancel_queued(&one.id).unwrap());
        assert!(!store.cancel_queued(&one.id).unwrap());
        store.stop();
        assert!(store.next().is_none());
    }

    #[test]
    fn a_job_that_can_not_be_written_is_not_added() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        std::fs::write(&file, "").unwrap();
        let store = JobStore::open(DataDir::new(&file));
        assert!(store.add(job(None)).is_err());
        assert!(store.list().is_empty());
    }
}

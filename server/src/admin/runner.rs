//! The thread that runs jobs, one at a time, each in a process of its own.

use crate::admin::child::{JobProcess, log_tail};
use crate::admin::job::{Job, State};
use crate::admin::job_store::JobStore;
use crate::data_dir::{LockError, StorageError};
use serde_json::Value;
use std::fs::File;
use std::io::BufRead;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a job gets to save its state when it is cancelled, or the server stops.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often to ask for the right to run jobs while another process has it.
const RETRY: Duration = Duration::from_millis(500);

/// What the runner needs of the rest of the server.
pub trait Surroundings: Send + Sync + 'static {
    /// The options of `evop prune` that name a model.
    ///
    /// # Errors
    /// There is no such model.
    fn model_arguments(&self, model: &str) -> Result<Vec<String>, String>;

    /// Those that say where to compute.
    fn device_arguments(&self) -> Vec<String>;

    /// Puts a job's model into service.
    ///
    /// # Errors
    /// Why it can't be.
    fn activate(&self, id: &str) -> Result<(), String>;
}

/// Runs jobs and ends them.
#[derive(Debug)]
pub struct Runner {
    store: Arc<JobStore>,
    /// The running job, if there is one. A job that has begun gets here with its process, or when it is cancelled before it has one.
    current: Mutex<Option<Current>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// The right to run this data directory's jobs, or why this process doesn't have it.
    right: Mutex<Result<File, LockError>>,
}

#[derive(Debug, Clone)]
struct Current {
    id: String,
    process: Option<Arc<JobProcess>>,
    cancelled: bool,
}

/// How a job's process ended.
enum Ending {
    Done,
    Failed(String),
    Cancelled,
    Interrupted,
}

impl Runner {
    /// A runner for these jobs; nothing runs until [`Self::start`].
    pub fn new(store: Arc<JobStore>) -> Self {
        let right = store.data().lock();
        match &right {
            Ok(_) => store.recover(),
            Err(error) => tracing::warn!(%error, "prune jobs don't run here"),
        }
        Self { store, current: Mutex::new(None), thread: Mutex::new(None), right: Mutex::new(right) }
    }

    /// Whether this process runs the jobs.
    ///
    /// # Errors
    /// Why it doesn't.
    pub fn may_run(&self) -> Result<(), LockError> {
        self.right.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(|_| ()).map_err(Clone::clone)
    }

    /// Waits for the right to run jobs: the server that has it may end. False when this one ends before.
    fn wait_for_right(&self) -> bool {
        while self.may_run().is_err() {
            if self.store.is_stopping() {
                return false;
            }
            std::thread::sleep(RETRY);
            let right = self.store.data().lock();
            if right.is_ok() {
                tracing::info!("this server runs the prune jobs now");
                self.store.recover();
            }
            *self.right.lock().unwrap_or_else(PoisonError::into_inner) = right;
        }
        true
    }

    /// Starts the thread. It ends when the store is stopped.
    ///
    /// # Errors
    /// There can't be a thread.
    pub fn start(self: &Arc<Self>, surroundings: Arc<impl Surroundings>) -> std::io::Result<()> {
        let runner = Arc::clone(self);
        let thread = std::thread::Builder::new().name("evop-jobs".into()).spawn(move || {
            while let Some(job) = runner.next() {
                runner.run(&job, surroundings.as_ref());
            }
        })?;
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    fn next(&self) -> Option<Job> {
        if self.wait_for_right() { self.store.next() } else { None }
    }

    /// Cancels a job, whether it waits or runs. A running one gets a moment to save its state; this waits for that.
    ///
    /// # Errors
    /// The disk.
    pub fn cancel(&self, id: &str) -> Result<(), StorageError> {
        if self.store.cancel_queued(id)? {
            return Ok(());
        }
        if let Some(process) = self.cancel_begun(id) {
            process.end_within(PATIENCE);
        }
        Ok(())
    }

    /// Notes that a job that has begun is cancelled, and returns its process if it has one.
    fn cancel_begun(&self, id: &str) -> Option<Arc<JobProcess>> {
        let mut current = self.current();
        if let Some(current) = current.as_mut().filter(|c| c.id == id) {
            current.cancelled = true;
            return current.process.clone();
        }
        if current.is_none() && self.store.get(id).is_some_and(|job| job.state == State::Running) {
            *current = Some(Current { id: id.into(), process: None, cancelled: true });
        }
        None
    }

    fn current(&self) -> MutexGuard<'_, Option<Current>> {
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The server stops: the running job is interrupted, and goes on with the next server. Waits until that is on disk, unless the thread
    /// is loading a model, which nobody needs any more.
    pub fn stop(&self) {
        self.store.stop();
        let process = self.current().as_ref().and_then(|c| c.process.clone());
        if let Some(process) = process {
            process.end_within(PATIENCE);
        }
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let deadline = Instant::now() + PATIENCE;
        while thread.as_ref().is_some_and(|thread| !thread.is_finished()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn run(&self, job: &Job, surroundings: &impl Surroundings) {
        let id = job.id.as_str();
        tracing::info!(job = id, attempt = job.attempts, "prune job starts");
        let ending = self.process(job, surroundings).unwrap_or_else(Ending::Failed);
        let (state, error) = match ending {
            Ending::Done => (State::Done, None),
            Ending::Failed(message) => (State::Failed, Some(message)),
            Ending::Cancelled => (State::Cancelled, None),
            Ending::Interrupted => (State::Interrupted, None),
        };
        tracing::info!(job = id, ?state, error, "prune job ended");
        // the model is in service before its job is called done, so that who waits for the job finds it so
        let activation_error = (state == State::Done && job.request.activate).then(|| surroundings.activate(id).err()).flatten();
        if let Some(error) = &activation_error {
            tracing::error!(job = id, error, "the job's model can't be put into service");
        }
        let saved = self.store.update(id, |job| {
            job.end(state, error);
            job.activation_error = activation_error;
            if !state.is_final() {
                job.finished = None;
            }
        });
        if let Err(error) = saved {
            tracing::error!(job = id, %error, "the job's end is not on disk");
        }
        // (it may have been cancelled when its process had ended)
        *self.current() = None;
    }

    fn process(&self, job: &Job, surroundings: &impl Surroundings) -> Result<Ending, String> {
        let data = self.store.data();
        let (run, log) = (data.run(&job.id), data.job(&job.id).join("log.txt"));
        if is_checkpoint(&run) {
            return Ok(Ending::Done);
        }
        let arguments = arguments(job, &run, surroundings)?;
        let (process, output) = JobProcess::spawn(&arguments, &log).map_err(|e| format!("the job's process can't be started: {e}"))?;
        let process = Arc::new(process);
        let cancelled = self.has_process(&job.id, &process);
        if cancelled || self.store.is_stopping() {
            // `cancel` or `stop` came before there was a process to end
            process.kill();
        }
        let mut said = None;
        for line in output.lines().map_while(Result::ok) {
            said = self.read(&job.id, &line).or(said);
        }
        let status = process.wait().map_err(|e| format!("the job's process is lost: {e}"))?;
        let cancelled = self.current().take().is_some_and(|c| c.cancelled);
        Ok(if status.success() && is_checkpoint(&run) {
            Ending::Done
        } else if cancelled {
            Ending::Cancelled
        } else if self.store.is_stopping() {
            Ending::Interrupted
        } else {
            let tail = log_tail(&log);
            Ending::Failed(said.unwrap_or(if tail.is_empty() {
                format!("evop prune ended with {status}")
            } else {
                format!("evop prune ended with {status}: {tail}")
            }))
        })
    }

    /// Notes the running job's process. True if the job was cancelled before it had one.
    fn has_process(&self, id: &str, process: &Arc<JobProcess>) -> bool {
        let mut current = self.current();
        let cancelled = current.take().is_some_and(|c| c.id == id && c.cancelled);
        *current = Some(Current { id: id.into(), process: Some(Arc::clone(process)), cancelled });
        cancelled
    }

    /// A line of the process's stdout; returns an error that it reports.
    fn read(&self, id: &str, line: &str) -> Option<String> {
        let event: Value = serde_json::from_str(line).ok()?;
        match event.get("event").and_then(Value::as_str)? {
            "progress" => {
                self.store.progress(id, event);
                None
            }
            "error" => event.get("message").and_then(Value::as_str).map(str::to_string),
            _ => None,
        }
    }
}

/// A run goes on if it had begun; else it begins.
fn arguments(job: &Job, run: &Path, surroundings: &impl Surroundings) -> Result<Vec<String>, String> {
    let mut arguments: Vec<String> = vec!["prune".into(), "--progress".into(), "json".into()];
    arguments.extend(surroundings.device_arguments());
    if run.join("run.json").exists() {
        arguments.extend(["--resume".into(), run.display().to_string()]);
        return Ok(arguments);
    }
    if run.exists() {
        // begun, but not so far that it could go on
        std::fs::remove_dir_all(run).map_err(|e| format!("{} can't be removed: {e}", run.display()))?;
    }
    arguments.extend(["--out".into(), run.display().to_string()]);
    arguments.extend(surroundings.model_arguments(&job.request.model)?);
    if let Some(path) = &job.request.calibration {
        arguments.extend(["--calibration".into(), path.display().to_string()]);
    }
    arguments.extend(crate::admin::prune_options::as_arguments(&job.request.options));
    Ok(arguments)
}

/// `evop.json` is a run's last word.
pub fn is_checkpoint(run: &Path) -> bool {
    run.join("evop.json").exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::job::{PruneRequest, new_id};
    use crate::data_dir::DataDir;

    /// Cancels the job that asks for its model: it has begun, and has no process yet.
    struct CancelsWhatBegins(Arc<Runner>);

    impl Surroundings for CancelsWhatBegins {
        fn model_arguments(&self, _: &str) -> Result<Vec<String>, String> {
            let job = self.0.store.list().into_iter().find(|job| job.state == State::Running).ok_or("nothing runs")?;
            self.0.cancel(&job.id).map_err(|e| e.to_string())?;
            Ok(Vec::new())
        }

        fn device_arguments(&self) -> Vec<String> {
            Vec::new()
        }

        fn activate(&self, _: &str) -> Result<(), String> {
            Ok(())
        }
    }

    #[test]
    fn a_job_that_is_cancelled_before_it_has_a_process_is_cancelled() {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(JobStore::open(DataDir::new(directory.path())));
        let runner = Arc::new(Runner::new(Arc::clone(&store)));
        let request = PruneRequest { model: "base".into(), options: serde_json::Map::new(), calibration: None, calibration_sha256: None, activate: false };
        let (job, _) = store.add(Job::new(new_id(), request, None)).unwrap();
        let begun = runner.next().unwrap();
        assert_eq!(begun.id, job.id);
        // (the process is this test's own program, which fails over the options of `evop prune`)
        runner.run(&begun, &CancelsWhatBegins(Arc::clone(&runner)));
        assert_eq!(store.get(&job.id).unwrap().state, State::Cancelled);
        // what is cancelled after its end leaves nothing for the next job
        runner.cancel(&job.id).unwrap();
        assert!(runner.current().is_none());
    }
}

//! One prune job, as it stands in `job.json` and as the API shows it.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// How often a job is taken up again before it is given up: something in it may be what takes the server down.
pub const MAX_ATTEMPTS: u32 = 5;

/// A prune job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Job {
    /// Its id, also that of the model that it makes.
    pub id: String,
    /// Where it is.
    pub state: State,
    /// What was asked for.
    pub request: PruneRequest,
    /// The `Idempotency-Key` that it came with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
    /// Seconds since 1970.
    pub created: u64,
    /// When it was last started.
    pub started: Option<u64>,
    /// When it ended.
    pub finished: Option<u64>,
    /// How often it was started or taken up again.
    #[serde(default)]
    pub attempts: u32,
    /// Why it failed.
    pub error: Option<String>,
    /// It made a model, and that could not be put into service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activation_error: Option<String>,
    /// What it last said about itself.
    #[serde(default)]
    pub progress: Option<Value>,
}

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Waits for its turn.
    Queued,
    /// Runs in a process of its own.
    Running,
    /// Its model can be activated.
    Done,
    /// See `error`.
    Failed,
    /// By a client; its files are kept.
    Cancelled,
    /// The server stopped under it; it goes on when a server starts on this data directory.
    Interrupted,
}

impl State {
    /// Nothing more will happen by itself.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

/// What `POST /admin/v1/prune` asks for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PruneRequest {
    /// `base`, or the job that made the model to prune further.
    pub model: String,
    /// Options of `evop prune`, by their long names.
    #[serde(default)]
    pub options: Map<String, Value>,
    /// What to calibrate on, if not on the bundled text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration: Option<PathBuf>,
    /// The SHA-256, in hexadecimal, of a text that came with the request; `calibration` is where it was put.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub calibration_sha256: Option<String>,
    /// Put the model into service when it is done.
    #[serde(default)]
    pub activate: bool,
}

impl Job {
    /// A job that waits.
    pub fn new(id: String, request: PruneRequest, idempotency_key: Option<String>) -> Self {
        Self {
            id,
            state: State::Queued,
            request,
            idempotency_key,
            created: now(),
            started: None,
            finished: None,
            attempts: 0,
            error: None,
            activation_error: None,
            progress: None,
        }
    }

    /// Its (or its next) beginning.
    pub fn start(&mut self) {
        self.state = State::Running;
        self.started = Some(now());
        self.attempts += 1;
    }

    /// Its end.
    pub fn end(&mut self, state: State, error: Option<String>) {
        (self.state, self.error, self.finished) = (state, error, Some(now()));
    }

    /// After a restart: what ran, or was left, is taken up again; what was taken up too often has failed.
    pub fn recover(&mut self) {
        if matches!(self.state, State::Running | State::Interrupted) {
            if self.attempts >= MAX_ATTEMPTS {
                self.end(State::Failed, Some(format!("given up: the server stopped under it {MAX_ATTEMPTS} times")));
            } else {
                self.state = State::Queued;
            }
        }
    }
}

/// A new id, sortable by age.
pub fn new_id() -> String {
    let milliseconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_millis());
    let random = uuid::Uuid::new_v4().simple().to_string();
    format!("prune-{milliseconds}-{}", &random[..6])
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(state: State, attempts: u32) -> Job {
        let request = PruneRequest { model: "base".into(), options: Map::new(), calibration: None, calibration_sha256: None, activate: false };
        Job { state, attempts, ..Job::new(new_id(), request, None) }
    }

    #[test]
    fn what_ran_is_taken_up_again_but_not_for_ever() {
        for (state, attempts, after) in [
            (State::Running, 1, State::Queued),
            (State::Interrupted, 4, State::Queued),
            (State::Running, MAX_ATTEMPTS, State::Failed),
            (State::Done, 1, State::Done),
            (State::Cancelled, 0, State::Cancelled),
        ] {
            let mut job = job(state, attempts);
            job.recover();
            assert_eq!(job.state, after, "{state:?} after {attempts}");
        }
    }

    #[test]
    fn a_job_survives_being_written_and_read() {
        let before = job(State::Queued, 0);
        let text = serde_json::to_string(&before).unwrap();
        assert_eq!(serde_json::from_str::<Job>(&text).unwrap(), before);
    }

    #[test]
    fn a_job_of_an_earlier_version_is_read() {
        let text = r#"{"id": "prune-1-a", "state": "done", "request": {"model": "base", "calibration": "/data/jobs/prune-1-a/calibration.txt"},
            "created": 1, "started": 2, "finished": 3, "error": null}"#;
        let job: Job = serde_json::from_str(text).unwrap();
        assert_eq!((job.state, job.request.calibration_sha256, job.request.calibration.is_some()), (State::Done, None, true));
    }
}

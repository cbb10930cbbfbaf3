//! Fetching checkpoints from the Hugging Face hub into its usual cache, with a progress bar.

use anyhow::{Context, Result, anyhow};
use hf_hub::HFError;
use hf_hub::progress::{DownloadEvent, FileStatus, ProgressEvent, ProgressHandler};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// Files that make a checkpoint; the same weights in other formats stay where they are.
const WANTED: [&str; 5] = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"];
/// Subdirectories hold other formats (onnx, original, gguf), consolidated files the same weights again.
const UNWANTED: [&str; 2] = ["*/*", "consolidated*"];

/// The local directory of `owner/name` at `revision`, downloaded if it isn't there. Honours `HF_HOME`, `HF_HUB_CACHE`,
/// `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE`. Blocks.
///
/// # Errors
/// One that says whether the network, the name or the permission is at fault, and what to do.
pub fn download(owner: &str, name: &str, revision: Option<&str>) -> Result<PathBuf> {
    let id = format!("{owner}/{name}");
    let client = hf_hub::HFClientSync::new().context("the Hugging Face client can't be started")?;
    let repository = client.model(owner, name);
    let snapshot = |cached_only: bool| {
        let bar = Bar::new(&id);
        let asked = repository.snapshot_download().maybe_revision(revision).local_files_only(cached_only);
        let patterns = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
        asked.allow_patterns(patterns(&WANTED)).ignore_patterns(patterns(&UNWANTED)).progress(bar).send()
    };
    if offline() {
        return snapshot(true).map_err(|_| {
            anyhow!("{id} is not in the local cache, and HF_HUB_OFFLINE forbids to fetch it: download it where there is a network (or unset HF_HUB_OFFLINE)")
        });
    }
    tracing::info!(model = %id, revision = revision.unwrap_or("main"), "looking for the model on the hub");
    match snapshot(false) {
        Ok(directory) => Ok(directory),
        Err(error) if is_network(&error) => match snapshot(true) {
            Ok(directory) => {
                tracing::warn!(model = %id, "the hub can't be reached: using the copy in the cache");
                Ok(directory)
            }
            Err(_) => Err(explain(&id, revision, error)),
        },
        Err(error) => Err(explain(&id, revision, error)),
    }
}

fn offline() -> bool {
    std::env::var("HF_HUB_OFFLINE").is_ok_and(|v| !matches!(v.to_ascii_lowercase().as_str(), "" | "0" | "false" | "no" | "off"))
}

fn is_network(error: &HFError) -> bool {
    match error {
        HFError::Request { .. } => true,
        HFError::Http { context } => context.status.is_server_error() || context.status.as_u16() == 407,
        _ => false,
    }
}

fn explain(id: &str, revision: Option<&str>, error: HFError) -> anyhow::Error {
    let what = match &error {
        error if is_network(error) => {
            format!(
                "{id} is no directory here, and the Hugging Face hub can't be reached to fetch it: check the network (HF_ENDPOINT names a mirror), or give the path of a downloaded checkpoint"
            )
        }
        HFError::AuthRequired { .. } | HFError::Forbidden { .. } => {
            format!("{id} needs permission: accept its terms on its page of the hub and put a token into HF_TOKEN")
        }
        // the hub's answer doesn't always tell the two apart
        HFError::RepoNotFound { .. } | HFError::RevisionNotFound { .. } => {
            let revision = revision.map_or_else(String::new, |revision| format!(", or it has no revision {revision}"));
            format!("the hub has no model {id}{revision} (if it is private: put a token into HF_TOKEN)")
        }
        HFError::RateLimited { .. } => format!("the hub limits the rate of requests while fetching {id}: try again later, or put a token into HF_TOKEN"),
        HFError::Io(_) => format!("{id} can't be written to the cache (HF_HOME says where it is)"),
        _ => format!("{id} can't be fetched from the hub"),
    };
    anyhow::Error::new(error).context(what)
}

/// One bar over all files of a download. Invisible when stderr is no terminal.
struct Bar {
    bar: ProgressBar,
    /// Bytes of each file that have arrived.
    files: Mutex<HashMap<String, u64>>,
}

impl Bar {
    fn new(id: &str) -> Self {
        let bar = ProgressBar::no_length().with_message(id.to_string());
        if let Ok(style) = ProgressStyle::with_template("{msg} [{bar:40}] {bytes}/{total_bytes} {bytes_per_sec} {eta}") {
            bar.set_style(style);
        }
        Self { bar, files: Mutex::default() }
    }
}

impl ProgressHandler for Bar {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        match event {
            // the first is about all files, and one about each follows
            DownloadEvent::Start { total_files, total_bytes } if *total_bytes > 0 && self.bar.length().is_none() => {
                tracing::info!(files = total_files, bytes = total_bytes, "downloading");
                self.bar.set_length(*total_bytes);
            }
            DownloadEvent::Progress { files } => {
                let mut seen = self.files.lock().unwrap_or_else(PoisonError::into_inner);
                for file in files {
                    let bytes = if file.status == FileStatus::Complete { file.total_bytes.max(file.bytes_completed) } else { file.bytes_completed };
                    seen.insert(file.filename.clone(), bytes);
                }
                self.bar.set_position(seen.values().sum());
            }
            DownloadEvent::AggregateProgress { bytes_completed, .. } => self.bar.set_position(self.bar.position().max(*bytes_completed)),
            DownloadEvent::Start { .. } | DownloadEvent::Complete => {}
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

//! The models that can be served: the one that the server was started with (`base`), and what finished jobs have made.

use crate::admin::job_store::JobStore;
use crate::admin::runner::is_checkpoint;
use crate::data_dir::{self, StorageError};
use crate::load::Identity;
use crate::models::ModelSource;
use crate::openai::models::pattern;
use anyhow::Context;
use evop_model::Checkpoint;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The start model's id.
pub const BASE: &str = "base";

/// Finds models by id.
#[derive(Debug)]
pub struct Registry {
    source: ModelSource,
    revision: Option<String>,
    store: Arc<JobStore>,
    /// What was read of each checkpoint; they never change.
    summaries: Mutex<HashMap<String, Value>>,
}

/// `current.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Current {
    /// The id.
    model: String,
    /// The start model that it belongs to.
    base: String,
}

impl Registry {
    /// The models of a data directory, beside the start model.
    pub fn new(source: ModelSource, revision: Option<String>, store: Arc<JobStore>) -> Self {
        Self { source, revision, store, summaries: Mutex::default() }
    }

    /// What the start model is called where it needs a name that stays.
    fn base(&self) -> String {
        match (&self.source, &self.revision) {
            (ModelSource::Local(path), _) => path.canonicalize().unwrap_or_else(|_| path.clone()).display().to_string(),
            (source, Some(revision)) => format!("{}@{revision}", source.name()),
            (source, None) => source.name(),
        }
    }

    /// Whether there is a model by that id.
    pub fn exists(&self, id: &str) -> bool {
        id == BASE || (self.store.get(id).is_some() && is_checkpoint(&self.store.data().run(id)))
    }

    /// The options of `evop prune` that name a model; none for the bundled one.
    ///
    /// # Errors
    /// There is no such model.
    pub fn arguments(&self, id: &str) -> Result<Vec<String>, String> {
        if id != BASE {
            return if self.exists(id) {
                Ok(vec!["--model".into(), self.store.data().run(id).display().to_string()])
            } else {
                Err(format!("there is no model {id:?}"))
            };
        }
        let mut arguments = match &self.source {
            ModelSource::Bundled => Vec::new(),
            ModelSource::Local(_) => vec!["--model".into(), self.base()],
            ModelSource::Hub { .. } | ModelSource::Random(_) => vec!["--model".into(), self.source.name()],
        };
        if let (ModelSource::Hub { .. }, Some(revision)) = (&self.source, &self.revision) {
            arguments.extend(["--revision".into(), revision.clone()]);
        }
        Ok(arguments)
    }

    /// Opens a model's checkpoint. Blocks.
    ///
    /// # Errors
    /// It can't be opened.
    pub fn open(&self, id: &str) -> anyhow::Result<(Checkpoint, Identity)> {
        if id == BASE {
            let checkpoint = self.source.open(self.revision.as_deref())?;
            self.summarise(id, &checkpoint);
            return Ok((checkpoint, Identity { id: id.into(), root: self.base(), parent: None }));
        }
        let run = self.store.data().run(id);
        let checkpoint = Checkpoint::open(&run).with_context(|| format!("the model of job {id}"))?;
        self.summarise(id, &checkpoint);
        let parent = self.store.get(id).map(|job| job.request.model);
        Ok((checkpoint, Identity { id: id.into(), root: run.display().to_string(), parent }))
    }

    /// The model to begin with: the one that was current when the last server of this data directory ended, if it still belongs to the
    /// model that this one was started with.
    pub fn initial(&self) -> String {
        let current = match data_dir::read_json::<Current>(&self.store.data().current()) {
            Ok(Some(current)) => current,
            Ok(None) => return BASE.into(),
            Err(error) => {
                tracing::warn!(%error, "which model was current is not known: serving the base model");
                return BASE.into();
            }
        };
        if current.base != self.base() {
            tracing::info!(was = current.base, now = self.base(), "another base model: serving it, not what was current before");
            BASE.into()
        } else if self.exists(&current.model) {
            current.model
        } else {
            tracing::warn!(model = current.model, "the model that was current is gone: serving the base model");
            BASE.into()
        }
    }

    /// Notes which model is current.
    ///
    /// # Errors
    /// The disk.
    pub fn set_current(&self, id: &str) -> Result<(), StorageError> {
        data_dir::write_json(&self.store.data().current(), &Current { model: id.into(), base: self.base() })
    }

    /// All models, `base` first; `active` is the id of the one that is served. Blocks: checkpoints are opened once to be described.
    pub fn list(&self, active: Option<&str>) -> Vec<Value> {
        let jobs = self.store.list().into_iter().map(|job| job.id).filter(|id| self.exists(id));
        std::iter::once(BASE.to_string()).chain(jobs).map(|id| self.describe(&id, active)).collect()
    }

    fn describe(&self, id: &str, active: Option<&str>) -> Value {
        let known = || self.summaries.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned();
        let mut error = None;
        // the base may have to be fetched, which only its activation should do
        if known().is_none() && (id != BASE || !matches!(self.source, ModelSource::Hub { .. })) {
            error = self.open(id).err().map(|e| format!("{e:#}"));
        }
        let job = self.store.get(id);
        json!({
            "id": id, "active": active == Some(id), "root": if id == BASE { self.base() } else { self.store.data().run(id).display().to_string() },
            "parent": job.as_ref().map(|job| &job.request.model), "created": job.as_ref().and_then(|job| job.finished),
            "checkpoint": known(), "error": error,
        })
    }

    fn summarise(&self, id: &str, checkpoint: &Checkpoint) {
        let config = checkpoint.config();
        let provenance: Option<Value> = std::fs::read(checkpoint.path().join("evop.json")).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let summary = json!({
            "parameters": config.parameters(), "block_parameters": config.block_parameters(), "max_position_embeddings": config.max_position_embeddings,
            "pattern": pattern(config), "provenance": provenance,
        });
        self.summaries.lock().unwrap_or_else(PoisonError::into_inner).insert(id.into(), summary);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data_dir::DataDir;

    fn registry(data: &std::path::Path, source: ModelSource) -> Registry {
        Registry::new(source, None, Arc::new(JobStore::open(DataDir::new(data))))
    }

    #[test]
    fn the_base_is_the_beginning_unless_something_of_it_was_current() {
        let directory = tempfile::tempdir().unwrap();
        let bundled = registry(directory.path(), ModelSource::Bundled);
        assert_eq!(bundled.initial(), BASE);
        bundled.set_current("prune-gone").unwrap();
        assert_eq!(bundled.initial(), BASE);
        bundled.set_current(BASE).unwrap();
        assert_eq!(bundled.initial(), BASE);
        std::fs::write(directory.path().join("current.json"), "{").unwrap();
        assert_eq!(bundled.initial(), BASE);
    }

    #[test]
    fn a_prune_command_names_every_model_but_the_bundled_one() {
        let directory = tempfile::tempdir().unwrap();
        assert!(registry(directory.path(), ModelSource::Bundled).arguments(BASE).unwrap().is_empty());
        let local = registry(directory.path(), ModelSource::Local(directory.path().into()));
        assert_eq!(local.arguments(BASE).unwrap()[0], "--model");
        assert!(local.arguments("prune-none").is_err());
    }

    #[test]
    fn the_bundled_model_can_be_described() {
        let directory = tempfile::tempdir().unwrap();
        let models = registry(directory.path(), ModelSource::Bundled).list(Some(BASE));
        assert_eq!(models.len(), 1);
        assert_eq!(models[0]["active"], true);
        assert_eq!(models[0]["checkpoint"]["pattern"].as_array().unwrap().len(), 12);
    }
}

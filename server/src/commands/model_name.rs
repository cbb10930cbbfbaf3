//! Which checkpoint a command is about, where nothing is computed.

use crate::models::ModelSource;
use anyhow::Result;
use clap::Args;
use evop_model::Checkpoint;

/// A checkpoint, by place or by name.
#[derive(Debug, Clone, Args)]
pub struct ModelName {
    /// A checkpoint directory, a .gguf file, or a hub id (org/name); without it the small bundled model.
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    place: Option<String>,
    /// The same.
    #[arg(long, value_name = "MODEL")]
    model: Option<String>,
    /// Branch, tag or commit of a hub id.
    #[arg(long, env = "EVOP_REVISION", value_name = "REVISION")]
    revision: Option<String>,
}

impl ModelName {
    /// The checkpoint, opened, its weights not loaded; and what it is called.
    pub fn open(&self) -> Result<(Checkpoint, String)> {
        let environment = std::env::var("EVOP_MODEL").ok();
        let source = ModelSource::parse(self.place.as_deref().or(self.model.as_deref()).or(environment.as_deref()))?;
        Ok((source.open(self.revision.as_deref())?, source.name()))
    }
}

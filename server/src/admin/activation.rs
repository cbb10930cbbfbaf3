//! The hot swap: load beside what is served, note it on disk, switch admission; what is replaced ends with its last request.

use crate::admin::registry::Registry;
use crate::app::App;
use crate::load::{self, MemoryNeed};
use crate::openai::errors::ApiError;
use std::sync::PoisonError;
use std::time::Instant;

/// Why a model was not put into service. What was served before still is.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// There is no such model.
    #[error("there is no model {0:?}; GET /admin/v1/models lists those that there are")]
    NotFound(String),
    /// Both models don't fit into memory at once.
    #[error("loading the model beside the current one needs {} MiB, of which {} MiB are free", needed >> 20, available >> 20)]
    NoRoom {
        /// Weights and key/value cache.
        needed: usize,
        /// Free.
        available: usize,
    },
    /// Something is wrong with the checkpoint, or the disk.
    #[error("{0}")]
    Failed(String),
}

impl From<ActivationError> for ApiError {
    fn from(error: ActivationError) -> Self {
        match error {
            ActivationError::NotFound(_) => Self::not_found(error.to_string()),
            ActivationError::NoRoom { .. } => Self::conflict(error.to_string()),
            ActivationError::Failed(_) => Self::internal(error.to_string()),
        }
    }
}

/// Puts a model into service. Requests never notice: they finish on the model that they were admitted to. Blocks while it loads; one
/// activation at a time.
///
/// # Errors
/// See [`ActivationError`].
pub fn activate(app: &App, id: &str) -> Result<(), ActivationError> {
    let registry: &Registry = app.admin.registry();
    let _one_at_a_time = app.admin.activating().lock().unwrap_or_else(PoisonError::into_inner);
    app.admin.jobs();
    if !registry.exists(id) {
        return Err(ActivationError::NotFound(id.into()));
    }
    let start = Instant::now();
    let failed = |error: anyhow::Error| ActivationError::Failed(format!("{error:#}"));
    let (checkpoint, identity) = registry.open(id).map_err(failed)?;
    let need = load::memory_need(&checkpoint, &app.config).map_err(failed)?;
    if let MemoryNeed { needed_bytes: needed, available_bytes: Some(available) } = need
        && !need.fits()
    {
        return Err(ActivationError::NoRoom { needed, available });
    }
    let served = load::load(&checkpoint, identity, &app.config).map_err(failed)?;
    registry.set_current(id).map_err(|e| ActivationError::Failed(e.to_string()))?;
    app.slot.swap(served);
    app.metrics.swapped();
    tracing::info!(model = id, seconds = start.elapsed().as_secs_f32(), "now serving");
    Ok(())
}

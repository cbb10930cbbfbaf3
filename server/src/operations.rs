//! What operators and probes ask: health, readiness, version, metrics. None of it needs a key.

use crate::app::App;
use crate::openai::errors::{ApiError, NotReady};
use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use std::sync::Arc;
use utoipa::ToSchema;

/// All is well.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// `ok`.
    status: &'static str,
}

const OK: Health = Health { status: "ok" };

/// Which version runs.
#[derive(Debug, Serialize, ToSchema)]
pub struct Version {
    /// As in `evop --version`.
    version: &'static str,
}

/// A model is loaded, its engine moves, and requests are taken.
#[utoipa::path(get, path = "/ready", operation_id = "ready", tag = "Operations", responses((status = 200, description = "It is ready.", body = Health), NotReady))]
pub async fn ready(State(app): State<Arc<App>>) -> Result<Json<Health>, ApiError> {
    match app.unready() {
        None => Ok(Json(OK)),
        Some(why) => Err(ApiError::unavailable(why)),
    }
}

/// The same as `/ready`.
#[utoipa::path(get, path = "/health", operation_id = "health", tag = "Operations", responses((status = 200, description = "It is ready.", body = Health), NotReady))]
pub async fn health(app: State<Arc<App>>) -> Result<Json<Health>, ApiError> {
    ready(app).await
}

/// The process works. It doesn't if its engine is gone: only a restart brings that back.
#[utoipa::path(get, path = "/live", operation_id = "live", tag = "Operations", responses((status = 200, description = "It works.", body = Health), NotReady))]
pub async fn live(State(app): State<Arc<App>>) -> Result<Json<Health>, ApiError> {
    match app.slot.alive() {
        Some(false) if !app.shutdown.is_draining() => Err(ApiError::unavailable("the engine has stopped")),
        _ => Ok(Json(OK)),
    }
}

/// Which version runs.
#[utoipa::path(get, path = "/version", operation_id = "version", tag = "Operations", responses((status = 200, description = "The version.", body = Version)))]
pub async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

/// Counts and times, in Prometheus' text format.
#[utoipa::path(
    get,
    path = "/metrics",
    operation_id = "metrics",
    tag = "Operations",
    responses((status = 200, description = "The metrics.", body = String, content_type = "text/plain"))
)]
pub async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let text = app.metrics.render(&app.slot, app.unready().is_none()).map_err(|e| ApiError::internal(format!("the metrics can't be written: {e}")))?;
    Ok(([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response())
}

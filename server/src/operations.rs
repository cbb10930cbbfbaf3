//! What operators and probes ask: health, readiness, version, metrics. None of it needs a key.

use crate::app::App;
use crate::openai::errors::ApiError;
use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::sync::Arc;

/// `GET /health`, `/ready`: a model is loaded, its engine moves, and requests are taken.
pub async fn ready(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    match app.unready() {
        None => Ok(Json(json!({"status": "ok"}))),
        Some(why) => Err(ApiError::unavailable(why)),
    }
}

/// `GET /live`: the process works. It doesn't if its engine is gone: only a restart brings that back.
pub async fn live(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    match app.slot.alive() {
        Some(false) if !app.shutdown.is_draining() => Err(ApiError::unavailable("the engine has stopped")),
        _ => Ok(Json(json!({"status": "ok"}))),
    }
}

/// `GET /version`.
pub async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// `GET /metrics`, in Prometheus' text format.
pub async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let text = app.metrics.render(&app.slot, app.unready().is_none()).map_err(|e| ApiError::internal(format!("the metrics can't be written: {e}")))?;
    Ok(([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response())
}

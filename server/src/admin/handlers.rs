//! The admin API's endpoints.

use crate::admin::activation::{self, ActivationError};
use crate::admin::job::{Job, PruneRequest, State as JobState, new_id};
use crate::admin::prune_options;
use crate::admin::registry::BASE;
use crate::app::App;
use crate::data_dir::{self, LockError, StorageError};
use crate::openai::JsonBody;
use crate::openai::errors::ApiError;
use crate::openai::fields::Fields;
use crate::served::Served;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

/// How often to look at the job of another server while someone watches it.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// Work that waits for the disk, or for a model to load.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|e| ApiError::internal(format!("the work ended early: {e}")))
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn storage(error: StorageError) -> ApiError {
    ApiError::storage(error.to_string())
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn not_here(error: LockError) -> ApiError {
    match error {
        LockError::Taken(_) => ApiError::conflict(error.to_string()),
        LockError::Storage(message) => ApiError::storage(message),
    }
}

/// `POST /admin/v1/prune`.
pub async fn prune(State(app): State<Arc<App>>, headers: HeaderMap, JsonBody(body): JsonBody) -> Result<Response, ApiError> {
    let (mut request, inline) = parse(&app, &body)?;
    app.admin.runner.may_run().map_err(not_here)?;
    let key = headers
        .get("idempotency-key")
        .map(|v| v.to_str().map(str::to_string).map_err(|_| ApiError::bad_request("Idempotency-Key: expected visible ASCII")))
        .transpose()?;
    let id = new_id();
    let data = app.admin.store.data().clone();
    if inline.is_some() {
        request.calibration = Some(data.job(&id).join("calibration.txt"));
    }
    let (job, is_new) = blocking(move || {
        request.calibration_sha256 = inline.as_deref().map(sha256);
        if let Some(earlier) = key.as_deref().and_then(|key| earlier(&app, key)) {
            return Ok((earlier, false, request));
        }
        if let (Some(path), Some(text)) = (&request.calibration, &inline) {
            data_dir::write(path, text.as_bytes())?;
        }
        let (job, is_new) = app.admin.store.add(Job::new(id.clone(), request.clone(), key))?;
        if !is_new {
            // two with the same key at the same moment: this one's text is not needed
            let _ = std::fs::remove_dir_all(data.job(&id));
        }
        Ok((job, is_new, request))
    })
    .await?
    .map_err(storage)
    .and_then(|(job, is_new, request)| if is_new || same(&job.request, &request) { Ok((job, is_new)) } else { Err(reused_key(&job.id)) })?;
    let location = format!("/admin/v1/jobs/{}", job.id);
    Ok((StatusCode::ACCEPTED, [("location", location), ("idempotency-replayed", (!is_new).to_string())], Json(json!({"job": job}))).into_response())
}

fn earlier(app: &App, key: &str) -> Option<Job> {
    app.admin.store.list().into_iter().find(|job| job.idempotency_key.as_deref() == Some(key))
}

/// Of a text that came with the request counts what it is, and not where it was put.
fn same(one: &PruneRequest, other: &PruneRequest) -> bool {
    let comparable = |request: &PruneRequest| {
        let path = request.calibration.clone().filter(|_| request.calibration_sha256.is_none());
        PruneRequest { calibration: path, ..request.clone() }
    };
    comparable(one) == comparable(other)
}

fn sha256(text: &str) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn reused_key(id: &str) -> ApiError {
    ApiError::conflict(format!("this Idempotency-Key came with another request before, which made job {id}"))
}

/// The request, and a text to calibrate on if it has one in it.
fn parse(app: &App, body: &Map<String, Value>) -> Result<(PruneRequest, Option<String>), ApiError> {
    let fields = Fields::new(body);
    let model = match fields.string("model")? {
        None | Some("") => BASE.to_string(),
        Some(name) if app.admin.registry.exists(name) => name.to_string(),
        Some(name) if app.names().iter().any(|n| n == name) => app.slot.current().map_or_else(|| BASE.into(), |served| served.id.clone()),
        Some(name) => return Err(ApiError::model_not_found(name)),
    };
    let options = match fields.get("options") {
        None => Map::new(),
        Some(Value::Object(options)) => options.iter().filter(|(_, v)| !v.is_null()).map(|(k, v)| (k.clone(), v.clone())).collect(),
        Some(other) => return Err(fields.wrong("options", "an object", other)),
    };
    let command = crate::command();
    let prune = command.find_subcommand("prune").ok_or_else(|| ApiError::internal("this build has no `evop prune`"))?;
    prune_options::check(&options, prune)?;
    let (calibration, inline) = calibration(&fields)?;
    let activate = fields.bool("activate")?.unwrap_or(false);
    fields.log_unknown();
    Ok((PruneRequest { model, options, calibration, calibration_sha256: None, activate }, inline))
}

/// `{"path": …}` or `{"inline": …}`.
fn calibration(fields: &Fields<'_>) -> Result<(Option<PathBuf>, Option<String>), ApiError> {
    let Some(calibration) = fields.object("calibration")? else { return Ok((None, None)) };
    match (calibration.string("path")?, calibration.string("inline")?) {
        (Some(path), None) => {
            let absolute = std::path::absolute(path).unwrap_or_else(|_| path.into());
            if absolute.is_file() {
                Ok((Some(absolute), None))
            } else {
                Err(ApiError::invalid("calibration.path", format!("calibration.path: no such file on the server: {path}")))
            }
        }
        (None, Some(text)) if !text.trim().is_empty() => Ok((None, Some(text.to_string()))),
        (None, Some(_)) => Err(ApiError::invalid("calibration.inline", "calibration.inline: expected a text, found an empty one")),
        _ => Err(ApiError::invalid("calibration", "calibration: expected either path or inline")),
    }
}

/// `GET /admin/v1/jobs`.
pub async fn jobs(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"jobs": app.admin.jobs().list()}))
}

fn no_job(id: &str) -> ApiError {
    ApiError::not_found(format!("there is no job {id:?}"))
}

/// `GET /admin/v1/jobs/{id}`.
pub async fn job(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Job>, ApiError> {
    app.admin.jobs().get(&id).map(Json).ok_or_else(|| no_job(&id))
}

/// `DELETE /admin/v1/jobs/{id}`: cancels it if it hasn't ended; its files are kept.
pub async fn cancel(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Job>, ApiError> {
    let mut changes = app.admin.jobs().watch(&id).ok_or_else(|| no_job(&id))?;
    app.admin.runner.may_run().map_err(not_here)?;
    let (runner, cancelled) = (Arc::clone(&app.admin.runner), id.clone());
    blocking(move || runner.cancel(&cancelled)).await?.map_err(storage)?;
    // its process has ended; the runner notes it in a moment
    let ended = changes.wait_for(|job| job.state.is_final() || job.state == JobState::Interrupted);
    let _ = tokio::time::timeout(Duration::from_secs(5), ended).await;
    app.admin.store.get(&id).map(Json).ok_or_else(|| no_job(&id))
}

/// `GET /admin/v1/jobs/{id}/events`: the job now and after every change, as server-sent events `state` and `progress`; ends with it.
pub async fn events(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Response, ApiError> {
    let mut changes = app.admin.jobs().watch(&id).ok_or_else(|| no_job(&id))?;
    let (sender, receiver) = mpsc::channel::<Result<Event, Infallible>>(16);
    tokio::spawn(async move {
        let mut last_state = None;
        loop {
            let job = changes.borrow_and_update().clone();
            let name = if last_state == Some(job.state) { "progress" } else { "state" };
            last_state = Some(job.state);
            let ended = job.state.is_final() || job.state == JobState::Interrupted;
            let data = serde_json::to_string(&job).unwrap_or_default();
            if sender.send(Ok(Event::default().event(name).data(data))).await.is_err() || ended {
                return;
            }
            if !next_change(&app, &mut changes, &sender).await {
                return;
            }
        }
    });
    Ok(Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::default().text("keep-alive")).into_response())
}

/// Waits for a change. False when nobody listens any more, or the server ends.
async fn next_change(app: &App, changes: &mut watch::Receiver<Job>, sender: &mpsc::Sender<Result<Event, Infallible>>) -> bool {
    loop {
        tokio::select! {
            changed = changes.changed() => return changed.is_ok(),
            () = sender.closed() => return false,
            () = app.shutdown.stopping() => return false,
            // another server's job changes on disk only
            () = tokio::time::sleep(LOOK_AGAIN) => { app.admin.jobs(); }
        }
    }
}

/// `GET /admin/v1/models`.
pub async fn models(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let active = app.slot.current().map(|served| served.id.clone());
    let models = blocking(move || {
        app.admin.jobs();
        app.admin.registry.list(active.as_deref())
    })
    .await?;
    Ok(Json(json!({"models": models})))
}

/// `POST /admin/v1/models/{id}/activate`: answers when the model is in service.
pub async fn activate(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let (activating, activated) = (Arc::clone(&app), id.clone());
    blocking(move || activation::activate(&activating, &activated)).await?.map_err(|error: ActivationError| ApiError::from(error))?;
    let active = app.slot.current().map(|served| described(&served));
    Ok(Json(json!({"id": id, "active": active})))
}

/// `GET /admin/v1/engine`: what runs, what waits, and what may.
pub async fn engine(State(app): State<Arc<App>>) -> Json<Value> {
    let current = app.slot.current().map(|served| described(&served));
    let draining: Vec<Value> = app.slot.draining().iter().map(|served| described(served)).collect();
    Json(json!({"engine": current, "draining": draining, "ready": app.unready().is_none()}))
}

fn described(served: &Served) -> Value {
    let (stats, limits) = (served.engine.stats(), served.engine.config());
    json!({
        "model": served.id, "root": served.root, "parent": served.parent, "alive": served.engine.is_alive(),
        "running": stats.running, "waiting": stats.waiting, "steps": stats.steps,
        "seconds_since_step": Instant::now().saturating_duration_since(stats.last_step).as_secs_f64(),
        "kv_blocks_used": stats.kv_blocks_used, "kv_blocks": stats.kv_blocks, "kv_block_bytes": stats.kv_block_bytes, "preemptions": stats.preemptions,
        "prefix_cache": {"queries": stats.prefix_queries, "hits": stats.prefix_hits},
        "prompt_tokens": stats.prompt_tokens_total, "generation_tokens": stats.generation_tokens_total,
        "finished": {"stop": stats.finished.stop, "length": stats.finished.length, "cancelled": stats.finished.cancelled, "error": stats.finished.error},
        "limits": {
            "max_concurrent": limits.max_concurrent, "max_queue": limits.max_queue, "max_batch_tokens": limits.max_batch_tokens, "max_model_len": limits.max_model_len,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_same_if_they_calibrate_on_the_same() {
        let request = |path: Option<&str>, text: Option<&str>| PruneRequest {
            model: BASE.into(),
            options: Map::new(),
            calibration: path.map(PathBuf::from),
            calibration_sha256: text.map(sha256),
            activate: false,
        };
        let requests = [
            request(None, None),
            request(Some("/a.txt"), None),
            request(Some("/b.txt"), None),
            request(Some("/jobs/1/calibration.txt"), Some("a text")),
            request(Some("/jobs/1/calibration.txt"), Some("another text")),
        ];
        for (i, one) in requests.iter().enumerate() {
            for (j, other) in requests.iter().enumerate() {
                assert_eq!(same(one, other), i == j, "{i} and {j}");
            }
        }
        assert!(same(&requests[3], &request(Some("/jobs/2/calibration.txt"), Some("a text"))));
        assert!(!same(&requests[0], &PruneRequest { activate: true, ..request(None, None) }));
        assert_eq!(sha256("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}

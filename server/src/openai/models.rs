//! `GET /v1/models` and `GET /v1/models/{id}`.

use crate::app::App;
use crate::openai::errors::ApiError;
use crate::served::Served;
use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};
use std::sync::Arc;

/// Every name that is served. While the model loads there is none.
pub async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let served = app.slot.current();
    let data: Vec<Value> = served.iter().flat_map(|served| app.names().iter().map(|name| object(name, served))).collect();
    Json(json!({"object": "list", "data": data}))
}

/// One of them.
pub async fn get(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let served = app.slot.current().ok_or_else(|| ApiError::unavailable("the model is still loading"))?;
    if app.answers_to(&served, &name) { Ok(Json(object(&name, &served))) } else { Err(ApiError::model_not_found(&name)) }
}

/// OpenAI's fields, vLLM's, llama-server's `meta`, and ours.
fn object(name: &str, served: &Served) -> Value {
    let config = &served.config;
    json!({
        "id": name, "object": "model", "created": served.created, "owned_by": "evop",
        "root": served.root, "parent": served.parent, "max_model_len": served.max_model_len(), "permission": [],
        "meta": {"n_ctx_train": config.max_position_embeddings, "n_params": config.parameters(), "n_vocab": config.vocab_size, "n_embd": config.hidden_size},
        "evop": {"id": served.id, "pattern": pattern(config), "parameters": config.parameters(), "kv_bytes_per_token": config.kv_bytes_per_token(served.kv_element_bytes)},
    })
}

/// What each layer has; zero is an absent sub-block.
pub fn pattern(config: &evop_model::Config) -> Value {
    config.layers.iter().map(|layer| json!({"kv_groups": layer.shape.kv_groups, "ffn": layer.shape.ffn})).collect()
}

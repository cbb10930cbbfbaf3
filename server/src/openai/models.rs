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
    let forms = |served: &Served| [String::new()].into_iter().chain(served.forms.iter().map(|form| format!("@{}", form.name))).collect::<Vec<_>>();
    let named = |served: &Served| -> Vec<Value> {
        let of =
            |name: &String| forms(served).into_iter().enumerate().map(|(member, form)| object(&format!("{name}{form}"), served, member)).collect::<Vec<_>>();
        app.names().iter().flat_map(of).collect()
    };
    let data: Vec<Value> = served.iter().flat_map(|served| named(served)).collect();
    Json(json!({"object": "list", "data": data}))
}

/// One of them.
pub async fn get(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    let served = app.slot.current().ok_or_else(|| ApiError::unavailable("the model is still loading"))?;
    let member = app.member(&served, &name).ok_or_else(|| ApiError::model_not_found(&name))?;
    Ok(Json(object(&name, &served, member)))
}

/// OpenAI's fields, vLLM's, llama-server's `meta`, and ours.
fn object(name: &str, served: &Served, member: usize) -> Value {
    let config = served.member_config(member);
    // a form's parent is the name that it was asked by, without the form
    let parent = if member == 0 { served.parent.as_deref() } else { name.rsplit_once('@').map(|(parent, _)| parent) };
    json!({
        "id": name, "object": "model", "created": served.created, "owned_by": "evop",
        "root": served.root, "parent": parent, "max_model_len": served.max_model_len(), "permission": [],
        "meta": {"n_ctx_train": config.max_position_embeddings, "n_params": config.parameters(), "n_vocab": config.vocab_size, "n_embd": config.hidden_size},
        "evop": {"id": served.id, "pattern": pattern(config), "parameters": config.parameters(), "kv_bytes_per_token": config.kv_bytes_per_token(served.kv_element_bytes)},
    })
}

/// What each layer has; zero is an absent sub-block.
pub fn pattern(config: &evop_model::Config) -> Value {
    config.layers.iter().map(|layer| json!({"kv_groups": layer.shape.kv_groups, "ffn": layer.shape.ffn})).collect()
}

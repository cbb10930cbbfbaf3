//! `GET /v1/models` and `GET /v1/models/{id}`.

use crate::app::App;
use crate::auto::AUTO;
use crate::openai::errors::{ApiError, Problems};
use crate::served::{Form, Served, Wanted};
use axum::Json;
use axum::extract::{Path, State};
use serde::Serialize;
use serde_json::{Value, json};
use std::sync::Arc;
use utoipa::ToSchema;

/// All models.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelList {
    /// `list`.
    object: &'static str,
    /// One entry a name.
    data: Vec<Model>,
}

/// A model: OpenAI's fields, vLLM's, llama-server's `meta`, and ours.
#[derive(Debug, Serialize, ToSchema)]
pub struct Model {
    /// The name to ask for.
    id: String,
    /// `model`.
    object: &'static str,
    /// Seconds since 1970 at which it was loaded.
    created: u64,
    /// `evop`.
    owned_by: &'static str,
    /// Where the checkpoint came from.
    root: String,
    /// What it was made from, if it was.
    parent: Option<String>,
    /// Tokens of prompt and answer together.
    max_model_len: usize,
    /// Empty.
    permission: Vec<Value>,
    /// Its size.
    meta: ModelMeta,
    /// What this server knows besides.
    evop: ModelDetails,
}

/// A model's size, as llama-server says it.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelMeta {
    /// Positions that it was trained for.
    n_ctx_train: usize,
    /// Parameters.
    n_params: usize,
    /// Tokens of its vocabulary.
    n_vocab: usize,
    /// Width.
    n_embd: usize,
}

/// What this server knows of a model besides.
#[derive(Debug, Serialize, ToSchema)]
pub struct ModelDetails {
    /// `base`, or the id of the job that made it.
    id: String,
    /// What each layer has: `kv_groups` and `ffn`; zero is an absent sub-block.
    #[schema(value_type = Vec<Object>)]
    pattern: Value,
    /// Parameters.
    parameters: usize,
    /// Of the key/value cache.
    kv_bytes_per_token: usize,
    /// Of a name whose form the prompt chooses: the forms that it chooses among. What the other fields say holds for the fullest of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    forms: Option<Vec<String>>,
}

/// Every name that is served. While the model loads there is none.
#[utoipa::path(get, path = "/v1/models", operation_id = "models", tag = "Models", responses((status = 200, description = "The models.", body = ModelList), Problems))]
pub async fn list(State(app): State<Arc<App>>) -> Json<ModelList> {
    let served = app.slot.current();
    let named = |served: &Served| -> Vec<Model> {
        let of_name = |name: &String| {
            let forms = served.forms.iter().enumerate().map(|(i, form)| (format!("{name}@{}", form.name), Wanted::Member(i + 1)));
            let auto = served.auto.iter().map(|auto| (format!("{name}@{AUTO}"), Wanted::Auto(Arc::clone(auto))));
            let all = std::iter::once((name.clone(), Wanted::Member(0))).chain(forms).chain(auto);
            all.map(|(name, asked)| model(&name, served, &asked)).collect::<Vec<_>>()
        };
        app.names().iter().flat_map(of_name).collect()
    };
    Json(ModelList { object: "list", data: served.iter().flat_map(|served| named(served)).collect() })
}

/// One of them.
#[utoipa::path(
    get,
    path = "/v1/models/{*id}",
    operation_id = "model",
    tag = "Models",
    params(("id" = String, Path, description = "Its name, which may have slashes.")),
    responses((status = 200, description = "The model.", body = Model), Problems)
)]
pub async fn get(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Model>, ApiError> {
    let served = app.slot.current().ok_or_else(|| ApiError::unavailable("the model is still loading"))?;
    let asked = app.asked(&served, &name).ok_or_else(|| ApiError::model_not_found(&name))?;
    Ok(Json(model(&name, &served, &asked)))
}

fn model(name: &str, served: &Served, asked: &Wanted) -> Model {
    let (config, forms) = match asked {
        Wanted::Member(member) => (served.member_config(*member), None),
        Wanted::Auto(_) => {
            let forms = served.chosen_by_prompt();
            let fullest = forms.iter().map(|form| &form.config).max_by_key(|config| config.parameters());
            (fullest.unwrap_or(&served.config), Some(forms.iter().map(|form: &Form| form.name.clone()).collect()))
        }
    };
    // a form's parent is the name that it was asked by, without the form
    let parent = if matches!(asked, Wanted::Member(0)) { served.parent.as_deref() } else { name.rsplit_once('@').map(|(parent, _)| parent) };
    Model {
        id: name.into(),
        object: "model",
        created: served.created,
        owned_by: "evop",
        root: served.root.clone(),
        parent: parent.map(str::to_string),
        max_model_len: served.max_model_len(),
        permission: Vec::new(),
        meta: ModelMeta { n_ctx_train: config.max_position_embeddings, n_params: config.parameters(), n_vocab: config.vocab_size, n_embd: config.hidden_size },
        evop: ModelDetails {
            id: served.id.clone(),
            pattern: pattern(config),
            parameters: config.parameters(),
            kv_bytes_per_token: config.kv_bytes_per_token(served.kv_element_bytes),
            forms,
        },
    }
}

/// What each layer has; zero is an absent sub-block.
pub fn pattern(config: &evop_model::Config) -> Value {
    config.layers.iter().map(|layer| json!({"kv_groups": layer.shape.kv_groups, "ffn": layer.shape.ffn})).collect()
}

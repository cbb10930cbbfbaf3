//! `GET /openapi.json`, made of the handlers' and the bodies' types, and `GET /docs`, a page made of that document: one file, nothing from elsewhere.

mod page;

use crate::app::App;
use crate::openai::errors::{ApiError, ErrorBody};
use crate::openai::messages::MessageError;
use axum::Router;
use axum::http::{HeaderMap, header};
use axum::response::{Html, IntoResponse};
use axum::routing::get;
use serde_json::{Map, Value, json};
use std::sync::Arc;
use utoipa::openapi::OpenApi;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};

/// What the page takes for the server's address if a request doesn't say.
const DEFAULT_HOST: &str = "localhost:8000";

#[derive(utoipa::OpenApi)]
#[openapi(
    info(title = "EvoP", description = "Serves dense and pruned language models behind the APIs of OpenAI and Anthropic."),
    components(schemas(ErrorBody, MessageError)),
    security((), ("key" = [])),
    tags(
        (name = "Text", description = "Going on with prompts and conversations."),
        (name = "Models", description = "What is served."),
        (name = "Tokens", description = "Text to tokens and back."),
        (name = "Operations", description = "For probes and dashboards. No key is needed.")
    )
)]
struct Preface;

/// The document before any path is in it.
pub fn preface() -> OpenApi {
    let mut document = <Preface as utoipa::OpenApi>::openapi();
    let key = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some("If keys are set. Below /v1/messages an x-api-key header will do."));
    document.components.get_or_insert_default().add_security_scheme("key", SecurityScheme::Http(key.build()));
    document
}

/// The document and the page.
pub fn routes(document: &OpenApi) -> Router<Arc<App>> {
    let document = Arc::new(as_json(document));
    let text: Arc<str> = document.to_string().into();
    let json = move || {
        let text = text.to_string();
        async move { ([(header::CONTENT_TYPE, "application/json")], text).into_response() }
    };
    let html = move |headers: HeaderMap| {
        let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or(DEFAULT_HOST);
        let page = page::render(&document, host).map(Html).map_err(|e| ApiError::internal(format!("the page can't be written: {e}")));
        async move { page }
    };
    Router::new().route("/openapi.json", get(json)).route("/docs", get(html))
}

/// As OpenAPI writes it: a parameter that takes slashes too like any other, and a stream as its events, which have the JSON that is described in them as text.
fn as_json(document: &OpenApi) -> Value {
    // can't fail: strings, numbers and lists
    let mut document = serde_json::to_value(document).unwrap_or_default();
    if let Some(Value::Object(paths)) = document.get_mut("paths").map(Value::take) {
        let paths = paths.into_iter().map(|(path, item)| (path.replace("{*", "{"), item));
        document["paths"] = paths.collect::<Map<_, _>>().into();
    }
    let items = document.get_mut("paths").and_then(Value::as_object_mut).into_iter().flat_map(Map::values_mut);
    let operations = items.filter_map(Value::as_object_mut).flat_map(Map::values_mut);
    let answers = operations.filter_map(|operation| operation.get_mut("responses")?.as_object_mut()).flat_map(Map::values_mut);
    for stream in answers.filter_map(|answer| answer.pointer_mut("/content/text~1event-stream/schema")) {
        *stream = events(stream.take());
    }
    document
}

/// The events of a stream of `schema`. A stream of an endpoint's answers, whose events have no names, ends with a word, or with an error.
fn events(schema: Value) -> Value {
    let json_of = |schema: Value| json!({"type": "string", "contentMediaType": "application/json", "contentSchema": schema});
    if !schema["$ref"].as_str().is_some_and(|target| target.starts_with("#/components/schemas/Answer_")) {
        return json!({"type": "object", "required": ["event", "data"], "properties": {"event": {"type": "string"}, "data": json_of(schema)}});
    }
    let problem = json!({"$ref": "#/components/schemas/ErrorBody"});
    let data = json!({"anyOf": [{"type": "string", "enum": ["[DONE]"]}, json_of(json!({"anyOf": [schema, problem]}))]});
    json!({"type": "object", "required": ["data"], "properties": {"data": data}})
}

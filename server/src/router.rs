//! Which path goes where, on the public and on the admin listener.

use crate::admin;
use crate::app::App;
use crate::auth::{Keys, require_key};
use crate::docs;
use crate::openai::errors::ApiError;
use crate::openai::{chat, completions, messages, models, responses, tokenize};
use crate::operations;
use crate::rate_limit::limit_rate;
use crate::request_id::observe;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::any::Any;
use std::sync::Arc;
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// The public API.
pub fn public(app: &Arc<App>) -> Router {
    let (api, document) = described().split_for_parts();
    let api = api.route_layer(from_fn_with_state(Arc::clone(app), limit_rate)).route_layer(from_fn_with_state(Arc::clone(&app.api_keys), require_key));
    let (probes, document_of_probes) = probes().split_for_parts();
    let docs = docs::routes(&document.merge_from(document_of_probes));
    finished(app, api.merge(probes).merge(docs))
}

/// What needs a key, if keys are set.
fn described() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(docs::preface())
        .routes(routes!(completions::create))
        .routes(routes!(chat::create))
        .routes(routes!(responses::create))
        .routes(routes!(messages::create))
        .routes(routes!(messages::count_tokens))
        .routes(routes!(models::list))
        .routes(routes!(models::get))
        .routes(routes!(tokenize::tokenize))
        .routes(routes!(tokenize::detokenize))
}

/// The admin API, on its own listener with its own key.
pub fn admin(app: &Arc<App>, keys: Keys) -> Router {
    let open = keys.is_open();
    let mut api = admin::routes().route_layer(from_fn_with_state(Arc::new(keys), require_key));
    if open {
        api = api.route_layer(from_fn(admin::refuse_browsers));
    }
    finished(app, api.merge(probes().split_for_parts().0))
}

fn probes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(operations::health))
        .routes(routes!(operations::ready))
        .routes(routes!(operations::live))
        .routes(routes!(operations::version))
        .routes(routes!(operations::metrics))
        .route("/ping", get(operations::ready))
}

/// What is around every route.
fn finished(app: &Arc<App>, router: Router<Arc<App>>) -> Router {
    router
        .fallback(|| async { ApiError::not_found("there is nothing at this path") })
        .method_not_allowed_fallback(|| async { ApiError::method_not_allowed() })
        .layer(
            // outermost first
            ServiceBuilder::new()
                .layer(from_fn_with_state(Arc::clone(app), observe))
                .layer(from_fn(messages::edge::speak_anthropic))
                .layer(CatchPanicLayer::custom(panicked))
                .layer(DefaultBodyLimit::max(app.config.max_body_size.0)),
        )
        .with_state(Arc::clone(app))
}

#[allow(clippy::needless_pass_by_value, reason = "the layer passes it by value")]
fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    tracing::error!(panic = text.unwrap_or("no message"), "a handler panicked");
    ApiError::internal("something went wrong in the server").into_response()
}

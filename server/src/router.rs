//! Which path goes where, on the public and on the admin listener.

use crate::admin;
use crate::app::App;
use crate::auth::{Keys, require_key};
use crate::openai::errors::ApiError;
use crate::openai::{chat, completions, messages, models, responses, tokenize};
use crate::operations;
use crate::rate_limit::limit_rate;
use crate::request_id::observe;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use std::any::Any;
use std::sync::Arc;
use tower::ServiceBuilder;
use tower_http::catch_panic::CatchPanicLayer;

/// The public API.
pub fn public(app: &Arc<App>) -> Router {
    let api = Router::new()
        .route("/v1/completions", post(completions::create))
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/responses", post(responses::create))
        .route("/v1/messages", post(messages::create))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::get))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route_layer(from_fn_with_state(Arc::clone(app), limit_rate))
        .route_layer(from_fn_with_state(Arc::clone(&app.api_keys), require_key));
    finished(app, api.merge(probes()))
}

/// The admin API, on its own listener with its own key.
pub fn admin(app: &Arc<App>, keys: Keys) -> Router {
    let open = keys.is_open();
    let mut api = admin::routes().route_layer(from_fn_with_state(Arc::new(keys), require_key));
    if open {
        api = api.route_layer(from_fn(admin::refuse_browsers));
    }
    finished(app, api.merge(probes()))
}

fn probes() -> Router<Arc<App>> {
    Router::new()
        .route("/health", get(operations::ready))
        .route("/ready", get(operations::ready))
        .route("/ping", get(operations::ready))
        .route("/live", get(operations::live))
        .route("/version", get(operations::version))
        .route("/metrics", get(operations::metrics))
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

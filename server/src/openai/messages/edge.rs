//! What is different for Anthropic's clients before and after a handler: where the key stands, and how an error looks.

use super::types::{ErrorDetail, MessageError};
use crate::openai::errors::ApiError;
use axum::Json;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Around every route: does something below `/v1/messages` only, but there for errors of any origin.
pub async fn speak_anthropic(mut request: Request, next: Next) -> Response {
    let path = request.uri().path();
    if path != "/v1/messages" && !path.starts_with("/v1/messages/") {
        return next.run(request).await;
    }
    take_key(request.headers_mut());
    let response = next.run(request).await;
    match response.extensions().get::<ApiError>() {
        Some(error) => in_their_words(&error.clone(), response),
        None => response,
    }
}

/// `x-api-key: KEY` is as good as `authorization: Bearer KEY`.
fn take_key(headers: &mut HeaderMap) {
    if headers.contains_key(header::AUTHORIZATION) {
        return;
    }
    let Some(key) = headers.get(API_KEY) else { return };
    if let Ok(mut value) = HeaderValue::from_bytes(&[b"Bearer ", key.as_bytes()].concat()) {
        value.set_sensitive(true);
        headers.insert(header::AUTHORIZATION, value);
    }
}

/// The same status and headers, another body.
fn in_their_words(error: &ApiError, response: Response) -> Response {
    let (mut parts, _) = response.into_parts();
    parts.headers.remove(header::CONTENT_LENGTH);
    let body = Json(MessageError { kind: "error", error: detail(error) }).into_response().into_body();
    Response::from_parts(parts, body)
}

/// An error as Anthropic's clients know it.
pub fn detail(error: &ApiError) -> ErrorDetail {
    let kind = match error.status() {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        StatusCode::GATEWAY_TIMEOUT => "timeout_error",
        status if status.is_server_error() => "api_error",
        _ => "invalid_request_error",
    };
    ErrorDetail { kind, message: error.message().into() }
}

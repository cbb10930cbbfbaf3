//! OpenAI's error object: everything that goes wrong at the edge becomes one of these, here.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use evop_serving::InvalidParam;
use serde::Serialize;
use serde_json::Value;
use std::time::Duration;
use utoipa::{IntoResponses, ToSchema};

/// `{"error": {"message", "type", "param", "code"}}` with its status.
#[derive(Debug, Clone)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    retry_after: Option<Duration>,
}

/// What an error's answer has in it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorObject,
}

/// What went wrong.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ErrorObject {
    /// In words: which field, what was expected, what to do.
    pub message: String,
    /// `invalid_request_error`, `rate_limit_error` or `server_error`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The field.
    pub param: Option<String>,
    /// Kind of error, for programs.
    pub code: Option<&'static str>,
}

/// What else a request may be answered with, for the OpenAPI document.
#[derive(Debug, IntoResponses)]
#[allow(dead_code, reason = "described, never made")]
pub enum Problems {
    /// A field has a value that can't be used; `param` says which.
    #[response(status = 400)]
    Invalid(ErrorBody),
    /// A key is needed, or this one is not known.
    #[response(status = 401)]
    Unauthorized(ErrorBody),
    /// There is no such model.
    #[response(status = 404)]
    NotFound(ErrorBody),
    /// The request's body did not arrive in time.
    #[response(status = 408)]
    SlowBody(ErrorBody),
    /// The request's body is too large.
    #[response(status = 413)]
    TooLarge(ErrorBody),
    /// Too many requests; `Retry-After` says when to come back.
    #[response(status = 429)]
    TooMany(ErrorBody),
    /// Something went wrong in the server.
    #[response(status = 500)]
    Internal(ErrorBody),
    /// The model is still loading, or the server is shutting down.
    #[response(status = 503)]
    Unavailable(ErrorBody),
    /// It took longer than `--request-timeout`.
    #[response(status = 504)]
    Timeout(ErrorBody),
}

/// The server isn't ready, for the OpenAPI document.
#[derive(Debug, IntoResponses)]
#[allow(dead_code, reason = "described, never made")]
pub enum NotReady {
    /// Why it isn't ready.
    #[response(status = 503)]
    Unavailable(ErrorBody),
}

impl ApiError {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: None, retry_after: None }
    }

    /// 400: a field has a value that can't be used.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { param: Some(param.into()), ..Self::new(StatusCode::BAD_REQUEST, message) }
    }

    /// 400: a field that this server knows and doesn't support.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { code: Some("unsupported_parameter"), ..Self::invalid(param, message) }
    }

    /// 400: the body as a whole can't be read.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// 400: the prompt (and the answer asked for) is longer than the model's context.
    pub fn context_length(param: &'static str, message: impl Into<String>) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::invalid(param, message) }
    }

    /// 401.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self { code: Some("invalid_api_key"), ..Self::new(StatusCode::UNAUTHORIZED, message) }
    }

    /// 403.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, message)
    }

    /// 404: no such path, or nothing by that id.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self { code: Some("not_found"), ..Self::new(StatusCode::NOT_FOUND, message) }
    }

    /// 404: no such model.
    pub fn model_not_found(model: &str) -> Self {
        Self {
            param: Some("model".into()),
            code: Some("model_not_found"),
            ..Self::new(StatusCode::NOT_FOUND, format!("the model {model:?} does not exist; GET /v1/models lists those that do"))
        }
    }

    /// 405.
    pub fn method_not_allowed() -> Self {
        Self { code: Some("method_not_allowed"), ..Self::new(StatusCode::METHOD_NOT_ALLOWED, "this path does not take that method") }
    }

    /// 408: the client was too slow.
    pub fn slow_body() -> Self {
        Self::new(StatusCode::REQUEST_TIMEOUT, "the request's body did not arrive in time")
    }

    /// 409.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, message)
    }

    /// 413.
    pub fn too_large(limit: usize) -> Self {
        Self { code: Some("request_too_large"), ..Self::new(StatusCode::PAYLOAD_TOO_LARGE, format!("the request's body is larger than {limit} bytes")) }
    }

    /// 429: the queue is full.
    pub fn queue_full(retry_after: Duration) -> Self {
        Self::rate_limited("too many requests are waiting; try again later", retry_after)
    }

    /// 429: more than there may be; `retry_after` says when it is worth another try.
    pub fn rate_limited(message: impl Into<String>, retry_after: Duration) -> Self {
        Self { code: Some("rate_limit_exceeded"), retry_after: Some(retry_after), ..Self::new(StatusCode::TOO_MANY_REQUESTS, message) }
    }

    /// 500.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// 507: the disk said no.
    pub fn storage(message: impl Into<String>) -> Self {
        Self { code: Some("storage"), ..Self::new(StatusCode::INSUFFICIENT_STORAGE, message) }
    }

    /// 503: loading, draining, or the engine is gone.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self { retry_after: Some(Duration::from_secs(5)), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    /// 504: it took longer than `--request-timeout`.
    pub fn timeout(limit: Duration) -> Self {
        Self { code: Some("timeout"), ..Self::new(StatusCode::GATEWAY_TIMEOUT, format!("the request took longer than {} seconds", limit.as_secs())) }
    }

    /// With another `param`.
    pub fn at(mut self, param: impl Into<String>) -> Self {
        self.param = Some(param.into());
        self
    }

    /// With the names that another API has for the fields: the first pair `(ours, theirs)` whose first part stands in `param` counts.
    pub fn renamed(mut self, names: &[(&str, &str)]) -> Self {
        if let Some(param) = &self.param
            && let Some((ours, theirs)) = names.iter().find(|(ours, _)| param.contains(ours))
        {
            let renamed = param.replace(ours, theirs);
            self.message = self.message.replace(param, &renamed);
            self.param = Some(renamed);
        }
        self
    }

    /// What went wrong, in words.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The status it is sent with.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The object, also for the inside of a stream.
    pub fn body(&self) -> ErrorBody {
        let kind = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        ErrorBody { error: ErrorObject { message: self.message.clone(), kind, param: self.param.clone(), code: self.code } }
    }

    /// The same as a value.
    pub fn to_json(&self) -> Value {
        // can't fail: strings and nulls
        serde_json::to_value(self.body()).unwrap_or_default()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        // a server that loads or drains says so to every probe
        if self.status.is_server_error() && self.status != StatusCode::SERVICE_UNAVAILABLE {
            tracing::warn!(status = self.status.as_u16(), message = %self.message, "request failed");
        }
        let mut response = (self.status, Json(self.body())).into_response();
        // for those who say it in other words
        response.extensions_mut().insert(self.clone());
        if let Some(after) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs().max(1)));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<InvalidParam> for ApiError {
    fn from(error: InvalidParam) -> Self {
        Self::invalid(error.param, error.to_string())
    }
}

//! `x-request-id`: taken or made, put into every log line and into the answer; and what every answer is counted and logged by.

use crate::app::App;
use crate::traces::{TARGET, continue_trace};
use axum::extract::{FromRequestParts, MatchedPath, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::Response;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;
use tracing::Instrument;
use tracing_opentelemetry::OpenTelemetrySpanExt;

const HEADER: HeaderName = HeaderName::from_static("x-request-id");
/// Longer ids are replaced.
const LONGEST: usize = 128;

/// A request's id.
#[derive(Debug, Clone)]
pub struct RequestId(Arc<str>);

impl RequestId {
    fn taken_or_made(request: &Request) -> Self {
        let taken = request.headers().get(HEADER).and_then(|value| value.to_str().ok());
        let taken = taken.filter(|id| !id.is_empty() && id.len() <= LONGEST && id.bytes().all(|b| b.is_ascii_graphic()));
        Self(taken.map_or_else(|| format!("req-{}", uuid::Uuid::new_v4().simple()).into(), Into::into))
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<S: Sync> FromRequestParts<S> for RequestId {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        // always there: `observe` is around every route
        Ok(parts.extensions.get().cloned().unwrap_or_else(|| Self("".into())))
    }
}

/// Around every request: its id, its span, a log line and a count.
pub async fn observe(State(app): State<Arc<App>>, mut request: Request, next: Next) -> Response {
    let start = Instant::now();
    let id = RequestId::taken_or_made(&request);
    let route = request.extensions().get::<MatchedPath>().map_or_else(|| "other".into(), |path| path.as_str().to_string());
    // probes, scrapes and those who wait for a job come every few seconds
    let polled = request.method() == Method::GET;
    let method = request.method();
    let span = if polled {
        tracing::info_span!("request", request_id = %id, %method, path = request.uri().path())
    } else {
        tracing::info_span!(target: TARGET, "request", request_id = %id, %method, path = request.uri().path())
    };
    span.set_attribute("http.route", route.clone());
    continue_trace(&span, request.headers());
    request.extensions_mut().insert(id.clone());
    let mut response = next.run(request).instrument(span.clone()).await;
    let status = response.status().as_u16();
    app.metrics.http_request(&route, status);
    let milliseconds = start.elapsed().as_secs_f64() * 1e3;
    span.set_attribute("http.response.status_code", i64::from(status));
    span.in_scope(|| {
        if !polled || status >= 400 && status != 503 {
            tracing::info!(status, milliseconds, "answered");
        } else {
            tracing::debug!(status, milliseconds, "answered");
        }
    });
    if let Ok(value) = HeaderValue::from_str(&id.0) {
        response.headers_mut().insert(HEADER, value);
    }
    response
}

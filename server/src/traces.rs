//! OpenTelemetry: a span of every request, sent to a collector over OTLP (HTTP, protobuf) if one was named.

use crate::metrics::FinishedChoice;
use anyhow::{Context, Result, bail};
use axum::http::HeaderMap;
use opentelemetry::KeyValue;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use std::time::Duration;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// The target of the spans that are sent, and no module's name; what libraries trace stays here.
pub const TARGET: &str = "evop::traced";
/// Where collectors take spans, below an address that says nothing else.
const PATH: &str = "/v1/traces";
/// For what was not sent yet, when the server ends.
const LAST_SPANS: Duration = Duration::from_secs(3);

/// Sends spans in batches, on a thread of its own.
#[derive(Debug)]
pub struct Traces {
    provider: SdkTracerProvider,
}

impl Traces {
    /// To a collector at `http(s)://HOST:PORT[/PATH]`. The collector need not be there yet.
    ///
    /// # Errors
    /// Something that is no URL.
    pub fn to(endpoint: &str) -> Result<Self> {
        let exporter = SpanExporter::builder().with_http().with_endpoint(spans_url(endpoint)?).build().context("--otlp-endpoint")?;
        let resource = Resource::builder().with_service_name("evop").with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION"))).build();
        Ok(Self { provider: SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build() })
    }

    /// What turns spans of [`TARGET`] into OpenTelemetry's.
    pub fn tracer(&self) -> SdkTracer {
        self.provider.tracer("evop")
    }

    /// Sends what is left.
    pub fn end(self) {
        if let Err(error) = self.provider.shutdown_with_timeout(LAST_SPANS) {
            tracing::warn!(%error, "the last spans were not sent");
        }
    }
}

fn spans_url(endpoint: &str) -> Result<String> {
    let Some(rest) = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://")).filter(|rest| !rest.is_empty()) else {
        bail!("--otlp-endpoint {endpoint}: expected a URL such as http://localhost:4318");
    };
    let bare = rest.trim_end_matches('/');
    Ok(if bare.contains('/') { endpoint.to_string() } else { format!("{}{PATH}", endpoint.trim_end_matches('/')) })
}

/// Headers as OpenTelemetry reads them.
struct Carrier<'a>(&'a HeaderMap);

impl Extractor for Carrier<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(axum::http::HeaderName::as_str).collect()
    }
}

/// Puts a request's span under the caller's, if it sent a `traceparent`.
pub fn continue_trace(span: &Span, headers: &HeaderMap) {
    if headers.contains_key("traceparent") {
        // an error is a span that nobody records
        let _ = span.set_parent(TraceContextPropagator::new().extract(&Carrier(headers)));
    }
}

/// What a generation tells its request's span: OpenTelemetry's names for generative AI, and vLLM's for latencies.
#[derive(Debug)]
pub struct GenerationAttributes<'a> {
    pub model: &'a str,
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    pub completion_tokens: usize,
    /// How the first choice went, if it ended.
    pub first: Option<&'a FinishedChoice>,
}

impl GenerationAttributes<'_> {
    /// Sets them.
    pub fn record(&self, span: &Span) {
        let count = |name: &'static str, n: usize| span.set_attribute(name, i64::try_from(n).unwrap_or(i64::MAX));
        span.set_attribute("gen_ai.operation.name", "text_completion");
        span.set_attribute("gen_ai.response.model", self.model.to_string());
        count("gen_ai.usage.input_tokens", self.prompt_tokens);
        count("gen_ai.usage.cache_read.input_tokens", self.cached_tokens);
        count("gen_ai.usage.output_tokens", self.completion_tokens);
        let Some(first) = self.first else { return };
        let seconds = |name: &'static str, time: Duration| span.set_attribute(name, time.as_secs_f64());
        span.set_attribute("gen_ai.response.finish_reasons", first.reason);
        seconds("gen_ai.latency.e2e", first.total);
        let (Some(queued), Some(token)) = (first.queued, first.first_token) else { return };
        seconds("gen_ai.latency.time_in_queue", queued);
        seconds("gen_ai.latency.time_to_first_token", token);
        seconds("gen_ai.latency.time_in_model_prefill", token.saturating_sub(queued));
        seconds("gen_ai.latency.time_in_model_decode", first.total.saturating_sub(token));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_address_gets_the_usual_path() {
        assert_eq!(spans_url("http://localhost:4318").unwrap(), "http://localhost:4318/v1/traces");
        assert_eq!(spans_url("https://collector.example/").unwrap(), "https://collector.example/v1/traces");
        assert_eq!(spans_url("http://a:1/custom").unwrap(), "http://a:1/custom");
        for wrong in ["localhost:4318", "grpc://a", "http://", ""] {
            assert!(spans_url(wrong).is_err(), "{wrong:?}");
        }
    }
}

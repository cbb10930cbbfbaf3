//! Logs to stderr: text on a terminal, JSON otherwise. Prompts and answers are never logged. Spans of requests go to a collector too, if one was named.

use crate::traces::{self, Traces};
use anyhow::{Context, Result};
use std::io::IsTerminal;
use tracing_subscriber::filter::{EnvFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

/// Starts logging. `filter` is an env filter: `info`, or `info,evop_serving=debug`. `collector` is an OTLP endpoint.
///
/// # Errors
/// A filter or an endpoint that can't be parsed.
pub fn init(filter: &str, collector: Option<&str>) -> Result<Option<Traces>> {
    let filter = EnvFilter::try_new(filter).with_context(|| format!("--log: {filter:?} is not a log filter"))?;
    let lines = fmt::layer().with_writer(std::io::stderr);
    let lines = if std::io::stderr().is_terminal() {
        lines.with_target(false).boxed()
    } else {
        lines.json().flatten_event(true).with_current_span(true).with_span_list(false).boxed()
    };
    let traces = collector.map(Traces::to).transpose()?;
    let spans = traces.as_ref().map(|traces| {
        let requests = Targets::new().with_target(traces::TARGET, tracing::Level::INFO);
        let layer = tracing_opentelemetry::layer().with_tracer(traces.tracer());
        layer.with_location(false).with_threads(false).with_target(false).with_tracked_inactivity(false).with_filter(requests)
    });
    tracing_subscriber::registry().with(spans).with(lines.with_filter(filter)).init();
    Ok(traces)
}

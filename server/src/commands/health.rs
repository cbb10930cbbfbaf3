//! `evop health`: is a server ready? For containers without curl.

use super::http;
use anyhow::{Result, bail};
use clap::Args;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(3);

/// Options of `evop health`.
#[derive(Debug, Clone, Args)]
pub struct HealthArgs {
    /// What to ask. [default: /health at EVOP_HOST and EVOP_PORT]
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
}

/// Asks, and fails unless the answer is 200.
///
/// # Errors
/// No answer, or another one.
pub fn run(args: &HealthArgs) -> Result<()> {
    let url = args.url.clone().unwrap_or_else(default_url);
    match http::request(&url, None, PATIENCE)? {
        (200, _) => Ok(()),
        (status, body) => bail!("{url} answers {status}: {}", body.trim()),
    }
}

/// The server that the environment's settings would start.
fn default_url() -> String {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let host = variable("EVOP_HOST").filter(|host| !matches!(host.as_str(), "0.0.0.0" | "::" | "[::]")).unwrap_or_else(|| "localhost".into());
    let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host };
    format!("http://{host}:{}/health", variable("EVOP_PORT").unwrap_or_else(|| "8000".into()))
}

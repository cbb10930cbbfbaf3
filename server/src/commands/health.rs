//! `evop health`: is a server ready? For containers without curl.

use anyhow::{Context, Result, bail};
use clap::Args;
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
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
    let (address, path) = split(&url)?;
    let mut stream = connect(&address).with_context(|| format!("{url} can't be reached"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(1 << 16).read_to_end(&mut answer).with_context(|| format!("{url} does not answer"))?;
    let answer = String::from_utf8_lossy(&answer);
    match answer.split_whitespace().nth(1) {
        Some("200") => Ok(()),
        Some(status) => bail!("{url} answers {status}: {}", answer.split("\r\n\r\n").nth(1).unwrap_or_default().trim()),
        None => bail!("{url} does not speak HTTP"),
    }
}

/// The server that the environment's settings would start.
fn default_url() -> String {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let host = variable("EVOP_HOST").filter(|host| !matches!(host.as_str(), "0.0.0.0" | "::" | "[::]")).unwrap_or_else(|| "localhost".into());
    let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host };
    format!("http://{host}:{}/health", variable("EVOP_PORT").unwrap_or_else(|| "8000".into()))
}

/// `http://host:port/path` to `host:port` and `/path`.
fn split(url: &str) -> Result<(String, String)> {
    let rest = url.strip_prefix("http://").with_context(|| format!("--url: expected http://HOST:PORT/PATH, found {url:?}"))?;
    let (host, path) = rest.split_once('/').map_or((rest, String::from("/")), |(host, path)| (host, format!("/{path}")));
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    Ok((if has_port { host.to_string() } else { format!("{host}:80") }, path))
}

/// localhost may be two addresses, of which the server listens on one.
fn connect(address: &str) -> std::io::Result<TcpStream> {
    let mut result = Err(std::io::Error::other("the name has no address"));
    for address in address.to_socket_addrs()? {
        result = TcpStream::connect_timeout(&address, PATIENCE);
        if result.is_ok() {
            break;
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_split() {
        assert_eq!(split("http://localhost:8000/health").unwrap(), ("localhost:8000".into(), "/health".into()));
        assert_eq!(split("http://example.org").unwrap(), ("example.org:80".into(), "/".into()));
        assert_eq!(split("http://[::1]:9/a/b").unwrap(), ("[::1]:9".into(), "/a/b".into()));
        assert!(split("https://localhost/").is_err());
    }
}

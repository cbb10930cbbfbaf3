//! The little HTTP that a command needs to talk to a server of its own: one request, one answer, no TLS.

use crate::config::Secret;
use anyhow::{Context, Result};
use std::io::{Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

/// Largest answer that is read.
const MOST_BYTES: u64 = 1 << 20;

/// GETs a URL, or POSTs JSON to it: (status, body).
///
/// # Errors
/// No server, none that speaks HTTP, or none that answers within `patience`.
pub fn request(url: &str, json: Option<&str>, patience: Duration) -> Result<(u16, String)> {
    let (method, body) = json.map_or(("GET", ""), |json| ("POST", json));
    send(url, method, "", body, patience)
}

/// GETs a URL with a key: (status, body).
///
/// # Errors
/// As [`request`].
pub fn get(url: &str, key: Option<&Secret>, patience: Duration) -> Result<(u16, String)> {
    send(url, "GET", &key.map_or_else(String::new, |key| format!("Authorization: Bearer {}\r\n", key.expose())), "", patience)
}

fn send(url: &str, method: &str, headers: &str, body: &str, patience: Duration) -> Result<(u16, String)> {
    let (address, path) = split(url)?;
    let mut stream = connect(&address, patience).with_context(|| format!("{url} can't be reached"))?;
    stream.set_read_timeout(Some(patience))?;
    stream.set_write_timeout(Some(patience))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n{headers}Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = Vec::new();
    stream.take(MOST_BYTES).read_to_end(&mut answer).with_context(|| format!("{url} does not answer"))?;
    let answer = String::from_utf8_lossy(&answer);
    let status = answer.split_whitespace().nth(1).and_then(|status| status.parse().ok()).with_context(|| format!("{url} does not speak HTTP"))?;
    Ok((status, answer.split_once("\r\n\r\n").map_or_else(String::new, |(_, body)| body.to_string())))
}

/// `http://host:port/path` to `host:port` and `/path`.
///
/// # Errors
/// Another scheme than http.
pub fn split(url: &str) -> Result<(String, String)> {
    let rest = url.strip_prefix("http://").with_context(|| format!("expected http://HOST:PORT/PATH, found {url:?}"))?;
    let (host, path) = rest.split_once('/').map_or((rest, String::from("/")), |(host, path)| (host, format!("/{path}")));
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    Ok((if has_port { host.to_string() } else { format!("{host}:80") }, path))
}

/// localhost may be two addresses, of which the server listens on one.
fn connect(address: &str, patience: Duration) -> std::io::Result<TcpStream> {
    let mut result = Err(std::io::Error::other("the name has no address"));
    for address in address.to_socket_addrs()? {
        result = TcpStream::connect_timeout(&address, patience);
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

//! One client of a load test: a streaming completion on a connection of its own, with the time of every chunk.

use super::workload::{Behaviour, Plan};
use crate::config::Secret;
use anyhow::{Context, Result};
use axum::body::Body;
use hyper::client::conn::http1;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use std::borrow::Cow;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt;

/// A slow reader's buffer, and its pause after a chunk.
const SLOW_BUFFER_BYTES: u32 = 4 << 10;
const SLOW_PAUSE: Duration = Duration::from_millis(50);

/// The server under test.
#[derive(Debug, Clone)]
pub struct Target {
    address: SocketAddr,
    /// `host:port`.
    host: String,
    api_key: Option<Secret>,
    /// Longest that one request may take.
    timeout: Duration,
}

/// How a request ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// With all of its answer.
    Complete,
    /// The client hung up, as planned.
    HungUp,
    /// The client left with half a body sent, as planned.
    HalfSent,
    /// 429 with `Retry-After`.
    Refused(Duration),
    /// Otherwise; the kind of error.
    Failed(String),
}

/// A request that ended.
#[derive(Debug, Clone)]
pub struct Answer {
    pub sent: Instant,
    pub end: End,
    pub ended: Instant,
    /// When each chunk with text arrived.
    pub chunks: Vec<Instant>,
    /// As the server says, or the number of chunks if it doesn't.
    pub output_tokens: usize,
    pub prompt_tokens: usize,
    /// Its client read slowly: its times are its own doing.
    pub slow: bool,
}

/// What is read of a chunk.
#[derive(Debug, Deserialize)]
struct Chunk<'a> {
    #[serde(default, borrow)]
    choices: Vec<ChunkChoice<'a>>,
    usage: Option<ChunkUsage>,
    #[serde(borrow)]
    error: Option<ChunkError<'a>>,
}

#[derive(Debug, Deserialize)]
struct ChunkChoice<'a> {
    #[serde(borrow)]
    text: Option<Cow<'a, str>>,
}

#[derive(Debug, Deserialize)]
struct ChunkUsage {
    prompt_tokens: usize,
    completion_tokens: usize,
}

#[derive(Debug, Deserialize)]
struct ChunkError<'a> {
    #[serde(rename = "type", borrow)]
    kind: Option<Cow<'a, str>>,
}

/// A task that ends with its owner.
struct Aborted<T>(JoinHandle<T>);

impl<T> Drop for Aborted<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Why a request failed, as the table says it.
fn failed(kind: impl Into<String>) -> End {
    End::Failed(kind.into())
}

impl Target {
    /// The server at `http://HOST:PORT`; a path after that is ignored.
    ///
    /// # Errors
    /// Another scheme, or a name without an address that answers.
    pub async fn find(url: &str, api_key: Option<Secret>, timeout: Duration) -> Result<Self> {
        let (host, _) = crate::commands::http::split(url)?;
        let mut problem = anyhow::anyhow!("the name has no address");
        let addresses: Vec<SocketAddr> = tokio::net::lookup_host(&host).await.with_context(|| host.clone())?.collect();
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(_) => return Ok(Self { address, host, api_key, timeout }),
                Err(error) => problem = error.into(),
            }
        }
        Err(problem.context(format!("{url} can't be reached")))
    }

    /// Sends a request and reads its answer; `on_chunk` hears of every chunk as it comes.
    pub async fn ask(&self, plan: &Plan, mut on_chunk: impl FnMut(Instant)) -> Answer {
        let now = Instant::now();
        let slow = plan.behaviour == Behaviour::ReadsSlowly;
        let mut answer = Answer { sent: now, end: failed("timeout"), ended: now, chunks: Vec::new(), output_tokens: 0, prompt_tokens: 0, slow };
        let conversation = async {
            match plan.behaviour {
                Behaviour::SendsHalf { stays } => self.send_half(&plan.body, stays).await,
                _ => self.converse(plan, &mut answer, &mut on_chunk).await,
            }
        };
        let end = tokio::time::timeout(self.timeout, conversation).await.unwrap_or_else(|_| Err(failed("timeout")));
        answer.end = end.unwrap_or_else(|end| end);
        answer.ended = Instant::now();
        if answer.output_tokens == 0 {
            answer.output_tokens = answer.chunks.len();
        }
        answer
    }

    async fn connect(&self, slow: bool) -> Result<TcpStream, End> {
        let connecting = async {
            let socket = if self.address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
            if slow {
                socket.set_recv_buffer_size(SLOW_BUFFER_BYTES)?;
            }
            let stream = socket.connect(self.address).await?;
            stream.set_nodelay(true)?;
            Ok(stream)
        };
        connecting.await.map_err(|error: std::io::Error| failed(format!("connect: {}", error.kind())))
    }

    async fn send_half(&self, body: &str, stays: Duration) -> Result<End, End> {
        let mut stream = self.connect(false).await?;
        let key = self.api_key.as_ref().map_or_else(String::new, |key| format!("authorization: Bearer {}\r\n", key.expose()));
        let half = body.len() / 2;
        let head =
            format!("POST /v1/completions HTTP/1.1\r\nhost: {}\r\n{key}content-type: application/json\r\ncontent-length: {}\r\n\r\n", self.host, body.len());
        let sent = async {
            stream.write_all(head.as_bytes()).await?;
            stream.write_all(&body.as_bytes()[..half]).await
        };
        sent.await.map_err(|error: std::io::Error| failed(format!("half a body: {}", error.kind())))?;
        tokio::time::sleep(stays).await;
        Ok(End::HalfSent)
    }

    fn request(&self, body: &str) -> Result<Request<Body>, End> {
        let mut request = Request::post("/v1/completions")
            .header(header::HOST, &self.host)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::CONNECTION, "close");
        if let Some(key) = &self.api_key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", key.expose()));
        }
        request.body(Body::from(body.to_string())).map_err(|error| failed(format!("request: {error}")))
    }

    async fn converse(&self, plan: &Plan, answer: &mut Answer, on_chunk: &mut impl FnMut(Instant)) -> Result<End, End> {
        let stream = self.connect(answer.slow).await?;
        let broken = |error: hyper::Error| failed(if error.is_incomplete_message() { "closed early".into() } else { format!("connection: {error}") });
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let _connection = Aborted(tokio::spawn(connection));
        let response = sender.send_request(self.request(&plan.body)?).await.map_err(broken)?;
        if response.status() != StatusCode::OK {
            return Err(refused(&response));
        }
        let mut events = Events::default();
        let mut body = Body::new(response.into_body()).into_data_stream();
        let last_chunk = match plan.behaviour {
            Behaviour::HangsUp { after_chunks } => after_chunks,
            _ => usize::MAX,
        };
        loop {
            if answer.chunks.len() >= last_chunk {
                return Ok(End::HungUp);
            }
            let Some(bytes) = body.next().await else { return Err(failed("stream ended without [DONE]")) };
            let now = Instant::now();
            events.push(&bytes.map_err(|_| failed("stream broke"))?);
            while let Some(event) = events.next() {
                if event == "[DONE]" {
                    return Ok(End::Complete);
                }
                if read_chunk(&event, answer)? {
                    answer.chunks.push(now);
                    on_chunk(now);
                }
            }
            if answer.slow {
                tokio::time::sleep(SLOW_PAUSE).await;
            }
        }
    }
}

/// Takes what counts of a chunk; true if it has text.
fn read_chunk(event: &str, answer: &mut Answer) -> Result<bool, End> {
    let chunk: Chunk<'_> = serde_json::from_str(event).map_err(|_| failed("stream: not a chunk"))?;
    if let Some(error) = chunk.error {
        return Err(failed(format!("stream: {}", error.kind.as_deref().unwrap_or("error"))));
    }
    if let Some(usage) = chunk.usage {
        (answer.prompt_tokens, answer.output_tokens) = (usage.prompt_tokens, usage.completion_tokens);
    }
    Ok(chunk.choices.iter().any(|choice| choice.text.as_ref().is_some_and(|text| !text.is_empty())))
}

fn refused<T>(response: &Response<T>) -> End {
    let status = response.status();
    if status != StatusCode::TOO_MANY_REQUESTS {
        return failed(format!("status {}", status.as_u16()));
    }
    let after = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    after.map_or_else(|| failed("status 429 without Retry-After"), |seconds| End::Refused(Duration::from_secs(seconds)))
}

/// Cuts a body into the data of its events.
#[derive(Debug, Default)]
struct Events {
    buffer: Vec<u8>,
}

impl Events {
    fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole event's data; comments are passed over.
    fn next(&mut self) -> Option<String> {
        loop {
            let end = self.buffer.windows(2).position(|w| w == b"\n\n")?;
            let event: Vec<u8> = self.buffer.drain(..end + 2).collect();
            if let Some(data) = event[..end].strip_prefix(b"data:") {
                return Some(String::from_utf8_lossy(data).trim().to_string());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer() -> Answer {
        let now = Instant::now();
        Answer { sent: now, end: End::Complete, ended: now, chunks: Vec::new(), output_tokens: 0, prompt_tokens: 0, slow: false }
    }

    #[test]
    fn events_are_cut_wherever_the_network_cuts() {
        let stream = b"data: {\"a\": 1}\n\n: keep-alive\n\ndata:two\n\ndata: [DONE]\n\n";
        for size in [1, 3, 100] {
            let mut events = Events::default();
            let mut found = Vec::new();
            for bytes in stream.chunks(size) {
                events.push(bytes);
                found.extend(std::iter::from_fn(|| events.next()));
            }
            assert_eq!(found, ["{\"a\": 1}", "two", "[DONE]"]);
        }
    }

    #[test]
    fn chunks_of_any_server_are_read() {
        let mut answer = answer();
        assert_eq!(read_chunk(r#"{"choices": [{"text": "a\n", "index": 0}], "usage": null}"#, &mut answer), Ok(true));
        assert_eq!(read_chunk(r#"{"choices": [{"text": "", "finish_reason": "length"}]}"#, &mut answer), Ok(false));
        assert_eq!(read_chunk(r#"{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}}"#, &mut answer), Ok(false));
        assert_eq!((answer.prompt_tokens, answer.output_tokens), (3, 5));
        let error = read_chunk(r#"{"error": {"message": "late", "type": "server_error", "param": null, "code": "timeout"}}"#, &mut answer);
        assert_eq!(error, Err(failed("stream: server_error")));
    }

    #[test]
    fn a_429_has_to_say_when_to_come_back() {
        let response = |status: u16, after: Option<&str>| {
            let mut response = Response::builder().status(status);
            if let Some(after) = after {
                response = response.header(header::RETRY_AFTER, after);
            }
            refused(&response.body(()).unwrap())
        };
        assert_eq!(response(429, Some("3")), End::Refused(Duration::from_secs(3)));
        assert_eq!(response(429, None), failed("status 429 without Retry-After"));
        assert_eq!(response(503, Some("5")), failed("status 503"));
    }
}

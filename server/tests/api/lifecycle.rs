//! Beginning and end of the process.

use crate::harness::{Server, chunks, open, parse};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

fn long_stream(server: &Server, n: usize) -> TcpStream {
    let body = json!({"prompt": "On and on", "max_tokens": 1000, "temperature": 0, "ignore_eos": true, "stream": true, "n": n});
    let mut stream = open(&server.public, "POST", "/v1/completions", &[], Some(&body.to_string()));
    let mut first = [0; 64];
    stream.read_exact(&mut first).unwrap();
    assert!(first.starts_with(b"HTTP/1.1 200"));
    stream
}

fn rest(mut stream: TcpStream) -> String {
    let mut bytes = b"HTTP/1.1 200 OK\r\n".to_vec();
    let mut tail = Vec::new();
    stream.read_to_end(&mut tail).unwrap();
    // the head's first bytes were read before
    bytes.extend(&tail);
    parse(&bytes).body
}

#[test]
fn a_stream_that_runs_is_finished_and_then_the_server_ends_with_zero() {
    let mut server = Server::start(&[]);
    let stream = long_stream(&server, 4);
    server.signal("TERM");
    std::thread::sleep(Duration::from_millis(200));
    assert!(TcpStream::connect(&server.public).is_err(), "nothing new is accepted");
    let body = rest(stream);
    let ends: Vec<Value> = chunks(&body).iter().flat_map(|c| c["choices"].as_array().unwrap().clone()).filter(|c| !c["finish_reason"].is_null()).collect();
    assert_eq!(ends.len(), 4);
    assert!(ends.iter().all(|c| c["finish_reason"] == "length"));
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_stream_that_takes_too_long_is_ended_with_an_error() {
    let mut server = Server::start(&["--shutdown-timeout", "1"]);
    let stream = long_stream(&server, 32);
    server.signal("INT");
    let body = rest(stream);
    assert!(!body.contains("[DONE]"));
    let last: Value = serde_json::from_str(body.trim().rsplit("data: ").next().unwrap()).unwrap();
    assert_eq!(last["error"]["type"], "server_error", "{last}");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_second_signal_ends_it_at_once() {
    let mut server = Server::start(&[]);
    let _stream = long_stream(&server, 32);
    server.signal("TERM");
    std::thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(130));
    assert!(start.elapsed() < Duration::from_secs(2));
}

#[test]
fn an_idle_server_ends_soon_even_with_idle_connections() {
    let mut server = Server::start(&[]);
    let mut idle = TcpStream::connect(&server.public).unwrap();
    idle.write_all(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut some = [0; 16];
    idle.read_exact(&mut some).unwrap();
    let silent = TcpStream::connect(&server.public).unwrap();
    let start = Instant::now();
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    drop((idle, silent));
}

#[test]
fn an_empty_variable_is_no_setting() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_on(data.path(), &[], &[("EVOP_MODEL", ""), ("EVOP_MAX_QUEUE", ""), ("EVOP_API_KEYS", ""), ("EVOP_SERVED_MODEL_NAME", "")]);
    assert_eq!(server.get("/v1/models").ok()["data"][0]["id"], "evop-tiny");
}

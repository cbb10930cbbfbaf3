//! Clients that send or read too slowly don't hold the server.

use crate::harness::{PATIENCE, Server, open, parse, wait_for};
use serde_json::json;
use std::io::{Read, Write};
use std::net::TcpStream;

fn connect(server: &Server, bytes: &str) -> TcpStream {
    let mut stream = TcpStream::connect(&server.public).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(bytes.as_bytes()).unwrap();
    stream
}

fn rest(mut stream: TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn half_a_body_is_answered_408_and_half_a_head_not_at_all() {
    let server = Server::start(&["--body-timeout", "1", "--head-timeout", "1"]);
    let body = connect(&server, "POST /v1/completions HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 100\r\n\r\n{\"prompt\": ");
    let head = connect(&server, "POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-");
    let nothing = connect(&server, "");
    assert_eq!(parse(&rest(body)).status, 408);
    assert!(rest(nothing).is_empty());
    // some clients like to be told
    let answer = rest(head);
    assert!(answer.is_empty() || parse(&answer).status == 408);
    assert!(!server.greedy("Once", 3).is_empty());
}

#[test]
fn a_client_that_never_reads_loses_its_connection() {
    let server = Server::start(&["--write-timeout", "1"]);
    let files = || server.metric("process_open_fds");
    let before = files();
    // megabytes of log probabilities, more than the buffers on the way hold
    let body = json!({"prompt": "word ".repeat(400), "max_tokens": 1, "echo": true, "logprobs": 20, "n": 32, "temperature": 1});
    let stuck = open(&server.public, "POST", "/v1/completions", &[], Some(&body.to_string()));
    wait_for("it to be answered", || server.get("/metrics").body.contains("evop_http_requests_total{path=\"/v1/completions\",status=\"200\"} 1"));
    wait_for("its connection to be closed", || files() <= before);
    drop(stuck);
    assert_eq!(server.metric("evop_kv_blocks_used"), 0.0);
}

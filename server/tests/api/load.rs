//! Many requests at once: limits, cancelling, and answers that don't depend on the company.

use crate::harness::{Server, joined, open, wait_for};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::net::TcpStream;

/// A completion that is on its way and takes its time.
fn begin(server: &Server, max_tokens: usize) -> TcpStream {
    let body = json!({"prompt": "On and on", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "stream": true});
    open(&server.public, "POST", "/v1/completions", &[], Some(&body.to_string()))
}

#[test]
fn more_than_the_queue_holds_is_a_429_and_the_queue_still_moves() {
    let server = Server::start(&["--max-concurrent", "1", "--max-queue", "1"]);
    let running = begin(&server, 1000);
    wait_for("the first to run", || server.admin("GET", "/admin/v1/engine", None).ok()["engine"]["running"] == 1);
    let waiting = begin(&server, 1000);
    wait_for("the second to wait", || server.admin("GET", "/admin/v1/engine", None).ok()["engine"]["waiting"] == 1);
    let refused = server.complete(&json!({"prompt": "a", "max_tokens": 1}));
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert!(refused.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(refused.json()["error"]["type"], "rate_limit_error");
    assert_eq!(server.metric("vllm:admission_rejections_total"), 1.0);
    drop((running, waiting));
    wait_for("the places to be free", || server.complete(&json!({"prompt": "a", "max_tokens": 1})).status == 200);
}

#[test]
fn sixteen_streams_at_once_say_what_each_says_alone() {
    let server = Server::start(&[]);
    let prompts: Vec<String> =
        ["The sea", "A letter came", "He said", "In the morning", "My dear Watson", "The king", "Once", "It was a dark and stormy night, and"]
            .iter()
            .flat_map(|p| [(*p).to_string(), format!("{p} and then")])
            .collect();
    let alone: Vec<String> = prompts.iter().map(|p| server.greedy(p, 40)).collect();
    std::thread::scope(|scope| {
        let ask = |prompt: &String| {
            let body = json!({"prompt": prompt, "max_tokens": 40, "temperature": 0});
            let server = &server;
            scope.spawn(move || joined(&server.stream("/v1/completions", &body), 0))
        };
        let streams: Vec<_> = prompts.iter().map(ask).collect();
        for (stream, alone) in streams.into_iter().zip(&alone) {
            assert_eq!(stream.join().unwrap(), *alone);
        }
    });
}

#[test]
fn a_client_that_leaves_frees_its_memory_while_others_go_on() {
    let server = Server::start(&["--max-concurrent", "32"]);
    std::thread::scope(|scope| {
        let others: Vec<_> = (0..16)
            .map(|i| {
                let body = json!({"prompt": format!("Number {i}"), "max_tokens": 200, "temperature": 0, "ignore_eos": true});
                let server = &server;
                scope.spawn(move || server.stream("/v1/completions", &body).len())
            })
            .collect();
        let mut leaving = BufReader::new(begin(&server, 1000));
        let mut line = String::new();
        while !line.starts_with("data: ") {
            line.clear();
            leaving.read_line(&mut line).unwrap();
        }
        assert!(server.metric("evop_kv_blocks_used") >= 1.0);
        let aborted = "vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"evop-tiny\"}";
        assert_eq!(server.metric(aborted), 0.0);
        drop(leaving);
        wait_for("it to end", || server.metric(aborted) == 1.0);
        assert!(others.into_iter().all(|other| other.join().unwrap() > 10));
    });
    wait_for("all memory to be free", || server.metric("evop_kv_bytes_used") == 0.0);
}

#[test]
fn a_client_that_leaves_before_a_whole_answer_cancels_it_too() {
    let server = Server::start(&[]);
    let body = json!({"prompt": "On and on", "max_tokens": 1000, "temperature": 0, "ignore_eos": true, "n": 8});
    let leaving = open(&server.public, "POST", "/v1/completions", &[], Some(&body.to_string()));
    wait_for("it to run", || server.metric("evop_kv_bytes_used") > 0.0);
    drop(leaving);
    wait_for("its memory to be free", || server.metric("evop_kv_bytes_used") == 0.0);
    let finished = server.admin("GET", "/admin/v1/engine", None).ok()["engine"]["finished"].clone();
    assert_eq!(finished["cancelled"], 8, "{finished}");
}

#[test]
fn a_request_that_takes_too_long_ends() {
    let server = Server::start(&["--request-timeout", "1"]);
    let long = json!({"prompt": "On and on", "max_tokens": 1000, "temperature": 0, "ignore_eos": true, "n": 32});
    let answer = server.complete(&long);
    assert_eq!((answer.status, answer.json()["error"]["code"].clone()), (504, json!("timeout")));
    let mut streamed = long;
    streamed["stream"] = json!(true);
    let answer = server.complete(&streamed);
    assert_eq!(answer.status, 200);
    let last = answer.body.split("\n\n").filter_map(|e| e.strip_prefix("data: ")).last().unwrap();
    let last: Value = serde_json::from_str(last).unwrap();
    assert_eq!(last["error"]["code"], "timeout");
    wait_for("the memory to be free", || server.metric("evop_kv_bytes_used") == 0.0);
}

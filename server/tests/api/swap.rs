//! The hot swap.

use crate::harness::{Server, joined, wait_for};
use serde_json::json;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

fn tiny() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny").display().to_string()
}

#[test]
fn no_request_fails_while_models_are_swapped() {
    let server = Server::start(&["--model", &tiny()]);
    assert_eq!(server.get("/v1/models").ok()["data"][0]["id"], "tiny");
    let expected = server.greedy("Once upon a time", 60);
    let (stop, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for worker in 0..6 {
            let (server, stop, done, expected) = (&server, &stop, &done, &expected);
            scope.spawn(move || {
                let body = json!({"model": "tiny", "prompt": "Once upon a time", "max_tokens": 60, "temperature": 0});
                while !stop.load(Relaxed) {
                    let text = if worker % 2 == 0 { server.greedy("Once upon a time", 60) } else { joined(&server.stream("/v1/completions", &body), 0) };
                    assert_eq!(text, *expected);
                    done.fetch_add(1, Relaxed);
                }
            });
        }
        for _ in 0..4 {
            let before = done.load(Relaxed);
            wait_for("some requests", || done.load(Relaxed) >= before + 6);
            let answer = server.admin("POST", "/admin/v1/models/base/activate", None).ok();
            assert_eq!(answer["active"]["model"], "base");
        }
        let before = done.load(Relaxed);
        wait_for("some requests after the last swap", || done.load(Relaxed) >= before + 6);
        stop.store(true, Relaxed);
    });
    assert_eq!(server.metric("evop_model_swaps_total"), 4.0);
    wait_for("the old models to be gone", || server.admin("GET", "/admin/v1/engine", None).ok()["draining"] == json!([]));
}

#[test]
fn a_stream_finishes_on_the_model_that_it_began_on() {
    let server = Server::start(&[]);
    let body = json!({"prompt": "On and on", "max_tokens": 1000, "temperature": 0, "ignore_eos": true, "n": 4});
    std::thread::scope(|scope| {
        let stream = scope.spawn(|| server.stream("/v1/completions", &body));
        wait_for("it to run", || server.metric("evop_kv_bytes_used") > 0.0);
        server.admin("POST", "/admin/v1/models/base/activate", None).ok();
        let draining = server.admin("GET", "/admin/v1/engine", None).ok();
        assert_eq!(draining["draining"][0]["running"], 4, "{draining}");
        assert_eq!(draining["engine"]["running"], 0);
        let ends = stream.join().unwrap().iter().filter(|c| c["choices"][0]["finish_reason"] == "length").count();
        assert_eq!(ends, 4);
    });
    wait_for("the old model to be gone", || server.admin("GET", "/admin/v1/engine", None).ok()["draining"] == json!([]));
}

#[test]
fn a_model_that_is_not_there_is_not_activated() {
    let server = Server::start(&[]);
    let answer = server.admin("POST", "/admin/v1/models/nothing/activate", None);
    assert_eq!(answer.status, 404, "{}", answer.body);
    assert_eq!(server.greedy("a", 2), server.greedy("a", 2));
}

#[test]
fn a_model_that_does_not_fit_beside_the_current_one_is_a_409_with_the_numbers() {
    // twice what the machine has: memory that is only given when it is used
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let kib: usize = meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:")).unwrap().trim().trim_end_matches(" kB").parse().unwrap();
    let server = Server::start(&["--kv-memory", &format!("{}KiB", 2 * kib)]);
    let answer = server.admin("POST", "/admin/v1/models/base/activate", None);
    assert_eq!(answer.status, 409, "{}", answer.body);
    let message = answer.json()["error"]["message"].as_str().unwrap().to_string();
    let needed: usize = message.split("needs ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    assert!(needed >= 2 * kib / 1024 && message.contains("MiB are free"), "{message}");
    assert_eq!(server.complete(&json!({"prompt": "a", "max_tokens": 1})).status, 200);
}

#[test]
fn more_memory_for_keys_and_values_than_can_be_had_is_an_error_that_says_so() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_evop"))
        .args(["serve", "--port", "0", "--admin-addr", "127.0.0.1:0", "--kv-memory", "900TiB"])
        .output()
        .unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert!(message.contains("no memory for the key/value cache"), "{message}");
}

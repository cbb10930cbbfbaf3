//! Health, version, metrics, request ids.

use crate::harness::{Server, command, request};
use serde_json::json;
use std::collections::HashMap;

#[test]
fn a_server_that_is_ready_says_so() {
    let server = Server::start(&[]);
    for path in ["/health", "/live", "/ready", "/ping"] {
        assert_eq!(server.get(path).ok(), json!({"status": "ok"}));
    }
    assert_eq!(server.get("/version").ok()["version"], env!("CARGO_PKG_VERSION"));
    let health = |url: &str| command().args(["health", "--url", url]).output().unwrap();
    assert!(health(&format!("http://{}/health", server.public)).status.success());
    assert!(!health(&format!("http://{}/nothing", server.public)).status.success());
    assert!(!health("http://127.0.0.1:1/health").status.success());
}

#[test]
fn a_request_id_is_taken_or_made() {
    let server = Server::start(&[]);
    let with = |id: &str| request(&server.public, "GET", "/v1/models", &[("x-request-id", id)], None).header("x-request-id").unwrap().to_string();
    assert_eq!(with("trace-42"), "trace-42");
    assert!(with("has space").starts_with("req-"));
    assert!(with(&"x".repeat(500)).starts_with("req-"));
    assert!(server.get("/v1/models").header("x-request-id").unwrap().starts_with("req-"));
    request(&server.public, "POST", "/v1/completions", &[("x-request-id", "trace-43")], Some("{\"prompt\": \"a\", \"max_tokens\": 1}"));
    let log = server.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("/v1/completions")).collect();
    assert!(lines.len() == 2 && lines.iter().all(|line| line.contains("trace-43")), "{log}");
}

/// Checks the text format and returns the samples: name with labels to value.
fn samples(text: &str) -> HashMap<String, f64> {
    let mut kinds = HashMap::new();
    let mut samples = HashMap::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (what, name, rest) = (words.next().unwrap(), words.next().unwrap(), words.next().unwrap());
            assert!(what == "HELP" || what == "TYPE", "{line}");
            if what == "TYPE" {
                assert!(["counter", "gauge", "histogram"].contains(&rest), "{line}");
                assert!(kinds.insert(name.to_string(), rest.to_string()).is_none(), "{name} twice");
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').map_or((series, ""), |(name, labels)| (name, labels.strip_suffix('}').unwrap()));
        assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':'), "{line}");
        for label in labels.split("\",").filter(|l| !l.is_empty()) {
            let (key, value) = label.split_once("=\"").unwrap();
            assert!(key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && !value.contains('\n'), "{line}");
        }
        let family = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s)).filter(|f| kinds.get(*f).is_some_and(|k| k == "histogram"));
        assert!(kinds.contains_key(family.unwrap_or(name)), "no TYPE before {line}");
        assert!(samples.insert(series.to_string(), value.parse().unwrap()).is_none(), "{series} twice");
    }
    samples
}

#[test]
fn the_exposition_parses_and_counts() {
    let server = Server::start(&["--served-model-name", "served"]);
    server.complete(&json!({"prompt": "Once upon a time", "max_tokens": 5, "temperature": 0, "ignore_eos": true})).ok();
    server.stream("/v1/completions", &json!({"prompt": "Once upon a time", "max_tokens": 7, "temperature": 0, "ignore_eos": true}));
    // one that ends at a stop string: the engine doesn't know of it
    server.complete(&json!({"prompt": "Once upon a time", "max_tokens": 9, "temperature": 0, "stop": [" "]})).ok();
    assert_eq!(server.complete(&json!({"prompt": 5})).status, 400);
    let answer = server.get("/metrics");
    assert!(answer.header("content-type").unwrap().starts_with("text/plain"));
    let samples = samples(&answer.body);
    let labels = "engine=\"0\",model_name=\"served\"";
    let value = |name: &str| samples.get(name).copied().unwrap_or_else(|| panic!("no {name} in {}", answer.body));
    let stopped = value(&format!("vllm:generation_tokens_total{{{labels}}}")) - 12.0;
    assert!((1.0..9.0).contains(&stopped), "{stopped}");
    assert_eq!(value("vllm:request_success_total{engine=\"0\",finished_reason=\"stop\",model_name=\"served\"}"), 1.0);
    assert_eq!(value("vllm:request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"served\"}"), 2.0);
    assert_eq!(value("vllm:request_success_total{engine=\"0\",finished_reason=\"abort\",model_name=\"served\"}"), 0.0);
    assert_eq!(value(&format!("vllm:time_to_first_token_seconds_count{{{labels}}}")), 3.0);
    assert_eq!(value(&format!("vllm:inter_token_latency_seconds_count{{{labels}}}")), 10.0 + stopped - 1.0);
    for times in ["e2e_request_latency", "request_queue_time", "request_inference_time", "request_prefill_time", "request_decode_time"] {
        assert_eq!(value(&format!("vllm:{times}_seconds_count{{{labels}}}")), 3.0, "{times}");
    }
    // a step a token at least; each prompt and all tokens but the last of an answer were in one
    assert!(value(&format!("vllm:iteration_tokens_total_count{{{labels}}}")) >= 12.0 + stopped);
    let computed = value(&format!("vllm:prompt_tokens_total{{{labels}}}")) + 12.0 + stopped - 3.0;
    // (the engine goes on, at most to the 9 tokens, until it hears of the stop string)
    assert!((computed..=computed + 9.0 - stopped).contains(&value(&format!("vllm:iteration_tokens_total_sum{{{labels}}}"))));
    assert_eq!(value(&format!("vllm:e2e_request_latency_seconds_bucket{{{labels},le=\"7680\"}}")), 3.0);
    assert_eq!(value(&format!("vllm:num_requests_running{{{labels}}}")), 0.0);
    assert_eq!(value(&format!("vllm:num_requests_waiting{{{labels}}}")), 0.0);
    assert_eq!(value(&format!("vllm:kv_cache_usage_perc{{{labels}}}")), 0.0);
    assert_eq!(value("evop_http_requests_total{path=\"/v1/completions\",status=\"200\"}"), 3.0);
    assert_eq!(value("evop_http_requests_total{path=\"/v1/completions\",status=\"400\"}"), 1.0);
    assert_eq!(value("evop_kv_blocks_used"), 0.0);
    assert_eq!(value(&format!("vllm:num_preemptions_total{{{labels}}}")), 0.0);
    // a short prompt fills no block: all of it was looked for, nothing found
    assert!(value(&format!("vllm:prefix_cache_queries_total{{{labels}}}")) >= 8.0);
    assert_eq!(value(&format!("vllm:prefix_cache_hits_total{{{labels}}}")), 0.0);
    assert_eq!(value("evop_ready"), 1.0);
    assert!(samples.keys().any(|s| s.starts_with("vllm:cache_config_info{block_size=\"32\"") && s.contains("num_gpu_blocks")));
}

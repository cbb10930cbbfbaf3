//! `evop bench serve`: loads, misbehaving clients, fairness, against a server from outside and against its own.

use crate::harness::{Server, command};
use serde_json::Value;
use std::process::Output;

fn bench(arguments: &[&str]) -> Output {
    command().args(["bench", "serve", "--json"]).args(arguments).output().unwrap()
}

/// The report, after seeing that all went well.
fn report(output: &Output) -> Value {
    assert!(output.status.success(), "{} {}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_closed_loop_reports_rates_and_latencies_of_every_level() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_on(data.path(), &[], &[("EVOP_API_KEYS", "secret")]);
    let url = format!("http://{}", server.public);
    let options = ["--concurrency", "1,3", "--requests", "6", "--prompt-tokens", "20", "--output-tokens", "5"];
    let report = report(&bench(&[&["--url", &url, "--api-key", "secret"][..], &options].concat()));
    let levels = report["levels"].as_array().unwrap();
    assert_eq!([&levels[0]["concurrency"], &levels[1]["concurrency"]], [1, 3]);
    for level in levels {
        assert_eq!((&level["complete"], &level["refused"], &level["errors"]), (&6.into(), &0.into(), &serde_json::json!({})), "{level}");
        let tokens = level["output_tokens_per_second"].as_f64().unwrap() * level["seconds"].as_f64().unwrap();
        assert_eq!(tokens.round(), 30.0);
        for times in ["time_to_first_token", "inter_token_latency", "end_to_end"] {
            let [p50, p95, p99] = ["p50", "p95", "p99"].map(|p| level[times][p].as_f64().unwrap());
            assert!(0.0 <= p50 && p50 <= p95 && p95 <= p99, "{times} {level}");
        }
        assert!(level["time_to_first_token"]["p50"].as_f64().unwrap() <= level["end_to_end"]["p50"].as_f64().unwrap());
    }
    assert!(report["server_after"]["resident_bytes"].as_u64().unwrap() > 1_000_000);
    // 13 requests, the first one included
    assert_eq!(server.metric("evop_http_requests_total{path=\"/v1/completions\",status=\"200\"}"), 13.0);
    let refused = bench(&["--url", &url, "--api-key", "wrong", "--requests", "1"]);
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("status 401"));
}

#[test]
fn an_open_loop_on_a_server_of_its_own_answers_lines_of_a_file() {
    let data = tempfile::tempdir().unwrap();
    let prompts = data.path().join("prompts");
    std::fs::write(&prompts, "Once upon a time\nThe sea was calm\n").unwrap();
    let options = ["--rate", "20", "--requests", "10", "--output-tokens", "3", "--prompts", prompts.to_str().unwrap()];
    let report = report(&bench(&[&options[..], &["--", "--max-concurrent", "4"]].concat()));
    assert_eq!((&report["levels"][0]["rate"], &report["levels"][0]["complete"]), (&20.0.into(), &10.into()));
}

#[test]
fn clients_that_hang_up_read_slowly_or_send_half_leave_nothing_behind() {
    let server = Server::start(&["--max-concurrent", "8", "--max-queue", "4"]);
    let url = format!("http://{}", server.public);
    let load = ["--concurrency", "48", "--requests", "300", "--prompt-tokens", "40", "--output-tokens", "40"];
    let output = bench(&[&["--url", &url, "--disconnect", "0.3", "--slow-readers", "0.05", "--half-bodies", "0.1"][..], &load].concat());
    let report = report(&output);
    let level = &report["levels"][0];
    for ends in ["complete", "refused", "hung_up", "half_bodies", "slow_readers"] {
        assert!(level[ends].as_u64().unwrap() > 0, "{ends}: {level}");
    }
    assert_eq!(level["errors"], serde_json::json!({}));
    let after = &report["server_after"];
    assert_eq!((&after["kv_blocks_used"], &after["running"], &after["waiting"]), (&0.into(), &0.into(), &0.into()));
    assert_eq!(server.greedy("Once", 3), Server::start(&[]).greedy("Once", 3), "the server answers as a fresh one does");
}

#[test]
fn a_long_prompt_among_chats_is_measured() {
    let options = ["--intruder-tokens", "700", "--chats", "3", "--chat-tokens", "900", "--prompt-tokens", "10", "--rounds", "2"];
    let report = report(&bench(&options));
    let rounds = report["rounds"].as_array().unwrap();
    assert_eq!(rounds.len(), 2);
    for round in rounds {
        let [before, during, undisturbed] = ["before", "during", "undisturbed"].map(|time| round[time]["p99"].as_f64().unwrap());
        assert!((round["ratio_p99"].as_f64().unwrap() - during / undisturbed).abs() < 1e-9 && before > 0.0 && undisturbed > 0.0);
    }
    let short = bench(&["--intruder-tokens", "700", "--chats", "2", "--chat-tokens", "20", "--rounds", "1"]);
    assert!(!short.status.success() && String::from_utf8_lossy(&short.stderr).contains("a chat ended"));
}

#[test]
fn a_prompt_whose_beginning_is_cached_is_answered_sooner() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_on(data.path(), &[], &[]);
    let url = format!("http://{}", server.public);
    let report = report(&bench(&["--url", &url, "--shared-prefix", "640", "--prompt-tokens", "8", "--output-tokens", "2", "--rounds", "3"]));
    let pairs = report["pairs"].as_array().unwrap();
    assert_eq!(pairs.len(), 3);
    let mut ratios: Vec<f64> = pairs.iter().map(|pair| pair["second"].as_f64().unwrap() / pair["first"].as_f64().unwrap()).collect();
    ratios.sort_by(f64::total_cmp);
    assert_eq!(report["median_ratio_second"].as_f64().unwrap(), ratios[1]);
    // 20 blocks of 32 tokens of each pair were found again
    assert_eq!(server.metric("vllm:prefix_cache_hits_total"), 3.0 * 640.0);
}

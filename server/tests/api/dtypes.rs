//! `--dtype` and `--kv-dtype` from outside: what is in memory, and what it costs.

use crate::harness::{Server, command};
use serde_json::{Value, json};
use std::path::Path;

/// Runs the binary in `directory`: its standard output and error, or its refusal.
fn evop(directory: &Path, arguments: &[&str]) -> Result<(String, String), String> {
    let output = command().args(arguments).current_dir(directory).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok((text(output.stdout), text(output.stderr))) } else { Err(text(output.stderr)) }
}

fn json_of(directory: &Path, arguments: &[&str]) -> Value {
    serde_json::from_str(&evop(directory, &[arguments, &["--json"]].concat()).unwrap().0).unwrap()
}

#[test]
fn every_type_scores_near_f32_and_says_what_it_is_in_memory() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let perplexity = |dtype: &str| {
        let result = json_of(at, &["eval", "--max-characters", "20000", "--window", "128", "--dtype", dtype, "--device", "cpu"]);
        result["perplexity"].as_f64().unwrap()
    };
    let exact = perplexity("f32");
    // (the bundled model's rows of 128 and 384 weights are 5-bit blocks under q4_k)
    for (dtype, within) in [("f16", 1e-3), ("bf16", 5e-3), ("q8_0", 1e-2), ("q4_k", 5e-2)] {
        let found = perplexity(dtype);
        assert!((found / exact).ln().abs() < within, "{dtype}: {found} for {exact}");
    }
    let held = |dtype: &str| json_of(at, &["inspect", "--dtype", dtype])["in_memory"].clone();
    assert_eq!(held("f16"), json!({"f16": {"tensors": 85, "bytes": 2 * 2_883_584}}));
    let types: Vec<String> = held("q4_k").as_object().unwrap().keys().cloned().collect();
    assert_eq!(types, ["q5_0", "q8_0"]);
    let (_, said) = evop(at, &["eval", "--max-characters", "1000", "--dtype", "q4_k", "--device", "cpu"]).unwrap();
    assert!(said.contains("warning: 85 matrices whose rows are no multiple of 256 weights are not in q4_k"), "{said}");
    for what in ["decode", "prefill"] {
        for dtype in ["f16", "q4_k"] {
            let lines = json_of(at, &["bench", what, "--dtype", dtype, "--kv-dtype", "f16", "--repeats", "1", "--device", "cpu"]);
            assert!(lines[0]["tokens_per_second"][0].as_f64().unwrap() > 0.0, "{what} {dtype}");
        }
    }
}

#[test]
fn a_gguf_is_served_in_its_own_types_unless_another_one_is_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    for kind in ["f32", "f16", "bf16", "q8_0"] {
        let file = format!("{kind}.gguf");
        evop(at, &["export", "--format", "gguf", "--type", kind, "--out", &file]).unwrap();
        let held = json_of(at, &["inspect", &file])["in_memory"].clone();
        assert_eq!(held.as_object().unwrap().keys().collect::<Vec<_>>(), [kind], "{file}");
    }
    let held = json_of(at, &["inspect", "f32.gguf", "--dtype", "q8_0"])["in_memory"].clone();
    assert_eq!(held.as_object().unwrap().keys().collect::<Vec<_>>(), ["q8_0"]);
    let file = at.join("f16.gguf");
    let served = |more: &[&str]| {
        let server = Server::start(&[&["--model", file.to_str().unwrap(), "--device", "cpu"], more].concat());
        (server.greedy("The old man", 12), server.log())
    };
    let (own, log) = served(&[]);
    assert!(log.contains(r#""weights":"f16 5.8 MB""#), "{log}");
    let (asked, log) = served(&["--dtype", "f32"]);
    assert!(log.contains(r#""weights":"f32 11.5 MB""#), "{log}");
    assert_eq!(own, asked, "the same numbers, and sums in f32");
    // evaluated in f32, or as it would be served
    evop(at, &["export", "--format", "gguf", "--type", "q4_k", "--out", "small.gguf"]).unwrap();
    let perplexity = |dtype: &str| {
        json_of(at, &["eval", "--model", "small.gguf", "--max-characters", "10000", "--window", "128", "--dtype", dtype])["perplexity"].as_f64().unwrap()
    };
    let (exact, stored) = (perplexity("auto"), perplexity("stored"));
    assert!(exact != stored && (stored / exact).ln().abs() < 1e-2, "{stored} for {exact}");
    let refused = evop(at, &["prune", "--dtype", "stored", "--out", "x"]).unwrap_err();
    assert!(refused.contains("weights in stored can be run, not changed: load the model with --dtype f32, bf16 or f16"), "{refused}");
}

#[test]
fn keys_and_values_in_f16_take_half_of_the_memory_and_answer_the_same() {
    let start = |dtype: &str| Server::start(&["--kv-dtype", dtype, "--dtype", "f32", "--device", "cpu"]);
    let [wide, half] = ["f32", "f16"].map(start);
    let bytes = |server: &Server| server.get("/v1/models").json()["data"][0]["evop"]["kv_bytes_per_token"].as_u64().unwrap();
    assert_eq!(bytes(&wide), 2 * bytes(&half));
    assert_eq!(wide.greedy("It was a dark night, and", 40), half.greedy("It was a dark night, and", 40));
    assert!(half.log().contains(r#""kv_dtype":"f16""#));
}

//! `evop eval` from outside.

use crate::harness::command;
use serde_json::Value;
use std::path::Path;

fn eval(arguments: &[&str]) -> (bool, String, String) {
    let output = command().arg("eval").args(arguments).output().unwrap();
    (output.status.success(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn json(arguments: &[&str]) -> Value {
    let (ok, out, err) = eval(&[arguments, &["--json"]].concat());
    assert!(ok, "{err}");
    serde_json::from_str(&out).unwrap()
}

fn write(directory: &Path, name: &str, text: &str) -> String {
    let path = directory.join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_string()
}

#[test]
fn tasks_are_scored_in_a_table_as_json_and_item_by_item() {
    let directory = tempfile::tempdir().unwrap();
    let targets =
        write(directory.path(), "words.jsonl", "{\"context\": \"Once upon a\", \"target\": \" time\"}\n{\"context\": \"Once upon\", \"target\": \" a\"}\n");
    let items = directory.path().join("items.jsonl");
    let arguments = ["--tasks", &format!("books,{targets}"), "--limit", "10", "--items", items.to_str().unwrap()];
    let result = json(&arguments);
    let tasks = result["tasks"].as_array().unwrap();
    assert_eq!((&tasks[0]["task"], &tasks[0]["n"], &tasks[1]["task"], &tasks[1]["n"]), (&"books".into(), &10.into(), &"words".into(), &2.into()));
    assert!(tasks[0]["acc_norm"]["stderr"].is_number() && tasks[1]["acc_norm"].is_null() && tasks[1]["perplexity"].as_f64().unwrap() > 1.0, "{result}");
    assert_eq!((result.get("perplexity"), &result["model"]["kv_bytes_per_token_16bit"]), (None, &3072.into()));
    assert_eq!(std::fs::read_to_string(&items).unwrap().lines().count(), 12);

    let (ok, out, err) = eval(&arguments);
    assert!(ok, "{err}");
    for text in ["task ", "acc_norm", "books ", "words ", "±", "context of 1024 tokens", "2.887 M parameters", "3072 bytes per token"] {
        assert!(out.contains(text), "expected {text:?} in {out}");
    }
}

#[test]
fn rows_are_joined_by_blank_lines_when_asked_and_only_then() {
    let directory = tempfile::tempdir().unwrap();
    let rows = write(directory.path(), "wiki.raw", &" \n = Title = \n \n The fox said that he was tired of it . \n".repeat(20));
    let joined = write(directory.path(), "joined.txt", &evop_pruning::eval::join_rows(&std::fs::read_to_string(&rows).unwrap()));
    let perplexity = |arguments: &[&str]| json(&[arguments, &["--window", "64"]].concat())["perplexity"].as_f64().unwrap();
    assert_eq!(perplexity(&["--text", &rows, "--join-rows"]), perplexity(&["--text", &joined]));
    assert_ne!(perplexity(&["--text", &rows]), perplexity(&["--text", &joined]));
}

#[test]
fn what_cant_be_evaluated_is_refused_before_anything_is_computed() {
    let directory = tempfile::tempdir().unwrap();
    let bad = write(directory.path(), "bad.jsonl", "{\"query\": \"q\"}\n");
    let text = write(directory.path(), "text.jsonl", "{\"text\": \"Some text.\"}\n");
    let cases: [(&[&str], &str); 7] = [
        (&["--tasks", &bad], "bad.jsonl: line 1: expected"),
        (&["--tasks", "missing.jsonl"], "missing.jsonl"),
        (&["--tasks", "books", "--limit", "0"], "--limit: expected at least 1"),
        (&["--tasks", "books", "--window", "64"], "name its text with --text"),
        (&["--tasks", "books", "--items", "/nonexistent/items.jsonl"], "--items: /nonexistent"),
        (&["--text", &text, "--join-rows"], "leave the option out"),
        (&["--limit", "3"], "--tasks"),
    ];
    for (arguments, expected) in cases {
        let (ok, out, err) = eval(arguments);
        assert!(!ok && out.is_empty() && err.contains(expected), "{arguments:?}: expected {expected:?} in {err}");
    }
}

#[test]
fn a_checkpoint_says_what_it_kept_and_warns_of_its_own_calibration_text() {
    let directory = tempfile::tempdir().unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny");
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(model.join(file), directory.path().join(file)).unwrap();
    }
    let corpus = write(directory.path(), "corpus.txt", &"It was a dark night, and the old man was tired of it. ".repeat(20));
    let provenance = serde_json::json!({"parameters": {"dense": 5_773_568, "pruned": 2_886_784}, "calibration": {"corpora": ["corpus.txt"]}});
    write(directory.path(), "evop.json", &provenance.to_string());
    let (ok, out, err) = eval(&["--model", directory.path().to_str().unwrap(), "--text", &corpus, "--window", "64"]);
    assert!(ok && err.contains("warning") && err.contains("calibrated on a text of this name"), "{err}");
    assert!(out.contains("2.887 M of 5.774 M parameters (50.0%)"), "{out}");
}

//! `evop vocab`: the commands of docs/checkpoints.md, on the bundled model.

use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

/// Runs the binary in `directory`; standard output, or the text of its refusal.
fn evop(directory: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(env!("CARGO_BIN_EXE_evop")).args(arguments).current_dir(directory).env_remove("EVOP_MODEL").output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

const BOOKS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny/calibration.txt.gz");

const TEXT: &str = "The old man looked out over the harbour before he spoke. It was the best of times, it was the worst of times, and he knew it.\n";

#[test]
fn a_smaller_vocabulary_is_evaluated_exported_and_cut_again() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    std::fs::write(at.join("text.jsonl"), format!("{}\n", json!({"text": TEXT.repeat(20)}))).unwrap();
    std::fs::write(at.join("text.txt"), TEXT.repeat(20)).unwrap();

    let printed = evop(at, &["vocab", "--corpus", BOOKS, "text.jsonl", "--out", "books"]).unwrap();
    assert!(
        printed.contains("calibration.txt.gz: 1 documents, ") && printed.contains("tokens as before") && printed.contains("chat template: 2 documents"),
        "{printed}"
    );
    let small: Value =
        serde_json::from_str(&evop(at, &["vocab", "--model", "books", "--corpus", "text.jsonl", "--out", "small", "--multiple", "64", "--json"]).unwrap())
            .unwrap();
    let after = small["vocabulary"]["after"].as_u64().unwrap();
    assert!(after < 500 && after.is_multiple_of(64), "{after}");
    assert_eq!(small["vocabulary"]["corpora"][0]["before"], small["vocabulary"]["corpora"][0]["after"]);

    let inspected: Value = serde_json::from_str(&evop(at, &["inspect", "small", "--json"]).unwrap()).unwrap();
    assert_eq!((&inspected["vocab_size"], &inspected["parameters"]), (&json!(after), &small["vocabulary"]["parameters"][1]));
    assert_eq!(inspected["provenance"]["vocabulary"]["after"], json!(after));
    evop(at, &["export", "small", "--format", "gguf", "--out", "small.gguf"]).unwrap();
    let perplexity = |model: &str| -> Value {
        let result: Value = serde_json::from_str(&evop(at, &["eval", "--model", model, "--text", "text.txt", "--window", "64", "--json"]).unwrap()).unwrap();
        json!([result["perplexity"], result["predicted_tokens"]])
    };
    assert_eq!(perplexity("small"), perplexity("small.gguf"));
    let (whole, cut) = (perplexity("books"), perplexity("small"));
    // the same logits with fewer others in the softmax
    assert_eq!(whole[1], cut[1]);
    assert!(cut[0].as_f64() < whole[0].as_f64(), "{cut} {whole}");
}

#[test]
fn what_cant_be_cut_is_refused_with_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    std::fs::create_dir(at.join("taken")).unwrap();
    std::fs::write(at.join("taken/notes.txt"), "mine").unwrap();
    std::fs::write(at.join("empty.txt"), "").unwrap();
    std::fs::write(at.join("text.txt"), TEXT).unwrap();
    for (arguments, part) in [
        (&["--out", "x"][..], "--corpus"),
        (&["--corpus", "empty.txt", "--out", "x"], "--corpus: empty.txt: expected text, found none"),
        (&["--corpus", "nowhere.txt", "--out", "x"], "nowhere.txt"),
        (&["--corpus", "text.txt", "--out", "taken"], "taken: expected an empty directory or none"),
        (&["--corpus", "text.txt", "--out", "text.txt"], "--out: text.txt"),
        (&["--corpus", "text.txt", "--out", "x", "--keep-at-least", "5000"], "--keep-at-least: expected a vocabulary of 5000, the tokenizer has only 4096"),
        (&["--corpus", "text.txt", "--out", "x", "--keep-at-least", "500", "--min-count", "2"], "cannot be used with"),
        (&["--corpus", "text.txt", "--out", "x", "--type", "q8_0"], "q8_0 is a type of GGUF files"),
    ] {
        let error = evop(at, &[&["vocab"], arguments].concat()).unwrap_err();
        assert!(error.contains(part), "{part:?} isn't in {error:?}");
        assert!(!at.join("x").exists());
    }
}

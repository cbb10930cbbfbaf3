//! `evop compare` from outside: what it writes, what it takes of a comparison that was begun before, and what it refuses.

use crate::harness::command;
use serde_json::{Value, json};
use std::path::Path;
use std::process::Output;

/// What is calibrated on and, which is to be warned of, evaluated too.
const README: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
const SMALL: &str = "--mixing random --sequences 2 --sequence-length 48 --statistics-tokens 960 --held-out-tokens 96 --eval-window 64 --eval-tokens 512";

fn compare(out: &Path, options: &str, more: &[&str]) -> Output {
    let mut command = command();
    command.args(["compare", "--progress", "none", "--calibration", README, "--eval-text", README]);
    command.args(options.split(' ')).args(more).arg("--out").arg(out).output().unwrap()
}

/// Standard output and standard error, after seeing that all went well.
fn finished(output: &Output) -> (String, String) {
    let (out, err) = (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(output.status.success(), "{err}");
    (out, err)
}

/// Exit status and error text of a refusal.
fn refused(output: &Output) -> (Option<i32>, String) {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !text.contains("panicked"), "{text}");
    (output.status.code(), text)
}

fn read(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn a_comparison_goes_on_with_more_of_the_same_and_refuses_to_become_another() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("comparison");
    let rows = || read(&out.join("compare.json"));
    let (table, warnings) = finished(&compare(&out, SMALL, &["--strategies", "magnitude"]));
    let html = std::fs::read_to_string(out.join("compare.html")).unwrap();
    assert!(warnings.contains("warning: README.md"), "{warnings}");
    for part in ["perplexity of README.md: 8 windows of 64 tokens", "calibrated on README.md: 96 tokens scored", "warning: README.md", "evaluations"] {
        assert!(table.contains(part) && html.contains(part), "expected {part:?} in {table}");
    }
    let two = rows();
    let (dense, magnitude) = (&two[0], &two[1]);
    assert_eq!((&dense["strategy"], &magnitude["strategy"], &magnitude["kv_bytes_per_token"]), (&json!("dense"), &json!("magnitude"), &json!(3072)));
    assert_eq!((&magnitude["calibration"]["corpora"], &magnitude["calibrated_on"]), (&json!(["README.md"]), &json!(["README.md"])));
    assert!(magnitude["perplexity"]["README.md"]["mean_nll"].as_f64() > dense["perplexity"]["README.md"]["mean_nll"].as_f64());

    // a row that is there is taken as it is, and what it lacks is measured; what there is from before options were kept is gone on with
    let kept = out.join("rows/magnitude-0.25-31.json");
    let mut row = read(&kept);
    row["block_forwards"] = json!(123_456_789);
    std::fs::write(&kept, row.to_string()).unwrap();
    std::fs::remove_file(out.join("options.json")).unwrap();
    finished(&compare(&out, SMALL, &["--strategies", "magnitude,flap", "--tasks", "books", "--limit", "4"]));
    let three = rows();
    assert_eq!((three.as_array().unwrap().len(), &three[1]["block_forwards"], &three[2]["strategy"]), (3, &json!(123_456_789), &json!("flap")));
    assert!((0..3).all(|i| three[i]["tasks"][0]["n"] == 4), "{three}");

    for (old, new, difference) in [
        ("--sequences 2", "--sequences 3", "--sequences: 2 then, 3 now"),
        ("--eval-window 64", "--eval-window 32", "--eval-window: 64 then, 32 now"),
        ("--mixing random", "--mixing random --fitness nll", "--fitness: the default then, \"nll\" now"),
    ] {
        let (_, error) = refused(&compare(&out, &SMALL.replace(old, new), &["--strategies", "magnitude"]));
        assert!(error.contains(difference) && error.contains("another --out"), "{error}");
        assert_eq!(rows(), three);
    }

    // a run of its own is calibrated on the comparison's sequences
    let set = out.join("calibration-31.json");
    let pruned = directory.path().join("pruned");
    let prune = |more: &[&str]| {
        let mut command = command();
        command.args(["prune", "--progress", "none", "--strategy", "magnitude", "--eval-window", "64", "--calibration-set"]).arg(&set);
        command.arg("--levels").arg(out.join("levels")).args(more).arg("--out").arg(&pruned).output().unwrap()
    };
    for (more, text) in
        [(["--sequences", "3"], "cannot be used with"), (["--width-multiple", "0"], "--width-multiple"), (["--width-steps", "0"], "--width-steps")]
    {
        let (code, error) = refused(&prune(&more));
        assert!(code == Some(2) && error.contains(text), "{error}");
    }
    finished(&prune(&[]));
    assert_eq!(read(&pruned.join("calibration.json")), read(&set));
    assert_eq!(read(&pruned.join("run.json"))["calibration_set"], json!(set));
    assert_eq!(read(&pruned.join("evop.json"))["calibration"]["tokens"][0], json!(96));
    assert!(std::fs::read_to_string(pruned.join("report.html")).unwrap().contains("--calibration-set"));
}

#[test]
fn sequences_longer_than_the_models_context_are_refused_before_anything_is_computed() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("comparison");
    let (_, error) = refused(&compare(&out, "--sequence-length 1025", &["--strategies", "magnitude"]));
    assert!(error.contains("--sequence-length") && error.contains("1024") && error.contains("1025"), "{error}");
    assert!(!out.exists());
}

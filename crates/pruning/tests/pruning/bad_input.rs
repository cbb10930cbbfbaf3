//! What can't be pruned is refused with a text that says why and what to do.

use crate::setting::{book, options, prune, tiny};
use evop_pruning::calibration::{Calibration, CalibrationOptions};
use evop_pruning::search::{Space, Strategy};
use evop_pruning::{HiddenStates, eval};

fn refused(result: evop_pruning::Result<impl std::fmt::Debug>, texts: &[&str]) {
    let error = result.unwrap_err().to_string();
    for text in texts {
        assert!(error.contains(text), "expected {text:?} in {error:?}");
    }
}

#[test]
fn sparsities_outside_of_0_to_1_are_refused() {
    for sparsity in [0.0, 1.0, 1.5, -0.1, f64::NAN, 0.99] {
        let directory = tempfile::tempdir().unwrap();
        let wrong = evop_pruning::run::PruneOptions { sparsity, ..options(Strategy::Evop, Space::Layer) };
        refused(prune(directory.path(), &wrong, &mut |_| Ok(())), &["--sparsity", "expected"]);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left behind");
    }
}

#[test]
fn a_corpus_that_is_empty_or_too_short_is_refused() {
    let (checkpoint, decoder) = tiny();
    let embedder = HiddenStates { decoder: &decoder, tokenizer: checkpoint.tokenizer(), max_tokens: 64 };
    let sample = |text: &str| Calibration::sample(text, checkpoint.tokenizer(), &embedder, &CalibrationOptions::default(), |_| {});
    refused(sample(""), &["empty"]);
    refused(sample("\n\n   \n"), &["empty"]);
    refused(sample("Too short."), &["fewer than one sequence of 2048", "--sequence-length"]);
}

#[test]
fn one_document_again_and_again_still_calibrates() {
    let (checkpoint, decoder) = tiny();
    let embedder = HiddenStates { decoder: &decoder, tokenizer: checkpoint.tokenizer(), max_tokens: 64 };
    let text = "It was a dark night. ".repeat(6_000);
    let options = CalibrationOptions { sequence_length: 100, ..Default::default() };
    let calibration = Calibration::sample(&text, checkpoint.tokenizer(), &embedder, &options, |_| {}).unwrap();
    assert_eq!(calibration.sequences.len(), 5);
}

#[test]
fn a_directory_that_holds_a_run_or_another_models_run_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let small = options(Strategy::Shortgpt, Space::Layer);
    prune(directory.path(), &small, &mut |_| Ok(())).unwrap();
    let run = evop_pruning::run::inputs(directory.path()).unwrap();
    let (checkpoint, _) = tiny();
    refused(evop_pruning::run::begin(directory.path(), &run, checkpoint.config()), &["holds", "--out"]);
    let other = tempfile::tempdir().unwrap();
    evop_pruning::run::begin(other.path(), &evop_pruning::run::Run { model_sha256: "0".into(), ..run }, checkpoint.config()).unwrap();
    refused(prune(other.path(), &small, &mut |_| Ok(())), &["another model"]);
    refused(evop_pruning::run::inputs(std::path::Path::new("/nonexistent")), &["expected a run directory"]);
}

#[test]
fn windows_that_the_model_cant_hold_are_refused() {
    let (checkpoint, decoder) = tiny();
    let tokens = checkpoint.encode(&book("held-out.txt.gz", 9_000), false).unwrap();
    refused(eval::perplexity(&decoder, &tokens, 1025, |_, _| {}), &["--window", "1024"]);
    refused(eval::perplexity(&decoder, &tokens, 1, |_, _| {}), &["--window"]);
    refused(eval::perplexity(&decoder, &[3], 16, |_, _| {}), &["at least 2 tokens"]);
}

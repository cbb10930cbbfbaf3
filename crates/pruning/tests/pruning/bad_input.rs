//! What can't be pruned is refused with a text that says why and what to do.

use crate::setting::{book, corpus, options, prune, tiny};
use evop_model::Linear;
use evop_pruning::budget::{Budget, Resource};
use evop_pruning::calibration::{Calibration, CalibrationOptions, Mixing};
use evop_pruning::checkpoint;
use evop_pruning::run::{self, Inputs, PruneOptions, Run};
use evop_pruning::search::Strategy;
use evop_pruning::space::{Grid, Space};
use evop_pruning::{HiddenStates, eval};

fn refused(result: evop_pruning::Result<impl std::fmt::Debug>, texts: &[&str]) {
    let error = result.unwrap_err().to_string();
    for text in texts {
        assert!(error.contains(text), "expected {text:?} in {error:?}");
    }
}

#[test]
fn budgets_that_no_pattern_meets_are_refused() {
    for wrong in [0.0, 1.0, 1.5, -0.1, f64::NAN] {
        refused(Budget::removing(wrong), &["--sparsity", "expected"]);
        refused(Budget::new(Resource::Kv, wrong), &["--kv", "expected"]);
    }
    for (space, keep) in [(Space::Layer, 0.01), (Space::Width, 0.2), (Space::Layer, 0.05)] {
        let directory = tempfile::tempdir().unwrap();
        let mut options = options(Strategy::Evop, space);
        options.space.budgets = vec![Budget::new(Resource::Params, keep).unwrap()];
        refused(prune(directory.path(), &options, &mut |_| Ok(())), &["--params", "expected a larger"]);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left behind");
    }
    let directory = tempfile::tempdir().unwrap();
    let mut options = options(Strategy::Evop, Space::Layer);
    options.space.budgets.clear();
    refused(prune(directory.path(), &options, &mut |_| Ok(())), &["expected a budget"]);
}

#[test]
fn numbers_that_no_search_can_run_with_are_refused_before_anything_is_computed() {
    let refused_with = |strategy: Strategy, change: &dyn Fn(&mut PruneOptions), texts: &[&str]| {
        let mut options = options(strategy, strategy.recipe().space);
        change(&mut options);
        let directory = tempfile::tempdir().unwrap();
        refused(prune(directory.path(), &options, &mut |_| Ok(())), texts);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left behind");
    };
    refused_with(Strategy::Joint, &|o| o.search.joint.offspring = 0, &["--offspring", "at least 1"]);
    refused_with(Strategy::Evop, &|o| o.search.evop.population = 1, &["--population", "at least 2"]);
    refused_with(Strategy::Pareto, &|o| o.search.pareto.least = 1.5, &["--pareto-least", "found 1.5"]);
    refused_with(Strategy::Pareto, &|o| o.search.pareto.least = f64::NAN, &["--pareto-least"]);
    refused_with(Strategy::RandomJoint, &|o| o.search.evaluations = 0, &["--evaluations", "found 0"]);
    refused_with(Strategy::PolicyGradient, &|o| o.search.evaluations = 1, &["--evaluations", "expected at least"]);
    refused_with(Strategy::Joint, &|o| o.objective.key_tokens = -0.1, &["--key-tokens", "found -0.1"]);
    refused_with(Strategy::Joint, &|o| o.space.grid.steps = 0, &["--width-steps", "at least 1"]);
    refused_with(Strategy::Joint, &|o| o.space.grid.multiple = Some(0), &["--width-multiple", "at least 1"]);
    // a genome's option is a byte
    refused_with(Strategy::Joint, &|o| o.space.grid = Grid { steps: 384, multiple: Some(1) }, &["--width-steps", "385 options", "at most 255"]);
    let uniform = |o: &mut PruneOptions| {
        o.space.uniform = true;
        o.space.grid = Grid { steps: 384, multiple: Some(1) };
    };
    refused_with(Strategy::Joint, &uniform, &["--width-steps", "384 options"]);
    let timed = |o: &mut PruneOptions| {
        o.space.budgets = vec![Budget::new(Resource::Latency, 0.5).unwrap()];
        o.space.grid.steps = 0;
    };
    refused_with(Strategy::Joint, &timed, &["--width-steps"]);
    refused_with(Strategy::Joint, &|o| o.calibration.sequence_length = 1025, &["--sequence-length", "at most 1024", "found 1025"]);
    refused_with(Strategy::Joint, &|o| o.calibration.sequences = 0, &["--sequences", "at least 1"]);
}

#[test]
fn a_corpus_that_is_empty_or_too_short_is_refused() {
    let (checkpoint, decoder) = tiny();
    let embedder = HiddenStates { decoder: &decoder, tokenizer: checkpoint.tokenizer(), max_tokens: 64 };
    let sample = |text: &str| Calibration::sample(&corpus(text), checkpoint.tokenizer(), &embedder, &CalibrationOptions::paper(), |_| {});
    refused(sample(""), &["empty"]);
    refused(sample("\n\n   \n"), &["empty"]);
    refused(sample("Too short."), &["fewer than one sequence of 2048", "--sequence-length"]);
}

#[test]
fn one_document_again_and_again_still_calibrates() {
    let (checkpoint, decoder) = tiny();
    let embedder = HiddenStates { decoder: &decoder, tokenizer: checkpoint.tokenizer(), max_tokens: 64 };
    let text = "It was a dark night. ".repeat(6_000);
    let options = CalibrationOptions { sequences: 5, sequence_length: 100, deduplicate: false, ..Default::default() };
    let calibration = Calibration::sample(&corpus(&text), checkpoint.tokenizer(), &embedder, &options, |_| {}).unwrap();
    assert_eq!(calibration.sequences.len(), 5);
    // without the repetitions nothing is left to make sequences of, and that is said
    let apart = CalibrationOptions { deduplicate: true, ..options };
    refused(Calibration::sample(&corpus(&text), checkpoint.tokenizer(), &embedder, &apart, |_| {}), &["expected a longer text"]);
}

#[test]
fn one_word_over_and_over_still_gives_finite_repairs() {
    // activations that are nearly the same vector at every position: second moments of rank one
    let (checkpoint, decoder) = tiny();
    let sha = checkpoint::fingerprint(checkpoint.source().as_ref()).unwrap();
    let corpora = corpus(&"the ".repeat(4_000));
    let mut options = options(Strategy::Joint, Space::Joint);
    options.calibration =
        CalibrationOptions { sequences: 2, sequence_length: 48, clusters: 1, statistics_tokens: 960, held_out_tokens: 96, ..options.calibration };
    let directory = tempfile::tempdir().unwrap();
    let run = Run { options, ..run_of(&sha) };
    run::begin(directory.path(), &run, checkpoint.config()).unwrap();
    let inputs = Inputs { checkpoint: &checkpoint, model_sha256: &sha, decoder: &decoder, corpora: &corpora, held_out: Some("the the the the the the") };
    let outcome = run::prune(directory.path(), &inputs, &mut |_| Ok(())).unwrap();
    assert!(outcome.found.fitness.loss.is_finite() && outcome.pruned.perplexity.is_finite());
    assert!(outcome.levels.iter().flat_map(|l| &l.levels).all(|l| l.repaired.is_finite()));
}

#[test]
fn activations_that_are_not_numbers_are_named_by_layer_and_nothing_is_written() {
    let (checkpoint, decoder) = tiny();
    let sha = checkpoint::fingerprint(checkpoint.source().as_ref()).unwrap();
    // what the third layer's MLP adds to the stream is infinite
    let blocks = (0..decoder.last_boundary()).map(|s| {
        let block = decoder.sub_block(s).unwrap();
        if s != 5 {
            return Some(block.clone());
        }
        let weight = (block.output().weight().unwrap() * f64::INFINITY).unwrap();
        Some(block.with_output(Linear::new(weight, None).unwrap()).unwrap())
    });
    let broken = decoder.with_sub_blocks(blocks.collect()).unwrap();
    let corpora = corpus(&book("calibration.txt.gz", 60_000));
    let mut options = options(Strategy::Joint, Space::Joint);
    options.calibration.mixing = Mixing::Random; // no embedding by hidden states
    let directory = tempfile::tempdir().unwrap();
    run::begin(directory.path(), &Run { options, ..run_of(&sha) }, checkpoint.config()).unwrap();
    let inputs = Inputs { checkpoint: &checkpoint, model_sha256: &sha, decoder: &broken, corpora: &corpora, held_out: None };
    refused(run::prune(directory.path(), &inputs, &mut |_| Ok(())), &["layer 2", "outputs of down_proj", "not finite", "damaged"]);
    assert!(!run::is_finished(directory.path()) && !directory.path().join("model.safetensors").exists());
}

pub fn run_of(sha: &str) -> Run {
    Run {
        model: None,
        revision: None,
        model_sha256: sha.to_string(),
        dtype: "f32".into(),
        calibration: vec![],
        calibration_set: None,
        eval_text: None,
        options: options(Strategy::Joint, Space::Joint),
        command: vec![],
        version: "test".into(),
    }
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

//! Whole runs: every strategy, interruption anywhere, and what is written.

use crate::setting::{options, prune, tiny};
use evop_model::{Checkpoint, DType, Device, NoCache, Pattern, Span};
use evop_pruning::Error;
use evop_pruning::run::{self, Outcome, Step};
use evop_pruning::search::{Space, Strategy};
use std::path::Path;

fn whole(directory: &Path, strategy: Strategy, space: Space) -> Outcome {
    prune(directory, &options(strategy, space), &mut |_| Ok(())).unwrap()
}

#[test]
fn every_strategy_runs_to_a_checkpoint_whose_logits_are_the_masked_parents() {
    let (_, dense) = tiny();
    for (strategy, space) in [
        (Strategy::Evop, Space::Layer),
        (Strategy::Sleb, Space::Layer),
        (Strategy::Shortgpt, Space::Layer),
        (Strategy::Random, Space::Layer),
        (Strategy::Exhaustive, Space::Layer),
        (Strategy::Evop, Space::Block),
        (Strategy::Sleb, Space::Block),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let outcome = whole(directory.path(), strategy, space);
        let kept = outcome.kept.iter().filter(|k| **k).count();
        assert_eq!(kept, 18, "{strategy} {space}");
        assert!(outcome.pruned.perplexity.is_finite() && outcome.dense.perplexity < outcome.pruned.perplexity);
        assert!(outcome.block_parameters.1 < outcome.block_parameters.0);
        let pruned = Checkpoint::open(directory.path()).unwrap();
        assert_eq!(pruned.config().parameters(), outcome.parameters.1);
        let pruned = pruned.decoder(&Device::Cpu, DType::F32).unwrap();
        let masked = dense.masked(&outcome.found.pattern).unwrap();
        let tokens = [5, 17, 300, 4, 1000, 12, 9];
        let logits = |d: &evop_model::Decoder| {
            let batch = d.batch(&[Span::prompt(tokens.len())]).unwrap();
            d.logits(&d.forward(&tokens, &batch, &mut NoCache).unwrap()).unwrap().to_vec2::<f32>().unwrap()
        };
        assert_eq!(logits(&pruned), logits(&masked), "{strategy} {space}");
        let html = std::fs::read_to_string(directory.path().join("report.html")).unwrap();
        assert!(html.contains("pattern map") && html.contains("Best loss by round") && html.contains("cluster 0"));
        assert!(std::fs::read_dir(directory.path()).unwrap().all(|f| !f.unwrap().file_name().to_string_lossy().ends_with(".part")));
    }
}

#[test]
fn a_pruned_checkpoint_can_be_pruned_again() {
    let first = tempfile::tempdir().unwrap();
    whole(first.path(), Strategy::Sleb, Space::Block);
    let checkpoint = Checkpoint::open(first.path()).unwrap();
    let dense = Pattern::dense(checkpoint.config());
    let space = evop_pruning::search::SearchSpace::new(checkpoint.config(), Space::Block, 0.5).unwrap();
    let kept = (0..2 * dense.layers().len()).filter(|s| dense.keeps(*s)).count();
    assert_eq!((kept, space.units(), space.remove), (18, 18, 9));
}

#[test]
fn a_run_stopped_anywhere_goes_on_to_the_same_pattern() {
    let straight = tempfile::tempdir().unwrap();
    let expected = whole(straight.path(), Strategy::Evop, Space::Block);
    for stop_at in [1, 4, 9, 15] {
        let directory = tempfile::tempdir().unwrap();
        let mut steps = 0;
        let stopped = prune(directory.path(), &options(Strategy::Evop, Space::Block), &mut |step| {
            steps += usize::from(matches!(step, Step::Search(_)));
            if steps == stop_at { Err(Error::Interrupted(directory.path().into())) } else { Ok(()) }
        });
        assert!(matches!(stopped, Err(Error::Interrupted(_))));
        assert!(!run::is_finished(directory.path()));
        let unfinished = Checkpoint::open(directory.path()).unwrap_err().to_string();
        assert!(unfinished.contains("--resume"), "{unfinished}");
        // a kill in the middle of a line
        let log = directory.path().join("search.jsonl");
        let text = std::fs::read(&log).unwrap();
        std::fs::write(&log, &text[..text.len() - 7]).unwrap();
        let resumed = prune(directory.path(), &options(Strategy::Evop, Space::Block), &mut |_| Ok(())).unwrap();
        assert_eq!(resumed.found, expected.found);
        assert_eq!((resumed.work.requested, resumed.work.naive_block_forwards), (expected.work.requested, expected.work.naive_block_forwards));
        assert_eq!(resumed.work.evaluated, expected.work.evaluated);
        let weights = |d: &Path| std::fs::read(d.join("model.safetensors")).unwrap();
        assert_eq!(weights(directory.path()), weights(straight.path()));
    }
}

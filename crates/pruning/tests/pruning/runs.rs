//! Whole runs: every strategy, interruption anywhere, and what is written.

use crate::setting::{book, corpus, options, prune, space, tiny};
use evop_model::{Checkpoint, DType, Device, Gene, NoCache, Pattern, Span, Widths};
use evop_pruning::Error;
use evop_pruning::budget::{Budget, Resource};
use evop_pruning::calibration::Calibration;
use evop_pruning::checkpoint;
use evop_pruning::compensate::{Compensation, SkipCompensation};
use evop_pruning::evaluate::{Evaluator, Work};
use evop_pruning::levels::LevelOptions;
use evop_pruning::objective::{Aggregate, FitnessKind, Objective};
use evop_pruning::per_cluster::ClusterPattern;
use evop_pruning::run::{self, Inputs, Outcome, PruneOptions, Run, Step};
use evop_pruning::search::{ParetoOptions, SearchOptions, Strategy};
use evop_pruning::space::Space;
use evop_pruning::supernet::Supernet;
use std::collections::HashMap;
use std::path::Path;

fn whole(directory: &Path, options: &PruneOptions) -> Outcome {
    prune(directory, options, &mut |_| Ok(())).unwrap()
}

fn logits(decoder: &evop_model::Decoder) -> Vec<Vec<f32>> {
    let tokens = [5, 17, 300, 4, 1000, 12, 9];
    let batch = decoder.batch(&[Span::prompt(tokens.len())]).unwrap();
    decoder.logits(&decoder.forward(&tokens, &batch, &mut NoCache).unwrap()).unwrap().to_vec2::<f32>().unwrap()
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
        (Strategy::Joint, Space::Block),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let mut options = options(strategy, space);
        options.levels.skips = Some(SkipCompensation::None);
        let outcome = whole(directory.path(), &options);
        assert!(outcome.kept_of_budgets[0].1 <= 0.75 + 1e-9, "{strategy} {space}");
        assert!(outcome.widths.iter().all(|(whole, kept)| kept == whole || *kept == 0));
        assert!(outcome.pruned.perplexity.is_finite() && outcome.dense.perplexity < outcome.pruned.perplexity);
        let pruned = Checkpoint::open(directory.path()).unwrap();
        assert_eq!(pruned.config().parameters(), outcome.parameters.1);
        let pruned = pruned.decoder(&Device::Cpu, DType::F32).unwrap();
        let masked = dense.masked(&outcome.found.pattern).unwrap();
        assert_eq!(logits(&pruned), logits(&masked), "{strategy} {space}");
        let html = std::fs::read_to_string(directory.path().join("report.html")).unwrap();
        assert!(html.contains("pattern map") && html.contains("best loss by block-forwards") && html.contains("cluster 0"));
        assert!(std::fs::read_dir(directory.path()).unwrap().all(|f| !f.unwrap().file_name().to_string_lossy().ends_with(".part")));
    }
}

#[test]
fn repaired_widths_beat_every_way_to_drop_whole_sub_blocks_and_are_what_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let mut of_one = options(Strategy::Joint, Space::Joint);
    of_one.search.joint.elite = 1;
    let joint = whole(directory.path(), &of_one);
    assert!(joint.widths.iter().any(|(whole, kept)| kept < whole && *kept > 0), "partial widths: {:?}", joint.widths);
    let widths = joint.levels.iter().flat_map(|l| &l.levels).filter(|l| l.level.absorbed == 0);
    assert!(widths.clone().count() > 0 && widths.clone().all(|l| l.repaired <= l.raw), "a repair errs less than none");
    assert!(!directory.path().join("levels").exists(), "the level database goes at the end");
    // held-out text chose among the best of every generation, not of the last alone
    let offered: Vec<f64> = joint.found.elite.iter().map(|(_, fitness)| fitness.loss).collect();
    assert!(joint.found.history.iter().all(|round| offered.contains(&round.best_loss)), "{offered:?}");
    assert!(offered.len() > 1 && joint.held_out.candidates == offered.len(), "{offered:?}");
    for strategy in [Strategy::Sleb, Strategy::Joint] {
        let other = tempfile::tempdir().unwrap();
        let dropped = whole(other.path(), &options(strategy, Space::Block));
        assert!(joint.pruned.perplexity < dropped.pruned.perplexity, "{} {strategy} {}", joint.pruned.perplexity, dropped.pruned.perplexity);
    }
    // the checkpoint is the model that was measured
    let pruned = Checkpoint::open(directory.path()).unwrap();
    let decoder = pruned.decoder(&Device::Cpu, DType::F32).unwrap();
    let tokens = pruned.encode(&crate::setting::book("held-out.txt.gz", 20_000), false).unwrap();
    let again = evop_pruning::eval::perplexity(&decoder, &tokens, 128, |_, _| {}).unwrap();
    assert_eq!(again.perplexity, joint.pruned.perplexity);
}

#[test]
fn a_search_without_one_of_its_parts_or_with_another_aggregate_stays_within_the_budget() {
    type Change = fn(&mut PruneOptions);
    let changes: [(&str, Change); 5] = [
        ("no racing", |o| o.search.joint.racing = false),
        ("no seeds", |o| o.search.joint.seeds = false),
        ("no surrogate", |o| o.search.joint.surrogate = false),
        ("worst cluster", |o| o.objective.aggregate = Aggregate::WorstCluster),
        ("mean and deviation", |o| o.objective.aggregate = Aggregate::MeanStd),
    ];
    let levels = tempfile::tempdir().unwrap();
    for (what, change) in changes {
        let mut options = options(Strategy::Joint, Space::Joint);
        options.level_directory = Some(levels.path().to_path_buf());
        change(&mut options);
        let directory = tempfile::tempdir().unwrap();
        let outcome = whole(directory.path(), &options);
        assert!(outcome.kept_of_budgets[0].1 <= 0.75 + 1e-9, "{what}");
        let losses = [outcome.found.fitness.loss, outcome.held_out.loss, outcome.pruned.perplexity];
        assert!(losses.iter().all(|loss| loss.is_finite()), "{what}: {losses:?}");
        assert!(outcome.found.fitness.loss > outcome.dense_loss, "{what}");
    }
}

#[test]
fn a_run_is_calibrated_on_anothers_sequences_if_they_are_its_models() {
    let options = options(Strategy::Sleb, Space::Block);
    let first = tempfile::tempdir().unwrap();
    let expected = whole(first.path(), &options);
    let set = first.path().join("calibration.json");
    let (checkpoint, decoder) = tiny();
    let sha = checkpoint::fingerprint(checkpoint.source().as_ref()).unwrap();
    let held_out = book("held-out.txt.gz", 20_000);
    let calibrated = |directory: &Path, set: &Path, options: &PruneOptions| -> evop_pruning::Result<Outcome> {
        let run = Run { options: options.clone(), calibration_set: Some(set.to_path_buf()), ..crate::bad_input::run_of(&sha) };
        run::begin(directory, &run, checkpoint.config())?;
        let inputs = Inputs { checkpoint: &checkpoint, model_sha256: &sha, decoder: &decoder, corpora: &[], held_out: Some(&held_out) };
        run::prune(directory, &inputs, &mut |_| Ok(()))
    };
    let second = tempfile::tempdir().unwrap();
    let outcome = calibrated(second.path(), &set, &options).unwrap();
    assert_eq!((&outcome.found, &outcome.calibration.sha256), (&expected.found, &expected.calibration.sha256));
    let provenance: serde_json::Value = serde_json::from_slice(&std::fs::read(second.path().join("evop.json")).unwrap()).unwrap();
    assert_eq!(provenance["calibration"]["sha256"], expected.calibration.sha256.as_str());
    assert_eq!(provenance["calibration"]["embedder"], expected.calibration.embedder.as_str());

    let read: Calibration = serde_json::from_slice(&std::fs::read(&set).unwrap()).unwrap();
    assert_eq!(read.sha256(), expected.calibration.sha256);
    type Damage = fn(&mut Calibration);
    let damages: [(Damage, &str); 5] = [
        (|c| c.sequences[0].tokens[3] = 4096, "sequences, number 0: token 4096 isn't among the model's 4096"),
        (|c| c.statistics[1].tokens = vec![1; 1025], "statistics, number 1: expected 2 to 1024 tokens"),
        (|c| c.held_out[0].cluster = 4, "expected one of 4 clusters, found 4"),
        (|c| c.sequences.clear(), "expected sequences, found none"),
        (|c| c.options.sequences = 5, "the run was begun with"),
    ];
    for (damage, text) in damages {
        let mut other = read.clone();
        damage(&mut other);
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("other.json");
        std::fs::write(&file, serde_json::to_string(&other).unwrap()).unwrap();
        let error = calibrated(&directory.path().join("out"), &file, &options).unwrap_err().to_string();
        assert!(error.contains("other.json") && error.contains(text), "{error}");
    }
    let per_cluster = PruneOptions { per_cluster: true, ..options.clone() };
    let error = calibrated(&first.path().join("out"), &set, &per_cluster).unwrap_err().to_string();
    assert!(error.contains("--per-cluster") && error.contains("--calibration-set"), "{error}");
    // one that lies there already is not taken without a word
    let third = tempfile::tempdir().unwrap();
    std::fs::copy(&set, third.path().join("calibration.json")).unwrap();
    let error = prune(third.path(), &options, &mut |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("holds a calibration.json already") && error.contains("--calibration-set"), "{error}");
}

#[test]
fn every_budget_holds_and_several_hold_together() {
    let budgets = vec![Budget::new(Resource::Params, 0.8).unwrap(), Budget::new(Resource::Kv, 0.5).unwrap()];
    for space in [Space::Joint, Space::JointHeads] {
        let mut options = options(Strategy::Joint, space);
        options.space.budgets.clone_from(&budgets);
        let directory = tempfile::tempdir().unwrap();
        let outcome = whole(directory.path(), &options);
        assert!(outcome.kv_bytes_per_token.1 * 2 <= outcome.kv_bytes_per_token.0, "{space}");
        assert!(outcome.block_parameters.1 as f64 <= 0.8 * outcome.block_parameters.0 as f64, "{space}");
        Checkpoint::open(directory.path()).unwrap();
    }
}

#[test]
fn a_latency_budget_is_measured_once_and_holds_by_that_table() {
    let mut options = options(Strategy::Joint, Space::Joint);
    options.space.budgets = vec![Budget::new(Resource::Latency, 0.7).unwrap()];
    let directory = tempfile::tempdir().unwrap();
    let outcome = whole(directory.path(), &options);
    assert!(outcome.kept_of_budgets[0].1 <= 0.7 + 1e-9);
    let table: evop_pruning::budget::LatencyTable = serde_json::from_slice(&std::fs::read(directory.path().join("latency.json")).unwrap()).unwrap();
    let cost = |kept: bool| -> f64 {
        outcome.widths.iter().zip(&table.milliseconds).map(|((whole, part), t)| t.get(if kept { part } else { whole }).unwrap_or(&0.0)).sum()
    };
    assert!(cost(true) <= 0.7 * cost(false) + 1e-9);
}

#[test]
fn a_draft_is_the_pattern_that_makes_a_token_fastest() {
    let mut options = options(Strategy::Pareto, Space::Joint);
    options.objective = Objective { kind: FitnessKind::Draft, aggregate: Aggregate::Mean, key_tokens: 0.0 };
    options.levels = LevelOptions { importance: None, compensation: Some(Compensation::Bias), skips: Some(SkipCompensation::None) };
    options.space.budgets = vec![Budget::new(Resource::Latency, 0.95).unwrap()];
    options.search.pareto = ParetoOptions { population: 8, generations: 3, least: 0.0 };
    let directory = tempfile::tempdir().unwrap();
    let outcome = whole(directory.path(), &options);
    let drafting = outcome.drafting.unwrap();
    assert!(drafting.agreement > 0.05 && drafting.agreement < 1.0 && drafting.tokens >= 1, "{drafting:?}");
    assert_eq!(outcome.held_out.loss, drafting.time);
    let table: evop_pruning::budget::LatencyTable = serde_json::from_slice(&std::fs::read(directory.path().join("latency.json")).unwrap()).unwrap();
    // (what was kept as the front are the fastest, of which none within the budget is faster than the one that was found; times are measured, so one beyond it can be)
    for point in outcome.found.front.iter().filter(|point| point.kept <= 0.95) {
        assert!(table.drafting(&point.pattern, point.loss).unwrap().time >= outcome.found.elite[0].1.loss);
    }
    // served over the model's own weights
    Widths::read(&directory.path().join("widths.safetensors"), tiny().0.config()).unwrap();

    for wrong in [
        PruneOptions { per_cluster: true, ..options.clone() },
        PruneOptions { search: SearchOptions { strategy: Strategy::Joint, ..options.search.clone() }, ..options },
    ] {
        let error = prune(tempfile::tempdir().unwrap().path(), &wrong, &mut |_| Ok(())).unwrap_err().to_string();
        assert!(error.contains("--fitness draft"), "{error}");
    }
}

#[test]
fn uniform_patterns_have_equal_layers_and_a_plain_config() {
    let mut options = options(Strategy::Joint, Space::Joint);
    options.space.uniform = true;
    let directory = tempfile::tempdir().unwrap();
    let outcome = whole(directory.path(), &options);
    let kept: Vec<usize> = outcome.widths.iter().skip(1).step_by(2).map(|(_, kept)| *kept).filter(|w| *w > 0).collect();
    assert!(kept.iter().all(|w| *w == kept[0]));
    assert!(outcome.widths.chunks(2).all(|layer| (layer[0].1 > 0) == (layer[1].1 > 0)), "whole layers");
    let config: serde_json::Value = serde_json::from_slice(&std::fs::read(directory.path().join("config.json")).unwrap()).unwrap();
    assert_eq!((config["model_type"].as_str(), config.get("per_layer_config")), (Some("llama"), None));
    assert_eq!(config["intermediate_size"], kept[0]);
}

#[test]
fn a_pruned_checkpoint_can_be_pruned_again() {
    let first = tempfile::tempdir().unwrap();
    whole(first.path(), &options(Strategy::Sleb, Space::Block));
    let checkpoint = Checkpoint::open(first.path()).unwrap();
    let dense = Pattern::dense(checkpoint.config());
    let space = space(&checkpoint, Space::Block, 0.5);
    let kept = (0..2 * dense.layers().len()).filter(|s| dense.keeps(*s)).count();
    assert_eq!(kept, space.units());
    let nothing = vec![Gene { kv_groups: 0, ffn: 0 }; dense.layers().len()];
    assert_eq!(space.pattern(&vec![0; kept]).layers(), nothing);
}

#[test]
fn a_run_stopped_anywhere_goes_on_to_the_same_pattern() {
    for (strategy, space, stops) in [(Strategy::Evop, Space::Block, [1, 4, 9, 15].as_slice()), (Strategy::Joint, Space::Joint, &[1, 3])] {
        let straight = tempfile::tempdir().unwrap();
        let expected = whole(straight.path(), &options(strategy, space));
        for stop_at in stops {
            let directory = tempfile::tempdir().unwrap();
            let mut steps = 0;
            let stopped = prune(directory.path(), &options(strategy, space), &mut |step| {
                steps += usize::from(matches!(step, Step::Search(_)));
                if steps == *stop_at { Err(Error::Interrupted(directory.path().into())) } else { Ok(()) }
            });
            assert!(matches!(stopped, Err(Error::Interrupted(_))));
            assert!(!run::is_finished(directory.path()));
            let unfinished = Checkpoint::open(directory.path()).unwrap_err().to_string();
            assert!(unfinished.contains("--resume"), "{unfinished}");
            // a kill in the middle of a line
            let log = directory.path().join("search.jsonl");
            let text = std::fs::read(&log).unwrap();
            std::fs::write(&log, &text[..text.len() - 7]).unwrap();
            let resumed = prune(directory.path(), &options(strategy, space), &mut |_| Ok(())).unwrap();
            assert_eq!(
                (&resumed.found.pattern, &resumed.found.fitness, &resumed.found.elite),
                (&expected.found.pattern, &expected.found.fitness, &expected.found.elite)
            );
            assert_eq!((resumed.work.requested, resumed.work.naive_block_forwards), (expected.work.requested, expected.work.naive_block_forwards));
            let weights = |d: &Path| std::fs::read(d.join("model.safetensors")).unwrap();
            assert_eq!(weights(directory.path()), weights(straight.path()));
        }
    }
}

#[test]
fn a_level_database_is_shared_checked_and_mended() {
    let levels = tempfile::tempdir().unwrap();
    let mut options = options(Strategy::Joint, Space::Joint);
    options.level_directory = Some(levels.path().to_path_buf());
    let first = tempfile::tempdir().unwrap();
    let expected = whole(first.path(), &options);
    // a second run finds it there; a missing sub-block is built again, to the same bytes
    let database = std::fs::read_dir(levels.path()).unwrap().next().unwrap().unwrap().path();
    let file = database.join("0003.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::remove_file(&file).unwrap();
    std::fs::remove_file(database.join("0003.json")).unwrap();
    let second = tempfile::tempdir().unwrap();
    let outcome = whole(second.path(), &options);
    assert_eq!(std::fs::read(&file).unwrap(), bytes);
    assert_eq!(outcome.found.pattern, expected.found.pattern);
    // a damaged one is refused by name
    std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    let third = tempfile::tempdir().unwrap();
    let error = prune(third.path(), &options, &mut |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("0003.safetensors") && error.contains("damaged") && error.contains("delete"), "{error}");
    // another calibration has a database of its own
    options.calibration.seed = 5;
    let fourth = tempfile::tempdir().unwrap();
    whole(fourth.path(), &options);
    assert_eq!(std::fs::read_dir(levels.path()).unwrap().count(), 2);
}

#[test]
fn what_is_skipped_is_made_up_for_and_what_was_scored_is_written() {
    let run = |skips: Option<SkipCompensation>| {
        let mut options = options(Strategy::Joint, Space::Block);
        options.levels.skips = skips;
        let directory = tempfile::tempdir().unwrap();
        let outcome = whole(directory.path(), &options);
        let decoder = Checkpoint::open(directory.path()).unwrap().decoder(&Device::Cpu, DType::F32).unwrap();
        // the loss of what was written, on the sequences that the search saw
        let supernet = Supernet::raw(&decoder);
        let calibration: Calibration = serde_json::from_slice(&std::fs::read(directory.path().join("calibration.json")).unwrap()).unwrap();
        let (_, dense) = tiny();
        let reference = Supernet::raw(&dense);
        let mut evaluator =
            Evaluator::new(&reference, &calibration.samples(), options.objective, options.savings, HashMap::new(), Work::default(), Box::new(|_, _| Ok(())))
                .unwrap();
        let written = evaluator.over(&supernet, |e| e.evaluate(&[Pattern::dense(decoder.config())])).unwrap()[0].loss;
        let scored = outcome.found.fitness.loss;
        // (the scales of skipped sub-blocks are moved to other layers and rounded to the checkpoint's bf16)
        assert!((written - scored).abs() < 0.01 * scored, "{skips:?}: scored {scored}, written {written}");
        outcome
    };
    let plain = run(Some(SkipCompensation::None));
    assert!(plain.levels.is_empty());
    let linear = run(Some(SkipCompensation::Linear));
    assert!(linear.held_out.loss < plain.held_out.loss, "{} {}", linear.held_out.loss, plain.held_out.loss);
    assert!(linear.pattern_levels.iter().any(|l| l.absorbed > 0));
    let scale = run(Some(SkipCompensation::Scale));
    assert!(scale.levels.iter().any(|l| l.scale.is_some_and(|s| s.factor > 1.0)));
    let chosen = run(None);
    assert_eq!(chosen.skips, SkipCompensation::Linear, "what leaves least missing");
    assert_eq!(chosen.found, linear.found);
}

#[test]
fn a_front_has_no_point_that_another_beats_and_any_of_it_becomes_a_checkpoint() {
    let levels = tempfile::tempdir().unwrap();
    let mut options = options(Strategy::Pareto, Space::Joint);
    options.level_directory = Some(levels.path().to_path_buf());
    let directory = tempfile::tempdir().unwrap();
    let outcome = whole(directory.path(), &options);
    let front = &outcome.found.front;
    assert!(front.len() > 5 && front[0].kept < 0.6, "{front:?}");
    assert!(front.windows(2).all(|w| w[0].kept < w[1].kept && w[0].loss > w[1].loss));
    assert!(outcome.kept_of_budgets[0].1 <= 0.75 + 1e-9);
    let html = std::fs::read_to_string(directory.path().join("report.html")).unwrap();
    assert!(html.contains("Pareto front"));
    let point = &front[0];
    let file = directory.path().join("front").join(format!("{:.4}.json", point.kept));
    options.search.strategy = Strategy::Pattern;
    options.search.pattern = Some(serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap());
    let made = tempfile::tempdir().unwrap();
    let again = whole(made.path(), &options);
    assert_eq!((&again.found.pattern, again.found.fitness.loss), (&point.pattern, point.loss));
    // a width that the space hasn't
    options.search.pattern.as_mut().unwrap()[0].ffn = 13;
    let error = prune(tempfile::tempdir().unwrap().path(), &options, &mut |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("--pattern") && error.contains("--width-steps"), "{error}");
}

#[test]
fn every_cluster_gets_a_pattern_that_suits_it_and_a_stopped_run_finds_the_same() {
    let mut options = options(Strategy::Sleb, Space::Block);
    options.per_cluster = true;
    let directory = tempfile::tempdir().unwrap();
    let outcome = whole(directory.path(), &options);
    assert_eq!(outcome.clusters.len(), 4);
    assert!(outcome.clusters.iter().any(|c| c.pattern != outcome.found.pattern.layers()), "clusters differ");
    let read = |d: &Path| -> Vec<ClusterPattern> { serde_json::from_slice(&std::fs::read(d.join("clusters.json")).unwrap()).unwrap() };
    assert_eq!(read(directory.path()).len(), 4);
    let vectors = candle_core::safetensors::load(directory.path().join("clusters.safetensors"), &Device::Cpu).unwrap();
    assert_eq!(vectors["vectors"].dims()[0], vectors["clusters"].dims()[0]);
    let stopped = tempfile::tempdir().unwrap();
    let error = prune(stopped.path(), &options, &mut |step| {
        let at = matches!(step, Step::Cluster { cluster: 2, progress, .. } if progress.round == 2);
        if at { Err(Error::Interrupted(stopped.path().into())) } else { Ok(()) }
    });
    assert!(matches!(error, Err(Error::Interrupted(_))));
    let resumed = prune(stopped.path(), &options, &mut |_| Ok(())).unwrap();
    let patterns = |clusters: &[ClusterPattern]| clusters.iter().map(|c| c.pattern.clone()).collect::<Vec<_>>();
    assert_eq!(patterns(&resumed.clusters), patterns(&outcome.clusters));
    // a strategy that changes weights beside the pattern has none to give
    options.search.strategy = Strategy::PruneComp;
    options.space.space = Space::Layer;
    let error = prune(tempfile::tempdir().unwrap().path(), &options, &mut |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("--per-cluster") && error.contains("prune-comp"), "{error}");
}

#[test]
fn a_run_in_bf16_writes_what_it_measured_and_is_not_gone_on_with_in_f32() {
    let (checkpoint, wide) = tiny();
    let decoder = checkpoint.decoder(&Device::Cpu, DType::BF16).unwrap();
    assert_eq!((decoder.dtype(), decoder.weight_type()), (DType::F32, DType::BF16.into()));
    let far = logits(&decoder).concat().iter().zip(logits(&wide).concat()).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(far > 0.0 && far < 0.2, "activations are rounded, weights aren't changed: {far}");
    let sha = checkpoint::fingerprint(checkpoint.source().as_ref()).unwrap();
    let run = Run { dtype: "bf16".into(), options: options(Strategy::Joint, Space::Joint), ..crate::bad_input::run_of(&sha) };
    let directory = tempfile::tempdir().unwrap();
    run::begin(directory.path(), &run, checkpoint.config()).unwrap();
    let corpora = corpus(&book("calibration.txt.gz", 200_000));
    let held_out = book("held-out.txt.gz", 20_000);
    let with = |decoder| Inputs { checkpoint: &checkpoint, model_sha256: &sha, decoder, corpora: &corpora, held_out: Some(&held_out) };
    let refused = run::prune(directory.path(), &with(&wide), &mut |_| Ok(())).unwrap_err().to_string();
    assert!(refused.contains("weights in bf16") && refused.contains("--dtype bf16"), "{refused}");
    let outcome = run::prune(directory.path(), &with(&decoder), &mut |_| Ok(())).unwrap();
    let pruned = Checkpoint::open(directory.path()).unwrap();
    let tokens = pruned.encode(&held_out, false).unwrap();
    let again = evop_pruning::eval::perplexity(&pruned.decoder(&Device::Cpu, DType::BF16).unwrap(), &tokens, 128, |_, _| {}).unwrap();
    assert_eq!(again.perplexity, outcome.pruned.perplexity);
}

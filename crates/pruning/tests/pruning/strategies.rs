//! Strategies of the literature: each within the budget, the same twice, and what its paper says it is.

use crate::setting::{NLL, evaluator, options, prune, samples, search_options, space, tiny};
use evop_model::{Config, DType, Decoder, Device, NoCache, Pattern, RawTensor, Source, Span, Tensor, TensorNames};
use evop_pruning::evaluate::{Evaluator, Savings, Work};
use evop_pruning::levels::LevelOptions;
use evop_pruning::objective::{Aggregate, Objective};
use evop_pruning::run::Outcome;
use evop_pruning::search::{self, Adjustment, Found, SearchOptions, Strategy, adjust};
use evop_pruning::space::Space;
use evop_pruning::supernet::Supernet;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use std::cell::RefCell;
use std::collections::HashMap;

fn small(strategy: Strategy) -> SearchOptions {
    SearchOptions { evaluations: 60, ..search_options(strategy) }
}

#[test]
fn every_strategy_finds_a_pattern_within_the_budget_and_the_same_again_when_it_is_resumed() {
    let (checkpoint, decoder) = tiny();
    let supernet = Supernet::raw(&decoder);
    for strategy in Strategy::ALL {
        let recipe = strategy.recipe();
        let space = space(&checkpoint, recipe.space, 0.25);
        let run = |known: HashMap<Pattern, Vec<f64>>| -> (Found, Work, HashMap<Pattern, Vec<f64>>) {
            let recorded = RefCell::new(known.clone());
            let record = |results: &[(Pattern, Vec<f64>)], _: Work| {
                recorded.borrow_mut().extend(results.iter().cloned());
                Ok(())
            };
            let objective = Objective { kind: recipe.fitness, aggregate: Aggregate::Mean, key_tokens: 0.0 };
            let mut evaluator = Evaluator::new(&supernet, &samples()[..1], objective, Savings::default(), known, Work::default(), Box::new(record)).unwrap();
            let mut rounds = 0;
            let mut options = small(*strategy);
            if *strategy == Strategy::Pattern {
                options.pattern = Some(space.pattern(&space.random(&mut ChaCha8Rng::seed_from_u64(3))).layers().to_vec());
            }
            let found = search::search(&mut evaluator, &space, &options, &mut |progress| {
                if progress.round == 0 {
                    return Ok(()); // before the first generation
                }
                rounds += 1;
                assert!(progress.round == rounds && progress.round <= progress.rounds, "{strategy} {progress:?}");
                Ok(())
            })
            .unwrap();
            assert_eq!(found.history.len(), rounds, "{strategy}");
            let work = evaluator.work();
            drop(evaluator);
            (found, work, recorded.into_inner())
        };
        let (first, work, everything) = run(HashMap::new());
        assert!(first.fitness.loss.is_finite(), "{strategy}");
        let genome = space.genome(&first.pattern).unwrap();
        assert!(space.fits(&genome), "{strategy} {:?}", space.totals(&genome));
        assert!(work.evaluated > 0 && work.block_forwards > 0 && work.block_forwards <= work.naive_block_forwards, "{strategy} {work:?}");
        // a resumed run knows what comes and must not look ahead
        let (again, resumed, _) = run(everything);
        assert_eq!((&again.pattern, &again.fitness, &again.adjustment), (&first.pattern, &first.fitness, &first.adjustment), "{strategy}");
        assert_eq!(resumed.requested, work.requested, "{strategy}");
    }
}

#[test]
fn a_greedy_step_is_the_best_of_all_removals_that_the_paper_allows() {
    let (checkpoint, decoder) = tiny();
    let supernet = Supernet::raw(&decoder);
    let dense = Pattern::dense(checkpoint.config());
    let layers = dense.layers().len();
    let alone = |pattern: &Pattern, objective: Objective| {
        evaluator(&supernet, objective, Savings { memo: false, prefix: false, prefix_cache_bytes: 0 }).evaluate(std::slice::from_ref(pattern)).unwrap()[0].loss
    };
    let whole_layer = |l: usize| dense.without(2 * l).without(2 * l + 1);
    let all = |patterns: Vec<Pattern>| patterns;
    for (strategy, kind, sparsity, removals) in [
        (Strategy::Sleb, Space::Layer, 0.05, all((1..layers - 1).map(whole_layer).collect())),
        (Strategy::Blockpruner, Space::Block, 0.01, all((0..2 * layers).map(|s| dense.without(s)).collect())),
        // 40% of 12 layers are 4
        (Strategy::Finercut, Space::Block, 0.01, all((8..2 * layers).map(|s| dense.without(s)).collect())),
    ] {
        let objective = Objective { kind: strategy.recipe().fitness, aggregate: Aggregate::Mean, key_tokens: 0.0 };
        let losses: Vec<f64> = removals.iter().map(|p| alone(p, objective)).collect();
        let expected = (0..losses.len()).reduce(|best, other| if losses[other] < losses[best] { other } else { best }).unwrap();
        let mut evaluator = evaluator(&supernet, objective, Savings::default());
        let found = search::search(&mut evaluator, &space(&checkpoint, kind, sparsity), &small(strategy), &mut |_| Ok(())).unwrap();
        assert_eq!((&found.pattern, found.fitness.loss), (&removals[expected], losses[expected]), "{strategy}");
        assert_eq!((evaluator.work().evaluated, found.history.len()), (removals.len(), 1), "{strategy}");
    }
}

#[test]
fn strategies_say_which_space_they_need() {
    let (checkpoint, decoder) = tiny();
    let supernet = Supernet::raw(&decoder);
    for (strategy, kind, expected) in [
        (Strategy::Crash, Space::Block, "expected layer"),
        (Strategy::PruneComp, Space::Joint, "expected layer"),
        (Strategy::Flatten, Space::Block, "expected layer"),
        (Strategy::Evopress, Space::Joint, "expected layer or block"),
        (Strategy::SurrogateShapley, Space::Width, "expected layer or block"),
        (Strategy::Flap, Space::Layer, "joint+heads"),
        (Strategy::Twossp, Space::Layer, "joint+heads"),
        (Strategy::Uniform, Space::Layer, "joint+heads"),
    ] {
        let mut evaluator = evaluator(&supernet, NLL, Savings::default());
        let error = search::search(&mut evaluator, &space(&checkpoint, kind, 0.25), &small(strategy), &mut |_| Ok(())).unwrap_err().to_string();
        assert!(error.starts_with("--space") && error.contains(expected) && error.contains(&strategy.to_string()), "{error}");
    }
}

/// A whole run with the strategy's own space, order and repair.
fn whole(strategy: Strategy) -> Outcome {
    let recipe = strategy.recipe();
    let mut options = options(strategy, recipe.space);
    options.levels = LevelOptions { importance: recipe.importance, compensation: recipe.compensation, skips: recipe.skips };
    let directory = tempfile::tempdir().unwrap();
    prune(directory.path(), &options, &mut |_| Ok(())).unwrap()
}

#[test]
fn width_strategies_allocate_as_their_papers_do_and_data_beats_magnitude() {
    let [uniform, magnitude, twossp, flap] = [Strategy::Uniform, Strategy::Magnitude, Strategy::Twossp, Strategy::Flap].map(whole);
    let attention = |outcome: &Outcome| outcome.widths.iter().step_by(2).map(|(_, kept)| *kept).collect::<Vec<_>>();
    let mlp = |outcome: &Outcome| outcome.widths.iter().skip(1).step_by(2).map(|(_, kept)| *kept).collect::<Vec<_>>();
    for outcome in [&uniform, &magnitude, &twossp, &flap] {
        let strategy = outcome.run.options.search.strategy;
        assert!(outcome.kept_of_budgets[0].1 <= 0.75 + 1e-9, "{strategy}");
        assert!(outcome.pruned.perplexity.is_finite() && outcome.pruned.perplexity > outcome.dense.perplexity, "{strategy}");
    }
    for outcome in [&uniform, &magnitude, &twossp] {
        assert!(mlp(outcome).iter().all(|w| *w == mlp(outcome)[0] && *w > 0), "{:?}", mlp(outcome));
    }
    assert!(attention(&uniform).iter().all(|w| *w == 2));
    assert_eq!(mlp(&uniform), mlp(&magnitude));
    assert!(uniform.pruned.perplexity < magnitude.pruned.perplexity, "{} {}", uniform.pruned.perplexity, magnitude.pruned.perplexity);
    // 12 x 0.25^(3 x 384 x 128 / (3 x 128 x 128) / 1.5) = 12 x 0.25^2, rounded
    assert_eq!(attention(&twossp).iter().filter(|w| **w == 0).count(), 1, "{:?}", attention(&twossp));
    let distinct: std::collections::BTreeSet<usize> = mlp(&flap).into_iter().collect();
    assert!(distinct.len() > 1, "one ranking over all layers gives them different widths: {:?}", mlp(&flap));
}

/// A source in which the embedding and the output layers before a layer are multiplied by alpha, and the head is the embedding as it was.
#[derive(Debug)]
struct ScaledBefore<'a> {
    base: &'a dyn Source,
    names: TensorNames,
    layer: usize,
    alpha: f32,
}

impl Source for ScaledBefore<'_> {
    fn names(&self) -> Vec<String> {
        self.base.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.base.shape(if name == self.names.head() { self.names.embedding() } else { name })
    }

    fn raw(&self, name: &str) -> evop_model::Result<RawTensor<'_>> {
        let raw = self.base.raw(if name == self.names.head() { self.names.embedding() } else { name })?;
        let is_before = name == self.names.embedding() || (0..self.layer).any(|l| name == self.names.o(l) || name == self.names.down(l));
        let factor = if is_before { self.alpha } else { 1.0 };
        let bytes: Vec<u8> = raw.to_f32().into_iter().flat_map(|v| (v * factor).to_le_bytes()).collect();
        Ok(RawTensor { dtype: DType::F32, shape: raw.shape, bytes: bytes.into() })
    }

    fn mismatch(&self, name: &str, expected: &str, found: &str) -> evop_model::Error {
        self.base.mismatch(name, expected, found)
    }
}

fn logits(decoder: &Decoder) -> Tensor {
    let tokens = &samples()[0].tokens;
    let batch = decoder.batch(&[Span::prompt(tokens.len())]).unwrap();
    decoder.logits(&decoder.forward(tokens, &batch, &mut NoCache).unwrap()).unwrap()
}

#[test]
fn scaling_what_comes_after_a_removed_layer_down_is_scaling_what_came_before_it_up() {
    let (checkpoint, decoder) = tiny();
    let (layer, alpha) = (5, 2.0);
    let pattern = Pattern::dense(checkpoint.config()).without(2 * layer).without(2 * layer + 1);
    // as published: embedding and earlier output layers, with the head untied
    let source = ScaledBefore { base: checkpoint.source().as_ref(), names: TensorNames::of(checkpoint.config().architecture), layer, alpha: alpha as f32 };
    let untied = Config { tie_word_embeddings: false, ..checkpoint.config().clone() };
    let published = Decoder::load(&untied, &source, &Device::Cpu, DType::F32).unwrap().masked(&pattern).unwrap();
    let output_scales = (0..decoder.last_boundary()).map(|s| if s > 2 * layer + 1 { 1.0 / alpha } else { 1.0 }).collect();
    let ours = adjust(&decoder, &Adjustment::Scale(output_scales)).unwrap().masked(&pattern).unwrap();
    let largest = |a: &Tensor, b: &Tensor| (a - b).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
    let difference = largest(&logits(&published), &logits(&ours));
    let without = largest(&logits(&published), &logits(&decoder.masked(&pattern).unwrap()));
    // the same but for the norms' epsilon, which a stream of another scale feels differently
    assert!(difference < 0.02 && difference * 20.0 < without, "{difference} {without}");
    assert!(adjust(&decoder, &Adjustment::Scale(vec![1.0; 3])).unwrap_err().to_string().contains("3 sub-blocks"));
}

#[test]
fn prune_comp_reports_the_loss_of_the_adjusted_model_and_counts_its_work() {
    let (checkpoint, decoder) = tiny();
    let supernet = Supernet::raw(&decoder);
    let space = space(&checkpoint, Space::Layer, 0.25);
    for objective in [NLL, crate::setting::KL] {
        let mut whole = evaluator(&supernet, objective, Savings::default());
        let found = search::search(&mut whole, &space, &small(Strategy::PruneComp), &mut |_| Ok(())).unwrap();
        // 12 + 11 + 10 removals, and each choice once more, compensated
        assert_eq!(whole.work().evaluated, 36);
        let adjustment = found.adjustment.clone().unwrap();
        let removed: Vec<usize> = (0..12).filter(|l| !found.pattern.keeps(2 * l)).collect();
        assert_eq!(removed.len(), 3);
        let Adjustment::Scale(scales) = &adjustment else { panic!("{adjustment:?}") };
        assert!(scales[..2 * removed[0] + 2].iter().all(|s| *s == 1.0));
        assert!((0..23).all(|s| (scales[s] != scales[s + 1]) == (s % 2 == 1 && removed.contains(&(s / 2)))), "{scales:?} {removed:?}");
        // the dense model stays the reference, whatever the weights are
        let adjusted = Supernet::raw(&adjust(&decoder, &adjustment).unwrap());
        let again = whole.over(&adjusted, |e| e.evaluate(std::slice::from_ref(&found.pattern))).unwrap();
        assert_eq!(again[0], found.fitness);
        if objective == NLL {
            assert_eq!(evaluator(&adjusted, objective, Savings::default()).evaluate(&[found.pattern]).unwrap()[0], found.fitness);
        }
        // what the evaluator knew of the model itself is still there
        let before = whole.work().block_forwards;
        let dense = whole.evaluate(&[Pattern::dense(checkpoint.config())]).unwrap();
        assert!(whole.work().block_forwards > before && dense[0].loss < found.fitness.loss);
    }
}

#[test]
fn flatten_keeps_the_parents_shape_and_beats_dropping_the_layers_that_it_merges() {
    let (checkpoint, decoder) = tiny();
    let supernet = Supernet::raw(&decoder);
    let space = space(&checkpoint, Space::Layer, 0.25);
    let mut whole = evaluator(&supernet, NLL, Savings::default());
    let found = search::search(&mut whole, &space, &small(Strategy::Flatten), &mut |_| Ok(())).unwrap();
    let Some(Adjustment::Merge(merges)) = &found.adjustment else { panic!("{:?}", found.adjustment) };
    assert_eq!(merges.len(), 3);
    for merge in merges {
        assert!(merge.into < merge.from && found.pattern.keeps(2 * merges[2].into) && !found.pattern.keeps(2 * merge.from));
        assert_eq!((merge.groups.len(), merge.channels.len()), (2, 384));
        assert!(merge.channels.iter().any(|c| *c < 384) && merge.channels.iter().any(|c| *c >= 384), "channels of both layers stay");
    }
    let merged = adjust(&decoder, found.adjustment.as_ref().unwrap()).unwrap();
    assert_eq!(Pattern::dense(merged.config()), Pattern::dense(decoder.config()));
    // its loss is that of the model that is written
    let merged = Supernet::raw(&merged);
    assert_eq!(evaluator(&merged, NLL, Savings::default()).evaluate(std::slice::from_ref(&found.pattern)).unwrap()[0], found.fitness);
    let dropped = whole.evaluate(&[found.pattern]).unwrap()[0].loss;
    assert!(found.fitness.loss < dropped, "{} {dropped}", found.fitness.loss);
}

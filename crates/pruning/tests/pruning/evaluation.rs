//! The evaluator: equal to evaluating one by one, and cheaper.

use crate::setting::{KL, NLL, evaluator, patterns, samples, search_options, space, tiny};
use evop_model::{NoCache, Pattern, Span};
use evop_pruning::evaluate::Savings;
use evop_pruning::search::{self, Strategy};
use evop_pruning::space::Space;
use evop_pruning::supernet::Supernet;

#[test]
fn a_loss_is_that_of_the_masked_model_run_alone_bit_for_bit() {
    let (checkpoint, decoder) = tiny();
    let supernet = Supernet::raw(&decoder);
    for kind in [Space::Block, Space::JointHeads] {
        let patterns = patterns(&checkpoint, kind);
        let mut together = evaluator(&supernet, NLL, Savings::default());
        let last = evop_model::Pattern::dense(checkpoint.config()).layers().len() * 2 - 1;
        let mut patterns = patterns;
        // children of the first two, which share most of their way
        let children = [patterns[0].without(last), patterns[1].without(last)];
        patterns.extend(children);
        together.anchor(&patterns[..2]);
        // a second batch finds boundary states of the first one's anchors
        let mut fitness = together.evaluate(&patterns[..6]).unwrap();
        let before = together.work().block_forwards;
        fitness.extend(together.evaluate(&patterns[6..12]).unwrap());
        let between = together.work().block_forwards;
        assert!(between > before);
        fitness.extend(together.evaluate(&patterns[12..]).unwrap());
        assert_eq!(together.work().block_forwards, between, "all but the last sub-block was kept, and that is skipped");
        for (pattern, fitness) in patterns.iter().zip(&fitness) {
            let masked = decoder.masked(pattern).unwrap();
            for (sample, mean) in samples().iter().zip(&fitness.segments) {
                let sequence = &sample.tokens;
                let batch = masked.batch(&[Span::prompt(sequence.len())]).unwrap();
                let logits = masked.logits(&masked.forward(sequence, &batch, &mut NoCache).unwrap()).unwrap().to_vec2::<f32>().unwrap();
                let nll: f64 = logits
                    .iter()
                    .zip(&sequence[1..])
                    .map(|(row, target)| row.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln() - f64::from(row[*target as usize]))
                    .sum();
                let expected = nll / (sequence.len() - 1) as f64;
                assert!((mean - expected).abs() < 1e-5, "{mean} {expected}");
            }
            let mut alone = evaluator(&supernet, NLL, Savings { memo: false, prefix: false, prefix_cache_bytes: 0 });
            assert_eq!(alone.evaluate(std::slice::from_ref(pattern)).unwrap()[0], *fitness);
        }
    }
}

#[test]
fn a_cache_too_small_for_the_walk_changes_nothing() {
    let (checkpoint, decoder) = tiny();
    let supernet = Supernet::raw(&decoder);
    let mut patterns = patterns(&checkpoint, Space::Joint);
    // neighbours of each in every MLP, so that widths of one sub-block meet where some of them are cached
    let space = space(&checkpoint, Space::Joint, 0.25);
    let near: Vec<Pattern> = patterns
        .iter()
        .filter_map(|p| space.genome(p))
        .flat_map(|g| (0..space.units()).filter_map(|u| space.lowered(&g, u)).map(|g| space.pattern(&g)).collect::<Vec<_>>())
        .collect();
    patterns.extend(near.into_iter().step_by(5));
    let losses = |states: usize| {
        let bytes = states * 4 * 193 * decoder.config().hidden_size;
        let mut evaluator = evaluator(&supernet, NLL, Savings { prefix_cache_bytes: bytes, ..Savings::default() });
        let mut losses = Vec::new();
        for batch in patterns.chunks(20) {
            evaluator.anchor(&patterns);
            losses.extend(evaluator.evaluate(batch).unwrap().into_iter().map(|f| f.loss));
        }
        losses
    };
    let expected = losses(0);
    for states in [1, 3, 8, 20] {
        assert_eq!(losses(states), expected, "{states} states");
    }
}

#[test]
fn the_dense_models_divergence_from_itself_is_nothing_and_others_have_some() {
    let (checkpoint, decoder) = tiny();
    let supernet = Supernet::raw(&decoder);
    let mut evaluator = evaluator(&supernet, KL, Savings::default());
    let dense = Pattern::dense(checkpoint.config());
    let fitness = evaluator.evaluate(&[dense.clone(), dense.without(5), dense.without(5).without(12)]).unwrap();
    assert!(fitness[0].loss.abs() < 1e-6, "{}", fitness[0].loss);
    assert!(fitness[1].loss > 1e-4 && fitness[2].loss > fitness[1].loss);
}

#[test]
fn a_pattern_is_never_evaluated_twice_on_the_same_tokens() {
    let (checkpoint, decoder) = tiny();
    let supernet = Supernet::raw(&decoder);
    let dense = Pattern::dense(checkpoint.config());
    let mut memo = evaluator(&supernet, NLL, Savings::default());
    let patterns = [dense.clone(), dense.without(0), dense];
    memo.evaluate(&patterns).unwrap();
    memo.evaluate(&patterns).unwrap();
    let work = memo.work();
    assert_eq!((work.requested, work.evaluated), (6, 2));
    // 24 + 23 sub-blocks on 3 sequences one by one; the dense one shares nothing with one that lacks the first sub-block
    assert_eq!(work.memo_block_forwards, 47 * 3);
    let mut none = evaluator(&supernet, NLL, Savings { memo: false, ..Default::default() });
    none.evaluate(&patterns).unwrap();
    none.evaluate(&patterns).unwrap();
    assert_eq!(none.work().evaluated, 6);
}

#[test]
fn exhaustive_search_of_the_220_takes_less_than_half_of_the_block_forwards() {
    let (checkpoint, decoder) = tiny();
    let supernet = Supernet::raw(&decoder);
    let space = space(&checkpoint, Space::Layer, 0.25);
    assert_eq!(search::count_patterns(&space, 1_000), Some(220));
    let mut all = evaluator(&supernet, NLL, Savings::default());
    let optimum = search::search(&mut all, &space, &search_options(Strategy::Exhaustive), &mut |_| Ok(())).unwrap();
    let work = all.work();
    assert_eq!((work.evaluated, work.naive_block_forwards), (220, 220 * 18 * 3));
    assert!(2 * work.block_forwards <= work.naive_block_forwards, "{work:?}");
    // the genetic searches find it too, or are told by how much they missed it
    for strategy in [Strategy::Evop, Strategy::Joint] {
        let mut evaluator = evaluator(&supernet, NLL, Savings::default());
        let found = search::search(&mut evaluator, &space, &search_options(strategy), &mut |_| Ok(())).unwrap();
        assert!(found.history.windows(2).all(|w| w[1].best_loss <= w[0].best_loss));
        let (certificate, chosen) = search::certify(&mut evaluator, &space, &found, &mut |_| Ok(())).unwrap();
        assert_eq!(certificate.optimum, optimum.fitness.loss);
        assert_eq!(chosen.fitness.loss, optimum.fitness.loss);
        assert_eq!(certificate.is_optimal(), found.fitness.loss == optimum.fitness.loss, "{strategy}");
    }
}

#[test]
fn one_thread_and_three_give_the_same_losses() {
    let (checkpoint, decoder) = tiny();
    let supernet = Supernet::raw(&decoder);
    let patterns = patterns(&checkpoint, Space::Joint);
    let losses = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| evaluator(&supernet, KL, Savings::default()).evaluate(&patterns[..3]).unwrap())
    };
    assert_eq!(losses(1), losses(3));
}

#[test]
fn the_first_packs_of_an_evaluation_are_not_computed_again_for_the_rest() {
    let (checkpoint, decoder) = tiny();
    let supernet = Supernet::raw(&decoder);
    let dense = Pattern::dense(checkpoint.config());
    let long: Vec<_> = (0..3).flat_map(|_| samples()).collect();
    // 9 sequences of 65 tokens are one pack; 40 are three
    let many: Vec<_> = long.iter().cycle().take(40).cloned().collect();
    let new = || {
        evop_pruning::evaluate::Evaluator::new(&supernet, &many, NLL, Savings::default(), Default::default(), Default::default(), Box::new(|_, _| Ok(())))
            .unwrap()
    };
    let (mut by_parts, mut at_once) = (new(), new());
    assert_eq!(by_parts.packs(), 3);
    let first = by_parts.evaluate_first(std::slice::from_ref(&dense), 1).unwrap().remove(0);
    let whole = by_parts.evaluate(std::slice::from_ref(&dense)).unwrap().remove(0);
    assert_eq!(whole, at_once.evaluate(&[dense]).unwrap()[0]);
    assert_eq!(whole.segments[..first.segments.len()], first.segments);
    assert_eq!(by_parts.work().block_forwards, at_once.work().block_forwards);
}

//! The evaluator: equal to evaluating one by one, and cheaper.

use crate::setting::{book, tiny};
use evop_model::{NoCache, Pattern, Span};
use evop_pruning::evaluate::{Evaluator, Work};
use evop_pruning::search::{self, SearchOptions, SearchSpace, Space, Strategy};
use std::collections::HashMap;

fn sequences() -> Vec<Vec<u32>> {
    let (checkpoint, _) = tiny();
    let tokens = checkpoint.encode(&book("calibration.txt.gz", 6_000), false).unwrap();
    tokens.chunks_exact(64).take(3).map(<[u32]>::to_vec).collect()
}

#[test]
fn a_loss_is_that_of_the_masked_model_run_alone_bit_for_bit() {
    let (checkpoint, decoder) = tiny();
    let space = SearchSpace::new(checkpoint.config(), Space::Block, 0.25).unwrap();
    let patterns: Vec<Pattern> = (0..12usize).map(|i| space.pattern(&(0..24).map(|u| (u * 7 + i * 5) % 24 < 6).collect::<Vec<_>>())).collect();
    let sequences = sequences();
    let mut evaluator = Evaluator::new(&decoder, &sequences, HashMap::new(), Work::default(), Box::new(|_, _| Ok(()))).unwrap();
    let together = evaluator.evaluate(&patterns).unwrap();
    for (pattern, fitness) in patterns.iter().zip(&together) {
        let masked = decoder.masked(pattern).unwrap();
        let mut loss = 0.0;
        for (sequence, mean) in sequences.iter().zip(&fitness.sequences) {
            let batch = masked.batch(&[Span::prompt(sequence.len())]).unwrap();
            let logits = masked.logits(&masked.forward(sequence, &batch, &mut NoCache).unwrap()).unwrap().to_vec2::<f32>().unwrap();
            let nll: f64 = logits
                .iter()
                .zip(&sequence[1..])
                .map(|(row, target)| {
                    let sum: f64 = row.iter().map(|l| f64::from(*l).exp()).sum();
                    sum.ln() - f64::from(row[*target as usize])
                })
                .sum();
            let expected = nll / (sequence.len() - 1) as f64;
            assert!((mean - expected).abs() < 1e-5, "{mean} {expected}");
            loss += mean * sequence.len() as f64;
        }
        assert_eq!(fitness.loss, loss);
        let mut alone = Evaluator::new(&decoder, &sequences, HashMap::new(), Work::default(), Box::new(|_, _| Ok(()))).unwrap();
        assert_eq!(alone.evaluate(std::slice::from_ref(pattern)).unwrap()[0], *fitness);
    }
}

#[test]
fn a_pattern_is_never_evaluated_twice() {
    let (checkpoint, decoder) = tiny();
    let dense = Pattern::dense(checkpoint.config());
    let mut evaluator = Evaluator::new(&decoder, &sequences(), HashMap::new(), Work::default(), Box::new(|_, _| Ok(()))).unwrap();
    let patterns = [dense.clone(), dense.without(0), dense];
    evaluator.evaluate(&patterns).unwrap();
    evaluator.evaluate(&patterns).unwrap();
    let work = evaluator.work();
    assert_eq!((work.requested, work.evaluated), (6, 2));
    // 24 + 23 sub-blocks on 3 sequences one by one; the dense one shares nothing with one that lacks the first sub-block
    assert_eq!(work.memo_block_forwards, 47 * 3);
}

#[test]
fn exhaustive_search_of_the_220_takes_less_than_half_of_the_block_forwards() {
    let (checkpoint, decoder) = tiny();
    let space = SearchSpace::new(checkpoint.config(), Space::Layer, 0.25).unwrap();
    assert_eq!((search::count_patterns(&space), space.remove), (220, 3));
    let mut evaluator = Evaluator::new(&decoder, &sequences(), HashMap::new(), Work::default(), Box::new(|_, _| Ok(()))).unwrap();
    let options = SearchOptions { strategy: Strategy::Exhaustive, evop: Default::default(), seed: 1 };
    let optimum = search::search(&mut evaluator, &space, &options, &mut |_| Ok(())).unwrap();
    let work = evaluator.work();
    assert_eq!((work.evaluated, work.naive_block_forwards), (220, 220 * 18 * 3));
    assert!(2 * work.block_forwards <= work.naive_block_forwards, "{work:?}");
    // the genetic search finds it too, and is told so
    let mut evaluator = Evaluator::new(&decoder, &sequences(), HashMap::new(), Work::default(), Box::new(|_, _| Ok(()))).unwrap();
    let options = SearchOptions { strategy: Strategy::Evop, evop: Default::default(), seed: 31 };
    let found = search::search(&mut evaluator, &space, &options, &mut |_| Ok(())).unwrap();
    assert!(found.history.windows(2).all(|w| w[1] <= w[0]));
    let (certificate, chosen) = search::certify(&mut evaluator, &space, &found, &mut |_| Ok(())).unwrap();
    assert_eq!(certificate.optimum, optimum.fitness.loss);
    assert_eq!(chosen.fitness.loss, optimum.fitness.loss);
    assert_eq!(certificate.is_optimal(), found.fitness.loss == optimum.fitness.loss);
}

#[test]
fn one_thread_and_three_give_the_same_losses() {
    let (checkpoint, decoder) = tiny();
    let dense = Pattern::dense(checkpoint.config());
    let losses = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let mut evaluator = Evaluator::new(&decoder, &sequences(), HashMap::new(), Work::default(), Box::new(|_, _| Ok(()))).unwrap();
            evaluator.evaluate(&[dense.clone(), dense.without(3)]).unwrap()
        })
    };
    assert_eq!(losses(1), losses(3));
}

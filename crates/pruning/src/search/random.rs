//! The controls: the best of as many random patterns as the search would have evaluated. `random-joint` races them as `joint` does, so that
//! as many patterns cost about as much.

use super::racing::race;
use super::{Best, ELITE, Found, Progress, Strategy, round_rng};
use crate::Result;
use crate::evaluate::Evaluator;
use crate::space::SearchSpace;
use evop_model::Pattern;

/// Patterns between two records of progress.
const CHUNK: usize = 50;

pub(super) fn search(
    evaluator: &mut Evaluator<'_>,
    space: &SearchSpace,
    strategy: Strategy,
    evaluations: usize,
    seed: u64,
    on_round: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<Found> {
    // as many as `joint` offers to the choice on held-out text
    let mut best = Best::of(ELITE);
    let rounds = evaluations.div_ceil(CHUNK);
    for round in 0..rounds {
        let mut rng = round_rng(seed, round);
        let patterns: Vec<Pattern> = (0..CHUNK.min(evaluations - round * CHUNK)).map(|_| space.pattern(&space.random(&mut rng))).collect();
        if strategy == Strategy::RandomJoint {
            let bar = best.found.last().filter(|_| best.found.len() == ELITE).map(|(pattern, _)| pattern.clone());
            for (i, fitness) in race(evaluator, &patterns, bar.as_ref())?.1 {
                best.offer(&patterns[i..=i], &[fitness]);
            }
        } else {
            let fitness = evaluator.evaluate(&patterns)?;
            best.offer(&patterns, &fitness);
        }
        best.end_round(rounds, evaluator, on_round)?;
    }
    best.finish()
}

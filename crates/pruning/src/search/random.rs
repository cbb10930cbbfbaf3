//! The control: the best of as many random patterns as the search would have evaluated.

use super::{Best, ELITE, Found, Progress, round_rng};
use crate::evaluate::Evaluator;
use crate::space::SearchSpace;
use crate::{Error, Result};

/// Patterns between two records of progress.
const CHUNK: usize = 50;

pub(super) fn search(
    evaluator: &mut Evaluator<'_>,
    space: &SearchSpace,
    evaluations: usize,
    seed: u64,
    on_round: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<Found> {
    if evaluations == 0 {
        return Err(Error::option("--evaluations", "expected at least 1, found 0".to_string()));
    }
    // as many as `joint` offers to the choice on held-out text
    let mut best = Best::of(ELITE);
    let rounds = evaluations.div_ceil(CHUNK);
    for round in 0..rounds {
        let mut rng = round_rng(seed, round);
        let patterns: Vec<_> = (0..CHUNK.min(evaluations - round * CHUNK)).map(|_| space.pattern(&space.random(&mut rng))).collect();
        let fitness = evaluator.evaluate(&patterns)?;
        best.offer(&patterns, &fitness);
        best.end_round(rounds, evaluator, on_round)?;
    }
    best.finish()
}

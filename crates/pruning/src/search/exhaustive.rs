//! Every pattern of a small space, in order of genes so that the evaluator's prefix reuse is at its best; the optimum is certified.

use super::{Best, Found, Progress, SearchSpace};
use crate::evaluate::Evaluator;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Patterns between two records of progress.
const CHUNK: usize = 256;
/// More than this is refused: it would never end.
const MOST: u128 = 1_000_000;

/// How a search's result compares with the optimum of the whole space.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// Patterns in the space, all of them evaluated on the same sequences.
    pub patterns: usize,
    /// The lowest loss there is.
    pub optimum: f64,
    /// Loss that the search found.
    pub found: f64,
}

impl Certificate {
    /// Whether the search found the optimum.
    pub fn is_optimal(&self) -> bool {
        self.found <= self.optimum
    }
}

/// Patterns of the space: units choose remove.
pub fn count_patterns(space: &SearchSpace) -> u128 {
    let (n, k) = (space.units() as u128, space.remove as u128);
    (0..k.min(n - k)).fold(1u128, |c, i| c.saturating_mul(n - i) / (i + 1))
}

pub(super) fn search(evaluator: &mut Evaluator<'_>, space: &SearchSpace, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Found> {
    let count = count_patterns(space);
    if count > MOST {
        return Err(Error::option("--strategy", format!("exhaustive search of {count} patterns would not end: expected at most {MOST}; use evop")));
    }
    let mut best = Best::new();
    let rounds = (count as usize).div_ceil(CHUNK);
    let mut selections = Selections::new(space.units(), space.remove);
    loop {
        let patterns: Vec<_> = selections.by_ref().take(CHUNK).map(|s| space.pattern(&s)).collect();
        if patterns.is_empty() {
            return best.finish();
        }
        let fitness = evaluator.evaluate(&patterns)?;
        best.offer(&patterns, &fitness);
        best.end_round(rounds, evaluator, on_round)?;
    }
}

/// Enumerates the space (patterns known already cost nothing) and holds `found` against the optimum.
pub fn certify(
    evaluator: &mut Evaluator<'_>,
    space: &SearchSpace,
    found: &Found,
    on_round: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<(Certificate, Found)> {
    let best = search(evaluator, space, on_round)?;
    let certificate = Certificate { patterns: count_patterns(space) as usize, optimum: best.fitness.loss, found: found.fitness.loss };
    // an equal loss found by the search stays the answer
    let chosen = if certificate.is_optimal() { found.clone() } else { Found { history: found.history.clone(), ..best } };
    Ok((certificate, chosen))
}

/// All ways to skip exactly `k` of `n` units, in order of the resulting genes (skipped sorts first).
struct Selections {
    /// Positions of the skipped units, ascending; `None` at the end.
    current: Option<Vec<usize>>,
    n: usize,
}

impl Selections {
    fn new(n: usize, k: usize) -> Self {
        Self { current: Some((0..k).collect()), n }
    }
}

impl Iterator for Selections {
    type Item = Vec<bool>;

    fn next(&mut self) -> Option<Vec<bool>> {
        let positions = self.current.clone()?;
        let mut skipped = vec![false; self.n];
        positions.iter().for_each(|p| skipped[*p] = true);
        let k = positions.len();
        let movable = (0..k).rev().find(|i| positions[*i] < self.n - k + *i);
        self.current = movable.map(|i| {
            let mut next = positions;
            next[i] += 1;
            for j in i + 1..k {
                next[j] = next[j - 1] + 1;
            }
            next
        });
        Some(skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selections_are_all_there_once_and_in_order() {
        let all: Vec<Vec<bool>> = Selections::new(12, 3).collect();
        assert_eq!(all.len(), 220);
        assert!(all.windows(2).all(|w| w[0] > w[1]));
        assert!(all.iter().all(|s| s.iter().filter(|b| **b).count() == 3));
    }
}

//! Every pattern of a small space, in order of genes so that the evaluator's prefix reuse is at its best; the optimum is certified.

use super::{Best, Found, Progress};
use crate::evaluate::Evaluator;
use crate::space::{Genome, SearchSpace};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Patterns between two records of progress.
const CHUNK: usize = 256;
/// More than this is refused: it would never end.
const MOST: u64 = 1_000_000;

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

/// Maximal patterns of the space (those to which nothing can be added within the budgets), or `None` when there are more than `most`.
pub fn count_patterns(space: &SearchSpace, most: u64) -> Option<u64> {
    // every maximal pattern is a leaf of the walk; a walk of many more nodes than leaves is given up too
    let mut walk = Maximal::new(space, most.saturating_mul(64));
    let mut count = 0;
    while walk.next().is_some() {
        count += 1;
        if count > most {
            return None;
        }
    }
    (!walk.gave_up()).then_some(count)
}

pub(super) fn search(evaluator: &mut Evaluator<'_>, space: &SearchSpace, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Found> {
    let Some(count) = count_patterns(space, MOST) else {
        return Err(Error::option("--strategy", format!("exhaustive search of more than {MOST} patterns would not end: use joint or evop")));
    };
    let mut best = Best::new();
    let rounds = (count as usize).div_ceil(CHUNK);
    let mut walk = Maximal::new(space, u64::MAX);
    loop {
        let patterns: Vec<_> = walk.by_ref().take(CHUNK).map(|genome| space.pattern(&genome)).collect();
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
    let certificate = Certificate { patterns: count_patterns(space, MOST).unwrap_or(0) as usize, optimum: best.fitness.loss, found: found.fitness.loss };
    // an equal loss found by the search stays the answer
    let chosen = if certificate.is_optimal() { found.clone() } else { Found { history: found.history.clone(), ..best } };
    Ok((certificate, chosen))
}

/// The maximal genomes of a space in order of their options, depth first.
struct Maximal<'s> {
    space: &'s SearchSpace,
    /// Options chosen for the first units; the walk goes on behind them.
    prefix: Genome,
    /// Per depth, the next option to try.
    next: Vec<u8>,
    nodes_left: u64,
}

impl<'s> Maximal<'s> {
    fn new(space: &'s SearchSpace, nodes: u64) -> Self {
        Self { space, prefix: Vec::new(), next: vec![0], nodes_left: nodes }
    }

    fn gave_up(&self) -> bool {
        self.nodes_left == 0
    }

    /// Whether some maximal genome may begin with the prefix: with nothing after it fits, and with everything after it, if that
    /// fits too, nothing of the prefix could still be raised.
    fn is_possible(&self) -> bool {
        let rest = |fill: &dyn Fn(usize) -> u8| -> Genome { self.prefix.iter().copied().chain((self.prefix.len()..self.space.units()).map(fill)).collect() };
        let least = rest(&|_| 0);
        if !self.space.fits(&least) {
            return false;
        }
        let most = rest(&|u| (self.space.options(u) - 1) as u8);
        !self.space.fits(&most) || self.space.is_maximal(&most)
    }
}

impl Iterator for Maximal<'_> {
    type Item = Genome;

    fn next(&mut self) -> Option<Genome> {
        loop {
            let depth = self.prefix.len();
            if depth == self.space.units() {
                let found = self.prefix.clone();
                self.prefix.pop();
                self.next.pop();
                if self.space.is_maximal(&found) {
                    return Some(found);
                }
                continue;
            }
            let option = *self.next.get(depth)?;
            if usize::from(option) == self.space.options(depth) {
                // all options of this unit are done: back to the one before
                self.next.pop();
                self.prefix.pop()?;
                continue;
            }
            self.nodes_left = self.nodes_left.checked_sub(1)?;
            self.next[depth] += 1;
            self.prefix.push(option);
            if self.is_possible() {
                self.next.push(0);
            } else {
                self.prefix.pop();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::{Budget, Resource};
    use crate::space::{Grid, Space, SpaceOptions};
    use evop_model::Config;

    fn space(layers: usize, kind: Space, keep: f64) -> SearchSpace {
        let json = format!(
            r#"{{"model_type":"llama","vocab_size":8,"hidden_size":64,"intermediate_size":128,"num_hidden_layers":{layers},"num_attention_heads":2,"max_position_embeddings":16}}"#
        );
        let config = Config::from_json(&json, std::path::Path::new("config.json")).unwrap();
        let budgets = vec![Budget::new(Resource::Params, keep).unwrap()];
        SearchSpace::new(&config, &SpaceOptions { space: kind, uniform: false, grid: Grid { steps: 4, multiple: Some(32) }, budgets }, None).unwrap()
    }

    #[test]
    fn three_of_twelve_layers_are_220_patterns_in_order() {
        let space = space(12, Space::Layer, 0.75);
        let all: Vec<Genome> = Maximal::new(&space, u64::MAX).collect();
        assert_eq!(all.len(), 220);
        assert_eq!(count_patterns(&space, 220), Some(220));
        assert_eq!(count_patterns(&space, 219), None);
        assert!(all.windows(2).all(|w| w[0] < w[1]));
        assert!(all.iter().all(|g| g.iter().filter(|o| **o == 0).count() == 3));
    }

    #[test]
    fn a_space_of_unequal_costs_is_walked_to_its_maximal_patterns_and_no_others() {
        let space = space(2, Space::Joint, 0.6);
        let found: Vec<Genome> = Maximal::new(&space, u64::MAX).collect();
        let mut every = vec![vec![]];
        for unit in 0..space.units() {
            every = every.into_iter().flat_map(|g: Genome| (0..space.options(unit) as u8).map(move |o| [g.clone(), vec![o]].concat())).collect();
        }
        let expected: Vec<Genome> = every.into_iter().filter(|g| space.is_maximal(g)).collect();
        assert!(expected.len() > 3);
        assert_eq!(found, expected);
    }
}

//! EPPS, the evolutionary pruning pattern search of EvoP, as its authors' code runs it.

use super::{Best, Found, Progress, SearchSpace, round_rng};
use crate::evaluate::{Evaluator, Fitness};
use crate::{Error, Result};
use evop_model::Pattern;
use rand::Rng;
use rand::seq::IteratorRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// The genetic algorithm's parameters; the defaults are the published ones.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvopOptions {
    /// Individuals.
    pub population: usize,
    /// Generations.
    pub generations: usize,
    /// Individuals drawn for each tournament.
    pub tournament: usize,
    /// Probability that a bit flips.
    pub mutation: f64,
}

impl Default for EvopOptions {
    fn default() -> Self {
        Self { population: 50, generations: 100, tournament: 3, mutation: 0.001 }
    }
}

/// Bits a unit, true = skipped. Every generation: evaluate, select by tournament, cross at two points, flip bits, repair to exactly
/// `space.remove` ones by random flips. No elitism; the best pattern of any generation is returned.
pub(super) fn search(
    evaluator: &mut Evaluator<'_>,
    space: &SearchSpace,
    options: &EvopOptions,
    seed: u64,
    on_round: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<Found> {
    for (option, value, least) in [("--population", options.population, 2), ("--generations", options.generations, 1), ("--tournament", options.tournament, 1)]
    {
        if value < least {
            return Err(Error::option(option, format!("expected at least {least}, found {value}")));
        }
    }
    let mut best = Best::new();
    let mut population: Vec<Vec<bool>> = {
        let mut rng = round_rng(seed, 0);
        (0..options.population)
            .map(|_| {
                let mut bits: Vec<bool> = (0..space.units()).map(|_| rng.random_bool(0.5)).collect();
                repair(&mut bits, space.remove, &mut rng);
                bits
            })
            .collect()
    };
    for generation in 1..=options.generations {
        let patterns: Vec<Pattern> = population.iter().map(|bits| space.pattern(bits)).collect();
        let fitness = evaluator.evaluate(&patterns)?;
        best.offer(&patterns, &fitness);
        best.end_round(options.generations, evaluator, on_round)?;
        population = next_generation(&population, &fitness, space.remove, options, &mut round_rng(seed, generation));
    }
    best.finish()
}

fn next_generation(population: &[Vec<bool>], fitness: &[Fitness], ones: usize, options: &EvopOptions, rng: &mut ChaCha8Rng) -> Vec<Vec<bool>> {
    let size = population.len();
    let tournament = |rng: &mut ChaCha8Rng| {
        let drawn = (0..options.tournament).map(|_| rng.random_range(0..size));
        // a loss that isn't a number loses every tournament
        drawn.reduce(|best, other| if fitness[other].loss < fitness[best].loss || fitness[best].loss.is_nan() { other } else { best }).unwrap_or(0)
    };
    let mut children: Vec<Vec<bool>> = (0..size).map(|_| population[tournament(rng)].clone()).collect();
    let half = size / 2;
    for pair in 0..half {
        let length = children[pair].len();
        let (a, b) = (rng.random_range(0..length), rng.random_range(0..length));
        let (left, right) = children.split_at_mut(half);
        left[pair][a.min(b)..a.max(b) + 1].swap_with_slice(&mut right[pair][a.min(b)..a.max(b) + 1]);
    }
    for child in &mut children {
        for bit in child.iter_mut() {
            *bit ^= rng.random_bool(options.mutation);
        }
        repair(child, ones, rng);
    }
    children
}

/// Flips random bits until exactly `ones` are set.
fn repair(bits: &mut [bool], ones: usize, rng: &mut ChaCha8Rng) {
    loop {
        let set = bits.iter().filter(|b| **b).count();
        if set == ones {
            return;
        }
        let wrong = set > ones;
        if let Some(at) = (0..bits.len()).filter(|i| bits[*i] == wrong).choose(rng) {
            bits[at] = !wrong;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repair_reaches_the_count_from_both_sides() {
        let mut rng = round_rng(1, 1);
        for start in [vec![true; 9], vec![false; 9], vec![true, false, true, false, true, false, true, false, true]] {
            let mut bits = start;
            repair(&mut bits, 4, &mut rng);
            assert_eq!(bits.iter().filter(|b| **b).count(), 4);
        }
    }

    #[test]
    fn a_generation_keeps_size_and_count_and_is_drawn_from_its_parents() {
        let options = EvopOptions { mutation: 0.0, ..Default::default() };
        let population: Vec<Vec<bool>> = (0..10).map(|i| (0..12).map(|l| (l + i) % 4 == 0).collect()).collect();
        let fitness: Vec<Fitness> = (0..10).map(|i| Fitness { loss: f64::from(i), sequences: vec![] }).collect();
        let next = next_generation(&population, &fitness, 3, &options, &mut round_rng(5, 2));
        assert_eq!(next.len(), 10);
        assert!(next.iter().all(|c| c.iter().filter(|b| **b).count() == 3));
        assert_eq!(next, next_generation(&population, &fitness, 3, &options, &mut round_rng(5, 2)));
    }
}

//! EPPS, the evolutionary pruning pattern search of EvoP, as its authors' code runs it.

use super::{Best, Found, Progress, SearchSpace, round_rng};
use crate::Result;
use crate::evaluate::Evaluator;
use crate::objective::Fitness;
use crate::space::Genome;
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

/// A bit a unit. Every generation: evaluate, select by tournament, cross at two points, flip bits, repair to the budget (with equal units: to
/// exactly k removed) by random flips. No elitism; the best pattern of any generation is returned. Where a unit has more than two
/// options, a flip is a step to a random other one.
pub(super) fn search(
    evaluator: &mut Evaluator<'_>,
    space: &SearchSpace,
    options: &EvopOptions,
    seed: u64,
    on_round: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<Found> {
    let mut best = Best::new();
    let mut population: Vec<Genome> = {
        let mut rng = round_rng(seed, 0);
        (0..options.population).map(|_| space.random(&mut rng)).collect()
    };
    for generation in 1..=options.generations {
        let patterns: Vec<Pattern> = population.iter().map(|genome| space.pattern(genome)).collect();
        let fitness = evaluator.evaluate(&patterns)?;
        best.offer(&patterns, &fitness);
        best.end_round(options.generations, evaluator, on_round)?;
        population = next_generation(&population, &fitness, space, options, &mut round_rng(seed, generation));
    }
    best.finish()
}

fn next_generation(population: &[Genome], fitness: &[Fitness], space: &SearchSpace, options: &EvopOptions, rng: &mut ChaCha8Rng) -> Vec<Genome> {
    let size = population.len();
    let tournament = |rng: &mut ChaCha8Rng| {
        let drawn = (0..options.tournament).map(|_| rng.random_range(0..size));
        // a loss that isn't a number loses every tournament
        drawn.reduce(|best, other| if fitness[other].loss < fitness[best].loss || fitness[best].loss.is_nan() { other } else { best }).unwrap_or(0)
    };
    let mut children: Vec<Genome> = (0..size).map(|_| population[tournament(rng)].clone()).collect();
    let half = size / 2;
    for pair in 0..half {
        let length = children[pair].len();
        let (a, b) = (rng.random_range(0..length), rng.random_range(0..length));
        let (left, right) = children.split_at_mut(half);
        left[pair][a.min(b)..a.max(b) + 1].swap_with_slice(&mut right[pair][a.min(b)..a.max(b) + 1]);
    }
    for child in &mut children {
        for (unit, option) in child.iter_mut().enumerate() {
            if rng.random_bool(options.mutation) {
                let others = (0..space.options(unit) as u8).filter(|o| o != option);
                *option = others.choose(rng).unwrap_or(*option);
            }
        }
        space.repair(child, rng);
    }
    children
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::{Budget, Resource};
    use crate::space::{Grid, Space, SpaceOptions};
    use evop_model::Config;

    #[test]
    fn a_generation_keeps_size_and_count_and_is_drawn_from_its_parents() {
        let config = Config::from_json(
            r#"{"model_type":"llama","vocab_size":8,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":12,"num_attention_heads":2,"max_position_embeddings":16}"#,
            std::path::Path::new("config.json"),
        )
        .unwrap();
        let budgets = vec![Budget::new(Resource::Params, 0.75).unwrap()];
        let space = SearchSpace::new(&config, &SpaceOptions { space: Space::Layer, uniform: false, grid: Grid::default(), budgets }, None).unwrap();
        let options = EvopOptions { mutation: 0.0, ..Default::default() };
        let population: Vec<Genome> = (0..10).map(|i| (0..12).map(|l| u8::from((l + i) % 4 != 0)).collect()).collect();
        let fitness: Vec<Fitness> = (0..10).map(|i| Fitness { loss: f64::from(i), segments: vec![] }).collect();
        let next = next_generation(&population, &fitness, &space, &options, &mut round_rng(5, 2));
        assert_eq!(next.len(), 10);
        assert!(next.iter().all(|c| c.iter().filter(|o| **o == 0).count() == 3), "a quarter of twelve, exactly");
        assert_eq!(next, next_generation(&population, &fitness, &space, &options, &mut round_rng(5, 2)));
    }
}

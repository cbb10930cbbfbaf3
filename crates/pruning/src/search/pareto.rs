//! A whole front in one run: the least loss at every cost, by NSGA-II (Deb et al. 2002, IEEE Trans. Evol. Comp. 6(2)) over loss and what the
//! first budget counts.
//!
//! Of drafts ([`crate::objective::FitnessKind::Draft`]) not the front survives but what makes a token fastest: agreement and time in one number.
//!
//! The first population is made of the seeds that `joint` would begin with at fifteen budgets. Children are made by crossover and by steps of
//! single units up or down, so they land at any cost; all other budgets hold for every point.

use super::seeds::{Sensitivities, seeds};
use super::{Best, ELITE, Found, Progress, cross, preparing, round_rng, step};
use crate::Result;
use crate::evaluate::Evaluator;
use crate::space::{Genome, SearchSpace};
use evop_model::Pattern;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Parameters of the search for a front.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ParetoOptions {
    /// Points kept from one generation to the next.
    pub population: usize,
    /// Generations.
    pub generations: usize,
    /// The front begins where this fraction is kept.
    pub least: f64,
}

impl Default for ParetoOptions {
    fn default() -> Self {
        Self { population: 48, generations: 60, least: 0.3 }
    }
}

/// A pattern that no other one beats in both loss and cost.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FrontPoint {
    /// What is kept of the first budget's resource, as a fraction.
    pub kept: f64,
    /// Its loss.
    pub loss: f64,
    /// The pattern.
    pub pattern: Pattern,
}

/// Budgets whose seeds begin the search.
const TARGETS: usize = 15;
/// Seeds taken of each: the knapsacks and the greedy allocation come first.
const SEEDS_EACH: usize = 4;

struct Point {
    genome: Genome,
    pattern: Pattern,
    kept: f64,
    loss: f64,
    /// A token's time with this pattern as a draft, where drafts are searched for.
    time: Option<f64>,
}

pub(super) fn search(
    evaluator: &mut Evaluator<'_>,
    space: &SearchSpace,
    options: &ParetoOptions,
    seed: u64,
    on_round: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<Found> {
    let widest = space.with_first_budget(1.0);
    let sensitivities = Sensitivities::measure(evaluator, &widest, &mut |e| on_round(preparing(e, options.generations + 1)))?;
    let target = |i: usize| options.least + (1.0 - options.least) * i as f64 / TARGETS as f64;
    let mut children = seeds(space, &sensitivities);
    for i in 0..TARGETS {
        children.extend(seeds(&space.with_first_budget(target(i)), &sensitivities).into_iter().take(SEEDS_EACH));
    }
    let drafts = evaluator.objective().for_drafts();
    let mut best = Best::of(ELITE);
    let mut seen: BTreeSet<Genome> = BTreeSet::new();
    let mut population: Vec<Point> = Vec::new();
    for generation in 0..=options.generations {
        children.retain(|genome| seen.insert(genome.clone()));
        let patterns: Vec<Pattern> = children.iter().map(|g| space.pattern(g)).collect();
        let fitness = evaluator.evaluate(&patterns)?;
        for ((genome, pattern), mut fitness) in children.drain(..).zip(patterns).zip(fitness) {
            let loss = fitness.loss;
            let time = if drafts { space.drafting(&pattern, loss).map(|drafting| drafting.time) } else { None };
            fitness.loss = time.unwrap_or(loss);
            if space.fits(&genome) {
                best.offer(std::slice::from_ref(&pattern), std::slice::from_ref(&fitness));
            }
            if fitness.loss.is_finite() {
                population.push(Point { kept: space.totals(&genome)[0], genome, pattern, loss, time });
            }
        }
        population = if drafts { fastest(population, options.population) } else { survive(population, options.population) };
        evaluator.anchor(&population.iter().map(|p| p.pattern.clone()).collect::<Vec<_>>());
        best.end_round(options.generations + 1, evaluator, on_round)?;
        if generation == options.generations || population.is_empty() {
            break;
        }
        let mut rng = round_rng(seed, generation + 1);
        // new genomes only, of a bounded number of draws: a small space may have none left
        for _ in 0..options.population * 20 {
            if children.len() == options.population {
                break;
            }
            let child = child(&population, &widest, &mut rng);
            if !seen.contains(&child) && !children.contains(&child) && space.totals(&child)[0] >= options.least {
                children.push(child);
            }
        }
        if children.is_empty() {
            break;
        }
    }
    let front = first_front(&population);
    let mut points: Vec<FrontPoint> =
        front.into_iter().map(|i| FrontPoint { kept: population[i].kept, loss: population[i].loss, pattern: population[i].pattern.clone() }).collect();
    points.sort_by(|a, b| a.kept.total_cmp(&b.kept));
    Ok(Found { front: points, ..best.finish()? })
}

/// Whether `a` is at least as good as `b` in both, and better in one.
fn dominates(a: &Point, b: &Point) -> bool {
    a.loss <= b.loss && a.kept <= b.kept && (a.loss < b.loss || a.kept < b.kept)
}

/// The points that no other one dominates.
fn first_front(points: &[Point]) -> Vec<usize> {
    (0..points.len()).filter(|i| !points.iter().any(|other| dominates(other, &points[*i]))).collect()
}

/// The `count` drafts with the shortest time of a token, the shortest first.
fn fastest(mut points: Vec<Point>, count: usize) -> Vec<Point> {
    points.sort_by(|a, b| a.time.unwrap_or(f64::INFINITY).total_cmp(&b.time.unwrap_or(f64::INFINITY)).then_with(|| a.genome.cmp(&b.genome)));
    points.truncate(count);
    points
}

/// The best `count`, best first: by front and, within a front, by crowding distance.
fn survive(points: Vec<Point>, count: usize) -> Vec<Point> {
    let mut left: Vec<Point> = points;
    let mut survivors = Vec::new();
    while survivors.len() < count && !left.is_empty() {
        let front = first_front(&left);
        let (mut of_front, mut rest) = (Vec::new(), Vec::new());
        left.into_iter().enumerate().for_each(|(i, p)| if front.binary_search(&i).is_ok() { of_front.push(p) } else { rest.push(p) });
        left = rest;
        let distances = crowding(&of_front);
        let mut order: Vec<usize> = (0..of_front.len()).collect();
        order.sort_by(|a, b| distances[*b].total_cmp(&distances[*a]).then(a.cmp(b)));
        let mut of_front: Vec<Option<Point>> = of_front.into_iter().map(Some).collect();
        for i in order.into_iter().take(count - survivors.len()) {
            survivors.extend(of_front[i].take());
        }
    }
    survivors
}

/// How much room a point has in its front: the relative distance of its neighbours in both directions, infinite at the ends.
fn crowding(front: &[Point]) -> Vec<f64> {
    let mut distances = vec![0.0; front.len()];
    for value in [|p: &Point| p.kept, |p: &Point| p.loss] {
        let mut order: Vec<usize> = (0..front.len()).collect();
        order.sort_by(|a, b| value(&front[*a]).total_cmp(&value(&front[*b])).then(a.cmp(b)));
        let (Some(first), Some(last)) = (order.first(), order.last()) else { return distances };
        let span = (value(&front[*last]) - value(&front[*first])).max(f64::MIN_POSITIVE);
        (distances[*first], distances[*last]) = (f64::INFINITY, f64::INFINITY);
        for at in order.windows(3) {
            distances[at[1]] += (value(&front[at[2]]) - value(&front[at[0]])) / span;
        }
    }
    distances
}

/// Crossover of two tournament winners in a quarter of the cases, then up to three steps of single units; repaired where a budget besides the
/// first one is broken, or nothing is removed.
fn child(population: &[Point], widest: &SearchSpace, rng: &mut ChaCha8Rng) -> Genome {
    // the population is sorted, best first: of two the earlier one wins
    let winner = |rng: &mut ChaCha8Rng| rng.random_range(0..population.len()).min(rng.random_range(0..population.len()));
    let mut genome = population[winner(rng)].genome.clone();
    if rng.random_bool(0.25) {
        cross(&mut genome, &population[winner(rng)].genome, rng);
    }
    for _ in 0..rng.random_range(1..=3) {
        step(widest, &mut genome, rng);
    }
    if !widest.fits(&genome) {
        widest.repair(&mut genome, rng);
    }
    genome
}

#[cfg(test)]
mod tests {
    use super::*;
    use evop_model::Config;

    fn points(of: &[(f64, f64)]) -> Vec<Point> {
        let config = Config::from_json(
            r#"{"model_type":"llama","vocab_size":8,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":1,"num_attention_heads":2,"max_position_embeddings":16}"#,
            std::path::Path::new("config.json"),
        )
        .unwrap();
        of.iter().map(|(kept, loss)| Point { genome: Vec::new(), pattern: Pattern::dense(&config), kept: *kept, loss: *loss, time: Some(*loss) }).collect()
    }

    #[test]
    fn a_front_is_what_nothing_beats_in_both() {
        let all = points(&[(0.5, 2.0), (0.6, 1.0), (0.7, 1.5), (0.5, 3.0), (0.9, 0.5)]);
        assert_eq!(first_front(&all), [0, 1, 4]);
    }

    #[test]
    fn the_fastest_drafts_survive() {
        let times: Vec<f64> = fastest(points(&[(0.5, 0.9), (0.2, 0.7), (0.3, 1.1), (0.9, 0.8)]), 3).iter().filter_map(|p| p.time).collect();
        assert_eq!(times, [0.7, 0.8, 0.9]);
    }

    #[test]
    fn the_ends_and_the_points_with_room_survive() {
        // five on one front, the middle ones at 0.50 and 0.52 crowd each other; one that is dominated
        let all = points(&[(0.3, 5.0), (0.5, 3.0), (0.52, 2.9), (0.8, 1.0), (1.0, 0.0), (0.9, 4.0)]);
        let survivors = survive(all, 4);
        let mut kept: Vec<f64> = survivors.iter().map(|p| p.kept).collect();
        kept.sort_by(f64::total_cmp);
        assert!(kept == [0.3, 0.5, 0.8, 1.0] || kept == [0.3, 0.52, 0.8, 1.0], "{kept:?}");
    }
}

//! EvoPress (arXiv 2410.14649, algorithms 1 and 2) for drops: a (1 + lambda) evolution of one parent. A child makes a few switches, each of a
//! kept and a dropped unit of the same kind, so that the budget goes on holding; children are selected on few tokens first.
//!
//! As published: as many attentions as MLPs go, 64 random patterns compete to be the first parent, 32 children a generation, k (n - k) / 1.5
//! generations when k of n layers go, two survivors of the first tokens and one of all, against the parent. Not as published: the tokens are the same in all
//! generations, which lets the evaluator remember; and what the budget leaves after equal counts is filled.

use super::{Best, Found, Progress, Strategy, rankable, round_rng};
use crate::evaluate::Evaluator;
use crate::space::{Genome, SearchSpace};
use crate::{Error, Result};
use evop_model::Pattern;
use rand::Rng;
use rand::seq::{IndexedRandom, IteratorRandom};
use rand_chacha::ChaCha8Rng;

/// Random patterns of which the best is the first parent, and the part of the packs that they are scored on.
const INITIAL: (usize, usize) = (64, 8);
/// Children of a generation.
const OFFSPRING: usize = 32;
/// Children that go on from the first selection, and the part of the packs that it looks at.
const SURVIVORS: (usize, usize) = (2, 4);
/// Neighbours by one switch for each generation.
const SWITCHES_A_GENERATION: f64 = 1.5;

/// `cap` bounds the generations where the published schedule would be longer.
pub(super) fn search(
    evaluator: &mut Evaluator<'_>,
    space: &SearchSpace,
    cap: Option<usize>,
    seed: u64,
    on_round: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<Found> {
    if !space.is_binary() {
        return Err(Error::option("--space", format!("{} switches whole units: expected layer or block, without --uniform", Strategy::Evopress)));
    }
    let kinds = kinds(space);
    let count = drops_of_each_kind(space, &kinds);
    let generations = generations(&kinds, count).min(cap.unwrap_or(usize::MAX));
    let packs = evaluator.packs();
    let mut best = Best::new();

    let mut rng = round_rng(seed, 0);
    let initial: Vec<Genome> = (0..INITIAL.0).map(|_| draw(space, &kinds, count, &mut rng)).collect();
    let mut parent = select(evaluator, space, &initial, packs.div_ceil(INITIAL.1), 1)?.remove(0);
    let first = [space.pattern(&parent)];
    best.offer(&first, &evaluator.evaluate(&first)?);
    best.end_round(generations + 1, evaluator, on_round)?;
    for generation in 1..=generations {
        let children = offspring(space, &kinds, &parent, &mut round_rng(seed, generation));
        if children.is_empty() {
            break; // nothing can be switched
        }
        evaluator.anchor(&[space.pattern(&parent)]);
        let mut finalists = vec![parent];
        finalists.extend(select(evaluator, space, &children, packs.div_ceil(SURVIVORS.1), SURVIVORS.0)?);
        let patterns: Vec<Pattern> = finalists.iter().map(|g| space.pattern(g)).collect();
        let fitness = evaluator.evaluate(&patterns)?;
        best.offer(&patterns, &fitness);
        // a child as good as its parent takes its place only by being better
        let winner = (0..finalists.len()).reduce(|best, other| if rankable(fitness[other].loss) < rankable(fitness[best].loss) { other } else { best });
        parent = finalists.swap_remove(winner.unwrap_or(0));
        best.end_round(generations + 1, evaluator, on_round)?;
    }
    best.finish()
}

/// The best `survivors` of these on the first `packs` packs, best first.
fn select(evaluator: &mut Evaluator<'_>, space: &SearchSpace, genomes: &[Genome], packs: usize, survivors: usize) -> Result<Vec<Genome>> {
    let patterns: Vec<Pattern> = genomes.iter().map(|g| space.pattern(g)).collect();
    let fitness = evaluator.evaluate_first(&patterns, packs)?;
    let mut order: Vec<usize> = (0..genomes.len()).collect();
    order.sort_by(|a, b| rankable(fitness[*a].loss).total_cmp(&rankable(fitness[*b].loss)));
    Ok(order.into_iter().take(survivors).map(|i| genomes[i].clone()).collect())
}

/// Units that may take each other's place: attentions, MLPs, whole layers.
fn kinds(space: &SearchSpace) -> Vec<Vec<usize>> {
    let kind = |u: usize| space.sub_blocks(u).iter().map(|s| s % 2).collect::<Vec<_>>();
    let mut kinds: Vec<(Vec<usize>, Vec<usize>)> = Vec::new();
    for unit in 0..space.units() {
        match kinds.iter_mut().find(|(k, _)| *k == kind(unit)) {
            Some((_, units)) => units.push(unit),
            None => kinds.push((kind(unit), vec![unit])),
        }
    }
    kinds.into_iter().map(|(_, units)| units).collect()
}

/// How many units of each kind have to go.
fn drops_of_each_kind(space: &SearchSpace, kinds: &[Vec<usize>]) -> usize {
    let most = kinds.iter().map(Vec::len).max().unwrap_or(0);
    let fits = |count: &usize| {
        let mut genome = space.dense_genome();
        kinds.iter().flat_map(|units| units.iter().take(*count)).for_each(|u| genome[*u] = 0);
        space.fits(&genome)
    };
    (0..=most).find(fits).unwrap_or(most)
}

/// k (n - k) / 1.5, of the kind for which that is most.
fn generations(kinds: &[Vec<usize>], count: usize) -> usize {
    let switches = kinds.iter().map(|units| count.min(units.len()) * (units.len() - count.min(units.len()))).max().unwrap_or(0);
    (switches as f64 / SWITCHES_A_GENERATION).ceil() as usize
}

/// A random genome without `count` units of each kind.
fn draw(space: &SearchSpace, kinds: &[Vec<usize>], count: usize, rng: &mut ChaCha8Rng) -> Genome {
    let mut genome = space.dense_genome();
    for units in kinds {
        units.iter().choose_multiple(rng, count).into_iter().for_each(|u| genome[*u] = 0);
    }
    space.repair(&mut genome, rng);
    genome
}

/// Different children of a parent, all within the budgets.
fn offspring(space: &SearchSpace, kinds: &[Vec<usize>], parent: &Genome, rng: &mut ChaCha8Rng) -> Vec<Genome> {
    let mut children: Vec<Genome> = Vec::with_capacity(OFFSPRING);
    for _ in 0..16 * OFFSPRING {
        if children.len() == OFFSPRING {
            break;
        }
        let mut child = parent.clone();
        let switches = rng.random_range(1..=3).min(rng.random_range(1..=3));
        (0..switches).for_each(|_| switch(kinds, &mut child, rng));
        if child != *parent && space.fits(&child) && !children.contains(&child) {
            children.push(child);
        }
    }
    children
}

/// A kept and a dropped unit of one kind change places (level-switch mutation, algorithm 2).
fn switch(kinds: &[Vec<usize>], genome: &mut Genome, rng: &mut ChaCha8Rng) {
    let movable: Vec<&Vec<usize>> = kinds.iter().filter(|units| units.iter().any(|u| genome[*u] != genome[units[0]])).collect();
    let Some(units) = movable.choose(rng) else { return };
    let kept = units.iter().copied().filter(|u| genome[*u] > 0).choose(rng);
    let dropped = units.iter().copied().filter(|u| genome[*u] == 0).choose(rng);
    if let (Some(kept), Some(dropped)) = (kept, dropped) {
        genome.swap(kept, dropped);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::{Budget, Resource};
    use crate::space::{Grid, Space, SpaceOptions};
    use evop_model::Config;

    #[test]
    fn children_keep_the_number_of_drops_of_each_kind() {
        let config = Config::from_json(
            r#"{"model_type":"llama","vocab_size":8,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":12,"num_attention_heads":2,"max_position_embeddings":16}"#,
            std::path::Path::new("config.json"),
        )
        .unwrap();
        let budgets = vec![Budget::new(Resource::Params, 0.75).unwrap()];
        let space = SearchSpace::new(&config, &SpaceOptions { space: Space::Block, uniform: false, grid: Grid::default(), budgets }, None).unwrap();
        let kinds = kinds(&space);
        assert_eq!(kinds, [(0..24).step_by(2).collect::<Vec<_>>(), (1..24).step_by(2).collect()]);
        let count = drops_of_each_kind(&space, &kinds);
        assert_eq!((count, generations(&kinds, count)), (3, 18));
        let mut rng = round_rng(7, 0);
        let parent = draw(&space, &kinds, count, &mut rng);
        let dropped = |genome: &Genome| kinds.iter().map(|units| units.iter().filter(|u| genome[**u] == 0).count()).collect::<Vec<_>>();
        assert_eq!(dropped(&parent), [3, 3]);
        let children = offspring(&space, &kinds, &parent, &mut rng);
        assert_eq!(children.len(), OFFSPRING);
        for child in &children {
            assert_eq!(dropped(child), [3, 3]);
            let moved = child.iter().zip(&parent).filter(|(a, b)| a != b).count();
            assert!(space.fits(child) && (2..=6).contains(&moved) && moved.is_multiple_of(2));
        }
    }
}

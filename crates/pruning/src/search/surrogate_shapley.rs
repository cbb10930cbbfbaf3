//! Pruning as a cooperative game (arXiv 2602.07804): layers are players, s(m) = PPL(dense) / PPL(m) is what a coalition m of them is worth. A small
//! network learns s from masks sampled alike over all numbers of layers; Shapley values on the network say what each layer brings, and those
//! that bring least go.

use super::mlp::Mlp;
use super::{Best, Found, Progress, Strategy, drop_in_order, one_shot, round_rng};
use crate::evaluate::Evaluator;
use crate::space::{Genome, SearchSpace};
use crate::{Error, Result};
use evop_model::Pattern;
use rand::seq::{IteratorRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeSet;

/// Masks between two records of progress.
const CHUNK: usize = 50;
/// Orders in which players join.
const PERMUTATIONS: usize = 256;

pub(super) fn search(
    evaluator: &mut Evaluator<'_>,
    space: &SearchSpace,
    evaluations: usize,
    seed: u64,
    on_round: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<Found> {
    if !space.is_binary() || space.units() < 2 {
        return Err(Error::option(
            "--space",
            format!("{} plays with two or more whole units: expected layer or block, without --uniform", Strategy::SurrogateShapley),
        ));
    }
    let masks = masks(space.units(), evaluations, &mut round_rng(seed, 0));
    let dense = evaluator.evaluate(std::slice::from_ref(space.dense()))?[0].loss;
    let mut examples = vec![(vec![true; space.units()], 1.0)];
    // of the masks those that fit are shown while they are sampled; the answer is the game's
    let mut best = Best::new();
    let rounds = masks.len().div_ceil(CHUNK) + 1;
    for chunk in masks.chunks(CHUNK) {
        let genomes: Vec<Genome> = chunk.iter().map(|mask| mask.iter().map(|kept| u8::from(*kept)).collect()).collect();
        let patterns: Vec<Pattern> = genomes.iter().map(|g| space.pattern(g)).collect();
        let fitness = evaluator.evaluate(&patterns)?;
        for (i, fitness) in fitness.iter().enumerate() {
            let worth = if fitness.loss.is_finite() { (dense - fitness.loss).exp() } else { 0.0 };
            examples.push((chunk[i].clone(), worth));
            if space.fits(&genomes[i]) {
                best.offer(&patterns[i..=i], std::slice::from_ref(fitness));
            }
        }
        best.end_round(rounds, evaluator, on_round)?;
    }
    let model = Mlp::fit(&examples, &mut round_rng(seed, 1));
    let values = shapley(space.units(), |mask| model.predict(mask), PERMUTATIONS, &mut round_rng(seed, 2));
    let mut order: Vec<usize> = (0..space.units()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut history = best.history;
    let found = one_shot(evaluator, space, &drop_in_order(space, &order), &mut |progress| on_round(Progress { round: rounds, rounds, ..progress }))?;
    history.extend(&found.history);
    Ok(Found { history, ..found })
}

/// Different random masks, as many of each number of removed players as there are, in turn.
fn masks(players: usize, count: usize, rng: &mut ChaCha8Rng) -> Vec<Vec<bool>> {
    let mut known = BTreeSet::new();
    let mut masks = Vec::with_capacity(count);
    // strata of few masks are soon exhausted: what is drawn again is given up
    for draw in 0..8 * count {
        if masks.len() == count {
            break;
        }
        let mut mask = vec![true; players];
        (0..players).choose_multiple(rng, 1 + draw % (players - 1)).into_iter().for_each(|p| mask[p] = false);
        if known.insert(mask.clone()) {
            masks.push(mask);
        }
    }
    masks
}

/// Mean of value(m with i) - value(m) over random orders in which players join, for every player i.
fn shapley(players: usize, value: impl Fn(&[bool]) -> f64, permutations: usize, rng: &mut ChaCha8Rng) -> Vec<f64> {
    let mut sums = vec![0.0; players];
    let mut order: Vec<usize> = (0..players).collect();
    for _ in 0..permutations {
        order.shuffle(rng);
        let mut mask = vec![false; players];
        let mut before = value(&mask);
        for player in &order {
            mask[*player] = true;
            let with = value(&mask);
            sums[*player] += with - before;
            before = with;
        }
    }
    sums.into_iter().map(|sum| sum / permutations.max(1) as f64).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapley_values_of_a_sum_are_its_terms_and_a_pair_is_shared() {
        let weights = [3.0, -1.0, 0.5, 0.0];
        let sum = |mask: &[bool]| mask.iter().zip(weights).filter(|(on, _)| **on).map(|(_, w)| w).sum::<f64>();
        let values = shapley(4, sum, 10, &mut round_rng(1, 0));
        assert!(values.iter().zip(weights).all(|(v, w)| (v - w).abs() < 1e-12));
        // gloves: 0 is worth something only with 1 or 2; exactly 2/3, 1/6, 1/6
        let gloves = |mask: &[bool]| f64::from(u8::from(mask[0] && (mask[1] || mask[2])));
        let values = shapley(3, gloves, 20_000, &mut round_rng(1, 0));
        assert!(values.iter().zip([2.0 / 3.0, 1.0 / 6.0, 1.0 / 6.0]).all(|(v, w)| (v - w).abs() < 0.01), "{values:?}");
    }

    #[test]
    fn masks_are_different_and_of_every_size() {
        let masks = masks(6, 40, &mut round_rng(1, 0));
        assert_eq!((masks.len(), masks.iter().collect::<BTreeSet<_>>().len()), (40, 40));
        for removed in 1..6 {
            assert!(masks.iter().filter(|m| m.iter().filter(|on| !**on).count() == removed).count() >= 3);
        }
        assert_eq!(super::masks(2, 40, &mut round_rng(1, 0)).len(), 2);
    }
}

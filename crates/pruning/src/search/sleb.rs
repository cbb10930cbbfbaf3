//! SLEB (arXiv 2402.09025): remove, one at a time, the unit whose removal leaves the lowest loss. The first and last unit stay.

use super::{Best, Found, Progress};
use crate::evaluate::Evaluator;
use crate::space::{Genome, SearchSpace};
use crate::{Error, Result};
use evop_model::Pattern;

pub(super) fn search(evaluator: &mut Evaluator<'_>, space: &SearchSpace, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Found> {
    let mut genome = space.dense_genome();
    let mut history = Vec::new();
    let mut last = Best::new();
    let rounds = steps(space);
    while !space.fits(&genome) {
        let without = |unit: usize| {
            let mut less: Genome = genome.clone();
            less[unit] = 0;
            less
        };
        let candidates: Vec<Genome> = (1..space.units().saturating_sub(1)).filter(|u| genome[*u] > 0).map(without).collect();
        if candidates.is_empty() {
            return Err(Error::option("--sparsity", format!("sleb keeps the first and last of {} units: the budget leaves no room for both", space.units())));
        }
        let patterns: Vec<Pattern> = candidates.iter().map(|g| space.pattern(g)).collect();
        evaluator.anchor(&[space.pattern(&genome)]);
        let fitness = evaluator.evaluate(&patterns)?;
        let mut step = Best::new();
        step.offer(&patterns, &fitness);
        step.end_round(rounds, evaluator, &mut |mut progress| {
            progress.round = history.len() + 1;
            on_round(progress)
        })?;
        history.extend(&step.history);
        match step.found.as_ref().and_then(|(pattern, _)| space.genome(pattern)) {
            Some(found) => genome = found,
            None => break,
        }
        last = step;
    }
    Ok(Found { history, ..last.finish()? })
}

/// Units that have to go until the budget holds, if all cost the same.
fn steps(space: &SearchSpace) -> usize {
    let mut genome = space.dense_genome();
    let mut steps = 0;
    for unit in 0..space.units() {
        if space.fits(&genome) {
            break;
        }
        genome[unit] = 0;
        steps += 1;
    }
    steps
}

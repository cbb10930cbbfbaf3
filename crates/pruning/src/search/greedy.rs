//! Greedy removal, one loop for three papers: remove, one at a time, the unit whose removal leaves the lowest loss with all earlier removals
//! in place.
//!
//! - SLEB (arXiv 2402.09025, algorithm 1): whole layers by perplexity; the first and the last stay.
//! - BlockPruner (arXiv 2406.10594, section 3): attention and MLP sub-blocks by perplexity; every one may go.
//! - FinerCut (arXiv 2405.18218, section 3): sub-blocks by how far the output moves from the dense model's; those of the first layers stay. The
//!   paper measures the angle or the Jensen-Shannon divergence between outputs; here it is the evaluator's KL(dense || pruned), which orders
//!   small changes as the latter does.

use super::{Best, Found, Progress, Strategy, removals, without};
use crate::evaluate::Evaluator;
use crate::space::{Genome, SearchSpace};
use crate::{Error, Result};
use evop_model::Pattern;

/// The first part of the layers that FinerCut leaves alone, as its authors' command line has it.
const FINERCUT_PROTECTED: f64 = 0.4;

pub(super) fn search(
    evaluator: &mut Evaluator<'_>,
    space: &SearchSpace,
    strategy: Strategy,
    on_round: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<Found> {
    let mut left = candidates(space, strategy);
    let mut genome = space.dense_genome();
    let mut best = Best::new();
    while !space.fits(&genome) {
        let less: Vec<Genome> = left.iter().map(|u| without(&genome, *u)).collect();
        if less.is_empty() {
            let kept = space.units() - candidates(space, strategy).len();
            return Err(Error::option("--sparsity", format!("{strategy} keeps {kept} of {} units: the budget leaves no room for them", space.units())));
        }
        let patterns: Vec<Pattern> = less.iter().map(|g| space.pattern(g)).collect();
        evaluator.anchor(&[space.pattern(&genome)]);
        let fitness = evaluator.evaluate(&patterns)?;
        best.restart();
        let rounds = best.history.len() + removals(space, &genome, &left);
        best.offer(&patterns, &fitness);
        best.end_round(rounds, evaluator, on_round)?;
        // no removal leaves a finite loss: there is nothing to go on from
        let Some(chosen) = best.found.first().and_then(|(pattern, _)| patterns.iter().position(|p| p == pattern)) else { break };
        genome.clone_from(&less[chosen]);
        left.remove(chosen);
    }
    best.finish()
}

/// Units that may go.
fn candidates(space: &SearchSpace, strategy: Strategy) -> Vec<usize> {
    // (a width that all layers share can't be dropped)
    let droppable: Vec<usize> = (0..space.units()).filter(|u| !space.sub_blocks(*u).is_empty()).collect();
    match strategy {
        Strategy::Sleb => droppable.into_iter().skip(1).rev().skip(1).rev().collect(),
        Strategy::Finercut => {
            let first = (space.dense().layers().len() as f64 * FINERCUT_PROTECTED) as usize;
            droppable.into_iter().filter(|u| space.sub_blocks(*u).iter().all(|s| s / 2 >= first)).collect()
        }
        _ => droppable,
    }
}

//! SLEB (arXiv 2402.09025): remove, one at a time, the unit whose removal leaves the lowest loss. The first and last unit stay.

use super::{Best, Found, Progress, SearchSpace};
use crate::evaluate::Evaluator;
use crate::{Error, Result};

pub(super) fn search(evaluator: &mut Evaluator<'_>, space: &SearchSpace, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Found> {
    if space.remove > space.units().saturating_sub(2) {
        return Err(Error::option(
            "--sparsity",
            format!("sleb keeps the first and last of {} units: expected at most {} removed", space.units(), space.units() - 2),
        ));
    }
    let mut skipped = vec![false; space.units()];
    let mut history = Vec::new();
    let mut last = Best::new();
    for _ in 0..space.remove {
        let candidates: Vec<usize> = (1..space.units() - 1).filter(|u| !skipped[*u]).collect();
        let patterns: Vec<_> = candidates
            .iter()
            .map(|unit| {
                let mut with = skipped.clone();
                with[*unit] = true;
                space.pattern(&with)
            })
            .collect();
        let fitness = evaluator.evaluate(&patterns)?;
        let mut step = Best::new();
        step.offer(&patterns, &fitness);
        step.end_round(space.remove, evaluator, &mut |mut progress| {
            progress.round = history.len() + 1;
            on_round(progress)
        })?;
        history.extend(&step.history);
        if let Some((pattern, _)) = &step.found {
            skipped = space.skipped(pattern);
        }
        last = step;
    }
    Ok(Found { history, ..last.finish()? })
}

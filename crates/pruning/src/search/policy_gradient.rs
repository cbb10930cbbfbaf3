//! Structural pruning without back-propagation (arXiv 2406.10576): every unit of the space is kept with a probability of its own, and REINFORCE
//! moves the probabilities by the losses of masks drawn from them, forward passes only.
//!
//! A unit with several widths has a probability a step of width; how many of its steps are drawn is its width. As published: two masks a
//! step, a moving average of their losses as the baseline, probabilities projected to the budget by bisection, a learning rate that falls as a cosine. Not as
//! published: the batch is always the first pack; the step is longer, since there are hundreds of steps and not 15,000; probabilities begin equal; and
//! the most likely pattern is scored on all packs from time to time, the best of these is returned.

use super::{Best, Found, Progress, Strategy, round_rng};
use crate::evaluate::Evaluator;
use crate::space::{Genome, SearchSpace};
use crate::{Error, Result};
use evop_model::Pattern;
use rand::Rng;
use rand_chacha::ChaCha8Rng;

/// Masks of a step.
pub(super) const MASKS: usize = 2;
/// Steps that the moving average of losses looks back.
const WINDOW: f64 = 5.0;
/// Learning rate times steps as published (0.002 in 15,000 steps), and the most of one step.
const TRAVEL: f64 = 30.0;
const MOST: f64 = 0.05;
/// Steps between two looks at the most likely pattern.
const LOOK: usize = 20;

pub(super) fn search(
    evaluator: &mut Evaluator<'_>,
    space: &SearchSpace,
    evaluations: usize,
    seed: u64,
    on_round: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<Found> {
    let mut policy = Policy::new(space)?;
    let steps = evaluations / MASKS;
    let rounds = steps.div_ceil(LOOK);
    let mut best = Best::new();
    for step in 0..steps {
        let mut rng = round_rng(seed, step);
        let masks: Vec<Vec<bool>> = (0..MASKS).map(|_| policy.draw(&mut rng)).collect();
        let patterns: Vec<Pattern> = masks.iter().map(|mask| space.pattern(&policy.genome(mask))).collect();
        let losses: Vec<f64> = evaluator.evaluate_first(&patterns, 1)?.iter().map(|f| f.loss).collect();
        let rate = (TRAVEL / steps as f64).min(MOST) * 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos());
        policy.learn(&masks, &losses, rate);
        if (step + 1).is_multiple_of(LOOK) || step + 1 == steps {
            let likely = [space.pattern(&policy.most_likely(space))];
            best.offer(&likely, &evaluator.evaluate(&likely)?);
            best.end_round(rounds, evaluator, on_round)?;
        }
    }
    best.finish()
}

/// A Bernoulli distribution for every step of every unit.
struct Policy {
    /// Of each step, its unit.
    units: Vec<usize>,
    /// Of each step, the probability that it is kept.
    probabilities: Vec<f64>,
    /// Per budget, the cost of each step and what all together may cost.
    budgets: Vec<(Vec<f64>, f64)>,
    /// Moving average of losses.
    baseline: Option<f64>,
}

impl Policy {
    /// All steps equally likely, as likely as the tightest budget allows.
    ///
    /// # Errors
    /// [`Error::Option`] for a space with a width that all layers share: its costs don't add up over units.
    fn new(space: &SearchSpace) -> Result<Self> {
        if (0..space.units()).any(|u| space.sub_blocks(u).is_empty()) {
            return Err(Error::option("--uniform", format!("{} learns every unit on its own: expected no --uniform", Strategy::PolicyGradient)));
        }
        let units: Vec<usize> = (0..space.units()).flat_map(|u| std::iter::repeat_n(u, space.options(u) - 1)).collect();
        let nothing: Genome = vec![0; space.units()];
        let least = space.totals(&nothing);
        let mut costs: Vec<Vec<f64>> = vec![Vec::with_capacity(units.len()); least.len()];
        for unit in 0..space.units() {
            let mut genome = nothing.clone();
            let mut before = least.clone();
            for option in 1..space.options(unit) {
                genome[unit] = option as u8;
                let totals = space.totals(&genome);
                costs.iter_mut().zip(totals.iter().zip(&before)).for_each(|(of_budget, (total, before))| of_budget.push(total - before));
                before = totals;
            }
        }
        let limits = space.costs().budgets().iter().zip(&least).map(|(budget, least)| budget.keep - least);
        let budgets: Vec<(Vec<f64>, f64)> = costs.into_iter().zip(limits).collect();
        let share = budgets.iter().map(|(costs, limit)| limit / costs.iter().sum::<f64>().max(f64::MIN_POSITIVE)).fold(1.0, f64::min);
        Ok(Self { probabilities: vec![share.max(0.0); units.len()], units, budgets, baseline: None })
    }

    fn draw(&self, rng: &mut ChaCha8Rng) -> Vec<bool> {
        self.probabilities.iter().map(|p| rng.random_bool(p.clamp(0.0, 1.0))).collect()
    }

    fn genome(&self, mask: &[bool]) -> Genome {
        let mut genome: Genome = vec![0; self.units.last().map_or(0, |u| u + 1)];
        self.units.iter().zip(mask).filter(|(_, kept)| **kept).for_each(|(u, _)| genome[*u] += 1);
        genome
    }

    /// One step of REINFORCE and the projection back to the budgets; a step with a loss that isn't a number teaches nothing.
    fn learn(&mut self, masks: &[Vec<bool>], losses: &[f64], rate: f64) {
        if losses.iter().any(|l| !l.is_finite()) {
            return;
        }
        let mean = losses.iter().sum::<f64>() / losses.len() as f64;
        let baseline = self.baseline.map_or(mean, |before| before + (mean - before) / WINDOW);
        self.baseline = Some(baseline);
        for (i, p) in self.probabilities.iter_mut().enumerate() {
            let deviation = (*p * (1.0 - *p)).max(1e-6).sqrt();
            let score = |mask: &Vec<bool>| (f64::from(u8::from(mask[i])) - *p) / deviation;
            let gradient: f64 = masks.iter().zip(losses).map(|(mask, loss)| (loss - baseline) * score(mask)).sum::<f64>() / (masks.len() - 1).max(1) as f64;
            *p = (*p - rate * gradient).clamp(0.0, 1.0);
        }
        for (costs, limit) in &self.budgets {
            project(&mut self.probabilities, costs, *limit);
        }
    }

    /// The genome of the most likely steps that fit together.
    fn most_likely(&self, space: &SearchSpace) -> Genome {
        let mut order: Vec<usize> = (0..self.units.len()).collect();
        order.sort_by(|a, b| self.probabilities[*b].total_cmp(&self.probabilities[*a]));
        order.into_iter().fold(vec![0; space.units()], |genome, step| space.raised(&genome, self.units[step]).filter(|g| space.fits(g)).unwrap_or(genome))
    }
}

/// The nearest point of the box [0, 1] with costs . p <= limit: p - v costs, clipped, with v >= 0 found by bisection.
fn project(probabilities: &mut [f64], costs: &[f64], limit: f64) {
    let lowered = |p: f64, cost: f64, v: f64| (p - v * cost).clamp(0.0, 1.0);
    let total = |probabilities: &[f64], v: f64| probabilities.iter().zip(costs).map(|(p, c)| c * lowered(*p, *c, v)).sum::<f64>();
    if total(probabilities, 0.0) <= limit {
        return;
    }
    // at the upper end every step that costs something is at 0
    let (mut low, mut high) = (0.0, costs.iter().filter(|c| **c > 0.0).map(|c| 1.0 / c).fold(0.0, f64::max));
    for _ in 0..100 {
        let v = 0.5 * (low + high);
        if total(probabilities, v) > limit { low = v } else { high = v }
    }
    probabilities.iter_mut().zip(costs).for_each(|(p, c)| *p = lowered(*p, *c, high));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn projection_lowers_to_the_budget_and_leaves_what_fits() {
        let mut equal = [1.0; 4];
        project(&mut equal, &[1.0; 4], 2.0);
        assert!(equal.iter().all(|p| (p - 0.5).abs() < 1e-12));
        let mut clipped = [0.9, 0.1];
        project(&mut clipped, &[1.0; 2], 0.5);
        assert!((clipped[0] - 0.5).abs() < 1e-12 && clipped[1] == 0.0);
        let mut weighted = [1.0, 1.0];
        project(&mut weighted, &[2.0, 1.0], 2.0); // (1, 1) - 0.2 (2, 1)
        assert!((weighted[0] - 0.6).abs() < 1e-9 && (weighted[1] - 0.8).abs() < 1e-9);
        let mut within = [0.3, 0.2];
        project(&mut within, &[1.0; 2], 0.5);
        assert_eq!(within, [0.3, 0.2]);
    }

    #[test]
    fn probability_moves_to_the_step_that_lowers_the_loss() {
        let mut policy = Policy { units: vec![0, 1], probabilities: vec![0.5; 2], budgets: vec![(vec![1.0; 2], 1.0)], baseline: None };
        for step in 0..400 {
            let mut rng = round_rng(3, step);
            let masks = [policy.draw(&mut rng), policy.draw(&mut rng)];
            let losses: Vec<f64> = masks.iter().map(|mask| if mask[0] { 1.0 } else { 2.0 }).collect();
            policy.learn(&masks, &losses, 0.02);
        }
        assert!(policy.probabilities[0] > 0.9 && policy.probabilities[1] < 0.1, "{:?}", policy.probabilities);
        assert_eq!(policy.genome(&[true, false]), [1, 0]);
    }
}

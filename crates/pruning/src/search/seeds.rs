//! What one change costs: every unit at every option with the rest whole; and the first population made of it.

use crate::Result;
use crate::evaluate::Evaluator;
use crate::space::{Genome, SearchSpace};
use evop_model::Pattern;

/// Losses of the dense model with one unit changed, less the dense loss: `[unit][option]`, 0 for the whole unit.
pub(super) struct Sensitivities(Vec<Vec<f64>>);

impl Sensitivities {
    /// Measures them on the first pack: one evaluation an option. `on_part` sees the evaluator after every few.
    ///
    /// # Errors
    /// As [`Evaluator::evaluate`]; whatever `on_part` returns.
    pub fn measure(evaluator: &mut Evaluator<'_>, space: &SearchSpace, on_part: &mut dyn FnMut(&Evaluator<'_>) -> Result<()>) -> Result<Self> {
        let dense = space.dense_genome();
        let changed = |u: usize, o: usize| {
            let mut genome = dense.clone();
            genome[u] = o as u8;
            space.pattern(&genome)
        };
        let at: Vec<(usize, usize)> = (0..space.units()).flat_map(|u| (0..space.options(u) - 1).map(move |o| (u, o))).collect();
        let mut patterns: Vec<Pattern> = at.iter().map(|(u, o)| changed(*u, *o)).collect();
        patterns.push(space.dense().clone());
        evaluator.anchor(&patterns[patterns.len() - 1..]);
        let mut fitness = Vec::with_capacity(patterns.len());
        for part in patterns.chunks(PART) {
            fitness.extend(evaluator.evaluate_first(part, 1)?);
            on_part(evaluator)?;
        }
        let whole = fitness[fitness.len() - 1].loss;
        let mut table: Vec<Vec<f64>> = (0..space.units()).map(|u| vec![0.0; space.options(u)]).collect();
        for ((u, o), fitness) in at.into_iter().zip(&fitness) {
            table[u][o] = if fitness.loss.is_finite() { fitness.loss - whole } else { f64::MAX.sqrt() };
        }
        Ok(Self(table))
    }

    /// What changing a unit from one option to another is expected to cost in loss (negative: to gain).
    pub fn change(&self, unit: usize, from: u8, to: u8) -> f64 {
        self.0[unit][usize::from(to)] - self.0[unit][usize::from(from)]
    }

    fn damped(&self, unit: usize, option: usize, power: f64) -> f64 {
        self.0[unit][option].max(0.0).powf(power)
    }
}

/// Patterns between two reports of progress.
const PART: usize = 32;

/// Steps of the knapsack's budget.
const BUCKETS: usize = 10_000;

/// The genome of least summed sensitivity (each raised to `power`) within the first budget: an exact multiple-choice knapsack over costs rounded
/// up to 1/10,000 of the model (Puzzle, arXiv 2411.19146, section 4, solves it as a mixed-integer program). `None` where options of a unit
/// don't add up (a width that all layers share).
fn knapsack(space: &SearchSpace, sensitivities: &Sensitivities, power: f64) -> Option<Genome> {
    let costs = space.costs();
    let limit = (costs.budgets()[0].keep * BUCKETS as f64 + 1e-6) as usize;
    let mut best = vec![f64::INFINITY; limit + 1];
    best[0] = 0.0;
    let mut choices: Vec<Vec<u8>> = Vec::with_capacity(space.units());
    let dense = space.dense_genome();
    for unit in 0..space.units() {
        if space.sub_blocks(unit).is_empty() {
            return None;
        }
        let mut next = vec![f64::INFINITY; limit + 1];
        let mut choice = vec![0u8; limit + 1];
        for option in 0..space.options(unit) {
            let mut genome = dense.clone();
            genome[unit] = option as u8;
            let pattern = space.pattern(&genome);
            let cost: f64 = space.sub_blocks(unit).iter().map(|s| costs.of(0, *s, pattern.width(*s))).sum();
            let cost = (cost * BUCKETS as f64 - 1e-6).ceil().max(0.0) as usize;
            for spent in cost..=limit {
                let loss = best[spent - cost] + sensitivities.damped(unit, option, power);
                if loss < next[spent] {
                    (next[spent], choice[spent]) = (loss, option as u8);
                }
            }
        }
        choices.push(choice);
        best = next;
    }
    let mut spent = (0..=limit).min_by(|a, b| best[*a].total_cmp(&best[*b]))?;
    let mut genome = vec![0; space.units()];
    for unit in (0..space.units()).rev() {
        genome[unit] = choices[unit][spent];
        let mut whole = dense.clone();
        whole[unit] = genome[unit];
        let pattern = space.pattern(&whole);
        let cost: f64 = space.sub_blocks(unit).iter().map(|s| costs.of(0, *s, pattern.width(*s))).sum();
        spent -= (cost * BUCKETS as f64 - 1e-6).ceil().max(0.0) as usize;
    }
    Some(genome)
}

/// Lowers the unit whose next step down is expected to cost least loss per budget saved, again and again, until the genome fits.
pub(super) fn shrink(space: &SearchSpace, sensitivities: &Sensitivities, genome: &mut Genome) {
    let mut totals = space.totals(genome);
    while !space.costs().fit(&totals) {
        let excess = space.costs().excess(&totals);
        let steps = (0..space.units()).filter_map(|u| {
            let less = space.lowered(genome, u)?;
            let after = space.totals(&less);
            let saved = excess - space.costs().excess(&after);
            (saved > 0.0).then(|| (sensitivities.change(u, genome[u], less[u]) / saved, less, after))
        });
        match steps.min_by(|a, b| a.0.total_cmp(&b.0)) {
            Some((_, less, after)) => (*genome, totals) = (less, after),
            None => return,
        }
    }
}

/// Raises the unit whose next step up is expected to gain most loss per budget spent, while something still fits. `except` stays.
pub(super) fn grow(space: &SearchSpace, sensitivities: &Sensitivities, genome: &mut Genome, except: Option<usize>) {
    loop {
        let before: f64 = space.totals(genome).iter().sum();
        let steps = (0..space.units()).filter(|u| Some(*u) != except).filter_map(|u| {
            let more = space.raised(genome, u)?;
            let after = space.totals(&more);
            let spent = after.iter().sum::<f64>() - before;
            space.costs().fit(&after).then(|| (sensitivities.change(u, genome[u], more[u]) / spent.max(1e-12), more))
        });
        match steps.min_by(|a, b| a.0.total_cmp(&b.0)) {
            Some((_, more)) => *genome = more,
            None => return,
        }
    }
}

/// The seeds: knapsacks, greedy allocations, uniform widths, and depth alone.
pub(super) fn seeds(space: &SearchSpace, sensitivities: &Sensitivities) -> Vec<Genome> {
    let dense = space.dense_genome();
    let mut seeds: Vec<Genome> = [0.5, 0.75, 1.0].iter().filter_map(|power| knapsack(space, sensitivities, *power)).collect();
    // a global allocation by sensitivity per cost (FLAP's and FinerCut's idea, on measured losses)
    seeds.push(dense.clone());
    // the same fraction of every unit
    let most = (0..space.units()).map(|u| space.options(u)).max().unwrap_or(2);
    let uniform =
        |step: usize| -> Genome { (0..space.units()).map(|u| ((space.options(u) - 1) as f64 * step as f64 / (most - 1) as f64).ceil() as u8).collect() };
    if most > 2 {
        // attention whole, the wide choices at one level
        let flat =
            |step: usize| -> Genome { (0..space.units()).map(|u| if space.options(u) > 2 { step.min(space.options(u) - 1) as u8 } else { 1 }).collect() };
        for make in [&uniform as &dyn Fn(usize) -> Genome, &flat] {
            seeds.extend((0..most).rev().map(make).find(|g| space.fits(g)));
        }
        // some of the units that are whole or nothing go first (2SSP's split), the rest of the budget from the wide ones
        let mut binary: Vec<usize> = (0..space.units()).filter(|u| space.options(*u) == 2).collect();
        binary.sort_by(|a, b| sensitivities.change(*a, 1, 0).total_cmp(&sensitivities.change(*b, 1, 0)));
        for share in [8, 4, 2] {
            let mut genome = dense.clone();
            binary.iter().take(binary.len() / share).for_each(|u| genome[*u] = 0);
            seeds.push(genome);
        }
    }
    // whole units only, the least sensitive first: depth alone
    let mut depth = dense.clone();
    let mut order: Vec<usize> = (0..space.units()).collect();
    order.sort_by(|a, b| sensitivities.change(*a, dense[*a], 0).total_cmp(&sensitivities.change(*b, dense[*b], 0)));
    for unit in order {
        if space.fits(&depth) {
            break;
        }
        depth[unit] = 0;
    }
    seeds.push(depth);
    for seed in &mut seeds {
        shrink(space, sensitivities, seed);
        grow(space, sensitivities, seed, None);
    }
    seeds.retain(|s| space.fits(s));
    let mut unique: Vec<Genome> = Vec::new();
    for seed in seeds {
        if !unique.contains(&seed) {
            unique.push(seed);
        }
    }
    unique
}

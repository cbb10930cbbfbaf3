//! The search of this project: elitist evolution of drops and widths in one genome, seeded by what single changes cost, screened by a
//! surrogate, raced on few tokens before many.
//!
//! A child takes a step down at one unit and steps up elsewhere so that every budget still holds (level-switch mutation, EvoPress, arXiv
//! 2410.14649, algorithm 2), or mixes two parents and is repaired by the sensitivities.

use super::racing::{self, race};
use super::seeds::{Sensitivities, grow, seeds, shrink};
use super::surrogate::{Surrogate, rank_correlation};
use super::{Best, ELITE, Found, Progress, cross, preparing, round_rng, step};
use crate::Result;
use crate::evaluate::Evaluator;
use crate::objective::Fitness;
use crate::space::{Genome, SearchSpace};
use evop_model::Pattern;
use rand::Rng;
use rand::seq::{IndexedRandom, IteratorRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Parameters of the search.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JointOptions {
    /// Generations at most.
    pub generations: usize,
    /// Children evaluated in a generation.
    pub offspring: usize,
    /// Parents kept.
    pub elite: usize,
    /// The search ends after this many generations without a better pattern.
    pub patience: usize,
    /// Drop candidates on few tokens.
    pub racing: bool,
    /// Begin with seeds instead of random patterns alone, and repair by sensitivities instead of at random.
    pub seeds: bool,
    /// Draw eight times the offspring and evaluate the best predicted.
    pub surrogate: bool,
}

impl Default for JointOptions {
    fn default() -> Self {
        Self { generations: 60, offspring: 32, elite: ELITE, patience: 12, racing: true, seeds: true, surrogate: true }
    }
}

/// Children drawn for each that is evaluated, when a surrogate screens them.
const SCREENED: usize = 8;
/// One in this many of a generation is taken unseen, so that the surrogate learns where it is wrong.
const UNSCREENED: usize = 10;

pub(super) fn search(
    evaluator: &mut Evaluator<'_>,
    space: &SearchSpace,
    options: &JointOptions,
    seed: u64,
    on_round: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<Found> {
    let mut state = State { space, options, sensitivities: None, archive: Vec::new(), elite: Vec::new(), seen: BTreeSet::new(), correlations: Vec::new() };
    let mut best = Best::new();
    let mut rng = round_rng(seed, 0);
    let mut population = Vec::new();
    if options.seeds {
        let sensitivities = Sensitivities::measure(evaluator, space, &mut |e| on_round(preparing(e, options.generations + 1)))?;
        population = seeds(space, &sensitivities);
        state.sensitivities = Some(sensitivities);
    }
    let randoms = options.offspring.saturating_sub(population.len()).max(options.offspring / 4);
    population.extend((0..randoms).map(|_| space.random(&mut rng)));
    let (mut stale, mut improvements) = (0, Vec::new());
    for generation in 0..=options.generations {
        let improved = state.evaluate(evaluator, population, &mut best)?;
        best.end_round(options.generations + 1, evaluator, on_round)?;
        stale = if improved { 0 } else { stale + 1 };
        improvements.extend(state.elite.first().filter(|_| improved).cloned());
        if generation == options.generations || stale > options.patience {
            break;
        }
        population = state.children(&mut round_rng(seed, generation + 1))?;
        if population.is_empty() {
            break; // everything within reach is known
        }
    }
    // held-out text chooses among these: the best of earlier generations too, since what came later may fit this sample alone
    improvements.retain(|(genome, _)| state.elite.iter().all(|(kept, _)| kept != genome));
    let elite = state.elite.iter().chain(&improvements).map(|(genome, fitness)| (space.pattern(genome), fitness.clone())).collect();
    let correlation = (!state.correlations.is_empty()).then(|| state.correlations.iter().sum::<f64>() / state.correlations.len() as f64);
    Ok(Found { elite, surrogate_rank_correlation: correlation, ..best.finish()? })
}

struct State<'s> {
    space: &'s SearchSpace,
    options: &'s JointOptions,
    sensitivities: Option<Sensitivities>,
    /// Losses after the first stage: what the surrogate learns from.
    archive: Vec<(Genome, f64)>,
    /// Best first, all evaluated on everything.
    elite: Vec<(Genome, Fitness)>,
    /// Genomes that were evaluated, in part or whole.
    seen: BTreeSet<Genome>,
    /// How well the surrogate ordered each generation.
    correlations: Vec<f64>,
}

impl State<'_> {
    /// Evaluates a generation and takes the best of it and of the elite as the next elite; whether there is a new best one.
    fn evaluate(&mut self, evaluator: &mut Evaluator<'_>, population: Vec<Genome>, best: &mut Best) -> Result<bool> {
        let mut unique: Vec<Genome> = Vec::with_capacity(population.len());
        for genome in population {
            if self.seen.insert(genome.clone()) {
                unique.push(genome);
            }
        }
        let patterns: Vec<Pattern> = unique.iter().map(|g| self.space.pattern(g)).collect();
        // a candidate must not be worse than the last of the elite, whose place it would take
        let bar = self.elite.last().filter(|_| self.elite.len() == self.options.elite).map(|(g, _)| self.space.pattern(g));
        let (first, through) = if self.options.racing {
            race(evaluator, &patterns, bar.as_ref())?
        } else {
            let fitness = evaluator.evaluate(&patterns)?;
            let first = evaluator.evaluate_first(&patterns, racing::stages(evaluator.packs())[0])?;
            (first.iter().map(|f| f.loss).collect(), fitness.into_iter().enumerate().collect())
        };
        if self.options.surrogate && self.archive.len() >= self.options.offspring {
            let model = Surrogate::fit(self.space, &self.archive)?;
            let predicted: Vec<f64> = unique.iter().map(|g| model.predict(g)).collect();
            self.correlations.push(rank_correlation(&predicted, &first));
        }
        self.archive.extend(unique.iter().cloned().zip(first));
        let before = self.elite.first().map_or(f64::INFINITY, |(_, f)| f.loss);
        for (i, fitness) in through {
            if fitness.loss.is_finite() {
                best.offer(&patterns[i..=i], std::slice::from_ref(&fitness));
                self.elite.push((unique[i].clone(), fitness));
            }
        }
        self.elite.sort_by(|a, b| a.1.loss.total_cmp(&b.1.loss).then_with(|| a.0.cmp(&b.0)));
        self.elite.truncate(self.options.elite);
        let parents: Vec<Pattern> = self.elite.iter().map(|(g, _)| self.space.pattern(g)).collect();
        evaluator.anchor(&parents);
        Ok(self.elite.first().is_some_and(|(_, f)| f.loss < before))
    }

    /// The next generation: new genomes only, screened where a surrogate is used.
    fn children(&self, rng: &mut ChaCha8Rng) -> Result<Vec<Genome>> {
        let wanted = self.options.offspring * if self.options.surrogate { SCREENED } else { 1 };
        let mut drawn: Vec<Genome> = Vec::new();
        let mut known: BTreeSet<Genome> = BTreeSet::new();
        for _ in 0..wanted * 4 {
            if drawn.len() == wanted {
                break;
            }
            let child = self.child(rng);
            if self.space.fits(&child) && !self.seen.contains(&child) && known.insert(child.clone()) {
                drawn.push(child);
            }
        }
        if !self.options.surrogate || drawn.len() <= self.options.offspring {
            drawn.truncate(self.options.offspring);
            return Ok(drawn);
        }
        let model = Surrogate::fit(self.space, &self.archive)?;
        let mut scored: Vec<(f64, Genome)> = drawn.into_iter().map(|g| (model.predict(&g), g)).collect();
        scored.sort_by(|a, b| a.0.total_cmp(&b.0).then_with(|| a.1.cmp(&b.1)));
        let unseen = self.options.offspring / UNSCREENED;
        let rest = scored.split_off(self.options.offspring - unseen);
        let mut children: Vec<Genome> = scored.into_iter().map(|(_, g)| g).collect();
        children.extend(rest.into_iter().map(|(_, g)| g).choose_multiple(rng, unseen));
        Ok(children)
    }

    fn child(&self, rng: &mut ChaCha8Rng) -> Genome {
        let Some((parent, _)) = self.elite.choose(rng) else { return self.space.random(rng) };
        let mut child = parent.clone();
        if self.elite.len() > 1 && rng.random_bool(0.25) {
            if let Some((other, _)) = self.elite.choose(rng) {
                cross(&mut child, other, rng);
            }
            self.repair(&mut child, None, rng);
        }
        let switches = rng.random_range(1..=3).min(rng.random_range(1..=3));
        for _ in 0..switches {
            self.switch(&mut child, rng);
        }
        child
    }

    /// Some steps down at one unit and up at others, or some up at one and down at others.
    fn switch(&self, genome: &mut Genome, rng: &mut ChaCha8Rng) {
        let Some(unit) = step(self.space, genome, rng) else { return };
        self.repair(genome, Some(unit), rng);
    }

    /// Back within the budgets, and up to them; `moved` keeps its option.
    fn repair(&self, genome: &mut Genome, moved: Option<usize>, rng: &mut ChaCha8Rng) {
        while !self.space.fits(genome) {
            let lowerable = (0..self.space.units()).filter(|u| Some(*u) != moved && genome[*u] > 0).choose_multiple(rng, 3);
            // of three random units the one that is expected to suffer least
            let guided = lowerable.iter().copied().min_by(|a, b| self.expected(*a, genome, -1).total_cmp(&self.expected(*b, genome, -1)));
            match guided {
                Some(unit) => genome[unit] -= 1,
                None => break,
            }
        }
        if !self.space.fits(genome) {
            match &self.sensitivities {
                Some(sensitivities) => shrink(self.space, sensitivities, genome),
                None => self.space.repair(genome, rng),
            }
        }
        loop {
            let raisable = (0..self.space.units())
                .filter(|u| Some(*u) != moved && self.space.raised(genome, *u).is_some_and(|more| self.space.fits(&more)))
                .choose_multiple(rng, 3);
            match raisable.iter().copied().min_by(|a, b| self.expected(*a, genome, 1).total_cmp(&self.expected(*b, genome, 1))) {
                Some(unit) => genome[unit] += 1,
                None => break,
            }
        }
        if let (Some(sensitivities), Some(_)) = (&self.sensitivities, moved) {
            // room that only the moved unit could fill is better used than not
            grow(self.space, sensitivities, genome, None);
        }
    }

    /// Expected change of loss when a unit moves one step; without sensitivities all are equal.
    fn expected(&self, unit: usize, genome: &[u8], direction: i8) -> f64 {
        let to = genome[unit].saturating_add_signed(direction);
        self.sensitivities.as_ref().map_or(0.0, |s| s.change(unit, genome[unit], to))
    }
}

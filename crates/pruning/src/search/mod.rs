//! Search spaces, budgets and strategies.

mod evop;
mod exhaustive;
mod random;
mod shortgpt;
mod sleb;

use crate::evaluate::{Evaluator, Fitness};
use crate::{Error, Result};
use evop_model::{Config, Pattern};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::str::FromStr;

pub use evop::EvopOptions;
pub use exhaustive::{Certificate, certify, count_patterns};

/// What a gene stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Space {
    /// Whole decoder layers: attention and MLP go together (EvoP).
    Layer,
    /// Attention and MLP sub-blocks on their own.
    Block,
}

/// How the pattern is found. Each is named after its paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// EvoP's genetic algorithm (arXiv 2502.14910).
    Evop,
    /// Greedy: the unit whose removal hurts least, again and again (SLEB, arXiv 2402.09025).
    Sleb,
    /// One shot by how little a layer turns its input (ShortGPT, arXiv 2403.03853).
    Shortgpt,
    /// The best of as many random patterns as the search may evaluate: the control.
    Random,
    /// Every pattern; certifies the optimum.
    Exhaustive,
}

macro_rules! named {
    ($type:ty, $what:literal, $($name:literal => $value:expr),*) => {
        impl FromStr for $type {
            type Err = String;
            fn from_str(text: &str) -> std::result::Result<Self, String> {
                match text { $($name => Ok($value),)* other => Err(format!("expected {}, found {other:?}", [$($name),*].join(", "))) }
            }
        }
        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                $(if *self == $value { return f.write_str($name); })*
                Ok(())
            }
        }
    };
}

named!(Space, "space", "layer" => Space::Layer, "block" => Space::Block);
named!(Strategy, "strategy", "evop" => Strategy::Evop, "sleb" => Strategy::Sleb, "shortgpt" => Strategy::Shortgpt,
       "random" => Strategy::Random, "exhaustive" => Strategy::Exhaustive);

/// The patterns that a search may return: exactly `remove` of `units` skipped.
#[derive(Debug, Clone)]
pub struct SearchSpace {
    dense: Pattern,
    /// The sub-blocks that each unit stands for.
    units: Vec<Vec<usize>>,
    /// How many units a pattern skips.
    pub remove: usize,
}

impl SearchSpace {
    /// The space over a model in which `ceil(units x sparsity)` units are skipped.
    ///
    /// # Errors
    /// [`Error::Option`] unless 0 < sparsity < 1 and at least one unit remains.
    pub fn new(config: &Config, space: Space, sparsity: f64) -> Result<Self> {
        if !(sparsity > 0.0 && sparsity < 1.0) {
            return Err(Error::option("--sparsity", format!("expected a fraction above 0 and below 1, such as 0.25; found {sparsity}")));
        }
        let dense = Pattern::dense(config);
        let units: Vec<Vec<usize>> = match space {
            Space::Layer => (0..config.num_layers()).map(|l| vec![2 * l, 2 * l + 1]).collect(),
            Space::Block => (0..2 * config.num_layers()).map(|s| vec![s]).collect(),
        };
        // sub-blocks that an earlier pruning took can't go again
        let units: Vec<Vec<usize>> = units.into_iter().filter(|u| u.iter().any(|s| dense.keeps(*s))).collect();
        let remove = (units.len() as f64 * sparsity).ceil() as usize;
        if remove >= units.len() {
            return Err(Error::option("--sparsity", format!("{sparsity} of {} units is {remove}: expected at least one unit to remain", units.len())));
        }
        Ok(Self { dense, units, remove })
    }

    /// Number of units.
    pub fn units(&self) -> usize {
        self.units.len()
    }

    /// The pattern that skips the units marked true.
    pub fn pattern(&self, skipped: &[bool]) -> Pattern {
        let sub_blocks = self.units.iter().zip(skipped).filter(|(_, s)| **s).flat_map(|(unit, _)| unit);
        sub_blocks.fold(self.dense.clone(), |pattern, s| pattern.without(*s))
    }

    /// The units that a pattern skips.
    pub fn skipped(&self, pattern: &Pattern) -> Vec<bool> {
        self.units.iter().map(|unit| unit.iter().all(|s| !pattern.keeps(*s))).collect()
    }

    /// A random selection of exactly `remove` units.
    fn random(&self, rng: &mut ChaCha8Rng) -> Vec<bool> {
        let mut skipped = vec![false; self.units()];
        skipped[..self.remove].fill(true);
        skipped.shuffle(rng);
        skipped
    }
}

/// What a search needs besides its strategy's own options.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SearchOptions {
    /// How.
    pub strategy: Strategy,
    /// EvoP's parameters; `random` draws as many patterns as they allow evaluations.
    pub evop: EvopOptions,
    /// Random numbers.
    pub seed: u64,
}

/// Where a search stands, for progress displays.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Progress {
    /// Rounds done (generations, greedy steps, chunks of an enumeration).
    pub round: usize,
    /// Rounds in all.
    pub rounds: usize,
    /// The best loss so far.
    pub best_loss: f64,
    /// Patterns computed.
    pub evaluated: usize,
    /// Patterns asked for.
    pub requested: usize,
}

/// What a search found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Found {
    /// The pattern.
    pub pattern: Pattern,
    /// Its fitness.
    pub fitness: Fitness,
    /// Best loss after each round.
    pub history: Vec<f64>,
}

/// Runs a strategy. `on_round` may stop it by returning an error; what was evaluated is in the evaluator's record.
///
/// # Errors
/// [`Error::Model`] when the device fails; [`Error::NotFinite`] when no pattern has a finite loss; whatever `on_round` returns.
pub fn search(evaluator: &mut Evaluator<'_>, space: &SearchSpace, options: &SearchOptions, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Found> {
    match options.strategy {
        Strategy::Evop => evop::search(evaluator, space, &options.evop, options.seed, on_round),
        Strategy::Sleb => sleb::search(evaluator, space, on_round),
        Strategy::Shortgpt => shortgpt::search(evaluator, space, on_round),
        Strategy::Random => random::search(evaluator, space, options.evop.population * options.evop.generations, options.seed, on_round),
        Strategy::Exhaustive => exhaustive::search(evaluator, space, on_round),
    }
}

/// A generator for one round: a resumed run draws what an uninterrupted one would have drawn.
fn round_rng(seed: u64, round: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(round as u64);
    rng
}

/// Keeps the best pattern of all rounds; ties go to the earlier one.
struct Best {
    found: Option<(Pattern, Fitness)>,
    history: Vec<f64>,
}

impl Best {
    fn new() -> Self {
        Self { found: None, history: Vec::new() }
    }

    fn offer(&mut self, patterns: &[Pattern], fitness: &[Fitness]) {
        for (pattern, fitness) in patterns.iter().zip(fitness) {
            let better = self.found.as_ref().is_none_or(|(_, best)| fitness.loss < best.loss);
            if better && fitness.loss.is_finite() {
                self.found = Some((pattern.clone(), fitness.clone()));
            }
        }
    }

    fn end_round(&mut self, rounds: usize, evaluator: &Evaluator<'_>, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<()> {
        let best_loss = self.found.as_ref().map_or(f64::INFINITY, |(_, f)| f.loss);
        self.history.push(best_loss);
        let work = evaluator.work();
        on_round(Progress { round: self.history.len(), rounds, best_loss, evaluated: work.evaluated, requested: work.requested })
    }

    fn finish(self) -> Result<Found> {
        let (pattern, fitness) = self.found.ok_or(Error::NotFinite(f64::NAN))?;
        Ok(Found { pattern, fitness, history: self.history })
    }
}

//! Strategies behind one function: how a pattern of a space is found.

mod evop;
mod exhaustive;
mod joint;
mod racing;
mod random;
mod recipe;
mod seeds;
mod shortgpt;
mod sleb;
mod surrogate;

use crate::evaluate::Evaluator;
use crate::names::named;
use crate::objective::Fitness;
use crate::space::SearchSpace;
use crate::{Error, Result};
use evop_model::Pattern;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

pub use evop::EvopOptions;
pub use exhaustive::{Certificate, certify, count_patterns};
pub use joint::JointOptions;
pub use recipe::Recipe;

/// How the pattern is found. Each is named after its paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// This project's: elitist evolution of drops and widths, seeded, screened and raced.
    Joint,
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

named!(Strategy, "joint" => Strategy::Joint, "evop" => Strategy::Evop, "sleb" => Strategy::Sleb, "shortgpt" => Strategy::Shortgpt,
       "random" => Strategy::Random, "exhaustive" => Strategy::Exhaustive);

/// What a search needs besides its strategy's own options.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SearchOptions {
    /// How.
    pub strategy: Strategy,
    /// Parameters of `joint`.
    pub joint: JointOptions,
    /// Parameters of `evop`.
    pub evop: EvopOptions,
    /// Patterns that `random` draws.
    pub evaluations: usize,
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
    /// After each round.
    pub history: Vec<Round>,
    /// The best patterns, best first, for a choice on held-out text; just the one where a strategy has no others.
    pub elite: Vec<(Pattern, Fitness)>,
    /// Mean rank correlation between what the surrogate predicted of a generation and what was measured, where one was used.
    pub surrogate_rank_correlation: Option<f64>,
}

/// A point of a search's course.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Round {
    /// The best loss so far.
    pub best_loss: f64,
    /// Block-forwards done so far.
    pub block_forwards: usize,
    /// Patterns evaluated so far.
    pub evaluated: usize,
}

/// Runs a strategy. `on_round` may stop it by returning an error; what was evaluated is in the evaluator's record.
///
/// # Errors
/// [`Error::Model`] when the device fails; [`Error::NotFinite`] when no pattern has a finite loss; whatever `on_round` returns.
pub fn search(evaluator: &mut Evaluator<'_>, space: &SearchSpace, options: &SearchOptions, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Found> {
    match options.strategy {
        Strategy::Joint => joint::search(evaluator, space, &options.joint, options.seed, on_round),
        Strategy::Evop => evop::search(evaluator, space, &options.evop, options.seed, on_round),
        Strategy::Sleb => sleb::search(evaluator, space, on_round),
        Strategy::Shortgpt => shortgpt::search(evaluator, space, on_round),
        Strategy::Random => random::search(evaluator, space, options.evaluations, options.seed, on_round),
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
    history: Vec<Round>,
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
        let work = evaluator.work();
        self.history.push(Round { best_loss, block_forwards: work.block_forwards, evaluated: work.evaluated });
        on_round(Progress { round: self.history.len(), rounds, best_loss, evaluated: work.evaluated, requested: work.requested })
    }

    fn finish(self) -> Result<Found> {
        let (pattern, fitness) = self.found.ok_or(Error::NotFinite(f64::NAN))?;
        Ok(Found { elite: vec![(pattern.clone(), fitness.clone())], pattern, fitness, history: self.history, surrogate_rank_correlation: None })
    }
}

//! Strategies behind one function: how a pattern of a space is found.

mod adjust;
mod crash;
mod evop;
mod evopress;
mod exhaustive;
mod flap;
mod flatten;
mod greedy;
mod joint;
mod merge;
mod mlp;
mod pareto;
mod policy_gradient;
mod prune_comp;
mod racing;
mod random;
mod recipe;
mod seeds;
mod shortgpt;
mod surrogate;
mod surrogate_shapley;
mod twossp;
mod uniform;
mod widths;

use crate::evaluate::Evaluator;
use crate::names::named;
use crate::objective::Fitness;
use crate::space::{Genome, SearchSpace, Space};
use crate::{Error, Result};
use evop_model::{Gene, Pattern};
use rand::seq::IteratorRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

pub(crate) use adjust::scaled;
pub use adjust::{Adjustment, adjust};
pub use evop::EvopOptions;
pub use exhaustive::{Certificate, certify, count_patterns};
pub use joint::JointOptions;
pub use merge::Merge;
pub use pareto::{FrontPoint, ParetoOptions};
pub use recipe::Recipe;

/// How the pattern is found. Each is named after its paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// This project's: elitist evolution of drops and widths, seeded, screened and raced.
    Joint,
    /// EvoP's genetic algorithm (arXiv 2502.14910).
    Evop,
    /// (1 + lambda) evolution of drops by switches between units of a kind (EvoPress, arXiv 2410.14649).
    Evopress,
    /// Greedy: the unit whose removal hurts least, again and again (SLEB, arXiv 2402.09025).
    Sleb,
    /// One shot by how little a layer turns its input (ShortGPT, arXiv 2403.03853).
    Shortgpt,
    /// Greedy over attention and MLP sub-blocks by perplexity (BlockPruner, arXiv 2406.10594).
    Blockpruner,
    /// Greedy over sub-blocks by how far the output moves (FinerCut, arXiv 2405.18218).
    Finercut,
    /// One global ranking of heads and channels by fluctuation, with a bias for what goes (FLAP, arXiv 2312.11983).
    Flap,
    /// One MLP width for all layers, then whole attentions, greedily (2SSP, arXiv 2501.17771).
    Twossp,
    /// Keep probabilities learned by forward passes alone (arXiv 2406.10576).
    PolicyGradient,
    /// One layer of every cluster of similar neighbours (CRaSh, arXiv 2310.15477).
    Crash,
    /// Greedy over layers, each removal made up for in the magnitude of what stays (Prune&Comp, arXiv 2507.18212).
    PruneComp,
    /// The most alike neighbours merged into one layer of the same shape (FlattenGPT, arXiv 2602.08858).
    Flatten,
    /// One shot by Shapley values of a learned surrogate (arXiv 2602.07804).
    SurrogateShapley,
    /// The same MLP width in every layer, channels well chosen and refitted: the baseline of width pruning.
    Uniform,
    /// The same MLP width in every layer, by weight magnitude alone and without repair: the control that looks at no data.
    Magnitude,
    /// The best of as many random patterns as the search may evaluate: the control.
    Random,
    /// Random patterns of drops and repaired widths: the control of `joint`.
    RandomJoint,
    /// Every pattern; certifies the optimum.
    Exhaustive,
    /// A front of loss against what the first budget counts (NSGA-II); the best point within the budget becomes the checkpoint.
    Pareto,
    /// No search: a pattern that is given.
    Pattern,
}

named!(Strategy, "joint" => Strategy::Joint, "evop" => Strategy::Evop, "evopress" => Strategy::Evopress, "sleb" => Strategy::Sleb,
       "shortgpt" => Strategy::Shortgpt, "blockpruner" => Strategy::Blockpruner, "finercut" => Strategy::Finercut, "flap" => Strategy::Flap,
       "twossp" => Strategy::Twossp, "policy-gradient" => Strategy::PolicyGradient, "crash" => Strategy::Crash,
       "prune-comp" => Strategy::PruneComp, "flatten" => Strategy::Flatten, "surrogate-shapley" => Strategy::SurrogateShapley,
       "uniform" => Strategy::Uniform, "magnitude" => Strategy::Magnitude, "random" => Strategy::Random,
       "random-joint" => Strategy::RandomJoint, "exhaustive" => Strategy::Exhaustive, "pareto" => Strategy::Pareto, "pattern" => Strategy::Pattern);

/// What a search needs besides its strategy's own options.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SearchOptions {
    /// How.
    pub strategy: Strategy,
    /// Parameters of `joint`.
    pub joint: JointOptions,
    /// Parameters of `evop`.
    pub evop: EvopOptions,
    /// Parameters of `pareto`.
    pub pareto: ParetoOptions,
    /// The pattern of the strategy of that name.
    pub pattern: Option<Vec<Gene>>,
    /// Generations of `evopress`, where its published schedule would be longer.
    pub evopress_generations: Option<usize>,
    /// Patterns that `random` and `random-joint` draw, `policy-gradient` samples and `surrogate-shapley` learns from.
    pub evaluations: usize,
    /// Random numbers.
    pub seed: u64,
}

impl SearchOptions {
    /// Whether the strategy can run with these numbers: asked before anything is computed.
    ///
    /// # Errors
    /// [`Error::Option`] that names the option.
    pub fn check(&self) -> Result<()> {
        let least: &[(&str, usize, usize)] = match self.strategy {
            Strategy::Joint => &[("--generations", self.joint.generations, 1), ("--offspring", self.joint.offspring, 1), ("--elite", self.joint.elite, 1)],
            Strategy::Evop => {
                &[("--population", self.evop.population, 2), ("--generations", self.evop.generations, 1), ("--tournament", self.evop.tournament, 1)]
            }
            Strategy::Pareto => &[("--population", self.pareto.population, 2), ("--generations", self.pareto.generations, 1)],
            Strategy::PolicyGradient => &[("--evaluations", self.evaluations, policy_gradient::MASKS)],
            Strategy::Random | Strategy::RandomJoint | Strategy::SurrogateShapley => &[("--evaluations", self.evaluations, 1)],
            _ => &[],
        };
        if let Some((option, value, least)) = least.iter().find(|(_, value, least)| value < least) {
            return Err(Error::option(option, format!("expected at least {least}, found {value}")));
        }
        let begins = self.pareto.least;
        if self.strategy == Strategy::Pareto && !(0.0..1.0).contains(&begins) {
            let message = format!("expected the fraction at which the front begins, at least 0 and below 1; found {begins}");
            return Err(Error::option("--pareto-least", message));
        }
        Ok(())
    }
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
    /// The best patterns for a choice on held-out text, the best one first; just the one where a strategy has no others.
    pub elite: Vec<(Pattern, Fitness)>,
    /// A change of weights that belongs to the pattern, where the strategy makes one: apply it with [`adjust`] before the pattern.
    pub adjustment: Option<Adjustment>,
    /// Loss against cost, by ascending cost, where a whole front was searched.
    pub front: Vec<FrontPoint>,
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
    let (evaluations, seed) = (options.evaluations, options.seed);
    match options.strategy {
        Strategy::Joint => joint::search(evaluator, space, &options.joint, seed, on_round),
        Strategy::Evop => evop::search(evaluator, space, &options.evop, seed, on_round),
        Strategy::Evopress => evopress::search(evaluator, space, options.evopress_generations, seed, on_round),
        Strategy::Sleb | Strategy::Blockpruner | Strategy::Finercut => greedy::search(evaluator, space, options.strategy, on_round),
        Strategy::Shortgpt => shortgpt::search(evaluator, space, on_round),
        Strategy::Flap => flap::search(evaluator, space, on_round),
        Strategy::Twossp => twossp::search(evaluator, space, on_round),
        Strategy::PolicyGradient => policy_gradient::search(evaluator, space, evaluations, seed, on_round),
        Strategy::Crash => crash::search(evaluator, space, on_round),
        Strategy::PruneComp => prune_comp::search(evaluator, space, on_round),
        Strategy::Flatten => flatten::search(evaluator, space, on_round),
        Strategy::SurrogateShapley => surrogate_shapley::search(evaluator, space, evaluations, seed, on_round),
        Strategy::Uniform | Strategy::Magnitude => uniform::search(evaluator, space, options.strategy, on_round),
        Strategy::Random | Strategy::RandomJoint => random::search(evaluator, space, options.strategy, evaluations, seed, on_round),
        Strategy::Exhaustive => exhaustive::search(evaluator, space, on_round),
        Strategy::Pareto => pareto::search(evaluator, space, &options.pareto, seed, on_round),
        Strategy::Pattern => given(evaluator, space, options.pattern.as_deref(), on_round),
    }
}

/// Evaluates the pattern that was given.
fn given(evaluator: &mut Evaluator<'_>, space: &SearchSpace, genes: Option<&[Gene]>, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Found> {
    let genes = genes.ok_or_else(|| Error::option("--pattern", "expected a file with a pattern".to_string()))?;
    let pattern = Pattern::new(genes.to_vec(), evaluator.supernet().decoder().config())?;
    let Some(genome) = space.genome(&pattern) else {
        let message = "has widths that this space hasn't: expected a pattern found with the same --space, --width-steps and --width-multiple";
        return Err(Error::option("--pattern", message.to_string()));
    };
    if !space.fits(&genome) {
        return Err(Error::option("--pattern", format!("keeps {:.4?} of what the budgets {:.4?} count", space.totals(&genome), space.costs().budgets())));
    }
    one_shot(evaluator, space, &genome, on_round)
}

/// The number of layers of a space whose units are the model's layers, each of them.
///
/// # Errors
/// [`Error::Option`] for another space, or a model that lacks layers already.
fn whole_layers(space: &SearchSpace, strategy: Strategy) -> Result<usize> {
    let layers = space.dense().layers().len();
    if space.kind() != Space::Layer || space.units() != layers {
        return Err(Error::option("--space", format!("{strategy} ranks whole layers of a model that has them all: expected layer, without --uniform")));
    }
    Ok(layers)
}

/// Drops units in this order until the budgets hold.
fn drop_in_order(space: &SearchSpace, order: &[usize]) -> Genome {
    let mut genome = space.dense_genome();
    for unit in order {
        if space.fits(&genome) {
            break;
        }
        genome[*unit] = 0;
    }
    genome
}

/// The genome with one unit dropped.
fn without(genome: &[u8], unit: usize) -> Genome {
    let mut less = genome.to_vec();
    less[unit] = 0;
    less
}

/// How many of these units have to go from a genome until the budgets hold, if they go in this order.
fn removals(space: &SearchSpace, genome: &[u8], units: &[usize]) -> usize {
    let mut genome = genome.to_vec();
    let fits_after = units.iter().position(|unit| {
        genome[*unit] = 0;
        space.fits(&genome)
    });
    fits_after.map_or(units.len(), |at| at + 1)
}

/// Evaluates the one genome that a strategy without a search comes to.
fn one_shot(evaluator: &mut Evaluator<'_>, space: &SearchSpace, genome: &[u8], on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Found> {
    let patterns = [space.pattern(genome)];
    let fitness = evaluator.evaluate(&patterns)?;
    let mut best = Best::new();
    best.offer(&patterns, &fitness);
    best.end_round(1, evaluator, on_round)?;
    best.finish()
}

/// Patterns that a search with many to choose from offers to the choice on held-out text.
const ELITE: usize = 4;

/// A loss to sort by: what isn't a number is the worst.
fn rankable(loss: f64) -> f64 {
    if loss.is_finite() { loss } else { f64::INFINITY }
}

/// A generator for one round: a resumed run draws what an uninterrupted one would have drawn.
fn round_rng(seed: u64, round: usize) -> ChaCha8Rng {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(round as u64);
    rng
}

/// Uniform crossover: each unit from either parent.
fn cross(genome: &mut Genome, other: &[u8], rng: &mut ChaCha8Rng) {
    genome.iter_mut().zip(other).for_each(|(a, b)| *a = if rng.random_bool(0.5) { *a } else { *b });
}

/// Moves a random unit up or down, and says which: mostly by one or two options, sometimes to the end, which makes a drop one move.
fn step(space: &SearchSpace, genome: &mut Genome, rng: &mut ChaCha8Rng) -> Option<usize> {
    let up = rng.random_bool(0.5);
    let can_move = |u: &usize| if up { usize::from(genome[*u]) + 1 < space.options(*u) } else { genome[*u] > 0 };
    let unit = (0..space.units()).filter(can_move).choose(rng)?;
    let room = if up { space.options(unit) - 1 - usize::from(genome[unit]) } else { usize::from(genome[unit]) };
    let steps = if rng.random_bool(0.2) { room } else { rng.random_range(1..=room.min(2)) } as u8;
    genome[unit] = if up { genome[unit] + steps } else { genome[unit] - steps };
    Some(unit)
}

/// Progress before the first round.
fn preparing(evaluator: &Evaluator<'_>, rounds: usize) -> Progress {
    let work = evaluator.work();
    Progress { round: 0, rounds, best_loss: f64::INFINITY, evaluated: work.evaluated, requested: work.requested }
}

/// Keeps the best patterns of all rounds; ties go to the earlier one.
struct Best {
    /// Best first.
    found: Vec<(Pattern, Fitness)>,
    /// How many are kept for a choice on held-out text.
    most: usize,
    history: Vec<Round>,
}

impl Best {
    /// Keeps one.
    fn new() -> Self {
        Self::of(1)
    }

    /// Keeps up to `most`.
    fn of(most: usize) -> Self {
        Self { found: Vec::new(), most, history: Vec::new() }
    }

    /// Forgets the best, not the history: a step that goes on from the last one's choice competes with itself alone.
    fn restart(&mut self) {
        self.found.clear();
    }

    fn offer(&mut self, patterns: &[Pattern], fitness: &[Fitness]) {
        for (pattern, fitness) in patterns.iter().zip(fitness).filter(|(_, f)| f.loss.is_finite()) {
            if self.found.iter().any(|(known, _)| known == pattern) {
                continue;
            }
            let place = self.found.partition_point(|(_, better)| better.loss <= fitness.loss);
            self.found.insert(place, (pattern.clone(), fitness.clone()));
            self.found.truncate(self.most);
        }
    }

    fn end_round(&mut self, rounds: usize, evaluator: &Evaluator<'_>, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<()> {
        let best_loss = self.found.first().map_or(f64::INFINITY, |(_, f)| f.loss);
        let work = evaluator.work();
        self.history.push(Round { best_loss, block_forwards: work.block_forwards, evaluated: work.evaluated });
        on_round(Progress { round: self.history.len(), rounds, best_loss, evaluated: work.evaluated, requested: work.requested })
    }

    fn finish(self) -> Result<Found> {
        let (pattern, fitness) = self.found.first().cloned().ok_or(Error::NotFinite(f64::NAN))?;
        Ok(Found { elite: self.found, pattern, fitness, history: self.history, adjustment: None, front: Vec::new(), surrogate_rank_correlation: None })
    }
}

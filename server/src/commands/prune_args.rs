//! The options of `evop prune`, and what a preset and a strategy make of those that aren't given.

use super::model_args::ModelArgs;
use super::progress::ProgressStyle;
use anyhow::Result;
use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use evop_pruning::budget::{Budget, Resource};
use evop_pruning::calibration::{CalibrationOptions, Mixing, Weights};
use evop_pruning::checkpoint::Format;
use evop_pruning::compensate::{Compensation, SkipCompensation};
use evop_pruning::evaluate::Savings;
use evop_pruning::importance::Importance;
use evop_pruning::levels::LevelOptions;
use evop_pruning::objective::{Aggregate, FitnessKind, Objective};
use evop_pruning::run::PruneOptions;
use evop_pruning::search::{EvopOptions, JointOptions, ParetoOptions, SearchOptions, Strategy};
use evop_pruning::space::{Grid, Space, SpaceOptions};
use serde::Serialize;
use std::path::PathBuf;

/// Options of `evop prune`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  \
    evop prune --out pruned                                  the bundled model, a quarter of its block parameters goes\n  \
    evop prune --preset paper --out pruned                   EvoP as published: whole layers\n  \
    evop prune --model ./SmolLM2 --calibration c4.jsonl.gz --params 0.6 --kv 0.5 --out pruned\n  \
    evop prune --pareto --levels levels --out front          a whole front of loss against parameters; then any point of it:
  \
    evop prune --pattern front/front/0.6021.json --levels levels --out pruned
  \
    evop prune --fitness draft --out draft                   the form that guesses best for its time; then
  \
    evop serve --pattern draft=draft/pattern.json --speculate draft
  \
    evop prune --resume pruned                               go on after Ctrl-C, a crash or kill -9")]
pub struct PruneArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Directory of the run; at its end it is the pruned checkpoint.
    #[arg(long, value_name = "DIR", required_unless_present = "resume", conflicts_with = "resume")]
    pub out: Option<PathBuf>,
    /// Go on with the run in this directory; its options are those it was begun with.
    #[arg(long, value_name = "DIR")]
    pub resume: Option<PathBuf>,
    /// How to search: joint, evop, evopress, sleb, shortgpt, blockpruner, finercut, flap, twossp, policy-gradient, crash, prune-comp, flatten, surrogate-shapley, uniform, magnitude, random, random-joint, exhaustive, pareto or pattern. [default: joint; paper: evop]
    #[arg(long, value_name = "STRATEGY", help_heading = "Search")]
    pub strategy: Option<Strategy>,
    /// Search a whole front of loss against cost in one run (NSGA-II): front/ holds its patterns, the best one within the budget becomes the checkpoint.
    #[arg(long, conflicts_with = "strategy", help_heading = "Search")]
    pub pareto: bool,
    /// No search: make a checkpoint of the pattern in this file (a run's pattern.json, or one of its front/).
    #[arg(long, value_name = "FILE", conflicts_with_all = ["strategy", "pareto"], help_heading = "Search")]
    pub pattern: Option<PathBuf>,
    #[command(flatten)]
    pub budget: BudgetArgs,
    #[command(flatten)]
    pub tuning: TuningArgs,
    /// Calibrate on the sequences in this file, the calibration.json of an earlier run, instead of a text.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with_all = [
            "calibration", "sequences", "sequence_length", "clusters", "sentences_per_chunk", "max_chunks", "mixing", "cluster_weights", "keep_duplicates",
            "statistics_tokens", "held_out_tokens", "embedder",
        ],
        help_heading = "Calibration"
    )]
    pub calibration_set: Option<PathBuf>,
    /// Text for the before/after perplexity. [default: bundled books, or what --calibration or --calibration-set keeps apart]
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    pub eval_text: Option<PathBuf>,
    /// Kind of checkpoint: hf, nemotron-nas or gguf (`evop export` makes another of it later).
    #[arg(long, value_name = "FORMAT", default_value_t = Format::Hf, help_heading = "Report")]
    pub format: Format,
    /// How progress is shown: bars on a terminal, JSON lines on standard output, or not at all.
    #[arg(long, value_enum, default_value_t = ProgressStyle::Auto, help_heading = "Report")]
    pub progress: ProgressStyle,
    /// Print the outcome as JSON instead of a table.
    #[arg(long, help_heading = "Report")]
    pub json: bool,
}

/// What may be kept.
#[derive(Debug, Clone, Args)]
pub struct BudgetArgs {
    /// Fraction of the block parameters that goes. [default: 0.25, unless a budget is given]
    #[arg(long, value_name = "FRACTION", conflicts_with = "params", help_heading = "Budget")]
    pub sparsity: Option<f64>,
    /// Fraction of the block parameters that may stay.
    #[arg(long, value_name = "FRACTION", help_heading = "Budget")]
    pub params: Option<f64>,
    /// Fraction of the key/value cache that may stay.
    #[arg(long, value_name = "FRACTION", help_heading = "Budget")]
    pub kv: Option<f64>,
    /// Fraction of the blocks' decode time that may stay, measured on this device.
    #[arg(long, value_name = "FRACTION", help_heading = "Budget")]
    pub latency: Option<f64>,
}

/// Everything about how a pattern is searched and repaired, but for strategy and budget. Serialised it is what decides a result, files and seed aside.
#[derive(Debug, Clone, Args, Serialize)]
pub struct TuningArgs {
    /// A set of options; single options below change it.
    #[arg(long, value_enum, default_value_t = Preset::Default, help_heading = "Search")]
    pub preset: Preset,
    /// What a gene may say: layer, block, width, joint or joint+heads. [default: the strategy's own]
    #[arg(long, value_name = "SPACE", help_heading = "Search")]
    pub space: Option<Space>,
    /// Only patterns of equal layers (whole layers removed, one MLP width): they load in every tool.
    #[arg(long, help_heading = "Search")]
    pub uniform: bool,
    /// What is minimised, against nothing or the dense model: nll or kl; or draft, the time of a token with the pattern guessing for the whole model (evop serve --speculate), from its agreement and its measured time. [default: the strategy's own]
    #[arg(long, value_name = "LOSS", help_heading = "Search")]
    pub fitness: Option<FitnessKind>,
    /// How tokens become one number: mean, worst-cluster or mean+std.
    #[arg(long, value_name = "HOW", default_value_t = Aggregate::Mean, help_heading = "Search")]
    pub aggregate: Aggregate,
    /// The part of the loss, 0 to 1, that goes to tokens which the dense model takes from far back, such as a name that comes again. [default: 0.5; published strategies: 0]
    #[arg(long, value_name = "FRACTION", help_heading = "Search")]
    pub key_tokens: Option<f64>,
    /// Find a pattern for the text of every calibration cluster too (clusters.json), beside the common one.
    #[arg(long, help_heading = "Search")]
    pub per_cluster: bool,
    /// Generations. [default: 60; paper: 100]
    #[arg(long, value_name = "N", help_heading = "Search")]
    pub generations: Option<usize>,
    /// Individuals of an evop generation, points of a front. [evop: 50; pareto: 48]
    #[arg(long, value_name = "N", help_heading = "Search")]
    pub population: Option<usize>,
    /// Children of a joint generation. [default: 32]
    #[arg(long, value_name = "N", help_heading = "Search")]
    pub offspring: Option<usize>,
    /// End after this many generations without a better pattern (joint). [default: 12]
    #[arg(long, value_name = "N", help_heading = "Search")]
    pub patience: Option<usize>,
    /// Fraction of the first budget's resource at which a front begins. [default: 0.3]
    #[arg(long, value_name = "FRACTION", help_heading = "Search")]
    pub pareto_least: Option<f64>,
    /// Patterns that random and random-joint draw, policy-gradient samples and surrogate-shapley learns from. [default: 1000; in a comparison random-joint as many as joint evaluated]
    #[arg(long, value_name = "N", help_heading = "Search")]
    pub evaluations: Option<usize>,
    /// Seed of the search and of calibration sampling. [default: 31]
    #[arg(long, value_name = "SEED", help_heading = "Search")]
    #[serde(skip)]
    pub seed: Option<u64>,
    /// Enumerate the whole space after the search if it has at most this many patterns, to certify the optimum.
    #[arg(long, value_name = "PATTERNS", default_value_t = 5_000, help_heading = "Search")]
    #[serde(skip)]
    pub certify_up_to: u64,

    /// Steps between no MLP and the whole one.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = RangedU64ValueParser::<usize>::new().range(1..), help_heading = "Widths")]
    pub width_steps: usize,
    /// MLP widths are multiples of this. [default: 32 below 1,024 channels, 64 below 4,096, else 256]
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new().range(1..), help_heading = "Widths")]
    pub width_multiple: Option<usize>,
    /// Which channels go first: wanda, flap, norm2ssp, obs or magnitude. [default: what errs least on held-out activations]
    #[arg(long, value_name = "MEASURE", help_heading = "Widths")]
    pub importance: Option<Importance>,
    /// Repair of what stays: none, bias, refit or rotate. [default: what errs least on held-out activations]
    #[arg(long, value_name = "REPAIR", help_heading = "Widths")]
    pub compensation: Option<Compensation>,
    /// How skipped sub-blocks are made up for: none, scale or linear (the sub-block before learns to give the missing update too). [default: what errs least on held-out activations; published strategies: none]
    #[arg(long, value_name = "REPAIR", help_heading = "Widths")]
    pub skip_compensation: Option<SkipCompensation>,
    /// Keep the level database here, for other runs with the same model and calibration.
    #[arg(long, value_name = "DIR", help_heading = "Widths")]
    #[serde(skip)]
    pub levels: Option<PathBuf>,

    /// Text to calibrate on: plain, or JSON lines with a `text` field, either gzipped; may be given again. [default: seven bundled books]
    #[arg(long, value_name = "FILE", help_heading = "Calibration")]
    #[serde(skip)]
    pub calibration: Vec<PathBuf>,
    /// Sequences that patterns are scored on. [default: 16; paper: 5]
    #[arg(long, value_name = "N", help_heading = "Calibration")]
    pub sequences: Option<usize>,
    /// Tokens of a sequence, at most the model's context. [default: 256; paper: 2048]
    #[arg(long, value_name = "TOKENS", help_heading = "Calibration")]
    pub sequence_length: Option<usize>,
    /// Clusters of chunks. [default: 8; paper: 5]
    #[arg(long, value_name = "K", help_heading = "Calibration")]
    pub clusters: Option<usize>,
    /// Sentences of a chunk. [default: 16; paper: 60]
    #[arg(long, value_name = "N", help_heading = "Calibration")]
    pub sentences_per_chunk: Option<usize>,
    /// Chunks that are looked at, drawn at random; 0: all. [default: 1024; paper: all]
    #[arg(long, value_name = "N", help_heading = "Calibration")]
    pub max_chunks: Option<usize>,
    /// Sequences of one cluster each, of clusters mixed, or of no clusters: apart, mixed, random. [default: apart; paper: mixed]
    #[arg(long, value_name = "HOW", help_heading = "Calibration")]
    pub mixing: Option<Mixing>,
    /// How often a cluster's turn comes: uniform or size.
    #[arg(long, value_name = "WEIGHTS", default_value_t = Weights::Uniform, help_heading = "Calibration")]
    pub cluster_weights: Weights,
    /// Keep documents that are there twice. [paper: kept]
    #[arg(long, help_heading = "Calibration")]
    pub keep_duplicates: bool,
    /// Tokens that activations are measured on for partial widths. [default: 65536]
    #[arg(long, value_name = "TOKENS", help_heading = "Calibration")]
    pub statistics_tokens: Option<usize>,
    /// Tokens held out for choices among finished patterns. [default: 8192]
    #[arg(long, value_name = "TOKENS", help_heading = "Calibration")]
    pub held_out_tokens: Option<usize>,
    /// A sentence-transformers BERT directory to embed chunks with. [default: the model's own hidden states]
    #[arg(long, value_name = "DIR", help_heading = "Calibration")]
    #[serde(skip)]
    pub embedder: Option<PathBuf>,

    /// Memory for boundary states of good patterns, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 1024, help_heading = "Savings (switch off to measure what they save)")]
    pub prefix_cache: usize,
    /// Evaluate a pattern again when it comes up again.
    #[arg(long, help_heading = "Savings (switch off to measure what they save)")]
    pub no_memo: bool,
    /// Run every pattern from its first sub-block.
    #[arg(long, help_heading = "Savings (switch off to measure what they save)")]
    pub no_prefix: bool,
    /// Evaluate every child on all sequences.
    #[arg(long, help_heading = "Savings (switch off to measure what they save)")]
    pub no_racing: bool,
    /// Begin with random patterns only.
    #[arg(long, help_heading = "Savings (switch off to measure what they save)")]
    pub no_seeds: bool,
    /// Evaluate children unscreened.
    #[arg(long, help_heading = "Savings (switch off to measure what they save)")]
    pub no_surrogate: bool,
    /// Window of perplexities, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 256, help_heading = "Report")]
    pub eval_window: usize,
}

/// A named set of options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// Drops and repaired widths searched together, scored by divergence from the dense model.
    Default,
    /// What `evop serve --pattern` serves over the weights of the whole model: drops, and widths that need no more than a bias.
    Elastic,
    /// EvoP as its authors' code runs it: 5 sequences of 2048 tokens from 5 clusters, whole layers, population 50, 100 generations.
    Paper,
}

impl TuningArgs {
    /// Whether drafts are searched for.
    pub fn drafts(&self) -> bool {
        self.fitness == Some(FitnessKind::Draft)
    }

    /// All options of a run, those not given from the preset and the strategy (by default the preset's).
    pub fn options(&self, strategy: Option<Strategy>, budgets: Vec<Budget>, context: usize) -> PruneOptions {
        let paper = self.preset == Preset::Paper;
        let elastic = self.preset == Preset::Elastic || self.drafts();
        let strategy = strategy.unwrap_or(if paper { Strategy::Evop } else { Strategy::Joint });
        let recipe = strategy.recipe();
        let ccds = if paper { CalibrationOptions::paper() } else { CalibrationOptions::default() };
        let (joint, evop, pareto) = (JointOptions::default(), EvopOptions::default(), ParetoOptions::default());
        let seed = self.seed.unwrap_or(ccds.seed);
        PruneOptions {
            space: SpaceOptions {
                space: self.space.unwrap_or(recipe.space),
                uniform: self.uniform,
                grid: Grid { steps: self.width_steps, multiple: self.width_multiple },
                budgets,
            },
            search: SearchOptions {
                strategy,
                joint: JointOptions {
                    generations: self.generations.unwrap_or(joint.generations),
                    offspring: self.offspring.unwrap_or(joint.offspring),
                    patience: self.patience.unwrap_or(joint.patience),
                    racing: !self.no_racing,
                    seeds: !self.no_seeds,
                    surrogate: !self.no_surrogate,
                    ..joint
                },
                evop: EvopOptions { population: self.population.unwrap_or(evop.population), generations: self.generations.unwrap_or(evop.generations), ..evop },
                pareto: ParetoOptions {
                    population: self.population.unwrap_or(pareto.population),
                    generations: self.generations.unwrap_or(pareto.generations),
                    least: self.pareto_least.unwrap_or(if self.drafts() { 0.0 } else { pareto.least }),
                },
                pattern: None,
                evopress_generations: self.generations,
                evaluations: self.evaluations.unwrap_or(1_000),
                seed,
            },
            objective: Objective {
                kind: self.fitness.unwrap_or(recipe.fitness),
                aggregate: self.aggregate,
                key_tokens: self.key_tokens.unwrap_or(if self.drafts() { 0.0 } else { recipe.key_tokens }),
            },
            levels: LevelOptions {
                importance: self.importance.or(recipe.importance),
                compensation: self.compensation.or(recipe.compensation).or(elastic.then_some(Compensation::Bias)),
                skips: self.skip_compensation.or(recipe.skips).or(elastic.then_some(SkipCompensation::None)),
            },
            calibration: CalibrationOptions {
                sequences: self.sequences.unwrap_or(ccds.sequences),
                sequence_length: self.sequence_length.unwrap_or(ccds.sequence_length.min(context)),
                clusters: self.clusters.unwrap_or(ccds.clusters),
                sentences_per_chunk: self.sentences_per_chunk.unwrap_or(ccds.sentences_per_chunk),
                max_chunks: self.max_chunks.map_or(ccds.max_chunks, |n| (n > 0).then_some(n)),
                mixing: self.mixing.unwrap_or(ccds.mixing),
                weights: self.cluster_weights,
                deduplicate: ccds.deduplicate && !self.keep_duplicates,
                statistics_tokens: self.statistics_tokens.unwrap_or(ccds.statistics_tokens),
                held_out_tokens: self.held_out_tokens.unwrap_or(ccds.held_out_tokens),
                seed,
            },
            embedder: self.embedder.clone(),
            level_directory: self.levels.clone(),
            savings: Savings { memo: !self.no_memo, prefix: !self.no_prefix, prefix_cache_bytes: self.prefix_cache << 20 },
            per_cluster: self.per_cluster,
            certify_up_to: self.certify_up_to,
            eval_window: self.eval_window.min(context),
            format: Format::Hf,
        }
    }
}

impl BudgetArgs {
    /// The budgets that were given.
    ///
    /// # Errors
    /// A fraction outside of 0 to 1.
    pub fn given(&self) -> Result<Vec<Budget>> {
        let mut budgets = Vec::new();
        if let Some(sparsity) = self.sparsity {
            budgets.push(Budget::removing(sparsity)?);
        }
        for (resource, keep) in [(Resource::Params, self.params), (Resource::Kv, self.kv), (Resource::Latency, self.latency)] {
            if let Some(keep) = keep {
                budgets.push(Budget::new(resource, keep)?);
            }
        }
        Ok(budgets)
    }
}

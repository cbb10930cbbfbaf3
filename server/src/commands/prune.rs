//! `evop prune`: corpus -> calibration -> search -> pattern -> checkpoint -> report.

use super::model_args::{ModelArgs, bundled_calibration, bundled_held_out, read_text};
use super::progress::{Display, ProgressStyle};
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use evop_pruning::calibration::CalibrationOptions;
use evop_pruning::run::{self, Inputs, Outcome, PruneOptions, Run};
use evop_pruning::search::{EvopOptions, SearchOptions, Space, Strategy};
use evop_pruning::{checkpoint, report};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Options of `evop prune`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  \
    evop prune --out pruned                                  the bundled model, EvoP as published\n  \
    evop prune --model ./SmolLM2 --calibration c4.jsonl.gz --sequence-length 256 --out pruned\n  \
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
    /// A set of options; single options below change it.
    #[arg(long, value_enum, default_value_t = Preset::Paper, help_heading = "Search")]
    pub preset: Preset,
    /// What can go: whole layers, or attention and MLP blocks on their own (layer, block).
    #[arg(long, value_name = "SPACE", default_value_t = Space::Layer, help_heading = "Search")]
    pub space: Space,
    /// Fraction of them that goes, rounded up.
    #[arg(long, value_name = "FRACTION", default_value_t = 0.25, help_heading = "Search")]
    pub sparsity: f64,
    /// How to search: evop, sleb, shortgpt, random or exhaustive.
    #[arg(long, value_name = "STRATEGY", default_value_t = Strategy::Evop, help_heading = "Search")]
    pub strategy: Strategy,
    /// Individuals of a generation. [paper: 50]
    #[arg(long, value_name = "N", help_heading = "Search")]
    pub population: Option<usize>,
    /// Generations. [paper: 100]
    #[arg(long, value_name = "N", help_heading = "Search")]
    pub generations: Option<usize>,
    /// Seed of the search and of calibration sampling. [paper: 31]
    #[arg(long, value_name = "SEED", help_heading = "Search")]
    pub seed: Option<u64>,
    /// Enumerate the whole space after the search if it has at most this many patterns, to certify the optimum.
    #[arg(long, value_name = "PATTERNS", default_value_t = 5_000, help_heading = "Search")]
    pub certify_up_to: u64,
    /// Text to calibrate on: plain, or JSON lines with a `text` field, either gzipped. [default: seven bundled books]
    #[arg(long, value_name = "FILE", help_heading = "Calibration")]
    pub calibration: Option<PathBuf>,
    /// Sequences. [paper: 5]
    #[arg(long, value_name = "N", help_heading = "Calibration")]
    pub sequences: Option<usize>,
    /// Tokens of a sequence, at most the model's context. [paper: 2048]
    #[arg(long, value_name = "TOKENS", help_heading = "Calibration")]
    pub sequence_length: Option<usize>,
    /// Clusters of chunks. [paper: 5]
    #[arg(long, value_name = "K", help_heading = "Calibration")]
    pub clusters: Option<usize>,
    /// A sentence-transformers BERT directory to embed chunks with. [default: the model's own hidden states]
    #[arg(long, value_name = "DIR", help_heading = "Calibration")]
    pub embedder: Option<PathBuf>,
    /// Text for the before/after perplexity. [default: bundled books, or a tenth of --calibration kept apart]
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    pub eval_text: Option<PathBuf>,
    /// Window of the before/after perplexity, in tokens.
    #[arg(long, value_name = "TOKENS", default_value_t = 256, help_heading = "Report")]
    pub eval_window: usize,
    /// How progress is shown: bars on a terminal, JSON lines on standard output, or not at all.
    #[arg(long, value_enum, default_value_t = ProgressStyle::Auto, help_heading = "Report")]
    pub progress: ProgressStyle,
    /// Print the outcome as JSON instead of a table.
    #[arg(long, help_heading = "Report")]
    pub json: bool,
}

/// A named set of options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// EvoP as its authors' code runs it: 5 sequences of 2048 tokens from 5 clusters, population 50, 100 generations.
    Paper,
}

impl PruneArgs {
    fn options(&self, context: usize) -> PruneOptions {
        let Preset::Paper = self.preset;
        let (ccds, evop) = (CalibrationOptions::default(), EvopOptions::default());
        let seed = self.seed.unwrap_or(ccds.seed);
        PruneOptions {
            space: self.space,
            sparsity: self.sparsity,
            search: SearchOptions {
                strategy: self.strategy,
                evop: EvopOptions { population: self.population.unwrap_or(evop.population), generations: self.generations.unwrap_or(evop.generations), ..evop },
                seed,
            },
            calibration: CalibrationOptions {
                sequences: self.sequences.unwrap_or(ccds.sequences),
                sequence_length: self.sequence_length.unwrap_or(ccds.sequence_length.min(context)),
                clusters: self.clusters.unwrap_or(ccds.clusters),
                seed,
                ..ccds
            },
            embedder: self.embedder.clone(),
            certify_up_to: self.certify_up_to,
            eval_window: self.eval_window.min(context),
        }
    }
}

/// Runs the command.
pub fn run(args: &PruneArgs) -> Result<()> {
    let mut display = Display::new(args.progress);
    match prune(args, &mut display) {
        Ok((directory, outcome)) => {
            display.done(&directory);
            if args.json {
                println!("{}", serde_json::to_string_pretty(&outcome)?);
            } else if !display.is_json() {
                print_table(&outcome);
                println!("\n{} is the pruned checkpoint; report.html in it shows what was found.\nServe it: evop serve --model {0}", directory.display());
            }
            Ok(())
        }
        Err(error) => {
            display.failed(&format!("{error:#}"));
            Err(error)
        }
    }
}

/// The command without its printed end: the run's directory and outcome.
pub fn prune(args: &PruneArgs, display: &mut Display) -> Result<(PathBuf, Outcome)> {
    let (directory, begun) = match (&args.resume, &args.out) {
        (Some(directory), _) => (directory.clone(), Some(run::inputs(directory)?)),
        (None, Some(directory)) => (directory.clone(), None),
        (None, None) => bail!("expected --out DIR or --resume DIR"),
    };
    if begun.is_some() && run::is_finished(&directory) {
        bail!("{}: this run has finished; serve it with `evop serve --model {0}`", directory.display());
    }
    let mut model = args.model.clone();
    let mut calibration = args.calibration.clone();
    let mut eval_text = args.eval_text.clone();
    if let Some(begun) = &begun {
        (model.model, model.revision) = (begun.model.clone(), begun.revision.clone());
        calibration = begun.calibration.clone();
        eval_text = begun.eval_text.clone();
    }
    let (checkpoint, decoder) = model.load()?;
    let model_sha256 = checkpoint::fingerprint(checkpoint.source().as_ref())?;
    let corpus = calibration.as_deref().map_or_else(bundled_calibration, read_text).context("calibration corpus")?;
    let held_out = match (&eval_text, &calibration) {
        (Some(path), _) => Some(read_text(path)?),
        (None, None) => Some(bundled_held_out()?),
        (None, Some(_)) => None,
    };
    if begun.is_none() {
        // paths are kept absolute, so that a run can be resumed from anywhere
        let absolute = |p: &PathBuf| std::path::absolute(p).unwrap_or_else(|_| p.clone());
        let named = model.model.map(|m| if std::path::Path::new(&m).exists() { absolute(&PathBuf::from(&m)).display().to_string() } else { m });
        let run = Run {
            model: named,
            revision: model.revision,
            model_sha256: model_sha256.clone(),
            calibration: calibration.as_ref().map(absolute),
            eval_text: eval_text.as_ref().map(absolute),
            options: args.options(checkpoint.config().max_position_embeddings),
            version: env!("CARGO_PKG_VERSION").to_string(),
        };
        run::begin(&directory, &run, checkpoint.config())?;
    }
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        // the second one ends the process at once
        signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&interrupted))?;
        signal_hook::flag::register(signal, Arc::clone(&interrupted))?;
    }
    let inputs = Inputs { checkpoint: &checkpoint, model_sha256: &model_sha256, decoder: &decoder, corpus: &corpus, held_out: held_out.as_deref() };
    let outcome = run::prune(&directory, &inputs, &mut |step| {
        if interrupted.load(Ordering::Relaxed) {
            return Err(evop_pruning::Error::Interrupted(directory.clone()));
        }
        display.step(step);
        Ok(())
    })?;
    Ok((directory, outcome))
}

/// What was found, for people.
pub fn print_table(outcome: &Outcome) {
    let millions = |n: usize| n as f64 / 1e6;
    println!("\n{}", report::pattern_text(&outcome.kept));
    println!("pattern: {}", report::certificate_text(outcome));
    println!("\n{:<34}{:>12}{:>12}{:>9}", "", "dense", "pruned", "ratio");
    let row = |name: &str, dense: f64, pruned: f64, digits: usize| println!("{name:<34}{dense:>12.digits$}{pruned:>12.digits$}{:>9.3}", pruned / dense);
    row(&format!("perplexity (windows of {})", outcome.dense.window), outcome.dense.perplexity, outcome.pruned.perplexity, 3);
    row("calibration loss, nats", outcome.dense_loss, outcome.found.fitness.loss, 2);
    row("parameters, millions", millions(outcome.parameters.0), millions(outcome.parameters.1), 3);
    row("block parameters, millions", millions(outcome.block_parameters.0), millions(outcome.block_parameters.1), 3);
    row("KV cache bytes per token (16-bit)", outcome.kv_bytes_per_token.0 as f64, outcome.kv_bytes_per_token.1 as f64, 0);
    println!("\nsearch: {}", report::work_text(outcome.work));
    if outcome.certificate.is_some() {
        println!("certificate: {}", report::work_text(outcome.certificate_work));
        let mut both = outcome.work;
        both.add(outcome.certificate_work);
        println!("together: {}", report::work_text(both));
    }
    println!("time: {}", run::human(std::time::Duration::from_secs_f64(outcome.search_seconds)));
}

//! A pruning run: one directory that holds its inputs, its log, and at its end the checkpoint.
//!
//! | file | what | written |
//! | --- | --- | --- |
//! | `run.json` | all inputs: model, options, seeds, hashes, version | first |
//! | `calibration.json` | the sequences, with their clusters; another run can be calibrated on it | once sampled |
//! | `latency.json` | milliseconds of every sub-block and width, for a latency budget | once measured |
//! | `levels/` | the level database, unless it is kept elsewhere | a sub-block at a time; deleted at the end |
//! | `search.jsonl` | every evaluation and the work done | appended, synced a batch at a time |
//! | `front/` | the patterns of a front, each named by what it keeps | at the end |
//! | `widths.safetensors` | what partial widths need over the parent's own weights, where that is an order and biases alone | at the end |
//! | `clusters.json`, `clusters.safetensors` | a pattern a cluster; the chunks' vectors | at the end; once sampled |
//! | `pattern.json`, `report.html`, `report.json`, `config.json`, `model.safetensors`, … | the result | at the end |
//! | `evop.json` | provenance; its presence makes the directory a checkpoint | last |
//!
//! The search is deterministic, so its state **is** the log: `--resume` runs it again over the log's results and goes on where they end.
//! A kill loses at most the batch under way.

mod log;
mod outcome;

use crate::budget::{Budget, Drafting, LatencyTable, Resource};
use crate::calibration::{Calibration, CalibrationOptions, CalibrationStep, Corpus};
use crate::checkpoint::{Contents, Format};
use crate::compensate::SkipCompensation;
use crate::embed::{Embedder, HiddenStates, SentenceTransformer};
use crate::eval::{self, Perplexity};
use crate::evaluate::{Evaluator, Sample, Savings, Work};
use crate::latency;
use crate::levels::{LevelKey, LevelOptions, Levels, tokens_sha256};
use crate::objective::{Aggregate, Objective};
use crate::per_cluster;
use crate::search::{self, Found, Progress, SearchOptions, Strategy};
use crate::space::{SearchSpace, SpaceOptions};
use crate::supernet::Supernet;
use crate::{Error, Result, report, storage};
use evop_model::{Checkpoint, Config, Decoder, DecoderSource, Pattern, WeightType};
use log::{Log, Phase};
use outcome::peak_resident;
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use outcome::{CalibrationReport, HeldOut, Memory, Outcome, Seconds};

/// Everything that decides a run's result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PruneOptions {
    /// What a gene may say, and what may be kept.
    pub space: SpaceOptions,
    /// Strategy, its parameters and seed.
    pub search: SearchOptions,
    /// What the search minimises.
    pub objective: Objective,
    /// Order and repair of partial widths.
    pub levels: LevelOptions,
    /// CCDS.
    pub calibration: CalibrationOptions,
    /// A sentence-transformers directory; `None`: the model's own hidden states.
    pub embedder: Option<PathBuf>,
    /// Where the level database is kept for other runs; `None`: in the run's directory, until its end.
    pub level_directory: Option<PathBuf>,
    /// Which savings the evaluator makes.
    pub savings: Savings,
    /// Find a pattern for every cluster too.
    pub per_cluster: bool,
    /// Enumerate the space after the search where it has at most this many patterns.
    pub certify_up_to: u64,
    /// Window of the before/after perplexity, in tokens.
    pub eval_window: usize,
    /// The kind of checkpoint that is written.
    pub format: Format,
}

impl PruneOptions {
    fn check(&self) -> Result<()> {
        self.objective.check()?;
        if self.objective.for_drafts() && (self.search.strategy != Strategy::Pareto || self.per_cluster || self.objective.aggregate != Aggregate::Mean) {
            let message = "finds by itself what a draft may cost: expected no --strategy, --per-cluster or --aggregate beside it";
            return Err(Error::option("--fitness draft", message.to_string()));
        }
        Ok(())
    }

    /// The space as it is before times are known: a budget of them can't be held yet.
    fn untimed_space(&self) -> SpaceOptions {
        if !self.needs_latency() {
            return self.space.clone();
        }
        SpaceOptions { budgets: vec![Budget { resource: Resource::Params, keep: 0.5 }], ..self.space.clone() }
    }

    /// Whether the time of sub-blocks has to be known.
    fn needs_latency(&self) -> bool {
        self.objective.for_drafts() || self.space.budgets.iter().any(|b| b.resource == Resource::Latency)
    }
}

/// A run's inputs, as `run.json` keeps them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// The model as it was named on the command line; `None`: the bundled one.
    pub model: Option<String>,
    /// Hub revision, if the model came from there.
    pub revision: Option<String>,
    /// SHA-256 of the model's tensors.
    pub model_sha256: String,
    /// What its matrices are held in: f32 or bf16. Losses of one run are all of one type.
    pub dtype: String,
    /// The corpus files; none: the bundled books.
    pub calibration: Vec<PathBuf>,
    /// The `calibration.json` of an earlier run that is calibrated on instead; its options are the run's.
    pub calibration_set: Option<PathBuf>,
    /// The text of the before/after perplexity; `None`: bundled books with a bundled corpus, else held-out chunks of the corpus.
    pub eval_text: Option<PathBuf>,
    /// Options.
    pub options: PruneOptions,
    /// The command line that began the run, for the report.
    pub command: Vec<String>,
    /// Version of EvoP that began the run.
    pub version: String,
}

const RUN: &str = "run.json";
pub(crate) const CALIBRATION: &str = "calibration.json";
const LOG: &str = "search.jsonl";
const LATENCY: &str = "latency.json";
const LEVELS: &str = "levels";
const PATTERN: &str = "pattern.json";
/// Directory of a front's patterns.
pub const FRONT: &str = "front";
/// Beside a pattern: orders and biases of partial widths, where the parent's weights are all else that they need.
pub const WIDTHS: &str = "widths.safetensors";
/// A pattern a cluster.
pub const CLUSTERS: &str = "clusters.json";
pub(crate) const CLUSTER_VECTORS: &str = "clusters.safetensors";
/// The file that makes a run directory a checkpoint.
pub const PROVENANCE: &str = "evop.json";

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Step {
    /// Making the calibration set.
    Calibration(CalibrationStep),
    /// Measuring what sub-blocks cost in time: done of all.
    Latency {
        /// Sub-blocks done.
        done: usize,
        /// Sub-blocks in all.
        all: usize,
    },
    /// Building the level database.
    Levels {
        /// Sub-blocks done.
        done: usize,
        /// Sub-blocks in all.
        all: usize,
    },
    /// Searching.
    Search(Progress),
    /// Enumerating the space to certify the result.
    Certificate(Progress),
    /// Searching a cluster's own pattern.
    Cluster {
        /// Which.
        cluster: usize,
        /// Of how many.
        clusters: usize,
        /// Its search.
        progress: Progress,
    },
    /// Before/after perplexity: windows done of all.
    Perplexity {
        /// Windows done.
        done: usize,
        /// Windows in all.
        all: usize,
    },
    /// Writing the checkpoint.
    Writing,
}

/// What a run needs from outside of its directory.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The model to prune.
    pub checkpoint: &'a Checkpoint,
    /// [`crate::checkpoint::fingerprint`] of its tensors.
    pub model_sha256: &'a str,
    /// The same, loaded.
    pub decoder: &'a Decoder,
    /// The calibration corpora.
    pub corpora: &'a [Corpus],
    /// Held-out text for the before/after perplexity; `None`: the chunks that calibration held out.
    pub held_out: Option<&'a str>,
}

/// Begins a run for a model in `directory`, which must not hold one already.
///
/// # Errors
/// [`Error::RunDirectory`] when there is a run or a checkpoint already; [`Error::Option`] for options that no run could be made of.
pub fn begin(directory: &Path, run: &Run, config: &Config) -> Result<()> {
    run.options.search.check()?;
    run.options.check()?;
    match &run.calibration_set {
        // (what is in it is checked when it is read)
        Some(_) if run.options.per_cluster => {
            let message = "finds a prompt's cluster by the chunks of the text, which --calibration-set hasn't: expected a text to calibrate on";
            return Err(Error::option("--per-cluster", message));
        }
        Some(_) => {}
        None => run.options.calibration.check(config.max_position_embeddings)?,
    }
    SearchSpace::new(config, &run.options.untimed_space(), None)?;
    for file in [PROVENANCE, RUN, "config.json", CALIBRATION] {
        if directory.join(file).exists() {
            let what_to_do = match file {
                RUN => format!("go on with `evop prune --resume {}`, or choose another --out", directory.display()),
                CALIBRATION => format!("to calibrate on it, choose another --out and --calibration-set {}", directory.join(file).display()),
                _ => "choose another --out".into(),
            };
            return Err(Error::RunDirectory { path: directory.to_path_buf(), message: format!("holds a {file} already: {what_to_do}") });
        }
    }
    std::fs::create_dir_all(directory).map_err(|e| Error::io(directory, e))?;
    storage::write_json(&directory.join(RUN), run)
}

/// Reads the inputs of a run that was begun.
///
/// # Errors
/// [`Error::RunDirectory`] when there is none or it can't be read.
pub fn inputs(directory: &Path) -> Result<Run> {
    let path = directory.join(RUN);
    if !path.exists() {
        return Err(Error::RunDirectory {
            path: directory.to_path_buf(),
            message: format!("expected a run directory with {RUN}: begin one with `evop prune --out DIR`"),
        });
    }
    storage::read_json(&path)
}

/// Whether the run in `directory` has finished.
pub fn is_finished(directory: &Path) -> bool {
    directory.join(PROVENANCE).exists()
}

/// Begins or goes on with the run in `directory`, to its end.
///
/// `on_step` may stop the run by returning an error; everything evaluated so far is on disk.
///
/// # Errors
/// Those of calibration, search and writing; [`Error::RunDirectory`] when the model is not the one that the run was begun with.
pub fn prune(directory: &Path, inputs: &Inputs<'_>, on_step: &mut dyn FnMut(Step) -> Result<()>) -> Result<Outcome> {
    let run: Run = self::inputs(directory)?;
    if inputs.model_sha256 != run.model_sha256 {
        return Err(Error::RunDirectory {
            path: directory.join(RUN),
            message: format!("the run was begun with another model: expected tensors of SHA-256 {}, found {}", run.model_sha256, inputs.model_sha256),
        });
    }
    let dtype = inputs.decoder.weight_type().as_str();
    if dtype != run.dtype {
        let message = format!("the run was begun with weights in {}, now they are in {dtype}: expected --dtype {0}", run.dtype);
        return Err(Error::RunDirectory { path: directory.join(RUN), message });
    }
    let options = &run.options;
    let config = inputs.checkpoint.config();
    let mut seconds = Seconds::default();
    let mut clock = Instant::now();
    let mut lap = move || std::mem::replace(&mut clock, Instant::now()).elapsed().as_secs_f64();
    let calibration = calibration(directory, inputs, &run, on_step)?;
    seconds.calibration = lap();
    let latency = latency_table(directory, inputs, options, on_step)?;
    let space = SearchSpace::new(config, &options.space, latency.as_ref())?;
    let supernet = supernet(directory, inputs, options, &space, &calibration, on_step)?;
    seconds.levels = lap();

    let mut log = Log::open(&directory.join(LOG))?;
    let known = log.known(config, None)?;
    // a resumed run asks for everything again, so what was asked for before isn't added
    let (mut before, mut certified_before) = (log.work[0], log.work[1]);
    (before.requested, before.naive_block_forwards) = (0, 0);
    (certified_before.requested, certified_before.naive_block_forwards) = (0, 0);
    let earlier_seconds = log.seconds;
    let phase = Cell::new(Phase::Search);
    let mut since = Instant::now();
    let record = |results: &[(Pattern, Vec<f64>)], work: Work| {
        let seconds = since.elapsed().as_secs_f64();
        since = Instant::now();
        log.append(results, None, phase.get(), work, seconds)
    };
    let mut evaluator = Evaluator::new(&supernet, &calibration.samples(), options.objective, options.savings, known, before, Box::new(record))?;
    let dense_loss = evaluator.evaluate(&[Pattern::dense(config)])?[0].loss;
    if !dense_loss.is_finite() {
        return Err(Error::NotFinite(dense_loss));
    }
    let mut found = search::search(&mut evaluator, &space, &options.search, &mut |p| on_step(Step::Search(p)))?;
    let work = evaluator.work();
    let mut certificate = None;
    // (an enumeration says nothing of a model whose weights the search changed too)
    if found.adjustment.is_none() && !options.objective.for_drafts() && search::count_patterns(&space, options.certify_up_to).is_some() {
        phase.set(Phase::Certificate);
        let (c, best) = search::certify(&mut evaluator, &space, &found, &mut |p| on_step(Step::Certificate(p)))?;
        (certificate, found) = (Some(c), best);
    }
    let mut certificate_work = evaluator.work().since(work);
    certificate_work.add(certified_before);
    let (distributions, cached, limit) = evaluator.bytes();
    drop(evaluator);
    seconds.search = earlier_seconds + lap();

    let adjusted = found.adjustment.as_ref().map(|a| search::adjust(supernet.decoder(), a)).transpose()?.map(|decoder| Supernet::raw(&decoder));
    let (held_out, drafting) = pick(&supernet, adjusted.as_ref(), &calibration, options, &space, &mut found)?;
    let pattern = &found.pattern;
    let (clusters, clusters_work) = if options.per_cluster {
        let begun = Instant::now();
        let count = calibration.cluster_sizes.len();
        let unseen = calibration.held_out_samples();
        let mut clusters = Vec::with_capacity(count);
        for cluster in 0..count {
            let samples = calibration.cluster_samples(cluster, options.calibration.sequences);
            if samples.is_empty() {
                continue;
            }
            let known = log.known(config, Some(cluster))?;
            let record = |results: &[(Pattern, Vec<f64>)], work| log.append(results, Some(cluster), Phase::Clusters, work, 0.0);
            let mut evaluator = Evaluator::new(&supernet, &samples, options.objective, options.savings, known, Work::default(), Box::new(record))?;
            let held_out: Vec<Sample> = unseen.iter().filter(|s| s.cluster == cluster).cloned().collect();
            let mut on_round = |progress| on_step(Step::Cluster { cluster, clusters: count, progress });
            clusters.push(per_cluster::search(&mut evaluator, &space, options, cluster, &held_out, pattern, &mut on_round)?);
        }
        storage::write_json(&directory.join(CLUSTERS), &clusters)?;
        seconds.clusters = begun.elapsed().as_secs_f64();
        (clusters, log.work[Phase::Clusters as usize])
    } else {
        (Vec::new(), Work::default())
    };
    let pruned_decoder = adjusted.as_ref().unwrap_or(&supernet).pruned(pattern)?;
    let (dense, pruned) = perplexities(inputs, &calibration, &pruned_decoder, options.eval_window, on_step)?;
    on_step(Step::Writing)?;
    storage::write_json(&directory.join(PATTERN), pattern)?;
    if !found.front.is_empty() {
        let front = directory.join(FRONT);
        std::fs::create_dir_all(&front).map_err(|e| Error::io(&front, e))?;
        for point in &found.front {
            storage::write_json(&front.join(format!("{:.4}.json", point.kept)), &point.pattern)?;
        }
    }
    if let Some(widths) = supernet.levels().map(|levels| levels.over_one_copy(supernet.decoder())).transpose()?.flatten().filter(|widths| !widths.is_empty()) {
        storage::write(&directory.join(WIDTHS), &widths.to_bytes()?)?;
    }
    let source = DecoderSource::new(&pruned_decoder, inputs.checkpoint.source().as_ref())?;
    let written = Contents::of(inputs.checkpoint).around(pruned_decoder.config(), &source).write(options.format, directory)?;
    seconds.finish = lap() - seconds.clusters;
    let pruned_config = pruned_decoder.config();
    let tokens = |sequences: &[crate::calibration::Sequence]| sequences.iter().map(|s| s.tokens.len()).sum();
    let outcome = Outcome {
        widths: (0..2 * config.num_layers()).map(|s| (space.dense().width(s), pattern.width(s))).collect(),
        kept_of_budgets: options.space.budgets.iter().copied().zip(space.costs().totals(pattern)).collect(),
        block_parameters: (config.block_parameters(), pruned_config.block_parameters()),
        parameters: (config.parameters(), pruned_config.parameters()),
        kv_bytes_per_token: (config.kv_bytes_per_token(2), pruned_config.kv_bytes_per_token(2)),
        calibration: CalibrationReport {
            sha256: calibration.sha256(),
            embedder: calibration.embedder.clone(),
            corpora: calibration.corpora.clone(),
            cluster_sizes: calibration.cluster_sizes.clone(),
            picture: calibration.picture.clone(),
            tokens: [tokens(&calibration.sequences), tokens(&calibration.statistics), tokens(&calibration.held_out)],
        },
        levels: supernet.levels().map(|l| l.reports().cloned().collect()).unwrap_or_default(),
        skips: supernet.levels().map_or(SkipCompensation::None, Levels::skips),
        pattern_levels: (0..2 * config.num_layers()).map(|s| supernet.level(pattern, s)).collect(),
        memory: Memory {
            statistics: supernet.levels().map_or(0, |l| l.peak_statistics_bytes),
            distributions,
            prefix_cache: (cached, limit),
            outputs: supernet.cached(),
            peak_resident: peak_resident(),
        },
        found,
        certificate,
        clusters,
        clusters_work,
        dense_loss,
        held_out,
        drafting,
        written,
        dense,
        pruned,
        work,
        certificate_work,
        seconds,
        run,
    };
    storage::write_json(&directory.join("report.json"), &outcome)?;
    storage::write(&directory.join("report.html"), report::html(&outcome).as_bytes())?;
    storage::write_json(&directory.join(PROVENANCE), &report::provenance(&outcome))?;
    let levels = directory.join(LEVELS);
    if levels.exists() {
        std::fs::remove_dir_all(&levels).map_err(|e| Error::io(&levels, e))?;
    }
    Ok(outcome)
}

/// The latency table of the run, where a budget asks for one: read back, or measured and written.
fn latency_table(directory: &Path, inputs: &Inputs<'_>, options: &PruneOptions, on_step: &mut dyn FnMut(Step) -> Result<()>) -> Result<Option<LatencyTable>> {
    if !options.needs_latency() {
        return Ok(None);
    }
    let path = directory.join(LATENCY);
    if path.exists() {
        return storage::read_json(&path).map(Some);
    }
    let widths = SearchSpace::new(inputs.checkpoint.config(), &options.untimed_space(), None)?.widths();
    let device = inputs.decoder.device();
    // times are those of what is served: on the CPU that is 8 bits unless one asks for something else
    let served = if device.is_cpu() { Some(inputs.checkpoint.decoder(device, WeightType::Q8_0)?) } else { None };
    let table = latency::measure(served.as_ref().unwrap_or(inputs.decoder), &widths, options.objective.for_drafts(), &mut |done, all| {
        on_step(Step::Latency { done, all })
    })?;
    storage::write_json(&path, &table)?;
    Ok(Some(table))
}

/// The model with its levels: built, or opened where a run before has built them. A space without partial widths has none.
fn supernet(
    directory: &Path,
    inputs: &Inputs<'_>,
    options: &PruneOptions,
    space: &SearchSpace,
    calibration: &Calibration,
    on_step: &mut dyn FnMut(Step) -> Result<()>,
) -> Result<Supernet> {
    let partial = |(s, widths): (usize, Vec<usize>)| widths.into_iter().filter(|w| *w > 0 && *w < space.dense().width(s)).collect::<Vec<_>>();
    let skippable: Vec<bool> = space.widths().iter().map(|widths| widths.contains(&0)).collect();
    let widths: Vec<Vec<usize>> = space.widths().into_iter().enumerate().map(partial).collect();
    let makes_up = options.levels.skips != Some(SkipCompensation::None) && skippable.contains(&true) && inputs.decoder.config().pre_norm;
    if widths.iter().all(Vec::is_empty) && !makes_up {
        return Ok(Supernet::raw(inputs.decoder));
    }
    let (train, held_out) = (calibration.statistics_tokens(), calibration.held_out_tokens());
    let key = LevelKey {
        model_sha256: inputs.model_sha256.to_string(),
        dtype: inputs.decoder.weight_type().as_str().to_string(),
        tokens_sha256: tokens_sha256(train.iter().chain(&held_out)),
        options: options.levels,
        widths,
        skippable,
    };
    let place = options.level_directory.clone().unwrap_or_else(|| directory.join(LEVELS));
    let levels = Levels::build(inputs.decoder, inputs.checkpoint.source().as_ref(), &train, &held_out, &key, &place, &mut |done, all| {
        on_step(Step::Levels { done, all })
    })?;
    Supernet::new(inputs.decoder, levels)
}

/// Takes the pattern of least loss on held-out sequences (of drafts, the fastest) among the search's best; `adjusted` is the model whose weights a strategy changed.
fn pick(
    supernet: &Supernet,
    adjusted: Option<&Supernet>,
    calibration: &Calibration,
    options: &PruneOptions,
    space: &SearchSpace,
    found: &mut Found,
) -> Result<(HeldOut, Option<Drafting>)> {
    let mut evaluator = Evaluator::new(
        supernet,
        &calibration.held_out_samples(),
        options.objective,
        options.savings,
        HashMap::new(),
        Work::default(),
        Box::new(|_, _| Ok(())),
    )?;
    let patterns: Vec<Pattern> = found.elite.iter().map(|(pattern, _)| pattern.clone()).collect();
    let fitness = match adjusted {
        Some(other) => evaluator.over(other, |e| e.evaluate(&patterns))?,
        None => evaluator.evaluate(&patterns)?,
    };
    let drafts = options.objective.for_drafts();
    let drafting: Vec<Option<Drafting>> = patterns.iter().zip(&fitness).map(|(p, f)| if drafts { space.drafting(p, f.loss) } else { None }).collect();
    let losses: Vec<f64> = fitness.iter().zip(&drafting).map(|(f, drafting)| drafting.map_or(f.loss, |d| d.time)).collect();
    let chosen = (0..losses.len()).reduce(|best, other| if losses[other] < losses[best] { other } else { best }).unwrap_or(0);
    if let Some((pattern, fitness)) = found.elite.get(chosen) {
        (found.pattern, found.fitness) = (pattern.clone(), fitness.clone());
    }
    let held_out = HeldOut { candidates: losses.len(), chosen, loss: losses.get(chosen).copied().unwrap_or(f64::NAN), search_loss: found.fitness.loss };
    Ok((held_out, drafting.get(chosen).copied().flatten()))
}

/// The calibration set of the run: read back, or taken from an earlier run or sampled, and written.
fn calibration(directory: &Path, inputs: &Inputs<'_>, run: &Run, on_step: &mut dyn FnMut(Step) -> Result<()>) -> Result<Calibration> {
    let (options, config) = (&run.options, inputs.checkpoint.config());
    let path = directory.join(CALIBRATION);
    let own = path.exists();
    if let Some(file) = Some(&path).filter(|_| own).or(run.calibration_set.as_ref()) {
        let calibration = Calibration::read(file, config)?;
        if calibration.options != options.calibration {
            let message = format!("was made with {:?}, the run was begun with {:?}: expected the same", calibration.options, options.calibration);
            return Err(Error::RunDirectory { path: file.clone(), message });
        }
        if !own {
            storage::write_json(&path, &calibration)?;
        }
        return Ok(calibration);
    }
    let tokenizer = inputs.checkpoint.tokenizer();
    let embedder: Box<dyn Embedder + '_> = match &options.embedder {
        Some(directory) => Box::new(SentenceTransformer::open(directory, inputs.decoder.device())?),
        None => Box::new(HiddenStates::new(inputs.decoder, tokenizer)),
    };
    let mut stopped = Ok(());
    let calibration = Calibration::sample(inputs.corpora, tokenizer, embedder.as_ref(), &options.calibration, |step| {
        if stopped.is_ok() {
            stopped = on_step(Step::Calibration(step));
        }
    })?;
    stopped?;
    if options.per_cluster {
        if calibration.cluster_sizes.len() < 2 {
            return Err(Error::option("--per-cluster", "there is one cluster only: expected a longer corpus, more --clusters, or --mixing apart".to_string()));
        }
        per_cluster::write_vectors(&directory.join(CLUSTER_VECTORS), &calibration)?;
    }
    storage::write_json(&path, &calibration)?;
    Ok(calibration)
}

/// Dense and pruned perplexity on text that the search never saw.
fn perplexities(
    inputs: &Inputs<'_>,
    calibration: &Calibration,
    pruned: &Decoder,
    window: usize,
    on_step: &mut dyn FnMut(Step) -> Result<()>,
) -> Result<(Perplexity, Perplexity)> {
    /// Enough for a stable figure, little beside the search.
    const MOST_TOKENS: usize = 20_000;
    let mut tokens = match inputs.held_out {
        Some(text) => inputs.checkpoint.encode(text, false)?,
        // (a corpus too short to hold anything out is measured on its own sequences)
        None => calibration.held_out_tokens().concat(),
    };
    tokens.truncate(MOST_TOKENS);
    let mut stopped = Ok(());
    let mut step = |done, all| {
        if stopped.is_ok() {
            stopped = on_step(Step::Perplexity { done, all });
        }
    };
    let dense = eval::perplexity(inputs.decoder, &tokens, window, |done, all| step(done, 2 * all))?;
    let pruned = eval::perplexity(pruned, &tokens, window, |done, all| step(all + done, 2 * all))?;
    stopped?;
    Ok((dense, pruned))
}

/// Seconds as a duration people read.
pub fn human(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{:.1} s", duration.as_secs_f64()),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

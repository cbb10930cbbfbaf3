//! A pruning run: one directory that holds its inputs, its log, and at its end the checkpoint.
//!
//! | file | what | written |
//! | --- | --- | --- |
//! | `run.json` | all inputs: model, options, seeds, hashes, version | first |
//! | `calibration.json` | the sequences | once sampled |
//! | `search.jsonl` | every evaluation and the work done | appended, synced a batch at a time |
//! | `pattern.json`, `report.html`, `report.json`, `config.json`, `model.safetensors`, … | the result | at the end |
//! | `evop.json` | provenance; its presence makes the directory a checkpoint | last |
//!
//! The search is deterministic, so its state **is** the log: `--resume` runs it again over the log's results and goes on where they end.
//! A kill loses at most the batch under way.

use crate::calibration::{Calibration, CalibrationOptions, CalibrationStep};
use crate::embed::{Embedder, HiddenStates, SentenceTransformer};
use crate::eval::{self, Perplexity};
use crate::evaluate::{Evaluator, Fitness, Work};
use crate::search::{self, Certificate, Found, Progress, SearchOptions, SearchSpace, Space};
use crate::{Error, Result, checkpoint, report, storage};
use evop_model::{Checkpoint, Config, Decoder, Gene, Pattern};
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Everything that decides a run's result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PruneOptions {
    /// What a gene stands for.
    pub space: Space,
    /// Fraction of the units that go.
    pub sparsity: f64,
    /// Strategy, its parameters and seed.
    pub search: SearchOptions,
    /// CCDS.
    pub calibration: CalibrationOptions,
    /// A sentence-transformers directory; `None`: the model's own hidden states.
    pub embedder: Option<PathBuf>,
    /// Enumerate the space after the search where it has at most this many patterns.
    pub certify_up_to: u64,
    /// Window of the before/after perplexity, in tokens.
    pub eval_window: usize,
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
    /// The corpus file; `None`: the bundled books.
    pub calibration: Option<PathBuf>,
    /// The text of the before/after perplexity; `None`: bundled books with a bundled corpus, else held-out chunks of the corpus.
    pub eval_text: Option<PathBuf>,
    /// Options.
    pub options: PruneOptions,
    /// Version of EvoP that began the run.
    pub version: String,
}

const RUN: &str = "run.json";
const CALIBRATION: &str = "calibration.json";
const LOG: &str = "search.jsonl";
const PATTERN: &str = "pattern.json";
/// The file that makes a run directory a checkpoint.
pub const PROVENANCE: &str = "evop.json";

/// A line of `search.jsonl`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LogLine {
    Evaluation { genes: Vec<Gene>, fitness: Fitness },
    Work { phase: Phase, work: Work, seconds: f64 },
}

/// Which part of a run did some work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Phase {
    Search,
    Certificate,
}

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Step {
    /// Making the calibration set.
    Calibration(CalibrationStep),
    /// Searching.
    Search(Progress),
    /// Enumerating the space to certify the result.
    Certificate(Progress),
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

/// What a finished run reports.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The inputs.
    pub run: Run,
    /// The pattern chosen.
    pub found: Found,
    /// The search's result against the optimum, where the space was enumerated.
    pub certificate: Option<Certificate>,
    /// Loss of the dense model on the calibration sequences.
    pub dense_loss: f64,
    /// Perplexity of the dense model on text that the search never saw.
    pub dense: Perplexity,
    /// The same of the pruned model.
    pub pruned: Perplexity,
    /// What the search computed (the certificate not counted).
    pub work: Work,
    /// What the certificate computed in addition.
    pub certificate_work: Work,
    /// Seconds of search over all attempts.
    pub search_seconds: f64,
    /// Block parameters before and after.
    pub block_parameters: (usize, usize),
    /// All parameters before and after.
    pub parameters: (usize, usize),
    /// Key/value cache bytes per token (2 bytes a number) before and after.
    pub kv_bytes_per_token: (usize, usize),
    /// Chunks in each cluster of the calibration corpus.
    pub cluster_sizes: Vec<usize>,
    /// Whether each sub-block of the parent is kept.
    pub kept: Vec<bool>,
}

/// What a run needs from outside of its directory.
#[derive(Debug)]
pub struct Inputs<'a> {
    /// The model to prune.
    pub checkpoint: &'a Checkpoint,
    /// [`checkpoint::fingerprint`] of its tensors.
    pub model_sha256: &'a str,
    /// The same, loaded.
    pub decoder: &'a Decoder,
    /// The calibration corpus.
    pub corpus: &'a str,
    /// Held-out text for the before/after perplexity; `None`: the chunks that calibration held out.
    pub held_out: Option<&'a str>,
}

/// Begins a run for a model in `directory`, which must not hold one already.
///
/// # Errors
/// [`Error::RunDirectory`] when there is a run or a checkpoint already; [`Error::Option`] for options that no run could be made of.
pub fn begin(directory: &Path, run: &Run, config: &Config) -> Result<()> {
    SearchSpace::new(config, run.options.space, run.options.sparsity)?;
    for file in [PROVENANCE, RUN, "config.json"] {
        if directory.join(file).exists() {
            let what_to_do = if file == RUN {
                format!("go on with `evop prune --resume {}`, or choose another --out", directory.display())
            } else {
                "choose another --out".into()
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
    let options = &run.options;
    let config = inputs.checkpoint.config();
    let space = SearchSpace::new(config, options.space, options.sparsity)?;
    let calibration = calibration(directory, inputs, options, on_step)?;

    let mut log = Log::open(&directory.join(LOG))?;
    let known = log.known(config)?;
    // a resumed run asks for everything again, so what was asked for before isn't added
    let (mut before, mut certified_before) = (log.work[0], log.work[1]);
    (before.requested, before.naive_block_forwards) = (0, 0);
    (certified_before.requested, certified_before.naive_block_forwards) = (0, 0);
    let earlier_seconds = log.seconds;
    let started = Instant::now();
    let phase = Cell::new(Phase::Search);
    let mut since = started;
    let record = |results: &[(Pattern, Fitness)], work: Work| {
        let seconds = since.elapsed().as_secs_f64();
        since = Instant::now();
        log.append(results, phase.get(), work, seconds)
    };
    let mut evaluator = Evaluator::new(inputs.decoder, &calibration.tokens(), known, before, Box::new(record))?;
    let dense_loss = evaluator.evaluate(&[Pattern::dense(config)])?[0].loss;
    if !dense_loss.is_finite() {
        return Err(Error::NotFinite(dense_loss));
    }
    let found = search::search(&mut evaluator, &space, &options.search, &mut |p| on_step(Step::Search(p)))?;
    let work = evaluator.work();
    let (mut certificate, mut chosen) = (None, found.clone());
    if search::count_patterns(&space) <= u128::from(options.certify_up_to) {
        phase.set(Phase::Certificate);
        let (c, best) = search::certify(&mut evaluator, &space, &found, &mut |p| on_step(Step::Certificate(p)))?;
        (certificate, chosen) = (Some(c), best);
    }
    let mut certificate_work = evaluator.work().since(work);
    certificate_work.add(certified_before);
    drop(evaluator);
    let search_seconds = earlier_seconds + started.elapsed().as_secs_f64();

    let (dense, pruned) = perplexities(inputs, &calibration, &chosen.pattern, options.eval_window, on_step)?;
    on_step(Step::Writing)?;
    storage::write_json(&directory.join(PATTERN), &chosen.pattern)?;
    checkpoint::write(inputs.checkpoint, &chosen.pattern, directory)?;
    let pruned_config = config.with_pattern(&chosen.pattern);
    let outcome = Outcome {
        kept: (0..2 * config.num_layers()).map(|s| chosen.pattern.keeps(s)).collect(),
        found: chosen,
        certificate,
        dense_loss,
        dense,
        pruned,
        work,
        certificate_work,
        search_seconds,
        block_parameters: (config.block_parameters(), pruned_config.block_parameters()),
        parameters: (config.parameters(), pruned_config.parameters()),
        kv_bytes_per_token: (config.kv_bytes_per_token(2), pruned_config.kv_bytes_per_token(2)),
        cluster_sizes: calibration.cluster_sizes.clone(),
        run,
    };
    storage::write_json(&directory.join("report.json"), &outcome)?;
    storage::write(&directory.join("report.html"), report::html(&outcome).as_bytes())?;
    storage::write_json(&directory.join(PROVENANCE), &report::provenance(&outcome))?;
    Ok(outcome)
}

/// The calibration set of the run: read back, or sampled and written.
fn calibration(directory: &Path, inputs: &Inputs<'_>, options: &PruneOptions, on_step: &mut dyn FnMut(Step) -> Result<()>) -> Result<Calibration> {
    let path = directory.join(CALIBRATION);
    if path.exists() {
        return storage::read_json(&path);
    }
    let tokenizer = inputs.checkpoint.tokenizer();
    let embedder: Box<dyn Embedder + '_> = match &options.embedder {
        Some(directory) => Box::new(SentenceTransformer::open(directory, inputs.decoder.device())?),
        None => Box::new(HiddenStates { decoder: inputs.decoder, tokenizer, max_tokens: 128 }),
    };
    let mut stopped = Ok(());
    let calibration = Calibration::sample(inputs.corpus, tokenizer, embedder.as_ref(), &options.calibration, |step| {
        if stopped.is_ok() {
            stopped = on_step(Step::Calibration(step));
        }
    })?;
    stopped?;
    storage::write_json(&path, &calibration)?;
    Ok(calibration)
}

/// Dense and pruned perplexity on text that the search never saw.
fn perplexities(
    inputs: &Inputs<'_>,
    calibration: &Calibration,
    pattern: &Pattern,
    window: usize,
    on_step: &mut dyn FnMut(Step) -> Result<()>,
) -> Result<(Perplexity, Perplexity)> {
    /// Enough for a stable figure, little beside the search.
    const MOST_TOKENS: usize = 20_000;
    let mut tokens = match inputs.held_out {
        Some(text) => inputs.checkpoint.encode(text, false)?,
        // a corpus too short to hold anything out is measured on its own sequences
        None if calibration.held_out.len() < 2 => calibration.tokens().concat(),
        None => calibration.held_out.clone(),
    };
    tokens.truncate(MOST_TOKENS);
    let mut stopped = Ok(());
    let mut step = |done, all| {
        if stopped.is_ok() {
            stopped = on_step(Step::Perplexity { done, all });
        }
    };
    let dense = eval::perplexity(inputs.decoder, &tokens, window, |done, all| step(done, 2 * all))?;
    let pruned = eval::perplexity(&inputs.decoder.masked(pattern)?, &tokens, window, |done, all| step(all + done, 2 * all))?;
    stopped?;
    Ok((dense, pruned))
}

/// The append-only log of evaluations.
struct Log {
    path: PathBuf,
    file: File,
    evaluations: Vec<(Vec<Gene>, Fitness)>,
    /// Of the search, of the certificate.
    work: [Work; 2],
    seconds: f64,
}

impl Log {
    /// Opens the log, dropping a last line that a kill cut short.
    fn open(path: &Path) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(io)?;
        let mut log = Self { path: path.to_path_buf(), file, evaluations: Vec::new(), work: [Work::default(); 2], seconds: 0.0 };
        let mut reader = BufReader::new(File::open(path).map_err(io)?);
        let (mut whole, mut line, mut number) = (0u64, Vec::new(), 0);
        // the evaluations of a batch count once the batch's work line is there
        let mut batch = Vec::new();
        loop {
            line.clear();
            let read = reader.read_until(b'\n', &mut line).map_err(io)? as u64;
            if read == 0 || line.last() != Some(&b'\n') {
                break;
            }
            number += 1;
            let parsed = serde_json::from_slice(&line);
            match parsed.map_err(|e| Error::RunDirectory { path: path.to_path_buf(), message: format!("line {number} is not what a run writes there: {e}") })? {
                LogLine::Evaluation { genes, fitness } => batch.push((genes, fitness)),
                LogLine::Work { phase, work, seconds } => {
                    log.evaluations.append(&mut batch);
                    log.work[phase as usize].add(work);
                    log.seconds += seconds;
                    whole = reader.stream_position().map_err(io)?;
                }
            }
        }
        log.file.set_len(whole).map_err(io)?;
        log.file.seek(SeekFrom::End(0)).map_err(io)?;
        Ok(log)
    }

    fn known(&self, config: &Config) -> Result<HashMap<Pattern, Fitness>> {
        self.evaluations.iter().map(|(genes, fitness)| Ok((Pattern::new(genes.clone(), config)?, fitness.clone()))).collect()
    }

    fn append(&mut self, results: &[(Pattern, Fitness)], phase: Phase, work: Work, seconds: f64) -> Result<()> {
        if results.is_empty() && work.block_forwards == 0 {
            return Ok(()); // a round made of known patterns only
        }
        let mut lines = Vec::new();
        let as_io = |e: serde_json::Error| std::io::Error::from(e);
        let mut append = || -> std::io::Result<()> {
            for (pattern, fitness) in results {
                serde_json::to_writer(&mut lines, &LogLine::Evaluation { genes: pattern.layers().to_vec(), fitness: fitness.clone() }).map_err(as_io)?;
                lines.push(b'\n');
            }
            serde_json::to_writer(&mut lines, &LogLine::Work { phase, work, seconds }).map_err(as_io)?;
            lines.push(b'\n');
            self.file.write_all(&lines)?;
            self.file.sync_data()
        };
        append().map_err(|e| Error::io(&self.path, e))
    }
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

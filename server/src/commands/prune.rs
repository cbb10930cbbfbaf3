//! `evop prune`: corpus -> calibration -> search -> pattern -> checkpoint -> report.

use super::model_args::{ModelArgs, bundled_calibration, bundled_held_out, read_documents, read_text};
use super::progress::Display;
use super::prune_args::PruneArgs;
use crate::config::DTypeChoice;
use anyhow::{Context, Result, bail};
use evop_model::{Config, Pattern};
use evop_pruning::budget::{Budget, Resource};
use evop_pruning::calibration::{Calibration, Corpus};
use evop_pruning::run::{self, Inputs, Outcome, Run};
use evop_pruning::search::Strategy;
use evop_pruning::{checkpoint, picture, report};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Runs the command.
pub fn run(args: &PruneArgs) -> Result<()> {
    let mut display = Display::new(args.progress);
    match prune(args, &mut display) {
        Ok((directory, outcome)) => {
            display.done(&directory);
            // everything is written: a reader that has gone ends the printing, not in a panic
            sigpipe::reset();
            if args.json {
                println!("{}", serde_json::to_string_pretty(&outcome)?);
            } else if !display.is_json() {
                print_table(&outcome);
                let place = directory.display();
                println!("\n{place} is the pruned checkpoint; report.html in it shows what was found.");
                match outcome.drafting {
                    Some(d) => println!(
                        "Let it guess for the whole model: evop serve --pattern draft={place}/pattern.json --speculate draft --speculate-tokens {}",
                        d.tokens
                    ),
                    None => println!("Serve it: evop serve --model {place}"),
                }
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
    let mut model: ModelArgs = args.model.clone();
    let mut calibration = args.tuning.calibration.clone();
    let mut calibration_set = args.calibration_set.clone();
    let mut eval_text = args.eval_text.clone();
    if let Some(begun) = &begun {
        (model.model, model.revision) = (begun.model.clone(), begun.revision.clone());
        if model.dtype == DTypeChoice::Auto {
            model.dtype = DTypeChoice::named(&begun.dtype);
        }
        calibration.clone_from(&begun.calibration);
        calibration_set.clone_from(&begun.calibration_set);
        eval_text.clone_from(&begun.eval_text);
    }
    let (checkpoint, decoder) = model.load()?;
    let model_sha256 = checkpoint::fingerprint(checkpoint.source().as_ref())?;
    // (a set holds its sequences, and what it kept apart)
    let corpora = if calibration_set.is_some() { Vec::new() } else { corpora(&calibration)? };
    let held_out = match &eval_text {
        Some(path) => Some(read_text(path)?),
        None if calibration.is_empty() && calibration_set.is_none() => Some(bundled_held_out()?),
        None => None,
    };
    if begun.is_none() {
        // paths are kept absolute, so that a run can be resumed from anywhere
        let absolute = |p: &PathBuf| std::path::absolute(p).unwrap_or_else(|_| p.clone());
        let named = model.model.map(|m| if Path::new(&m).exists() { absolute(&PathBuf::from(&m)).display().to_string() } else { m });
        let strategy = match &args.pattern {
            Some(_) => Some(Strategy::Pattern),
            None if args.pareto => Some(Strategy::Pareto),
            // (an explicit one is refused by name)
            None => args.strategy.or_else(|| args.tuning.drafts().then_some(Strategy::Pareto)),
        };
        let pattern = args.pattern.as_deref().map(|path| Pattern::read(path, checkpoint.config())).transpose()?;
        let mut budgets = args.budget.given()?;
        if budgets.is_empty() {
            budgets.push(match &pattern {
                Some(pattern) => whole_budget(pattern, checkpoint.config())?,
                // what a draft costs is weighed against what it agrees: no more than that it be one
                None if args.tuning.drafts() => Budget::new(Resource::Latency, 0.95)?,
                None => Budget::removing(0.25)?,
            });
        }
        let mut options = args.tuning.options(strategy, budgets, checkpoint.config().max_position_embeddings);
        options.search.pattern = pattern.map(|p| p.layers().to_vec());
        options.format = args.format;
        options.level_directory = options.level_directory.as_ref().map(absolute);
        if let Some(file) = &calibration_set {
            options.calibration = Calibration::read(file, checkpoint.config())?.options;
        }
        let run = Run {
            model: named,
            revision: model.revision,
            model_sha256: model_sha256.clone(),
            dtype: decoder.weight_type().plain()?.as_str().to_string(),
            calibration: calibration.iter().map(absolute).collect(),
            calibration_set: calibration_set.as_ref().map(absolute),
            eval_text: eval_text.as_ref().map(absolute),
            options,
            command: std::env::args().collect(),
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
    let inputs = Inputs { checkpoint: &checkpoint, model_sha256: &model_sha256, decoder: &decoder, corpora: &corpora, held_out: held_out.as_deref() };
    let outcome = run::prune(&directory, &inputs, &mut |step| {
        if interrupted.load(Ordering::Relaxed) {
            return Err(evop_pruning::Error::Interrupted(directory.clone()));
        }
        display.step(step);
        Ok(())
    })?;
    Ok((directory, outcome))
}

/// What a pattern keeps of the block parameters, as a budget.
fn whole_budget(pattern: &Pattern, config: &Config) -> Result<Budget> {
    let kept = config.with_pattern(pattern).block_parameters() as f64 / config.block_parameters() as f64;
    Budget::new(Resource::Params, kept).context("--pattern: expected one that removes something")
}

/// The calibration corpora: the files, each named after itself, or the bundled books.
pub fn corpora(files: &[PathBuf]) -> Result<Vec<Corpus>> {
    if files.is_empty() {
        return Ok(vec![Corpus { label: "bundled books".into(), documents: vec![bundled_calibration()?] }]);
    }
    let corpus = |(label, path): (String, &PathBuf)| -> Result<Corpus> { Ok(Corpus { label, documents: read_documents(path)? }) };
    labels(files)?.into_iter().zip(files).map(corpus).collect::<Result<_>>().context("calibration corpus")
}

/// What the files are called: by their names, and by as many of the directories before them as tell equal names apart.
fn labels(files: &[PathBuf]) -> Result<Vec<String>> {
    let paths: Vec<PathBuf> = files.iter().map(|path| std::path::absolute(path).unwrap_or_else(|_| path.clone())).collect();
    let end = |path: &Path, parts: usize| -> PathBuf { path.components().skip(path.components().count().saturating_sub(parts)).collect() };
    let label = |(number, path): (usize, &PathBuf)| -> Result<String> {
        let others = || paths.iter().enumerate().filter(move |(other, _)| *other != number).map(|(_, other)| other);
        if others().any(|other| other == path) {
            bail!("--calibration: {} is given twice", files[number].display());
        }
        let parts = (1..path.components().count()).find(|parts| others().all(|other| end(other, *parts) != end(path, *parts)));
        Ok(parts.map_or(path.clone(), |parts| end(path, parts)).display().to_string())
    };
    paths.iter().enumerate().map(label).collect()
}

/// What was found, for people.
pub fn print_table(outcome: &Outcome) {
    let millions = |n: usize| n as f64 / 1e6;
    println!("\n{}", picture::widths(&outcome.widths));
    println!("pattern: {}", report::certificate_text(outcome));
    println!("held-out choice: {}", report::held_out_text(outcome));
    println!("\n{:<34}{:>12}{:>12}{:>9}", "", "dense", "pruned", "ratio");
    let row = |name: &str, dense: f64, pruned: f64, digits: usize| {
        let ratio = if dense > 0.0 { format!("{:.3}", pruned / dense) } else { String::new() };
        println!("{name:<34}{dense:>12.digits$}{pruned:>12.digits$}{ratio:>9}");
    };
    row(&format!("perplexity (windows of {})", outcome.dense.window), outcome.dense.perplexity, outcome.pruned.perplexity, 3);
    let (name, dense_loss, pruned_loss) = report::loss_row(outcome);
    row(&name, dense_loss, pruned_loss, 4);
    row("parameters, millions", millions(outcome.parameters.0), millions(outcome.parameters.1), 3);
    row("block parameters, millions", millions(outcome.block_parameters.0), millions(outcome.block_parameters.1), 3);
    row("KV cache bytes per token (16-bit)", outcome.kv_bytes_per_token.0 as f64, outcome.kv_bytes_per_token.1 as f64, 0);
    println!("\nloss: {}", outcome.run.options.objective);
    println!("search: {}", report::work_text(outcome.work));
    if outcome.certificate.is_some() {
        println!("certificate: {}", report::work_text(outcome.certificate_work));
        let mut both = outcome.work;
        both.add(outcome.certificate_work);
        println!("together: {}", report::work_text(both));
    }
    let time = |seconds: f64| run::human(Duration::from_secs_f64(seconds));
    let s = &outcome.seconds;
    println!("memory: {}", report::memory_text(outcome));
    outcome.written.notes.iter().for_each(|note| println!("note: {note}"));
    println!("time: calibration {}, levels {}, search {}, finish {}", time(s.calibration), time(s.levels), time(s.search), time(s.finish));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn corpora_are_called_after_their_files_and_equal_names_are_told_apart() {
        let of = |files: &[&str]| labels(&files.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(of(&["/data/c4.jsonl.gz"]).unwrap(), ["c4.jsonl.gz"]);
        assert_eq!(of(&["/a/x/text.txt", "/b/x/text.txt", "/b/y/text.txt", "/b/c4.txt"]).unwrap(), ["a/x/text.txt", "b/x/text.txt", "y/text.txt", "c4.txt"]);
        assert_eq!(of(&["/text.txt", "/a/text.txt"]).unwrap(), ["/text.txt", "a/text.txt"]);
        assert!(of(&["text.txt", "./text.txt"]).unwrap_err().to_string().contains("given twice"));
    }
}

//! How a pruning run shows where it is: bars for people, JSON lines for the admin API.

use clap::ValueEnum;
use evop_pruning::calibration::CalibrationStep;
use evop_pruning::run::Step;
use evop_pruning::search::Progress;
use indicatif::style::TemplateError;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle as BarStyle};
use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

/// `--progress`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProgressStyle {
    /// A bar where standard error is a terminal, else nothing.
    Auto,
    /// A bar.
    Bar,
    /// One JSON object a line on standard output.
    Json,
    /// Nothing.
    None,
}

const TEMPLATE: &str = "{prefix:<12} [{elapsed_precise}] {wide_bar} {pos}/{len} {msg}";

/// A bar on standard error, where that is a terminal.
///
/// # Errors
/// The template: a mistake in this file.
pub fn bar() -> Result<ProgressBar, TemplateError> {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    bar.set_style(BarStyle::with_template(TEMPLATE)?);
    Ok(bar)
}

/// Shows the steps of a run.
#[derive(Debug)]
pub struct Display {
    json: bool,
    bar: ProgressBar,
    phase: &'static str,
    /// When the phase began, and how many rounds it had then (a resumed run begins late).
    since: Instant,
    rounds_at_start: u64,
    last_json: Option<Instant>,
}

impl Display {
    /// A display in the style asked for.
    pub fn new(style: ProgressStyle) -> Self {
        let target = match style {
            ProgressStyle::Auto | ProgressStyle::Bar => ProgressDrawTarget::stderr(),
            ProgressStyle::Json | ProgressStyle::None => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(None, target);
        if let Ok(style) = BarStyle::with_template(TEMPLATE) {
            bar.set_style(style);
        }
        Self { json: style == ProgressStyle::Json, bar, phase: "", since: Instant::now(), rounds_at_start: 0, last_json: None }
    }

    /// Whether standard output carries JSON lines.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Shows a step.
    pub fn step(&mut self, step: Step) {
        match step {
            Step::Calibration(CalibrationStep::Embedding { done, all }) => self.show("calibrate", done, all, None),
            Step::Calibration(CalibrationStep::Clustering) => self.show("cluster", 0, 1, None),
            Step::Latency { done, all } => self.show("latency", done, all, None),
            Step::Levels { done, all } => self.show("levels", done, all, None),
            Step::Search(progress) => self.show("search", progress.round, progress.rounds, Some(progress)),
            Step::Certificate(progress) => self.show("certify", progress.round, progress.rounds, Some(progress)),
            Step::Cluster { cluster, clusters, progress } => {
                let rounds = progress.rounds.max(1);
                self.show("per cluster", cluster * rounds + progress.round, clusters * rounds, Some(progress));
            }
            Step::Perplexity { done, all } => self.show("perplexity", done, all, None),
            Step::Writing => self.show("write", 1, 1, None),
        }
    }

    fn show(&mut self, phase: &'static str, done: usize, all: usize, search: Option<Progress>) {
        if phase != self.phase {
            (self.phase, self.since, self.rounds_at_start, self.last_json) = (phase, Instant::now(), done as u64, None);
        }
        let made = (done as u64).saturating_sub(self.rounds_at_start);
        let left = all.saturating_sub(done) as f64;
        let eta = (made > 0).then(|| self.since.elapsed().as_secs_f64() / made as f64 * left);
        if self.json {
            // a line a generation in the search, at most one a second elsewhere
            if search.is_some() || done == all || self.last_json.is_none_or(|t| t.elapsed() > Duration::from_secs(1)) {
                self.last_json = Some(Instant::now());
                print_line(&json!({
                    "event": "progress", "phase": phase, "generation": done, "generations": all, "eta_seconds": eta,
                    "best_loss": search.map(|p| p.best_loss), "evaluations": search.map(|p| p.requested), "evaluated": search.map(|p| p.evaluated),
                }));
            }
            return;
        }
        self.bar.set_prefix(phase);
        self.bar.set_length(all as u64);
        self.bar.set_position(done as u64);
        let eta = eta.map_or(String::new(), |s| format!("ETA {}", evop_pruning::run::human(Duration::from_secs_f64(s))));
        self.bar.set_message(match search {
            Some(p) if p.best_loss.is_infinite() => format!("{} evaluated  {eta}", p.evaluated),
            Some(p) => format!("best loss {:.4}, {} evaluated of {} asked for  {eta}", p.best_loss, p.evaluated, p.requested),
            None => eta,
        });
    }

    /// The run has ended well.
    pub fn done(&self, directory: &Path) {
        self.bar.finish_and_clear();
        if self.json {
            print_line(&json!({ "event": "done", "out": directory }));
        }
    }

    /// The run has failed.
    pub fn failed(&self, message: &str) {
        self.bar.finish_and_clear();
        if self.json {
            print_line(&json!({ "event": "error", "message": message }));
        }
    }
}

fn print_line(value: &Value) {
    // a reader that went away must not end the run
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{value}").and_then(|()| out.flush());
}

//! `evop eval`: perplexity of a text, scores of multiple-choice tasks.

use super::model_args::{ModelArgs, bundled_continuations, bundled_held_out, is_json_lines, read_file, read_text};
use anyhow::{Result, bail};
use clap::Args;
use evop_model::{Checkpoint, Decoder};
use evop_pruning::eval::{Estimate, Perplexity, Task, TaskResult, join_rows, multiple_choice, perplexity, write_items};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// Options of `evop eval`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  evop eval                                     the bundled model's perplexity on the bundled held-out books\n  \
    evop eval --tasks books                       the bundled model on the bundled multiple-choice set\n  \
    evop eval --model pruned --text wiki.test.raw --join-rows --window 2048\n  \
    evop eval --model pruned --tasks arc_easy.jsonl.gz,hellaswag.jsonl.gz --limit 500 --items items.jsonl")]
pub struct EvalArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text for perplexity: plain, or JSON lines with a `text` field, either gzipped. [default, without --tasks: five bundled books]
    #[arg(long, value_name = "FILE", help_heading = "Perplexity")]
    pub text: Option<PathBuf>,
    /// Tokens of a window: the text is cut into windows without overlap. [default: 2048, or the model's context if shorter]
    #[arg(long, value_name = "TOKENS", help_heading = "Perplexity")]
    pub window: Option<usize>,
    /// Look at the first characters only.
    #[arg(long, value_name = "N", help_heading = "Perplexity")]
    pub max_characters: Option<usize>,
    /// Join the text's lines by blank lines and add special tokens, as papers do with WikiText-2 raw.
    #[arg(long, requires = "text", help_heading = "Perplexity")]
    pub join_rows: bool,
    /// JSON lines, gzipped or not, of {"query", "choices", "gold"}, {"contexts", "continuation", "gold"} or {"context", "target"};
    /// `books`: the bundled set.
    #[arg(long, value_name = "FILE", value_delimiter = ',', help_heading = "Tasks")]
    pub tasks: Vec<PathBuf>,
    /// The first items of each task only.
    #[arg(long, value_name = "N", requires = "tasks", help_heading = "Tasks")]
    pub limit: Option<usize>,
    /// Write a JSON line an item: log-probabilities, predictions, whether they are right.
    #[arg(long, value_name = "FILE", requires = "tasks", help_heading = "Tasks")]
    pub items: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// All that was measured; with `--json`, what is printed.
#[derive(Debug, Serialize)]
struct Summary {
    #[serde(flatten)]
    perplexity: Option<Perplexity>,
    tasks: Vec<TaskResult>,
    model: ModelSummary,
}

/// What the numbers were had with.
#[derive(Debug, Serialize)]
struct ModelSummary {
    parameters: usize,
    /// Of the parent, where the checkpoint was pruned by EvoP.
    dense_parameters: Option<u64>,
    kv_bytes_per_token_16bit: usize,
    max_position_embeddings: usize,
}

/// Runs the command.
pub fn run(args: &EvalArgs) -> Result<()> {
    let perplexity_asked = args.text.is_some() || args.tasks.is_empty();
    if !perplexity_asked && (args.window.is_some() || args.max_characters.is_some()) {
        bail!("--window and --max-characters are for perplexity: name its text with --text, or leave them out");
    }
    // what can be wrong with the files is said before anything is computed
    let text = perplexity_asked.then(|| text(args)).transpose()?;
    let tasks = args.tasks.iter().map(|file| task(file, args.limit)).collect::<Result<Vec<_>>>()?;
    if let Some(directory) = args.items.as_deref().and_then(Path::parent).filter(|d| !d.as_os_str().is_empty() && !d.is_dir()) {
        bail!("--items: {}: expected a directory that exists", directory.display());
    }
    let (checkpoint, decoder) = args.model.load()?;
    let provenance = checkpoint.provenance();
    let bar = ProgressBar::new(0);
    bar.set_style(ProgressStyle::with_template("{prefix:<16} [{elapsed_precise}] {wide_bar} {pos}/{len} ETA {eta}")?);
    let summary = Summary {
        perplexity: text.map(|text| text_perplexity(args, &text, &checkpoint, &decoder, &bar)).transpose()?,
        tasks: tasks.iter().map(|task| Ok(multiple_choice(&decoder, checkpoint.tokenizer(), task, show(&bar, task.name()))?)).collect::<Result<_>>()?,
        model: ModelSummary {
            parameters: decoder.config().parameters(),
            dense_parameters: provenance.and_then(|p| p["parameters"]["dense"].as_u64()),
            kv_bytes_per_token_16bit: decoder.config().kv_bytes_per_token(2),
            max_position_embeddings: decoder.config().max_position_embeddings,
        },
    };
    bar.finish_and_clear();
    if let Some(path) = &args.items {
        write_items(path, &summary.tasks)?;
    }
    let measured = args.text.iter().chain(&args.tasks);
    for file in measured.filter(|file| provenance.is_some_and(|p| calibrated_on(p, file))) {
        eprintln!("warning: {}: the checkpoint was calibrated on a text of this name: what it was calibrated on says little of other texts", file.display());
    }
    if summary.perplexity.is_some() && provenance.is_some_and(|p| p.get("vocabulary").is_some_and(|v| !v.is_null())) {
        eprintln!("warning: the checkpoint's vocabulary was cut: its perplexity is over fewer and other tokens than its parent's, and not comparable");
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&summary)?);
    } else {
        print!("{}", table(&summary));
    }
    Ok(())
}

/// The text whose perplexity is asked for.
fn text(args: &EvalArgs) -> Result<String> {
    let mut text = args.text.as_deref().map_or_else(bundled_held_out, read_text)?;
    if let Some(limit) = args.max_characters {
        text = text.chars().take(limit).collect();
    }
    if args.join_rows {
        if let Some(path) = args.text.as_deref().filter(|path| is_json_lines(path)) {
            bail!("--join-rows: {}: expected plain text, found JSON lines, which are joined by blank lines anyway: leave the option out", path.display());
        }
        text = join_rows(&text);
    }
    Ok(text)
}

/// A task of a file, or the bundled one.
pub fn task(file: &Path, limit: Option<usize>) -> Result<Task> {
    let task = if file == Path::new("books") { Task::parse(&bundled_continuations()?, file)? } else { Task::parse(&read_file(file)?, file)? };
    Ok(match limit {
        Some(limit) => task.limited(limit)?,
        None => task,
    })
}

fn text_perplexity(args: &EvalArgs, text: &str, checkpoint: &Checkpoint, decoder: &Decoder, bar: &ProgressBar) -> Result<Perplexity> {
    let tokens = checkpoint.encode(text, args.join_rows)?;
    let window = args.window.unwrap_or_else(|| decoder.config().max_position_embeddings.min(2048));
    Ok(perplexity(decoder, &tokens, window, show(bar, "perplexity"))?)
}

/// Begins a phase of the bar.
fn show<'a>(bar: &'a ProgressBar, phase: &str) -> impl FnMut(usize, usize) + 'a {
    bar.set_prefix(phase.to_string());
    bar.reset();
    |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    }
}

/// Whether the checkpoint's provenance has a calibration corpus of this name.
fn calibrated_on(provenance: &Value, file: &Path) -> bool {
    let corpora = provenance["calibration"]["corpora"].as_array().into_iter().flatten().filter_map(Value::as_str);
    evop_pruning::report::calibrated_on(corpora, file)
}

/// What a person reads.
fn table(summary: &Summary) -> String {
    let mut lines = Vec::new();
    if let Some(p) = &summary.perplexity {
        lines.push(format!("perplexity {:.4} (mean {:.6} nats over {} predicted tokens)", p.perplexity, p.mean_nll, p.predicted_tokens));
        lines.push(format!("{} windows of {} tokens without overlap", p.windows, p.window));
    }
    if !summary.tasks.is_empty() {
        if !lines.is_empty() {
            lines.push(String::new());
        }
        let width = summary.tasks.iter().map(|t| t.task.chars().count()).max().unwrap_or(0).max(4);
        lines.push(format!("{:<width$} {:>6}  {:<15}  {:<15}  {:>10}  {:>6}", "task", "n", "acc", "acc_norm", "perplexity", "chance"));
        let estimate = |e: Option<Estimate>| match e {
            Some(Estimate { value, stderr: Some(stderr) }) => format!("{value:.4} ± {stderr:.4}"),
            Some(Estimate { value, stderr: None }) => format!("{value:.4}"),
            None => "-".into(),
        };
        let number = |value: Option<f64>| value.map_or("-".to_string(), |v| format!("{v:.4}"));
        for t in &summary.tasks {
            let (acc, acc_norm) = (estimate(Some(t.acc)), estimate(t.acc_norm));
            lines.push(format!("{:<width$} {:>6}  {acc:<15}  {acc_norm:<15}  {:>10}  {:>6}", t.task, t.n, number(t.perplexity), number(t.chance)));
        }
        lines.push(String::new());
        lines.push(format!("scored in a context of {} tokens", summary.model.max_position_embeddings));
        for t in summary.tasks.iter().filter(|t| t.truncated > 0) {
            lines.push(format!("{}: {} of {} items are longer and were cut on the left", t.task, t.truncated, t.n));
        }
    }
    let model = &summary.model;
    let millions = model.parameters as f64 / 1e6;
    let parameters = match model.dense_parameters {
        Some(dense) => format!("{millions:.3} M of {:.3} M parameters ({:.1}%)", dense as f64 / 1e6, 100.0 * model.parameters as f64 / dense as f64),
        None => format!("{millions:.3} M parameters"),
    };
    lines.push(format!("{parameters}; KV cache {} bytes per token (16-bit)\n", model.kv_bytes_per_token_16bit));
    lines.join("\n")
}

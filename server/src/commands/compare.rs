//! `evop compare`: several strategies on one model, one calibration set and one budget; one table and one page of plots.

use super::eval::task;
use super::model_args::{ModelArgs, bundled_held_out, read_text};
use super::progress::{Display, ProgressStyle};
use super::prune::corpora;
use super::prune_args::TuningArgs;
use anyhow::{Context, Result, bail};
use clap::Args;
use evop_model::{Checkpoint, Decoder, Tokenizer};
use evop_pruning::budget::Budget;
use evop_pruning::calibration::Corpus;
use evop_pruning::checkpoint;
use evop_pruning::eval::{Perplexity, Task, multiple_choice, perplexity};
use evop_pruning::report::compare::{Row, html};
use evop_pruning::run::{self, Inputs, Run};
use evop_pruning::search::Strategy;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Options of `evop compare`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  \
    evop compare --strategies joint,random-joint,sleb --sparsity 0.25,0.5 --out comparison\n  \
    evop compare --model ./SmolLM2 --strategies joint,evop --calibration c4.jsonl.gz --eval-text wiki=wiki.test.raw --tasks arc_easy.jsonl.gz --out c\n\n\
    A comparison goes on where it was stopped: finished runs and measurements in --out are taken as they are.")]
pub struct CompareArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Strategies, separated by commas.
    #[arg(long, value_name = "STRATEGY", value_delimiter = ',', required = true)]
    pub strategies: Vec<Strategy>,
    /// Fractions of the block parameters that go, separated by commas.
    #[arg(long, value_name = "FRACTION", value_delimiter = ',', default_values_t = [0.25])]
    pub sparsity: Vec<f64>,
    /// Seeds, separated by commas: every strategy runs with each of them. [default: --seed]
    #[arg(long, value_name = "SEED", value_delimiter = ',')]
    pub seeds: Vec<u64>,
    /// Text for perplexity, as FILE or LABEL=FILE; may be given again. [default: bundled books]
    #[arg(long, value_name = "FILE", help_heading = "Report")]
    pub eval_text: Vec<String>,
    /// Tokens of each text that are looked at; 0: all.
    #[arg(long, value_name = "TOKENS", default_value_t = 0, help_heading = "Report")]
    pub eval_tokens: usize,
    /// Multiple-choice tasks to measure the results on, as `evop eval --tasks`.
    #[arg(long, value_name = "FILE", value_delimiter = ',', help_heading = "Report")]
    pub tasks: Vec<PathBuf>,
    /// The first items of each task only.
    #[arg(long, value_name = "N", requires = "tasks", help_heading = "Report")]
    pub limit: Option<usize>,
    /// Directory of the comparison: runs, level databases, compare.json and compare.html.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// How progress is shown: bars on a terminal, JSON lines on standard output, or not at all.
    #[arg(long, value_enum, default_value_t = ProgressStyle::Auto, help_heading = "Report")]
    pub progress: ProgressStyle,
    /// Print the rows as JSON instead of a table.
    #[arg(long, help_heading = "Report")]
    pub json: bool,
    #[command(flatten)]
    pub tuning: TuningArgs,
}

/// What all rows share.
struct Setting<'a> {
    args: &'a CompareArgs,
    checkpoint: Checkpoint,
    decoder: Decoder,
    sha256: String,
    corpora: Vec<Corpus>,
    /// (label, tokens).
    texts: Vec<(String, Vec<u32>)>,
    tasks: Vec<Task>,
}

/// Runs the command.
pub fn run(args: &CompareArgs) -> Result<()> {
    let budgets = args.sparsity.iter().map(|s| Ok((*s, Budget::removing(*s)?))).collect::<Result<Vec<_>>>()?;
    let tasks = args.tasks.iter().map(|file| task(file, args.limit)).collect::<Result<Vec<_>>>()?;
    let corpora = corpora(&args.tuning.calibration)?;
    let (checkpoint, decoder) = args.model.load()?;
    let sha256 = checkpoint::fingerprint(checkpoint.source().as_ref())?;
    let texts = texts(args, &checkpoint)?;
    let setting = Setting { args, checkpoint, decoder, sha256, corpora, texts, tasks };
    std::fs::create_dir_all(&args.out).with_context(|| args.out.display().to_string())?;

    let mut rows = vec![dense(&setting)?];
    let seeds = if args.seeds.is_empty() { vec![args.tuning.seed] } else { args.seeds.iter().copied().map(Some).collect() };
    for (sparsity, budget) in &budgets {
        for strategy in &args.strategies {
            for seed in &seeds {
                let made = row(&setting, *strategy, *sparsity, *budget, *seed, &rows)?;
                rows.push(made);
                write_reports(&setting, &rows)?;
            }
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print_table(&rows);
        println!("\n{} shows it with plots.", args.out.join("compare.html").display());
    }
    Ok(())
}

fn texts(args: &CompareArgs, checkpoint: &Checkpoint) -> Result<Vec<(String, Vec<u32>)>> {
    let mut named = Vec::new();
    for text in &args.eval_text {
        let (label, file) = match text.split_once('=') {
            Some((label, file)) if !Path::new(text).exists() => (label.to_string(), PathBuf::from(file)),
            _ => (Path::new(text).file_name().map_or_else(|| text.clone(), |n| n.to_string_lossy().into_owned()), PathBuf::from(text)),
        };
        named.push((label, read_text(&file)?));
    }
    if named.is_empty() {
        named.push(("bundled books".into(), bundled_held_out()?));
    }
    let encode = |(label, text): (String, String)| {
        let mut tokens = checkpoint.encode(&text, false)?;
        if args.eval_tokens > 0 {
            tokens.truncate(args.eval_tokens);
        }
        Ok((label, tokens))
    };
    named.into_iter().map(encode).collect()
}

/// Perplexities and task scores of a model.
fn measure(setting: &Setting<'_>, decoder: &Decoder, tokenizer: &Tokenizer) -> Result<(BTreeMap<String, Perplexity>, Vec<serde_json::Value>)> {
    let window = setting.args.tuning.eval_window.min(decoder.config().max_position_embeddings);
    let of_text = |(label, tokens): &(String, Vec<u32>)| Ok((label.clone(), perplexity(decoder, tokens, window, |_, _| {})?));
    let perplexities = setting.texts.iter().map(of_text).collect::<Result<_>>()?;
    let tasks = setting.tasks.iter().map(|task| Ok(Row::task(&multiple_choice(decoder, tokenizer, task, |_, _| {})?))).collect::<Result<_>>()?;
    Ok((perplexities, tasks))
}

/// A row that was measured before, or is now; `make` isn't called for one that is there.
fn kept(setting: &Setting<'_>, name: &str, make: impl FnOnce() -> Result<Row>) -> Result<Row> {
    let path = setting.args.out.join("rows").join(format!("{name}.json"));
    if let Ok(text) = std::fs::read_to_string(&path) {
        return serde_json::from_str(&text)
            .with_context(|| format!("{}: not what a comparison writes there: delete it to have it measured again", path.display()));
    }
    let row = make()?;
    write(&path, serde_json::to_string_pretty(&row)?.as_bytes())?;
    Ok(row)
}

fn dense(setting: &Setting<'_>) -> Result<Row> {
    kept(setting, "dense", || {
        let (perplexity, tasks) = measure(setting, &setting.decoder, setting.checkpoint.tokenizer())?;
        let config = setting.decoder.config();
        let widths = config.layers.iter().flat_map(|l| [l.shape.kv_groups, l.shape.ffn]).map(|w| (w, w)).collect();
        Ok(Row {
            strategy: "dense".into(),
            space: String::new(),
            sparsity: 0.0,
            seed: 0,
            params_kept: 1.0,
            kv_kept: 1.0,
            perplexity,
            tasks,
            block_forwards: 0,
            evaluations: 0,
            seconds: (0.0, 0.0),
            widths,
        })
    })
}

/// `before`: the rows there are, of which `random-joint` takes as many patterns as `joint` evaluated, unless --evaluations says how many.
fn row(setting: &Setting<'_>, strategy: Strategy, sparsity: f64, budget: Budget, seed: Option<u64>, before: &[Row]) -> Result<Row> {
    let args = setting.args;
    let tuning = TuningArgs { seed, ..args.tuning.clone() };
    let mut options = tuning.options(Some(strategy), vec![budget], setting.checkpoint.config().max_position_embeddings);
    options.level_directory = Some(options.level_directory.unwrap_or_else(|| args.out.join("levels")));
    // the optimum of a small space would take every strategy's place
    options.certify_up_to = 0;
    let seed = options.search.seed;
    let joint = before.iter().find(|r| r.strategy == Strategy::Joint.to_string() && r.sparsity == sparsity && r.seed == seed);
    if let (Strategy::RandomJoint, None, Some(joint)) = (strategy, args.tuning.evaluations, joint) {
        options.search.evaluations = joint.evaluations;
    }
    let name = format!("{strategy}-{sparsity}-{seed}");
    kept(setting, &name, || {
        let directory = args.out.join("runs").join(&name);
        if !run::is_finished(&directory) {
            prune(setting, &directory, options)?;
        }
        let report = std::fs::read(directory.join("report.json")).with_context(|| directory.display().to_string())?;
        let report: serde_json::Value = serde_json::from_slice(&report)?;
        let pruned = Checkpoint::open(&directory)?;
        let decoder = pruned.decoder(setting.decoder.device(), setting.decoder.weight_type())?;
        let (perplexity, tasks) = measure(setting, &decoder, pruned.tokenizer())?;
        let pair = |name: &str| -> Result<f64> {
            let (before, after): (f64, f64) = serde_json::from_value(report[name].clone())?;
            Ok(if before > 0.0 { after / before } else { 1.0 })
        };
        let count = |name: &str| report["work"][name].as_u64().unwrap_or(0) as usize;
        let seconds = |phase: &str| report["seconds"][phase].as_f64().unwrap_or(0.0);
        Ok(Row {
            strategy: strategy.to_string(),
            space: report["run"]["options"]["space"]["space"].as_str().unwrap_or_default().to_string(),
            sparsity,
            seed,
            params_kept: pair("block_parameters")?,
            kv_kept: pair("kv_bytes_per_token")?,
            perplexity,
            tasks,
            block_forwards: count("block_forwards"),
            evaluations: count("evaluated"),
            seconds: (seconds("levels"), seconds("search")),
            widths: serde_json::from_value(report["widths"].clone())?,
        })
    })
}

/// One run, begun or gone on with. Runs of one seed share their calibration set.
fn prune(setting: &Setting<'_>, directory: &Path, options: run::PruneOptions) -> Result<()> {
    let args = setting.args;
    let shared = args.out.join(format!("calibration-{}.json", options.calibration.seed));
    if !directory.join("run.json").exists() {
        let run = Run {
            model: args.model.model.clone(),
            revision: args.model.revision.clone(),
            model_sha256: setting.sha256.clone(),
            dtype: setting.decoder.weight_type().plain()?.as_str().to_string(),
            calibration: args.tuning.calibration.clone(),
            eval_text: None,
            options,
            command: std::env::args().collect(),
            version: env!("CARGO_PKG_VERSION").to_string(),
        };
        run::begin(directory, &run, setting.checkpoint.config())?;
        if shared.exists() {
            std::fs::copy(&shared, directory.join("calibration.json")).with_context(|| shared.display().to_string())?;
        }
    }
    let mut display = Display::new(args.progress);
    let inputs =
        Inputs { checkpoint: &setting.checkpoint, model_sha256: &setting.sha256, decoder: &setting.decoder, corpora: &setting.corpora, held_out: None };
    let result = run::prune(directory, &inputs, &mut |step| {
        display.step(step);
        Ok(())
    });
    match result {
        Ok(_) => display.done(directory),
        Err(error) => {
            display.failed(&error.to_string());
            bail!("{}: {error}", directory.display());
        }
    }
    if !shared.exists() {
        write(&shared, &std::fs::read(directory.join("calibration.json"))?)?;
    }
    Ok(())
}

fn write_reports(setting: &Setting<'_>, rows: &[Row]) -> Result<()> {
    let out = &setting.args.out;
    let command: Vec<String> = std::env::args().collect();
    let model = setting.args.model.model.as_deref().unwrap_or("the bundled model");
    write(&out.join("compare.json"), serde_json::to_string_pretty(rows)?.as_bytes())?;
    write(&out.join("compare.html"), html(model, rows, &command).as_bytes())
}

/// Writes a file so that it is whole or not there.
fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = || path.display().to_string();
    let directory = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory).with_context(file)?;
    let part = path.with_extension("part");
    let mut out = std::fs::File::create(&part).with_context(file)?;
    out.write_all(bytes).and_then(|()| out.sync_all()).and_then(|()| std::fs::rename(&part, path)).with_context(file)
}

fn print_table(rows: &[Row]) {
    let Some(first) = rows.first() else { return };
    let labels: Vec<&String> = first.perplexity.keys().collect();
    print!("{:<20}{:>10}{:>8}{:>8}", "strategy", "sparsity", "kept", "KV");
    labels.iter().for_each(|l| print!("{:>16}", format!("ppl {}", l.chars().take(11).collect::<String>())));
    first.scores().for_each(|(name, _, _)| print!("{:>24}", name));
    println!("{:>16}{:>12}{:>10}", "block-forwards", "evaluated", "seconds");
    for row in rows {
        print!("{:<20}{:>10}{:>8.4}{:>8.3}", row.strategy, row.sparsity, row.params_kept, row.kv_kept);
        labels.iter().for_each(|l| print!("{:>16.3}", row.perplexity.get(*l).map_or(f64::NAN, |p| p.perplexity)));
        row.scores().for_each(|(_, value, stderr)| print!("{:>24}", format!("{value:.4} ± {stderr:.4}")));
        println!("{:>16}{:>12}{:>10.0}", row.block_forwards, row.evaluations, row.seconds.0 + row.seconds.1);
    }
}

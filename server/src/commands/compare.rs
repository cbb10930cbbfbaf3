//! `evop compare`: several strategies on one model, one calibration set and one budget; one table and one page of plots.

mod options;

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
use evop_pruning::eval::{Task, multiple_choice, perplexity};
use evop_pruning::report::calibrated_on;
use evop_pruning::report::compare::{Calibrated, Row, html, notes};
use evop_pruning::run::{self, Inputs, Run};
use evop_pruning::search::Strategy;
use evop_pruning::{checkpoint, storage};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Options of `evop compare`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  \
    evop compare --strategies joint,random-joint,sleb --sparsity 0.25,0.5 --out comparison\n  \
    evop compare --model ./SmolLM2 --strategies joint,evop --calibration c4.jsonl.gz --eval-text wiki=wiki.test.raw --tasks arc_easy.jsonl.gz --out c\n\n\
    A comparison goes on where it was stopped: finished runs and measurements in --out are taken as they are. Strategies, sparsities, seeds, texts and\n\
    tasks may be added; with any other option changed it is another comparison, which needs another --out.")]
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
    texts: Vec<Text>,
    tasks: Vec<Task>,
    /// The texts and tasks whose file is called as a calibration corpus is.
    calibrated_on: Vec<String>,
}

/// A text for perplexity.
struct Text {
    label: String,
    /// `None`: the bundled one.
    file: Option<PathBuf>,
    tokens: Vec<u32>,
}

/// Runs the command.
pub fn run(args: &CompareArgs) -> Result<()> {
    let budgets = args.sparsity.iter().map(|s| Ok((*s, Budget::removing(*s)?))).collect::<Result<Vec<_>>>()?;
    let tasks = args.tasks.iter().map(|file| task(file, args.limit)).collect::<Result<Vec<_>>>()?;
    let corpora = corpora(&args.tuning.calibration)?;
    let (checkpoint, decoder) = args.model.load()?;
    let context = checkpoint.config().max_position_embeddings;
    args.tuning.options(None, Vec::new(), context).calibration.check(context)?;
    let sha256 = checkpoint::fingerprint(checkpoint.source().as_ref())?;
    let texts = texts(args, &checkpoint)?;
    refuse_equal("--eval-text", texts.iter().map(|text| text.label.as_str()))?;
    refuse_equal("--tasks", tasks.iter().map(Task::name))?;
    let calibrated_on = measured_on_calibration(args, &corpora, &texts, &tasks);
    for name in &calibrated_on {
        eprintln!("warning: {name}: the models are calibrated on a text of this name: what they were calibrated on says little of other texts");
    }
    let setting = Setting { args, checkpoint, decoder, sha256, corpora, texts, tasks, calibrated_on };
    let rows = args.out.join("rows");
    std::fs::create_dir_all(&rows).with_context(|| rows.display().to_string())?;
    options::check(&setting)?;

    let mut rows = vec![dense(&setting)?];
    let seeds = if args.seeds.is_empty() { vec![args.tuning.seed] } else { args.seeds.iter().copied().map(Some).collect() };
    for (sparsity, budget) in &budgets {
        for strategy in in_order(&args.strategies) {
            for seed in &seeds {
                let made = row(&setting, strategy, *sparsity, *budget, *seed, &rows)?;
                rows.push(made);
                write_reports(&setting, &rows)?;
            }
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        print_table(&rows);
        println!();
        notes(&rows).iter().for_each(|note| println!("{note}"));
        println!("{} shows it with plots.", args.out.join("compare.html").display());
    }
    Ok(())
}

/// The strategies as they run: `joint` before `random-joint`, which takes as many patterns as it evaluated.
fn in_order(strategies: &[Strategy]) -> Vec<Strategy> {
    let mut ordered = strategies.to_vec();
    let place = |of: Strategy| strategies.iter().position(|strategy| *strategy == of);
    if let (Some(joint), Some(random)) = (place(Strategy::Joint), place(Strategy::RandomJoint))
        && random < joint
    {
        let first = ordered.remove(joint);
        ordered.insert(random, first);
    }
    ordered
}

/// What has one name has one figure.
fn refuse_equal<'a>(option: &str, names: impl Iterator<Item = &'a str>) -> Result<()> {
    let mut names: Vec<&str> = names.collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => bail!("{option}: two are called {:?}: expected different names (a text is given one as LABEL=FILE)", pair[0]),
        None => Ok(()),
    }
}

fn texts(args: &CompareArgs, checkpoint: &Checkpoint) -> Result<Vec<Text>> {
    let mut texts = Vec::new();
    for text in &args.eval_text {
        let (label, file) = match text.split_once('=') {
            Some((label, file)) if !Path::new(text).exists() => (label.to_string(), PathBuf::from(file)),
            _ => (Path::new(text).file_name().map_or_else(|| text.clone(), |n| n.to_string_lossy().into_owned()), PathBuf::from(text)),
        };
        texts.push((label, read_text(&file)?, Some(file)));
    }
    if texts.is_empty() {
        texts.push(("bundled books".into(), bundled_held_out()?, None));
    }
    let encode = |(label, text, file): (String, String, Option<PathBuf>)| {
        let mut tokens = checkpoint.encode(&text, false)?;
        if args.eval_tokens > 0 {
            tokens.truncate(args.eval_tokens);
        }
        Ok(Text { label, file, tokens })
    };
    texts.into_iter().map(encode).collect()
}

/// The texts and tasks that are called as a calibration corpus is.
fn measured_on_calibration(args: &CompareArgs, corpora: &[Corpus], texts: &[Text], tasks: &[Task]) -> Vec<String> {
    let texts = texts.iter().filter_map(|text| Some((text.label.as_str(), text.file.as_deref()?)));
    let tasks = tasks.iter().map(Task::name).zip(args.tasks.iter().map(PathBuf::as_path));
    let is_of_both = |(_, file): &(&str, &Path)| calibrated_on(corpora.iter().map(|corpus| corpus.label.as_str()), file);
    texts.chain(tasks).filter(is_of_both).map(|(name, _)| name.to_string()).collect()
}

/// Measures what of the texts and tasks a row doesn't have yet.
fn measure(setting: &Setting<'_>, row: &mut Row, decoder: &Decoder, tokenizer: &Tokenizer) -> Result<()> {
    let window = setting.args.tuning.eval_window.min(decoder.config().max_position_embeddings);
    for text in &setting.texts {
        if !row.perplexity.contains_key(&text.label) {
            row.perplexity.insert(text.label.clone(), perplexity(decoder, &text.tokens, window, |_, _| {})?);
        }
    }
    for task in &setting.tasks {
        if !row.has_scores(task) {
            row.tasks.retain(|old| old["task"] != task.name());
            row.tasks.push(Row::task(&multiple_choice(decoder, tokenizer, task, |_, _| {})?));
        }
    }
    Ok(())
}

/// A row as it was kept, or made and measured now. One that lacks texts or tasks that are asked for has them measured, and keeps those that it has.
fn kept(setting: &Setting<'_>, name: &str, make: impl FnOnce() -> Result<Row>, measure: impl FnOnce(&mut Row) -> Result<()>) -> Result<Row> {
    let path = setting.args.out.join("rows").join(format!("{name}.json"));
    let mut row: Row = match std::fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text)
            .with_context(|| format!("{}: not what a comparison writes there: delete it to have it measured again", path.display()))?,
        Err(_) => make()?,
    };
    let is_measured = setting.texts.iter().all(|text| row.perplexity.contains_key(&text.label)) && setting.tasks.iter().all(|task| row.has_scores(task));
    if !is_measured {
        measure(&mut row)?;
        storage::write_json(&path, &row)?;
    }
    // (rows of before it was kept)
    if row.kv_bytes_per_token == 0 {
        row.kv_bytes_per_token = (row.kv_kept * setting.decoder.config().kv_bytes_per_token(2) as f64).round() as usize;
    }
    row.perplexity.retain(|label, _| setting.texts.iter().any(|text| text.label == *label));
    row.tasks = setting.tasks.iter().filter_map(|task| row.tasks.iter().find(|old| old["task"] == task.name()).cloned()).collect();
    Ok(row)
}

fn dense(setting: &Setting<'_>) -> Result<Row> {
    let config = setting.decoder.config();
    let make = || {
        Ok(Row {
            strategy: "dense".into(),
            space: String::new(),
            sparsity: 0.0,
            seed: 0,
            params_kept: 1.0,
            kv_kept: 1.0,
            kv_bytes_per_token: config.kv_bytes_per_token(2),
            perplexity: BTreeMap::new(),
            tasks: Vec::new(),
            block_forwards: 0,
            evaluations: 0,
            seconds: (0.0, 0.0),
            widths: config.layers.iter().flat_map(|l| [l.shape.kv_groups, l.shape.ffn]).map(|w| (w, w)).collect(),
            calibration: None,
            calibrated_on: Vec::new(),
        })
    };
    kept(setting, "dense", make, |row| measure(setting, row, &setting.decoder, setting.checkpoint.tokenizer()))
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
    let directory = args.out.join("runs").join(&name);
    let make = || {
        if !run::is_finished(&directory) {
            prune(setting, &directory, options)?;
        }
        unmeasured(&directory, strategy, sparsity, seed)
    };
    let measure = |row: &mut Row| {
        let pruned =
            Checkpoint::open(&directory).with_context(|| format!("{name}: its run is gone, or damaged: delete rows/{name}.json to have it run again"))?;
        let decoder = pruned.decoder(setting.decoder.device(), setting.decoder.weight_type())?;
        measure(setting, row, &decoder, pruned.tokenizer())
    };
    Ok(Row { calibrated_on: setting.calibrated_on.clone(), ..kept(setting, &name, make, measure)? })
}

/// What a finished run says of itself.
fn unmeasured(directory: &Path, strategy: Strategy, sparsity: f64, seed: u64) -> Result<Row> {
    let report = std::fs::read(directory.join("report.json")).with_context(|| directory.display().to_string())?;
    let report: serde_json::Value = serde_json::from_slice(&report)?;
    let pair = |name: &str| -> Result<f64> {
        let (before, after): (f64, f64) = serde_json::from_value(report[name].clone())?;
        Ok(if before > 0.0 { after / before } else { 1.0 })
    };
    let count = |pointer: &str| report.pointer(pointer).and_then(serde_json::Value::as_u64).unwrap_or(0) as usize;
    let seconds = |phase: &str| report["seconds"][phase].as_f64().unwrap_or(0.0);
    let corpora = report["calibration"]["corpora"].as_array().into_iter().flatten();
    Ok(Row {
        strategy: strategy.to_string(),
        space: report["run"]["options"]["space"]["space"].as_str().unwrap_or_default().to_string(),
        sparsity,
        seed,
        params_kept: pair("block_parameters")?,
        kv_kept: pair("kv_bytes_per_token")?,
        kv_bytes_per_token: count("/kv_bytes_per_token/1"),
        perplexity: BTreeMap::new(),
        tasks: Vec::new(),
        block_forwards: count("/work/block_forwards"),
        evaluations: count("/work/evaluated"),
        seconds: (seconds("levels"), seconds("search")),
        widths: serde_json::from_value(report["widths"].clone())?,
        calibration: Some(Calibrated {
            corpora: corpora.filter_map(|corpus| corpus["label"].as_str().map(str::to_string)).collect(),
            tokens: serde_json::from_value(report["calibration"]["tokens"].clone())?,
        }),
        calibrated_on: Vec::new(),
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
            calibration_set: None,
            eval_text: None,
            options,
            command: std::env::args().collect(),
            version: env!("CARGO_PKG_VERSION").to_string(),
        };
        run::begin(directory, &run, setting.checkpoint.config())?;
        if shared.exists() {
            copy(&shared, &directory.join("calibration.json"))?;
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
        copy(&directory.join("calibration.json"), &shared)?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let bytes = std::fs::read(from).with_context(|| from.display().to_string())?;
    Ok(storage::write(to, &bytes)?)
}

fn write_reports(setting: &Setting<'_>, rows: &[Row]) -> Result<()> {
    let out = &setting.args.out;
    let command: Vec<String> = std::env::args().collect();
    let model = setting.args.model.model.as_deref().unwrap_or("the bundled model");
    storage::write_json(&out.join("compare.json"), &rows)?;
    Ok(storage::write(&out.join("compare.html"), html(model, rows, &command).as_bytes())?)
}

fn print_table(rows: &[Row]) {
    let Some(first) = rows.first() else { return };
    let labels: Vec<&String> = first.perplexity.keys().collect();
    print!("{:<20}{:>10}{:>8}{:>8}{:>10}", "strategy", "sparsity", "kept", "KV", "KV bytes");
    labels.iter().for_each(|l| print!("{:>16}", format!("ppl {}", l.chars().take(11).collect::<String>())));
    first.scores().for_each(|(name, _, _)| print!("{:>24}", name));
    println!("{:>16}{:>13}{:>10}", "block-forwards", "evaluations", "seconds");
    for row in rows {
        print!("{:<20}{:>10}{:>8.4}{:>8.3}{:>10}", row.strategy, row.sparsity, row.params_kept, row.kv_kept, row.kv_bytes_per_token);
        labels.iter().for_each(|l| print!("{:>16.3}", row.perplexity.get(*l).map_or(f64::NAN, |p| p.perplexity)));
        row.scores().for_each(|(_, value, stderr)| print!("{:>24}", format!("{value:.4} ± {stderr:.4}")));
        println!("{:>16}{:>13}{:>10.0}", row.block_forwards, row.evaluations, row.seconds.0 + row.seconds.1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joint_runs_before_random_joint_and_all_else_as_given() {
        let (joint, random, flap) = (Strategy::Joint, Strategy::RandomJoint, Strategy::Flap);
        assert_eq!(in_order(&[random, flap, joint]), [joint, random, flap]);
        assert_eq!(in_order(&[flap, joint, random]), [flap, joint, random]);
        assert_eq!(in_order(&[random, flap]), [random, flap]);
    }
}

//! `evop quickstart`: prune the bundled model with EvoP, show what that did, serve the result and ask it something.

use super::bench::{self, Steps};
use super::child_server::ChildServer;
use super::http;
use super::model_args::ModelArgs;
use super::progress::{Display, ProgressStyle};
use super::prune;
use super::prune_args::PruneArgs;
use crate::config::{DTypeChoice, KvDTypeChoice};
use anyhow::{Context, Result, bail};
use clap::{Args, FromArgMatches};
use evop_model::device::{DeviceChoice, weight_type};
use evop_model::{Checkpoint, Decoder};
use evop_pruning::run;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Options of `evop quickstart`.
#[derive(Debug, Clone, Args)]
pub struct QuickstartArgs {
    /// Where the pruned model goes; a second run finds it there.
    #[arg(long, value_name = "DIR", default_value = "evop-quickstart")]
    pub out: PathBuf,
    /// Port of the server.
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub port: u16,
    /// End after the completion instead of serving on.
    #[arg(long)]
    pub exit: bool,
}

const PROMPT: &str = "It was a dark night, and";
/// Tokens of a speed measurement.
const MEASURED_TOKENS: usize = 64;
const ROUNDS: usize = 5;

/// Runs the command.
pub fn run(args: &QuickstartArgs) -> Result<()> {
    if run::is_finished(&args.out) {
        println!("{} holds the pruned model of an earlier run already.", args.out.display());
    } else {
        println!("Pruning the bundled model (2.9 M parameters, 12 layers) with EvoP: a quarter of its block parameters goes.");
        let mut display = Display::new(ProgressStyle::Auto);
        let (_, outcome) = prune::prune(&prune_args(&args.out)?, &mut display)?;
        display.done(&args.out);
        prune::print_table(&outcome);
    }
    let (dense, pruned) = speeds(&args.out)?;
    println!("\ndecode, one sequence, medians of {ROUNDS}: dense {dense:.0} tokens/s, pruned {pruned:.0} tokens/s ({:.2}x)", pruned / dense);

    let server = serve(&args.out, args.port)?;
    let body = serde_json::json!({ "model": "evop-tiny-pruned", "prompt": PROMPT, "max_tokens": 40, "temperature": 0.7, "seed": 3 }).to_string();
    let (status, answer) = http::request(&format!("{}/v1/completions", server.url()), Some(&body), Duration::from_secs(60))?;
    let answer: serde_json::Value = serde_json::from_str(&answer).with_context(|| format!("the server answered {status}: {answer}"))?;
    let text = answer["choices"][0]["text"].as_str().with_context(|| format!("the server answered {status}: {answer}"))?;
    let (bold, plain) = if std::io::stdout().is_terminal() { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
    println!(
        "\n{PROMPT}{bold}{text}{plain}\n\nThe pruned model is served at {0}. Ask it yourself:\n\n  curl {0}/v1/completions -H 'content-type: application/json' -d '{body}'\n",
        server.url()
    );
    if args.exit {
        return Ok(());
    }
    println!("Ctrl-C ends it.");
    server.wait()
}

/// The default search, cut short: a first look takes about a minute.
fn prune_args(out: &Path) -> Result<PruneArgs> {
    let command = PruneArgs::augment_args(clap::Command::new("prune"));
    let matches = command.try_get_matches_from(["prune".as_ref(), "--generations=12".as_ref(), "--out".as_ref(), out.as_os_str()])?;
    let mut args = PruneArgs::from_arg_matches(&matches)?;
    // the bundled model, whatever EVOP_MODEL says
    args.model = ModelArgs { model: None, revision: None, device: DeviceChoice::Auto, dtype: DTypeChoice::Auto };
    Ok(args)
}

/// Decoded tokens a second, dense and pruned, measured in turns.
fn speeds(pruned: &Path) -> Result<(f64, f64)> {
    let device = DeviceChoice::Auto.open()?;
    let dtype = weight_type(&device, None)?;
    let load = |checkpoint: Checkpoint| -> Result<Decoder> { Ok(checkpoint.decoder(&device, dtype)?) };
    let dense = load(crate::models::ModelSource::Bundled.open(None)?)?;
    let pruned = load(Checkpoint::open(pruned)?)?;
    let steps = Steps { sequences: 1, prompt: 1, tokens: MEASURED_TOKENS, step_tokens: 1, cuda_graphs: true };
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        a.push(bench::decode(&dense, KvDTypeChoice::Auto, &steps)?);
        b.push(bench::decode(&pruned, KvDTypeChoice::Auto, &steps)?);
    }
    let median = |mut v: Vec<f64>| {
        v.sort_by(f64::total_cmp);
        v[v.len() / 2]
    };
    Ok((median(a), median(b)))
}

/// Serves the pruned model.
fn serve(model: &Path, port: u16) -> Result<ChildServer> {
    if http::request(&format!("http://127.0.0.1:{port}/health"), None, Duration::from_millis(500)).is_ok() {
        bail!("port {port} is taken by another server: choose one with --port");
    }
    ChildServer::start(|command| {
        command.args(["--host", "127.0.0.1", "--admin-addr", "off", "--log", "warn", "--served-model-name", "evop-tiny-pruned"]);
        command.arg("--port").arg(port.to_string()).arg("--model").arg(model).arg("--data-dir").arg(model.join("server-data"));
    })
}

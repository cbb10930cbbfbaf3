//! `evop bench serve`: a load on an OpenAI-compatible server, this one or another, and how it bears it.

mod client;
mod intruder;
mod load;
mod prefix;
mod report;
mod server_state;
mod workload;

use crate::commands::child_server::ChildServer;
use crate::commands::http;
use crate::commands::progress;
use crate::config::Secret;
use crate::models::ModelSource;
use crate::shape::Shape;
use anyhow::{Context, Result, bail};
use clap::Args;
use client::{End, Target};
use indicatif::ProgressBar;
use intruder::{Round, Scenario};
use load::{Limit, Load};
use prefix::Pair;
use report::{Level, LevelReport};
use serde::Serialize;
use server_state::ServerState;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use workload::{Misbehaviour, Prompts, Workload};

/// Tokens of the intruder's answer.
const INTRUDER_OUTPUT_TOKENS: usize = 1;
/// The series of requests that warm the server up; levels count from 0.
const WARM_UP: u32 = 1 << 20;

/// Options of `evop bench serve`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  \
    evop bench serve --model ./pruned --concurrency 1,4,16 --prompt-tokens 256\n  \
    evop bench serve --url http://127.0.0.1:8080 --rate 2,4 --seconds 60 --stop-at-eos\n  \
    evop bench serve --model ./SmolLM2 --intruder-tokens 4000 -- --dtype q8_0\n  \
    evop bench serve --model ./SmolLM2 --shared-prefix 512 --prompt-tokens 16\n  \
    evop bench serve --random llama-3.2-1b --concurrency 1,8 -- --dtype q8_0\n  \
    evop bench serve --concurrency 256 --seconds 60 --disconnect 0.3 --slow-readers 0.05 --half-bodies 0.05 -- --max-queue 64")]
pub struct ServeBenchArgs {
    /// The server; without it one is started for --model, on a free port.
    #[arg(long, value_name = "URL", help_heading = "Server")]
    pub url: Option<String>,
    /// What the server that is started serves; without it the small bundled model.
    #[arg(long, value_name = "MODEL", conflicts_with = "url", help_heading = "Server")]
    pub model: Option<String>,
    /// Random weights in the shape of a known model, instead of a checkpoint.
    #[arg(long, value_name = "SHAPE", conflicts_with_all = ["url", "model"], help_heading = "Server")]
    pub random: Option<Shape>,
    /// The model's name in requests. [default: the first of the server's /v1/models]
    #[arg(long, value_name = "NAME", help_heading = "Server")]
    pub served_model: Option<String>,
    /// A key for the server. Other users of the machine can see a command line: prefer the variable.
    #[arg(long, env = "OPENAI_API_KEY", value_name = "KEY", hide_env_values = true, help_heading = "Server")]
    pub api_key: Option<Secret>,
    /// More options of `evop serve`, for the server that is started.
    #[arg(last = true, value_name = "OPTIONS", conflicts_with = "url", help_heading = "Server")]
    pub serve: Vec<String>,

    /// Clients that ask again as soon as they are answered, separated by commas; each number is one level.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 4, 16], help_heading = "Load")]
    pub concurrency: Vec<usize>,
    /// Requests that arrive a second (Poisson), whatever is answered, separated by commas; instead of --concurrency.
    #[arg(long, value_name = "R", value_delimiter = ',', conflicts_with = "concurrency", help_heading = "Load")]
    pub rate: Vec<f64>,
    /// Requests of a level.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..), help_heading = "Load")]
    pub requests: u64,
    /// Seconds of a level, instead of --requests.
    #[arg(long, value_name = "S", conflicts_with = "requests", value_parser = clap::value_parser!(u64).range(1..), help_heading = "Load")]
    pub seconds: Option<u64>,
    /// Seconds after which a request counts as failed.
    #[arg(long, value_name = "S", default_value_t = 300, help_heading = "Load")]
    pub timeout: u64,
    /// Seed of prompts, arrivals and misbehaviour.
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Load")]
    pub seed: u64,

    /// Random token ids of a prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 128, help_heading = "Requests")]
    pub prompt_tokens: usize,
    /// Random token ids are less than this.
    #[arg(long, value_name = "N", default_value_t = 1_000, help_heading = "Requests")]
    pub vocab: u32,
    /// A file with a prompt a line, instead of random tokens.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["prompt_tokens", "vocab"], help_heading = "Requests")]
    pub prompts: Option<PathBuf>,
    /// Tokens of an answer.
    #[arg(long, value_name = "TOKENS", default_value_t = 64, help_heading = "Requests")]
    pub output_tokens: usize,
    /// Let answers end where the model ends them: leaves `ignore_eos` away, which OpenAI's API doesn't have.
    #[arg(long, help_heading = "Requests")]
    pub stop_at_eos: bool,

    /// Share of clients that hang up at a random token.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, help_heading = "Misbehaviour")]
    pub disconnect: f64,
    /// Share of clients that read slowly, through a small buffer.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, help_heading = "Misbehaviour")]
    pub slow_readers: f64,
    /// Share of clients that send half of a body and leave.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, help_heading = "Misbehaviour")]
    pub half_bodies: f64,

    /// Instead of levels: --chats stream while a prompt of so many tokens arrives; how much longer do they wait for tokens?
    #[arg(long, value_name = "TOKENS", conflicts_with_all = ["concurrency", "rate"], help_heading = "Fairness")]
    pub intruder_tokens: Option<usize>,
    /// Chats that stream.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..), help_heading = "Fairness")]
    pub chats: u16,
    /// Tokens that each may make; they hang up when the long prompt is read.
    #[arg(long, value_name = "TOKENS", default_value_t = 1_500, help_heading = "Fairness")]
    pub chat_tokens: usize,

    /// Instead of levels: pairs of requests one after the other, whose prompts share so many tokens and have --prompt-tokens of their own; how much
    /// sooner does the second answer begin?
    #[arg(long, value_name = "TOKENS", conflicts_with_all = ["concurrency", "rate", "intruder_tokens", "prompts"], help_heading = "Prefix caching")]
    pub shared_prefix: Option<usize>,

    /// Arrivals of a long prompt, or pairs of requests.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..), help_heading = "Fairness and prefix caching")]
    pub rounds: u16,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// What is printed as JSON.
#[derive(Debug, Serialize)]
struct Report {
    url: String,
    levels: Vec<LevelReport>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rounds: Vec<Round>,
    #[serde(skip_serializing_if = "Option::is_none")]
    median_ratio_p99: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pairs: Vec<Pair>,
    /// Of the pairs' times to first token, the second's to the first's.
    #[serde(skip_serializing_if = "Option::is_none")]
    median_ratio_second: Option<f64>,
    /// After a first request, and at the end; `null` of a server without metrics.
    server_before: Option<ServerState>,
    server_after: Option<ServerState>,
}

/// Runs the command. `threads` is how many compute in the server that is started.
pub fn run(args: &ServeBenchArgs, threads: usize) -> Result<()> {
    let directory = tempfile::tempdir().context("a directory for the server that is started")?;
    let child = args.url.is_none().then(|| start(args, directory.path(), threads)).transpose()?;
    let url = args.url.as_deref().or(child.as_ref().map(ChildServer::url)).unwrap_or_default().to_string();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads.clamp(1, 4)).enable_all().build()?;
    let report = runtime.block_on(measure(args, url))?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print(args, &report);
    }
    judge(&report)
}

/// Options of the child are variables: what was given after `--` comes before them.
fn start(args: &ServeBenchArgs, data: &std::path::Path, threads: usize) -> Result<ChildServer> {
    ChildServer::start(|command| {
        command.envs([("EVOP_HOST", "127.0.0.1"), ("EVOP_PORT", "0"), ("EVOP_ADMIN_ADDR", "off"), ("EVOP_LOG", "warn")]);
        command.env("EVOP_DATA_DIR", data).env("EVOP_THREADS", threads.to_string());
        let random = args.random.map(|shape| ModelSource::Random(shape).name());
        command.args(args.model.iter().chain(&random).flat_map(|model| ["--model", model])).args(&args.serve);
    })
}

async fn measure(args: &ServeBenchArgs, url: String) -> Result<Report> {
    let target = Target::find(&url, args.api_key.clone(), Duration::from_secs(args.timeout)).await?;
    let prompts = match &args.prompts {
        Some(file) => Prompts::from_file(file)?,
        None => Prompts::synthetic(args.prompt_tokens, args.vocab)?,
    };
    let workload = Workload {
        seed: args.seed,
        prompts,
        output_tokens: args.output_tokens,
        ignore_eos: !args.stop_at_eos,
        model: args.served_model.clone().or_else(|| first_model(&url, args.api_key.as_ref())),
        misbehaviour: Misbehaviour::new(args.disconnect, args.slow_readers, args.half_bodies)?,
    };
    let polite = Workload { misbehaviour: Misbehaviour::default(), ..workload.clone() };
    let first = target.ask(&polite.request(WARM_UP, 0), |_| ()).await;
    if first.end != End::Complete {
        bail!("{url} does not answer a first request: {:?}", first.end);
    }
    let server_before = ServerState::read_settled(&url);
    let bar = progress::bar()?;
    let (mut levels, mut rounds, mut pairs) = (Vec::new(), Vec::new(), Vec::new());
    match (args.intruder_tokens, args.shared_prefix) {
        (Some(tokens), _) => rounds = intrude(args, target, &polite, tokens, &bar).await?,
        (None, Some(tokens)) => {
            let alike = Workload { prompts: Prompts::sharing(tokens, args.prompt_tokens, args.vocab)?, ..polite };
            pairs = prefix::run(&target, &alike, args.rounds, &bar).await?;
        }
        (None, None) => levels = sweep(args, target, workload, &bar).await?,
    }
    bar.finish_and_clear();
    let median_ratio_p99 = (!rounds.is_empty()).then(|| intruder::median_ratio(&rounds));
    let median_ratio_second = (!pairs.is_empty()).then(|| prefix::median_ratio(&pairs));
    let server_after = ServerState::read_settled(&url);
    Ok(Report { url, levels, rounds, median_ratio_p99, pairs, median_ratio_second, server_before, server_after })
}

async fn sweep(args: &ServeBenchArgs, target: Target, workload: Workload, bar: &ProgressBar) -> Result<Vec<LevelReport>> {
    let levels: Vec<Level> = match args.rate.as_slice() {
        [] => args.concurrency.iter().map(|n| Level::Concurrency(*n)).collect(),
        rates => rates.iter().map(|r| Level::Rate(*r)).collect(),
    };
    if let Some(wrong) = levels.iter().find(|l| !matches!(l, Level::Concurrency(1..)) && !matches!(l, Level::Rate(r) if r.is_finite() && *r > 0.0)) {
        bail!("{wrong:?}: expected at least one client, or a rate above 0");
    }
    let limit = args.seconds.map_or(Limit::Requests(args.requests), |s| Limit::Time(Duration::from_secs(s)));
    let load = Arc::new(Load { target, workload, limit });
    let mut reports = Vec::new();
    for (series, level) in (0..).zip(levels) {
        bar.set_prefix(match level {
            Level::Concurrency(clients) => format!("{clients} clients"),
            Level::Rate(rate) => format!("{rate}/s"),
        });
        reports.push(load.run(series, level, bar).await);
    }
    Ok(reports)
}

async fn intrude(args: &ServeBenchArgs, target: Target, polite: &Workload, tokens: usize, bar: &ProgressBar) -> Result<Vec<Round>> {
    bar.set_prefix("rounds");
    let scenario = Scenario {
        target,
        chats: Workload { output_tokens: args.chat_tokens, ..polite.clone() },
        count: usize::from(args.chats),
        intruder: Workload { output_tokens: INTRUDER_OUTPUT_TOKENS, prompts: Prompts::synthetic(tokens, args.vocab)?, ..polite.clone() },
        rounds: usize::from(args.rounds),
    };
    scenario.run(bar).await
}

/// The first model that the server lists; servers that list none may not need a name.
fn first_model(url: &str, key: Option<&Secret>) -> Option<String> {
    let (status, body) = http::get(&format!("{}/v1/models", url.trim_end_matches('/')), key, Duration::from_secs(5)).ok()?;
    let models: serde_json::Value = serde_json::from_str(&body).ok().filter(|_| status == 200)?;
    models["data"][0]["id"].as_str().map(String::from)
}

fn print(args: &ServeBenchArgs, report: &Report) {
    if !report.levels.is_empty() {
        LevelReport::print_head();
        report.levels.iter().for_each(LevelReport::print);
    }
    if let Some(tokens) = args.intruder_tokens {
        intruder::print(usize::from(args.chats), tokens, &report.rounds);
    }
    if let Some(tokens) = args.shared_prefix {
        prefix::print(tokens, args.prompt_tokens, &report.pairs);
    }
    match (&report.server_before, &report.server_after) {
        (Some(before), Some(after)) => {
            before.print("server before");
            after.print("server after ");
        }
        _ => println!("the server has no /metrics that can be read: whether it holds memory is not known"),
    }
}

/// An error, or memory that is still held, is a failure.
fn judge(report: &Report) -> Result<()> {
    let errors: usize = report.levels.iter().flat_map(|level| level.errors.values()).sum();
    if errors > 0 {
        bail!("{errors} requests failed otherwise than by a 429 with Retry-After");
    }
    match report.server_after {
        Some(state) if state.is_busy() => bail!("the server still holds memory or requests though nobody asks for anything: {state:?}"),
        None if report.server_before.is_some() => bail!("the server's metrics can't be read any more"),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory, Parser};

    #[derive(Debug, Parser)]
    struct Command {
        #[command(flatten)]
        args: ServeBenchArgs,
    }

    fn report(end: End, after: Option<ServerState>) -> Report {
        let now = std::time::Instant::now();
        let answer = client::Answer { sent: now, end, ended: now, chunks: vec![now], output_tokens: 1, prompt_tokens: 1, slow: false };
        let levels = vec![LevelReport::new(Level::Concurrency(1), Duration::from_secs(1), &[answer])];
        Report {
            url: String::new(),
            levels,
            rounds: Vec::new(),
            median_ratio_p99: None,
            pairs: Vec::new(),
            median_ratio_second: None,
            server_before: Some(ServerState::default()),
            server_after: after,
        }
    }

    #[test]
    fn errors_and_memory_that_is_held_are_a_failure_and_refusals_are_not() {
        let idle = Some(ServerState { kv_blocks_used: Some(0), ..ServerState::default() });
        assert!(judge(&report(End::Refused(Duration::from_secs(1)), idle)).is_ok());
        assert!(judge(&report(End::Failed("status 500".into()), idle)).is_err());
        assert!(judge(&report(End::Complete, Some(ServerState { kv_blocks_used: Some(1), ..ServerState::default() }))).is_err());
        assert!(judge(&report(End::Complete, None)).is_err(), "a server whose metrics are gone");
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        Command::command().debug_assert();
        let parse = |arguments: &str| Command::try_parse_from(["serve"].into_iter().chain(arguments.split(' ')));
        assert!(parse("--rate 2,4 --seconds 5 -- --max-queue 3").is_ok());
        for wrong in [
            "--rate 2 --concurrency 4",
            "--seconds 5 --requests 4",
            "--url http://a --model b",
            "--random smollm-135m --model b",
            "--url http://a -- --max-queue 3",
            "--requests 0",
            "--shared-prefix 9 --intruder-tokens 9",
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}

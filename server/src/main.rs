//! `evop`: finds what a large language model can do without, and serves what is left behind an OpenAI-compatible API.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod admin;
mod app;
mod auth;
mod auto;
mod commands;
mod config;
mod data_dir;
mod docs;
mod forms;
mod hub;
mod listener;
mod load;
mod logging;
mod memory;
mod metrics;
mod models;
mod openai;
mod operations;
mod pressure;
mod rate_limit;
mod request_id;
mod router;
mod served;
mod serving_slot;
mod shape;
mod shutdown;
mod traces;

use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

/// A pass allocates and frees megabytes of activations; the system's allocator gives them back each time, and every pass faults them in again.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Prunes large language models and serves them behind an OpenAI-compatible API.
#[derive(Debug, Parser)]
#[command(name = "evop", version, arg_required_else_help = true, propagate_version = true)]
struct Cli {
    /// Threads that compute; by default the container's CPU quota, or else all cores.
    #[arg(long, env = "EVOP_THREADS", global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Prunes the bundled model with EvoP, serves it and asks it something: the whole path in one command.
    Quickstart(commands::quickstart::QuickstartArgs),
    /// Searches what a model can do without, and writes the pruned checkpoint.
    Prune(Box<commands::prune_args::PruneArgs>),
    /// Runs several strategies under one budget and puts what they found side by side.
    Compare(Box<commands::compare::CompareArgs>),
    /// Computes the perplexity of a text, or scores multiple-choice tasks as lm-evaluation-harness does.
    Eval(commands::eval::EvalArgs),
    /// Measures how fast a checkpoint decodes and prefills, beside another one.
    Bench(commands::bench::BenchArgs),
    /// Shows what a checkpoint has, layer by layer.
    Inspect(commands::inspect::InspectArgs),
    /// Writes a checkpoint in another format: for transformers, vLLM or llama.cpp.
    Export(commands::export::ExportArgs),
    /// Cuts a model's vocabulary down to the tokens that given texts need; those texts are tokenised as before.
    Vocab(commands::vocab::VocabArgs),
    /// Compares an accelerator's logits and greedy tokens with the CPU's.
    #[command(hide = true)]
    CompareDevices(commands::compare_devices::CompareDevicesArgs),
    /// Serves a model over HTTP.
    Serve(Box<config::ServeConfig>),
    /// Asks a running server whether it is ready; the exit status is the answer (for a container's health check).
    Health(commands::health::HealthArgs),
}

/// The command line, for those who check options against it.
fn command() -> clap::Command {
    Cli::command()
}

fn main() -> ExitCode {
    // Before anything else: these change the environment, which is safe only while there is one thread.
    config::forget_empty_variables();
    let cli = Cli::parse();
    let threads = cli.threads.map_or_else(evop_model::device::available_threads, usize::from);
    evop_model::device::set_threads(threads);

    // What only prints ends quietly when its reader does (`evop inspect | head`); a search or a server doesn't end for that.
    let only_prints = matches!(cli.command, Command::Inspect(_) | Command::Eval(_) | Command::Export(_) | Command::Vocab(_) | Command::Health(_));
    if only_prints {
        sigpipe::reset();
    }

    let result = match cli.command {
        Command::Quickstart(args) => commands::quickstart::run(&args),
        Command::Prune(args) => commands::prune::run(&args),
        Command::Compare(args) => commands::compare::run(&args),
        Command::Eval(args) => commands::eval::run(&args),
        Command::Bench(args) => commands::bench::run(&args, threads),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Export(args) => commands::export::run(&args),
        Command::Vocab(args) => commands::vocab::run(&args),
        Command::CompareDevices(args) => commands::compare_devices::run(&args),
        Command::Serve(config) => commands::serve::run(*config, threads),
        Command::Health(args) => commands::health::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

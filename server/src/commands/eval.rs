//! `evop eval`: perplexity of a text.

use super::model_args::{ModelArgs, bundled_held_out, read_text};
use anyhow::Result;
use clap::Args;
use evop_pruning::eval::perplexity;
use indicatif::ProgressBar;
use std::path::PathBuf;

/// Options of `evop eval`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  evop eval                                     the bundled model on the bundled held-out books\n  \
    evop eval --model pruned --text wiki.test.raw --window 2048")]
pub struct EvalArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Text: plain, or JSON lines with a `text` field, either gzipped. [default: five bundled books]
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens of a window: the text is cut into windows without overlap. [default: 2048, or the model's context if shorter]
    #[arg(long, value_name = "TOKENS")]
    pub window: Option<usize>,
    /// Look at the first characters only.
    #[arg(long, value_name = "N")]
    pub max_characters: Option<usize>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub fn run(args: &EvalArgs) -> Result<()> {
    let (checkpoint, decoder) = args.model.load()?;
    let mut text = args.text.as_deref().map_or_else(bundled_held_out, read_text)?;
    if let Some(limit) = args.max_characters {
        text = text.chars().take(limit).collect();
    }
    let tokens = checkpoint.encode(&text, false)?;
    let window = args.window.unwrap_or_else(|| decoder.config().max_position_embeddings.min(2048));
    let bar = ProgressBar::new(0);
    let result = perplexity(&decoder, &tokens, window, |done, all| {
        bar.set_length(all as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&result)?);
    } else {
        println!("perplexity {:.4} (mean {:.6} nats over {} predicted tokens)", result.perplexity, result.mean_nll, result.predicted_tokens);
        println!("{} windows of {} tokens without overlap; parameters {:.3} M", result.windows, result.window, decoder.config().parameters() as f64 / 1e6);
    }
    Ok(())
}

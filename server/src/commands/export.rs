//! `evop export`: a checkpoint in another format.

use super::model_name::ModelName;
use anyhow::{Result, bail};
use clap::Args;
use evop_model::Pattern;
use evop_pruning::checkpoint::{Contents, FileType, Format, Target, Written};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Options of `evop export`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  \
    evop export pruned --format gguf --type q8_0 --out pruned.gguf      for llama.cpp\n  \
    evop export pruned --format nemotron-nas --out pruned-nas          for vLLM\n  \
    evop export model.gguf --format hf --type bf16 --out model         for transformers")]
pub struct ExportArgs {
    #[command(flatten)]
    pub model: ModelName,
    /// What to write: hf, nemotron-nas or gguf.
    #[arg(long, value_name = "FORMAT")]
    pub format: Format,
    /// How numbers are stored: f32, f16 or bf16; for gguf also q8_0 or q4_k. [default: as they are]
    #[arg(long = "type", value_name = "TYPE")]
    pub weights: Option<FileType>,
    /// Where to: a directory; for gguf also a file whose name ends in .gguf.
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// Keep what this file says: a pattern.json of a pruning run of the model.
    #[arg(long, value_name = "FILE")]
    pub pattern: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub fn run(args: &ExportArgs) -> Result<()> {
    let (checkpoint, name) = args.model.open()?;
    let target = Target { format: args.format, weights: args.weights };
    refuse_to_overwrite(&args.out)?;
    let contents = Contents { name: &name, ..Contents::of(&checkpoint) };
    let written = match &args.pattern {
        None => contents.write(target, &args.out)?,
        Some(file) => contents.write_pattern(&Pattern::read(file, checkpoint.config())?, target, &args.out)?,
    };
    print(args, &written)
}

/// A directory with a checkpoint in it isn't a place for another.
fn refuse_to_overwrite(out: &Path) -> Result<()> {
    let taken = ["config.json", "model.safetensors", "model.gguf", "run.json"].iter().find(|file| out.join(file).exists());
    match taken {
        Some(file) => bail!("{} holds a {file} already: choose another --out", out.display()),
        None if out.is_file() => bail!("{} is there already: choose another --out", out.display()),
        None => Ok(()),
    }
}

fn print(args: &ExportArgs, written: &Written) -> Result<()> {
    if args.json {
        let mut summary = serde_json::to_value(written)?;
        summary["format"] = json!(args.format);
        println!("{summary:#}");
        return Ok(());
    }
    println!("{}: {} ({}), {:.1} MB of weights", args.out.display(), args.format, written.architecture, written.weight_bytes as f64 / 1e6);
    for note in &written.notes {
        println!("note: {note}");
    }
    Ok(())
}

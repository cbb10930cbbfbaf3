//! `evop vocab`: a checkpoint with the tokens that given texts need.

use super::model_args::read_documents;
use crate::models::ModelSource;
use anyhow::{Context, Result, bail};
use clap::Args;
use evop_model::{ChatTemplate, Checkpoint};
use evop_pruning::calibration::Corpus;
use evop_pruning::checkpoint::{FileType, Format, Target, Written};
use evop_pruning::vocabulary::{SmallerVocabulary, VocabularyOptions, VocabularyReport};
use evop_serving::{ChatError, ChatInput, ChatRenderer};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Options of `evop vocab`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  \
    evop vocab --model ./SmolLM2 --corpus logs.txt.gz code.jsonl --out smaller     every token of the texts is kept\n  \
    evop vocab --model pruned --corpus logs.txt.gz --keep-at-least 16000 --multiple 64 --out smaller")]
pub struct VocabArgs {
    /// A checkpoint directory, a .gguf file, or a hub id (org/name); without it the small bundled model.
    #[arg(long, env = "EVOP_MODEL", value_name = "MODEL")]
    pub model: Option<String>,
    /// Branch, tag or commit of a hub id.
    #[arg(long, env = "EVOP_REVISION", value_name = "REVISION")]
    pub revision: Option<String>,
    /// Texts that are to be tokenised as before: plain, or JSON lines with a `text` field, either gzipped. The chat template's own is one of them.
    #[arg(long, value_name = "FILE", required = true, num_args = 1..)]
    pub corpus: Vec<PathBuf>,
    /// Fill the vocabulary up to this many tokens, with those that the tokenizer learnt first.
    #[arg(long, value_name = "N", conflicts_with = "min_count")]
    pub keep_at_least: Option<usize>,
    /// Keep only tokens that the texts have this often; what has others takes more tokens than before. [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub min_count: Option<u64>,
    /// Fill the vocabulary up to a multiple of this, as some kernels like it.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub multiple: Option<u16>,
    /// How numbers are stored: f32, f16 or bf16. [default: as they are; f32 from a quantised GGUF]
    #[arg(long = "type", value_name = "TYPE")]
    pub weights: Option<FileType>,
    /// The directory to write; it must be empty, or not be there.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub fn run(args: &VocabArgs) -> Result<()> {
    refuse_to_overwrite(&args.out)?;
    let mut corpora = args.corpus.iter().map(|path| corpus(path)).collect::<Result<Vec<_>>>()?;
    let source = ModelSource::parse(args.model.as_deref())?;
    let checkpoint = source.open(args.revision.as_deref())?;
    corpora.extend(conversations(&checkpoint));
    let options =
        VocabularyOptions { min_count: args.min_count.unwrap_or(1), at_least: args.keep_at_least.unwrap_or(0), multiple: args.multiple.map_or(1, usize::from) };
    let smaller = SmallerVocabulary::cut(&checkpoint, &corpora, &options)?;
    let model = match &source {
        ModelSource::Bundled => None,
        ModelSource::Local(path) => Some(std::path::absolute(path).unwrap_or_else(|_| path.clone()).display().to_string()),
        ModelSource::Hub { .. } | ModelSource::Random(_) => Some(source.name()),
    };
    let target = Target { format: Format::Hf, weights: args.weights };
    let written = smaller.write(model.as_deref(), args.revision.as_deref(), target, &args.out)?;
    print(args, smaller.report(), &written)
}

/// Files of two checkpoints must not be mixed.
fn refuse_to_overwrite(out: &Path) -> Result<()> {
    match std::fs::read_dir(out).map(|mut files| files.next().is_some()) {
        Ok(false) => Ok(()),
        Ok(true) => bail!("--out: {}: expected an empty directory or none, found files in it", out.display()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("--out: {}", out.display())),
    }
}

fn corpus(path: &Path) -> Result<Corpus> {
    let label = path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
    let documents = read_documents(path)?;
    if documents.iter().all(String::is_empty) {
        bail!("--corpus: {}: expected text, found none", path.display());
    }
    Ok(Corpus { label, documents })
}

/// What the chat template puts around messages, as one more corpus.
fn conversations(checkpoint: &Checkpoint) -> Option<Corpus> {
    match rendered(checkpoint.chat_template()?) {
        Ok(documents) => Some(Corpus { label: "chat template".into(), documents }),
        Err(error) => {
            eprintln!("warning: {error}: the tokens that it needs are kept only where a corpus has them");
            None
        }
    }
}

/// Conversations with and without a system message, which some templates refuse.
fn rendered(template: &ChatTemplate) -> Result<Vec<String>, ChatError> {
    let renderer = ChatRenderer::new(template)?;
    let message = |role: &str| json!({ "role": role, "content": "Hello" });
    let turns = ["user", "assistant", "user"].map(message).to_vec();
    let with_system = json!([&[message("system")], turns.as_slice()].concat());
    let mut documents = vec![renderer.render(&ChatInput::new(&json!(turns)))?];
    documents.extend(renderer.render(&ChatInput::new(&with_system)));
    Ok(documents)
}

fn print(args: &VocabArgs, report: &VocabularyReport, written: &Written) -> Result<()> {
    if args.json {
        println!("{:#}", json!({ "vocabulary": report, "written": written }));
        return Ok(());
    }
    let millions = |n: usize| n as f64 / 1e6;
    println!("{}: {} of {} tokens", args.out.display(), report.after, report.before);
    let filled = if report.filled > 0 { format!(", {} to fill up", report.filled) } else { String::new() };
    println!("  {} bytes and special tokens, {} others of the corpora, {} that these are merged from{filled}", report.fixed, report.seen, report.merged_from);
    println!(
        "  {:.3} M of {:.3} M parameters, {:.1} MB of weights",
        millions(report.parameters.1),
        millions(report.parameters.0),
        written.weight_bytes as f64 / 1e6
    );
    for corpus in &report.corpora {
        let tokens = match corpus.after {
            same if same == corpus.before => format!("{same} tokens as before"),
            after => format!("{after} tokens, {} before", corpus.before),
        };
        println!("{}: {} documents, {tokens}", corpus.label, corpus.documents);
    }
    for note in &written.notes {
        println!("note: {note}");
    }
    Ok(())
}

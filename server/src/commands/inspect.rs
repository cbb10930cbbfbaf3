//! `evop inspect`: what a checkpoint has, layer by layer.

use super::model_name::ModelName;
use crate::config::DTypeChoice;
use anyhow::Result;
use clap::Args;
use evop_model::device::weight_type;
use evop_model::{Checkpoint, Device, Gene, HeldBytes, ShapeOrigin, TensorNames, held_in_words};
use evop_pruning::picture;
use serde::Serialize;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Options of `evop inspect`.
#[derive(Debug, Clone, Args)]
pub struct InspectArgs {
    #[command(flatten)]
    pub model: ModelName,
    /// What the weights are to be held in: says what that is in memory.
    #[arg(long, env = "EVOP_DTYPE", value_enum, default_value_t = DTypeChoice::Auto)]
    pub dtype: DTypeChoice,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Weights of one kind.
#[derive(Debug, Clone, Default, Serialize)]
struct Part {
    tensors: usize,
    parameters: usize,
    bytes: u64,
    /// Stored type -> bytes.
    types: BTreeMap<String, u64>,
}

/// Runs the command.
pub fn run(args: &InspectArgs) -> Result<()> {
    let (checkpoint, _) = args.model.open()?;
    let parts = parts(&checkpoint)?;
    let weights = weight_type(&Device::Cpu, args.dtype.weights_to_serve(&Device::Cpu, &checkpoint))?;
    let held = weights.of_all(checkpoint.config(), checkpoint.source().as_ref())?;
    if args.json {
        println!("{:#}", summary(&checkpoint, &parts, &held));
    } else {
        print(&checkpoint, &parts, &held);
    }
    Ok(())
}

/// The kinds of weights, in the order of a forward pass.
const PARTS: [&str; 5] = ["embedding", "attention", "mlp", "norms", "head"];

/// All tensors by kind. One that no kind knows isn't used and isn't counted.
fn parts(checkpoint: &Checkpoint) -> Result<Vec<(&'static str, Part)>> {
    let (config, source) = (checkpoint.config(), checkpoint.source());
    let names = TensorNames::of(config.architecture);
    let mut parts: Vec<(&'static str, Part)> = PARTS.iter().map(|name| (*name, Part::default())).collect();
    for name in source.names() {
        let kind = match names.in_layer(&name) {
            _ if name.contains("norm") => "norms",
            Some((_, part)) if part.starts_with("self_attn.") => "attention",
            Some(_) => "mlp",
            None if name == names.head() && !config.tie_word_embeddings => "head",
            None if name == names.embedding() || name == names.positions() => "embedding",
            None => continue,
        };
        let stored = source.stored(&name)?;
        if let Some((_, part)) = parts.iter_mut().find(|(name, _)| *name == kind) {
            part.tensors += 1;
            part.parameters += source.shape(&name).unwrap_or_default().iter().product::<usize>();
            part.bytes += stored.bytes;
            *part.types.entry(stored.kind).or_default() += stored.bytes;
        }
    }
    Ok(parts)
}

fn origin(origin: ShapeOrigin) -> &'static str {
    match origin {
        ShapeOrigin::Global => "config",
        ShapeOrigin::PerLayerConfig => "per_layer_config",
        ShapeOrigin::BlockConfigs => "block_configs",
        ShapeOrigin::PerLayerLists => "per-layer lists",
        ShapeOrigin::Tensors => "tensors",
    }
}

/// The pattern: of the parent's layers where `evop.json` says which those were, else of the layers that are here.
fn pattern(checkpoint: &Checkpoint) -> (String, bool) {
    let own = || checkpoint.config().layers.iter().map(|l| Gene { kv_groups: l.shape.kv_groups, ffn: l.shape.ffn }).collect::<Vec<_>>();
    let parents: Option<Vec<Gene>> = checkpoint.provenance().and_then(|p| serde_json::from_value(p.get("pattern")?.clone()).ok());
    let of_parent = parents.is_some();
    let genes = parents.unwrap_or_else(own);
    let most = |of: fn(&Gene) -> usize| genes.iter().chain(&own()).map(of).max().unwrap_or(0);
    let (groups, ffn) = (most(|g| g.kv_groups), most(|g| g.ffn));
    let widths: Vec<(usize, usize)> = genes.iter().flat_map(|g| [(groups, g.kv_groups), (ffn, g.ffn)]).collect();
    (picture::widths(&widths), of_parent)
}

fn summary(checkpoint: &Checkpoint, parts: &[(&'static str, Part)], held: &HeldBytes) -> Value {
    let config = checkpoint.config();
    let layer = |l: &evop_model::LayerConfig| {
        json!({
            "kv_groups": l.shape.kv_groups, "group_size": l.shape.group_size, "ffn": l.shape.ffn, "from": origin(l.origin),
            "sliding_window": l.sliding_window,
        })
    };
    json!({
        "path": checkpoint.path(), "model_type": config.architecture.model_type(), "parameters": config.parameters(),
        "block_parameters": config.block_parameters(), "weight_bytes": parts.iter().map(|(_, p)| p.bytes).sum::<u64>(),
        "parts": parts.iter().map(|(name, part)| ((*name).to_string(), json!(part))).collect::<serde_json::Map<_, _>>(),
        "in_memory": held.iter().map(|(of, (tensors, bytes))| ((*of).to_string(), json!({"tensors": tensors, "bytes": bytes}))).collect::<serde_json::Map<_, _>>(),
        "kv_bytes_per_token_16bit": config.kv_bytes_per_token(2), "hidden_size": config.hidden_size, "head_dim": config.head_dim,
        "vocab_size": config.vocab_size, "max_position_embeddings": config.max_position_embeddings,
        "layers": config.layers.iter().map(layer).collect::<Vec<_>>(), "pattern": pattern(checkpoint).0, "provenance": checkpoint.provenance(),
    })
}

fn print(checkpoint: &Checkpoint, parts: &[(&'static str, Part)], held: &HeldBytes) {
    let config = checkpoint.config();
    println!(
        "{}: {}, {:.3} M parameters ({:.3} M in blocks)",
        checkpoint.path().display(),
        config.architecture.model_type(),
        config.parameters() as f64 / 1e6,
        config.block_parameters() as f64 / 1e6
    );
    println!(
        "hidden {}, head {}, vocabulary {}, context {}, KV cache {} bytes per token (16-bit)\n",
        config.hidden_size,
        config.head_dim,
        config.vocab_size,
        config.max_position_embeddings,
        config.kv_bytes_per_token(2)
    );
    let (picture, of_parent) = pattern(checkpoint);
    println!("{picture}{}\n", if of_parent { "\n(the layers of the model that was pruned)" } else { "" });
    println!("{:<10}{:>9}{:>14}{:>15}  stored as", "weights", "tensors", "parameters", "bytes");
    let mut all = Part::default();
    for (name, part) in parts.iter().filter(|(_, part)| part.tensors > 0) {
        row(name, part);
        all.tensors += part.tensors;
        all.parameters += part.parameters;
        all.bytes += part.bytes;
    }
    row("all", &all);
    println!("matrices in memory when served on a CPU: {}", held_in_words(held));
    println!("\n{:>5}{:>11}{:>12}{:>10}  shape from", "layer", "KV groups", "group size", "MLP");
    for (i, layer) in config.layers.iter().enumerate() {
        println!("{i:>5}{:>11}{:>12}{:>10}  {}", layer.shape.kv_groups, layer.shape.group_size, layer.shape.ffn, origin(layer.origin));
    }
    if let Some(provenance) = checkpoint.provenance() {
        print_provenance(provenance);
    }
}

fn row(name: &str, part: &Part) {
    let types: Vec<&str> = part.types.keys().map(String::as_str).collect();
    let line = format!("{name:<10}{:>9}{:>14}{:>15}  {}", part.tensors, part.parameters, part.bytes, types.join(", "));
    println!("{}", line.trim_end());
}

/// Whatever of these `evop.json` has.
fn print_provenance(provenance: &Value) {
    const FIELDS: [(&str, &str); 12] = [
        ("pruned from", "/parent/model"),
        ("its tensors' SHA-256", "/parent/sha256"),
        ("strategy", "/strategy"),
        ("space", "/space"),
        ("budgets", "/budgets"),
        ("compensation", "/compensation"),
        ("seed", "/seed"),
        ("calibration corpora", "/calibration/corpora"),
        ("vocabulary cut", "/vocabulary"),
        ("loss", "/loss"),
        ("held-out perplexity", "/held_out_perplexity"),
        ("evop", "/evop_version"),
    ];
    println!();
    for (label, pointer) in FIELDS {
        match provenance.pointer(pointer) {
            None => {}
            Some(Value::Null) if pointer == "/parent/model" => println!("{label:<22}the bundled model"),
            Some(Value::String(text)) => println!("{label:<22}{text}"),
            Some(other) => println!("{label:<22}{other}"),
        }
    }
}

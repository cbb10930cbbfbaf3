//! `evop inspect`: what a checkpoint has, layer by layer.

use super::model_args::ModelArgs;
use anyhow::Result;
use clap::Args;
use evop_model::ShapeOrigin;
use evop_pruning::report::pattern_text;
use serde_json::json;

/// Options of `evop inspect`.
#[derive(Debug, Clone, Args)]
pub struct InspectArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
pub fn run(args: &InspectArgs) -> Result<()> {
    let checkpoint = args.model.checkpoint()?;
    let config = checkpoint.config();
    let provenance: Option<serde_json::Value> =
        std::fs::read_to_string(checkpoint.path().join("evop.json")).ok().and_then(|text| serde_json::from_str(&text).ok());
    let origin = |o: ShapeOrigin| match o {
        ShapeOrigin::Global => "config",
        ShapeOrigin::PerLayerConfig => "per_layer_config",
        ShapeOrigin::BlockConfigs => "block_configs",
        ShapeOrigin::PerLayerLists => "per-layer lists",
        ShapeOrigin::Tensors => "tensors",
    };
    if args.json {
        let layers: Vec<_> = config
            .layers
            .iter()
            .map(|l| json!({ "kv_groups": l.shape.kv_groups, "group_size": l.shape.group_size, "ffn": l.shape.ffn, "from": origin(l.origin), "sliding_window": l.sliding_window }))
            .collect();
        let summary = json!({
            "path": checkpoint.path(), "model_type": config.architecture.model_type(), "parameters": config.parameters(),
            "block_parameters": config.block_parameters(), "kv_bytes_per_token_16bit": config.kv_bytes_per_token(2), "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size, "max_position_embeddings": config.max_position_embeddings, "layers": layers, "provenance": provenance,
        });
        println!("{summary:#}");
        return Ok(());
    }
    println!(
        "{}: {}, {:.3} M parameters ({:.3} M in blocks)",
        checkpoint.path().display(),
        config.architecture.model_type(),
        config.parameters() as f64 / 1e6,
        config.block_parameters() as f64 / 1e6
    );
    println!(
        "hidden {}, vocabulary {}, context {}, KV cache {} bytes per token (16-bit)\n",
        config.hidden_size,
        config.vocab_size,
        config.max_position_embeddings,
        config.kv_bytes_per_token(2)
    );
    let kept: Vec<bool> = config.layers.iter().flat_map(|l| [l.shape.kv_groups > 0, l.shape.ffn > 0]).collect();
    println!("{}\n", pattern_text(&kept));
    println!("{:>5}{:>11}{:>12}{:>10}  shape from", "layer", "KV groups", "group size", "MLP");
    for (i, layer) in config.layers.iter().enumerate() {
        println!("{i:>5}{:>11}{:>12}{:>10}  {}", layer.shape.kv_groups, layer.shape.group_size, layer.shape.ffn, origin(layer.origin));
    }
    if let Some(provenance) = provenance {
        println!(
            "\npruned from {} by {} in space {} at sparsity {}",
            provenance["parent"]["model"], provenance["strategy"], provenance["space"], provenance["sparsity"]
        );
    }
    Ok(())
}

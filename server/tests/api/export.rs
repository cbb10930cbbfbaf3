//! `evop export` and `evop inspect`: the commands of docs/checkpoints.md, on the bundled model.

use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

/// Runs the binary in `directory`; standard output, or the text of its refusal.
fn evop(directory: &Path, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(env!("CARGO_BIN_EXE_evop")).args(arguments).current_dir(directory).env_remove("EVOP_MODEL").output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

fn json_of(directory: &Path, arguments: &[&str]) -> Value {
    serde_json::from_str(&evop(directory, &[arguments, &["--json"]].concat()).unwrap()).unwrap()
}

fn perplexity(directory: &Path, model: &str) -> Value {
    json_of(directory, &["eval", "--model", model, "--max-characters", "3000", "--window", "64"])["perplexity"].clone()
}

#[test]
fn a_model_scores_the_same_in_every_format_and_says_what_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let (whole, narrow) = (json!({"kv_groups": 2, "ffn": 384}), json!({"kv_groups": 2, "ffn": 256}));
    let (no_mlp, no_attention, nothing) = (json!({"kv_groups": 2, "ffn": 0}), json!({"kv_groups": 0, "ffn": 128}), json!({"kv_groups": 0, "ffn": 0}));
    let genes = [&whole, &narrow, &no_mlp, &nothing, &no_attention, &whole, &whole, &whole, &whole, &whole, &whole, &narrow];
    std::fs::write(at.join("pattern.json"), json!(genes).to_string()).unwrap();

    let written = evop(at, &["export", "--pattern", "pattern.json", "--format", "hf", "--out", "pruned"]).unwrap();
    assert!(written.starts_with("pruned: hf (EvopLlamaForCausalLM)") && written.contains("note: the layers differ"), "{written}");
    evop(at, &["export", "pruned", "--format", "gguf", "--out", "same.gguf"]).unwrap();
    let nas = json_of(at, &["export", "pruned", "--format", "nemotron-nas", "--out", "pruned-nas"]);
    assert_eq!((&nas["format"], &nas["architecture"]), (&json!("nemotron-nas"), &json!("DeciLMForCausalLM")));
    evop(at, &["export", "same.gguf", "--format", "hf", "--type", "bf16", "--out", "model"]).unwrap();
    let expected = perplexity(at, "pruned");
    for model in ["same.gguf", "pruned-nas", "model"] {
        assert_eq!(perplexity(at, model), expected, "{model}");
    }
    let quantised = json_of(at, &["export", "pruned", "--format", "gguf", "--type", "q8_0", "--out", "pruned.gguf"]);
    let size = std::fs::metadata(at.join("pruned.gguf")).unwrap().len();
    assert_eq!(quantised["weight_bytes"], json!(size));
    let (exact, close) = (expected.as_f64().unwrap(), perplexity(at, "pruned.gguf").as_f64().unwrap());
    assert!((close / exact - 1.0).abs() < 0.02, "{close} for {exact}");

    let text = evop(at, &["inspect", "pruned.gguf"]).unwrap();
    for line in ["attention ███·███████", "MLP       █▅·▃██████▅", "embedding         1        524288         557056  Q8_0", "per-layer lists"]
    {
        assert!(text.contains(line), "{line:?} isn't in\n{text}");
    }
    let summary = json_of(at, &["inspect", "pruned"]);
    assert_eq!(summary["kv_bytes_per_token_16bit"], json!(10 * 2 * 2 * 32 * 2));
    assert_eq!(summary["parts"]["embedding"], json!({"tensors": 1, "parameters": 524_288, "bytes": 1_048_576, "types": {"BF16": 1_048_576}}));
    assert_eq!(summary["layers"][2], json!({"kv_groups": 2, "group_size": 2, "ffn": 0, "from": "per_layer_config", "sliding_window": null}));
    let parts = summary["parts"].as_object().unwrap().values();
    assert_eq!(summary["parameters"], json!(parts.map(|p| p["parameters"].as_u64().unwrap()).sum::<u64>()));
}

#[test]
fn what_cant_be_exported_is_refused_with_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    std::fs::write(at.join("pattern.json"), json!(vec![json!({"kv_groups": 1, "ffn": 384}); 3]).to_string()).unwrap();
    std::fs::create_dir(at.join("taken")).unwrap();
    std::fs::write(at.join("taken/config.json"), "{}").unwrap();
    for (arguments, parts) in [
        (&["--format", "onnx", "--out", "x"][..], &["expected one of hf, nemotron-nas, gguf"][..]),
        (&["--format", "hf", "--type", "q3_k", "--out", "x"], &["expected one of f32, f16, bf16, q8_0, q4_k"]),
        (&["--format", "hf", "--type", "q8_0", "--out", "x"], &["q8_0 is a type of GGUF files", "--format gguf"]),
        (&["--format", "hf", "--out", "x.gguf"], &["x.gguf is a name of a GGUF file"]),
        (&["--format", "hf", "--out", "taken"], &["taken holds a config.json already", "--out"]),
        (&["--format", "hf", "--out", "x", "--pattern", "pattern.json"], &["pattern.json", "expected 12 layers, found 3"]),
        (&["--format", "hf", "--out", "x", "--pattern", "taken/config.json"], &["config.json", "expected a list of"]),
        (&["nowhere/", "--format", "hf", "--out", "x"], &["no such directory: nowhere/"]),
    ] {
        let error = evop(at, &[&["export"], arguments].concat()).unwrap_err();
        for part in parts {
            assert!(error.contains(part), "{part:?} isn't in {error:?}");
        }
        assert!(!at.join("x").exists() && !at.join("x.gguf").exists());
    }
}

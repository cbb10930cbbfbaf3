//! Perplexity against transformers' (tests/goldens/make_smollm2_goldens.py).

use crate::setting::{book, root, tiny};
use evop_model::{Checkpoint, DType, Device};
use evop_pruning::eval::perplexity;
use serde_json::Value;
use std::path::PathBuf;

fn golden(name: &str) -> Value {
    let text = std::fs::read_to_string(root().join("tests/goldens").join(name)).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["perplexity"].clone()
}

/// Equal to four digits and then some.
fn check(checkpoint: &Checkpoint, expected: &Value) {
    let decoder = checkpoint.decoder(&Device::Cpu, DType::F32).unwrap();
    let number = |name: &str| expected[name].as_u64().unwrap() as usize;
    let tokens = checkpoint.encode(&book("held-out.txt.gz", number("characters")), false).unwrap();
    assert_eq!(tokens.len(), number("tokens"));
    let found = perplexity(&decoder, &tokens, number("window"), |_, _| {}).unwrap();
    assert_eq!(found.windows, number("windows"));
    let reference = expected["ppl"].as_f64().unwrap();
    assert!((found.perplexity / reference - 1.0).abs() < 1e-5, "{} against transformers' {reference}", found.perplexity);
}

#[test]
fn the_bundled_models_perplexity_is_that_of_transformers() {
    let (checkpoint, _) = tiny();
    let windows = golden("tiny.json");
    let all: Vec<&Value> = windows.as_object().unwrap().values().collect();
    assert!(all.len() >= 2);
    for expected in all {
        check(&checkpoint, expected);
    }
}

#[test]
fn smollm2s_perplexity_is_that_of_transformers() {
    let directory = std::env::var_os("EVOP_SMOLLM2").map_or_else(|| root().join("target/models/smollm2"), PathBuf::from);
    let gguf = directory.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    if !gguf.exists() {
        println!("skipped: {} is not there; fetch it with tests/fetch-smollm2.sh target/models/smollm2", gguf.display());
        return;
    }
    check(&Checkpoint::open(&gguf).unwrap(), &golden("smollm2.json")["gguf"]);
    if directory.join("config.json").exists() {
        check(&Checkpoint::open(&directory).unwrap(), &golden("smollm2.json")["bf16"]);
    }
}

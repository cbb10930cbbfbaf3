//! Greedy tokens of real models, with a cache, against transformers' (`tests/goldens/make_smollm2_goldens.py`).

use evop_model::{Checkpoint, DType, Device, FixedCache, Span};
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};

const GGUF: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn golden(name: &str) -> Value {
    let path = root().join("tests/goldens").join(name);
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

/// Encodes every golden prompt and continues those that have `key`.
fn check(checkpoint: &Checkpoint, golden: &Value, key: &str) {
    let decoder = checkpoint.decoder(&Device::Cpu, DType::F32).unwrap();
    let chats = golden["chats"].as_array().unwrap();
    assert_eq!(chats.len(), 3);
    for case in chats.iter().chain([&golden["plain"]]) {
        let text = case["text"].as_str().or(case["prompt"].as_str()).unwrap();
        let prompt = checkpoint.encode(text, false).unwrap();
        assert_eq!(prompt, ids(&case["prompt_ids"]), "{text:?}");
        let expected = ids(&case[key]["ids"]);
        assert!(expected.len() >= 100);
        let mut cache = FixedCache::new(decoder.config(), DType::F32, &Device::Cpu, &[prompt.len() + expected.len()]).unwrap();
        let (mut past, mut next, mut path) = (0, prompt, Vec::new());
        while path.len() < expected.len() {
            let batch = decoder.batch(&[Span { past, len: next.len() }]).unwrap();
            let hidden = decoder.forward(&next, &batch, &mut cache.of([0])).unwrap();
            let last = hidden.narrow(0, next.len() - 1, 1).unwrap();
            let best = decoder.logits(&last).unwrap().argmax(1).unwrap().to_vec1::<u32>().unwrap()[0];
            past += next.len();
            next = vec![best];
            path.push(best);
        }
        assert_eq!(path, expected, "{}: {text:?}", checkpoint.path().display());
    }
}

#[test]
fn the_bundled_model_continues_as_transformers_does() {
    check(&Checkpoint::open(&root().join("models/tiny")).unwrap(), &golden("tiny.json"), "greedy_bf16");
}

#[test]
fn smollm2_continues_as_transformers_does() {
    let named = std::env::var_os("EVOP_SMOLLM2").filter(|v| !v.is_empty()).map(PathBuf::from);
    let directory = named.clone().unwrap_or_else(|| root().join("target/models/smollm2"));
    let file = directory.join(GGUF);
    if !file.exists() {
        assert!(named.is_none(), "EVOP_SMOLLM2 names {}, which doesn't hold {GGUF}", directory.display());
        // not by eprintln!, which the test harness swallows
        let _ = writeln!(
            std::io::stderr(),
            "SKIPPED smollm2_continues_as_transformers_does: {GGUF} isn't there; fetch it by `tests/fetch-smollm2.sh target/models/smollm2` (98 MB), or name its directory in EVOP_SMOLLM2"
        );
        return;
    }
    let golden = golden("smollm2.json");
    check(&Checkpoint::open(&file).unwrap(), &golden, "greedy_gguf");
    // the Hugging Face directory, bf16, where it lies beside the file
    if directory.join("model.safetensors").exists() {
        check(&Checkpoint::open(&directory).unwrap(), &golden, "greedy_bf16");
    }
}

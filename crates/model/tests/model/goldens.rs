//! Our logits against Hugging Face transformers' (f32, eager attention) for every family, RoPE kind, bias and window, and for GGUF.
//! `tests/goldens/make_model_goldens.py` and `make_gguf_goldens.py` made the files.

use candle_core::safetensors::load;
use evop_model::{Checkpoint, Config, DType, Decoder, Device, NoCache, Source, Span, Tensor, open_weights};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens")
}

fn logits(decoder: &Decoder, ids: &[u32]) -> Vec<Vec<f32>> {
    let batch = decoder.batch(&[Span::prompt(ids.len())]).unwrap();
    let hidden = decoder.forward(ids, &batch, &mut NoCache).unwrap();
    decoder.logits(&hidden).unwrap().to_vec2().unwrap()
}

/// The largest difference over all lengths of a case.
fn difference(decoder: &Decoder, golden: &HashMap<String, Tensor>) -> f32 {
    let mut worst = 0f32;
    for length in [1, 7, 130] {
        let ids: Vec<i64> = golden[&format!("ids_{length}")].flatten_all().unwrap().to_vec1().unwrap();
        let ids: Vec<u32> = ids.iter().map(|i| *i as u32).collect();
        let expected: Vec<Vec<f32>> = golden[&format!("logits_{length}")].to_vec2().unwrap();
        let rows: Vec<usize> = match golden.get(&format!("rows_{length}")) {
            Some(rows) => rows.to_vec1::<i64>().unwrap().iter().map(|r| *r as usize).collect(),
            None => (0..expected.len()).collect(),
        };
        let ours = logits(decoder, &ids);
        assert_eq!(ours.len(), length);
        for (row, expected) in rows.iter().zip(&expected) {
            assert_eq!(ours[*row].len(), expected.len());
            for (a, b) in ours[*row].iter().zip(expected) {
                assert!(a.is_finite());
                worst = worst.max((a - b).abs());
            }
        }
    }
    worst
}

#[test]
fn every_family_gives_the_logits_of_transformers() {
    let mut cases = 0;
    let mut failed = Vec::new();
    for entry in std::fs::read_dir(goldens()).unwrap() {
        let directory = entry.unwrap().path();
        if !directory.join("config.json").exists() {
            continue;
        }
        let name = directory.file_name().unwrap().to_string_lossy().into_owned();
        let opened: Result<(Config, Arc<dyn Source>), _> = open_weights(&directory);
        if name == "opt_350m" {
            assert!(opened.unwrap_err().to_string().contains("word_embed_proj_dim"));
            continue;
        }
        let (config, source) = opened.unwrap_or_else(|e| panic!("{name}: {e}"));
        let decoder = Decoder::load(&config, source.as_ref(), &Device::Cpu, DType::F32).unwrap_or_else(|e| panic!("{name}: {e}"));
        let golden = load(directory.join("golden.safetensors"), &Device::Cpu).unwrap();
        let worst = difference(&decoder, &golden);
        println!("{name}: max abs difference {worst:.2e}");
        if worst >= 2e-4 {
            failed.push((name, worst));
        }
        cases += 1;
    }
    assert!(cases >= 25, "only {cases} golden cases were found");
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn gguf_files_give_the_logits_and_tokens_of_the_references() {
    let mut cases = 0;
    let mut failed = Vec::new();
    for entry in std::fs::read_dir(goldens()).unwrap() {
        let directory = entry.unwrap().path();
        let file = directory.join("model.gguf");
        if !file.exists() {
            continue;
        }
        let checkpoint = Checkpoint::open(&file).unwrap_or_else(|e| panic!("{e}"));
        let decoder = checkpoint.decoder(&Device::Cpu, DType::F32).unwrap_or_else(|e| panic!("{e}"));
        let golden = load(directory.join("golden.safetensors"), &Device::Cpu).unwrap();
        let worst = difference(&decoder, &golden);
        println!("{}: max abs difference {worst:.2e}", file.display());
        if worst >= 2e-4 {
            failed.push(format!("{}: {worst:.2e}", file.display()));
        }
        let tokens: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(directory.join("tokens.json")).unwrap()).unwrap();
        let pairs = tokens["cases"].as_array().or(tokens.as_array()).expect("a list of texts with their ids");
        for case in pairs {
            let text = case["text"].as_str().unwrap();
            let expected: Vec<u32> = case["ids"].as_array().unwrap().iter().map(|i| i.as_u64().unwrap() as u32).collect();
            let special = case["add_special_tokens"].as_bool().unwrap_or(false);
            let ours = checkpoint.encode(text, special).unwrap();
            if ours != expected {
                failed.push(format!("{}: {text:?}: {ours:?} for {expected:?}", directory.display()));
            }
        }
        cases += 1;
    }
    assert!(cases >= 4, "only {cases} GGUF cases were found");
    assert!(failed.is_empty(), "{failed:#?}");
}

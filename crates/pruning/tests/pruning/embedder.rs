//! The sentence-transformers embedder against transformers, where the model has been fetched.

use crate::setting::{book, corpus, root, tiny};
use evop_model::Device;
use evop_pruning::calibration::{Calibration, CalibrationOptions};
use evop_pruning::{Embedder, HiddenStates, SentenceTransformer};

#[test]
fn minilm_embeds_as_in_transformers_and_samples_a_calibration_set() {
    let directory = std::env::var_os("EVOP_MINILM").map_or_else(|| root().join("target/models/minilm"), Into::into);
    if !directory.join("model.safetensors").exists() {
        println!("skipped: {} is not there; fetch it with tests/fetch-minilm.sh target/models/minilm", directory.display());
        return;
    }
    let embedder = SentenceTransformer::open(&directory, &Device::Cpu).unwrap();
    let golden: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(root().join("tests/goldens/minilm.json")).unwrap()).unwrap();
    for case in golden.as_array().unwrap() {
        let vector = embedder.embed(&[case["text"].as_str().unwrap()], &mut |_| {}).unwrap().remove(0);
        assert_eq!(vector.len(), 384);
        for (ours, expected) in vector.iter().zip(case["first"].as_array().unwrap()) {
            assert!((ours - expected.as_f64().unwrap()).abs() < 2e-4, "{ours} {expected}");
        }
    }
    let (checkpoint, _) = tiny();
    let options = CalibrationOptions { sequences: 5, sequence_length: 100, ..CalibrationOptions::paper() };
    let calibration = Calibration::sample(&corpus(&book("calibration.txt.gz", 150_000)), checkpoint.tokenizer(), &embedder, &options, |_| {}).unwrap();
    assert_eq!(calibration.cluster_sizes.len(), 5);
    assert!(calibration.embedder.contains("BERT"));
}

#[test]
fn the_models_own_hidden_states_cluster_a_corpus_the_same_way_twice() {
    let (checkpoint, decoder) = tiny();
    let embedder = HiddenStates { decoder: &decoder, tokenizer: checkpoint.tokenizer(), max_tokens: 64 };
    let options = CalibrationOptions { sequences: 4, sequence_length: 200, ..Default::default() };
    let sample = || Calibration::sample(&corpus(&book("calibration.txt.gz", 200_000)), checkpoint.tokenizer(), &embedder, &options, |_| {}).unwrap();
    let calibration = sample();
    assert_eq!(calibration, sample());
    assert_eq!(calibration.sequences.len(), 4);
    assert!(calibration.sequences.iter().all(|s| s.tokens.len() == 200));
    assert!(calibration.cluster_sizes.iter().all(|n| *n > 0));
    let used = |sequences: &[evop_pruning::calibration::Sequence]| -> std::collections::HashSet<usize> {
        sequences.iter().flat_map(|s| s.chunks.iter().map(|c| c.chunk)).collect()
    };
    let seen = used(&calibration.statistics);
    assert!(used(&calibration.sequences).is_subset(&seen));
    let held_out = used(&calibration.held_out);
    assert!(!held_out.is_empty() && held_out.is_disjoint(&seen), "held-out chunks are never calibrated on");
    let clusters: std::collections::HashSet<usize> = calibration.sequences.iter().map(|s| s.cluster).collect();
    assert_eq!(clusters.len(), 4, "every sequence from another cluster: {clusters:?}");
    assert_eq!(calibration.picture.len(), calibration.corpora[0].chunks.min(1_024));
}

#[test]
fn a_text_lies_at_the_same_place_as_tokens_alone_and_beside_others_and_its_beginning_counts() {
    let (checkpoint, decoder) = tiny();
    let embedder = HiddenStates::new(&decoder, checkpoint.tokenizer());
    let long = "It was a dark night, and the captain said that he had never seen the like of it. ".repeat(20);
    let chunks = ["Once upon a time", long.as_str(), " "];
    let together = embedder.embed(&chunks, &mut |_| ()).unwrap();
    let tokens = |text: &str| checkpoint.encode(text, false).unwrap();
    for (chunk, vector) in chunks.iter().zip(&together) {
        assert_eq!(embedder.vectors(&[tokens(chunk)], &mut |_| ()).unwrap()[0], *vector, "{chunk:?}");
    }
    assert_eq!(embedder.vectors(&[tokens(&long)[..128].to_vec()], &mut |_| ()).unwrap()[0], together[1]);
    let origin = embedder.vectors(&[Vec::new()], &mut |_| ()).unwrap();
    assert!(origin[0].len() == decoder.config().hidden_size && origin[0].iter().all(|v| *v == 0.0));
}

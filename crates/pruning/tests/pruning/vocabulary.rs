//! Smaller vocabularies: the bundled model, an untied one, and GGUF files of every kind of tokenizer that can be cut.

use crate::setting::{book, corpus, root};
use crate::small_models;
use evop_model::{Checkpoint, DType, Device, Gene, NoCache, Pattern, Span, Tokenizer};
use evop_pruning::calibration::Corpus;
use evop_pruning::checkpoint::{Contents, Format};
use evop_pruning::vocabulary::{SmallerVocabulary, VocabularyOptions};
use serde_json::{Value, json};
use std::path::Path;

const UNSEEN: [&str; 4] = ["日本語 привет 🙂👍🏽", "Zyxwvutsrq Qqqq @#€ \u{1F0A1}", "  \t\n\r\n ", "x\u{a0}¼ ½ ﬀ ﷺ"];

fn tiny() -> Checkpoint {
    Checkpoint::open(&root().join("models/tiny")).unwrap()
}

fn gguf(name: &str) -> Checkpoint {
    Checkpoint::open(&root().join("crates/model/tests/goldens").join(name).join("model.gguf")).unwrap()
}

/// The bundled books' beginning as one document a paragraph.
fn paragraphs(characters: usize) -> Vec<Corpus> {
    let documents = book("calibration.txt.gz", characters).split("\n\n").map(str::to_string).collect();
    vec![Corpus { label: "books".into(), documents }]
}

fn cut<'a>(parent: &'a Checkpoint, corpora: &[Corpus]) -> SmallerVocabulary<'a> {
    SmallerVocabulary::cut(parent, corpora, &VocabularyOptions::default()).unwrap_or_else(|e| panic!("{e}"))
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode_fast(text, true).unwrap().get_ids().to_vec()
}

/// The old id of every new one.
fn old_ids(smaller: &SmallerVocabulary<'_>, parent: &Checkpoint) -> Vec<u32> {
    let token = |id: usize| smaller.tokenizer().id_to_token(id as u32).unwrap_or_else(|| panic!("no token has id {id}"));
    (0..smaller.report().after).map(|id| parent.tokenizer().token_to_id(&token(id)).unwrap()).collect()
}

/// What comes back of a text.
fn round_trip(tokenizer: &Tokenizer, text: &str) -> String {
    let ids = tokenizer.encode_fast(text, false).unwrap();
    tokenizer.decode(ids.get_ids(), false).unwrap()
}

fn logits(checkpoint: &Checkpoint, tokens: &[u32]) -> Vec<Vec<f32>> {
    let decoder = checkpoint.decoder(&Device::Cpu, DType::F32).unwrap();
    let batch = decoder.batch(&[Span::prompt(tokens.len())]).unwrap();
    decoder.logits(&decoder.forward(tokens, &batch, &mut NoCache).unwrap()).unwrap().to_vec2::<f32>().unwrap()
}

/// Writes and opens the smaller checkpoint, and holds the logits of a text's tokens against the parent's, bit for bit.
fn written(smaller: &SmallerVocabulary<'_>, parent: &Checkpoint, text: &str) -> Checkpoint {
    let directory = tempfile::tempdir().unwrap();
    smaller.write(Some("parent"), None, Format::Hf, directory.path()).unwrap();
    let child = Checkpoint::open(directory.path()).unwrap_or_else(|e| panic!("{e}"));
    let (old, new): (Vec<u32>, Vec<u32>) = (ids(parent.tokenizer(), text), ids(child.tokenizer(), text));
    let length = old.len().min(64);
    assert!(length > 20);
    let kept = old_ids(smaller, parent);
    let expected: Vec<Vec<u32>> = logits(parent, &old[..length]).iter().map(|row| kept.iter().map(|id| row[*id as usize].to_bits()).collect()).collect();
    let found: Vec<Vec<u32>> = logits(&child, &new[..length]).iter().map(|row| row.iter().map(|l| l.to_bits()).collect()).collect();
    assert!(expected == found, "logits differ");
    child
}

#[test]
fn every_document_of_the_corpus_has_its_renumbered_tokens_and_its_text() {
    let parent = tiny();
    let corpora = paragraphs(100_000);
    let smaller = cut(&parent, &corpora);
    let report = smaller.report();
    assert!(report.after < 3_600 && report.before == 4_096, "{report:?}");
    assert_eq!(report.after, report.fixed + report.seen + report.merged_from);
    assert_eq!(report.corpora[0].before, report.corpora[0].after);
    let kept = old_ids(&smaller, &parent);
    let number = |old: &u32| kept.binary_search(old).unwrap() as u32;
    for text in &corpora[0].documents {
        let old = ids(parent.tokenizer(), text);
        assert_eq!(ids(smaller.tokenizer(), text), old.iter().map(number).collect::<Vec<_>>(), "{text:?}");
        assert_eq!(&round_trip(smaller.tokenizer(), text), text);
    }
    for text in UNSEEN {
        assert_eq!(round_trip(smaller.tokenizer(), text), text);
    }
}

#[test]
fn logits_of_the_kept_tokens_are_the_parents_bit_for_bit() {
    let corpora = paragraphs(40_000);
    let text = &corpora[0].documents.iter().find(|d| d.len() > 300).unwrap();
    let parent = tiny();
    let smaller = cut(&parent, &corpora);
    let child = written(&smaller, &parent, text);
    assert_eq!(child.config().vocab_size, smaller.report().after);
    assert_eq!(child.config().parameters(), parent.config().parameters() - (4_096 - smaller.report().after) * 128);
    assert_eq!(child.provenance().unwrap()["vocabulary"]["after"], json!(smaller.report().after));

    let directory = tempfile::tempdir().unwrap();
    let untied = small_models::model(&json!({"model_type": "llama", "bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 4000}), directory.path());
    let smaller = cut(&untied, &corpora);
    let child = written(&smaller, &untied, text);
    assert_eq!((child.config().bos_token_id, &child.config().eos_token_ids[..]), (Some(1), &[2, 0][..]));
    let pad = child.config().json["pad_token_id"].as_u64().unwrap();
    assert_eq!(old_ids(&smaller, &untied)[pad as usize], 4000);
}

#[test]
fn every_kind_of_bpe_is_cut_and_keeps_its_rules() {
    let text = "The old man said that he would not go there again. \"Don't,\" he said, \"I'll go.\" 12345, and the zebra and zebra. é";
    for name in ["gguf_llama_spm_linear", "gguf_llama_llama3", "gguf_llama_smollm", "gguf_qwen2", "gguf_qwen3"] {
        let parent = gguf(name);
        let smaller = cut(&parent, &corpus(text));
        assert!(smaller.report().after < smaller.report().before, "{name}: {:?}", smaller.report());
        let child = written(&smaller, &parent, text);
        let named = |checkpoint: &Checkpoint, ids: &[u32]| ids.iter().map(|id| checkpoint.tokenizer().id_to_token(*id).unwrap()).collect::<Vec<_>>();
        let of = |c: &Checkpoint| (named(c, &c.generation().eos_token_ids), named(c, c.config().bos_token_id.as_slice()), named(c, &ids(c.tokenizer(), "")));
        assert_eq!(of(&child), of(&parent), "{name}");
        for text in UNSEEN {
            assert_eq!(round_trip(child.tokenizer(), text), round_trip(parent.tokenizer(), text), "{name}");
        }
    }
}

#[test]
fn without_rare_tokens_a_text_is_longer_and_the_same() {
    let parent = tiny();
    let corpora = paragraphs(100_000);
    let smaller = SmallerVocabulary::cut(&parent, &corpora, &VocabularyOptions { min_count: 20, ..Default::default() }).unwrap();
    let tokens = &smaller.report().corpora[0];
    assert!(smaller.report().after < 1_500 && tokens.after > tokens.before, "{:?}", smaller.report());
    assert!(corpora[0].documents.iter().all(|text| &round_trip(smaller.tokenizer(), text) == text));
}

#[test]
fn a_vocabulary_is_filled_up_with_the_tokens_learnt_first() {
    let parent = tiny();
    let smaller = SmallerVocabulary::cut(&parent, &corpus("A word."), &VocabularyOptions { at_least: 1_000, multiple: 64, ..Default::default() }).unwrap();
    assert_eq!(smaller.report().after, 1_024);
    let the = parent.tokenizer().token_to_id("Ġthe").unwrap();
    assert!(old_ids(&smaller, &parent).contains(&the));
}

#[test]
fn a_pruned_parent_stays_pruned_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path().join("pruned");
    let whole = tiny();
    let genes = |l: usize| Gene { kv_groups: if l == 3 { 0 } else { 2 }, ffn: if l.is_multiple_of(2) { 384 } else { 128 } };
    let pattern = Pattern::new((0..12).map(genes).collect(), whole.config()).unwrap();
    Contents::of(&whole).write_pattern(&pattern, Format::Hf, &at).unwrap();
    std::fs::write(at.join("evop.json"), json!({"pattern": [], "strategy": "evop", "parameters": {"dense": 9, "pruned": 8}}).to_string()).unwrap();
    let parent = Checkpoint::open(&at).unwrap();
    let text = book("calibration.txt.gz", 5_000);
    let smaller = cut(&parent, &corpus(&text));
    let child = written(&smaller, &parent, &text);
    assert_eq!(child.config().layers, parent.config().layers);
    let provenance = child.provenance().unwrap();
    assert_eq!((&provenance["strategy"], &provenance["parameters"]["dense"]), (&json!("evop"), &json!(9)));
    assert_eq!(provenance["parameters"]["pruned"], json!(child.config().parameters()));
    assert_eq!(provenance["vocabulary"]["parent"]["model"], "parent");
}

/// The refusal of the bundled model with another tokenizer.
fn refusal(directory: &Path, change: impl FnOnce(&mut Value)) -> String {
    let path = directory.join("tokenizer.json");
    small_models::write(&json!({"model_type": "llama"}), 1, directory);
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(&path, json.to_string()).unwrap();
    let parent = Checkpoint::open(directory).unwrap();
    SmallerVocabulary::cut(&parent, &corpus("Some text."), &VocabularyOptions::default()).unwrap_err().to_string()
}

#[test]
fn tokenizers_that_cant_be_cut_are_refused_with_the_reason() {
    let directory = tempfile::tempdir().unwrap();
    let unigram = json!({"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": false});
    let word_piece = json!({"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 9, "vocab": {"a": 0}});
    type Damage = Box<dyn FnOnce(&mut Value)>;
    let cases: [(Damage, &str); 5] = [
        (Box::new(|json| json["model"] = unigram), "its model is Unigram: expected byte-level BPE or BPE with byte fallback"),
        (Box::new(|json| json["model"] = word_piece), "its model is WordPiece"),
        (Box::new(|json| json["model"]["dropout"] = json!(0.5)), "`dropout`"),
        (Box::new(|json| json["pre_tokenizer"] = json!({"type": "Whitespace"})), "neither byte-level nor has it a byte fallback"),
        (Box::new(|json| json["model"]["byte_fallback"] = json!(true)), "not all of <0x00> to <0xFF>"),
    ];
    for (change, part) in cases {
        let error = refusal(directory.path(), change);
        assert!(error.contains("tokenizer.json: ") && error.contains(part), "{error}");
    }
    let error = refusal(directory.path(), |json| {
        let added = json!({"id": 4096, "content": "<x>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
        json["added_tokens"].as_array_mut().unwrap().push(added);
    });
    assert!(error.contains(r#"token "<x>" has id 4096, the embedding has 4096 rows"#), "{error}");
}

//! Vocabulary pruning, the first stage of Flab-Pruner (arXiv 2412.15921): a model keeps the tokens that its texts need.
//!
//! Kept are the tokens that corpora have, the tokens that these are merged from, all bytes and all special tokens. They get new ids in their old order;
//! the embedding and the head keep their rows; merges that lack a part or their result go. BPE always applies the earliest merge that it can, and for a
//! kept token every merge on the way to it is kept: so the corpora are tokenised exactly as before, which is checked on every document before
//! anything is written. The hidden states of such a text are the same, and the logits of the kept tokens too. Text that the corpora don't have takes
//! more tokens, down to single bytes, and loses nothing.

mod bpe;
mod numbers;
mod proof;
mod selection;
mod source;

use crate::calibration::Corpus;
use crate::checkpoint::{Contents, Target, Written, fingerprint};
use crate::{Error, Result};
use bpe::{Bpe, plain_bpe};
use evop_model::{Checkpoint, Config, GenerationConfig, TensorNames};
use numbers::{Numbers, id_fields, named_tokens, number, visit_tokenizer_ids};
use proof::{Proof, encode};
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value, json};
use source::KeptRows;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

/// The file that holds the tokenizer.
const TOKENIZER: &str = "tokenizer.json";

/// How many tokens to keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VocabularyOptions {
    /// How often the corpora must have a token; above 1, documents with rarer tokens take more of them than before.
    pub min_count: u64,
    /// Fill the vocabulary up to this size with the earliest merges.
    pub at_least: usize,
    /// Fill it up to a multiple of this.
    pub multiple: usize,
}

impl Default for VocabularyOptions {
    /// Every token of the corpora and no others.
    fn default() -> Self {
        Self { min_count: 1, at_least: 0, multiple: 1 }
    }
}

/// A corpus before and after.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CorpusTokens {
    /// What it is called.
    pub label: String,
    /// Its documents.
    pub documents: usize,
    /// Its tokens before, special tokens around documents included,
    pub before: usize,
    /// and after: the same number where no token of it is gone.
    pub after: usize,
}

/// What was kept, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct VocabularyReport {
    /// Rows of the embedding before,
    pub before: usize,
    /// and after.
    pub after: usize,
    /// Kept: bytes and special tokens,
    pub fixed: usize,
    /// others that the corpora have,
    pub seen: usize,
    /// others that these are merged from,
    pub merged_from: usize,
    /// others to fill the vocabulary up.
    pub filled: usize,
    /// The corpora, each as it was checked.
    pub corpora: Vec<CorpusTokens>,
    /// All parameters before and after.
    pub parameters: (usize, usize),
    /// What was left out beside tokens.
    pub notes: Vec<String>,
}

/// A checkpoint with a part of its vocabulary.
#[derive(Debug)]
pub struct SmallerVocabulary<'a> {
    parent: &'a Checkpoint,
    /// The old id of every new one.
    kept: Vec<u32>,
    config: Config,
    tokenizer: Tokenizer,
    companions: Vec<(String, Vec<u8>)>,
    generation: GenerationConfig,
    report: VocabularyReport,
}

impl<'a> SmallerVocabulary<'a> {
    /// Cuts the vocabulary of `parent` down to what `corpora` need, and checks that each document of them is tokenised as before.
    ///
    /// # Errors
    /// [`evop_model::Error::Tokenizer`] for a tokenizer other than byte-level BPE or BPE with byte fallback, and for a document that would be tokenised
    /// otherwise; [`Error::Option`] for more tokens than there are.
    pub fn cut(parent: &'a Checkpoint, corpora: &[Corpus], options: &VocabularyOptions) -> Result<Self> {
        let wrong = |message: String| tokenizer_error(parent, message);
        let old = parent.tokenizer();
        let model = plain_bpe(old.get_model()).map_err(wrong)?;
        let json = tokenizer_json(parent)?;
        let bpe = Bpe::new(&json["model"]).map_err(wrong)?;
        let mut fixed = special_ids(parent, &json)?;
        fixed.extend(bpe.alphabet(model, &json).map_err(wrong)?);
        let encoded = encode_all(old, corpora).map_err(wrong)?;
        let selection = selection::select(&bpe, &fixed, &counts(&encoded), options)?;
        let rows = parent.config().vocab_size;
        if let Some(id) = selection.kept.last().filter(|id| **id as usize >= rows) {
            return Err(wrong(format!("token {:?} has id {id}, the embedding has {rows} rows", old.id_to_token(*id).unwrap_or_default())));
        }

        let numbers = Numbers::new(&selection.kept);
        let (companions, mut notes) = companions(parent, &numbers, json)?;
        let tokenizer = new_tokenizer(&companions).map_err(wrong)?;
        let proof = Proof { old, new: &tokenizer, numbers: &numbers };
        proof.of_tokens(&selection.kept).map_err(wrong)?;
        let corpora = proof.of_corpora(corpora, &encoded).map_err(wrong)?;

        let config = config(parent.config(), &numbers, selection.kept.len(), &mut notes);
        let eos_token_ids = parent.generation().eos_token_ids.iter().filter_map(|id| numbers.of(*id)).collect();
        let generation = GenerationConfig { eos_token_ids, ..parent.generation().clone() };
        let report = VocabularyReport {
            before: rows,
            after: selection.kept.len(),
            fixed: selection.fixed,
            seen: selection.seen,
            merged_from: selection.merged_from,
            filled: selection.filled,
            corpora,
            parameters: (parent.config().parameters(), config.parameters()),
            notes,
        };
        Ok(Self { parent, kept: selection.kept, config, tokenizer, companions, generation, report })
    }

    /// What was kept, and why.
    pub fn report(&self) -> &VocabularyReport {
        &self.report
    }

    /// The new tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Writes the checkpoint into the directory `out`; `model` (`None`: the bundled one) and `revision` are what its `evop.json` says
    /// of where it came from.
    ///
    /// # Errors
    /// As [`Contents::write`].
    pub fn write(&self, model: Option<&str>, revision: Option<&str>, target: impl Into<Target>, out: &Path) -> Result<Written> {
        let names = TensorNames::of(self.config.architecture);
        let source = KeptRows { parent: self.parent.source().as_ref(), names, rows: &self.kept };
        let provenance = self.provenance(model, revision)?;
        let contents = Contents {
            companions: &self.companions,
            tokenizer: &self.tokenizer,
            generation: &self.generation,
            ..Contents::of(self.parent).around(&self.config, &source)
        };
        let mut written = Contents { provenance: Some(&provenance), ..contents }.write(target, out)?;
        written.notes.extend_from_slice(&self.report.notes);
        Ok(written)
    }

    /// A checkpoint that was pruned before goes on saying of what, and how.
    fn provenance(&self, model: Option<&str>, revision: Option<&str>) -> Result<Value> {
        let sha256 = fingerprint(self.parent.source().as_ref())?;
        let parent = json!({ "model": model, "revision": revision, "sha256": sha256 });
        let mut provenance = self.parent.provenance().and_then(Value::as_object).cloned().unwrap_or_else(|| {
            let own = json!({ "format": 2, "evop_version": env!("CARGO_PKG_VERSION"), "parent": parent });
            own.as_object().cloned().unwrap_or_default()
        });
        let (before, after) = self.report.parameters;
        let dense = provenance.get("parameters").and_then(|p| p.get("dense")).cloned().unwrap_or(json!(before));
        provenance.insert("parameters".into(), json!({ "dense": dense, "pruned": after }));
        let entry = json!({ "before": self.report.before, "after": self.report.after, "corpora": self.report.corpora, "parent": parent });
        provenance.insert("vocabulary".into(), entry);
        Ok(Value::Object(provenance))
    }
}

/// Errors about the tokenizer name its file, a GGUF's the GGUF.
fn tokenizer_error(parent: &Checkpoint, message: String) -> Error {
    let path = if parent.path().extension().is_some_and(|e| e == "gguf") { parent.path().to_path_buf() } else { parent.path().join(TOKENIZER) };
    evop_model::Error::Tokenizer { path, message }.into()
}

/// A companion as JSON, `None` if the checkpoint has none of that name.
fn json_companion(parent: &Checkpoint, name: &str) -> Result<Option<Value>> {
    let Some((_, bytes)) = parent.tokenizer_files().iter().find(|(file, _)| file == name) else { return Ok(None) };
    parse(bytes, parent.path().join(name)).map(Some)
}

fn parse(bytes: &[u8], path: PathBuf) -> Result<Value> {
    serde_json::from_slice(bytes).map_err(|e| evop_model::Error::Config { path, message: format!("not valid JSON: {e}") }.into())
}

fn tokenizer_json(parent: &Checkpoint) -> Result<Value> {
    json_companion(parent, TOKENIZER)?.ok_or_else(|| tokenizer_error(parent, "expected a tokenizer.json".into()))
}

/// The ids of added and named tokens, and of all that the tokenizer's and the model's files name by id.
fn special_ids(parent: &Checkpoint, tokenizer: &Value) -> Result<BTreeSet<u32>> {
    let old = parent.tokenizer();
    let mut ids: BTreeSet<u32> = old.get_added_tokens_decoder().into_keys().collect();
    visit_tokenizer_ids(&mut tokenizer.clone(), &mut |id| ids.extend(number(id)));
    ids.extend(tokenizer.pointer("/model/unk_token").and_then(Value::as_str).and_then(|token| old.token_to_id(token)));
    let mut files = vec![parent.config().json.clone()];
    for name in ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"] {
        let json = json_companion(parent, name)?.as_ref().and_then(Value::as_object).cloned().unwrap_or_default();
        ids.extend(named_tokens(&json).iter().filter_map(|token| old.token_to_id(token)));
        files.push(json);
    }
    for (field, value) in files.iter_mut().flat_map(id_fields) {
        // what must not be said needn't be kept
        if !field.ends_with("suppress_tokens") {
            ids.extend(value.as_array().into_iter().flatten().chain([&*value]).filter_map(number));
        }
    }
    // an id without a token can't come out of a text
    ids.retain(|id| old.id_to_token(*id).is_some());
    Ok(ids)
}

fn encode_all(tokenizer: &Tokenizer, corpora: &[Corpus]) -> std::result::Result<Vec<Vec<Vec<u32>>>, String> {
    corpora.iter().map(|corpus| corpus.documents.par_iter().map(|text| encode(tokenizer, text)).collect()).collect()
}

/// How often the corpora have each id.
fn counts(encoded: &[Vec<Vec<u32>>]) -> Vec<u64> {
    let mut counts = Vec::new();
    for id in encoded.iter().flatten().flatten() {
        let id = *id as usize;
        if id >= counts.len() {
            counts.resize(id + 1, 0);
        }
        counts[id] += 1;
    }
    counts
}

/// A file's name and contents.
type File = (String, Vec<u8>);

/// The files beside the weights, with new ids; and notes of what isn't in them any more.
fn companions(parent: &Checkpoint, numbers: &Numbers, tokenizer: Value) -> Result<(Vec<File>, Vec<String>)> {
    let (mut companions, mut notes) = (Vec::new(), Vec::new());
    let mut tokenizer = Some(tokenizer);
    for (name, bytes) in parent.tokenizer_files() {
        let object = || -> Result<Map<String, Value>> { Ok(parse(bytes, parent.path().join(name))?.as_object().cloned().unwrap_or_default()) };
        let json = match name.as_str() {
            TOKENIZER => tokenizer.take().map(|json| numbers.tokenizer(json)),
            "tokenizer_config.json" | "generation_config.json" => {
                let mut fields = object()?;
                notes.extend(numbers.fields(&mut fields).into_iter().map(|note| format!("{name}: {note}")));
                Some(Value::Object(fields))
            }
            "added_tokens.json" => {
                let mut ids = object()?;
                numbers.values(&mut ids);
                Some(Value::Object(ids))
            }
            "vocab.json" | "merges.txt" | "tokenizer.model" => {
                notes.push(format!("{name} left out: tokenizer.json has the new vocabulary"));
                continue;
            }
            _ => None,
        };
        let bytes = json.map_or_else(|| bytes.clone(), |json| format!("{json:#}\n").into_bytes());
        companions.push((name.clone(), bytes));
    }
    Ok((companions, notes))
}

fn new_tokenizer(companions: &[(String, Vec<u8>)]) -> std::result::Result<Tokenizer, String> {
    let bytes = companions.iter().find(|(name, _)| name == TOKENIZER).map(|(_, bytes)| bytes.as_slice()).unwrap_or_default();
    let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|e| format!("its new vocabulary can't be read: {e}"))?;
    // as the old one was opened
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|e| e.to_string())?;
    Ok(tokenizer)
}

fn config(parent: &Config, numbers: &Numbers, vocab_size: usize, notes: &mut Vec<String>) -> Config {
    let mut json = parent.json.clone();
    notes.extend(numbers.fields(&mut json).into_iter().map(|note| format!("config.json: {note}")));
    json.insert("vocab_size".into(), json!(vocab_size));
    Config {
        vocab_size,
        bos_token_id: parent.bos_token_id.and_then(|id| numbers.of(id)),
        eos_token_ids: parent.eos_token_ids.iter().filter_map(|id| numbers.of(*id)).collect(),
        json,
        ..parent.clone()
    }
}

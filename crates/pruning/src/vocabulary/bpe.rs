//! The BPE model of a `tokenizer.json`: which tokens a token is merged from.

use super::numbers::number;
use serde_json::Value;
use std::collections::{HashMap, HashSet};
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// What stands for a space in SentencePiece's pieces. As bytes it wouldn't become a space again.
const SPACE: &str = "▁";

/// Vocabulary and merges by id, added tokens left out.
#[derive(Debug)]
pub(super) struct Bpe {
    ids: HashMap<String, u32>,
    texts: HashMap<u32, String>,
    /// (left, right) -> (rank, result).
    merges: HashMap<(u32, u32), (usize, u32)>,
    /// Results of merges, the earliest (the most frequent in what the tokenizer was trained on) first.
    results: Vec<u32>,
}

impl Bpe {
    /// Reads the `model` of a tokenizer.json.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn new(model: &Value) -> Result<Self, String> {
        let vocab = model.get("vocab").and_then(Value::as_object).ok_or("`model.vocab`: expected a map from tokens to ids")?;
        let id = |(token, id): (&String, &Value)| Some((token.clone(), number(id)?));
        let ids: HashMap<String, u32> = vocab.iter().map(id).collect::<Option<_>>().ok_or("`model.vocab`: expected ids that are whole numbers")?;
        let texts = ids.iter().map(|(token, id)| (*id, token.clone())).collect();
        let (mut merges, mut results) = (HashMap::new(), Vec::new());
        let list = model.get("merges").and_then(Value::as_array).ok_or("`model.merges`: expected a list")?;
        for (rank, merge) in list.iter().enumerate() {
            let known = merge_parts(merge).and_then(|(left, right)| Some((*ids.get(left)?, *ids.get(right)?, *ids.get(&format!("{left}{right}"))?)));
            let (left, right, result) = known.ok_or_else(|| format!("`model.merges`: expected two tokens that make a third, found {merge}"))?;
            merges.insert((left, right), (rank, result));
            results.push(result);
        }
        Ok(Self { ids, texts, merges, results })
    }

    /// All tokens that BPE goes through before it has made `id`, itself included; itself alone where no merges make it (it is an added token, or a
    /// word that is looked up whole).
    ///
    /// A token inside a word is made by the same merges as when it stands alone: none of them crosses its ends, and those within it are chosen by
    /// their rank.
    pub fn derivation(&self, id: u32) -> Vec<u32> {
        let characters = self.texts.get(&id).and_then(|text| text.chars().map(|c| self.ids.get(c.encode_utf8(&mut [0; 4]) as &str).copied()).collect());
        let Some(mut symbols): Option<Vec<u32>> = characters else { return vec![id] };
        let mut made = symbols.clone();
        loop {
            let merges =
                symbols.windows(2).enumerate().filter_map(|(at, pair)| self.merges.get(&(pair[0], pair[1])).map(|(rank, result)| (*rank, at, *result)));
            let Some((_, at, result)) = merges.min() else { break };
            symbols.splice(at..at + 2, [result]);
            made.push(result);
        }
        if symbols == [id] { made } else { vec![id] }
    }

    /// Tokens that are worth keeping though no corpus has them: results of merges in their order, then the others.
    pub fn by_frequency(&self) -> impl Iterator<Item = u32> {
        let mut others: Vec<u32> = self.texts.keys().copied().collect();
        others.sort_unstable();
        let mut seen = HashSet::new();
        self.results.iter().copied().chain(others).filter(move |id| seen.insert(*id))
    }

    /// The tokens that any text can be written with.
    ///
    /// # Errors
    /// Why there are none, in words.
    pub fn alphabet(&self, bpe: &BPE, tokenizer: &Value) -> Result<Vec<u32>, String> {
        if bpe.byte_fallback {
            let bytes = (0..=255u8).map(|byte| self.ids.get(&format!("<{byte:#04X}>")).copied());
            let bytes: Option<Vec<u32>> = bytes.collect();
            let mut alphabet = bytes.ok_or("it has a byte fallback, but not all of <0x00> to <0xFF>: characters that the corpora don't have would be lost")?;
            alphabet.extend(self.ids.get(SPACE));
            return Ok(alphabet);
        }
        if ["pre_tokenizer", "normalizer"].iter().any(|part| tokenizer.get(part).is_some_and(has_byte_level)) {
            return Ok(ByteLevel::alphabet().into_iter().filter_map(|c| self.ids.get(&c.to_string()).copied()).collect());
        }
        Err("it is neither byte-level nor has it a byte fallback: characters that the corpora don't have would be lost".into())
    }
}

/// The two sides of a merge, in either form that files have.
pub(super) fn merge_parts(merge: &Value) -> Option<(&str, &str)> {
    match merge {
        Value::String(text) => text.split_once(' '),
        Value::Array(pair) => match pair.as_slice() {
            [left, right] => left.as_str().zip(right.as_str()),
            _ => None,
        },
        _ => None,
    }
}

/// The model, if its merges alone decide how a word is cut.
///
/// # Errors
/// What it is instead, in words.
pub(super) fn plain_bpe(model: &ModelWrapper) -> Result<&BPE, String> {
    let other = match model {
        ModelWrapper::BPE(bpe) if bpe.dropout.is_some_and(|d| d > 0.0) => "BPE that leaves merges out at random (`dropout`)",
        ModelWrapper::BPE(bpe) if bpe.continuing_subword_prefix.as_ref().is_some_and(|p| !p.is_empty()) => "BPE with a `continuing_subword_prefix`",
        ModelWrapper::BPE(bpe) if bpe.end_of_word_suffix.as_ref().is_some_and(|s| !s.is_empty()) => "BPE with an `end_of_word_suffix`",
        ModelWrapper::BPE(bpe) => return Ok(bpe),
        ModelWrapper::WordPiece(_) => "WordPiece",
        ModelWrapper::WordLevel(_) => "WordLevel",
        ModelWrapper::Unigram(_) => "Unigram",
    };
    Err(format!("its model is {other}: expected byte-level BPE or BPE with byte fallback, where it is known which tokens another is merged from"))
}

/// Whether a pre-tokenizer or normalizer, or a part of it, turns text into bytes.
fn has_byte_level(part: &Value) -> bool {
    let parts = ["pretokenizers", "normalizers"].iter().filter_map(|list| part.get(list)?.as_array()).flatten();
    part.get("type").and_then(Value::as_str) == Some("ByteLevel") || parts.into_iter().any(has_byte_level)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn bpe() -> Bpe {
        let vocab = json!({"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5, "whole": 6, "aa": 7, "aaa": 8});
        // `abc` has two ways; the earlier merge decides which one is gone
        Bpe::new(&json!({"vocab": vocab, "merges": [["b", "c"], "a b", ["ab", "c"], ["a", "bc"], "a a", "aa a"]})).unwrap()
    }

    #[test]
    fn a_token_is_derived_by_the_merges_that_are_chosen() {
        assert_eq!(bpe().derivation(5), [0, 1, 2, 4, 5]);
        assert_eq!(bpe().derivation(8), [0, 0, 0, 7, 8]);
        assert_eq!(bpe().derivation(0), [0]);
    }

    #[test]
    fn a_token_that_no_merges_make_stands_alone() {
        assert_eq!(bpe().derivation(6), [6]);
        assert_eq!(bpe().derivation(99), [99]);
    }

    #[test]
    fn tokens_come_in_the_order_of_their_merges_and_once() {
        assert_eq!(bpe().by_frequency().collect::<Vec<_>>(), [4, 3, 5, 7, 8, 0, 1, 2, 6]);
    }

    #[test]
    fn a_damaged_model_is_refused_with_the_merge() {
        let error = |merges: Value| Bpe::new(&json!({"vocab": {"a": 0, "b": 1, "c": "x"}, "merges": merges})).unwrap_err();
        assert!(error(json!([])).contains("whole numbers"));
        let error = |merges: Value| Bpe::new(&json!({"vocab": {"a": 0, "b": 1}, "merges": merges})).unwrap_err();
        assert!(error(json!([["a", "b"]])).contains(r#"["a","b"]"#));
        assert!(error(json!([["a"]])).contains("expected two tokens"));
        assert!(error(json!({})).contains("expected a list"));
    }
}

//! Holds the new tokenizer against the old one: token by token, and on every document.

use super::CorpusTokens;
use super::numbers::Numbers;
use crate::calibration::Corpus;
use rayon::prelude::*;
use tokenizers::Tokenizer;

/// The two tokenizers and how their ids correspond.
pub(super) struct Proof<'a> {
    pub old: &'a Tokenizer,
    pub new: &'a Tokenizer,
    pub numbers: &'a Numbers,
}

impl Proof<'_> {
    /// Every kept token has its new id, and there are no others.
    ///
    /// # Errors
    /// The first token that hasn't, in words.
    pub fn of_tokens(&self, kept: &[u32]) -> Result<(), String> {
        for id in kept {
            let (text, new) = (self.old.id_to_token(*id), self.numbers.of(*id));
            if new.and_then(|new| self.new.id_to_token(new)) != text {
                let (text, new) = (text.unwrap_or_default(), new.unwrap_or_default());
                return Err(format!("token {text:?} of id {id} should get id {new} and doesn't: the ids of its added tokens are out of order"));
            }
        }
        match self.new.get_vocab_size(true) {
            size if size == kept.len() => Ok(()),
            size => Err(format!("expected {} tokens, the new vocabulary has {size}: two tokens of it have one id", kept.len())),
        }
    }

    /// Every document whose tokens are all kept has the same tokens; every other one, the same text. `encoded`: the old ids of every document.
    ///
    /// # Errors
    /// The first difference, in words.
    pub fn of_corpora(&self, corpora: &[Corpus], encoded: &[Vec<Vec<u32>>]) -> Result<Vec<CorpusTokens>, String> {
        let of_corpus = |(corpus, encoded): (&Corpus, &Vec<Vec<u32>>)| {
            let documents = corpus.documents.par_iter().zip(encoded).enumerate();
            let lengths = documents.map(|(i, (text, old))| self.of_document(text, old).map_err(|e| format!("{}: document {}: {e}", corpus.label, i + 1)));
            // the first of them, whatever the threads do
            let lengths = lengths.collect::<Vec<_>>().into_iter().collect::<Result<Vec<usize>, String>>()?;
            Ok(CorpusTokens {
                label: corpus.label.clone(),
                documents: corpus.documents.len(),
                before: encoded.iter().map(Vec::len).sum(),
                after: lengths.iter().sum(),
            })
        };
        corpora.iter().zip(encoded).map(of_corpus).collect()
    }

    /// The document's new number of tokens.
    fn of_document(&self, text: &str, old: &[u32]) -> Result<usize, String> {
        let new = encode(self.new, text)?;
        if let Some(expected) = self.numbers.of_all(old)
            && expected != new
        {
            let at = expected.iter().zip(&new).position(|(a, b)| a != b).unwrap_or(expected.len().min(new.len()));
            let token = |ids: &[u32]| ids.get(at).map_or("the end".to_string(), |id| format!("{:?}", self.new.id_to_token(*id).unwrap_or_default()));
            return Err(format!("token {} was {} and would be {}", at + 1, token(&expected), token(&new)));
        }
        let decode = |tokenizer: &Tokenizer, ids: &[u32]| tokenizer.decode(ids, false).map_err(|e| e.to_string());
        let (before, after) = (decode(self.old, old)?, decode(self.new, &new)?);
        if before != after {
            let at = before.chars().zip(after.chars()).take_while(|(a, b)| a == b).count();
            let from = |text: &str| text.chars().skip(at.saturating_sub(10)).take(20).collect::<String>();
            return Err(format!("character {} of its text: {:?} would become {:?}", at + 1, from(&before), from(&after)));
        }
        Ok(new.len())
    }
}

/// The ids of a text, with the special tokens that the model expects around it.
pub(super) fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, String> {
    let encoding = tokenizer.encode_fast(text, true).map_err(|e| e.to_string())?;
    Ok(encoding.get_ids().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn tokenizer(vocab: &Value, merges: &Value) -> Tokenizer {
        let model = json!({"type": "BPE", "vocab": vocab, "merges": merges, "unk_token": "?"});
        json!({"version": "1.0", "added_tokens": [], "model": model}).to_string().parse().unwrap()
    }

    fn old() -> Tokenizer {
        tokenizer(&json!({"?": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5}), &json!([["a", "b"], ["b", "c"]]))
    }

    fn difference(new: &Tokenizer, kept: &[u32], text: &str) -> String {
        let (old, numbers) = (old(), Numbers::new(kept));
        let corpus = Corpus { label: "book".into(), documents: vec!["c".into(), text.into()] };
        let encoded = vec![corpus.documents.iter().map(|text| encode(&old, text).unwrap()).collect()];
        Proof { old: &old, new, numbers: &numbers }.of_corpora(&[corpus], &encoded).unwrap_err()
    }

    #[test]
    fn the_first_difference_is_named() {
        // `a b` is gone, so that `b c` is merged in its place
        let new = tokenizer(&json!({"?": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5}), &json!([["b", "c"]]));
        let error = difference(&new, &[0, 1, 2, 3, 4, 5], "aabc");
        assert_eq!(error, r#"book: document 2: token 2 was "ab" and would be "a""#);
    }

    #[test]
    fn a_lost_character_is_named() {
        let new = tokenizer(&json!({"?": 0, "b": 1, "c": 2}), &json!([]));
        assert_eq!(difference(&new, &[0, 2, 3], "cba"), r#"book: document 2: character 5 of its text: "c b a" would become "c b ?""#);
    }

    #[test]
    fn a_token_with_another_id_is_named() {
        let (old, kept) = (old(), [0, 1, 2]);
        let numbers = Numbers::new(&kept);
        let of = |new: &Tokenizer| Proof { old: &old, new, numbers: &numbers }.of_tokens(&kept);
        assert_eq!(of(&tokenizer(&json!({"?": 0, "a": 1, "b": 2}), &json!([]))), Ok(()));
        assert!(of(&tokenizer(&json!({"?": 0, "b": 1, "a": 2}), &json!([]))).unwrap_err().contains(r#"token "a" of id 1 should get id 1"#));
        assert!(of(&tokenizer(&json!({"?": 0, "a": 1, "b": 2, "c": 3}), &json!([]))).unwrap_err().contains("the new vocabulary has 4"));
    }
}

//! Which tokens are kept.

use super::VocabularyOptions;
use super::bpe::Bpe;
use crate::{Error, Result};
use std::collections::BTreeSet;

/// The kept tokens, and why.
#[derive(Debug)]
pub(super) struct Selection {
    /// Their ids, ascending.
    pub kept: Vec<u32>,
    /// How many are bytes or special tokens,
    pub fixed: usize,
    /// how many others the corpora have,
    pub seen: usize,
    /// how many others these are merged from,
    pub merged_from: usize,
    /// and how many fill the vocabulary up to the size that was asked for.
    pub filled: usize,
}

/// Selects the `fixed` tokens, those of which the corpora have enough (`counts`, by id), and what these are merged from; then fills up in the order
/// of merges, each token with what it is merged from, so that no token can't be reached.
///
/// # Errors
/// [`Error::Option`] when there aren't as many tokens as were asked for.
pub(super) fn select(bpe: &Bpe, fixed: &BTreeSet<u32>, counts: &[u64], options: &VocabularyOptions) -> Result<Selection> {
    let mut kept = fixed.clone();
    let mut grown = |ids: &mut dyn Iterator<Item = u32>| {
        let before = kept.len();
        kept.extend(ids);
        kept.len() - before
    };
    let enough: Vec<u32> = (0..).zip(counts).filter(|(_, count)| **count >= options.min_count.max(1)).map(|(id, _)| id).collect();
    let seen = grown(&mut enough.iter().copied());
    let all: Vec<u32> = fixed.iter().copied().chain(enough).collect();
    let merged_from = grown(&mut all.iter().flat_map(|id| bpe.derivation(*id)));
    let target = kept.len().max(options.at_least).next_multiple_of(options.multiple.max(1));
    let before = kept.len();
    for id in bpe.by_frequency() {
        if kept.len() == target {
            break;
        }
        let needed: BTreeSet<u32> = bpe.derivation(id).into_iter().filter(|part| !kept.contains(part)).collect();
        if needed.len() <= target - kept.len() {
            kept.extend(needed);
        }
    }
    if kept.len() < target {
        let option = if kept.len() < options.at_least { "--keep-at-least" } else { "--multiple" };
        return Err(Error::option(option, format!("expected a vocabulary of {target}, the tokenizer has only {} tokens to keep", kept.len())));
    }
    let filled = kept.len() - before;
    Ok(Selection { kept: kept.into_iter().collect(), fixed: fixed.len(), seen, merged_from, filled })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn selected(counts: &[u64], options: VocabularyOptions) -> Result<Selection> {
        let vocab = json!({"a": 0, "b": 1, "c": 2, "bc": 3, "abc": 4, "ab": 5, "aa": 6, "aaa": 7, "<s>": 8});
        let bpe = Bpe::new(&json!({"vocab": vocab, "merges": ["b c", "a bc", "a b", "a a", "aa a"]})).unwrap();
        select(&bpe, &BTreeSet::from([0, 1, 2, 8]), counts, &options)
    }

    #[test]
    fn a_seen_token_is_kept_with_what_it_is_merged_from() {
        let selection = selected(&[5, 0, 0, 0, 2, 0, 0, 0, 0], VocabularyOptions::default()).unwrap();
        assert_eq!(selection.kept, [0, 1, 2, 3, 4, 8]);
        assert_eq!((selection.fixed, selection.seen, selection.merged_from, selection.filled), (4, 1, 1, 0));
    }

    #[test]
    fn rare_tokens_go_if_asked() {
        let counts = [5, 0, 0, 0, 2, 9, 0, 0, 0];
        assert_eq!(selected(&counts, VocabularyOptions { min_count: 3, ..Default::default() }).unwrap().kept, [0, 1, 2, 5, 8]);
    }

    #[test]
    fn a_vocabulary_is_filled_up_by_tokens_that_can_be_reached() {
        let counts = [0; 9];
        assert_eq!(selected(&counts, VocabularyOptions { at_least: 6, ..Default::default() }).unwrap().kept, [0, 1, 2, 3, 4, 8]);
        assert_eq!(selected(&counts, VocabularyOptions { multiple: 8, ..Default::default() }).unwrap().kept, [0, 1, 2, 3, 4, 5, 6, 8]);
    }

    #[test]
    fn more_tokens_than_there_are_are_refused() {
        for (options, part) in [
            (VocabularyOptions { at_least: 10, ..Default::default() }, "--keep-at-least: expected a vocabulary of 10, the tokenizer has only 9"),
            (VocabularyOptions { multiple: 32, ..Default::default() }, "--multiple: expected a vocabulary of 32"),
        ] {
            let error = selected(&[0; 9], options).unwrap_err().to_string();
            assert!(error.starts_with(part), "{error}");
        }
    }
}

//! Tokens to text, one token at a time.

use crate::Error;
use std::collections::HashSet;
use std::sync::Arc;
use tokenizers::Tokenizer;

/// What a decoder writes for bytes that are no character (yet).
const REPLACEMENT: char = '\u{FFFD}';
/// A character has up to four bytes; of one that lacks its last byte, up to three can stand as replacement characters at the end.
const MOST_INCOMPLETE: usize = 3;
/// Tokens that are not yet given out in full. With more, those in the middle are left out: a model may write bytes that are no characters for ever.
const MOST_UNREAD: usize = 16;
/// Tokens that are kept then. Bytes are in step again three bytes after a gap, before a whole character and an unfinished one, of up to seven together.
const RECENT: usize = 10;

/// Text of one choice as it grows.
///
/// What a token adds depends on its neighbours (decoders strip the first space, characters span tokens), so a short window is decoded: the
/// tokens of the last piece given out, for context, and those that came since. A character is given out when it is whole, and
/// all pieces and [`Self::finish`] together are what decoding all tokens at once gives. (A decoder that falls back to bytes takes back characters when a
/// byte after them is none; what was given out stays.)
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special_tokens: bool,
    special: HashSet<u32>,
    /// `window[..read]` is context, `window[read..]` is not yet given out in full.
    window: Vec<u32>,
    read: usize,
    /// The context's text.
    context: String,
    /// Bytes of the text of `window[read..]` that were given out.
    emitted: usize,
}

impl Detokenizer {
    /// Starts a text; `skip_special_tokens` leaves the tokenizer's special tokens out of it.
    pub fn new(tokenizer: Arc<Tokenizer>, skip_special_tokens: bool) -> Self {
        let special = tokenizer.get_added_tokens_decoder().into_iter().filter(|(_, token)| token.special).map(|(id, _)| id).collect();
        Self { tokenizer, skip_special_tokens, special, window: Vec::new(), read: 0, context: String::new(), emitted: 0 }
    }

    /// Takes the next token and returns the text that is certain now; often none, rarely more than one token's.
    ///
    /// # Errors
    /// [`Error::Decode`] if the tokenizer's decoder fails.
    pub fn push(&mut self, token: u32) -> Result<String, Error> {
        if self.skip_special_tokens && self.special.contains(&token) {
            return Ok(String::new());
        }
        self.window.push(token);
        let text = self.unread_text()?;
        let incomplete = text.chars().rev().take_while(|c| *c == REPLACEMENT).count().min(MOST_INCOMPLETE);
        let certain = text.len() - incomplete * REPLACEMENT.len_utf8();
        let mut delta = text.get(self.emitted..certain).unwrap_or_default().to_string();
        if incomplete > 0 || text.is_empty() {
            self.emitted = self.emitted.max(certain);
            if self.window.len() - self.read > MOST_UNREAD {
                delta += self.shorten(&text)?;
            }
        } else {
            self.window.drain(..self.read);
            self.read = self.window.len();
            self.context = self.decode(&self.window)?;
            self.emitted = 0;
        }
        Ok(delta)
    }

    /// Leaves out tokens that `text`, of all that are unread, has no more need of: not the first one, since decoders treat a text's beginning apart, and
    /// not the last ones. Returns what has to be given out now, which is nothing unless the end of the text depends on tokens far back.
    fn shorten<'a>(&mut self, text: &'a str) -> Result<&'a str, Error> {
        self.window.drain(self.read + 1..self.window.len() - RECENT);
        let shorter = self.unread_text()?;
        let held = text.get(self.emitted..).unwrap_or_default();
        let same_end = shorter.ends_with(held);
        self.emitted = if same_end { shorter.len() - held.len() } else { shorter.len() };
        Ok(if same_end { "" } else { held })
    }

    /// The tokens ended: whatever was still held back.
    ///
    /// # Errors
    /// [`Error::Decode`] if the tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<String, Error> {
        let text = self.unread_text()?;
        let rest = text.get(self.emitted..).unwrap_or_default().to_string();
        self.emitted = text.len();
        Ok(rest)
    }

    /// Text of `window[read..]` as it stands after its context.
    fn unread_text(&self) -> Result<String, Error> {
        let whole = self.decode(&self.window)?;
        match whole.strip_prefix(&self.context) {
            Some(text) => Ok(text.to_string()),
            // a byte-fallback decoder takes back a whole run of bytes when the next one doesn't fit; what was given out stays
            None => self.decode(&self.window[self.read..]),
        }
    }

    fn decode(&self, tokens: &[u32]) -> Result<String, Error> {
        self.tokenizer.decode(tokens, self.skip_special_tokens).map_err(|e| Error::Decode(e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    static TINY: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| Arc::new(include_str!("../../../models/tiny/tokenizer.json").parse().unwrap()));

    /// Llama 2's kind: a token's first ▁ is a space, bytes stand for characters that have no token, a text's first space is stripped.
    static SENTENCEPIECE: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
        let pieces = ["<s>", "▁", "a", "b", "▁a", "▁ab", "▁▁", "é"].map(str::to_string).into_iter();
        let bytes = (0..=255_u8).map(|b| format!("<0x{b:02X}>"));
        let vocab: serde_json::Map<_, _> = pieces.chain(bytes).enumerate().map(|(i, piece)| (piece, i.into())).collect();
        let decoder = serde_json::json!({"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]});
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "pre_tokenizer": null, "post_processor": null,
            "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
            "decoder": decoder,
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": [["▁", "a"], ["▁a", "b"], ["▁", "▁"]]},
        });
        Arc::new(json.to_string().parse().unwrap())
    });

    /// Byte-level, and its one merged token begins and ends within a character: 🙂 is F0 9F 99 82.
    static STRADDLING: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| {
        let json = serde_json::json!({
            "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null, "post_processor": null, "added_tokens": [],
            "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
            "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "fuse_unk": false, "byte_fallback": false, "vocab": {"ð": 0, "Ł": 1, "Ļ": 2, "Ĥ": 3, "ĻĤðŁ": 4}, "merges": []},
        });
        Arc::new(json.to_string().parse().unwrap())
    });

    /// Tokens that are a byte of 0x80 and more.
    static BROKEN: LazyLock<Vec<u32>> = LazyLock::new(|| (0..259).filter(|id| TINY.decode(&[*id], false).unwrap() == REPLACEMENT.to_string()).collect());

    fn pieces(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip: bool) -> Vec<String> {
        let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), skip);
        let mut pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
        pieces.push(detokenizer.finish().unwrap());
        pieces
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn the_pieces_of_any_tokens_are_the_whole_text(ids in prop::collection::vec(0..4096_u32, 0..40), skip: bool) {
            prop_assert_eq!(pieces(&TINY, &ids, skip).concat(), TINY.decode(&ids, skip).unwrap());
        }

        // the first 256 ids after the special ones are single bytes: broken characters all the time
        #[test]
        fn the_pieces_of_any_bytes_are_the_whole_text(ids in prop::collection::vec(0..259_u32, 0..40), skip: bool) {
            prop_assert_eq!(pieces(&TINY, &ids, skip).concat(), TINY.decode(&ids, skip).unwrap());
        }

        #[test]
        fn the_pieces_of_many_broken_characters_are_the_whole_text(ids in prop::collection::vec(prop::sample::select(BROKEN.to_vec()), 0..200)) {
            prop_assert_eq!(pieces(&TINY, &ids, false).concat(), TINY.decode(&ids, false).unwrap());
        }

        #[test]
        fn the_pieces_of_a_text_are_that_text_and_no_character_is_broken(text in "\\PC{0,20}") {
            let ids = TINY.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
            let pieces = pieces(&TINY, &ids, false);
            prop_assert_eq!(&pieces.concat(), &text);
            prop_assert!(text.contains(REPLACEMENT) || !pieces.iter().any(|p| p.contains(REPLACEMENT)));
        }

        #[test]
        fn byte_fallback_and_stripped_spaces_give_the_whole_text(text in "[ abé日🙂ñ]{0,20}") {
            let ids = SENTENCEPIECE.encode_fast(text.as_str(), false).unwrap().get_ids().to_vec();
            let pieces = pieces(&SENTENCEPIECE, &ids, true);
            prop_assert_eq!(pieces.concat(), SENTENCEPIECE.decode(&ids, true).unwrap());
            prop_assert!(!pieces.iter().any(|p| p.contains(REPLACEMENT)));
        }

        #[test]
        fn tokens_without_bytes_give_the_whole_text_with_special_ones_between(ids in prop::collection::vec(0..8_u32, 0..20), skip: bool) {
            prop_assert_eq!(pieces(&SENTENCEPIECE, &ids, skip).concat(), SENTENCEPIECE.decode(&ids, skip).unwrap());
        }

        #[test]
        fn any_tokens_at_all_are_taken(ids in prop::collection::vec(0..264_u32, 0..30), skip: bool) {
            pieces(&SENTENCEPIECE, &ids, skip);
        }
    }

    #[test]
    fn a_character_waits_for_its_last_byte() {
        let byte = |b: u8| SENTENCEPIECE.token_to_id(&format!("<0x{b:02X}>")).unwrap();
        let ids: Vec<u32> = "é🙂".bytes().map(byte).collect();
        assert_eq!(pieces(&SENTENCEPIECE, &ids, true), ["", "é", "", "", "", "🙂", ""]);
    }

    #[test]
    fn bytes_that_never_become_a_character_come_out_and_are_not_kept() {
        let byte = |b: u8| SENTENCEPIECE.token_to_id(&format!("<0x{b:02X}>")).unwrap();
        for (tokenizer, id) in [(&*TINY, BROKEN[0]), (&*SENTENCEPIECE, byte(0x80))] {
            let ids = vec![id; 5_000];
            let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), true);
            let mut text = String::new();
            for id in &ids {
                text += &detokenizer.push(*id).unwrap();
                assert!(detokenizer.window.len() <= 2 * MOST_UNREAD);
            }
            assert_eq!(text.chars().count(), ids.len() - MOST_INCOMPLETE);
            text += &detokenizer.finish().unwrap();
            assert_eq!(text, tokenizer.decode(&ids, true).unwrap());
        }
        // nor are tokens that have no text: here, one that the vocabulary doesn't know
        let ids = [&[1][..], &[9_999; 100], &[4, 2]].concat();
        assert_eq!(pieces(&SENTENCEPIECE, &ids, true).concat(), SENTENCEPIECE.decode(&ids, true).unwrap());
    }

    #[test]
    fn characters_whose_tokens_all_end_within_the_next_one_come_out_whole() {
        let ids = [&[0, 1][..], &[4; 100], &[2, 3]].concat();
        let pieces = pieces(&STRADDLING, &ids, false);
        assert_eq!(pieces.concat(), "🙂".repeat(101));
        assert!(!pieces.iter().any(|piece| piece.contains(REPLACEMENT)));
        assert_eq!(pieces[50], "🙂", "as they come");
    }

    #[test]
    fn an_unfinished_character_comes_out_at_the_end() {
        let byte = |b: u8| SENTENCEPIECE.token_to_id(&format!("<0x{b:02X}>")).unwrap();
        assert_eq!(pieces(&SENTENCEPIECE, &[2, byte(0xF0), byte(0x9F)], true), ["a", "", "", "\u{FFFD}\u{FFFD}"]);
    }
}

//! Tokens to text, one token at a time.

use crate::Error;
use std::collections::HashSet;
use std::sync::Arc;
use tokenizers::Tokenizer;

/// What a decoder writes for bytes that are no character (yet).
const REPLACEMENT: char = '\u{FFFD}';
/// A character has up to four bytes; of one that lacks its last byte, up to three can stand as replacement characters at the end.
const MOST_INCOMPLETE: usize = 3;

/// Text of one choice as it grows.
///
/// What a token adds depends on its neighbours (decoders strip the first space, characters span tokens), so a short window is decoded: the
/// tokens of the last piece given out, for context, and those that came since. A character is given out when it is whole, and
/// all pieces and [`Self::finish`] together are what decoding all tokens at once gives.
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
        let delta = text.get(self.emitted..certain).unwrap_or_default().to_string();
        if incomplete > 0 || text.is_empty() {
            self.emitted = self.emitted.max(certain);
        } else {
            self.window.drain(..self.read);
            self.read = self.window.len();
            self.context = self.decode(&self.window)?;
            self.emitted = 0;
        }
        Ok(delta)
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

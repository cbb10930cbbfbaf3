//! What single tokens are as text and bytes, for logprobs, `/tokenize` and grammars.

use evop_model::Tokenizer;
use std::collections::HashMap;

/// A tokenizer's way to write bytes in its vocabulary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's: every byte is a printable character.
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0x0A>` is a byte.
    SentencePiece,
}

/// Bytes of single tokens.
#[derive(Debug, Clone)]
pub struct TokenText {
    spelling: Spelling,
    /// GPT-2's characters to bytes.
    bytes: HashMap<char, u8>,
}

impl TokenText {
    /// Finds out how this tokenizer spells.
    pub fn of(tokenizer: &Tokenizer) -> Self {
        let decoder = tokenizer.get_decoder().and_then(|d| serde_json::to_string(d).ok()).unwrap_or_default();
        let spelling = if decoder.contains("\"ByteLevel\"") { Spelling::ByteLevel } else { Spelling::SentencePiece };
        Self { spelling, bytes: byte_characters() }
    }

    /// A token's bytes; they need not be whole characters. Empty for an id beyond the vocabulary.
    pub fn bytes(&self, tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
        let Some(token) = tokenizer.id_to_token(id) else { return Vec::new() };
        match self.spelling {
            // an added token is not spelled, it is what it says
            Spelling::ByteLevel => token.chars().map(|c| self.bytes.get(&c).copied()).collect::<Option<Vec<u8>>>().unwrap_or_else(|| token.into_bytes()),
            Spelling::SentencePiece => match byte_token(&token) {
                Some(byte) => vec![byte],
                None => token.replace('▁', " ").into_bytes(),
            },
        }
    }

    /// A token as text; one that is no text by itself is written `bytes:\xe2\x80`, as OpenAI does.
    pub fn text(&self, tokenizer: &Tokenizer, id: u32) -> String {
        as_text(self.bytes(tokenizer, id))
    }
}

/// Bytes as text, or written out.
pub fn as_text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap_or_else(|e| {
        let escaped: String = e.as_bytes().iter().map(|byte| format!("\\x{byte:02x}")).collect();
        format!("bytes:{escaped}")
    })
}

/// `<0x0A>`.
fn byte_token(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok())?
}

/// GPT-2's alphabet: printable bytes stand for themselves, the others are shifted to U+0100 and up.
fn byte_characters() -> HashMap<char, u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut shifted = 0x100u32..;
    let character = |byte: u8| if printable(byte) { Some(char::from(byte)) } else { shifted.next().and_then(char::from_u32) };
    let characters: Vec<Option<char>> = (0..=255).map(character).collect();
    characters.into_iter().zip(0..=255).filter_map(|(c, byte)| Some((c?, byte))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_has_one_character() {
        let characters = byte_characters();
        assert_eq!(characters.len(), 256);
        assert_eq!(characters[&'Ġ'], b' ');
        assert_eq!(characters[&'Ċ'], b'\n');
        assert_eq!(characters[&'a'], b'a');
    }

    #[test]
    fn the_tokens_of_a_text_are_its_bytes() {
        let checkpoint = evop_model::Checkpoint::open(std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny"))).unwrap();
        let spelling = TokenText::of(checkpoint.tokenizer());
        let text = "The café — \u{1F600}\n\tend";
        let ids = checkpoint.encode(text, false).unwrap();
        let bytes: Vec<u8> = ids.iter().flat_map(|id| spelling.bytes(checkpoint.tokenizer(), *id)).collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), text);
        assert_eq!(spelling.text(checkpoint.tokenizer(), 0), "<|endoftext|>");
        assert!(spelling.bytes(checkpoint.tokenizer(), 1 << 30).is_empty());
    }

    #[test]
    fn what_is_no_text_is_written_out() {
        assert_eq!(as_text(vec![0xe2, 0x80]), "bytes:\\xe2\\x80");
        assert_eq!(byte_token("<0x0A>"), Some(10));
        assert_eq!(byte_token("<0x>"), None);
    }
}

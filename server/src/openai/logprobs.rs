//! Log probabilities in the three forms that clients know: completions', chat's, and vLLM's `prompt_logprobs`.

use crate::openai::generation::Token;
use crate::openai::types::{Alternatives, ChatLogprob, ChatLogprobs, ChatToken, CompletionLogprobs, PromptLogprobs, RankedLogprob};
use crate::served::Served;
use evop_serving::{TokenLogprob, TokenLogprobs};

/// JSON has no minus infinity.
const IMPOSSIBLE: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    logprob.max(IMPOSSIBLE)
}

/// Writes tokens in the completions form, keeping count of where in the text each begins.
#[derive(Debug, Clone, Copy)]
pub struct CompletionForm {
    /// Characters before the next token.
    offset: usize,
    /// Tokens are named `token_id:N`.
    as_ids: bool,
    /// Special tokens are not in the text.
    skip_special_tokens: bool,
}

impl CompletionForm {
    /// At the beginning of the text.
    pub fn new(as_ids: bool, skip_special_tokens: bool) -> Self {
        Self { offset: 0, as_ids, skip_special_tokens }
    }

    /// The next tokens.
    pub fn write(&mut self, served: &Served, tokens: &[Token]) -> CompletionLogprobs {
        let mut lists = CompletionLogprobs::default();
        for token in tokens {
            lists.text_offset.push(self.offset);
            lists.tokens.push(served.token(token.id, self.as_ids));
            lists.token_logprobs.push(token.logprobs.as_ref().map(|l| finite(l.token.logprob)));
            lists.top_logprobs.push(token.logprobs.as_ref().map(|l| self.alternatives(served, l)));
            if !(self.skip_special_tokens && served.is_special(token.id)) {
                self.offset += characters(&served.token_bytes(token.id));
            }
        }
        lists
    }

    fn alternatives(&self, served: &Served, logprobs: &TokenLogprobs) -> Alternatives {
        let mut alternatives: Vec<(String, f32)> = Vec::with_capacity(logprobs.top.len() + 1);
        for entry in logprobs.top.iter().chain([&logprobs.token]) {
            let token = served.token(entry.id, self.as_ids);
            // an object has no room for two tokens that are written alike; the better one stays
            if !alternatives.iter().any(|(t, _)| *t == token) {
                alternatives.push((token, finite(entry.logprob)));
            }
        }
        Alternatives(alternatives)
    }
}

/// Characters that begin in these bytes; a character counts for the token that begins it.
fn characters(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| *byte & 0xc0 != 0x80).count()
}

/// Tokens in chat's form.
pub fn chat_form(served: &Served, tokens: &[Token], as_ids: bool) -> ChatLogprobs {
    let entry = |e: &TokenLogprob| ChatToken { token: served.token(e.id, as_ids), logprob: finite(e.logprob), bytes: served.token_bytes(e.id) };
    let content = tokens.iter().filter_map(|token| token.logprobs.as_ref());
    ChatLogprobs { content: content.map(|l| ChatLogprob { token: entry(&l.token), top_logprobs: l.top.iter().map(entry).collect() }).collect(), refusal: None }
}

/// A prompt's in vLLM's form.
pub fn prompt_form(served: &Served, prompt: &[Option<TokenLogprobs>]) -> PromptLogprobs {
    let entry = |e: &TokenLogprob, rank: usize| (e.id, RankedLogprob { logprob: finite(e.logprob), rank, decoded_token: served.token(e.id, false) });
    let place = |logprobs: &TokenLogprobs| {
        let top = logprobs.top.iter().enumerate().map(|(i, e)| entry(e, i + 1));
        top.chain(std::iter::once(entry(&logprobs.token, logprobs.rank))).collect()
    };
    prompt.iter().map(|logprobs| logprobs.as_ref().map(place)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_character_counts_where_it_begins() {
        let dash = "—".as_bytes();
        assert_eq!((characters(&dash[..1]), characters(&dash[1..]), characters(b"ab")), (1, 0, 2));
    }

    #[test]
    fn minus_infinity_is_a_number() {
        assert_eq!(finite(f32::NEG_INFINITY), -9999.0);
        assert_eq!(finite(-1.5), -1.5);
    }
}

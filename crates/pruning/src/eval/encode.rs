//! Token ids of a context and its continuation, by the rules of lm-evaluation-harness 0.4 (`TemplateLM.loglikelihood`, `_encode_pair`).

use super::task::Request;
use evop_model::{Config, Tokenizer};

/// White space as Python's `str.strip` sees it.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// What the model reads and what it should have said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Encoded {
    /// Context and continuation without its last token, cut on the left to the model's context.
    pub input: Vec<u32>,
    /// The continuation: token i is predicted by row `input.len() - targets.len() + i`.
    pub targets: Vec<u32>,
    /// Whether anything was cut.
    pub truncated: bool,
}

/// Encodes requests for one model.
pub(super) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    /// Stands in for an empty context: BOS, or else EOS.
    prefix: Option<u32>,
    /// The prefix as text: a context that begins with it gets no second one.
    prefix_text: Option<String>,
    max_length: usize,
}

impl<'a> Encoder<'a> {
    pub fn new(tokenizer: &'a Tokenizer, config: &Config) -> Self {
        let prefix = config.bos_token_id.or(config.eos_token_ids.first().copied());
        Self { tokenizer, prefix, prefix_text: prefix.and_then(|id| tokenizer.id_to_token(id)), max_length: config.max_position_embeddings }
    }

    /// # Errors
    /// What is wrong with the request, in words.
    pub fn encode(&self, request: &Request) -> Result<Encoded, String> {
        let (context, continuation) = if request.context.is_empty() { self.without_context(&request.continuation)? } else { self.pair(request)? };
        if context.is_empty() {
            return Err("the context has no tokens: give it some text, or leave it empty altogether".into());
        }
        if continuation.is_empty() {
            return Err(format!("{:?} adds no token to its context", request.continuation));
        }
        if continuation.len() > self.max_length {
            return Err(format!("the text to score has {} tokens, the model's context {}", continuation.len(), self.max_length));
        }
        let mut input = context;
        input.extend(&continuation);
        input.pop();
        let cut = input.len().saturating_sub(self.max_length);
        input.drain(..cut);
        Ok(Encoded { input, targets: continuation, truncated: cut > 0 })
    }

    /// A continuation on its own is scored after the prefix token; one that begins with that token, after its own first.
    fn without_context(&self, continuation: &str) -> Result<(Vec<u32>, Vec<u32>), String> {
        let prefix = self.prefix.ok_or("the context is empty, and the model's config has neither `bos_token_id` nor `eos_token_id` to begin with")?;
        let mut continuation = self.ids(continuation, false)?;
        if continuation.first() == Some(&prefix) {
            continuation.remove(0);
        }
        Ok((vec![prefix], continuation))
    }

    /// White space at the context's end goes to the continuation; then the whole is encoded, and what the context alone takes is its part.
    fn pair(&self, request: &Request) -> Result<(Vec<u32>, Vec<u32>), String> {
        let context = request.context.trim_end_matches(is_space);
        let whole = format!("{}{}", request.context, request.continuation);
        let whole = self.ids(&whole, self.adds_special_tokens(&whole))?;
        let context = self.ids(context, self.adds_special_tokens(context))?;
        let continuation = whole.get(context.len()..).unwrap_or_default().to_vec();
        Ok((context, continuation))
    }

    fn adds_special_tokens(&self, text: &str) -> bool {
        !self.prefix_text.as_ref().is_some_and(|prefix| text.starts_with(prefix.as_str()))
    }

    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let encoding = self.tokenizer.encode_fast(text, add_special_tokens).map_err(|e| format!("{text:?} can't be tokenised: {e}"))?;
        Ok(encoding.get_ids().to_vec())
    }
}

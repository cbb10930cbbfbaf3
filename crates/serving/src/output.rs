//! What the engine sends back, one message a choice and step.

use std::time::{Duration, Instant};

/// One event of one choice. A choice's last event is [`OutputKind::Finished`], and it always comes.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutput {
    /// The choice, 0..n.
    pub index: usize,
    /// What happened.
    pub kind: OutputKind,
    /// When it did, whenever it is read.
    pub at: Instant,
}

impl StepOutput {
    pub(crate) fn now(index: usize, kind: OutputKind) -> Self {
        Self { index, kind, at: Instant::now() }
    }
}

/// The kinds of [`StepOutput`], in the order in which a choice sends them.
#[derive(Debug, Clone, PartialEq)]
pub enum OutputKind {
    /// Once a choice, before anything else of it: its prompt has been read.
    PromptRead {
        /// Tokens of the prompt that were in the cache already.
        cached_tokens: usize,
        /// How long it waited for a place.
        queued: Duration,
    },
    /// Once, from choice 0, before its first token, if `prompt_logprobs` was asked for: one entry a prompt token, the first `None`.
    PromptLogprobs(Vec<Option<TokenLogprobs>>),
    /// A generated token.
    Token {
        /// Its id.
        id: u32,
        /// Present if `logprobs` was asked for.
        logprobs: Option<TokenLogprobs>,
        /// It ended the sequence (end of sequence, or one of `stop_token_ids`): one of the tokens, but not of the text.
        is_stop: bool,
    },
    /// The end of the choice.
    Finished {
        /// Why.
        reason: FinishReason,
        /// What it used.
        usage: Usage,
    },
}

/// Why a choice ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FinishReason {
    /// An end-of-sequence token, or [`crate::RequestStream::stop_choice`].
    Stop,
    /// One of the request's `stop_token_ids`.
    StopToken(u32),
    /// `max_tokens` were made.
    Length,
    /// The engine was stopped.
    Cancelled,
    /// The step failed; the text says how.
    Error(String),
}

/// Token counts of one choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Those of them that a cache already held.
    pub cached_tokens: usize,
    /// Tokens made, the one that ended the sequence included.
    pub completion_tokens: usize,
}

/// A token and its natural-log probability under the raw distribution (before penalties, temperature and truncation).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// ln p(token | everything before it).
    pub logprob: f32,
}

/// Log probabilities at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that stands there.
    pub token: TokenLogprob,
    /// Its place among all tokens, 1 = the most probable.
    pub rank: usize,
    /// The most probable tokens, best first, as many as were asked for.
    pub top: Vec<TokenLogprob>,
}

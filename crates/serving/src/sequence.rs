//! A request inside the engine: one group, and one sequence for each of its choices.

use crate::output::{FinishReason, OutputKind, StepOutput, TokenLogprobs, Usage};
use crate::params::{Request, SamplingParams};
use crate::sampler::{Sampled, Sampler};
use evop_model::{SequenceCache, Span};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// What the choices of a request share, with each other and with the [`crate::RequestStream`].
#[derive(Debug)]
pub(crate) struct SequenceGroup {
    pub request_id: String,
    pub prompt: Vec<u32>,
    pub params: Arc<SamplingParams>,
    pub n: usize,
    pub arrived: Instant,
    /// One flag a choice: its caller wants no more of it.
    pub stopped: Vec<AtomicBool>,
}

impl SequenceGroup {
    pub fn new(request: Request) -> Self {
        let Request { prompt, params, n, request_id } = request;
        let stopped = (0..n).map(|_| AtomicBool::new(false)).collect();
        Self { request_id, prompt, params: Arc::new(params), n, arrived: Instant::now(), stopped }
    }

    /// Tokens that one choice may come to hold in the cache.
    pub fn capacity_tokens(&self) -> usize {
        self.prompt.len() + self.params.max_tokens
    }
}

/// One choice that has a place in the batch.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub group: Arc<SequenceGroup>,
    /// The choice.
    pub index: usize,
    pub cache: SequenceCache,
    /// Bytes of the budget that are this sequence's until it ends.
    pub reserved_bytes: usize,
    pub sampler: Sampler,
    /// Tokens made so far.
    pub generated: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    pub computed: usize,
    /// Tokens of the current step.
    pub scheduled: usize,
    /// What the current step made, or why it couldn't.
    pub sampled: Option<Result<Sampled, String>>,
    /// Of the prompt's tokens computed so far, if they were asked for.
    pub prompt_logprobs: Vec<Option<TokenLogprobs>>,
    pub finished: Option<FinishReason>,
    queued: Duration,
    output: UnboundedSender<StepOutput>,
}

impl Sequence {
    pub fn new(group: Arc<SequenceGroup>, index: usize, output: UnboundedSender<StepOutput>, eos: &[u32], cache: SequenceCache, reserved_bytes: usize) -> Self {
        Self {
            sampler: Sampler::new(Arc::clone(&group.params), &group.prompt, eos, index),
            index,
            cache,
            reserved_bytes,
            generated: Vec::new(),
            computed: 0,
            scheduled: 0,
            sampled: None,
            prompt_logprobs: Vec::new(),
            finished: None,
            queued: group.arrived.elapsed(),
            output,
            group,
        }
    }

    /// The prompt is in the cache: every further step makes one token.
    pub fn is_decoding(&self) -> bool {
        self.computed >= self.group.prompt.len()
    }

    /// Prompt tokens that are not in the cache yet.
    pub fn prompt_remaining(&self) -> usize {
        self.group.prompt.len().saturating_sub(self.computed)
    }

    /// The current step's place in the sequence.
    pub fn span(&self) -> Span {
        Span { past: self.computed, len: self.scheduled }
    }

    /// The current step's tokens.
    pub fn scheduled_tokens(&self) -> &[u32] {
        if self.is_decoding() {
            let start = self.computed - self.group.prompt.len();
            &self.generated[start..start + self.scheduled]
        } else {
            &self.group.prompt[self.computed..self.computed + self.scheduled]
        }
    }

    /// Whether a token is sampled from the current step's last row: the rest of the prompt is in it, or it decodes.
    pub fn samples(&self) -> bool {
        self.scheduled > 0 && self.computed + self.scheduled >= self.group.prompt.len() && self.group.params.max_tokens > 0
    }

    /// How many alternatives every prompt token of this step needs; only the first choice reports them.
    pub fn prompt_logprobs_wanted(&self) -> Option<usize> {
        self.group.params.prompt_logprobs.filter(|_| self.index == 0 && self.scheduled > 0 && !self.is_decoding())
    }

    pub fn is_abandoned(&self) -> bool {
        self.output.is_closed()
    }

    /// The caller found a stop string.
    pub fn is_stopped(&self) -> bool {
        self.group.stopped[self.index].load(Relaxed)
    }

    /// Takes over what the current step made: sends it, and notes whether it was the last. Returns the tokens that are new.
    pub fn advance(&mut self, eos: &[u32]) -> Advanced {
        let was_decoding = self.is_decoding();
        self.computed += self.scheduled;
        self.scheduled = 0;
        let mut advanced = Advanced::default();
        if !was_decoding && self.is_decoding() {
            if self.index == 0 {
                advanced.prompt_tokens = self.group.prompt.len();
                if self.group.params.prompt_logprobs.is_some() {
                    let logprobs = std::mem::take(&mut self.prompt_logprobs);
                    self.send(OutputKind::PromptLogprobs(logprobs));
                }
            }
            if self.group.params.max_tokens == 0 {
                self.finished = Some(FinishReason::Length);
            }
        }
        match self.sampled.take() {
            Some(Ok(Sampled { id, logprobs })) => {
                self.generated.push(id);
                self.finished = self.ended_by(id, eos);
                let is_stop = matches!(self.finished, Some(FinishReason::Stop | FinishReason::StopToken(_)));
                self.send(OutputKind::Token { id, logprobs, is_stop });
                advanced.generated_tokens = 1;
            }
            Some(Err(message)) => self.finished = Some(FinishReason::Error(message)),
            None => {}
        }
        advanced
    }

    /// Whether the token just made ends the sequence.
    fn ended_by(&self, id: u32, eos: &[u32]) -> Option<FinishReason> {
        let params = &self.group.params;
        if self.generated.len() > params.min_tokens {
            if params.stop_token_ids.contains(&id) {
                return Some(FinishReason::StopToken(id));
            }
            if !params.ignore_eos && eos.contains(&id) {
                return Some(FinishReason::Stop);
            }
        }
        (self.generated.len() >= params.max_tokens).then_some(FinishReason::Length)
    }

    /// Sends the choice's last message, if it has finished.
    pub fn send_finished(&self) {
        let Some(reason) = self.finished.clone() else { return };
        let usage = Usage { prompt_tokens: self.group.prompt.len(), cached_tokens: 0, completion_tokens: self.generated.len() };
        self.send(OutputKind::Finished { reason, usage, queued: self.queued });
    }

    fn send(&self, kind: OutputKind) {
        // a receiver that is gone is noticed by the next step
        let _ = self.output.send(StepOutput { index: self.index, kind });
    }
}

/// Tokens that a step added, for the counters.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Advanced {
    pub prompt_tokens: usize,
    pub generated_tokens: usize,
}

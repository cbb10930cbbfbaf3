//! A request inside the engine: one group, and one sequence for each of its choices.

use crate::blocks::{Blocks, start};
use crate::output::{FinishReason, OutputKind, StepOutput, TokenLogprobs, Usage};
use crate::params::{Request, SamplingParams};
use crate::sampler::{Sampled, Sampler};
use evop_model::{BLOCK_TOKENS, Span};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;

/// What the choices of a request share, with each other and with the [`crate::RequestStream`].
#[derive(Debug)]
pub(crate) struct SequenceGroup {
    pub request_id: String,
    pub prompt: Vec<u32>,
    /// The form of the model that answers.
    pub member: usize,
    pub params: Arc<SamplingParams>,
    pub n: usize,
    pub arrived: Instant,
    pub priority: i32,
    /// What comes before its first block.
    pub chain: u64,
    /// One flag a choice: its caller wants no more of it.
    pub stopped: Vec<AtomicBool>,
}

impl SequenceGroup {
    pub fn new(request: Request) -> Self {
        let Request { prompt, params, member, n, request_id, priority, cache_salt } = request;
        let stopped = (0..n).map(|_| AtomicBool::new(false)).collect();
        let chain = start(member, cache_salt.as_deref());
        Self { request_id, prompt, member, params: Arc::new(params), n, arrived: Instant::now(), priority, chain, stopped }
    }
}

/// One choice that has had a place in the batch.
#[derive(Debug)]
pub(crate) struct Sequence {
    pub group: Arc<SequenceGroup>,
    /// The choice.
    pub index: usize,
    /// When it came, among all sequences: who came last gives way first.
    pub ticket: u64,
    /// Blocks of the pool: the j-th holds tokens 32 j .. 32 (j + 1).
    pub table: Vec<u32>,
    /// Full blocks of the table that are known, and the content of the last of them.
    named: (usize, u64),
    pub sampler: Sampler,
    /// The prompt and what was made so far.
    pub tokens: Vec<u32>,
    /// Tokens whose keys and values are in the cache.
    pub computed: usize,
    /// Tokens of the current step.
    pub scheduled: usize,
    /// Further tokens that may be guessed in the current step, and those that were: the step computes them too, and keeps the ones that are right.
    pub drafting: usize,
    pub drafts: Vec<u32>,
    /// What the current step made, or why it couldn't: one token, and one more for every draft that was right.
    pub sampled: Vec<Result<Sampled, String>>,
    /// Of the prompt's tokens computed so far, if they were asked for.
    pub prompt_logprobs: Vec<Option<TokenLogprobs>>,
    pub finished: Option<FinishReason>,
    /// Prompt tokens that were there when it first ran.
    cached: Option<usize>,
    /// The whole prompt has been computed, at least once.
    prompt_read: bool,
    queued: Duration,
    output: UnboundedSender<StepOutput>,
}

impl Sequence {
    pub fn new(group: Arc<SequenceGroup>, index: usize, ticket: u64, output: UnboundedSender<StepOutput>, eos: &[u32]) -> Self {
        Self {
            sampler: Sampler::new(Arc::clone(&group.params), &group.prompt, eos, index),
            index,
            ticket,
            table: Vec::new(),
            named: (0, group.chain),
            tokens: group.prompt.clone(),
            computed: 0,
            scheduled: 0,
            drafting: 0,
            drafts: Vec::new(),
            sampled: Vec::new(),
            prompt_logprobs: Vec::new(),
            finished: None,
            cached: None,
            prompt_read: false,
            queued: Duration::ZERO,
            output,
            group,
        }
    }

    /// Whether its prompt may be taken from what others left: not if every token of it is to be scored, which the first choice does for all.
    pub fn reuses_prefixes(&self) -> bool {
        self.index > 0 || self.group.params.prompt_logprobs.is_none()
    }

    /// Takes the blocks that are known already. The last token is always computed: what comes after it is sampled from it.
    pub fn find_prefix(&mut self, blocks: &mut Blocks) {
        if self.reuses_prefixes() {
            let (table, content) = blocks.find(self.group.chain, &self.tokens[..self.tokens.len() - 1]);
            self.computed = table.len() * BLOCK_TOKENS;
            self.named = (table.len(), content);
            self.table = table;
        }
    }

    /// It has a place from now on.
    pub fn begin(&mut self) {
        if self.cached.is_none() {
            self.cached = Some(self.computed);
            self.queued = self.group.arrived.elapsed();
        }
    }

    /// Gives all blocks back; everything has to be computed again, unless it is found again.
    pub fn release(&mut self, blocks: &mut Blocks) {
        blocks.release(&std::mem::take(&mut self.table));
        self.named = (0, self.group.chain);
        (self.computed, self.scheduled, self.drafting) = (0, 0, 0);
        self.drafts.clear();
        if !self.prompt_read {
            self.prompt_logprobs.clear();
        }
    }

    /// Makes the blocks known that have become full.
    pub fn name_blocks(&mut self, blocks: &mut Blocks) {
        let full = self.tokens[..self.computed].as_chunks::<BLOCK_TOKENS>().0;
        for (block, tokens) in self.table.iter().zip(full).skip(self.named.0) {
            self.named = (self.named.0 + 1, blocks.name(*block, self.named.1, tokens));
        }
    }

    /// Blocks that it lacks to hold so many tokens.
    pub fn lacks(&self, tokens: usize) -> usize {
        tokens.div_ceil(BLOCK_TOKENS).saturating_sub(self.table.len())
    }

    /// Tokens that are not in the cache yet.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Every further step makes one token: all but the token made last is in the cache.
    pub fn is_decoding(&self) -> bool {
        self.tokens.len() > self.group.prompt.len() && self.remaining() == 1
    }

    /// Whether the prompt has been computed once.
    pub fn has_read_prompt(&self) -> bool {
        self.prompt_read
    }

    fn generated(&self) -> usize {
        self.tokens.len() - self.group.prompt.len()
    }

    /// The current step's place in the sequence.
    pub fn span(&self) -> Span {
        Span { past: self.computed, len: self.scheduled + self.drafts.len() }
    }

    /// How many tokens the current step has of it, those that are to be guessed included.
    pub fn step_tokens(&self) -> usize {
        self.scheduled + self.drafting
    }

    /// The current step's tokens, drafts included.
    pub fn scheduled_tokens(&self) -> impl Iterator<Item = u32> {
        self.tokens[self.computed..self.computed + self.scheduled].iter().chain(&self.drafts).copied()
    }

    /// Whether its tokens may be guessed at all. A grammar needs each token before it can say what may follow.
    pub fn takes_drafts(&self) -> bool {
        self.group.member == 0 && self.group.params.grammar.is_none()
    }

    /// How many tokens may be guessed beyond the next one.
    pub fn may_draft(&self) -> usize {
        let left = self.group.params.max_tokens.saturating_sub(self.generated() + 1);
        if self.takes_drafts() && self.is_decoding() { left } else { 0 }
    }

    /// Whether a token is sampled from the current step's last row: nothing is left after it.
    pub fn samples(&self) -> bool {
        self.scheduled > 0 && self.scheduled == self.remaining() && self.group.params.max_tokens > 0
    }

    /// How many alternatives every prompt token of this step needs; only the first choice reports them, once.
    pub fn prompt_logprobs_wanted(&self) -> Option<usize> {
        self.group.params.prompt_logprobs.filter(|_| self.index == 0 && self.scheduled > 0 && !self.prompt_read)
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
        self.computed += self.scheduled;
        self.scheduled = 0;
        let mut advanced = Advanced::default();
        if !self.prompt_read && self.computed >= self.group.prompt.len() {
            self.prompt_read = true;
            self.send(OutputKind::PromptRead { cached_tokens: self.cached.unwrap_or(0), queued: self.queued });
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
        advanced.drafts = self.drafts.len();
        self.drafting = 0;
        self.drafts.clear();
        for sampled in std::mem::take(&mut self.sampled) {
            match sampled {
                Ok(Sampled { id, logprobs, completes }) => {
                    // a draft that was right has its keys and values
                    self.computed = self.tokens.len();
                    self.tokens.push(id);
                    self.finished = self.ended_by(id, eos, completes);
                    // the last token of a grammar is text, unless it is the end of sequence
                    let ends_text = !completes || eos.contains(&id);
                    let is_stop = ends_text && matches!(self.finished, Some(FinishReason::Stop | FinishReason::StopToken(_)));
                    self.send(OutputKind::Token { id, logprobs, is_stop });
                    advanced.generated_tokens += 1;
                }
                Err(message) => self.finished = Some(FinishReason::Error(message)),
            }
            if self.finished.is_some() {
                break;
            }
        }
        advanced
    }

    /// Whether the token just made ends the sequence.
    fn ended_by(&self, id: u32, eos: &[u32], completes: bool) -> Option<FinishReason> {
        let params = &self.group.params;
        if completes {
            return Some(FinishReason::Stop);
        }
        if self.generated() > params.min_tokens {
            if params.stop_token_ids.contains(&id) {
                return Some(FinishReason::StopToken(id));
            }
            if !params.ignore_eos && eos.contains(&id) {
                return Some(FinishReason::Stop);
            }
        }
        (self.generated() >= params.max_tokens).then_some(FinishReason::Length)
    }

    /// Sends the choice's last message, if it has finished.
    pub fn send_finished(&self) {
        let Some(reason) = self.finished.clone() else { return };
        let usage = Usage { prompt_tokens: self.group.prompt.len(), cached_tokens: self.cached.unwrap_or(0), completion_tokens: self.generated() };
        self.send(OutputKind::Finished { reason, usage });
    }

    fn send(&self, kind: OutputKind) {
        // a receiver that is gone is noticed by the next step
        let _ = self.output.send(StepOutput::now(self.index, kind));
    }
}

/// Tokens that a step added, for the counters.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Advanced {
    pub prompt_tokens: usize,
    pub generated_tokens: usize,
    /// Guessed; all generated tokens but one were guessed rightly.
    pub drafts: usize,
}

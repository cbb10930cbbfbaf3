//! Who runs, and which of its tokens come into the next step: continuous batching with chunked prefill, first come first served.

use crate::output::{FinishReason, OutputKind, StepOutput, Usage};
use crate::sequence::{Sequence, SequenceGroup};
use evop_model::SequenceCache;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use tokio::sync::mpsc::UnboundedSender;

/// The scheduler's limits, in its own units.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub max_concurrent: usize,
    pub max_batch_tokens: usize,
    pub kv_budget_bytes: usize,
    pub kv_bytes_per_token: usize,
}

/// A group of which choices `next..n` have no place yet.
#[derive(Debug)]
struct Waiting {
    group: Arc<SequenceGroup>,
    output: UnboundedSender<StepOutput>,
    next: usize,
}

/// The queue and the running sequences, in order of arrival.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    waiting: VecDeque<Waiting>,
    pub running: Vec<Sequence>,
    kv_bytes_used: usize,
    /// Requests that left the queue since [`Self::take_left_queue`].
    left_queue: usize,
}

impl Scheduler {
    pub fn new(limits: Limits) -> Self {
        Self { limits, waiting: VecDeque::new(), running: Vec::new(), kv_bytes_used: 0, left_queue: 0 }
    }

    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
    }

    /// How many requests left the queue since this was last asked: admitted with all their choices, or withdrawn.
    pub fn take_left_queue(&mut self) -> usize {
        std::mem::take(&mut self.left_queue)
    }

    pub fn kv_bytes_used(&self) -> usize {
        self.kv_bytes_used
    }

    pub fn enqueue(&mut self, group: Arc<SequenceGroup>, output: UnboundedSender<StepOutput>) {
        self.waiting.push_back(Waiting { group, output, next: 0 });
    }

    /// Takes out the waiting requests that `leaves` says, each with the number of choices that had no place yet.
    pub fn withdraw(&mut self, leaves: impl Fn(&UnboundedSender<StepOutput>) -> bool) -> Vec<Withdrawn> {
        let mut withdrawn = Vec::new();
        self.waiting.retain(|w| {
            let leaves = leaves(&w.output);
            if leaves {
                withdrawn.push(Withdrawn { group: Arc::clone(&w.group), output: w.output.clone(), choices: w.next..w.group.n });
            }
            !leaves
        });
        self.left_queue += withdrawn.len();
        withdrawn
    }

    /// Gives places to waiting choices while there are some. The first in the queue waits for memory rather than be overtaken.
    /// Returns choices that their caller stopped before they ran.
    pub fn admit(&mut self, eos: &[u32], new_cache: impl Fn(usize) -> SequenceCache) -> Vec<Withdrawn> {
        let mut stopped = Vec::new();
        while let Some(first) = self.waiting.front_mut() {
            let (group, index) = (Arc::clone(&first.group), first.next);
            let capacity = group.capacity_tokens();
            let bytes = capacity * self.limits.kv_bytes_per_token;
            if group.stopped[index].load(Relaxed) {
                stopped.push(Withdrawn { group: Arc::clone(&group), output: first.output.clone(), choices: index..index + 1 });
            } else if self.running.len() >= self.limits.max_concurrent || self.kv_bytes_used + bytes > self.limits.kv_budget_bytes {
                break;
            } else {
                self.kv_bytes_used += bytes;
                self.running.push(Sequence::new(Arc::clone(&group), index, first.output.clone(), eos, new_cache(capacity), bytes));
            }
            first.next += 1;
            if first.next == group.n {
                self.waiting.pop_front();
                self.left_queue += 1;
            }
        }
        stopped
    }

    /// Shares out the step's tokens: one to each decoding sequence, the rest to prompts in order of arrival. Returns their number.
    pub fn schedule(&mut self) -> usize {
        let mut budget = self.limits.max_batch_tokens;
        for sequence in &mut self.running {
            sequence.scheduled = usize::from(sequence.is_decoding()).min(budget);
            budget -= sequence.scheduled;
        }
        for sequence in self.running.iter_mut().filter(|s| !s.is_decoding()) {
            sequence.scheduled = sequence.prompt_remaining().min(budget);
            budget -= sequence.scheduled;
        }
        self.limits.max_batch_tokens - budget
    }

    /// Takes out the sequences that have finished; their part of the budget is free when this returns.
    pub fn take_finished(&mut self) -> Vec<Sequence> {
        let finished: Vec<Sequence> = self.running.extract_if(.., |s| s.finished.is_some()).collect();
        self.kv_bytes_used -= finished.iter().map(|s| s.reserved_bytes).sum::<usize>();
        finished
    }
}

/// Choices of a request that leave the queue without having run.
#[derive(Debug)]
pub(crate) struct Withdrawn {
    group: Arc<SequenceGroup>,
    output: UnboundedSender<StepOutput>,
    pub choices: Range<usize>,
}

impl Withdrawn {
    /// Sends each choice's last message.
    pub fn send_finished(&self, reason: &FinishReason) {
        for index in self.choices.clone() {
            let usage = Usage { prompt_tokens: self.group.prompt.len(), ..Usage::default() };
            let kind = OutputKind::Finished { reason: reason.clone(), usage, queued: self.group.arrived.elapsed() };
            // a receiver that is gone needs no message
            let _ = self.output.send(StepOutput { index, kind });
        }
    }
}

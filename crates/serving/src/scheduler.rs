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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{Request, SamplingParams};
    use evop_model::{Config, DType, Device};
    use std::path::Path;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    const LIMITS: Limits = Limits { max_concurrent: 3, max_batch_tokens: 8, kv_budget_bytes: 1000, kv_bytes_per_token: 10 };

    fn submit(scheduler: &mut Scheduler, prompt: usize, max_tokens: usize, n: usize) -> UnboundedReceiver<StepOutput> {
        let params = SamplingParams { max_tokens, ..SamplingParams::default() };
        let group = Arc::new(SequenceGroup::new(Request { prompt: vec![1; prompt], params, n, request_id: String::new() }));
        let (output, receiver) = unbounded_channel();
        scheduler.enqueue(group, output);
        receiver
    }

    fn admit(scheduler: &mut Scheduler) -> usize {
        let config = Config::from_json(include_str!("../../../models/tiny/config.json"), Path::new("config.json")).unwrap();
        scheduler.admit(&[], |capacity| SequenceCache::new(&config, DType::F32, &Device::Cpu, capacity));
        scheduler.running.len()
    }

    fn scheduled(scheduler: &mut Scheduler) -> Vec<usize> {
        scheduler.schedule();
        let scheduled = scheduler.running.iter().map(|s| s.scheduled).collect();
        // as if the step had run
        for sequence in &mut scheduler.running {
            sequence.computed += sequence.scheduled;
        }
        scheduled
    }

    #[test]
    fn decoding_sequences_come_first_and_prompts_share_the_rest_in_order() {
        let mut scheduler = Scheduler::new(LIMITS);
        let _receivers = [submit(&mut scheduler, 5, 4, 1), submit(&mut scheduler, 12, 4, 1), submit(&mut scheduler, 2, 4, 1)];
        assert_eq!(admit(&mut scheduler), 3);
        assert_eq!(scheduled(&mut scheduler), [5, 3, 0]);
        assert_eq!(scheduled(&mut scheduler), [1, 7, 0]);
        assert_eq!(scheduled(&mut scheduler), [1, 2, 2]);
        assert_eq!(scheduled(&mut scheduler), [1, 1, 1]);
    }

    #[test]
    fn the_first_in_the_queue_waits_for_memory_and_is_not_overtaken() {
        let mut scheduler = Scheduler::new(LIMITS);
        let _receivers = [submit(&mut scheduler, 50, 10, 1), submit(&mut scheduler, 40, 1, 1), submit(&mut scheduler, 1, 1, 1)];
        assert_eq!(admit(&mut scheduler), 1);
        assert_eq!(scheduler.kv_bytes_used(), 600);
        scheduler.running[0].finished = Some(FinishReason::Stop);
        assert_eq!(scheduler.take_finished().len(), 1);
        assert_eq!(scheduler.kv_bytes_used(), 0);
        assert_eq!(admit(&mut scheduler), 2);
        assert_eq!(scheduler.take_left_queue(), 3);
    }

    #[test]
    fn choices_are_admitted_one_by_one_and_the_request_waits_until_the_last() {
        let mut scheduler = Scheduler::new(LIMITS);
        let _receiver = submit(&mut scheduler, 1, 1, 4);
        assert_eq!(admit(&mut scheduler), 3);
        assert_eq!(scheduler.take_left_queue(), 0);
        scheduler.running[0].finished = Some(FinishReason::Stop);
        scheduler.take_finished();
        assert_eq!(admit(&mut scheduler), 3);
        assert_eq!(scheduler.running.iter().map(|s| s.index).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(scheduler.take_left_queue(), 1);
    }

    #[test]
    fn a_request_whose_receiver_is_gone_leaves_the_queue() {
        let mut scheduler = Scheduler::new(LIMITS);
        drop(submit(&mut scheduler, 1, 1, 2));
        let _kept = submit(&mut scheduler, 1, 1, 1);
        let withdrawn = scheduler.withdraw(UnboundedSender::is_closed);
        assert_eq!((withdrawn.len(), withdrawn[0].choices.clone()), (1, 0..2));
        assert_eq!(admit(&mut scheduler), 1);
    }
}

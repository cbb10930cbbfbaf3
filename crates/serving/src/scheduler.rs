//! Who runs, and which of its tokens come into the next step: continuous batching with chunked prefill, first come first served.
//!
//! Sequences take blocks as they grow. When there are none left, whoever came last gives its blocks back and waits, to be computed again later: the
//! oldest sequence always goes on, so every request ends.

use crate::blocks::Blocks;
use crate::output::{FinishReason, OutputKind, StepOutput, Usage};
use crate::pace::Pace;
use crate::sequence::{Sequence, SequenceGroup};
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;
use tokio::sync::mpsc::UnboundedSender;

/// The scheduler's limits, in its own units.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub max_concurrent: usize,
    pub max_batch_tokens: usize,
    pub decode_slowdown: Option<f64>,
}

/// What a step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Step {
    /// Sequences that decode: a token each.
    pub decoding: usize,
    /// Tokens of prompts, and of sequences that gave their blocks back.
    pub prompt_tokens: usize,
}

impl Step {
    pub fn is_empty(self) -> bool {
        self.decoding + self.prompt_tokens == 0
    }
}

/// A group of which choices `next..n` have no place yet.
#[derive(Debug)]
struct Waiting {
    group: Arc<SequenceGroup>,
    output: UnboundedSender<StepOutput>,
    next: usize,
    /// Choice `next`, once it has been first in the queue and there were no blocks for it.
    ready: Option<Box<Sequence>>,
}

/// The queue and the running sequences, in order of arrival.
#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    started: Instant,
    /// By when they are due.
    waiting: VecDeque<Waiting>,
    /// Sequences that had to give their blocks back, in order of arrival: before everyone who waits.
    preempted: VecDeque<Sequence>,
    pub running: Vec<Sequence>,
    pub blocks: Blocks,
    pub pace: Pace,
    tickets: u64,
    /// Requests that left the queue since [`Self::take_left_queue`].
    left_queue: usize,
    /// Sequences that had to give way, since the start.
    pub preemptions: u64,
    /// Prompt tokens that were looked for among known blocks, and those found, since the start.
    pub prefix: (u64, u64),
}

impl Scheduler {
    /// Over so many blocks of the pool.
    pub fn new(limits: Limits, blocks: usize) -> Self {
        Self {
            limits,
            started: Instant::now(),
            waiting: VecDeque::new(),
            preempted: VecDeque::new(),
            running: Vec::new(),
            blocks: Blocks::new(blocks),
            pace: Pace::new(limits.decode_slowdown),
            tickets: 0,
            left_queue: 0,
            preemptions: 0,
            prefix: (0, 0),
        }
    }

    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty() || !self.preempted.is_empty()
    }

    /// How many requests left the queue since this was last asked: admitted with all their choices, or withdrawn.
    pub fn take_left_queue(&mut self) -> usize {
        std::mem::take(&mut self.left_queue)
    }

    /// Lets a request wait: behind those that are due before it, and behind the first one if its turn has begun.
    pub fn enqueue(&mut self, group: Arc<SequenceGroup>, output: UnboundedSender<StepOutput>) {
        let due = self.due(&group);
        let behind = |w: &Waiting| w.next > 0 || w.ready.is_some() || self.due(&w.group) <= due;
        let at = self.waiting.iter().rposition(behind).map_or(0, |last| last + 1);
        self.waiting.insert(at, Waiting { group, output, next: 0, ready: None });
    }

    /// When a request's turn would come, in seconds since the start.
    fn due(&self, group: &SequenceGroup) -> f64 {
        group.arrived.saturating_duration_since(self.started).as_secs_f64() + f64::from(group.priority)
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

    /// Every sequence that has had a place: running, or waiting for blocks again.
    pub fn begun(&mut self) -> impl Iterator<Item = &mut Sequence> {
        self.running.iter_mut().chain(&mut self.preempted)
    }

    /// Gives places to waiting choices while there are some, those that had to give way first. The first in the queue waits for blocks rather than be
    /// overtaken. Returns choices that their caller stopped before they ran.
    pub fn admit(&mut self, eos: &[u32]) -> Vec<Withdrawn> {
        let mut stopped = Vec::new();
        while self.running.len() < self.limits.max_concurrent {
            if let Some(sequence) = self.preempted.pop_front() {
                if let Some(sequence) = self.place(sequence) {
                    self.preempted.push_front(sequence);
                    break;
                }
                continue;
            }
            let Some(mut first) = self.waiting.pop_front() else { break };
            if first.group.stopped[first.next].load(Relaxed) {
                first.ready = None;
                stopped.push(Withdrawn { group: Arc::clone(&first.group), output: first.output.clone(), choices: first.next..first.next + 1 });
            } else if self.running.iter().any(|s| Arc::ptr_eq(&s.group, &first.group) && s.index == 0 && !s.has_read_prompt()) {
                // its other choices find the prompt's blocks when the first one has filled them
                self.waiting.push_front(first);
                break;
            } else {
                let sequence = first.ready.take().unwrap_or_else(|| {
                    self.tickets += 1;
                    Box::new(Sequence::new(Arc::clone(&first.group), first.next, self.tickets, first.output.clone(), eos))
                });
                if let Some(sequence) = self.place(*sequence) {
                    first.ready = Some(Box::new(sequence));
                    self.waiting.push_front(first);
                    break;
                }
            }
            first.next += 1;
            if first.next < first.group.n {
                self.waiting.push_front(first);
            } else {
                self.left_queue += 1;
            }
        }
        stopped
    }

    /// Lets a sequence run if there are blocks for all its tokens and the next one, beside what those that run already lack for theirs and one more for
    /// each; gives it back otherwise.
    fn place(&mut self, mut sequence: Sequence) -> Option<Sequence> {
        let lacking = |sequence: &Sequence| sequence.lacks(sequence.tokens.len() + 1);
        sequence.find_prefix(&mut self.blocks);
        let running: usize = self.running.iter().map(|s| lacking(s) + 1).sum();
        if self.blocks.available() < lacking(&sequence) + running && running > 0 {
            sequence.release(&mut self.blocks);
            return Some(sequence);
        }
        if sequence.reuses_prefixes() {
            self.prefix.0 += sequence.tokens.len() as u64;
            self.prefix.1 += sequence.computed as u64;
        }
        sequence.begin();
        let at = self.running.partition_point(|s| s.ticket < sequence.ticket);
        self.running.insert(at, sequence);
        None
    }

    /// Plans a step: [`Self::share_out`], and where every sequence decodes so many drafts for each, as far as there are blocks and the step has room.
    /// `drafts` is told how many sequences take drafts. Returns the step without drafts.
    pub fn schedule(&mut self, drafts: impl FnOnce(usize) -> usize) -> Step {
        let step = self.share_out();
        let decoding = self.running.iter().filter(|s| s.may_draft() > 0).count();
        if decoding > 0 && self.running.iter().all(|s| s.scheduled == 1 && s.is_decoding()) {
            let drafts = drafts(decoding);
            let mut room = self.limits.max_batch_tokens.saturating_sub(step.decoding);
            let Self { running, blocks, .. } = self;
            for sequence in running {
                let wanted = drafts.min(sequence.may_draft()).min(room);
                let lacking = sequence.lacks(sequence.computed + 1 + wanted);
                // nobody gives way to a guess
                if wanted > 0 && lacking <= blocks.available() {
                    sequence.table.extend((0..lacking).filter_map(|_| blocks.take()));
                    sequence.drafting = wanted;
                    room -= wanted;
                }
            }
        }
        step
    }

    /// Shares out the step's tokens: one to each decoding sequence, then to prompts in order of arrival, each with the blocks that it needs. Beside
    /// decoding sequences prompts get what the pace allows, so that those don't wait long for their tokens.
    fn share_out(&mut self) -> Step {
        let mut budget = self.limits.max_batch_tokens;
        self.running.iter_mut().for_each(|s| (s.scheduled, s.drafting) = (0, 0));
        for decoding in [true, false] {
            let streaming = self.step().decoding;
            if !decoding && streaming > 0 {
                budget = self.pace.prompt_tokens(streaming, self.running.len() - streaming, budget);
            }
            let mut at = 0;
            while at < self.running.len() && budget > 0 {
                let sequence = &self.running[at];
                if sequence.is_decoding() != decoding || sequence.scheduled > 0 {
                    at += 1;
                    continue;
                }
                let wanted = sequence.remaining().min(budget);
                if self.hold(at, wanted) {
                    self.running[at].scheduled = wanted;
                    budget -= wanted;
                }
                at += 1;
            }
        }
        self.step()
    }

    /// What has been scheduled.
    fn step(&self) -> Step {
        let tokens = |decoding: bool| self.running.iter().filter(|s| s.is_decoding() == decoding).map(|s| s.scheduled).sum();
        Step { decoding: tokens(true), prompt_tokens: tokens(false) }
    }

    /// Gets the blocks for so many more tokens of the `at`-th running sequence, at the cost of those that came later, in the end its own place.
    fn hold(&mut self, at: usize, tokens: usize) -> bool {
        loop {
            let sequence = &mut self.running[at];
            let lacking = sequence.lacks(sequence.computed + tokens);
            if lacking <= self.blocks.available() {
                sequence.table.extend((0..lacking).filter_map(|_| self.blocks.take()));
                return true;
            }
            let Some(mut last) = self.running.pop() else { return false };
            last.release(&mut self.blocks);
            self.preemptions += 1;
            let before = self.preempted.partition_point(|s| s.ticket < last.ticket);
            self.preempted.insert(before, last);
            if self.running.len() == at {
                return false;
            }
        }
    }

    /// Takes out the sequences that have finished; their blocks are free when this returns.
    pub fn take_finished(&mut self) -> Vec<Sequence> {
        let mut finished: Vec<Sequence> = self.running.extract_if(.., |s| s.finished.is_some()).collect();
        let (ended, waiting): (VecDeque<Sequence>, VecDeque<Sequence>) = std::mem::take(&mut self.preempted).into_iter().partition(|s| s.finished.is_some());
        self.preempted = waiting;
        finished.extend(ended);
        finished.iter_mut().for_each(|s| s.release(&mut self.blocks));
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
            let kind = OutputKind::Finished { reason: reason.clone(), usage };
            // a receiver that is gone needs no message
            let _ = self.output.send(StepOutput::now(index, kind));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{Request, SamplingParams};
    use crate::sampler::Sampled;
    use std::time::Duration;
    use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

    const LIMITS: Limits = Limits { max_concurrent: 3, max_batch_tokens: 8, decode_slowdown: None };

    fn submit(scheduler: &mut Scheduler, prompt: Vec<u32>, max_tokens: usize, n: usize) -> UnboundedReceiver<StepOutput> {
        let params = SamplingParams { max_tokens, ..SamplingParams::default() };
        enqueue(scheduler, Request { prompt, params, n, ..Request::default() })
    }

    fn enqueue(scheduler: &mut Scheduler, request: Request) -> UnboundedReceiver<StepOutput> {
        let group = Arc::new(SequenceGroup::new(request));
        let (output, receiver) = unbounded_channel();
        scheduler.enqueue(group, output);
        receiver
    }

    fn admit(scheduler: &mut Scheduler) -> usize {
        scheduler.admit(&[]);
        scheduler.running.len()
    }

    /// A step whose every sample is token 7; what was scheduled for each sequence.
    fn step(scheduler: &mut Scheduler) -> Vec<usize> {
        scheduler.schedule(|_| 0);
        let scheduled = scheduler.running.iter().map(|s| s.scheduled).collect();
        let Scheduler { running, blocks, .. } = scheduler;
        for sequence in running.iter_mut().filter(|s| s.scheduled > 0) {
            sequence.sampled = sequence.samples().then_some(Ok(Sampled { id: 7, logprobs: None, completes: false })).into_iter().collect();
            sequence.advance(&[]);
            sequence.name_blocks(blocks);
        }
        scheduler.take_finished();
        scheduled
    }

    #[test]
    fn decoding_sequences_come_first_and_prompts_share_the_rest_in_order() {
        let mut scheduler = Scheduler::new(LIMITS, 100);
        let _receivers = [5, 12, 2].map(|n| submit(&mut scheduler, vec![1; n], 9, 1));
        assert_eq!(admit(&mut scheduler), 3);
        assert_eq!(step(&mut scheduler), [5, 3, 0]);
        assert_eq!(step(&mut scheduler), [1, 7, 0]);
        assert_eq!(step(&mut scheduler), [1, 2, 2]);
        assert_eq!(step(&mut scheduler), [1, 1, 1]);
    }

    #[test]
    fn beside_decoding_sequences_a_prompt_gets_what_the_pace_allows() {
        let limits = Limits { max_batch_tokens: 500, decode_slowdown: Some(2.0), ..LIMITS };
        let mut scheduler = Scheduler::new(limits, 100);
        let _receivers = [10, 400].map(|n| submit(&mut scheduler, vec![1; n], 9, 1));
        scheduler.limits.max_concurrent = 1;
        assert_eq!(admit(&mut scheduler), 1);
        assert_eq!(step(&mut scheduler), [10], "nobody decodes yet");
        scheduler.limits.max_concurrent = 3;
        assert_eq!(admit(&mut scheduler), 2);
        assert_eq!(step(&mut scheduler), [1, 0], "a first step shows what decoding takes");
        scheduler.pace.observe(1, 0, Duration::from_millis(20));
        scheduler.pace.observe(0, 100, Duration::from_millis(100));
        assert_eq!(scheduler.schedule(|_| 0), Step { decoding: 1, prompt_tokens: 15 }, "of the 20 that fit, so many that rows are a multiple of 8");
    }

    #[test]
    fn drafts_take_the_room_that_the_step_has() {
        let mut scheduler = Scheduler::new(LIMITS, 100);
        let _receivers = [2, 2, 2].map(|n| submit(&mut scheduler, vec![1; n], 9, 1));
        assert_eq!(admit(&mut scheduler), 3);
        assert_eq!(step(&mut scheduler), [2, 2, 2]);
        assert_eq!(scheduler.schedule(|sequences| sequences + 1), Step { decoding: 3, prompt_tokens: 0 });
        let drafting: Vec<usize> = scheduler.running.iter().map(|s| s.drafting).collect();
        assert_eq!(drafting, [4, 1, 0], "eight tokens a step");
    }

    #[test]
    fn who_waits_is_served_by_arrival_and_priority_and_one_whose_turn_has_begun_first() {
        let mut scheduler = Scheduler::new(Limits { max_concurrent: 1, ..LIMITS }, 100);
        let mut waiting = Vec::new();
        for (token, priority, n) in [(1, 0, 2), (2, 0, 1), (3, 5, 1), (4, -5, 1), (5, 0, 1)] {
            waiting.push(enqueue(&mut scheduler, Request { prompt: vec![token], n, priority, ..Request::default() }));
            scheduler.admit(&[]);
        }
        let order: Vec<u32> = scheduler.waiting.iter().map(|w| w.group.prompt[0]).collect();
        assert_eq!(order, [1, 4, 2, 5, 3]);
        // a later request of the first rank comes behind one of a rank that has waited for as long as the ranks are apart
        scheduler.started = Instant::now() - std::time::Duration::from_secs(60);
        let late = SequenceGroup {
            arrived: Instant::now() + std::time::Duration::from_secs(6),
            ..SequenceGroup::new(Request { prompt: vec![6], ..Request::default() })
        };
        scheduler.enqueue(Arc::new(late), unbounded_channel().0);
        assert_eq!(scheduler.waiting.back().map(|w| w.group.prompt[0]), Some(6));
    }

    #[test]
    fn the_first_in_the_queue_waits_for_blocks_and_is_not_overtaken() {
        let mut scheduler = Scheduler::new(Limits { max_batch_tokens: 64, ..LIMITS }, 4);
        let _receivers = [submit(&mut scheduler, vec![1; 60], 2, 1), submit(&mut scheduler, vec![2; 40], 1, 1), submit(&mut scheduler, vec![3], 1, 1)];
        assert_eq!(admit(&mut scheduler), 1);
        assert_eq!((step(&mut scheduler), scheduler.blocks.held()), (vec![60], 2));
        assert_eq!(admit(&mut scheduler), 1, "two blocks, and one for the sequence that runs");
        step(&mut scheduler);
        assert_eq!(scheduler.blocks.held(), 0);
        assert_eq!(admit(&mut scheduler), 2);
        assert_eq!(scheduler.take_left_queue(), 3);
    }

    #[test]
    fn who_came_last_gives_way_and_comes_back_with_what_it_made() {
        // 3 blocks: both prompts fit, but not both answers
        let mut scheduler = Scheduler::new(Limits { max_batch_tokens: 64, ..LIMITS }, 3);
        let _first = submit(&mut scheduler, vec![1; 20], 60, 1);
        let mut second = submit(&mut scheduler, vec![2; 10], 30, 1);
        assert_eq!(admit(&mut scheduler), 2);
        let mut steps = 0;
        while scheduler.has_work() {
            steps += 1;
            assert!(steps < 200, "it goes on");
            admit(&mut scheduler);
            step(&mut scheduler);
        }
        assert!(scheduler.preemptions > 0);
        assert_eq!(scheduler.blocks.held(), 0);
        let tokens = std::iter::from_fn(|| second.try_recv().ok()).filter(|o| matches!(o.kind, OutputKind::Token { .. })).count();
        assert_eq!(tokens, 30, "each token is sent once");
    }

    #[test]
    fn a_prompt_that_was_computed_before_is_not_computed_again() {
        let mut scheduler = Scheduler::new(Limits { max_batch_tokens: 200, ..LIMITS }, 20);
        let prompt: Vec<u32> = (0..100).collect();
        let _first = submit(&mut scheduler, prompt.clone(), 1, 1);
        admit(&mut scheduler);
        assert_eq!(step(&mut scheduler), [100]);
        // three whole blocks; of a prompt of whole blocks the last one is computed again, for its last token
        let _second = submit(&mut scheduler, prompt.clone(), 1, 1);
        admit(&mut scheduler);
        assert_eq!(step(&mut scheduler), [4]);
        let _third = submit(&mut scheduler, prompt[..96].to_vec(), 1, 1);
        admit(&mut scheduler);
        assert_eq!(step(&mut scheduler), [32]);
        assert_eq!(scheduler.prefix, (296, 96 + 64));
    }

    #[test]
    fn choices_wait_for_the_first_ones_prompt_and_the_request_until_the_last() {
        let mut scheduler = Scheduler::new(Limits { max_batch_tokens: 40, ..LIMITS }, 20);
        let _receiver = submit(&mut scheduler, (0..70).collect(), 50, 4);
        assert_eq!(admit(&mut scheduler), 1);
        step(&mut scheduler);
        assert_eq!(admit(&mut scheduler), 1);
        step(&mut scheduler);
        assert_eq!(admit(&mut scheduler), 3);
        assert_eq!(scheduler.take_left_queue(), 0);
        assert_eq!(step(&mut scheduler), [1, 6, 6], "two blocks of the prompt are there");
        assert_eq!(scheduler.blocks.held(), 2 + 3);
        scheduler.running[0].finished = Some(FinishReason::Stop);
        scheduler.take_finished();
        assert_eq!(admit(&mut scheduler), 3);
        assert_eq!(scheduler.running.iter().map(|s| s.index).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(scheduler.take_left_queue(), 1);
    }

    #[test]
    fn a_request_whose_receiver_is_gone_leaves_the_queue() {
        let mut scheduler = Scheduler::new(LIMITS, 10);
        drop(submit(&mut scheduler, vec![1], 1, 2));
        let _kept = submit(&mut scheduler, vec![1], 1, 1);
        let withdrawn = scheduler.withdraw(UnboundedSender::is_closed);
        assert_eq!((withdrawn.len(), withdrawn[0].choices.clone()), (1, 0..2));
        assert_eq!(admit(&mut scheduler), 1);
    }
}

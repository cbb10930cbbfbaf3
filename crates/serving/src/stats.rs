//! What the engine says about itself: counters that it writes and everyone may read at any time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A snapshot of the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineStats {
    /// Sequences (choices) that have a place in the batch, or had one and wait for memory.
    pub running: usize,
    /// Requests of which at least one choice still waits for a place.
    pub waiting: usize,
    /// Blocks of 32 tokens that running sequences hold.
    pub kv_blocks_used: usize,
    /// All blocks.
    pub kv_blocks: usize,
    /// Bytes of one block, in all layers.
    pub kv_block_bytes: usize,
    /// Sequences that had to give their blocks back and be computed again, since the start.
    pub preemptions: u64,
    /// Prompt tokens that were looked for among what other requests left, since the start.
    pub prefix_queries: u64,
    /// Those of them that were there.
    pub prefix_hits: u64,
    /// Prompt tokens read since the start; a prompt counts once whatever its `n`.
    pub prompt_tokens_total: u64,
    /// Tokens made since the start.
    pub generation_tokens_total: u64,
    /// Times that tokens were drafted for a sequence, since the start.
    pub drafts: u64,
    /// Tokens drafted.
    pub draft_tokens: u64,
    /// Those of them that were right.
    pub accepted_tokens: u64,
    /// Forward passes since the start.
    pub steps: u64,
    /// Choices that ended, by reason.
    pub finished: FinishedRequests,
    /// When the loop last went round. It does so when idle too, so an old instant means a step that takes that long.
    pub last_step: Instant,
}

/// Choices that ended since the start, by reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FinishedRequests {
    /// At an end-of-sequence or stop token, or by [`crate::RequestStream::stop_choice`].
    pub stop: u64,
    /// At `max_tokens`.
    pub length: u64,
    /// Dropped by the client, or by stopping the engine.
    pub cancelled: u64,
    /// In a step that failed.
    pub error: u64,
}

/// Shared by the engine's thread (which writes) and all handles (which read, and count themselves into the queue).
#[derive(Debug)]
pub(crate) struct Shared {
    started: Instant,
    pub kv_blocks: usize,
    pub kv_block_bytes: usize,
    pub running: AtomicUsize,
    pub waiting: AtomicUsize,
    pub kv_blocks_used: AtomicUsize,
    pub preemptions: AtomicU64,
    pub prefix_queries: AtomicU64,
    pub prefix_hits: AtomicU64,
    pub prompt_tokens: AtomicU64,
    pub generation_tokens: AtomicU64,
    pub drafts: AtomicU64,
    pub draft_tokens: AtomicU64,
    pub accepted_tokens: AtomicU64,
    pub steps: AtomicU64,
    finished: Mutex<FinishedRequests>,
    /// Steps by their tokens.
    iterations: Mutex<BTreeMap<usize, u64>>,
    /// Since `started`.
    last_step_nanos: AtomicU64,
    /// Between two finished choices, smoothed.
    finish_interval_nanos: AtomicU64,
    pub draining: AtomicBool,
    pub stopping: AtomicBool,
    pub alive: AtomicBool,
}

impl Shared {
    pub fn new(kv_blocks: usize, kv_block_bytes: usize) -> Self {
        Self {
            started: Instant::now(),
            kv_blocks,
            kv_block_bytes,
            running: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            kv_blocks_used: AtomicUsize::new(0),
            preemptions: AtomicU64::new(0),
            prefix_queries: AtomicU64::new(0),
            prefix_hits: AtomicU64::new(0),
            prompt_tokens: AtomicU64::new(0),
            generation_tokens: AtomicU64::new(0),
            drafts: AtomicU64::new(0),
            draft_tokens: AtomicU64::new(0),
            accepted_tokens: AtomicU64::new(0),
            steps: AtomicU64::new(0),
            finished: Mutex::default(),
            iterations: Mutex::default(),
            last_step_nanos: AtomicU64::new(0),
            finish_interval_nanos: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
            alive: AtomicBool::new(true),
        }
    }

    pub fn stats(&self) -> EngineStats {
        EngineStats {
            running: self.running.load(Relaxed),
            waiting: self.waiting.load(Relaxed),
            kv_blocks_used: self.kv_blocks_used.load(Relaxed),
            kv_blocks: self.kv_blocks,
            kv_block_bytes: self.kv_block_bytes,
            preemptions: self.preemptions.load(Relaxed),
            prefix_queries: self.prefix_queries.load(Relaxed),
            prefix_hits: self.prefix_hits.load(Relaxed),
            prompt_tokens_total: self.prompt_tokens.load(Relaxed),
            generation_tokens_total: self.generation_tokens.load(Relaxed),
            drafts: self.drafts.load(Relaxed),
            draft_tokens: self.draft_tokens.load(Relaxed),
            accepted_tokens: self.accepted_tokens.load(Relaxed),
            steps: self.steps.load(Relaxed),
            finished: *self.finished.lock().unwrap_or_else(PoisonError::into_inner),
            last_step: self.started + Duration::from_nanos(self.last_step_nanos.load(Relaxed)),
        }
    }

    pub fn heartbeat(&self) {
        self.last_step_nanos.store(nanos(self.started.elapsed()), Relaxed);
    }

    pub fn count_finished(&self, count: impl FnOnce(&mut FinishedRequests)) {
        count(&mut self.finished.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A step computes so many tokens.
    pub fn count_step(&self, tokens: usize) {
        self.steps.fetch_add(1, Relaxed);
        *self.iterations.lock().unwrap_or_else(PoisonError::into_inner).entry(tokens).or_default() += 1;
    }

    pub fn take_iterations(&self) -> BTreeMap<usize, u64> {
        std::mem::take(&mut *self.iterations.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A place became free, so long after the one before (while there was work).
    pub fn observe_finish_interval(&self, interval: Duration) {
        let (old, new) = (self.finish_interval_nanos.load(Relaxed), nanos(interval));
        let smoothed = if old == 0 { new } else { old - old / 8 + new / 8 };
        self.finish_interval_nanos.store(smoothed.max(1), Relaxed);
    }

    /// When a full queue can be expected to have a place again, in whole seconds: what `Retry-After` can say.
    pub fn retry_after(&self) -> Duration {
        let interval = Duration::from_nanos(self.finish_interval_nanos.load(Relaxed));
        Duration::from_secs(interval.as_secs().saturating_add(1).min(60))
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

//! How the rest of the program talks to the engine.

use crate::engine::EngineConfig;
use crate::output::StepOutput;
use crate::params::{InvalidParam, Request};
use crate::sequence::SequenceGroup;
use crate::stats::{EngineStats, Shared};
use crate::stream::RequestStream;
use evop_model::BLOCK_TOKENS;
use std::collections::BTreeMap;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

/// A message to the engine's thread.
pub(crate) enum Command {
    Submit(Arc<SequenceGroup>, UnboundedSender<StepOutput>),
    /// Look at the flags again.
    Wake,
}

/// Why a request is not taken. Nothing of it has run.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// A parameter is out of range.
    #[error(transparent)]
    Invalid(#[from] InvalidParam),
    /// Prompt and answer together are longer than the model's context.
    #[error("the prompt has {prompt} tokens and max_tokens is {max_tokens}: together more than the context of {limit} tokens")]
    ContextTooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: usize,
        /// Tokens that there can be.
        limit: usize,
    },
    /// Its key/value cache would not fit into the budget even alone.
    #[error("the request needs {needed_bytes} bytes of key/value cache, the server has {budget_bytes}: ask for fewer tokens")]
    TooLarge {
        /// What one choice needs.
        needed_bytes: usize,
        /// What there is.
        budget_bytes: usize,
    },
    /// Too many requests wait already.
    #[error("{waiting} requests are waiting already: try again in {} s", retry_after.as_secs())]
    QueueFull {
        /// Requests in the queue.
        waiting: usize,
        /// When a place can be expected, in whole seconds.
        retry_after: Duration,
    },
    /// The engine finishes what it has and takes nothing new.
    #[error("the server is shutting down")]
    Draining,
    /// The engine's thread has ended.
    #[error("the engine has stopped")]
    Stopped,
}

/// What every handle shares.
pub(crate) struct Inner {
    pub commands: mpsc::Sender<Command>,
    pub shared: Arc<Shared>,
    pub config: EngineConfig,
    pub vocab_size: usize,
    /// Forms of the model.
    pub members: usize,
    pub ended: watch::Receiver<()>,
}

/// The way to the engine's thread; cheap to clone. When the last one is dropped the engine finishes what it has and ends.
#[derive(Clone)]
pub struct EngineHandle {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineHandle").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

impl EngineHandle {
    pub(crate) fn new(inner: Inner) -> Self {
        Self { inner: Arc::new(inner) }
    }

    /// Puts a request into the queue.
    ///
    /// # Errors
    /// Why it can't be taken; see [`SubmitError`].
    pub fn submit(&self, request: Request) -> Result<RequestStream, SubmitError> {
        let Inner { commands, shared, config, .. } = self.inner.as_ref();
        if !self.is_alive() {
            return Err(SubmitError::Stopped);
        }
        if shared.draining.load(SeqCst) {
            return Err(SubmitError::Draining);
        }
        request.validate(self.inner.vocab_size, self.inner.members)?;
        let (prompt, max_tokens, limit) = (request.prompt.len(), request.params.max_tokens, config.max_model_len);
        if prompt.saturating_add(max_tokens) > limit {
            return Err(SubmitError::ContextTooLong { prompt, max_tokens, limit });
        }
        let needed = (prompt + max_tokens).div_ceil(BLOCK_TOKENS);
        if needed > shared.kv_blocks {
            return Err(SubmitError::TooLarge { needed_bytes: needed * shared.kv_block_bytes, budget_bytes: shared.kv_blocks * shared.kv_block_bytes });
        }
        self.take_place_in_queue()?;
        let group = Arc::new(SequenceGroup::new(request));
        let (output, receiver) = tokio::sync::mpsc::unbounded_channel();
        let stream = RequestStream::new(receiver, Arc::clone(&group));
        if commands.send(Command::Submit(group, output)).is_err() {
            shared.waiting.fetch_sub(1, Relaxed);
            return Err(SubmitError::Stopped);
        }
        Ok(stream)
    }

    /// Places that are free in the batch don't count against the queue: their requests only pass through it.
    fn take_place_in_queue(&self) -> Result<(), SubmitError> {
        let Inner { shared, config, .. } = self.inner.as_ref();
        let free = config.max_concurrent.saturating_sub(shared.running.load(Relaxed));
        let room = |waiting: usize| (waiting < config.max_queue + free).then_some(waiting + 1);
        match shared.waiting.fetch_update(Relaxed, Relaxed, room) {
            Ok(_) => Ok(()),
            Err(waiting) => Err(SubmitError::QueueFull { waiting, retry_after: shared.retry_after() }),
        }
    }

    /// The engine's counters.
    pub fn stats(&self) -> EngineStats {
        self.inner.shared.stats()
    }

    /// How many steps computed how many tokens (of prompts, answers and drafts) since this was last asked.
    pub fn take_iterations(&self) -> BTreeMap<usize, u64> {
        self.inner.shared.take_iterations()
    }

    /// The limits that the engine was started with.
    pub fn config(&self) -> &EngineConfig {
        &self.inner.config
    }

    /// Whether the engine's thread runs.
    pub fn is_alive(&self) -> bool {
        self.inner.shared.alive.load(SeqCst)
    }

    /// Refuses new requests from now on; the engine finishes those that it has, then ends. [`Self::ended`] waits for that.
    pub fn drain(&self) {
        self.inner.shared.draining.store(true, SeqCst);
        self.wake();
    }

    /// Ends every request at the next step with [`crate::FinishReason::Cancelled`], and then the engine.
    pub fn stop(&self) {
        self.inner.shared.draining.store(true, SeqCst);
        self.inner.shared.stopping.store(true, SeqCst);
        self.wake();
    }

    /// Waits until the engine's thread has ended, and the model's memory is free.
    pub async fn ended(&self) {
        // nothing is ever sent: the sender's end is the news
        while self.inner.ended.clone().changed().await.is_ok() {}
    }

    fn wake(&self) {
        // an engine that has ended needs no waking
        let _ = self.inner.commands.send(Command::Wake);
    }
}

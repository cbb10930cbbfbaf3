//! The engine's thread: `loop { admit; schedule; forward; sample; emit }`.

use crate::error::Error;
use crate::handle::{Command, EngineHandle, Inner};
use crate::model_runner::ModelRunner;
use crate::output::FinishReason;
use crate::scheduler::{Limits, Scheduler, Withdrawn};
use crate::sequence::Sequence;
use crate::speculation::{Drafting, Judged, Speculation};
use crate::stats::Shared;
use evop_model::device::bind_thread;
use evop_model::{BLOCK_TOKENS, DType, Decoder, Elastic, KvPool, Positions};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::mpsc::{self, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

/// How often an idle engine shows that it is alive.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// Key/value memory that [`EngineConfig::for_decoder`] plans with at most, unless one full context needs more.
const DEFAULT_KV_BUDGET_BYTES: usize = 4 << 30;

/// The engine's limits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EngineConfig {
    /// Sequences (choices) in a step.
    pub max_concurrent: usize,
    /// Requests that may wait; one more is refused.
    pub max_queue: usize,
    /// Tokens of one step: longer prompts are read in chunks. At least `max_concurrent`.
    pub max_batch_tokens: usize,
    /// What a step may take while sequences decode, in multiples of what it takes without prompts; more than 1. Prompts are read in chunks that
    /// small, so that a long one doesn't make everyone wait. `None` = in chunks of `max_batch_tokens`, which reads them fastest.
    pub decode_slowdown: Option<f64>,
    /// Tokens of prompt and answer together.
    pub max_model_len: usize,
    /// Bytes of key/value cache, in blocks of 32 tokens. Sequences take blocks as they grow; when there are none left, who came last gives way.
    pub kv_budget_bytes: usize,
    /// What keys and values are held in: what the model computes in, or on the CPU f16 for half the memory.
    pub kv_dtype: DType,
    /// Whether a thinner form of the model drafts for the whole one. The tokens stay the same.
    pub speculation: Option<Speculation>,
    /// Whether steps that generate are recorded as CUDA graphs and replayed, where the device can.
    pub cuda_graphs: bool,
}

impl EngineConfig {
    /// 32 sequences, 256 waiting, 512 tokens a step, 1.8 times as long a step with prompts as without, the model's whole context, and memory for all of that up to 4 GiB.
    pub fn for_decoder(decoder: &Decoder) -> Self {
        let max_model_len = decoder.config().max_position_embeddings;
        let max_concurrent = 32;
        let kv_dtype = decoder.dtype();
        let one = max_model_len * decoder.config().kv_bytes_per_token(kv_dtype.size_in_bytes());
        let kv_budget_bytes = (max_concurrent * one).min(DEFAULT_KV_BUDGET_BYTES).max(one);
        Self {
            max_concurrent,
            max_queue: 256,
            max_batch_tokens: 512,
            decode_slowdown: Some(1.8),
            max_model_len,
            kv_budget_bytes,
            kv_dtype,
            speculation: None,
            cuda_graphs: true,
        }
    }

    fn validate(&self, members: usize) -> Result<(), Error> {
        let Self { max_concurrent, max_batch_tokens, max_model_len, .. } = *self;
        if let Some(Speculation { member, most, .. }) = self.speculation
            && (member == 0 || member >= members || most == 0)
        {
            return Err(Error::Config(format!(
                "speculation: expected one of the {} thinner forms of the model and at least one draft, found number {member} and {most} drafts",
                members.saturating_sub(1)
            )));
        }
        if max_concurrent == 0 || max_model_len == 0 {
            return Err(Error::Config("max_concurrent and max_model_len: expected at least 1, found 0".into()));
        }
        if let Some(wrong) = self.decode_slowdown.filter(|s| !(*s > 1.0 && s.is_finite())) {
            return Err(Error::Config(format!("decode_slowdown: expected more than 1, found {wrong}")));
        }
        if max_batch_tokens < max_concurrent {
            return Err(Error::Config(format!(
                "max_batch_tokens: expected at least max_concurrent ({max_concurrent}), since every running sequence takes a token a step; found {max_batch_tokens}"
            )));
        }
        Ok(())
    }
}

/// Blocks that the budget is enough for; a model without attention needs none of the memory, but every sequence its table.
fn blocks(decoder: &Decoder, config: &EngineConfig) -> usize {
    match KvPool::bytes_per_block(decoder.config(), config.kv_dtype) {
        0 => config.max_concurrent * config.max_model_len.div_ceil(BLOCK_TOKENS),
        bytes => config.kv_budget_bytes / bytes,
    }
}

/// What the engine's thread owns.
#[derive(Debug)]
pub struct Engine {
    runner: ModelRunner,
    scheduler: Scheduler,
    drafting: Option<Drafting>,
    eos_token_ids: Vec<u32>,
    commands: mpsc::Receiver<Command>,
    shared: Arc<Shared>,
    /// When a place became free, or work came to an idle engine.
    last_finish: Instant,
    _ended: Ended,
}

/// Tells the handles that the thread has ended, however it did. Dropped last.
#[derive(Debug)]
struct Ended {
    shared: Arc<Shared>,
    _news: watch::Sender<()>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.shared.alive.store(false, SeqCst);
    }
}

impl Engine {
    /// Starts the engine's thread; it owns the model until it ends: a decoder, or one with thinner forms of it.
    ///
    /// # Errors
    /// [`Error::Config`] for limits that contradict each other, [`Error::Cache`] without memory for keys and values, [`Error::Thread`] if there
    /// can't be a thread.
    pub fn start(model: impl Into<Elastic>, eos_token_ids: Vec<u32>, config: EngineConfig) -> Result<EngineHandle, Error> {
        let model = model.into();
        config.validate(model.len())?;
        let decoder = model.parent();
        let positions = decoder.config().max_position_embeddings;
        if matches!(decoder.config().positions, Positions::Learned { .. }) && config.max_model_len > positions {
            return Err(Error::Config(format!("max_model_len: expected at most the model's {positions} learned positions, found {}", config.max_model_len)));
        }
        if config.kv_dtype != decoder.dtype() && !(decoder.device().is_cpu() && config.kv_dtype == DType::F16) {
            return Err(Error::Config(format!(
                "kv_dtype: keys and values are held in {}, which this model computes in, or on the CPU in f16; found {}",
                decoder.dtype().as_str(),
                config.kv_dtype.as_str()
            )));
        }
        let blocks = blocks(decoder, &config);
        let (drafter, drafts) = config.speculation.map_or((0, 0), |s| (s.member, s.most));
        let graph_rows = if config.cuda_graphs { config.max_concurrent.saturating_mul(1 + drafts) } else { 0 };
        Self::spawn(ModelRunner::new(model, blocks, config.kv_dtype, drafter, graph_rows).map_err(Error::Cache)?, eos_token_ids, config)
    }

    fn spawn(runner: ModelRunner, eos_token_ids: Vec<u32>, config: EngineConfig) -> Result<EngineHandle, Error> {
        let decoder = runner.decoder();
        let (vocab_size, block_bytes) = (decoder.config().vocab_size, KvPool::bytes_per_block(decoder.config(), config.kv_dtype));
        let EngineConfig { max_concurrent, max_batch_tokens, decode_slowdown, .. } = config;
        let scheduler = Scheduler::new(Limits { max_concurrent, max_batch_tokens, decode_slowdown }, runner.blocks());
        let shared = Arc::new(Shared::new(runner.blocks(), block_bytes));
        let (sender, commands) = mpsc::channel();
        let (news, ended) = watch::channel(());
        let handle = EngineHandle::new(Inner { commands: sender, shared: Arc::clone(&shared), config, vocab_size, members: runner.members(), ended });
        let _ended = Ended { shared: Arc::clone(&shared), _news: news };
        let drafting = config.speculation.map(Drafting::new);
        let engine = Self { runner, scheduler, drafting, eos_token_ids, commands, shared, last_finish: Instant::now(), _ended };
        std::thread::Builder::new().name("evop-engine".into()).spawn(move || engine.run())?;
        Ok(handle)
    }

    fn run(mut self) {
        let device = self.runner.device().clone();
        bind_thread(&device);
        while self.receive() {
            device.with_context(|| self.step());
        }
        if self.shared.stopping.load(SeqCst) {
            self.cancel_everything();
        }
        tracing::debug!("the engine's thread ends");
    }

    /// Takes in new requests, waiting for one if there is nothing to do. False when the engine should end.
    fn receive(&mut self) -> bool {
        loop {
            self.shared.heartbeat();
            let ending = self.shared.draining.load(SeqCst);
            let received = if self.scheduler.has_work() || ending {
                self.commands.try_recv()
            } else {
                match self.commands.recv_timeout(HEARTBEAT) {
                    Ok(command) => {
                        self.last_finish = Instant::now();
                        Ok(command)
                    }
                    Err(RecvTimeoutError::Timeout) => Err(TryRecvError::Empty),
                    Err(RecvTimeoutError::Disconnected) => Err(TryRecvError::Disconnected),
                }
            };
            match received {
                // even when the engine is to end: what was taken off the channel is owed an end of its own
                Ok(Command::Submit(group, output)) => self.scheduler.enqueue(group, output),
                _ if self.shared.stopping.load(SeqCst) => return false,
                Ok(Command::Wake) => {}
                Err(_) if self.scheduler.has_work() => return true,
                Err(TryRecvError::Disconnected) => return false,
                Err(TryRecvError::Empty) if ending => return false,
                Err(TryRecvError::Empty) => {}
            }
        }
    }

    fn step(&mut self) {
        self.drop_abandoned();
        let stopped = self.scheduler.admit(&self.eos_token_ids);
        self.finish_withdrawn(&stopped, &FinishReason::Stop);
        let mut drafts = None;
        let drafting = &mut self.drafting;
        let step = self.scheduler.schedule(|sequences| {
            drafts = drafting.as_mut().map(|drafting| (sequences, drafting.choose(sequences)));
            drafts.map_or(0, |(_, drafts)| drafts)
        });
        self.publish();
        if step.is_empty() {
            return;
        }
        self.shared.count_step(self.scheduler.running.iter().map(Sequence::step_tokens).sum());
        let began = Instant::now();
        self.compute();
        let elapsed = began.elapsed();
        // (drafting makes a step longer, and is no reason to think that decoding is slow)
        if drafts.is_none_or(|(_, drafts)| drafts == 0) {
            self.scheduler.pace.observe(step.decoding, step.prompt_tokens, elapsed);
        }
        let judged = self.emit();
        if let (Some(drafting), Some((sequences, drafts))) = (&mut self.drafting, drafts) {
            drafting.observe(sequences, drafts, judged, elapsed);
        }
    }

    /// Ends what nobody listens to any more, and what its caller stopped.
    fn drop_abandoned(&mut self) {
        let gone = self.scheduler.withdraw(UnboundedSender::is_closed);
        self.finish_withdrawn(&gone, &FinishReason::Cancelled);
        for sequence in self.scheduler.begun() {
            // stopped first: a caller that found its stop string may then drop the stream
            if sequence.is_stopped() {
                sequence.finished = Some(FinishReason::Stop);
            } else if sequence.is_abandoned() {
                sequence.finished = Some(FinishReason::Cancelled);
            }
        }
        self.finish();
    }

    /// The forward pass and the sampling. An error or a panic ends the sequences that were in it, and only those.
    fn compute(&mut self) {
        let (runner, running) = (&mut self.runner, &mut self.scheduler.running);
        let message = match catch_unwind(AssertUnwindSafe(|| runner.step(running))) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error.to_string(),
            Err(panic) => format!("panic: {}", panic_message(panic.as_ref())),
        };
        for sequence in running.iter_mut().filter(|s| s.scheduled > 0) {
            tracing::error!(request_id = sequence.group.request_id, index = sequence.index, %message, "a step failed");
            sequence.finished = Some(FinishReason::Error(format!("the model failed: {message}")));
        }
    }

    /// Sends what the step made. Returns what became of its drafts.
    fn emit(&mut self) -> Judged {
        let mut judged = Judged::default();
        let Scheduler { running, blocks, .. } = &mut self.scheduler;
        for sequence in running.iter_mut().filter(|s| s.scheduled > 0 && s.finished.is_none()) {
            let advanced = sequence.advance(&self.eos_token_ids);
            sequence.name_blocks(blocks);
            self.shared.prompt_tokens.fetch_add(advanced.prompt_tokens as u64, Relaxed);
            self.shared.generation_tokens.fetch_add(advanced.generated_tokens as u64, Relaxed);
            if advanced.drafts > 0 {
                let right = advanced.generated_tokens.saturating_sub(1);
                self.shared.drafts.fetch_add(1, Relaxed);
                self.shared.draft_tokens.fetch_add(advanced.drafts as u64, Relaxed);
                self.shared.accepted_tokens.fetch_add(right as u64, Relaxed);
                judged.right += right;
                judged.looked_at += advanced.drafts.min(right + 1);
            }
        }
        self.finish();
        judged
    }

    /// Takes the finished sequences out; by the time that a client reads of the end, the memory counts as free.
    fn finish(&mut self) {
        let finished = self.scheduler.take_finished();
        if finished.is_empty() {
            return;
        }
        self.publish();
        self.shared.observe_finish_interval(self.last_finish.elapsed() / finished.len() as u32);
        self.last_finish = Instant::now();
        for reason in finished.iter().filter_map(|s| s.finished.as_ref()) {
            self.count(reason, 1);
        }
        finished.iter().for_each(Sequence::send_finished);
    }

    fn finish_withdrawn(&self, withdrawn: &[Withdrawn], reason: &FinishReason) {
        for request in withdrawn {
            self.count(reason, request.choices.len());
            request.send_finished(reason);
        }
    }

    fn count(&self, reason: &FinishReason, choices: usize) {
        self.shared.count_finished(|finished| {
            let counter = match reason {
                FinishReason::Stop | FinishReason::StopToken(_) => &mut finished.stop,
                FinishReason::Length => &mut finished.length,
                FinishReason::Cancelled => &mut finished.cancelled,
                FinishReason::Error(_) => &mut finished.error,
            };
            *counter += choices as u64;
        });
    }

    /// Brings the shared counters up to date.
    fn publish(&mut self) {
        let Shared { running, waiting, kv_blocks_used, preemptions, prefix_queries, prefix_hits, .. } = self.shared.as_ref();
        running.store(self.scheduler.begun().count(), Relaxed);
        kv_blocks_used.store(self.scheduler.blocks.held(), Relaxed);
        preemptions.store(self.scheduler.preemptions, Relaxed);
        prefix_queries.store(self.scheduler.prefix.0, Relaxed);
        prefix_hits.store(self.scheduler.prefix.1, Relaxed);
        // after `running`, so that a request that passes from one to the other is never in neither
        waiting.fetch_sub(self.scheduler.take_left_queue(), Relaxed);
    }

    /// The end by [`EngineHandle::stop`].
    fn cancel_everything(&mut self) {
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Submit(group, output) = command {
                self.scheduler.enqueue(group, output);
            }
        }
        let waiting = self.scheduler.withdraw(|_| true);
        self.finish_withdrawn(&waiting, &FinishReason::Cancelled);
        for sequence in self.scheduler.begun() {
            sequence.finished = Some(FinishReason::Cancelled);
        }
        self.finish();
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::{OutputKind, Usage};
    use crate::params::{Request, SamplingParams};
    use crate::stream::RequestStream;
    use evop_model::{Checkpoint, DType, Device};

    const POISON: u32 = 4095;

    fn engine(fault: crate::model_runner::Fault) -> EngineHandle {
        let checkpoint = Checkpoint::open(std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny"))).unwrap();
        let decoder = checkpoint.decoder(&Device::Cpu, DType::F32).unwrap();
        // one token a step and sequence, two sequences: the second request's prompt is still read while the first decodes
        let config = EngineConfig { max_batch_tokens: 2, max_concurrent: 2, ..EngineConfig::for_decoder(&decoder) };
        let mut runner = ModelRunner::new(decoder.into(), 64, DType::F32, 0, 0).unwrap();
        runner.fault = Some(fault);
        Engine::spawn(runner, vec![0], config).unwrap()
    }

    fn submit(engine: &EngineHandle, prompt: Vec<u32>) -> RequestStream {
        let params = SamplingParams { max_tokens: 5, temperature: 0.0, ignore_eos: true, ..SamplingParams::default() };
        engine.submit(Request { prompt, params, request_id: "test".into(), ..Request::default() }).unwrap()
    }

    fn end(mut stream: RequestStream) -> (FinishReason, Usage) {
        while let Some(output) = stream.blocking_next() {
            if let OutputKind::Finished { reason, usage, .. } = output.kind {
                return (reason, usage);
            }
        }
        panic!("the stream ended without a reason");
    }

    #[test]
    fn an_error_in_a_step_ends_its_sequences_and_the_engine_goes_on() {
        let engine = engine(|tokens| match tokens.contains(&POISON) {
            true => Err(evop_model::Error::Device("out of memory".into())),
            false => Ok(()),
        });
        assert!(matches!(end(submit(&engine, vec![5, POISON])).0, FinishReason::Error(text) if text.contains("out of memory")));
        assert_eq!(end(submit(&engine, vec![5])).0, FinishReason::Length);
        let stats = engine.stats();
        assert_eq!((stats.finished.error, stats.finished.length, stats.running, stats.kv_blocks_used), (1, 1, 0, 0));
    }

    #[test]
    fn a_panic_in_a_step_ends_its_sequences_and_the_engine_goes_on() {
        let engine = engine(|tokens| {
            assert!(!tokens.contains(&POISON), "poisoned");
            Ok(())
        });
        assert!(matches!(end(submit(&engine, vec![POISON])).0, FinishReason::Error(text) if text.contains("poisoned")));
        assert_eq!(end(submit(&engine, vec![5, 6])), (FinishReason::Length, Usage { prompt_tokens: 2, cached_tokens: 0, completion_tokens: 5 }));
        assert!(engine.is_alive());
    }

    #[test]
    fn a_sequence_that_was_not_in_the_failed_step_is_not_touched() {
        // the budget is two tokens: the poison's prompt and a decoding sequence fill a step, a third waits outside
        let engine = engine(|tokens| match tokens.contains(&POISON) {
            true => Err(evop_model::Error::Device("out of memory".into())),
            false => Ok(()),
        });
        let poisoned = submit(&engine, vec![5, 6, 7, 8, POISON]);
        let beside = submit(&engine, vec![5, 6]);
        let waiting = submit(&engine, vec![5]);
        assert!(matches!(end(poisoned).0, FinishReason::Error(_)));
        end(beside);
        assert_eq!(end(waiting).0, FinishReason::Length);
    }

    #[test]
    fn contradicting_limits_are_refused() {
        let config = EngineConfig {
            max_concurrent: 4,
            max_queue: 1,
            max_batch_tokens: 3,
            decode_slowdown: None,
            max_model_len: 8,
            kv_budget_bytes: 0,
            kv_dtype: DType::F32,
            speculation: None,
            cuda_graphs: true,
        };
        assert!(config.validate(1).unwrap_err().to_string().starts_with("max_batch_tokens"));
        assert!(EngineConfig { max_concurrent: 0, ..config }.validate(1).is_err());
        assert!(EngineConfig { max_batch_tokens: 4, decode_slowdown: Some(1.0), ..config }.validate(1).is_err());
    }
}

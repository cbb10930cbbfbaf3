//! How tokens are **made** from a checkpoint: scheduler, key/value memory, sampler, step loop; and the text on both ends of it.
//!
//! One thread owns the decoder and runs `loop { admit; schedule; forward; sample; emit }`; everyone else holds an [`EngineHandle`] and
//! talks to it by channels.
//!
//! ```no_run
//! use evop_model::{Checkpoint, DType, Device};
//! use evop_serving::{Engine, EngineConfig, OutputKind, Request, SamplingParams};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let checkpoint = Checkpoint::open(std::path::Path::new("models/tiny"))?;
//! let decoder = checkpoint.decoder(&Device::Cpu, DType::F32)?;
//! let config = EngineConfig::for_decoder(&decoder);
//! let engine = Engine::start(decoder, checkpoint.config().eos_token_ids.clone(), config)?;
//! let prompt = checkpoint.encode("Once upon a time", true)?;
//! let params = SamplingParams { max_tokens: 20, temperature: 0.0, ..SamplingParams::default() };
//! let mut stream = engine.submit(Request { prompt, params, ..Request::default() })?;
//! while let Some(output) = stream.blocking_next() {
//!     if let OutputKind::Token { id, .. } = output.kind {
//!         println!("{id}");
//!     }
//! }
//! # Ok(()) }
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod blocks;
mod chat;
mod detokenizer;
mod engine;
mod error;
mod grammar;
mod handle;
mod jinja;
mod logprobs;
mod model_runner;
mod output;
mod pace;
mod params;
mod python;
mod sampler;
mod scheduler;
mod sequence;
mod speculation;
mod stats;
mod stop;
mod stream;
mod strftime;
mod token_text;

pub use chat::{ChatError, ChatInput, ChatRenderer};
pub use detokenizer::Detokenizer;
pub use engine::{Engine, EngineConfig};
pub use error::Error;
pub use grammar::{Grammar, GrammarCompiler, GrammarError, GrammarSource, MARKERS, Thinking, Whitespace};
pub use handle::{EngineHandle, SubmitError};
pub use output::{FinishReason, OutputKind, StepOutput, TokenLogprob, TokenLogprobs, Usage};
pub use params::{InvalidParam, MAX_CHOICES, MAX_LOGPROBS, Request, SamplingParams};
pub use speculation::Speculation;
pub use stats::{EngineStats, FinishedRequests};
pub use stop::{StopMatcher, Stopped};
pub use stream::RequestStream;
pub use token_text::{TokenText, as_text};

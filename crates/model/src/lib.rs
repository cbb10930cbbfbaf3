//! What a decoder, pruned or dense, **is**: its configuration, its weights and its forward pass.
//!
//! The search (`evop-pruning`) and the server (`evop-serving`) both run the [`Decoder`] of this crate, so a
//! [`Pattern`] that was scored in the search is, by construction, the model that is served.
//!
//! ```no_run
//! use evop_model::{Checkpoint, Device, DType, NoCache, Span};
//! # fn main() -> Result<(), evop_model::Error> {
//! let checkpoint = Checkpoint::open(std::path::Path::new("models/tiny"))?;
//! let decoder = checkpoint.decoder(&Device::Cpu, DType::F32)?;
//! let tokens = [11, 42, 7];
//! let batch = decoder.batch(&[Span::prompt(tokens.len())])?;
//! let hidden = decoder.forward(&tokens, &batch, &mut NoCache)?;   // [tokens, hidden_size]
//! let logits = decoder.logits(&hidden)?;                          // [tokens, vocab_size], f32
//! # Ok(()) }
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod attention;
mod batch;
mod block_configs;
mod cache;
mod chat;
mod checkpoint;
mod config;
#[cfg(feature = "cuda")]
mod cuda;
mod decoder;
mod decoder_source;
pub mod device;
mod elastic;
mod error;
pub mod gguf;
mod graphs;
mod held;
mod heterogeneous;
pub mod kernels;
mod linear;
mod matrix;
mod ordered_source;
mod pattern;
mod random_source;
mod rope;
mod safetensors_source;
mod source;
mod sub_block;
mod widths;

pub use attention::AttentionSpec;
pub use batch::{Batch, Place, Span};
pub use cache::{BLOCK_TOKENS, FixedCache, KvCache, KvPool, NoCache, PagedCache};
pub use candle_core::{DType, Device, Tensor};
pub use chat::ChatTemplate;
pub use checkpoint::{Checkpoint, EmbeddedFiles, GenerationConfig, open_weights};
pub use config::{Activation, Architecture, Config, LayerConfig, LayerShape, NormKind, Positions, ShapeOrigin};
pub use decoder::Decoder;
pub use decoder_source::DecoderSource;
pub use elastic::Elastic;
pub use error::{Error, Result};
pub use graphs::StepGraphs;
pub use held::{Held, HeldBytes, WeightType, held_in_words};
pub use kernels::ggml::BlockType;
pub use linear::{Linear, Norm};
pub use ordered_source::OrderedSource;
pub use pattern::{Gene, Pattern};
pub use random_source::RandomSource;
pub use rope::{RopeParameters, RopeScaling};
pub use source::{RawTensor, Source, Stored, TensorBytes, TensorNames, bias_of};
pub use sub_block::SubBlock;
pub use tokenizers::Tokenizer;
pub use widths::Widths;

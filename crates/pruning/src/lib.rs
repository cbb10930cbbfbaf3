//! How a pruning pattern is **found** and a checkpoint is **written**: corpus -> calibration -> search -> pattern -> checkpoint -> report.
//!
//! [`run::prune`] is the whole flow; every step is a module of its own and can be used alone.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod budget;
pub mod calibration;
pub mod checkpoint;
pub mod clusters;
pub mod compensate;
mod embed;
mod error;
pub mod eval;
pub mod evaluate;
mod gram;
pub mod importance;
mod key_tokens;
mod latency;
pub mod levels;
mod linalg;
mod loss;
mod names;
mod numbers;
pub mod objective;
mod pack;
pub mod per_cluster;
pub mod picture;
mod prefix_cache;
mod projection;
pub mod report;
pub mod run;
pub mod search;
pub mod space;
pub mod storage;
mod stream;
pub mod supernet;
#[cfg(test)]
mod testing;
pub mod vocabulary;

pub use embed::{Embedder, HiddenStates, SentenceTransformer};
pub use error::{Error, Result};

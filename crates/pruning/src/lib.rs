//! How a pruning pattern is **found** and a checkpoint is **written**: corpus -> calibration -> search -> pattern -> checkpoint -> report.
//!
//! [`run::prune`] is the whole flow; every step is a module of its own and can be used alone.
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod calibration;
pub mod checkpoint;
mod embed;
mod error;
pub mod eval;
pub mod evaluate;
mod loss;
pub mod report;
pub mod run;
pub mod search;
mod storage;

pub use embed::{Embedder, HiddenStates, SentenceTransformer};
pub use error::{Error, Result};

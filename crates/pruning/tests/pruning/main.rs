//! Pruning the bundled model, and a real one where it has been fetched.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod embedder;
mod evaluation;
mod perplexity;
mod runs;
mod setting;

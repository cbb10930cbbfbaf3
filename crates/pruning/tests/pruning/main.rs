//! Pruning the bundled model, and a real one where it has been fetched.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod checkpoints;
mod embedder;
mod evaluation;
mod multiple_choice;
mod perplexity;
mod runs;
mod setting;
mod small_models;
mod strategies;
mod vocabulary;

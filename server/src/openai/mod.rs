//! The OpenAI-compatible API: handlers translate and stream, and hold no model logic.
//!
//! `POST /v1/completions` -> [`completions`] -> [`fields`] and [`completion_request`] -> [`admission`] submits to the engine ->
//! [`generation`] turns tokens into events -> [`collect`] or [`sse`] turn events into the answer.

mod admission;
mod body;
pub mod chat;
mod chat_request;
mod choice;
mod collect;
mod completion_request;
pub mod completions;
pub mod errors;
pub mod fields;
mod generation;
mod logprobs;
pub mod models;
mod sampling;
mod sse;
pub mod token_text;
pub mod tokenize;
mod types;

pub use body::JsonBody;

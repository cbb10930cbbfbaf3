//! The OpenAI-compatible API: handlers translate and stream, and hold no model logic.
//!
//! `POST /v1/completions` -> [`completions`] -> [`fields`] and [`completion_request`] -> [`admission`] submits to the engine ->
//! [`generation`] turns tokens into events -> [`collect`] or [`sse`] turn events into the answer. What the output must be like is read by
//! [`structured`] and [`tools`]; a chat's reasoning and tool calls are found in its text by [`chat_output`].
//!
//! [`responses`] and [`messages`] are other APIs over the same chat: [`conversion`] makes their requests a chat's body, [`turn`] its deltas their items or
//! blocks.

mod admission;
mod body;
mod call_scanner;
pub mod chat;
mod chat_output;
mod chat_request;
mod choice;
mod collect;
mod completion_request;
pub mod completions;
mod conversion;
pub mod errors;
pub mod fields;
mod generation;
mod logprobs;
pub mod messages;
pub mod models;
mod reasoning;
pub mod responses;
mod sampling;
pub mod schema;
mod sse;
mod structured;
pub mod tokenize;
mod tool_parser;
mod tools;
mod turn;
mod types;

pub use body::JsonBody;

//! The shapes of a message and of the events that stream it.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::{IntoResponses, ToSchema};

/// A message, whole or as far as it has come.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Message {
    /// Unique.
    pub id: String,
    /// `message`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// `assistant`.
    pub role: &'static str,
    /// The model as the request named it.
    pub model: String,
    /// What the model thought, said and called, in order.
    pub content: Vec<Block>,
    /// `null` while it goes on.
    pub stop_reason: Option<StopReason>,
    /// Which of the request's `stop_sequences` ended it.
    pub stop_sequence: Option<String>,
    /// Token counts.
    pub usage: MessageUsage,
}

/// How a message ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = MessageStopReason)]
pub enum StopReason {
    /// The model had no more to say.
    EndTurn,
    /// At `max_tokens`.
    MaxTokens,
    /// At one of `stop_sequences`.
    StopSequence,
    /// The model waits for a tool's result.
    ToolUse,
}

/// Token counts.
#[derive(Debug, Clone, Copy, Serialize, ToSchema)]
pub struct MessageUsage {
    /// Of the prompt, without those that were in a cache.
    pub input_tokens: usize,
    /// Of the prompt, those that were in a cache.
    pub cache_read_input_tokens: usize,
    /// `0`: the cache costs nothing.
    pub cache_creation_input_tokens: usize,
    /// Of the answer.
    pub output_tokens: usize,
}

/// One block of a message.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schema(as = MessageBlock)]
pub enum Block {
    /// What the model thought.
    Thinking {
        /// The text.
        thinking: String,
        /// Empty: nothing here is signed.
        signature: String,
    },
    /// What it said.
    Text {
        /// The text.
        text: String,
    },
    /// What it wants to be called.
    ToolUse {
        /// To answer to.
        id: String,
        /// Which tool.
        name: String,
        /// What it is called with; empty if that was cut short.
        #[schema(value_type = Object)]
        input: Map<String, Value>,
    },
}

/// What happens to a message that is streamed.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum MessageEvent {
    /// It begins.
    MessageStart {
        /// Without content.
        message: Box<Message>,
    },
    /// Nothing; sent to keep the connection.
    Ping,
    /// A block begins.
    ContentBlockStart {
        /// Its number.
        index: usize,
        /// Without text.
        content_block: Block,
    },
    /// More of a block.
    ContentBlockDelta {
        /// Its number.
        index: usize,
        /// What is new.
        delta: BlockDelta,
    },
    /// A block is complete.
    ContentBlockStop {
        /// Its number.
        index: usize,
    },
    /// The message is complete.
    MessageDelta {
        /// How it ended.
        delta: MessageEnd,
        /// Token counts.
        usage: MessageUsage,
    },
    /// Nothing more comes.
    MessageStop,
    /// The message ended by an error.
    Error {
        /// Which.
        error: ErrorDetail,
    },
}

impl MessageEvent {
    /// Its `type`, which is also the name of the stream's event.
    pub fn name(&self) -> &'static str {
        match self {
            Self::MessageStart { .. } => "message_start",
            Self::Ping => "ping",
            Self::ContentBlockStart { .. } => "content_block_start",
            Self::ContentBlockDelta { .. } => "content_block_delta",
            Self::ContentBlockStop { .. } => "content_block_stop",
            Self::MessageDelta { .. } => "message_delta",
            Self::MessageStop => "message_stop",
            Self::Error { .. } => "error",
        }
    }
}

/// What is new of a block.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(tag = "type")]
#[schema(as = MessageBlockDelta)]
pub enum BlockDelta {
    /// Of reasoning.
    #[serde(rename = "thinking_delta")]
    Thinking {
        /// The text.
        thinking: String,
    },
    /// Of text.
    #[serde(rename = "text_delta")]
    Text {
        /// The text.
        text: String,
    },
    /// Of a tool's input.
    #[serde(rename = "input_json_delta")]
    InputJson {
        /// JSON text, as the model writes it.
        partial_json: String,
    },
}

/// How a message ended.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct MessageEnd {
    /// Why.
    pub stop_reason: Option<StopReason>,
    /// Which of the request's `stop_sequences` ended it.
    pub stop_sequence: Option<String>,
}

/// Anthropic's error object.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct MessageError {
    /// `error`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Which.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = MessageErrorDetail)]
pub struct ErrorDetail {
    /// Kind of error.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// In words; names the field, where it is one.
    pub message: String,
}

/// How long a prompt is.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct TokenCount {
    /// Tokens.
    pub input_tokens: usize,
}

/// What else a request may be answered with, for the OpenAPI document.
#[derive(Debug, IntoResponses)]
#[allow(dead_code, reason = "described, never made")]
pub enum MessageProblems {
    /// A field has a value that can't be used; the message says which.
    #[response(status = 400)]
    Invalid(MessageError),
    /// A key is needed, or this one is not known.
    #[response(status = 401)]
    Unauthorized(MessageError),
    /// There is no such model.
    #[response(status = 404)]
    NotFound(MessageError),
    /// The request's body did not arrive in time.
    #[response(status = 408)]
    SlowBody(MessageError),
    /// The request's body is too large.
    #[response(status = 413)]
    TooLarge(MessageError),
    /// Too many requests; `Retry-After` says when to come back.
    #[response(status = 429)]
    TooMany(MessageError),
    /// Something went wrong in the server.
    #[response(status = 500)]
    Internal(MessageError),
    /// The model is still loading, or the server is shutting down.
    #[response(status = 503)]
    Unavailable(MessageError),
    /// It took longer than `--request-timeout`.
    #[response(status = 504)]
    Timeout(MessageError),
}

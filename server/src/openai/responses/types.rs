//! The shapes of a response and of the events that stream it.

use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// A response, whole or as far as it has come.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Response {
    /// Unique.
    pub id: String,
    /// `response`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created_at: u64,
    /// Seconds since 1970; `null` unless it is completed.
    pub completed_at: Option<u64>,
    /// How far it has come.
    pub status: Status,
    /// Why it failed.
    pub error: Option<ResponseError>,
    /// Why it is incomplete.
    pub incomplete_details: Option<IncompleteDetails>,
    /// The model as the request named it.
    pub model: String,
    /// What the model thought, said and called, in order.
    pub output: Vec<OutputItem>,
    /// Randomness: the request's, or the model's own.
    pub temperature: f32,
    /// Nucleus: the request's, or the model's own.
    pub top_p: f32,
    /// What the request said.
    #[serde(flatten)]
    pub echo: Echo,
    /// `null` until it has ended.
    pub usage: Option<ResponseUsage>,
}

/// How far something has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = ResponseStatus)]
pub enum Status {
    /// There is more to come.
    InProgress,
    /// All is there.
    Completed,
    /// It was cut short.
    Incomplete,
    /// It ended by an error.
    Failed,
}

/// Why a response failed.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ResponseError {
    /// Kind of error.
    pub code: &'static str,
    /// In words.
    pub message: String,
}

/// Why a response is incomplete.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct IncompleteDetails {
    /// `max_output_tokens`.
    pub reason: &'static str,
}

/// Fields of the request that the response repeats, and those that are the same for everyone: this server keeps nothing.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = ResponseEcho)]
pub struct Echo {
    /// `false`.
    pub background: bool,
    /// As asked for.
    pub instructions: Option<String>,
    /// As asked for.
    pub max_output_tokens: Option<usize>,
    /// As sent.
    #[schema(value_type = Object)]
    pub metadata: Map<String, Value>,
    /// As asked for.
    pub parallel_tool_calls: bool,
    /// `null`.
    pub previous_response_id: Option<String>,
    /// As asked for.
    pub reasoning: ReasoningEcho,
    /// `false`.
    pub store: bool,
    /// As asked for.
    pub text: Value,
    /// As asked for.
    pub tool_choice: Value,
    /// As sent.
    pub tools: Vec<Value>,
    /// `disabled`: what is too long is refused.
    pub truncation: &'static str,
}

/// What was asked for of the reasoning.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct ReasoningEcho {
    /// As asked for.
    pub effort: Option<String>,
    /// `null`: there are no summaries.
    pub summary: Option<String>,
}

/// Token counts.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ResponseUsage {
    /// Of the prompt.
    pub input_tokens: usize,
    /// How many of them were in a cache.
    pub input_tokens_details: InputTokensDetails,
    /// Of the answer.
    pub output_tokens: usize,
    /// How many of them were reasoning.
    pub output_tokens_details: OutputTokensDetails,
    /// Both.
    pub total_tokens: usize,
}

/// Of `input_tokens`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct InputTokensDetails {
    /// Not computed again.
    pub cached_tokens: usize,
    /// `0`: the cache costs nothing.
    pub cache_write_tokens: usize,
}

/// Of `output_tokens`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct OutputTokensDetails {
    /// Between `<think>` and `</think>`.
    pub reasoning_tokens: usize,
}

/// One item of the output.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputItem {
    /// What the model thought.
    Reasoning {
        /// Unique.
        id: String,
        /// Empty: the reasoning is in `content`.
        summary: Vec<Part>,
        /// The reasoning.
        content: Vec<Part>,
        /// How far it has come.
        status: Status,
    },
    /// What it said.
    Message {
        /// Unique.
        id: String,
        /// `assistant`.
        role: &'static str,
        /// How far it has come.
        status: Status,
        /// One part.
        content: Vec<Part>,
    },
    /// What it wants to be called.
    FunctionCall {
        /// Unique.
        id: String,
        /// To answer to.
        call_id: String,
        /// Which function.
        name: String,
        /// JSON text, as the model wrote it.
        arguments: String,
        /// How far it has come.
        status: Status,
    },
}

/// A part of an item.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schema(as = ResponsePart)]
pub enum Part {
    /// Of a message.
    OutputText {
        /// The text.
        text: String,
        /// Empty.
        annotations: Vec<Value>,
        /// Empty.
        logprobs: Vec<Value>,
    },
    /// Of reasoning.
    ReasoningText {
        /// The text.
        text: String,
    },
}

/// An event and its number.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = NumberedResponseEvent)]
pub struct Numbered {
    /// What happened.
    #[serde(flatten)]
    pub event: ResponseEvent,
    /// From 0, without gaps.
    pub sequence_number: u64,
}

/// Where in the output something happened.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = ResponsePlace)]
pub struct Place {
    /// The item.
    pub item_id: String,
    /// Its number.
    pub output_index: usize,
}

/// What happens to a response that is streamed.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(tag = "type")]
pub enum ResponseEvent {
    /// It was taken in.
    #[serde(rename = "response.created")]
    Created {
        /// Without output.
        response: Box<Response>,
    },
    /// It runs.
    #[serde(rename = "response.in_progress")]
    InProgress {
        /// Without output.
        response: Box<Response>,
    },
    /// An item begins.
    #[serde(rename = "response.output_item.added")]
    OutputItemAdded {
        /// Its number.
        output_index: usize,
        /// Without content.
        item: OutputItem,
    },
    /// An item's part begins.
    #[serde(rename = "response.content_part.added")]
    ContentPartAdded {
        /// The item.
        #[serde(flatten)]
        place: Place,
        /// `0`.
        content_index: usize,
        /// Without text.
        part: Part,
    },
    /// More of a message.
    #[serde(rename = "response.output_text.delta")]
    OutputTextDelta {
        /// The item.
        #[serde(flatten)]
        place: Place,
        /// `0`.
        content_index: usize,
        /// What is new.
        delta: String,
        /// Empty.
        logprobs: Vec<Value>,
    },
    /// A message's text is complete.
    #[serde(rename = "response.output_text.done")]
    OutputTextDone {
        /// The item.
        #[serde(flatten)]
        place: Place,
        /// `0`.
        content_index: usize,
        /// All of it.
        text: String,
        /// Empty.
        logprobs: Vec<Value>,
    },
    /// More of the reasoning.
    #[serde(rename = "response.reasoning_text.delta")]
    ReasoningTextDelta {
        /// The item.
        #[serde(flatten)]
        place: Place,
        /// `0`.
        content_index: usize,
        /// What is new.
        delta: String,
    },
    /// The reasoning is complete.
    #[serde(rename = "response.reasoning_text.done")]
    ReasoningTextDone {
        /// The item.
        #[serde(flatten)]
        place: Place,
        /// `0`.
        content_index: usize,
        /// All of it.
        text: String,
    },
    /// More of a call's arguments.
    #[serde(rename = "response.function_call_arguments.delta")]
    FunctionCallArgumentsDelta {
        /// The item.
        #[serde(flatten)]
        place: Place,
        /// What is new.
        delta: String,
    },
    /// A call's arguments are complete.
    #[serde(rename = "response.function_call_arguments.done")]
    FunctionCallArgumentsDone {
        /// The item.
        #[serde(flatten)]
        place: Place,
        /// The function.
        name: String,
        /// All of them.
        arguments: String,
    },
    /// An item's part is complete.
    #[serde(rename = "response.content_part.done")]
    ContentPartDone {
        /// The item.
        #[serde(flatten)]
        place: Place,
        /// `0`.
        content_index: usize,
        /// All of it.
        part: Part,
    },
    /// An item is complete.
    #[serde(rename = "response.output_item.done")]
    OutputItemDone {
        /// Its number.
        output_index: usize,
        /// All of it.
        item: OutputItem,
    },
    /// The response is complete.
    #[serde(rename = "response.completed")]
    Completed {
        /// All of it.
        response: Box<Response>,
    },
    /// The response was cut short.
    #[serde(rename = "response.incomplete")]
    Incomplete {
        /// What there is of it.
        response: Box<Response>,
    },
    /// The response ended by an error.
    #[serde(rename = "response.failed")]
    Failed {
        /// What there is of it.
        response: Box<Response>,
    },
}

impl ResponseEvent {
    /// Its `type`, which is also the name of the stream's event.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Created { .. } => "response.created",
            Self::InProgress { .. } => "response.in_progress",
            Self::OutputItemAdded { .. } => "response.output_item.added",
            Self::ContentPartAdded { .. } => "response.content_part.added",
            Self::OutputTextDelta { .. } => "response.output_text.delta",
            Self::OutputTextDone { .. } => "response.output_text.done",
            Self::ReasoningTextDelta { .. } => "response.reasoning_text.delta",
            Self::ReasoningTextDone { .. } => "response.reasoning_text.done",
            Self::FunctionCallArgumentsDelta { .. } => "response.function_call_arguments.delta",
            Self::FunctionCallArgumentsDone { .. } => "response.function_call_arguments.done",
            Self::ContentPartDone { .. } => "response.content_part.done",
            Self::OutputItemDone { .. } => "response.output_item.done",
            Self::Completed { .. } => "response.completed",
            Self::Incomplete { .. } => "response.incomplete",
            Self::Failed { .. } => "response.failed",
        }
    }
}

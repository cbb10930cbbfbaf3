//! Chats.

use super::common::{Answering, FunctionTool, FunctionType, Sampling, ToolMode};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// The body of `POST /v1/chat/completions`.
#[derive(Debug, ToSchema)]
#[schema(example = json!({"messages": [{"role": "user", "content": "Tell me about the sea."}], "max_tokens": 60}))]
pub struct ChatCompletionRequest {
    /// The conversation.
    #[schema(min_items = 1)]
    messages: Vec<ChatMessageParam>,
    /// Most tokens to make; what is left of the context unless said otherwise.
    #[schema(minimum = 1)]
    max_completion_tokens: Option<u64>,
    /// The older name of `max_completion_tokens`.
    #[schema(minimum = 1)]
    max_tokens: Option<u64>,
    /// Log probabilities.
    logprobs: Option<bool>,
    /// Alternatives a token, with `logprobs`.
    #[schema(minimum = 0, maximum = 20)]
    top_logprobs: Option<u64>,
    /// What may be called.
    tools: Option<Vec<FunctionTool>>,
    /// Who decides about calls.
    tool_choice: Option<ToolChoice>,
    /// There may be several calls in one answer.
    parallel_tool_calls: Option<bool>,
    /// Show what a model that thinks thought; true unless said otherwise.
    include_reasoning: Option<bool>,
    /// Variables of the template.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Map<String, Value>>,
    /// For templates that know of retrieval.
    #[schema(value_type = Option<Vec<Object>>)]
    documents: Option<Vec<Map<String, Value>>>,
    /// End the prompt with the opening of the assistant's message; true unless the final message is continued.
    add_generation_prompt: Option<bool>,
    /// Go on with the last message.
    continue_final_message: Option<bool>,
    #[serde(flatten)]
    answering: Answering,
    #[serde(flatten)]
    sampling: Sampling,
}

/// A message of a conversation.
#[derive(Debug, ToSchema)]
pub struct ChatMessageParam {
    /// `system`, `user`, `assistant`, `tool`, or what else the template knows.
    role: String,
    /// What is said.
    content: Option<ChatContent>,
    /// Calls that the assistant made.
    tool_calls: Option<Vec<ToolCallParam>>,
    /// The call that a tool's message answers.
    tool_call_id: Option<String>,
}

/// What is said in a message.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
pub enum ChatContent {
    /// A text.
    Text(String),
    /// Parts, joined by new lines.
    Parts(Vec<TextPart>),
}

/// A part of what is said.
#[derive(Debug, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TextPart {
    /// A text.
    Text {
        /// Which.
        text: String,
    },
}

/// A call that the assistant made.
#[derive(Debug, ToSchema)]
pub struct ToolCallParam {
    /// To answer to.
    id: Option<String>,
    /// `function`.
    #[serde(rename = "type")]
    kind: Option<FunctionType>,
    /// Which, and with what.
    function: CalledFunctionParam,
}

/// A function and what it was called with.
#[derive(Debug, ToSchema)]
pub struct CalledFunctionParam {
    /// Its name.
    name: String,
    /// JSON text.
    arguments: String,
}

/// Who decides about calls.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
pub enum ToolChoice {
    /// Nobody, the model, or the client.
    Mode(ToolMode),
    /// This function is called.
    Named {
        /// `function`.
        #[serde(rename = "type")]
        kind: FunctionType,
        /// Which.
        function: FunctionName,
    },
}

/// A function by its name.
#[derive(Debug, ToSchema)]
pub struct FunctionName {
    /// Its name.
    name: String,
}

//! The Responses API.

use super::common::{FunctionType, OneOrMore, Sampling, ToolMode};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// The body of `POST /v1/responses`.
#[derive(Debug, ToSchema)]
#[schema(example = json!({"instructions": "Be brief.", "input": "Tell me about the sea.", "max_output_tokens": 60}))]
pub struct ResponsesRequest {
    /// The model, `NAME` or `NAME@FORM`; without it the one that is served.
    model: Option<String>,
    /// What was said, thought and called so far.
    input: ResponsesInput,
    /// A system message before it.
    instructions: Option<String>,
    /// Most tokens to make; what is left of the context unless said otherwise.
    #[schema(minimum = 1)]
    max_output_tokens: Option<u64>,
    /// Functions that may be called.
    tools: Option<Vec<ResponsesTool>>,
    /// Who decides about calls.
    tool_choice: Option<ResponsesToolChoice>,
    /// There may be several calls in one answer.
    parallel_tool_calls: Option<bool>,
    /// What the text must be like.
    text: Option<ResponsesText>,
    /// How to think.
    reasoning: Option<ResponsesReasoning>,
    /// Answer event by event.
    stream: Option<bool>,
    /// Accepted, not used.
    #[schema(value_type = Option<Object>)]
    stream_options: Option<Map<String, Value>>,
    /// Comes back as it was sent.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Map<String, Value>>,
    /// Accepted: nothing is stored.
    store: Option<bool>,
    /// Accepted, but for logprobs.
    include: Option<Vec<String>>,
    /// 0: logprobs are chat's.
    #[schema(minimum = 0, maximum = 0)]
    top_logprobs: Option<u64>,
    /// Texts that end the answer: one, or up to 4.
    stop: Option<OneOrMore>,
    /// Variables of the template.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Map<String, Value>>,
    /// Who asks; not used.
    user: Option<String>,
    #[serde(flatten)]
    sampling: Sampling,
}

/// A text, or items.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
pub enum ResponsesInput {
    /// What the user says.
    Text(String),
    /// A conversation.
    Items(Vec<InputItem>),
}

/// An item of the input.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
pub enum InputItem {
    /// Something that was said.
    Message(InputMessage),
    /// Something that was thought or called, or a call's result.
    Other(OtherItem),
}

/// Something that was said.
#[derive(Debug, ToSchema)]
pub struct InputMessage {
    /// `message`.
    #[serde(rename = "type")]
    kind: Option<MessageType>,
    /// `user`, `assistant`, `system` or `developer`.
    role: String,
    /// What was said.
    content: InputContent,
}

/// The one type of messages.
#[derive(Debug, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MessageType {
    /// A message.
    Message,
}

/// A text, or parts of one.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
pub enum InputContent {
    /// A text.
    Text(String),
    /// Parts, joined by new lines.
    Parts(Vec<InputPart>),
}

/// A part of what was said.
#[derive(Debug, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum InputPart {
    /// By the user.
    InputText {
        /// The text.
        text: String,
    },
    /// By the assistant.
    OutputText {
        /// The text.
        text: String,
    },
}

/// What is no message.
#[derive(Debug, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OtherItem {
    /// Something that was thought.
    Reasoning {
        /// Summaries; they count where there is no content.
        summary: Vec<ReasoningPart>,
        /// The reasoning.
        content: Option<Vec<ReasoningPart>>,
    },
    /// A call.
    FunctionCall {
        /// To answer to.
        call_id: String,
        /// The function.
        name: String,
        /// JSON text.
        arguments: String,
    },
    /// A call's result.
    FunctionCallOutput {
        /// The call.
        call_id: String,
        /// The result.
        output: InputContent,
    },
}

/// A part of reasoning.
#[derive(Debug, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ReasoningPart {
    /// Of the content.
    ReasoningText {
        /// The text.
        text: String,
    },
    /// Of the summary.
    SummaryText {
        /// The text.
        text: String,
    },
}

/// A function that may be called.
#[derive(Debug, ToSchema)]
pub struct ResponsesTool {
    /// `function`.
    #[serde(rename = "type")]
    kind: FunctionType,
    /// Its name.
    #[schema(min_length = 1)]
    name: String,
    /// What it is for.
    description: Option<String>,
    /// JSON schema of its arguments.
    #[schema(value_type = Option<Object>)]
    parameters: Option<Map<String, Value>>,
    /// Changes nothing: arguments of demanded calls always follow the schema.
    strict: Option<bool>,
}

/// Who decides about calls.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
pub enum ResponsesToolChoice {
    /// Nobody, the model, or the client.
    Mode(ToolMode),
    /// This function is called.
    Named {
        /// `function`.
        #[serde(rename = "type")]
        kind: FunctionType,
        /// Which.
        name: String,
    },
}

/// What the text must be like.
#[derive(Debug, ToSchema)]
pub struct ResponsesText {
    /// Its form.
    format: Option<TextFormat>,
}

/// The text's form.
#[derive(Debug, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum TextFormat {
    /// Anything.
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON of a schema.
    JsonSchema {
        /// The schema's name.
        name: Option<String>,
        /// The schema.
        #[schema(value_type = Object)]
        schema: Map<String, Value>,
    },
}

/// How to think.
#[derive(Debug, ToSchema)]
pub struct ResponsesReasoning {
    /// `none` asks the template not to let the model think; other values change nothing.
    effort: Option<String>,
}

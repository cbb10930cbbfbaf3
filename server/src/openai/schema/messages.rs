//! The Messages API.

use super::common::Sampling;
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// The body of `POST /v1/messages`.
#[derive(Debug, ToSchema)]
#[schema(example = json!({"max_tokens": 60, "messages": [{"role": "user", "content": "Tell me about the sea."}]}))]
pub struct MessagesRequest {
    /// Most tokens to make.
    #[schema(minimum = 1)]
    max_tokens: u64,
    /// Texts that end the answer, up to 4.
    #[schema(max_items = 4)]
    stop_sequences: Option<Vec<String>>,
    /// Answer event by event.
    stream: Option<bool>,
    /// Accepted, not used.
    #[schema(value_type = Option<Object>)]
    metadata: Option<Map<String, Value>>,
    #[serde(flatten)]
    prompt: CountTokensRequest,
    #[serde(flatten)]
    sampling: Sampling,
}

/// The body of `POST /v1/messages/count_tokens`.
#[derive(Debug, ToSchema)]
#[schema(example = json!({"messages": [{"role": "user", "content": "Tell me about the sea."}]}))]
pub struct CountTokensRequest {
    /// The model, `NAME` or `NAME@FORM`; without it the one that is served.
    model: Option<String>,
    /// The conversation. If the last message is the assistant's, the answer goes on where it ends.
    #[schema(min_items = 1)]
    messages: Vec<MessageParam>,
    /// A system message before it.
    system: Option<SystemPrompt>,
    /// What may be used.
    tools: Option<Vec<MessagesTool>>,
    /// Who decides about that.
    tool_choice: Option<MessagesToolChoice>,
    /// Whether to think.
    thinking: Option<ThinkingConfig>,
    /// What the text must be like.
    output_config: Option<OutputConfig>,
    /// Variables of the template.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Map<String, Value>>,
}

/// A message of a conversation.
#[derive(Debug, ToSchema)]
pub struct MessageParam {
    /// Who says it.
    role: MessageRole,
    /// What is said.
    content: MessageContent,
}

/// Who says something.
#[derive(Debug, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MessageRole {
    /// The user, or a tool.
    User,
    /// The model.
    Assistant,
    /// Who set it up.
    System,
}

/// A text, or blocks.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
pub enum MessageContent {
    /// A text.
    Text(String),
    /// Blocks.
    Blocks(Vec<BlockParam>),
}

/// A block of a message.
#[derive(Debug, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum BlockParam {
    /// Something that was said.
    Text {
        /// The text.
        text: String,
    },
    /// A tool that the assistant used.
    ToolUse {
        /// To answer to.
        id: String,
        /// Which tool.
        name: String,
        /// What with.
        #[schema(value_type = Object)]
        input: Map<String, Value>,
    },
    /// What came of it.
    ToolResult {
        /// Of which use.
        tool_use_id: String,
        /// The result.
        content: Option<SystemPrompt>,
    },
    /// Something that the assistant thought.
    Thinking {
        /// The text.
        thinking: String,
    },
}

/// A text, or text blocks.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
#[schema(as = TextOrBlocks)]
pub enum SystemPrompt {
    /// A text.
    Text(String),
    /// Blocks, joined by new lines.
    Blocks(Vec<super::chat::TextPart>),
}

/// A tool of the client's own.
#[derive(Debug, ToSchema)]
pub struct MessagesTool {
    /// Its name.
    #[schema(min_length = 1)]
    name: String,
    /// What it is for.
    description: Option<String>,
    /// JSON schema of its input.
    #[schema(value_type = Option<Object>)]
    input_schema: Option<Map<String, Value>>,
}

/// Who decides about the use of tools.
#[derive(Debug, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum MessagesToolChoice {
    /// The model.
    Auto {
        /// At most one.
        disable_parallel_tool_use: Option<bool>,
    },
    /// One is used.
    Any {
        /// At most one.
        disable_parallel_tool_use: Option<bool>,
    },
    /// This one is used.
    Tool {
        /// Which.
        name: String,
    },
    /// None is used.
    None,
}

/// Whether to think.
#[derive(Debug, ToSchema)]
pub struct ThinkingConfig {
    /// `disabled` asks the template not to let the model think; other values change nothing.
    #[serde(rename = "type")]
    kind: String,
}

/// What the text must be like.
#[derive(Debug, ToSchema)]
pub struct OutputConfig {
    /// Its form.
    format: Option<OutputFormat>,
}

/// The text's form.
#[derive(Debug, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum OutputFormat {
    /// JSON of a schema.
    JsonSchema {
        /// Which.
        #[schema(value_type = Object)]
        schema: Map<String, Value>,
    },
}

//! Completions, and text to tokens and back.

use super::chat::ChatMessageParam;
use super::common::{Answering, FunctionTool, Sampling, ToolMode};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// The body of `POST /v1/completions`.
#[derive(Debug, ToSchema)]
#[schema(example = json!({"prompt": "It was a dark night, and", "max_tokens": 40, "temperature": 0.7, "seed": 3}))]
pub struct CompletionRequest {
    /// What to go on with.
    prompt: Prompt,
    /// Most tokens to make; 16 unless said otherwise.
    #[schema(minimum = 0)]
    max_tokens: Option<u64>,
    /// Log probabilities, with so many alternatives a token.
    #[schema(minimum = 0, maximum = 20)]
    logprobs: Option<u64>,
    /// The prompt stands before the answer.
    echo: Option<bool>,
    #[serde(flatten)]
    answering: Answering,
    #[serde(flatten)]
    sampling: Sampling,
}

/// One or more prompts, as text or as token ids.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
#[schema(as = CompletionPrompt)]
pub enum Prompt {
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Token ids.
    Tokens(Vec<u32>),
    /// Lists of token ids.
    TokenLists(Vec<Vec<u32>>),
}

/// The body of `POST /tokenize`: `prompt` or `messages` in vLLM's form, `content` in llama-server's.
#[derive(Debug, ToSchema)]
#[schema(example = json!({"prompt": "Once upon a time"}))]
pub struct TokenizeRequest {
    /// The model; without it the one that is served.
    model: Option<String>,
    /// A text.
    prompt: Option<String>,
    /// A conversation.
    messages: Option<Vec<ChatMessageParam>>,
    /// A text, llama-server's way.
    content: Option<String>,
    /// Add what the model expects around a sequence (bos): true for a prompt, false for a conversation.
    add_special_tokens: Option<bool>,
    /// Each token as text too.
    return_token_strs: Option<bool>,
    /// Add what the model expects around a sequence, llama-server's way.
    add_special: Option<bool>,
    /// Each token with its text, llama-server's way.
    with_pieces: Option<bool>,
    /// Special tokens in the text are recognised, whatever this says.
    parse_special: Option<bool>,
    /// For the template.
    tools: Option<Vec<FunctionTool>>,
    /// For the template: with `none` it gets no tools.
    tool_choice: Option<ToolMode>,
    /// Calls in one answer may be several.
    parallel_tool_calls: Option<bool>,
    /// For the template.
    #[schema(value_type = Option<Vec<Object>>)]
    documents: Option<Vec<Map<String, Value>>>,
    /// Variables of the template.
    #[schema(value_type = Option<Object>)]
    chat_template_kwargs: Option<Map<String, Value>>,
    /// End with the opening of the assistant's message.
    add_generation_prompt: Option<bool>,
    /// End inside the last message.
    continue_final_message: Option<bool>,
}

/// The body of `POST /detokenize`.
#[derive(Debug, ToSchema)]
#[schema(example = json!({"tokens": [70, 71, 72]}))]
pub struct DetokenizeRequest {
    /// The model; without it the one that is served.
    model: Option<String>,
    /// Token ids.
    tokens: Vec<u32>,
}

//! What several requests have in common.

use serde_json::{Map, Value};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// How to sample, and when it is one's turn.
#[derive(Debug, ToSchema)]
pub struct Sampling {
    /// Randomness; 0 takes the most probable token. Without it the model's own suggestion, else 1.
    #[schema(minimum = 0)]
    temperature: Option<f32>,
    /// Only the most probable tokens that together have this probability. Without it the model's own suggestion, else 1.
    #[schema(minimum = 0, maximum = 1)]
    top_p: Option<f32>,
    /// Only so many of the most probable tokens; -1 and 0 mean all.
    #[schema(minimum = -1)]
    top_k: Option<i64>,
    /// Only tokens at least this probable, relative to the most probable one.
    #[schema(minimum = 0, maximum = 1)]
    min_p: Option<f32>,
    /// Against tokens that have come before, in the answer.
    #[schema(minimum = -2, maximum = 2)]
    presence_penalty: Option<f32>,
    /// The same, by how often they came.
    #[schema(minimum = -2, maximum = 2)]
    frequency_penalty: Option<f32>,
    /// Against tokens that have come before, in prompt and answer; 1 changes nothing.
    repetition_penalty: Option<f32>,
    /// Added to tokens' logits, by token id.
    logit_bias: Option<BTreeMap<String, f32>>,
    /// Only these tokens, by id.
    allowed_token_ids: Option<Vec<u32>>,
    /// The same tokens again for the same seed.
    seed: Option<i64>,
    /// Go on after the end of sequence.
    ignore_eos: Option<bool>,
    /// Fewest tokens before the end of sequence.
    #[schema(minimum = 0)]
    min_tokens: Option<u64>,
    /// Tokens that end the answer, by id.
    stop_token_ids: Option<Vec<u32>>,
    /// Words that may not come, up to 1,024.
    bad_words: Option<OneOrMore>,
    /// Who waits comes as if so many seconds later; below 0 before others.
    priority: Option<i32>,
    /// The prompt's beginning is shared only with requests of the same salt.
    #[schema(min_length = 1)]
    cache_salt: Option<String>,
    /// What the text must be like.
    structured_outputs: Option<StructuredOutputs>,
}

/// How completions and chats are answered.
#[derive(Debug, ToSchema)]
pub struct Answering {
    /// The model, `NAME` or `NAME@FORM`; without it the one that is served.
    model: Option<String>,
    /// Choices to answer with.
    #[schema(minimum = 1, maximum = 128)]
    n: Option<u64>,
    /// Choices to make, of which the most probable `n` are the answer.
    #[schema(minimum = 1, maximum = 128)]
    best_of: Option<u64>,
    /// Texts that end the answer: one, or up to 4.
    stop: Option<OneOrMore>,
    /// Leave the stop string in the text.
    include_stop_str_in_output: Option<bool>,
    /// Leave special tokens out of the text; true unless said otherwise.
    skip_special_tokens: Option<bool>,
    /// Token ids of prompt and answer beside the text.
    return_token_ids: Option<bool>,
    /// Logprobs name tokens `token_id:N`.
    return_tokens_as_token_ids: Option<bool>,
    /// Answer chunk by chunk.
    stream: Option<bool>,
    /// What a stream says of usage.
    stream_options: Option<StreamOptions>,
    /// Who asks; not used.
    user: Option<String>,
    /// Log probabilities of the prompt, with so many alternatives a token.
    #[schema(minimum = 0, maximum = 20)]
    prompt_logprobs: Option<u64>,
    /// Add what the model expects around a sequence (bos).
    add_special_tokens: Option<bool>,
    /// Keep only so many tokens of a prompt's end; -1 keeps what the context holds.
    #[schema(minimum = -1)]
    truncate_prompt_tokens: Option<i64>,
    /// What the text must be like.
    response_format: Option<ResponseFormat>,
}

/// What a stream says of usage.
#[derive(Debug, ToSchema)]
pub struct StreamOptions {
    /// In a last chunk.
    include_usage: Option<bool>,
    /// In every chunk.
    continuous_usage_stats: Option<bool>,
}

/// A text, or a list of texts.
#[derive(Debug, ToSchema)]
#[serde(untagged)]
pub enum OneOrMore {
    /// One.
    One(String),
    /// More.
    More(Vec<String>),
}

/// OpenAI's way to say what the text must be like.
#[derive(Debug, ToSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ResponseFormat {
    /// Anything.
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON of a schema.
    JsonSchema {
        /// Which.
        json_schema: NamedSchema,
    },
}

/// A JSON schema with a name.
#[derive(Debug, ToSchema)]
pub struct NamedSchema {
    /// Its name.
    name: Option<String>,
    /// What it is for.
    description: Option<String>,
    /// The schema.
    #[schema(value_type = Object)]
    schema: Map<String, Value>,
    /// Changes nothing: every schema is enforced.
    strict: Option<bool>,
}

/// vLLM's way to say what the text must be like: one of `json`, `json_object`, `regex`, `choice` and `grammar`.
#[derive(Debug, ToSchema)]
pub struct StructuredOutputs {
    /// A JSON schema.
    #[schema(value_type = Option<Object>)]
    json: Option<Value>,
    /// Any JSON object.
    json_object: Option<bool>,
    /// The whole text matches.
    regex: Option<String>,
    /// One of these.
    choice: Option<Vec<String>>,
    /// A grammar in llguidance's Lark.
    grammar: Option<String>,
    /// No whitespace between the parts of JSON.
    disable_any_whitespace: Option<bool>,
    /// What may stand between the parts of JSON, as a regex.
    whitespace_pattern: Option<String>,
    /// Objects have only the properties that their schema names.
    disable_additional_properties: Option<bool>,
}

/// A function that the model may call.
#[derive(Debug, ToSchema)]
pub struct FunctionTool {
    /// `function`.
    #[serde(rename = "type")]
    kind: FunctionType,
    /// Which.
    function: FunctionDefinition,
}

/// The one type of tools.
#[derive(Debug, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FunctionType {
    /// A function.
    Function,
}

/// A function.
#[derive(Debug, ToSchema)]
pub struct FunctionDefinition {
    /// Its name.
    #[schema(min_length = 1)]
    name: String,
    /// What it is for.
    description: Option<String>,
    /// JSON schema of its arguments.
    #[schema(value_type = Option<Object>)]
    parameters: Option<Map<String, Value>>,
}

/// Who decides about calls.
#[derive(Debug, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ToolMode {
    /// There are none.
    None,
    /// The model.
    Auto,
    /// There is at least one.
    Required,
}

//! The shapes of answers, as they are serialised.

use crate::openai::generation::Finish;
use crate::served::Served;
use serde::Serialize;
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// Token counts.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub struct Usage {
    /// Of all prompts; a prompt counts once whatever its n.
    pub prompt_tokens: usize,
    /// Of all choices, those not chosen by `best_of` included.
    pub completion_tokens: usize,
    /// Both.
    pub total_tokens: usize,
    /// How many of the prompts' were in a cache.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// Of `prompt_tokens`.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Not computed again.
    pub cached_tokens: usize,
}

impl Usage {
    /// `cached_tokens` of the prompts' were in the cache.
    pub fn new(prompt_tokens: usize, completion_tokens: usize, cached_tokens: usize) -> Self {
        let prompt_tokens_details = PromptTokensDetails { cached_tokens };
        Self { prompt_tokens, completion_tokens, total_tokens: prompt_tokens + completion_tokens, prompt_tokens_details }
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_secs())
}

/// What all objects of one answer begin with.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Head {
    /// Unique.
    pub id: String,
    /// Kind of object.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    /// The model as the request named it, and its form.
    pub model: String,
    /// Changes with what is served.
    pub system_fingerprint: String,
}

impl Head {
    /// A new answer of this model.
    pub fn new(prefix: &str, object: &'static str, model: String, served: &Served) -> Self {
        let system_fingerprint = served.fingerprint(&model);
        Self { id: format!("{prefix}-{}", uuid::Uuid::new_v4().simple()), object, created: now(), model, system_fingerprint }
    }
}

/// An answer, or a chunk of one.
#[derive(Debug, Serialize, ToSchema)]
pub struct Answer<'a, C: ToSchema> {
    /// Id, model, ...
    #[serde(flatten)]
    #[schema(value_type = Head)]
    pub head: &'a Head,
    /// The choices, or what is new of them.
    pub choices: Vec<C>,
    /// Absent, `null` (a stream that will send it), or the counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
    /// Chat only: of the prompt, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<BTreeMap<String, RankedLogprob>>>>)]
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// Chat only: of the prompt, if asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// vLLM's `prompt_logprobs`: one entry a token, the first `null`.
pub type PromptLogprobs = Vec<Option<BTreeMap<u32, RankedLogprob>>>;

/// One of `prompt_logprobs`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct RankedLogprob {
    /// Natural logarithm.
    pub logprob: f32,
    /// 1 = the most probable.
    pub rank: usize,
    /// The token as text.
    pub decoded_token: String,
}

/// vLLM's `stop_reason`: which stop string or token ended it.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[serde(untagged)]
#[schema(as = ChoiceStopReason)]
pub enum StopReason {
    /// A stop string.
    Text(String),
    /// A stop token.
    Token(u32),
}

/// How a choice ended, in the two fields that say so.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct End {
    /// `null` while it goes on.
    pub finish_reason: Option<&'static str>,
    /// `null` unless something in the request made it stop.
    pub stop_reason: Option<StopReason>,
}

impl From<Finish> for End {
    fn from(finish: Finish) -> Self {
        let (finish_reason, stop_reason) = match finish {
            Finish::Stop => ("stop", None),
            Finish::StopString(text) => ("stop", Some(StopReason::Text(text))),
            Finish::StopToken(id) => ("stop", Some(StopReason::Token(id))),
            Finish::Length => ("length", None),
        };
        Self { finish_reason: Some(finish_reason), stop_reason }
    }
}

/// A choice of a completion, or what is new of it.
#[derive(Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// Prompt times n plus choice.
    pub index: usize,
    /// Text.
    pub text: String,
    /// `null` unless asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// How it ended.
    #[serde(flatten)]
    pub end: End,
    /// If asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Option<BTreeMap<String, RankedLogprob>>>>)]
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// If asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// If asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
}

/// Logprobs of a completion, in parallel lists.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    /// Where each token begins in `text`, in characters.
    pub text_offset: Vec<usize>,
    /// Of each token; `null` for a prompt's first.
    pub token_logprobs: Vec<Option<f32>>,
    /// Each token.
    pub tokens: Vec<String>,
    /// The alternatives at each place, the token itself always among them.
    #[schema(value_type = Vec<Option<BTreeMap<String, f32>>>)]
    pub top_logprobs: Vec<Option<Alternatives>>,
}

/// Tokens and their logprobs, best first; an object in JSON. Numbers are written as in `token_logprobs`: clients compare them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Alternatives(pub Vec<(String, f32)>);

impl Serialize for Alternatives {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(token, logprob)| (token, logprob)))
    }
}

/// A whole choice of a chat.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    /// Its number.
    pub index: usize,
    /// What the assistant says.
    pub message: Message,
    /// `null` unless asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// How it ended.
    #[serde(flatten)]
    pub end: End,
    /// If asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// The assistant's message.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ChatMessage)]
pub struct Message {
    /// `assistant`.
    pub role: &'static str,
    /// Text; `null` if there are calls or reasoning and nothing else.
    pub content: Option<String>,
    /// Always `null`: this server does not refuse.
    pub refusal: Option<String>,
    /// What a model that thinks thought, as vLLM names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// The same, as llama-server names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Functions that the client should call.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// A call that a model wants to be made.
#[derive(Debug, Serialize, ToSchema)]
pub struct ToolCall {
    /// To answer to.
    pub id: String,
    /// `function`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Which.
    pub function: CalledFunction,
}

/// A function and what it is called with.
#[derive(Debug, Serialize, ToSchema)]
pub struct CalledFunction {
    /// Its name.
    pub name: String,
    /// JSON text, as the model wrote it.
    pub arguments: String,
}

/// What is new of a choice of a chat.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChatChunkChoice {
    /// Its number.
    pub index: usize,
    /// What is new of the message.
    pub delta: Delta,
    /// `null` unless asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// How it ended, in its last chunk.
    #[serde(flatten)]
    pub end: End,
    /// If asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// What is new of a message: the role in the first chunk, nothing in the last.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Delta {
    /// `assistant`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// Text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Reasoning, as vLLM names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// The same, as llama-server names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Calls.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_calls: Option<Vec<DeltaToolCall>>,
}

/// What is new of a call: id, type and name in its first delta.
#[derive(Debug, Serialize, ToSchema)]
pub struct DeltaToolCall {
    /// Which call.
    pub index: usize,
    /// To answer to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `function`.
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    pub kind: Option<&'static str>,
    /// Which, and more of its arguments.
    pub function: DeltaFunction,
}

/// What is new of a called function.
#[derive(Debug, Serialize, ToSchema)]
pub struct DeltaFunction {
    /// Its name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// More of its arguments' JSON text.
    pub arguments: String,
}

/// Logprobs of a chat.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// One entry a token.
    pub content: Vec<ChatLogprob>,
    /// Always `null`.
    pub refusal: Option<Vec<ChatLogprob>>,
}

/// A token of a chat, with its alternatives.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatLogprob {
    /// The token itself.
    #[serde(flatten)]
    pub token: ChatToken,
    /// The most probable ones.
    pub top_logprobs: Vec<ChatToken>,
}

/// A token and its probability.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatToken {
    /// As text.
    pub token: String,
    /// Natural logarithm.
    pub logprob: f32,
    /// As bytes: text can't show a part of a character.
    pub bytes: Vec<u8>,
}

//! The body of `POST /v1/completions`.

use crate::openai::admission::{MaxTokens, TOKEN_BYTES};
use crate::openai::errors::ApiError;
use crate::openai::fields::Fields;
use crate::openai::sampling::{AnswerOptions, answer_options, as_token_ids, refuse_unsupported, sampling_params, truncation};
use crate::openai::structured::Constraint;
use evop_model::GenerationConfig;
use evop_serving::{MAX_LOGPROBS, SamplingParams};
use serde_json::Value;

/// OpenAI's default.
const DEFAULT_MAX_TOKENS: usize = 16;
/// Most prompts of one request.
const MAX_PROMPTS: usize = 2048;

/// A prompt as the client sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Prompt {
    /// To be tokenized.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

impl Prompt {
    /// Of the text, about.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Text(text) => text.len(),
            Self::Tokens(tokens) => tokens.len() * TOKEN_BYTES,
        }
    }
}

/// A parsed completions request.
#[derive(Debug, Clone)]
pub struct CompletionRequest {
    /// One or more prompts, each with choices of its own.
    pub prompts: Vec<Prompt>,
    /// How to sample; `max_tokens` is still to be set.
    pub params: SamplingParams,
    /// What the output must be like.
    pub constraint: Option<Constraint>,
    /// Tokens to make.
    pub max_tokens: MaxTokens,
    /// How to answer.
    pub answer: AnswerOptions,
    /// Alternatives a token in the answer's `logprobs`.
    pub logprobs: Option<usize>,
    /// Alternatives a prompt token in vLLM's `prompt_logprobs`.
    pub asked_prompt_logprobs: Option<usize>,
    /// The prompt stands before the answer.
    pub echo: bool,
    /// Add what the model expects around a sequence (bos).
    pub add_special_tokens: bool,
    /// Keep only so many tokens of a prompt's end.
    pub truncate: Option<usize>,
}

impl CompletionRequest {
    /// Reads the body; `model` has been read before.
    ///
    /// # Errors
    /// 400 that names the field.
    pub fn parse(fields: &Fields<'_>, model: &GenerationConfig, max_model_len: usize) -> Result<Self, ApiError> {
        refuse_unsupported(fields)?;
        let answer = answer_options(fields)?;
        let logprobs = fields.count("logprobs", 0..=MAX_LOGPROBS)?;
        let echo = fields.bool("echo")?.unwrap_or(false);
        let mut params = sampling_params(fields, model)?;
        if params.prompt_logprobs.is_some() && answer.stream.is_some() {
            return Err(ApiError::invalid("prompt_logprobs", "prompt_logprobs: not available in a stream; echo with logprobs is"));
        }
        let asked_prompt_logprobs = params.prompt_logprobs;
        // choosing the best needs to know how good each is
        params.logprobs = logprobs.or((answer.best_of > answer.n).then_some(0));
        if echo && logprobs.is_some() {
            params.prompt_logprobs = params.prompt_logprobs.max(logprobs);
        }
        let max_tokens = MaxTokens { asked: fields.count("max_tokens", 0..=usize::MAX)?, default: Some(DEFAULT_MAX_TOKENS), prompt_field: "prompt" };
        let request = Self {
            prompts: prompts(fields.required("prompt")?).map_err(|expected| fields.wrong("prompt", &expected, fields.get("prompt").unwrap_or(&Value::Null)))?,
            params,
            constraint: Constraint::parse(fields)?,
            max_tokens,
            answer,
            logprobs,
            asked_prompt_logprobs,
            echo,
            add_special_tokens: fields.bool("add_special_tokens")?.unwrap_or(true),
            truncate: truncation(fields, max_tokens.longest_prompt(max_model_len))?,
        };
        fields.log_unknown();
        Ok(request)
    }
}

/// The four shapes of a prompt, or what was expected.
fn prompts(value: &Value) -> Result<Vec<Prompt>, String> {
    const SHAPES: &str = "a string, a list of strings, a list of token ids, or a list of such lists";
    let list = match value {
        Value::String(text) => return Ok(vec![Prompt::Text(text.clone())]),
        Value::Array(list) if !list.is_empty() => list,
        _ => return Err(SHAPES.into()),
    };
    if let Some(ids) = as_token_ids(list) {
        return Ok(vec![Prompt::Tokens(ids)]);
    }
    if list.len() > MAX_PROMPTS {
        return Err(format!("at most {MAX_PROMPTS} prompts"));
    }
    let prompt = |value: &Value| match value {
        Value::String(text) => Some(Prompt::Text(text.clone())),
        Value::Array(ids) if !ids.is_empty() => as_token_ids(ids).map(Prompt::Tokens),
        _ => None,
    };
    list.iter().map(prompt).collect::<Option<Vec<_>>>().ok_or_else(|| SHAPES.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_prompt_has_four_shapes() {
        let text = |t: &str| Prompt::Text(t.into());
        assert_eq!(prompts(&json!("a")).unwrap(), [text("a")]);
        assert_eq!(prompts(&json!(["a", "b"])).unwrap(), [text("a"), text("b")]);
        assert_eq!(prompts(&json!([1, 2])).unwrap(), [Prompt::Tokens(vec![1, 2])]);
        assert_eq!(prompts(&json!([[1], [2, 3]])).unwrap(), [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]);
        for wrong in [json!([]), json!(1), json!({}), json!([1, "a"]), json!([[]]), json!([-1]), json!([[1.5]]), json!([null])] {
            assert!(prompts(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_echo_with_logprobs_scores_the_prompt() {
        let body = json!({"prompt": "a", "echo": true, "logprobs": 3, "max_tokens": 0});
        let request = CompletionRequest::parse(&Fields::new(body.as_object().unwrap()), &GenerationConfig::default(), 100).unwrap();
        assert_eq!((request.params.prompt_logprobs, request.params.logprobs, request.max_tokens.asked), (Some(3), Some(3), Some(0)));
    }
}

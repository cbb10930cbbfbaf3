//! The body of `POST /v1/chat/completions`.

use crate::openai::admission::MaxTokens;
use crate::openai::errors::ApiError;
use crate::openai::fields::{Fields, wrong_type};
use crate::openai::sampling::{AnswerOptions, answer_options, refuse_unsupported, sampling_params, truncation};
use crate::openai::structured::Constraint;
use crate::openai::tools::Tools;
use evop_model::GenerationConfig;
use evop_serving::{ChatInput, MAX_LOGPROBS, SamplingParams};
use serde_json::{Map, Value};

/// A parsed chat request.
#[derive(Debug, Clone)]
pub struct ChatRequest {
    /// The conversation.
    pub conversation: Conversation,
    /// How to sample; `max_tokens` is still to be set.
    pub params: SamplingParams,
    /// What the output must be like.
    pub constraint: Option<Constraint>,
    /// The client wants to see what the model thinks.
    pub include_reasoning: bool,
    /// Tokens to make.
    pub max_tokens: MaxTokens,
    /// How to answer.
    pub answer: AnswerOptions,
    /// Alternatives a token in the answer's `logprobs`.
    pub logprobs: Option<usize>,
    /// Keep only so many tokens of the prompt's end.
    pub truncate: Option<usize>,
}

/// What a chat template takes, and how its text is tokenized.
#[derive(Debug, Clone)]
pub struct Conversation {
    messages: Value,
    /// What may be called, if anything.
    pub tools: Option<Tools>,
    documents: Option<Value>,
    add_generation_prompt: bool,
    continue_final_message: bool,
    kwargs: Option<Map<String, Value>>,
    /// Templates write the special tokens themselves, so this is rarely wanted.
    pub add_special_tokens: bool,
}

impl Conversation {
    /// Reads the conversation's fields.
    ///
    /// # Errors
    /// 400 that names the field.
    pub fn parse(fields: &Fields<'_>) -> Result<Self, ApiError> {
        let messages = fields.required("messages")?;
        check_messages(messages)?;
        let continue_final_message = fields.bool("continue_final_message")?.unwrap_or(false);
        let add_generation_prompt = fields.bool("add_generation_prompt")?.unwrap_or(!continue_final_message);
        if continue_final_message && add_generation_prompt {
            return Err(ApiError::invalid("continue_final_message", "continue_final_message: excludes add_generation_prompt"));
        }
        let kwargs = fields.get("chat_template_kwargs");
        let kwargs = kwargs.map(|v| v.as_object().cloned().ok_or_else(|| fields.wrong("chat_template_kwargs", "an object", v))).transpose()?;
        if fields.get("chat_template").is_some() {
            return Err(ApiError::unsupported("chat_template", "chat_template: a request can't bring its own template; the checkpoint's is used"));
        }
        Ok(Self {
            messages: messages.clone(),
            tools: Tools::parse(fields)?,
            documents: objects(fields, "documents")?,
            add_generation_prompt,
            continue_final_message,
            kwargs,
            add_special_tokens: fields.bool("add_special_tokens")?.unwrap_or(false),
        })
    }

    /// As the template takes it.
    pub fn input(&self) -> ChatInput<'_> {
        ChatInput {
            messages: &self.messages,
            tools: self.tools.as_ref().map(Tools::raw),
            documents: self.documents.as_ref(),
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            kwargs: self.kwargs.as_ref(),
        }
    }
}

impl ChatRequest {
    /// Reads the body; `model` has been read before.
    ///
    /// # Errors
    /// 400 that names the field.
    pub fn parse(fields: &Fields<'_>, model: &GenerationConfig, max_model_len: usize) -> Result<Self, ApiError> {
        refuse_unsupported(fields)?;
        if fields.bool("echo")?.unwrap_or(false) {
            return Err(ApiError::unsupported("echo", "echo: only completions have it"));
        }
        let answer = answer_options(fields)?;
        let mut params = sampling_params(fields, model)?;
        if params.prompt_logprobs.is_some() && answer.stream.is_some() {
            return Err(ApiError::invalid("prompt_logprobs", "prompt_logprobs: not available in a stream"));
        }
        let logprobs = logprobs(fields)?;
        params.logprobs = logprobs.or((answer.best_of > answer.n).then_some(0));
        // max_tokens is the older name of the two
        let older = fields.count("max_tokens", 1..=usize::MAX)?;
        let newer = fields.count("max_completion_tokens", 1..=usize::MAX)?;
        let max_tokens = MaxTokens { asked: newer.or(older), default: None, prompt_field: "messages" };
        let request = Self {
            conversation: Conversation::parse(fields)?,
            params,
            constraint: Constraint::parse(fields)?,
            include_reasoning: fields.bool("include_reasoning")?.unwrap_or(true),
            max_tokens,
            answer,
            logprobs,
            truncate: truncation(fields, max_tokens.longest_prompt(max_model_len))?,
        };
        if request.conversation.tools.as_ref().is_some_and(Tools::is_forced) && request.constraint.as_ref().is_some_and(|c| c.param != "response_format") {
            return Err(ApiError::invalid("structured_outputs", "structured_outputs: excludes a tool_choice that asks for a call"));
        }
        fields.log_unknown();
        Ok(request)
    }
}

fn logprobs(fields: &Fields<'_>) -> Result<Option<usize>, ApiError> {
    let asked = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0..=MAX_LOGPROBS)?;
    match (asked, top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid("top_logprobs", "top_logprobs: only with \"logprobs\": true")),
    }
}

fn objects(fields: &Fields<'_>, name: &'static str) -> Result<Option<Value>, ApiError> {
    let Some(value) = fields.get(name) else { return Ok(None) };
    match value {
        Value::Array(list) if list.iter().all(Value::is_object) => Ok(Some(value.clone())),
        _ => Err(fields.wrong(name, "a list of objects", value)),
    }
}

fn check_messages(messages: &Value) -> Result<(), ApiError> {
    let list = messages.as_array().filter(|list| !list.is_empty()).ok_or_else(|| wrong_type("messages", "a list of at least one message", messages))?;
    for (i, message) in list.iter().enumerate() {
        let path = format!("messages[{i}]");
        let object = message.as_object().ok_or_else(|| wrong_type(&path, "an object with role and content", message))?;
        let role = object.get("role").unwrap_or(&Value::Null);
        if !role.is_string() {
            return Err(wrong_type(&format!("{path}.role"), "a string", role));
        }
        match object.get("content") {
            None | Some(Value::Null | Value::String(_)) => {}
            Some(Value::Array(parts)) => check_parts(&path, parts)?,
            Some(other) => return Err(wrong_type(&format!("{path}.content"), "a string or a list of parts", other)),
        }
        if let Some(calls) = object.get("tool_calls").filter(|v| !v.is_null() && !v.as_array().is_some_and(|l| l.iter().all(Value::is_object))) {
            return Err(wrong_type(&format!("{path}.tool_calls"), "a list of objects", calls));
        }
    }
    Ok(())
}

fn check_parts(path: &str, parts: &[Value]) -> Result<(), ApiError> {
    for (i, part) in parts.iter().enumerate() {
        let path = format!("{path}.content[{i}]");
        let kind = part.get("type").and_then(Value::as_str);
        let text = part.get("text");
        match (part, kind, text) {
            (Value::String(_), ..) | (Value::Object(_), Some("text") | None, Some(Value::String(_))) => {}
            (Value::Object(_), Some("text"), other) => return Err(wrong_type(&format!("{path}.text"), "a string", other.unwrap_or(&Value::Null))),
            (Value::Object(_), Some(kind), _) => {
                return Err(ApiError::unsupported(format!("{path}.type"), format!("{path}.type: only text parts are supported, found {kind:?}")));
            }
            (part, ..) => return Err(wrong_type(&path, "a part with type and text", part)),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(body: &Value) -> Result<ChatRequest, ApiError> {
        ChatRequest::parse(&Fields::new(body.as_object().unwrap()), &GenerationConfig::default(), 100)
    }

    fn param(body: &Value) -> String {
        parse(body).unwrap_err().to_json()["error"]["param"].as_str().unwrap().to_string()
    }

    fn with(name: &str, value: Value) -> Value {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}]});
        body[name] = value;
        body
    }

    #[test]
    fn a_bad_message_is_named_by_its_place() {
        let messages = |list: Value| param(&json!({"messages": list}));
        assert_eq!(messages(json!("hi")), "messages");
        assert_eq!(messages(json!([])), "messages");
        assert_eq!(messages(json!([{"role": "user", "content": "a"}, 7])), "messages[1]");
        assert_eq!(messages(json!([{"content": "a"}])), "messages[0].role");
        assert_eq!(messages(json!([{"role": "user", "content": 7}])), "messages[0].content");
        let parts = |part: Value| messages(json!([{"role": "user", "content": [{"type": "text", "text": "a"}, part]}]));
        assert_eq!(parts(json!({"type": "image_url", "image_url": {"url": "data:"}})), "messages[0].content[1].type");
        assert_eq!(parts(json!({"type": "text", "text": 1})), "messages[0].content[1].text");
        assert_eq!(parts(json!(1)), "messages[0].content[1]");
    }

    #[test]
    fn the_newer_name_of_max_tokens_wins() {
        let mut body = with("max_tokens", json!(5));
        assert_eq!(parse(&body).unwrap().max_tokens.asked, Some(5));
        body["max_completion_tokens"] = json!(7);
        assert_eq!(parse(&body).unwrap().max_tokens.asked, Some(7));
    }

    #[test]
    fn a_forced_call_excludes_another_form_of_the_output() {
        let mut body = with("tools", json!([{"type": "function", "function": {"name": "f"}}]));
        assert!(parse(&body).unwrap().conversation.tools.is_some());
        body["structured_outputs"] = json!({"regex": "a"});
        assert!(parse(&body).is_ok());
        body["tool_choice"] = json!("required");
        assert_eq!(param(&body), "structured_outputs");
        body["structured_outputs"] = Value::Null;
        assert!(parse(&body).unwrap().conversation.tools.unwrap().is_forced());
        body["tool_choice"] = json!("none");
        assert!(parse(&body).unwrap().conversation.tools.is_none());
    }

    #[test]
    fn alternatives_need_logprobs() {
        assert_eq!(param(&with("top_logprobs", json!(3))), "top_logprobs");
        assert_eq!(param(&with("logprobs", json!(3))), "logprobs");
        assert_eq!(parse(&with("logprobs", json!(true))).unwrap().logprobs, Some(0));
    }
}

//! Conversations of other APIs as chat's `messages`: what the Responses and the Messages endpoints have in common.

use crate::openai::errors::ApiError;
use crate::openai::fields::{Fields, wrong_type};
use serde_json::{Map, Value, json};

/// Chat fields of which other APIs' requests may have any, by the same names: they sample alike.
const SAMPLING: [&str; 17] = [
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "ignore_eos",
    "min_tokens",
    "stop_token_ids",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "priority",
    "cache_salt",
    "structured_outputs",
];

/// Puts fields that chat has by the same name into its body: the given ones, and those that say how to sample.
pub fn pass(fields: &Fields<'_>, names: &[&'static str], body: &mut Map<String, Value>) {
    for name in SAMPLING.iter().chain(names) {
        if let Some(value) = fields.get(name) {
            body.insert((*name).into(), value.clone());
        }
    }
}

/// Asks the template not to let the model think: by the variable that Qwen's and others' read.
pub fn dont_think(body: &mut Map<String, Value>) {
    if let Value::Object(kwargs) = body.entry("chat_template_kwargs").or_insert_with(|| json!({})) {
        kwargs.entry("enable_thinking").or_insert(Value::Bool(false));
    }
}

/// Chat's `messages` while they are put together.
#[derive(Debug, Default)]
pub struct Messages {
    list: Vec<Value>,
    /// What the assistant thought before what it says next.
    reasoning: Vec<String>,
}

impl Messages {
    /// Somebody says something, in one or more parts. System messages in a row are one: templates take one.
    pub fn say(&mut self, role: &str, texts: Vec<String>) {
        let mut parts: Vec<Value> = texts.into_iter().map(|text| json!({"type": "text", "text": text})).collect();
        if role == "system"
            && let Some(before) = self.last("system").and_then(|message| message["content"].as_array_mut())
        {
            before.append(&mut parts);
            return;
        }
        let mut message = json!({"role": role, "content": parts});
        if role == "assistant" && !self.reasoning.is_empty() {
            message["reasoning_content"] = std::mem::take(&mut self.reasoning).join("\n").into();
        }
        self.list.push(message);
    }

    /// The assistant thought something.
    pub fn think(&mut self, texts: Vec<String>) {
        self.reasoning.extend(texts);
    }

    /// The assistant called a function, beside what it has just said.
    pub fn call(&mut self, id: &str, name: &str, arguments: &str) {
        if !self.reasoning.is_empty() || self.last("assistant").is_none() {
            self.say("assistant", Vec::new());
        }
        let call = json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        if let Some(message) = self.last("assistant") {
            match message["tool_calls"].as_array_mut() {
                Some(calls) => calls.push(call),
                None => message["tool_calls"] = json!([call]),
            }
        }
    }

    /// A function's result.
    pub fn result(&mut self, id: &str, texts: Vec<String>) {
        self.say("tool", texts);
        if let Some(message) = self.last("tool") {
            message["tool_call_id"] = id.into();
        }
    }

    /// The last word is the assistant's, and it is text.
    pub fn ends_with_assistants_text(&self) -> bool {
        self.list.last().is_some_and(|message| message["role"] == "assistant" && message.get("tool_calls").is_none())
    }

    /// All of them.
    pub fn into_value(self) -> Value {
        Value::Array(self.list)
    }

    fn last(&mut self, role: &str) -> Option<&mut Value> {
        self.list.last_mut().filter(|message| message["role"] == role)
    }
}

/// An element of a list that must be an object, with its place for errors.
///
/// # Errors
/// 400 that names the place.
pub fn element<'a>(list: &str, place: usize, value: &'a Value) -> Result<Fields<'a>, ApiError> {
    let path = format!("{list}[{place}]");
    value.as_object().map(|object| Fields::at(object, &path)).ok_or_else(|| wrong_type(&path, "an object", value))
}

/// A field that is text or a list of text parts of one of these types.
///
/// # Errors
/// 400 that names the part.
pub fn texts(fields: &Fields<'_>, name: &'static str, kinds: &[&str]) -> Result<Vec<String>, ApiError> {
    let path = fields.path(name);
    match fields.required(name)? {
        Value::String(text) => Ok(vec![text.clone()]),
        Value::Array(parts) => {
            let text = |(i, part)| {
                let part = element(&path, i, part)?;
                let kind = required_string(&part, "type")?;
                if !kinds.contains(&kind) {
                    return Err(unsupported_type(&part, kind, kinds));
                }
                required_string(&part, "text").map(str::to_string)
            };
            parts.iter().enumerate().map(text).collect()
        }
        other => Err(fields.wrong(name, "a string or a list of parts", other)),
    }
}

/// A field that must be there and must be text.
///
/// # Errors
/// 400 that names it.
pub fn required_string<'a>(fields: &Fields<'a>, name: &'static str) -> Result<&'a str, ApiError> {
    fields.required(name)?;
    Ok(fields.string(name)?.unwrap_or_default())
}

/// 400: something of a type that isn't among those.
pub fn unsupported_type(fields: &Fields<'_>, kind: &str, supported: &[&str]) -> ApiError {
    let path = fields.path("type");
    ApiError::unsupported(path.clone(), format!("{path}: expected {}, found {kind:?}", supported.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_assistant_thinks_says_and_calls_is_one_message() {
        let mut messages = Messages::default();
        messages.say("system", vec!["Be brief.".into()]);
        messages.say("system", vec!["Be kind.".into()]);
        messages.think(vec!["Hm.".into()]);
        messages.say("assistant", vec!["Well.".into()]);
        messages.call("1", "f", "{}");
        messages.call("2", "g", "{}");
        messages.result("1", vec!["one".into()]);
        assert!(!messages.ends_with_assistants_text());
        messages.call("3", "f", "{}");
        let text = |text: &str| json!({"type": "text", "text": text});
        let call = |id: &str, name: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": "{}"}});
        let expected = json!([
            {"role": "system", "content": [text("Be brief."), text("Be kind.")]},
            {"role": "assistant", "content": [text("Well.")], "reasoning_content": "Hm.", "tool_calls": [call("1", "f"), call("2", "g")]},
            {"role": "tool", "content": [text("one")], "tool_call_id": "1"},
            {"role": "assistant", "content": [], "tool_calls": [call("3", "f")]},
        ]);
        assert_eq!(messages.into_value(), expected);
    }

    #[test]
    fn a_part_that_is_no_text_is_named_by_its_place() {
        let object =
            json!({"content": [{"type": "input_text", "text": "a"}, {"type": "input_image"}], "text": "b", "wrong": [{"type": "input_text", "text": 1}]});
        let fields = Fields::at(object.as_object().unwrap(), "input[3]");
        let param = |name| texts(&fields, name, &["input_text"]).unwrap_err().to_json()["error"]["param"].clone();
        assert_eq!([param("content"), param("wrong"), param("missing")], ["input[3].content[1].type", "input[3].wrong[0].text", "input[3].missing"]);
        assert_eq!(texts(&fields, "text", &[]).unwrap(), ["b"]);
    }
}

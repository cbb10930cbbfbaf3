//! The body of `POST /v1/responses` as a chat's.

use super::types::{Echo, ReasoningEcho};
use crate::openai::conversion::{Messages, dont_think, element, pass, required_string, texts, unsupported_type};
use crate::openai::errors::ApiError;
use crate::openai::fields::{Fields, wrong_type};
use serde_json::{Map, Value, json};

/// What chat calls the fields of this API, in the order in which errors are renamed.
pub const NAMES: [(&str, &str); 6] = [
    (".function.", "."),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("max_completion_tokens", "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("messages", "input"),
];

/// What needs a server that remembers.
const STATEFUL: [(&str, &str); 4] = [
    ("previous_response_id", "this server keeps no responses; send the whole conversation as input"),
    ("conversation", "this server keeps no conversations; send the whole conversation as input"),
    ("background", "this server keeps no responses to be fetched later; leave it out or use stream"),
    ("prompt", "this server keeps no prompts; send instructions and input"),
];

/// A chat's body, and what the response repeats of the request.
///
/// # Errors
/// 400 that names the field.
pub fn convert(fields: &Fields<'_>) -> Result<(Map<String, Value>, Echo), ApiError> {
    for (name, why) in STATEFUL {
        if fields.get(name).is_some_and(|value| *value != false) {
            return Err(ApiError::unsupported(name, format!("{name}: {why}")));
        }
    }
    refuse_logprobs(fields)?;
    // nothing is kept, asked for or not
    fields.bool("store")?;
    fields.object("stream_options")?;
    let mut body = Map::new();
    pass(fields, &["model", "stream", "user", "tool_choice", "parallel_tool_calls", "chat_template_kwargs", "stop"], &mut body);
    let instructions = fields.string("instructions")?;
    body.insert("messages".into(), messages(instructions, fields.required("input")?)?);
    let max_output_tokens = fields.count("max_output_tokens", 1..=usize::MAX)?;
    if let Some(tokens) = max_output_tokens {
        body.insert("max_completion_tokens".into(), tokens.into());
    }
    let (tools, raw_tools) = tools(fields)?;
    body.insert("tools".into(), tools);
    let text = text(fields, &mut body)?;
    let effort = effort(fields, &mut body)?;
    let metadata = fields.get("metadata").map(|v| v.as_object().cloned().ok_or_else(|| fields.wrong("metadata", "an object", v))).transpose()?;
    let echo = Echo {
        background: false,
        instructions: instructions.map(str::to_string),
        max_output_tokens,
        metadata: metadata.unwrap_or_default(),
        parallel_tool_calls: fields.bool("parallel_tool_calls")?.unwrap_or(true),
        previous_response_id: None,
        reasoning: ReasoningEcho { effort, summary: None },
        store: false,
        text,
        tool_choice: fields.get("tool_choice").cloned().unwrap_or_else(|| "auto".into()),
        tools: raw_tools,
        truncation: "disabled",
    };
    fields.log_unknown();
    Ok((body, echo))
}

/// Logprobs are chat's and completions'.
fn refuse_logprobs(fields: &Fields<'_>) -> Result<(), ApiError> {
    const WHERE: &str = "logprobs are not supported here; /v1/chat/completions has them";
    if fields.count("top_logprobs", 0..=usize::MAX)?.is_some_and(|n| n > 0) {
        return Err(ApiError::unsupported("top_logprobs", format!("top_logprobs: {WHERE}")));
    }
    let Some(include) = fields.get("include") else { return Ok(()) };
    let list = include.as_array().ok_or_else(|| fields.wrong("include", "a list of strings", include))?;
    match list.iter().find(|v| v.as_str().is_some_and(|name| name.ends_with("logprobs"))) {
        Some(_) => Err(ApiError::unsupported("include", format!("include: {WHERE}"))),
        None => Ok(()),
    }
}

fn messages(instructions: Option<&str>, input: &Value) -> Result<Value, ApiError> {
    let mut messages = Messages::default();
    if let Some(text) = instructions {
        messages.say("system", vec![text.into()]);
    }
    match input {
        Value::String(text) => messages.say("user", vec![text.clone()]),
        Value::Array(items) if !items.is_empty() => {
            for (i, item) in items.iter().enumerate() {
                add(&mut messages, &element("input", i, item)?)?;
            }
        }
        other => return Err(wrong_type("input", "a string, or a list of at least one item", other)),
    }
    Ok(messages.into_value())
}

/// One item of the input.
fn add(messages: &mut Messages, item: &Fields<'_>) -> Result<(), ApiError> {
    const KINDS: [&str; 4] = ["message", "reasoning", "function_call", "function_call_output"];
    match item.string("type")?.unwrap_or("message") {
        "message" => {
            // templates know the older of the two names
            let role = match required_string(item, "role")? {
                "developer" => "system",
                role => role,
            };
            messages.say(role, texts(item, "content", &["input_text", "output_text", "text"])?);
        }
        "reasoning" => {
            let name = if item.get("content").is_some() { "content" } else { "summary" };
            messages.think(texts(item, name, &["reasoning_text", "summary_text"])?);
        }
        "function_call" => messages.call(required_string(item, "call_id")?, required_string(item, "name")?, required_string(item, "arguments")?),
        "function_call_output" => messages.result(required_string(item, "call_id")?, texts(item, "output", &["input_text", "output_text", "text"])?),
        other => return Err(unsupported_type(item, other, &KINDS)),
    }
    Ok(())
}

/// Chat's tools have their function in a field of its own.
fn tools(fields: &Fields<'_>) -> Result<(Value, Vec<Value>), ApiError> {
    let Some(raw) = fields.get("tools") else { return Ok((json!([]), Vec::new())) };
    let list = raw.as_array().ok_or_else(|| fields.wrong("tools", "a list of tools", raw))?;
    let tool = |(i, tool): (usize, &Value)| {
        let tool = element("tools", i, tool)?;
        match tool.string("type")? {
            None | Some("function") => {}
            Some(other) => return Err(unsupported_type(&tool, other, &["function"])),
        }
        let function: Map<String, Value> =
            ["name", "description", "parameters", "strict"].into_iter().filter_map(|name| Some((name.into(), tool.get(name)?.clone()))).collect();
        Ok(json!({"type": "function", "function": function}))
    };
    let tools = list.iter().enumerate().map(tool).collect::<Result<Vec<_>, ApiError>>()?;
    Ok((tools.into(), list.clone()))
}

/// `text.format` is chat's `response_format`, without its inner object.
fn text(fields: &Fields<'_>, body: &mut Map<String, Value>) -> Result<Value, ApiError> {
    let Some(text) = fields.object("text")? else { return Ok(json!({"format": {"type": "text"}})) };
    if let Some(format) = text.object("format")? {
        let kind = required_string(&format, "type")?;
        let mut chat = json!({"type": kind});
        if kind == "json_schema" {
            let inner: Map<String, Value> =
                ["name", "description", "schema", "strict"].into_iter().filter_map(|name| Some((name.into(), format.get(name)?.clone()))).collect();
            chat["json_schema"] = inner.into();
        }
        body.insert("response_format".into(), chat);
    }
    let mut echo = fields.get("text").cloned().unwrap_or_default();
    if echo["format"].is_null() {
        echo["format"] = json!({"type": "text"});
    }
    Ok(echo)
}

/// `"effort": "none"` turns thinking off, as far as the template lets it be turned off.
fn effort(fields: &Fields<'_>, body: &mut Map<String, Value>) -> Result<Option<String>, ApiError> {
    let Some(reasoning) = fields.object("reasoning")? else { return Ok(None) };
    let effort = reasoning.string("effort")?;
    if effort == Some("none") {
        dont_think(body);
    }
    Ok(effort.map(str::to_string))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn convert_json(body: &Value) -> Result<(Map<String, Value>, Echo), ApiError> {
        convert(&Fields::new(body.as_object().unwrap()))
    }

    fn param(body: &Value) -> String {
        convert_json(body).unwrap_err().to_json()["error"]["param"].as_str().unwrap().to_string()
    }

    #[test]
    fn a_request_becomes_a_chats() {
        let body = json!({
            "model": "m", "instructions": "Be brief.", "max_output_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 4, "stream": true,
            "input": [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
                {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]},
                {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c", "output": "Rain."}],
            "tools": [{"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": true}],
            "tool_choice": {"type": "function", "name": "f"}, "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
            "reasoning": {"effort": "none"}, "store": true, "metadata": {"a": "b"}
        });
        let (chat, echo) = convert_json(&body).unwrap();
        let text = |text: &str| json!({"type": "text", "text": text});
        let expected = json!({
            "temperature": 0.5, "top_p": 0.9, "seed": 4, "model": "m", "stream": true, "tool_choice": {"type": "function", "name": "f"},
            "messages": [{"role": "system", "content": [text("Be brief."), text("Be kind.")]}, {"role": "user", "content": [text("Weather?")]},
                {"role": "assistant", "content": [], "reasoning_content": "Hm.",
                    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
                {"role": "tool", "content": [text("Rain.")], "tool_call_id": "c"}],
            "max_completion_tokens": 9,
            "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": true}}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
            "chat_template_kwargs": {"enable_thinking": false}
        });
        assert_eq!(Value::Object(chat), expected);
        assert_eq!((echo.store, echo.tools, echo.text), (false, body["tools"].as_array().unwrap().clone(), body["text"].clone()));
    }

    #[test]
    fn what_needs_a_memory_is_refused_by_name() {
        for (name, value) in
            [("previous_response_id", json!("resp_1")), ("conversation", json!("conv_1")), ("background", json!(true)), ("prompt", json!({"id": "p"}))]
        {
            assert_eq!(param(&json!({"input": "a", name: value})), name);
            assert!(convert_json(&json!({"input": "a", name: null})).is_ok());
        }
        assert!(convert_json(&json!({"input": "a", "background": false})).is_ok());
    }

    #[test]
    fn a_bad_item_is_named_by_its_place() {
        let with = |item: Value| param(&json!({"input": [{"role": "user", "content": "a"}, item]}));
        assert_eq!(with(json!(1)), "input[1]");
        assert_eq!(with(json!({"content": "a"})), "input[1].role");
        assert_eq!(with(json!({"type": "item_reference", "id": "x"})), "input[1].type");
        assert_eq!(with(json!({"role": "user", "content": [{"type": "input_image"}]})), "input[1].content[0].type");
        assert_eq!(with(json!({"type": "function_call", "name": "f", "arguments": "{}"})), "input[1].call_id");
        assert_eq!(param(&json!({"input": []})), "input");
        assert_eq!(param(&json!({"input": "a", "tools": [{"type": "web_search"}]})), "tools[0].type");
        assert_eq!(param(&json!({"input": "a", "include": ["message.output_text.logprobs"]})), "include");
        assert_eq!(param(&json!({"input": "a", "max_output_tokens": 0})), "max_output_tokens");
    }
}

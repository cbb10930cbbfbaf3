//! The body of `POST /v1/messages` as a chat's.

use crate::openai::conversion::{Messages, dont_think, element, pass, required_string, texts, unsupported_type};
use crate::openai::errors::ApiError;
use crate::openai::fields::{Fields, wrong_type};
use crate::openai::sampling::MAX_STOPS;
use serde_json::{Map, Value, json};

/// What chat calls the fields of this API, in the order in which errors are renamed.
pub const NAMES: [(&str, &str); 5] = [
    (".function.parameters", ".input_schema"),
    (".function.", "."),
    ("response_format.json_schema", "output_config.format"),
    ("response_format", "output_config.format"),
    ("max_completion_tokens", "max_tokens"),
];

/// A chat's body.
///
/// # Errors
/// 400 that names the field.
pub fn convert(fields: &Fields<'_>) -> Result<Map<String, Value>, ApiError> {
    let mut body = prompt(fields)?;
    pass(fields, &["stream"], &mut body);
    fields.required("max_tokens")?;
    if let Some(tokens) = fields.count("max_tokens", 1..=usize::MAX)? {
        body.insert("max_completion_tokens".into(), tokens.into());
    }
    let stops = fields.strings("stop_sequences", MAX_STOPS)?;
    body.insert("stop".into(), stops.into());
    fields.object("metadata")?;
    fields.log_unknown();
    Ok(body)
}

/// Only what makes the prompt.
///
/// # Errors
/// 400 that names the field.
pub fn convert_prompt(fields: &Fields<'_>) -> Result<Map<String, Value>, ApiError> {
    let body = prompt(fields)?;
    fields.log_unknown();
    Ok(body)
}

fn prompt(fields: &Fields<'_>) -> Result<Map<String, Value>, ApiError> {
    let mut body = Map::new();
    pass(fields, &["model", "chat_template_kwargs"], &mut body);
    let mut messages = Messages::default();
    if fields.get("system").is_some() {
        messages.say("system", texts(fields, "system", &["text"])?);
    }
    match fields.required("messages")? {
        Value::Array(list) if !list.is_empty() => {
            for (i, message) in list.iter().enumerate() {
                add(&mut messages, &element("messages", i, message)?)?;
            }
        }
        other => return Err(wrong_type("messages", "a list of at least one message", other)),
    }
    if messages.ends_with_assistants_text() {
        // the answer goes on where the client's last message ends
        body.insert("continue_final_message".into(), true.into());
    }
    body.insert("messages".into(), messages.into_value());
    tools(fields, &mut body)?;
    tool_choice(fields, &mut body)?;
    if let Some(thinking) = fields.object("thinking")?
        && thinking.string("type")? == Some("disabled")
    {
        dont_think(&mut body);
    }
    output_format(fields, &mut body)?;
    Ok(body)
}

/// One message: its blocks in their order, results of tools as messages of their own.
fn add(messages: &mut Messages, message: &Fields<'_>) -> Result<(), ApiError> {
    let role = required_string(message, "role")?;
    if !["user", "assistant", "system"].contains(&role) {
        return Err(message.wrong("role", "\"user\", \"assistant\" or \"system\"", &role.into()));
    }
    let blocks = match message.required("content")? {
        Value::String(text) => {
            messages.say(role, vec![text.clone()]);
            return Ok(());
        }
        Value::Array(blocks) => blocks,
        other => return Err(message.wrong("content", "a string or a list of blocks", other)),
    };
    let path = message.path("content");
    let mut said = Vec::new();
    for (i, block) in blocks.iter().enumerate() {
        let block = element(&path, i, block)?;
        let kind = required_string(&block, "type")?;
        if kind != "text" && !said.is_empty() {
            messages.say(role, std::mem::take(&mut said));
        }
        match (role, kind) {
            (_, "text") => said.push(required_string(&block, "text")?.to_string()),
            ("user", "tool_result") => {
                let id = required_string(&block, "tool_use_id")?;
                let result = if block.get("content").is_some() { texts(&block, "content", &["text"])? } else { Vec::new() };
                messages.result(id, result);
            }
            ("assistant", "tool_use") => {
                let input = block.required("input")?;
                let input = input.as_object().ok_or_else(|| block.wrong("input", "an object", input))?;
                let (id, name) = (required_string(&block, "id")?, required_string(&block, "name")?);
                messages.call(id, name, &Value::from(input.clone()).to_string());
            }
            ("assistant", "thinking") => messages.think(vec![required_string(&block, "thinking")?.to_string()]),
            // nobody but who wrote it can read it
            ("assistant", "redacted_thinking") => {}
            ("user", _) => return Err(unsupported_type(&block, kind, &["text", "tool_result"])),
            ("assistant", _) => return Err(unsupported_type(&block, kind, &["text", "tool_use", "thinking"])),
            _ => return Err(unsupported_type(&block, kind, &["text"])),
        }
    }
    if !said.is_empty() || blocks.is_empty() {
        messages.say(role, said);
    }
    Ok(())
}

fn tools(fields: &Fields<'_>, body: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(raw) = fields.get("tools") else { return Ok(()) };
    let list = raw.as_array().ok_or_else(|| fields.wrong("tools", "a list of tools", raw))?;
    let tool = |(i, tool): (usize, &Value)| {
        let tool = element("tools", i, tool)?;
        match tool.string("type")? {
            None | Some("custom") => {}
            Some(other) => return Err(unsupported_type(&tool, other, &["custom"])),
        }
        let names = [("name", "name"), ("description", "description"), ("input_schema", "parameters")];
        let function: Map<String, Value> = names.into_iter().filter_map(|(theirs, ours)| Some((ours.into(), tool.get(theirs)?.clone()))).collect();
        Ok(json!({"type": "function", "function": function}))
    };
    let tools = list.iter().enumerate().map(tool).collect::<Result<Vec<_>, ApiError>>()?;
    body.insert("tools".into(), tools.into());
    Ok(())
}

fn tool_choice(fields: &Fields<'_>, body: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(choice) = fields.object("tool_choice")? else { return Ok(()) };
    let chosen = match required_string(&choice, "type")? {
        "auto" => json!("auto"),
        "any" => json!("required"),
        "none" => json!("none"),
        "tool" => json!({"type": "function", "function": {"name": required_string(&choice, "name")?}}),
        other => return Err(unsupported_type(&choice, other, &["auto", "any", "tool", "none"])),
    };
    body.insert("tool_choice".into(), chosen);
    if choice.bool("disable_parallel_tool_use")?.unwrap_or(false) {
        body.insert("parallel_tool_calls".into(), false.into());
    }
    Ok(())
}

/// `output_config.format` is chat's `response_format` of JSON.
fn output_format(fields: &Fields<'_>, body: &mut Map<String, Value>) -> Result<(), ApiError> {
    let Some(config) = fields.object("output_config")? else { return Ok(()) };
    let Some(format) = config.object("format")? else { return Ok(()) };
    match required_string(&format, "type")? {
        "json_schema" => {}
        other => return Err(unsupported_type(&format, other, &["json_schema"])),
    }
    let schema = format.required("schema")?;
    body.insert("response_format".into(), json!({"type": "json_schema", "json_schema": {"schema": schema}}));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn convert_json(body: &Value) -> Result<Map<String, Value>, ApiError> {
        convert(&Fields::new(body.as_object().unwrap()))
    }

    fn param(body: &Value) -> String {
        convert_json(body).unwrap_err().to_json()["error"]["param"].as_str().unwrap().to_string()
    }

    #[test]
    fn a_request_becomes_a_chats() {
        let body = json!({
            "model": "m", "max_tokens": 9, "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}], "top_k": 5,
            "messages": [{"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm.", "signature": "s"}, {"type": "text", "text": "Let me see."},
                    {"type": "tool_use", "id": "c", "name": "f", "input": {"city": "Bern"}}]},
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "Rain."}]}, {"type": "text", "text": "So?"}]}],
            "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}}], "tool_choice": {"type": "any", "disable_parallel_tool_use": true},
            "stop_sequences": ["END"], "thinking": {"type": "disabled"}, "metadata": {"user_id": "u"}
        });
        let text = |text: &str| json!([{"type": "text", "text": text}]);
        let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"city\":\"Bern\"}"}});
        let expected = json!({
            "top_k": 5, "model": "m",
            "messages": [{"role": "system", "content": text("Be brief.")}, {"role": "user", "content": text("Weather?")},
                {"role": "assistant", "content": text("Let me see."), "reasoning_content": "Hm.", "tool_calls": [call]},
                {"role": "tool", "content": text("Rain."), "tool_call_id": "c"}, {"role": "user", "content": text("So?")}],
            "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}],
            "tool_choice": "required", "parallel_tool_calls": false, "chat_template_kwargs": {"enable_thinking": false},
            "max_completion_tokens": 9, "stop": ["END"]
        });
        assert_eq!(Value::Object(convert_json(&body).unwrap()), expected);
    }

    #[test]
    fn an_assistants_last_word_is_gone_on_with() {
        let ends_with = |role: &str| convert_json(&json!({"max_tokens": 1, "messages": [{"role": "user", "content": "a"}, {"role": role, "content": "b"}]}));
        assert_eq!(ends_with("assistant").unwrap()["continue_final_message"], true);
        assert!(!ends_with("user").unwrap().contains_key("continue_final_message"));
    }

    #[test]
    fn a_bad_field_is_named_by_its_place() {
        let with = |message: Value| param(&json!({"max_tokens": 1, "messages": [{"role": "user", "content": "a"}, message]}));
        assert_eq!(with(json!(1)), "messages[1]");
        assert_eq!(with(json!({"role": "tool", "content": "a"})), "messages[1].role");
        assert_eq!(with(json!({"role": "user"})), "messages[1].content");
        assert_eq!(with(json!({"role": "user", "content": [{"type": "image", "source": {}}]})), "messages[1].content[0].type");
        assert_eq!(with(json!({"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": "x"}]})), "messages[1].content[0].input");
        let also = |name: &str, value: Value| param(&json!({"max_tokens": 1, "messages": [{"role": "user", "content": "a"}], name: value}));
        assert_eq!(also("max_tokens", Value::Null), "max_tokens");
        assert_eq!(also("tools", json!([{"type": "web_search_20250305", "name": "web_search"}])), "tools[0].type");
        assert_eq!(also("tool_choice", json!({"type": "tool"})), "tool_choice.name");
        assert_eq!(also("system", json!([{"type": "image"}])), "system[0].type");
        assert_eq!(also("output_config", json!({"format": {"type": "xml"}})), "output_config.format.type");
        assert_eq!(also("stop_sequences", json!([1])), "stop_sequences");
    }
}

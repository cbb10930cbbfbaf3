//! `POST /v1/responses`.

use crate::harness::{Answer, Server};
use crate::tools::with_template;
use serde_json::{Value, json};

fn ask(extra: &Value) -> Value {
    let mut body = json!({"input": "Hello there", "instructions": "Be brief.", "max_output_tokens": 12, "temperature": 0, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn weather() -> Value {
    let schema = json!({"type": "object", "properties": {"city": {"enum": ["Bern", "Oslo"]}}, "required": ["city"], "additionalProperties": false});
    json!({"type": "function", "name": "weather", "parameters": schema})
}

fn respond(server: &Server, extra: &Value) -> Answer {
    server.post("/v1/responses", &ask(extra))
}

fn types(events: &[Value]) -> Vec<&str> {
    let name = |event: &Value| event["type"].as_str().unwrap().to_string();
    let mut names: Vec<&str> = Vec::new();
    for event in events {
        let name = event["type"].as_str().unwrap().strip_prefix("response.").unwrap_or_else(|| panic!("{}", name(event)));
        // any number of deltas counts as one
        if !(name.ends_with("delta") && names.last() == Some(&name)) {
            names.push(name);
        }
    }
    names
}

fn joined(events: &[Value], kind: &str) -> String {
    events.iter().filter(|event| event["type"] == kind).map(|event| event["delta"].as_str().unwrap()).collect()
}

/// Without what is new every time.
fn comparable(mut response: Value) -> Value {
    for name in ["id", "created_at", "completed_at", "usage"] {
        response[name] = Value::Null;
    }
    for item in response["output"].as_array_mut().unwrap() {
        item["id"] = Value::Null;
        if item["type"] == "function_call" {
            item["call_id"] = Value::Null;
        }
    }
    response
}

#[test]
fn a_response_says_what_chat_says() {
    let server = Server::start(&[]);
    let response = respond(&server, &json!({})).ok();
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]);
    let chat = server.chat(&json!({"messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": true})).ok();
    assert_eq!((&response["object"], &response["status"], &response["store"]), (&json!("response"), &json!("incomplete"), &json!(false)));
    assert_eq!(response["incomplete_details"], json!({"reason": "max_output_tokens"}));
    assert_eq!(response["output"][0]["content"][0]["text"], chat["choices"][0]["message"]["content"]);
    assert_eq!(response["usage"]["input_tokens"], chat["usage"]["prompt_tokens"]);
    assert_eq!(response["usage"]["output_tokens"], 12);
    // the chat found in the cache what the response had left there
    let again = respond(&server, &json!({})).ok();
    assert_eq!(again["usage"]["input_tokens_details"]["cached_tokens"], chat["usage"]["prompt_tokens_details"]["cached_tokens"]);
}

#[test]
fn input_is_a_conversation_of_items() {
    let server = Server::start(&[]);
    let items = json!([{"role": "developer", "content": "Be kind."}, {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [{"type": "output_text", "text": "Hi.", "annotations": []}]},
        {"role": "user", "content": "More"}]);
    let response = respond(&server, &json!({"input": items})).ok();
    let messages = json!([{"role": "system", "content": "Be brief.\nBe kind."}, {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "More"}]);
    let chat = server.chat(&json!({"messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": true})).ok();
    assert_eq!(response["output"][0]["content"][0]["text"], chat["choices"][0]["message"]["content"]);
    assert_eq!(response["usage"]["input_tokens"], chat["usage"]["prompt_tokens"]);
}

#[test]
fn a_stream_tells_of_a_message_in_order_and_ends_with_the_response() {
    let server = Server::start(&[]);
    let whole = respond(&server, &json!({})).ok();
    let events = server.events("/v1/responses", &ask(&json!({})));
    let numbers: Vec<u64> = events.iter().map(|event| event["sequence_number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<_>>());
    let expected = [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ];
    assert_eq!(types(&events), expected);
    assert_eq!((&events[0]["response"]["status"], &events[0]["response"]["output"]), (&json!("in_progress"), &json!([])));
    assert_eq!(joined(&events, "response.output_text.delta"), whole["output"][0]["content"][0]["text"].as_str().unwrap());
    let last = &events.last().unwrap()["response"];
    assert_eq!((&last["id"], &last["usage"]["output_tokens"]), (&events[0]["response"]["id"], &json!(12)));
    assert_eq!(comparable(last.clone()), comparable(whole));
}

#[test]
fn a_forced_call_is_an_item_streamed_and_not() {
    let server = Server::start(&[]);
    let extra = json!({"tools": [weather()], "tool_choice": {"type": "function", "name": "weather"}, "max_output_tokens": 100});
    let whole = respond(&server, &extra).ok();
    assert_eq!((&whole["status"], whole["output"].as_array().unwrap().len()), (&json!("completed"), 1));
    let call = &whole["output"][0];
    assert_eq!((&call["type"], &call["name"], &call["status"]), (&json!("function_call"), &json!("weather"), &json!("completed")));
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!(["Bern", "Oslo"].contains(&arguments["city"].as_str().unwrap()));
    let events = server.events("/v1/responses", &ask(&extra));
    let expected =
        ["created", "in_progress", "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done", "completed"];
    assert_eq!(types(&events), expected);
    assert_eq!(joined(&events, "response.function_call_arguments.delta"), call["arguments"].as_str().unwrap());
    assert_eq!(comparable(events.last().unwrap()["response"].clone()), comparable(whole));
}

#[test]
fn a_call_and_its_result_go_back_as_items() {
    let server = Server::start(&[]);
    let items = json!([{"role": "user", "content": "Weather?"}, {"type": "function_call", "call_id": "c", "name": "weather", "arguments": "{\"city\": \"Bern\"}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "Rain."}]}]);
    let response = respond(&server, &json!({"input": items, "tools": [weather()], "tool_choice": "none"})).ok();
    let call = json!({"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Bern\"}"}});
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c", "content": "Rain."}]);
    let chat = server.chat(&json!({"messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": true})).ok();
    assert_eq!(response["output"][0]["content"][0]["text"], chat["choices"][0]["message"]["content"]);
}

#[test]
fn text_can_be_made_to_have_a_form() {
    let server = Server::start(&[]);
    let schema = json!({"type": "object", "properties": {"answer": {"enum": ["good", "bad"]}}, "required": ["answer"], "additionalProperties": false});
    let format = json!({"format": {"type": "json_schema", "name": "a", "schema": schema}});
    let response = respond(&server, &json!({"text": format, "max_output_tokens": 200, "ignore_eos": false})).ok();
    let answer: Value = serde_json::from_str(response["output"][0]["content"][0]["text"].as_str().unwrap()).unwrap();
    assert!(["good", "bad"].contains(&answer["answer"].as_str().unwrap()));
    assert_eq!((&response["status"], &response["text"]), (&json!("completed"), &format));
}

#[test]
fn reasoning_is_an_item_of_its_own_and_its_tokens_are_counted() {
    let directory = tempfile::tempdir().unwrap();
    let opened = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}";
    let server = Server::start(&["--model", &with_template(directory.path(), opened)]);
    let response = respond(&server, &json!({})).ok();
    assert_eq!((&response["output"][0]["type"], response["output"].as_array().unwrap().len()), (&json!("reasoning"), 1));
    assert_eq!(response["usage"]["output_tokens_details"]["reasoning_tokens"], 12);
    let events = server.events("/v1/responses", &ask(&json!({})));
    let expected = [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "incomplete",
    ];
    assert_eq!(types(&events), expected);
    assert_eq!(joined(&events, "response.reasoning_text.delta"), response["output"][0]["content"][0]["text"].as_str().unwrap());
    let silent = respond(&server, &json!({"reasoning": {"effort": "none"}})).ok();
    assert_eq!((&silent["output"][0]["type"], &silent["reasoning"]["effort"]), (&json!("message"), &json!("none")));
}

#[test]
fn a_bad_field_is_named_as_this_api_names_it() {
    let server = Server::start(&[]);
    for (extra, param) in [
        (json!({"previous_response_id": "resp_1"}), "previous_response_id"),
        (json!({"conversation": {"id": "c"}}), "conversation"),
        (json!({"background": true}), "background"),
        (json!({"input": null}), "input"),
        (json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}), "input[0].content[0].type"),
        (json!({"max_output_tokens": "many"}), "max_output_tokens"),
        (json!({"max_output_tokens": 100_000}), "input"),
        (json!({"temperature": "hot"}), "temperature"),
        (json!({"tools": [{"type": "function"}]}), "tools[0].name"),
        (json!({"tools": [{"type": "function", "name": "f", "parameters": 1}]}), "tools[0].parameters"),
        (json!({"text": {"format": {"type": "json_schema", "name": "n"}}}), "text.format.schema"),
        (json!({"text": {"format": {"type": "json_schema", "schema": {"type": "nonsense"}}}}), "text.format"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
    ] {
        let answer = respond(&server, &extra);
        assert_eq!((answer.status, answer.json()["error"]["param"].as_str()), (400, Some(param)), "{extra}: {}", answer.body);
    }
    assert_eq!(respond(&server, &json!({"model": "no-such-model"})).status, 404);
    assert_eq!(respond(&server, &json!({"store": true, "frobnicate": 1, "service_tier": "auto"})).status, 200);
    assert!(server.log().contains("frobnicate"));
}

#[test]
fn a_stream_that_fails_says_so_in_its_last_event() {
    let server = Server::start(&["--request-timeout", "1"]);
    let _others = server.keep_busy();
    let events = server.events("/v1/responses", &ask(&json!({"max_output_tokens": 900})));
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    assert!(last["response"]["error"]["message"].as_str().unwrap().contains("longer than 1 seconds"), "{last}");
}

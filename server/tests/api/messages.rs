//! `POST /v1/messages` and `/v1/messages/count_tokens`.

use crate::harness::{Answer, Server, request};
use crate::tools::with_template;
use serde_json::{Value, json};

fn ask(extra: &Value) -> Value {
    let mut body =
        json!({"system": "Be brief.", "messages": [{"role": "user", "content": "Hello there"}], "max_tokens": 12, "temperature": 0, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn weather() -> Value {
    let schema = json!({"type": "object", "properties": {"city": {"enum": ["Bern", "Oslo"]}}, "required": ["city"], "additionalProperties": false});
    json!({"name": "weather", "input_schema": schema})
}

fn message(server: &Server, extra: &Value) -> Answer {
    server.post("/v1/messages", &ask(extra))
}

fn types(events: &[Value]) -> Vec<&str> {
    let mut names: Vec<&str> = events.iter().map(|event| event["type"].as_str().unwrap()).collect();
    // any number of deltas counts as one
    names.dedup();
    names
}

#[test]
fn a_message_says_what_chat_says() {
    let server = Server::start(&[]);
    let answer = message(&server, &json!({})).ok();
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}]);
    let chat = server.chat(&json!({"messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": true})).ok();
    assert_eq!((&answer["type"], &answer["role"], &answer["stop_reason"]), (&json!("message"), &json!("assistant"), &json!("max_tokens")));
    assert_eq!(answer["content"], json!([{"type": "text", "text": chat["choices"][0]["message"]["content"]}]));
    let read = |usage: &Value| usage["input_tokens"].as_u64().unwrap() + usage["cache_read_input_tokens"].as_u64().unwrap();
    assert_eq!((json!(read(&answer["usage"])), &answer["usage"]["output_tokens"]), (chat["usage"]["prompt_tokens"].clone(), &json!(12)));
    let count = server.post("/v1/messages/count_tokens", &ask(&json!({}))).ok();
    assert_eq!(count, json!({"input_tokens": chat["usage"]["prompt_tokens"]}));
    let again = message(&server, &json!({})).ok();
    assert_eq!(again["usage"]["cache_read_input_tokens"], chat["usage"]["prompt_tokens_details"]["cached_tokens"]);
}

#[test]
fn a_stream_tells_of_a_block_in_order_and_adds_up_to_the_message() {
    let server = Server::start(&[]);
    let whole = message(&server, &json!({})).ok();
    let events = server.events("/v1/messages", &ask(&json!({})));
    let expected = ["message_start", "ping", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop"];
    assert_eq!(types(&events), expected);
    assert_eq!((&events[0]["message"]["content"], &events[0]["message"]["stop_reason"]), (&json!([]), &Value::Null));
    assert_eq!(events[2]["content_block"], json!({"type": "text", "text": ""}));
    let text: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
    assert_eq!(whole["content"][0]["text"], text);
    let end = &events[events.len() - 2];
    assert_eq!((&end["delta"]["stop_reason"], &end["usage"]["output_tokens"]), (&json!("max_tokens"), &json!(12)));
}

#[test]
fn an_assistants_last_message_is_gone_on_with() {
    let server = Server::start(&[]);
    let messages = json!([{"role": "user", "content": "Tell me"}, {"role": "assistant", "content": "Once upon"}]);
    let answer = message(&server, &json!({"messages": messages, "system": null})).ok();
    let prompt = "<|im_start|>user\nTell me<|im_end|>\n<|im_start|>assistant\nOnce upon";
    let same = server.complete(&json!({"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": true, "add_special_tokens": false})).ok();
    assert_eq!(answer["content"][0]["text"], same["choices"][0]["text"]);
}

#[test]
fn a_tool_is_used_and_its_result_goes_back_as_a_block() {
    let server = Server::start(&[]);
    let extra = json!({"tools": [weather()], "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 100});
    let whole = message(&server, &extra).ok();
    let used = &whole["content"][0];
    assert_eq!((&whole["stop_reason"], &used["type"], &used["name"]), (&json!("tool_use"), &json!("tool_use"), &json!("weather")));
    assert!(["Bern", "Oslo"].contains(&used["input"]["city"].as_str().unwrap()));
    let events = server.events("/v1/messages", &ask(&extra));
    let start = events.iter().find(|event| event["type"] == "content_block_start").unwrap();
    assert_eq!((&start["content_block"]["name"], &start["content_block"]["input"]), (&json!("weather"), &json!({})));
    let written: String = events.iter().filter_map(|event| event["delta"]["partial_json"].as_str()).collect();
    assert_eq!(serde_json::from_str::<Value>(&written).unwrap(), used["input"]);
    assert_eq!(events[events.len() - 2]["delta"]["stop_reason"], "tool_use");

    let blocks = json!([{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": [{"type": "text", "text": "Well."}, used]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": used["id"], "content": "Rain."}, {"type": "text", "text": "So?"}]}]);
    let answer = message(&server, &json!({"messages": blocks, "tools": [weather()], "tool_choice": {"type": "none"}})).ok();
    let messages = json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}, {"role": "assistant", "content": "Well."},
        {"role": "tool", "content": "Rain."}, {"role": "user", "content": "So?"}]);
    let chat = server.chat(&json!({"messages": messages, "max_tokens": 12, "temperature": 0, "ignore_eos": true})).ok();
    assert_eq!(answer["content"][0]["text"], chat["choices"][0]["message"]["content"]);
}

#[test]
fn a_call_that_was_cut_short_has_no_input_and_the_reason_says_why() {
    let server = Server::start(&[]);
    let cut = json!({"tools": [weather()], "tool_choice": {"type": "any"}, "max_tokens": 100, "messages": [{"role": "user", "content": "Weather?"}]});
    let whole = message(&server, &cut).ok()["usage"]["output_tokens"].as_u64().unwrap();
    // (the last tokens close the call)
    let fewer = (1..whole).rev().map(|tokens| {
        let mut body = cut.clone();
        body["max_tokens"] = json!(tokens);
        message(&server, &body).ok()
    });
    let mut partial = fewer.filter(|answer| answer["content"][0]["type"] == "tool_use" && answer["content"][0]["input"] == json!({}));
    assert_eq!(partial.next().expect("some length cuts the input")["stop_reason"], "max_tokens");
}

#[test]
fn a_stop_sequence_ends_the_message_and_is_named() {
    let server = Server::start(&[]);
    let text = message(&server, &json!({})).ok()["content"][0]["text"].as_str().unwrap().to_string();
    let stop: String = text.chars().skip(5).take(4).collect();
    let answer = message(&server, &json!({"stop_sequences": [stop]})).ok();
    assert_eq!((&answer["stop_reason"], &answer["stop_sequence"]), (&json!("stop_sequence"), &json!(stop)));
    assert_eq!(answer["content"][0]["text"].as_str(), text.split(&stop).next());
}

#[test]
fn what_a_model_thinks_is_a_block_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let opened = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt and enable_thinking | default(true) %}<think>\n{% endif %}";
    let server = Server::start(&["--model", &with_template(directory.path(), opened)]);
    let answer = message(&server, &json!({})).ok();
    assert_eq!((&answer["content"][0]["type"], answer["content"].as_array().unwrap().len()), (&json!("thinking"), 1));
    let events = server.events("/v1/messages", &ask(&json!({})));
    let thought: String = events.iter().filter_map(|event| event["delta"]["thinking"].as_str()).collect();
    assert_eq!(answer["content"][0]["thinking"], thought);
    assert_eq!(message(&server, &json!({"thinking": {"type": "disabled"}})).ok()["content"][0]["type"], "text");
}

#[test]
fn errors_of_any_origin_are_anthropics() {
    let server = Server::start(&["--max-body-size", "4k"]);
    let kind = |answer: &Answer, status: u16| {
        assert_eq!((answer.status, answer.json()["type"].as_str()), (status, Some("error")), "{}", answer.body);
        let error = answer.json()["error"].clone();
        assert!(!error["message"].as_str().unwrap().is_empty() && answer.header("x-request-id").is_some());
        error["type"].as_str().unwrap().to_string()
    };
    for (extra, field) in [
        (json!({"max_tokens": null}), "max_tokens"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), "messages[0].content[0].type"),
        (json!({"temperature": -1}), "temperature"),
        (json!({"tools": [{"name": "f", "input_schema": 1}]}), "tools[0].input_schema"),
        (json!({"tools": [{"input_schema": {}}]}), "tools[0].name"),
        (json!({"max_tokens": 100_000}), "maximum context length"),
    ] {
        let answer = message(&server, &extra);
        assert_eq!(kind(&answer, 400), "invalid_request_error");
        assert!(answer.json()["error"]["message"].as_str().unwrap().contains(field), "{}", answer.body);
    }
    assert_eq!(kind(&message(&server, &json!({"model": "no-such-model"})), 404), "not_found_error");
    assert_eq!(kind(&message(&server, &json!({"system": "a".repeat(5000)})), 413), "request_too_large");
    assert_eq!(kind(&request(&server.public, "POST", "/v1/messages", &[], Some("{")), 400), "invalid_request_error");
    assert_eq!(kind(&server.get("/v1/messages"), 405), "invalid_request_error");
    assert_eq!(kind(&server.get("/v1/messages/msg_1"), 404), "not_found_error");
}

#[test]
fn a_key_may_stand_where_anthropics_clients_put_it() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_on(data.path(), &["--rate-limit", "2"], &[("EVOP_API_KEYS", "secret-key,other")]);
    let post = |path: &str, headers: &[(&str, &str)]| request(&server.public, "POST", path, headers, Some(&ask(&json!({"max_tokens": 1})).to_string()));
    assert_eq!(post("/v1/messages", &[("x-api-key", "secret-key")]).status, 200);
    assert_eq!(post("/v1/messages", &[("authorization", "Bearer secret-key")]).status, 200);
    let limited = post("/v1/messages", &[("x-api-key", "secret-key")]);
    assert_eq!((limited.status, &limited.json()["error"]["type"]), (429, &json!("rate_limit_error")));
    assert!(limited.header("retry-after").is_some());
    for wrong in [&[][..], &[("x-api-key", "wrong")], &[("x-api-key", "other"), ("authorization", "Bearer wrong")]] {
        let refused = post("/v1/messages", wrong);
        assert_eq!((refused.status, &refused.json()["error"]["type"]), (401, &json!("authentication_error")));
    }
    assert_eq!(post("/v1/chat/completions", &[("x-api-key", "other")]).status, 401, "elsewhere a key is a bearer's");
    assert!(!server.log().contains("secret-key"));
}

#[test]
fn a_stream_that_fails_says_so_in_its_last_event() {
    let server = Server::start(&["--request-timeout", "1"]);
    let _others = server.keep_busy();
    let events = server.events("/v1/messages", &ask(&json!({"max_tokens": 900})));
    let last = events.last().unwrap();
    assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!("timeout_error")));
}

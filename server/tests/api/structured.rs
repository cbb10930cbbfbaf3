//! `response_format` and `structured_outputs`.

use crate::harness::{Server, joined};
use serde_json::{Value, json};

fn ask(extra: &Value) -> Value {
    let mut body = json!({"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 200, "temperature": 1, "seed": 1});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn person() -> Value {
    json!({"type": "object", "$defs": {"kind": {"enum": ["king", "sailor"]}}, "properties": {"name": {"type": "string", "maxLength": 20}, "kind": {"$ref": "#/$defs/kind"}},
        "required": ["name", "kind"], "additionalProperties": false})
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap()
}

fn check_person(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
    assert!(value["name"].is_string() && ["king", "sailor"].contains(&value["kind"].as_str().unwrap()), "{text}");
}

#[test]
fn a_response_format_is_kept_to_streamed_and_not() {
    let server = Server::start(&[]);
    let format = json!({"response_format": {"type": "json_schema", "json_schema": {"name": "person", "strict": true, "schema": person()}}, "n": 2});
    let answer = server.chat(&ask(&format)).ok();
    for choice in answer["choices"].as_array().unwrap() {
        check_person(choice["message"]["content"].as_str().unwrap());
        assert_eq!(choice["finish_reason"], "stop");
    }
    let chunks = server.stream("/v1/chat/completions", &ask(&format));
    assert_eq!(joined(&chunks, 0), content(&answer));
    let free = server.chat(&ask(&json!({"response_format": {"type": "text"}}))).ok();
    assert_eq!(free["choices"], server.chat(&ask(&json!({}))).ok()["choices"]);
    let completion = json!({"prompt": "A person: ", "max_tokens": 200, "response_format": format["response_format"], "seed": 2});
    check_person(server.complete(&completion).ok()["choices"][0]["text"].as_str().unwrap());
}

#[test]
fn each_kind_of_structured_output_is_kept_to() {
    let server = Server::start(&[]);
    let text = |outputs: Value| {
        let body = json!({"prompt": "I say ", "max_tokens": 200, "temperature": 0, "structured_outputs": outputs});
        let chat = server.chat(&ask(&json!({"structured_outputs": outputs}))).ok();
        [server.complete(&body).ok()["choices"][0]["text"].as_str().unwrap().to_string(), content(&chat).to_string()]
    };
    text(json!({"json": person()})).iter().for_each(|text| check_person(text));
    assert!(text(json!({"json_object": true})).iter().all(|text| text.starts_with('{')));
    assert!(text(json!({"regex": "[1-9][0-9]{3}"})).iter().all(|text| (1000..10000).contains(&text.parse::<u32>().unwrap())));
    assert!(text(json!({"choice": ["yes", "no", "perhaps"]})).iter().all(|text| ["yes", "no", "perhaps"].contains(&text.as_str())));
    let sums = text(json!({"grammar": "start: x \"+\" x\nx: \"a\" | \"b\""}));
    assert!(sums.iter().all(|text| ["a+a", "a+b", "b+a", "b+b"].contains(&text.as_str())), "{sums:?}");
}

#[test]
fn stop_strings_and_limits_still_end_what_is_constrained() {
    let server = Server::start(&[]);
    let body = |extra: Value| {
        let mut body = json!({"prompt": "I count: ", "max_tokens": 50, "temperature": 0, "structured_outputs": {"regex": "1, 2, 3, 4"}, "logprobs": 1});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.complete(&body).ok()["choices"][0].clone()
    };
    let whole = body(json!({}));
    assert_eq!((&whole["text"], &whole["finish_reason"]), (&json!("1, 2, 3, 4"), &json!("stop")));
    let stopped = body(json!({"stop": ", 3"}));
    assert_eq!((&stopped["text"], &stopped["stop_reason"]), (&json!("1, 2"), &json!(", 3")));
    let cut = body(json!({"max_tokens": 2}));
    assert_eq!((&cut["finish_reason"], cut["logprobs"]["tokens"].as_array().unwrap().len()), (&json!("length"), 2));
    assert_eq!(body(json!({"ignore_eos": true, "min_tokens": 40}))["text"], "1, 2, 3, 4");
}

#[test]
fn what_can_not_be_compiled_is_a_400_before_anything_runs() {
    let server = Server::start(&[]);
    let wrong = [
        (json!({"structured_outputs": {"regex": "("}}), "structured_outputs"),
        (json!({"structured_outputs": {"grammar": "nonsense"}}), "structured_outputs"),
        (json!({"structured_outputs": {"json": {"type": "nonsense"}}}), "structured_outputs"),
        (json!({"structured_outputs": {"json": {"$ref": "#/nowhere"}}}), "structured_outputs"),
        (json!({"structured_outputs": {"json": {"not": {"type": "string"}}}}), "structured_outputs"),
        (json!({"structured_outputs": "regex"}), "structured_outputs"),
        (json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 7}}}}), "response_format"),
        (json!({"response_format": {"type": "yaml"}}), "response_format.type"),
        (json!({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}], "tool_choice": "required"}), "tools"),
    ];
    for (extra, param) in wrong {
        let answer = server.chat(&ask(&extra));
        assert_eq!(answer.status, 400, "{extra}: {}", answer.body);
        let error = &answer.json()["error"];
        assert_eq!(error["param"], param, "{error}");
        assert!(error["message"].as_str().unwrap().len() > param.len() + 20, "{error}");
    }
    assert_eq!(server.metric("vllm:prompt_tokens_total"), 0.0);
}

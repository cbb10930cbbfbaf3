//! Tools and reasoning on `POST /v1/chat/completions`.

use crate::harness::Server;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

fn ask(extra: &Value) -> Value {
    let weather = json!({"type": "object", "properties": {"city": {"enum": ["Bern", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["city", "days"], "additionalProperties": false});
    let tools = json!([
        {"type": "function", "function": {"name": "weather", "description": "Forecast", "parameters": weather}},
        {"type": "function", "function": {"name": "now"}},
    ]);
    let mut body = json!({"messages": [{"role": "user", "content": "How is the weather?"}], "tools": tools, "max_tokens": 300, "temperature": 1, "seed": 5});
    body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    body
}

fn check_call(call: &Value) {
    assert!(call["id"].as_str().unwrap().starts_with("call_"));
    assert_eq!(call["type"], "function");
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    match call["function"]["name"].as_str().unwrap() {
        "weather" => assert!(["Bern", "Oslo"].contains(&arguments["city"].as_str().unwrap()) && (1..=9).contains(&arguments["days"].as_i64().unwrap())),
        "now" => assert_eq!(arguments, json!({})),
        other => panic!("{other}"),
    }
}

/// The message that a stream's deltas add up to, without the ids, and its finish_reason.
fn assembled(chunks: &[Value]) -> (Value, Value) {
    let (mut content, mut calls, mut finish) = (String::new(), Vec::<Value>::new(), Value::Null);
    for choice in chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()) {
        content += choice["delta"]["content"].as_str().unwrap_or_default();
        for call in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().unwrap() as usize;
            if index == calls.len() {
                assert!(call["id"].is_string() && call["type"] == "function" && call["function"]["name"].is_string(), "{call}");
                calls.push(json!({"name": call["function"]["name"], "arguments": call["function"]["arguments"]}));
            } else {
                assert!(call.get("id").is_none() && call["function"].get("name").is_none(), "{call}");
                let arguments = calls[index]["arguments"].as_str().unwrap().to_string() + call["function"]["arguments"].as_str().unwrap();
                calls[index]["arguments"] = json!(arguments);
            }
        }
        finish = choice["finish_reason"].clone();
    }
    (json!({"content": content, "calls": calls}), finish)
}

fn functions(message: &Value) -> Vec<Value> {
    message["tool_calls"].as_array().unwrap().iter().map(|call| call["function"].clone()).collect()
}

#[test]
fn a_required_call_is_made_and_its_arguments_fit_the_schema() {
    let server = Server::start(&[]);
    for seed in 0..4 {
        let body = ask(&json!({"tool_choice": "required", "parallel_tool_calls": false, "seed": seed}));
        let choice = server.chat(&body).ok()["choices"][0].clone();
        assert_eq!((&choice["finish_reason"], &choice["message"]["content"]), (&json!("tool_calls"), &Value::Null));
        assert_eq!(choice["message"]["tool_calls"].as_array().unwrap().len(), 1);
        check_call(&choice["message"]["tool_calls"][0]);
        let (streamed, finish) = assembled(&server.stream("/v1/chat/completions", &body));
        assert_eq!(streamed, json!({"content": "", "calls": functions(&choice["message"])}));
        assert_eq!(finish, "tool_calls");
    }
}

#[test]
fn a_named_function_is_the_one_that_is_called() {
    let server = Server::start(&[]);
    for name in ["weather", "now"] {
        let body = ask(&json!({"tool_choice": {"type": "function", "function": {"name": name}}, "n": 3}));
        for choice in server.chat(&body).ok()["choices"].as_array().unwrap() {
            assert_eq!(choice["message"]["tool_calls"][0]["function"]["name"], name);
            check_call(&choice["message"]["tool_calls"][0]);
            assert_eq!(choice["message"]["tool_calls"].as_array().unwrap().len(), 1);
        }
    }
}

#[test]
fn calls_that_the_model_makes_by_itself_are_found_in_its_text() {
    let server = Server::start(&[]);
    // the text is forced, that it is a call is found out
    let written = |text: &str| ask(&json!({"structured_outputs": {"choice": [text]}, "temperature": 0}));
    let two = "Well.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Bern\", \"days\": 2}}\n</tool_call>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    let bare = "{\"name\": \"weather\", \"parameters\": {\"city\": \"Oslo\", \"days\": 3}}";
    for (text, content, calls) in [(two, json!("Well."), 2), (bare, Value::Null, 1)] {
        let choice = server.chat(&written(text)).ok()["choices"][0].clone();
        assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&content, &json!("tool_calls")));
        let made = functions(&choice["message"]);
        assert_eq!(made.len(), calls);
        choice["message"]["tool_calls"].as_array().unwrap().iter().for_each(check_call);
        let (streamed, finish) = assembled(&server.stream("/v1/chat/completions", &written(text)));
        assert_eq!((streamed, finish), (json!({"content": content.as_str().unwrap_or_default(), "calls": made}), json!("tool_calls")));
    }
    let mut none = written(bare);
    none["tool_choice"] = json!("none");
    let choice = server.chat(&none).ok()["choices"][0].clone();
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!(bare), &json!("stop")));
    let chat = server.chat(&ask(&json!({"max_tokens": 5}))).ok();
    assert!(chat["choices"][0]["message"].get("tool_calls").is_none());
}

#[test]
fn with_tools_and_a_response_format_the_answer_is_a_call_or_in_that_form() {
    let server = Server::start(&[]);
    let schema = json!({"type": "object", "properties": {"answer": {"enum": ["good", "bad"]}}, "required": ["answer"], "additionalProperties": false});
    for seed in 0..4 {
        let format = json!({"type": "json_schema", "json_schema": {"name": "a", "schema": schema}});
        let message = server.chat(&ask(&json!({"response_format": format, "parallel_tool_calls": false, "seed": seed}))).ok()["choices"][0]["message"].clone();
        match message["content"].as_str() {
            Some(content) => assert!(["good", "bad"].contains(&serde_json::from_str::<Value>(content).unwrap()["answer"].as_str().unwrap())),
            None => check_call(&message["tool_calls"][0]),
        }
    }
}

#[test]
fn a_conversation_with_calls_and_their_results_goes_on() {
    let server = Server::start(&[]);
    let mut body = ask(&json!({"max_tokens": 3}));
    body["messages"].as_array_mut().unwrap().extend([
        json!({"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}]}),
        json!({"role": "tool", "tool_call_id": "call_1", "content": "noon"}),
    ]);
    assert_eq!(server.chat(&body).status, 200);
    let tokens = server.post("/tokenize", &body).ok()["tokens"].clone();
    let text = server.post("/detokenize", &json!({"tokens": tokens})).ok()["prompt"].as_str().unwrap().to_string();
    assert!(text.contains("<|im_start|>tool\nnoon<|im_end|>"), "{text}");
}

/// The bundled model with another chat template.
pub fn with_template(directory: &Path, template: &str) -> String {
    let bundled = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models/tiny");
    for entry in std::fs::read_dir(bundled).unwrap().map(Result::unwrap).filter(|entry| entry.file_type().unwrap().is_file()) {
        std::fs::copy(entry.path(), directory.join(entry.file_name())).unwrap();
    }
    let path = directory.join("tokenizer_config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    config["chat_template"] = json!(template);
    // (a copy of a file that can't be written can't be written)
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, config.to_string()).unwrap();
    directory.display().to_string()
}

#[test]
fn a_template_gets_tools_and_decides_how_calls_are_written() {
    let directory = tempfile::tempdir().unwrap();
    let template = "{% if tools %}{% for t in tools %}{{ t.function.name }} as \"parameters\": {{ t.function | tojson }}\n{% endfor %}{% endif %}{% for m in messages %}{% if m.tool_calls %}{{ m.tool_calls[0].function.arguments.city }}{% else %}{{ m.content }}{% endif %}\n{% endfor %}";
    let model = with_template(directory.path(), template);
    let server = Server::start(&["--model", &model]);
    let mut body = ask(&json!({"tool_choice": "required", "return_token_ids": true}));
    body["messages"].as_array_mut().unwrap().push(
        json!({"role": "assistant", "content": null, "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Rome\"}"}}]}),
    );
    let answer = server.chat(&body).ok();
    check_call(&answer["choices"][0]["message"]["tool_calls"][0]);
    let written = server.post("/detokenize", &json!({"tokens": answer["choices"][0]["token_ids"]})).ok()["prompt"].as_str().unwrap().to_string();
    assert!(written.starts_with("{\"name\": ") && written.contains("\"parameters\": {"), "{written}");
    let prompt = server.post("/detokenize", &json!({"tokens": answer["prompt_token_ids"]})).ok()["prompt"].as_str().unwrap().to_string();
    assert!(prompt.starts_with("weather as \"parameters\": {\"name\": \"weather\"") && prompt.ends_with("Rome"), "{prompt}");
}

#[test]
fn what_a_model_thinks_is_no_part_of_its_answer() {
    let directory = tempfile::tempdir().unwrap();
    let opened = "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}";
    let server = Server::start(&["--model", &with_template(directory.path(), opened)]);
    let mut body = json!({"messages": [{"role": "user", "content": "The sea"}], "max_tokens": 12, "temperature": 0, "ignore_eos": true});
    let choice = server.chat(&body).ok()["choices"][0].clone();
    let raw =
        server.complete(&json!({"prompt": "The sea\n<think>\n", "max_tokens": 12, "temperature": 0, "ignore_eos": true, "add_special_tokens": false})).ok();
    let thought = raw["choices"][0]["text"].as_str().unwrap().trim();
    assert_eq!(choice["message"]["reasoning"], thought);
    assert_eq!(choice["message"]["reasoning_content"], thought);
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&Value::Null, &json!("length")));
    let chunks = server.stream("/v1/chat/completions", &body);
    let streamed: String = chunks.iter().filter_map(|c| c["choices"][0]["delta"]["reasoning_content"].as_str()).collect();
    assert_eq!(streamed, thought);
    body["include_reasoning"] = json!(false);
    assert!(server.chat(&body).ok()["choices"][0]["message"].get("reasoning").is_none());
}

//! What goes wrong, and how it is said.

use crate::harness::{Answer, Server, request};
use serde_json::{Value, json};

/// Every error has OpenAI's form.
fn error(answer: &Answer) -> Value {
    let json = answer.json();
    let error = json["error"].as_object().unwrap_or_else(|| panic!("no error object: {}", answer.body));
    for field in ["message", "type", "param", "code"] {
        assert!(error.contains_key(field), "{json}");
    }
    assert!(answer.header("x-request-id").is_some());
    json["error"].clone()
}

fn check(answer: &Answer, status: u16, param: &str) {
    assert_eq!(answer.status, status, "{}", answer.body);
    let error = error(answer);
    assert_eq!(error["param"], param, "{error}");
    assert_eq!(error["type"], "invalid_request_error");
    assert!(error["message"].as_str().unwrap().contains(param), "the message names the field: {error}");
}

#[test]
fn a_wrong_type_is_a_400_that_names_the_field() {
    let server = Server::start(&[]);
    let text = json!("text");
    let (list, object, number, flag) = (json!([]), json!({}), json!(1.5), json!(true));
    let wrong: [(&str, &[&Value]); 34] = [
        ("model", &[&number, &list, &object]),
        ("prompt", &[&number, &object, &list, &flag]),
        ("max_tokens", &[&text, &number, &list, &flag]),
        ("temperature", &[&text, &list, &flag]),
        ("top_p", &[&text, &flag]),
        ("n", &[&text, &number, &list]),
        ("best_of", &[&text, &number]),
        ("stream", &[&text, &number]),
        ("stream_options", &[&text, &list, &flag]),
        ("logprobs", &[&text, &flag, &number]),
        ("echo", &[&text, &number]),
        ("stop", &[&number, &object, &flag]),
        ("presence_penalty", &[&text, &list]),
        ("frequency_penalty", &[&text, &list]),
        ("logit_bias", &[&text, &list, &number]),
        ("seed", &[&text, &number, &list]),
        ("user", &[&number, &list]),
        ("top_k", &[&text, &number]),
        ("min_p", &[&text, &list]),
        ("repetition_penalty", &[&text, &list]),
        ("ignore_eos", &[&text, &number]),
        ("min_tokens", &[&text, &number]),
        ("stop_token_ids", &[&text, &number, &object]),
        ("include_stop_str_in_output", &[&text, &number]),
        ("skip_special_tokens", &[&text, &number]),
        ("add_special_tokens", &[&text, &number]),
        ("truncate_prompt_tokens", &[&text, &number, &list]),
        ("allowed_token_ids", &[&text, &number, &object]),
        ("prompt_logprobs", &[&text, &flag]),
        ("return_token_ids", &[&text, &number]),
        ("return_tokens_as_token_ids", &[&text, &number]),
        ("response_format", &[&text, &list]),
        ("suffix", &[&text]),
        ("use_beam_search", &[&flag]),
    ];
    for (field, values) in wrong {
        for value in values {
            let mut body = json!({"prompt": "a", "max_tokens": 1});
            body[field] = (*value).clone();
            check(&server.complete(&body), 400, field);
        }
    }
}

#[test]
fn a_chat_with_a_wrong_type_is_a_400_that_names_the_field() {
    let server = Server::start(&[]);
    for (field, value) in [
        ("messages", json!("hi")),
        ("messages", json!([])),
        ("max_completion_tokens", json!("many")),
        ("max_tokens", json!(0)),
        ("logprobs", json!(5)),
        ("top_logprobs", json!("x")),
        ("top_logprobs", json!(3)),
        ("tools", json!("x")),
        ("tool_choice", json!(5)),
        ("tool_choice", json!("required")),
        ("tool_choice", json!({"type": "function", "function": {"name": "f"}})),
        ("response_format", json!("json_object")),
        ("structured_outputs", json!({"regex": "a", "choice": ["b"]})),
        ("parallel_tool_calls", json!("yes")),
        ("chat_template_kwargs", json!([])),
        ("chat_template", json!("{{ messages }}")),
        ("add_generation_prompt", json!("x")),
        ("continue_final_message", json!("x")),
        ("documents", json!("x")),
        ("echo", json!(true)),
    ] {
        let mut body = json!({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1});
        body[field] = value;
        check(&server.chat(&body), 400, field);
    }
    check(&server.chat(&json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]})), 400, "messages[0].content[0].type");
}

#[test]
fn a_number_out_of_range_is_a_400_that_names_the_field() {
    let server = Server::start(&[]);
    for (field, value) in [
        ("temperature", json!(-1)),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("min_p", json!(2)),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!(-3)),
        ("repetition_penalty", json!(0)),
        ("n", json!(0)),
        ("n", json!(1000)),
        ("logprobs", json!(100)),
        ("max_tokens", json!(-1)),
        ("top_k", json!(-5)),
        ("min_tokens", json!(5)),
        ("logit_bias", json!({"5": 1000})),
        ("logit_bias", json!({"999999": 1})),
        ("stop_token_ids", json!([999_999])),
        ("allowed_token_ids", json!([])),
        ("prompt", json!([999_999])),
        ("truncate_prompt_tokens", json!(0)),
    ] {
        let mut body = json!({"prompt": "a", "max_tokens": 1});
        body[field] = value;
        check(&server.complete(&body), 400, field);
    }
    check(&server.complete(&json!({"max_tokens": 1})), 400, "prompt");
    check(&server.complete(&json!({"prompt": "a", "stream_options": {"include_usage": true}})), 400, "stream_options");
    let nested = json!({"prompt": "a", "stream": true, "stream_options": {"include_usage": "yes"}});
    check(&server.complete(&nested), 400, "stream_options.include_usage");
}

#[test]
fn unknown_fields_are_ignored_and_logged_once() {
    let server = Server::start(&[]);
    let answer = server.complete(&json!({"prompt": "a", "max_tokens": 1, "store": true, "mystery": {"a": [1]}, "metadata": null}));
    assert_eq!(answer.status, 200, "{}", answer.body);
    let log = server.log();
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("mystery")).collect();
    assert_eq!(lines.len(), 1, "{log}");
    assert!(lines[0].contains("store") && !lines[0].contains("metadata"));
    assert!(lines[0].contains(answer.header("x-request-id").unwrap()), "the log line has the request's id");
}

#[test]
fn a_model_that_is_not_there_is_a_404() {
    let server = Server::start(&["--served-model-name", "first,second"]);
    for path in ["/v1/completions", "/v1/chat/completions"] {
        let answer = server.post(path, &json!({"model": "third", "prompt": "a", "messages": [{"role": "user", "content": "a"}]}));
        assert_eq!((answer.status, error(&answer)["code"].clone()), (404, json!("model_not_found")));
    }
    assert_eq!(server.get("/v1/models/third").status, 404);
    for name in ["first", "second"] {
        assert_eq!(server.complete(&json!({"model": name, "prompt": "a", "max_tokens": 1})).ok()["model"], name);
        assert_eq!(server.get(&format!("/v1/models/{name}")).ok()["id"], name);
    }
    let ids: Vec<Value> = server.get("/v1/models").ok()["data"].as_array().unwrap().iter().map(|m| m["id"].clone()).collect();
    assert_eq!(ids, ["first", "second"]);
}

#[test]
fn paths_and_methods_that_are_not_there_say_so() {
    let server = Server::start(&[]);
    let missing = server.get("/v1/nothing");
    assert_eq!(missing.status, 404);
    error(&missing);
    let method = server.get("/v1/completions");
    assert_eq!(method.status, 405);
    assert_eq!(method.header("allow"), Some("POST"));
    error(&method);
}

#[test]
fn the_admin_api_is_not_on_the_public_port() {
    let server = Server::start(&[]);
    for path in ["/admin/v1/jobs", "/admin/v1/models", "/admin/v1/engine", "/admin"] {
        assert_eq!(server.get(path).status, 404);
    }
    assert_eq!(server.post("/admin/v1/prune", &json!({})).status, 404);
    assert_eq!(server.admin("POST", "/v1/completions", Some(&json!({"prompt": "a"}))).status, 404);
}

#[test]
fn a_body_that_is_no_json_object_is_a_400() {
    let server = Server::start(&[]);
    let post = |body: &str| request(&server.public, "POST", "/v1/completions", &[], Some(body));
    for body in ["{", "not json", "[1]", "\"text\"", "{\"prompt\": \"a\",}", "{\"prompt\": \"\\ud800\"}"] {
        let answer = post(body);
        assert_eq!(answer.status, 400, "{body}: {}", answer.body);
        error(&answer);
    }
    check(&post(""), 400, "prompt");
    assert_eq!(post("{\"prompt\": \"a\", \"max_tokens\": 1}").status, 200, "a missing content type is tolerated");
}

#[test]
fn a_body_that_is_too_large_is_a_413() {
    let server = Server::start(&["--max-body-size", "10KB"]);
    let answer = server.complete(&json!({"prompt": "a".repeat(20_000)}));
    assert_eq!(answer.status, 413, "{}", answer.body);
    error(&answer);
    assert_eq!(server.complete(&json!({"prompt": "a", "max_tokens": 1})).status, 200);
}

#[test]
fn a_prompt_beyond_the_context_is_refused_before_anything_runs() {
    let server = Server::start(&["--max-model-len", "32"]);
    let check = |answer: Answer, field: &str| {
        assert_eq!(answer.status, 400);
        let error = error(&answer);
        assert_eq!((error["code"].as_str(), error["param"].as_str()), (Some("context_length_exceeded"), Some(field)));
        assert!(error["message"].as_str().unwrap().contains("maximum context length is 32 tokens"));
    };
    check(server.complete(&json!({"prompt": "word ".repeat(100)})), "prompt");
    check(server.complete(&json!({"prompt": "word", "max_tokens": 33})), "prompt");
    check(server.complete(&json!({"prompt": ["word", "word ".repeat(100)]})), "prompt");
    check(server.chat(&json!({"messages": [{"role": "user", "content": "word ".repeat(100)}]})), "messages");
    check(server.complete(&json!({"prompt": "word", "stream": true, "max_tokens": 99})), "prompt");
    assert_eq!(server.complete(&json!({"prompt": "word ".repeat(20)})).ok()["choices"][0]["finish_reason"], "length");
    assert_eq!(server.metric("evop_kv_bytes_used"), 0.0);
}

#[test]
fn more_prompts_than_can_ever_wait_are_refused_for_good() {
    let server = Server::start(&["--max-concurrent", "2", "--max-queue", "3"]);
    let ask = |n: usize| server.complete(&json!({"prompt": vec!["a"; n], "max_tokens": 1}));
    check(&ask(6), 400, "prompt");
    assert_eq!(ask(5).ok()["choices"].as_array().unwrap().len(), 5);
}

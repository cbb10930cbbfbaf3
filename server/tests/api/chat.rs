//! `POST /v1/chat/completions`.

use crate::harness::{Server, joined};
use serde_json::{Value, json};

fn hello() -> Value {
    json!({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello there"}], "max_tokens": 12, "temperature": 0})
}

#[test]
fn an_answer_comes_from_the_checkpoints_template() {
    let server = Server::start(&[]);
    let answer = server.chat(&hello()).ok();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
    let text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n";
    let same = server.complete(&json!({"prompt": text, "max_tokens": 12, "temperature": 0, "add_special_tokens": false})).ok();
    assert_eq!(answer["choices"][0]["message"]["content"], same["choices"][0]["text"]);
    assert_eq!(answer["usage"], same["usage"]);
}

#[test]
fn a_stream_has_the_role_first_and_the_reason_last() {
    let server = Server::start(&[]);
    for extra in [json!({}), json!({"n": 2, "temperature": 1, "seed": 4}), json!({"logprobs": true, "top_logprobs": 2})] {
        let mut body = hello();
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let whole = server.chat(&body).ok();
        body["stream_options"] = json!({"include_usage": true});
        let chunks = server.stream("/v1/chat/completions", &body);
        assert!(chunks.iter().all(|c| c["object"] == "chat.completion.chunk"));
        for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
            let parts: Vec<&Value> = chunks.iter().flat_map(|c| c["choices"].as_array().unwrap()).filter(|c| c["index"] == index).collect();
            assert_eq!(parts[0]["delta"]["role"], "assistant");
            assert!(parts[1..].iter().all(|p| p["delta"].get("role").is_none()));
            let (last, before) = parts.split_last().unwrap();
            assert_eq!(last["delta"], json!({}));
            assert_eq!(last["finish_reason"], choice["finish_reason"]);
            assert!(before.iter().all(|p| p["finish_reason"].is_null()));
            assert_eq!(choice["message"]["content"], joined(&chunks, index));
            let streamed: Vec<Value> = parts.iter().filter_map(|p| p["logprobs"]["content"].as_array()).flatten().cloned().collect();
            assert_eq!(streamed, choice["logprobs"]["content"].as_array().cloned().unwrap_or_default());
        }
        assert_eq!(chunks.last().unwrap()["usage"], whole["usage"]);
    }
}

#[test]
fn logprobs_have_tokens_bytes_and_alternatives() {
    let server = Server::start(&[]);
    let mut body = hello();
    body.as_object_mut().unwrap().extend(json!({"logprobs": true, "top_logprobs": 3}).as_object().unwrap().clone());
    let answer = server.chat(&body).ok();
    let content = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert_eq!(content.len(), answer["usage"]["completion_tokens"].as_u64().unwrap() as usize);
    for token in content {
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 3);
        assert_eq!(token["top_logprobs"][0]["logprob"], token["logprob"], "greedy takes the best");
        let bytes: Vec<u8> = token["bytes"].as_array().unwrap().iter().map(|b| b.as_u64().unwrap() as u8).collect();
        assert_eq!(String::from_utf8(bytes).unwrap(), token["token"].as_str().unwrap());
    }
}

#[test]
fn without_max_tokens_an_answer_may_fill_the_context() {
    let server = Server::start(&["--max-model-len", "64"]);
    let answer = server.chat(&json!({"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "ignore_eos": true})).ok();
    assert_eq!(answer["usage"]["total_tokens"], 64);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let newer = server.chat(&json!({"messages": [{"role": "user", "content": "Hello"}], "max_completion_tokens": 3, "ignore_eos": true})).ok();
    assert_eq!(newer["usage"]["completion_tokens"], 3);
}

#[test]
fn a_final_message_can_be_continued() {
    let server = Server::start(&[]);
    let messages = json!([{"role": "user", "content": "Tell me"}, {"role": "assistant", "content": "Once upon"}]);
    let answer = server.post("/tokenize", &json!({"messages": messages, "continue_final_message": true, "add_generation_prompt": false})).ok();
    let text = server.post("/detokenize", &json!({"tokens": answer["tokens"]})).ok();
    assert_eq!(text["prompt"], "<|im_start|>user\nTell me<|im_end|>\n<|im_start|>assistant\nOnce upon");
    assert_eq!(server.chat(&json!({"messages": messages, "continue_final_message": true, "max_tokens": 3})).status, 200);
}

#[test]
fn content_may_come_in_parts() {
    let server = Server::start(&[]);
    let ask =
        |content: Value| server.chat(&json!({"messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0})).ok()["choices"].clone();
    assert_eq!(ask(json!("Hello")), ask(json!([{"type": "text", "text": "Hello"}])));
}

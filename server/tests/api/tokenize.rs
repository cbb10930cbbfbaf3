//! `POST /tokenize` and `/detokenize`.

use crate::harness::Server;
use serde_json::json;

#[test]
fn both_forms_are_answered_in_kind() {
    let server = Server::start(&[]);
    let vllm = server.post("/tokenize", &json!({"prompt": "Once upon a time", "return_token_strs": true})).ok();
    let llama = server.post("/tokenize", &json!({"content": "Once upon a time", "with_pieces": true})).ok();
    assert_eq!(vllm["count"], vllm["tokens"].as_array().unwrap().len());
    assert_eq!(vllm["max_model_len"], 1024);
    let strings: String = vllm["token_strs"].as_array().unwrap().iter().map(|s| s.as_str().unwrap()).collect();
    assert_eq!(strings, "Once upon a time");
    assert_eq!(llama["tokens"][0]["id"], vllm["tokens"][0]);
    let pieces: String = llama["tokens"].as_array().unwrap().iter().map(|t| t["piece"].as_str().unwrap()).collect();
    assert_eq!(pieces, "Once upon a time");
    assert_eq!(server.post("/tokenize", &json!({"content": "Once upon a time"})).ok()["tokens"], vllm["tokens"]);
}

#[test]
fn text_comes_back_from_its_tokens() {
    let server = Server::start(&[]);
    let text = "Déjà vu — \u{1F600} \"quoted\"\n";
    let tokens = server.post("/tokenize", &json!({"prompt": text})).ok()["tokens"].clone();
    let back = server.post("/detokenize", &json!({"tokens": tokens})).ok();
    assert_eq!((back["prompt"].as_str(), back["content"].as_str()), (Some(text), Some(text)));
}

#[test]
fn a_piece_that_is_no_character_is_its_bytes() {
    let server = Server::start(&[]);
    let answer = server.post("/tokenize", &json!({"content": "\u{1F600}", "with_pieces": true})).ok();
    let bytes: Vec<u8> = answer["tokens"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|t| t["piece"].as_array().cloned().unwrap_or_default())
        .map(|b| b.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(bytes, "\u{1F600}".as_bytes());
}

#[test]
fn what_is_wrong_is_named() {
    let server = Server::start(&[]);
    let param = |path: &str, body| {
        let answer = server.post(path, &body);
        assert_eq!(answer.status, 400, "{}", answer.body);
        answer.json()["error"]["param"].as_str().unwrap().to_string()
    };
    assert_eq!(param("/tokenize", json!({})), "prompt");
    assert_eq!(param("/tokenize", json!({"prompt": 5})), "prompt");
    assert_eq!(param("/tokenize", json!({"content": ["a"]})), "content");
    assert_eq!(param("/tokenize", json!({"messages": "hi"})), "messages");
    assert_eq!(param("/tokenize", json!({"prompt": "a", "add_special_tokens": 1})), "add_special_tokens");
    assert_eq!(param("/detokenize", json!({})), "tokens");
    assert_eq!(param("/detokenize", json!({"tokens": "a"})), "tokens");
    assert_eq!(param("/detokenize", json!({"tokens": [99_999_999]})), "tokens");
}

//! `GET /openapi.json` and `GET /docs`.

use crate::harness::{Server, request};
use serde_json::Value;
use std::process::{Command, Stdio};

/// Every `$ref` in a document.
fn references(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            found.extend(object.get("$ref").and_then(Value::as_str).map(str::to_string));
            object.values().for_each(|value| references(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| references(value, found)),
        _ => {}
    }
}

#[test]
fn the_document_describes_every_public_endpoint_and_every_type_it_names() {
    let server = Server::start(&[]);
    let document = server.get("/openapi.json").ok();
    assert!(document["openapi"].as_str().unwrap().starts_with("3."));
    let mut paths: Vec<&str> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
    paths.sort_unstable();
    let expected = [
        "/detokenize",
        "/health",
        "/live",
        "/metrics",
        "/ready",
        "/tokenize",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/models/{id}",
        "/v1/responses",
        "/version",
    ];
    assert_eq!(paths, expected);
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(found.len() > 50);
    for target in found {
        assert!(document.pointer(target.trim_start_matches('#')).is_some(), "{target} is not there");
    }
    let operations: Vec<&Value> = document["paths"].as_object().unwrap().values().flat_map(|item| item.as_object().unwrap().values()).collect();
    let mut ids: Vec<&str> = operations.iter().map(|operation| operation["operationId"].as_str().unwrap()).collect();
    let all = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), all, "operations have names of their own");
}

#[test]
fn the_examples_of_the_document_are_answered() {
    let server = Server::start(&[]);
    let document = server.get("/openapi.json").ok();
    let mut asked = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        let Some(body) = item["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].as_str() else { continue };
        let example = &document.pointer(body.trim_start_matches('#')).unwrap()["example"];
        assert!(example.is_object(), "{path} has no example");
        let answer = server.post(path, example);
        assert_eq!(answer.status, 200, "{path}: {}", answer.body);
        asked += 1;
    }
    assert_eq!(asked, 7);
}

#[test]
fn a_stream_is_described_as_it_is_with_names_or_with_a_last_word() {
    let server = Server::start(&[]);
    let document = server.get("/openapi.json").ok();
    let mut asked = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        let events = &item["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"];
        if events.is_null() {
            continue;
        }
        let body = item["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"].as_str().unwrap();
        let mut body = document.pointer(body.trim_start_matches('#')).unwrap()["example"].clone();
        body["stream"] = true.into();
        let answer = server.post(path, &body).body;
        let names = answer.lines().any(|line| line.starts_with("event: "));
        assert_eq!(events["properties"]["event"].is_object(), names, "{path}: {answer}");
        let word = events["properties"]["data"]["anyOf"][0]["enum"][0].as_str();
        assert_eq!(word, answer.trim_end().ends_with("\ndata: [DONE]").then_some("[DONE]"), "{path}: {answer}");
        asked += 1;
    }
    assert_eq!(asked, 4);
}

#[test]
fn the_page_needs_nothing_from_elsewhere_and_its_lines_can_be_run() {
    let server = Server::start(&[]);
    let answer = request(&server.public, "GET", "/docs", &[], None);
    assert_eq!((answer.status, answer.header("content-type")), (200, Some("text/html; charset=utf-8")));
    let page = answer.body;
    for foreign in ["<script", "src=", "<link", "@import", "https:"] {
        assert!(!page.contains(foreign), "{foreign}");
    }
    let unescaped = page.replace("&#x2f;", "/").replace("&#x27;", "'").replace("&quot;", "\"").replace("&amp;", "&");
    let lines: Vec<&str> = unescaped.split("<pre>").skip(1).map(|rest| rest.split("</pre>").next().unwrap()).collect();
    assert_eq!(lines.len(), 14);
    // (the example of a model's name is not one)
    for line in lines.into_iter().filter(|line| !line.contains("{id}")) {
        let output = Command::new("sh").args(["-c", &format!("{line} -f -o /dev/null")]).stdin(Stdio::null()).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn the_document_and_the_page_need_no_key() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_on(data.path(), &[], &[("EVOP_API_KEYS", "secret")]);
    assert_eq!((server.get("/openapi.json").status, server.get("/docs").status), (200, 200));
    assert_eq!(server.get("/v1/models").status, 401);
}

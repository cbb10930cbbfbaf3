//! Requests and tokens a minute for each key.

use crate::harness::{Answer, Server, request};
use serde_json::json;

fn complete(server: &Server, key: &str, max_tokens: usize) -> Answer {
    let body = json!({"prompt": "Once", "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true}).to_string();
    request(&server.public, "POST", "/v1/completions", &[("authorization", &format!("Bearer {key}"))], Some(&body))
}

fn number(answer: &Answer, header: &str) -> u64 {
    answer.header(header).unwrap_or_else(|| panic!("no {header}: {:?}", answer.headers)).parse().unwrap()
}

#[test]
fn a_key_that_asked_too_often_is_told_when_to_come_back_and_others_are_not_concerned() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_on(data.path(), &["--rate-limit", "3", "--token-rate-limit", "100"], &[("EVOP_API_KEYS", "a,b")]);
    for left in [2, 1, 0] {
        let answer = complete(&server, "a", 5);
        assert_eq!((answer.status, number(&answer, "x-ratelimit-limit-requests"), number(&answer, "x-ratelimit-remaining-requests")), (200, 3, left));
        assert!(answer.header("x-ratelimit-reset-requests").unwrap().ends_with('s'));
    }
    let refused = complete(&server, "a", 5);
    assert_eq!((refused.status, refused.json()["error"]["type"].clone()), (429, json!("rate_limit_error")));
    assert!((1..=21).contains(&number(&refused, "retry-after")), "{:?}", refused.headers);
    assert!(refused.json()["error"]["message"].as_str().unwrap().contains("3 requests a minute"));
    assert_eq!(server.metric("vllm:admission_rejections_total{engine=\"0\",model_name=\"evop-tiny\",reason=\"rate_limit\"}"), 1.0);
    let models = request(&server.public, "GET", "/v1/models", &[("authorization", "Bearer a")], None);
    assert_eq!((models.status, models.header("x-ratelimit-limit-requests")), (200, None), "reading is not limited");
    assert_eq!(complete(&server, "b", 5).status, 200);
}

#[test]
fn tokens_of_prompt_and_answer_count() {
    let server = Server::start(&["--token-rate-limit", "100"]);
    let first = complete(&server, "", 40);
    // the prompt is counted at once, the answer when it has ended: before the answer is sent
    let left = number(&first, "x-ratelimit-remaining-tokens");
    assert!((50..60).contains(&left), "{left}");
    assert_eq!(complete(&server, "", 160).status, 200, "there was something left");
    let refused = complete(&server, "", 1);
    assert_eq!((refused.status, number(&refused, "x-ratelimit-remaining-tokens")), (429, 0));
    assert!(number(&refused, "retry-after") > 30, "a debt has to be waited out: {:?}", refused.headers);
}

#[test]
fn without_limits_nothing_is_said_about_them() {
    let server = Server::start(&[]);
    assert!(complete(&server, "", 1).headers.iter().all(|(name, _)| !name.starts_with("x-ratelimit")));
}

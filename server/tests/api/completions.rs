//! `POST /v1/completions`.

use crate::harness::{Server, joined};
use serde_json::{Value, json};

fn tokens(server: &Server, text: &str) -> Vec<u64> {
    let answer = server.post("/tokenize", &json!({"prompt": text})).ok();
    answer["tokens"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect()
}

#[test]
fn a_greedy_completion_is_always_the_same_and_counts_its_tokens() {
    let server = Server::start(&[]);
    let body = json!({"model": "evop-tiny", "prompt": "Once upon a time", "max_tokens": 12, "temperature": 0});
    let first = server.complete(&body).ok();
    let second = server.complete(&body).ok();
    assert_eq!(first["choices"], second["choices"]);
    assert_ne!(first["id"], second["id"]);
    assert_eq!(first["object"], "text_completion");
    assert_eq!(first["model"], "evop-tiny");
    assert!(first["system_fingerprint"].as_str().unwrap().starts_with("fp_"));
    assert_eq!(first["choices"][0]["finish_reason"], "length");
    let prompt = tokens(&server, "Once upon a time").len();
    let usage = json!({"prompt_tokens": prompt, "completion_tokens": 12, "total_tokens": prompt + 12, "prompt_tokens_details": {"cached_tokens": 0}});
    assert_eq!(first["usage"], usage);
}

#[test]
fn what_an_earlier_prompt_had_too_is_not_read_again_and_counted() {
    let server = Server::start(&[]);
    let shared = "The captain looked at the map for a long time and then told them that they would sail north at dawn, whatever the weather. ".repeat(6);
    let ask = |end: &str, stream: bool| {
        let mut body = json!({"prompt": format!("{shared}{end}"), "max_tokens": 8, "temperature": 0, "ignore_eos": true, "stream": stream});
        if stream {
            body["stream_options"] = json!({"include_usage": true});
            return server.stream("/v1/completions", &body).last().unwrap()["usage"].clone();
        }
        server.complete(&body).ok()["usage"].clone()
    };
    let cached = |usage: &Value| usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    let first = ask("He", false);
    assert_eq!(cached(&first), 0);
    for (end, stream) in [("She", false), ("They all", true)] {
        let again = ask(end, stream);
        let (prompt, cached) = (again["prompt_tokens"].as_u64().unwrap(), cached(&again));
        assert!(cached.is_multiple_of(32) && cached + 40 > prompt && cached < prompt, "{again}");
    }
    assert!(server.metric("vllm:prefix_cache_hits_total") > 0.0);
}

#[test]
fn a_bad_word_does_not_come_and_the_rest_stays_as_it_was_up_to_there() {
    let server = Server::start(&[]);
    let complete = |bad_words: Value| {
        let body = json!({"prompt": "It was a dark night, and", "max_tokens": 40, "temperature": 0, "bad_words": bad_words});
        server.complete(&body).ok()["choices"][0]["text"].as_str().unwrap().to_string()
    };
    let free = complete(json!([]));
    let word = free.split_whitespace().nth(3).unwrap();
    let without = complete(json!([word]));
    assert!(!without.split_whitespace().any(|w| w == word), "{word:?} in {without:?}");
    let before = free.find(&format!(" {word}")).unwrap();
    assert_eq!(without[..before], free[..before]);
}

#[test]
fn prompts_are_shared_only_under_one_salt() {
    let server = Server::start(&[]);
    let prompt = "The captain looked at the map for a long time and then told them that they would sail north at dawn. ".repeat(6);
    let cached = |salt: Value| {
        let body = json!({"prompt": prompt, "max_tokens": 2, "cache_salt": salt, "priority": -1});
        server.complete(&body).ok()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    let found = [json!("a"), json!("b"), json!(null), json!("a"), json!(null)].map(cached);
    assert_eq!(found.map(|tokens| tokens > 64), [false, false, false, true, true], "{found:?}");
}

#[test]
fn a_stream_says_the_same_as_the_whole_answer() {
    let server = Server::start(&[]);
    for extra in [
        json!({}),
        json!({"n": 3, "seed": 7, "temperature": 1.0}),
        json!({"stop": [" not", "man"]}),
        json!({"echo": true, "logprobs": 2}),
        json!({"prompt": ["One day", "The sea", "A letter"], "n": 2, "seed": 3, "temperature": 0.9, "logprobs": 1}),
        json!({"return_token_ids": true}),
    ] {
        let mut body = json!({"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let whole = server.complete(&body).ok();
        body["stream_options"] = json!({"include_usage": true});
        let chunks = server.stream("/v1/completions", &body);
        for (index, choice) in whole["choices"].as_array().unwrap().iter().enumerate() {
            assert_eq!(choice["index"], index);
            assert_eq!(choice["text"], joined(&chunks, index), "{extra}");
            let parts: Vec<&Value> = chunks.iter().flat_map(|c| c["choices"].as_array().unwrap()).filter(|c| c["index"] == index).collect();
            let (last, before) = parts.split_last().unwrap();
            assert_eq!(last["finish_reason"], choice["finish_reason"], "{extra}");
            assert_eq!(last["stop_reason"], choice["stop_reason"], "{extra}");
            assert!(before.iter().all(|c| c["finish_reason"].is_null()));
            for list in ["tokens", "token_logprobs", "text_offset", "top_logprobs"] {
                let streamed: Vec<Value> = parts.iter().filter_map(|c| c["logprobs"][list].as_array()).flatten().cloned().collect();
                let expected = choice["logprobs"][list].as_array().cloned().unwrap_or_default();
                assert_eq!(streamed, expected, "{extra} {list}");
            }
            let ids: Vec<Value> = parts.iter().filter_map(|c| c["token_ids"].as_array()).flatten().cloned().collect();
            assert_eq!(ids, choice["token_ids"].as_array().cloned().unwrap_or_default());
        }
        let last = chunks.last().unwrap();
        assert_eq!(last["choices"], json!([]));
        assert_eq!(last["usage"], whole["usage"], "{extra}");
        assert!(chunks[..chunks.len() - 1].iter().all(|c| c["usage"].is_null() && c.get("usage").is_some()));
        assert!(chunks.iter().all(|c| c["id"] == chunks[0]["id"] && c["object"] == "text_completion"));
    }
}

#[test]
fn a_stream_has_no_usage_unless_it_is_asked_for() {
    let server = Server::start(&[]);
    let chunks = server.stream("/v1/completions", &json!({"prompt": "a", "max_tokens": 3}));
    assert!(chunks.iter().all(|c| c.get("usage").is_none()));
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let chunks = server.stream("/v1/completions", &json!({"prompt": "a", "max_tokens": 3, "temperature": 0, "ignore_eos": true, "stream_options": options}));
    let counts: Vec<u64> = chunks.iter().map(|c| c["usage"]["completion_tokens"].as_u64().unwrap()).collect();
    assert!(counts.is_sorted() && counts.last() == Some(&3), "{counts:?}");
}

#[test]
fn a_prompt_may_be_text_or_tokens_one_or_many() {
    let server = Server::start(&[]);
    let (one, two) = ("Once upon a time", "The old man");
    let ids = [tokens(&server, one), tokens(&server, two)];
    let ask = |prompt: Value| {
        let answer = server.complete(&json!({"prompt": prompt, "max_tokens": 8, "temperature": 0})).ok();
        answer["choices"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap().to_string()).collect::<Vec<_>>()
    };
    let alone = [ask(json!(one)).remove(0), ask(json!(two)).remove(0)];
    assert_eq!(ask(json!(ids[0])), alone[..1]);
    assert_eq!(ask(json!([one, two])), alone);
    assert_eq!(ask(json!(ids)), alone);
    assert_eq!(ask(json!([one, ids[1]])), alone);
}

#[test]
fn every_prompt_has_its_choices_in_order() {
    let server = Server::start(&[]);
    let answer = server.complete(&json!({"prompt": ["a", "b"], "n": 3, "max_tokens": 4, "temperature": 1, "seed": 1, "ignore_eos": true})).ok();
    let indexes: Vec<u64> = answer["choices"].as_array().unwrap().iter().map(|c| c["index"].as_u64().unwrap()).collect();
    assert_eq!(indexes, [0, 1, 2, 3, 4, 5]);
    assert_eq!(answer["usage"]["completion_tokens"], 24);
    assert_eq!(answer["usage"]["prompt_tokens"], tokens(&server, "a").len() + tokens(&server, "b").len());
}

#[test]
fn a_seed_makes_sampling_repeatable_and_another_changes_it() {
    let server = Server::start(&[]);
    let ask = |seed: i64| server.complete(&json!({"prompt": "The", "max_tokens": 20, "temperature": 1.5, "seed": seed})).ok()["choices"][0]["text"].clone();
    assert_eq!(ask(5), ask(5));
    assert_ne!(ask(5), ask(6));
    assert_eq!(ask(-1), ask(-1));
}

#[test]
fn a_stop_string_ends_the_text_and_does_not_show() {
    let server = Server::start(&[]);
    let full = server.greedy("Once upon a time", 30);
    // the middle of the text, in the middle of a word
    let stop = &full[full.len() / 2..full.len() / 2 + 4];
    let (before, _) = full.split_once(stop).unwrap();
    let body = |extra: Value| {
        let mut body = json!({"prompt": "Once upon a time", "max_tokens": 30, "temperature": 0, "stop": ["never in there", stop]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        body
    };
    let answer = server.complete(&body(json!({}))).ok();
    assert_eq!(answer["choices"][0]["text"], before);
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["choices"][0]["stop_reason"], stop);
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() < 30);
    let included = server.complete(&body(json!({"include_stop_str_in_output": true}))).ok();
    assert_eq!(included["choices"][0]["text"], format!("{before}{stop}"));
    let chunks = server.stream("/v1/completions", &body(json!({})));
    for length in 1..chunks.len() {
        assert!(before.starts_with(&joined(&chunks[..length], 0)), "part of a stop string was shown");
    }
}

#[test]
fn a_stop_token_ends_the_choice_and_is_named() {
    let server = Server::start(&[]);
    let full = server.complete(&json!({"prompt": "Once upon a time", "max_tokens": 10, "temperature": 0, "return_token_ids": true})).ok();
    let third = full["choices"][0]["token_ids"][2].clone();
    let answer = server.complete(&json!({"prompt": "Once upon a time", "max_tokens": 10, "temperature": 0, "stop_token_ids": [third]})).ok();
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["choices"][0]["stop_reason"], third);
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() <= 3);
}

#[test]
fn an_echo_with_logprobs_scores_the_prompt() {
    let server = Server::start(&[]);
    let ids = tokens(&server, "Once upon a time");
    // what lm-evaluation-harness asks
    let scored = server.complete(&json!({"prompt": ids, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": true, "seed": 1234})).ok();
    let logprobs = &scored["choices"][0]["logprobs"];
    let list = |name: &str| logprobs[name].as_array().unwrap().clone();
    assert_eq!(list("tokens").len(), ids.len() + 1);
    assert!(list("token_logprobs")[0].is_null() && list("top_logprobs")[0].is_null());
    assert!(list("token_logprobs")[1..].iter().all(|l| l.as_f64().unwrap() < 0.0));
    let text = scored["choices"][0]["text"].as_str().unwrap();
    assert!(text.starts_with("Once upon a time"));
    for (token, offset) in list("tokens").iter().zip(list("text_offset")) {
        assert!(text[offset.as_u64().unwrap() as usize..].starts_with(token.as_str().unwrap()));
    }
    // the greedy token is the best of its alternatives, to the last digit
    let best = list("top_logprobs").last().unwrap().as_object().unwrap().values().map(|v| v.as_f64().unwrap()).fold(f64::MIN, f64::max);
    assert_eq!(list("token_logprobs").last().unwrap().as_f64().unwrap(), best);

    let only = server.complete(&json!({"prompt": ids, "max_tokens": 0, "logprobs": 1, "echo": true})).ok();
    assert_eq!(only["choices"][0]["text"], "Once upon a time");
    assert_eq!(only["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap()[1..], list("token_logprobs")[1..ids.len()]);
    assert_eq!(only["usage"]["completion_tokens"], 0);
}

#[test]
fn scoring_what_was_generated_gives_what_generating_said() {
    let server = Server::start(&[]);
    let made = server.complete(&json!({"prompt": "Once upon a time", "max_tokens": 6, "temperature": 0, "logprobs": 0, "return_token_ids": true})).ok();
    let choice = &made["choices"][0];
    let all: Vec<Value> = choice["prompt_token_ids"].as_array().unwrap().iter().chain(choice["token_ids"].as_array().unwrap()).cloned().collect();
    let scored = server.complete(&json!({"prompt": all, "max_tokens": 0, "logprobs": 0, "echo": true})).ok();
    let numbers = |v: &Value| v.as_array().unwrap().iter().filter_map(Value::as_f64).collect::<Vec<_>>();
    let (scored, made) = (numbers(&scored["choices"][0]["logprobs"]["token_logprobs"]), numbers(&choice["logprobs"]["token_logprobs"]));
    for (a, b) in scored[scored.len() - made.len()..].iter().zip(&made) {
        assert!((a - b).abs() < 1e-3, "{a} {b}");
    }
}

#[test]
fn vllms_prompt_logprobs_and_token_names_are_there() {
    let server = Server::start(&[]);
    let answer = server
        .complete(&json!({"prompt": "Once upon", "max_tokens": 2, "temperature": 0, "prompt_logprobs": 2, "logprobs": 1, "return_tokens_as_token_ids": true}))
        .ok();
    let choice = &answer["choices"][0];
    let prompt = choice["prompt_logprobs"].as_array().unwrap();
    assert!(prompt[0].is_null());
    assert_eq!(prompt.len(), tokens(&server, "Once upon").len());
    for place in &prompt[1..] {
        let ranks: Vec<u64> = place.as_object().unwrap().values().map(|t| t["rank"].as_u64().unwrap()).collect();
        assert!(ranks.contains(&1) && (2..=3).contains(&ranks.len()), "{place}");
    }
    assert!(choice["logprobs"]["tokens"][0].as_str().unwrap().starts_with("token_id:"));
}

#[test]
fn the_best_of_several_is_the_most_probable() {
    let server = Server::start(&[]);
    let body = json!({"prompt": "The", "max_tokens": 8, "temperature": 1.2, "seed": 11, "logprobs": 0, "ignore_eos": true});
    let with = |extra: Value| {
        let mut body = body.clone();
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.complete(&body).ok()
    };
    let mean = |choice: &Value| choice["logprobs"]["token_logprobs"].as_array().unwrap().iter().map(|l| l.as_f64().unwrap()).sum::<f64>() / 8.0;
    let all = with(json!({"n": 4}));
    let best = with(json!({"n": 1, "best_of": 4}));
    let top = all["choices"].as_array().unwrap().iter().map(mean).fold(f64::MIN, f64::max);
    assert_eq!(best["choices"].as_array().unwrap().len(), 1);
    assert!((mean(&best["choices"][0]) - top).abs() < 1e-6);
    assert_eq!(best["usage"]["completion_tokens"], 32);
}

#[test]
fn a_bias_and_a_ban_reach_the_sampler() {
    let server = Server::start(&[]);
    let ask = |extra: Value| {
        let mut body = json!({"prompt": "Once upon a time", "max_tokens": 4, "temperature": 0, "return_token_ids": true});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        server.complete(&body).ok()["choices"][0]["token_ids"].clone()
    };
    let plain = ask(json!({}));
    let first = plain[0].as_u64().unwrap().to_string();
    assert_ne!(ask(json!({"logit_bias": {&first: -100}}))[0], plain[0]);
    assert_eq!(ask(json!({"allowed_token_ids": [77]})), json!([77, 77, 77, 77]));
}

#[test]
fn a_prompt_is_truncated_on_request_only() {
    let server = Server::start(&[]);
    let long = "word ".repeat(2000);
    let refused = server.complete(&json!({"prompt": long, "max_tokens": 4}));
    assert_eq!((refused.status, refused.json()["error"]["code"].clone()), (400, json!("context_length_exceeded")));
    assert_eq!(refused.json()["error"]["param"], "prompt");
    let cut = server.complete(&json!({"prompt": long, "max_tokens": 4, "truncate_prompt_tokens": 10})).ok();
    assert_eq!(cut["usage"]["prompt_tokens"], 10);
    // as many as leave room for the answer
    let fits = server.complete(&json!({"prompt": long, "max_tokens": 4, "truncate_prompt_tokens": -1, "ignore_eos": true})).ok();
    assert_eq!((&fits["usage"]["prompt_tokens"], &fits["usage"]["completion_tokens"]), (&json!(1020), &json!(4)));
    let chat = json!({"messages": [{"role": "user", "content": long}], "max_tokens": 6, "truncate_prompt_tokens": -1});
    assert_eq!(server.post("/v1/chat/completions", &chat).ok()["usage"]["prompt_tokens"], 1018);
}

#[test]
fn no_stop_string_is_looked_for_before_min_tokens() {
    let server = Server::start(&[]);
    let full = server.greedy("Once upon a time", 30);
    let ask = |min_tokens: usize| {
        // (a letter of the text's beginning, which comes again)
        let body = json!({"prompt": "Once upon a time", "max_tokens": 30, "temperature": 0, "stop": " ", "min_tokens": min_tokens});
        let answer = server.complete(&body).ok();
        assert_eq!((&answer["choices"][0]["finish_reason"], &answer["choices"][0]["stop_reason"]), (&json!("stop"), &json!(" ")));
        let text = answer["choices"][0]["text"].as_str().unwrap().to_string();
        assert!(full.starts_with(&text));
        (answer["usage"]["completion_tokens"].as_u64().unwrap(), text)
    };
    let (early, late) = (ask(0), ask(12));
    assert!(early.0 < 12 && !early.1.contains(' '), "{early:?}");
    assert!(late.0 > 12 && late.1.contains(' '), "{late:?}");
}

#[test]
fn choices_beside_the_one_that_scores_the_prompt_do_not_read_it_again() {
    let server = Server::start(&[]);
    let prompt = "The captain looked at the map for a long time and then told them that they would sail north at dawn. ".repeat(5);
    let body = json!({"prompt": prompt, "max_tokens": 1, "n": 4, "echo": true, "logprobs": 0, "ignore_eos": true});
    let length = server.complete(&body).ok()["usage"]["prompt_tokens"].as_f64().unwrap();
    // the first choice looks for nothing; the three others find all whole blocks
    assert_eq!(server.metric("vllm:prefix_cache_queries_total"), 3.0 * length);
    assert!(server.metric("vllm:prefix_cache_hits_total") >= 3.0 * (length - 33.0));
    assert!(server.metric("vllm:iteration_tokens_total_sum") < 2.0 * length);
}

#[test]
fn an_empty_prompt_begins_a_document() {
    let server = Server::start(&[]);
    let answer = server.complete(&json!({"prompt": "", "max_tokens": 3, "temperature": 0, "ignore_eos": true})).ok();
    assert_eq!(answer["usage"]["prompt_tokens"], 1);
    assert_eq!(answer["usage"]["completion_tokens"], 3);
}

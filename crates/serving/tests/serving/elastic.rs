//! Thinner forms of a model beside it in one engine, and as its drafters.

use crate::engine::{DECODER, collect, prompt, request};
use evop_model::{Elastic, Gene, Pattern, Widths};
use evop_serving::{Engine, EngineConfig, EngineHandle, Request, SamplingParams, Speculation, SubmitError};

/// Two patterns: an attention and two MLPs gone; much more gone.
fn patterns() -> [Pattern; 2] {
    let pattern = |attention: &[usize], mlp: &[usize]| {
        let gene = |l| Gene { kv_groups: if attention.contains(&l) { 0 } else { 2 }, ffn: if mlp.contains(&l) { 0 } else { 384 } };
        Pattern::new((0..12).map(gene).collect(), DECODER.config()).unwrap()
    };
    [pattern(&[5], &[3, 7]), pattern(&[2, 5, 8, 9], &[1, 3, 6, 7, 9])]
}

fn start(config: EngineConfig) -> EngineHandle {
    Engine::start(Elastic::new(DECODER.clone(), &patterns(), &Widths::default()).unwrap(), vec![0], config).unwrap()
}

fn defaults() -> EngineConfig {
    EngineConfig::for_decoder(&DECODER)
}

fn params(i: usize) -> SamplingParams {
    let temperature = [0.0, 0.8, 0.0, 1.3][i % 4];
    SamplingParams {
        max_tokens: 20 + i,
        temperature,
        top_p: 0.9,
        seed: Some(i as u64),
        logprobs: Some(2),
        ignore_eos: true,
        presence_penalty: 0.2,
        ..SamplingParams::default()
    }
}

const TEXTS: [&str; 4] = ["It was a dark night, and", "Once upon a time there was a king who had", "The sea", "\"I do not know,\" said the old man; \"but"];

#[test]
fn each_form_answers_beside_the_others_as_it_does_alone() {
    let (together, forms) = (start(defaults()), patterns());
    let alone: Vec<EngineHandle> = std::iter::once(DECODER.clone())
        .chain(forms.iter().map(|pattern| DECODER.masked(pattern).unwrap()))
        .map(|decoder| Engine::start(decoder, vec![0], defaults()).unwrap())
        .collect();
    let asked = |i: usize, member| Request { member, ..request(prompt(TEXTS[i % 4]), params(i)) };
    let streams: Vec<_> = (0..12).map(|i| together.submit(asked(i, i % 3)).unwrap()).collect();
    for (i, stream) in streams.into_iter().enumerate() {
        let (found, expected) = (collect(stream, 1), collect(alone[i % 3].submit(asked(i, 0)).unwrap(), 1));
        assert_eq!(found[0].tokens, expected[0].tokens, "request {i}");
        assert!(found[0].logprobs == expected[0].logprobs, "request {i}");
    }
    let first = |member| collect(together.submit(Request { member, ..request(prompt(TEXTS[0]), params(0)) }).unwrap(), 1).remove(0).tokens;
    assert!(first(0) != first(2), "the forms differ");
}

#[test]
fn what_one_form_left_in_the_cache_is_of_no_use_to_another() {
    let engine = start(defaults());
    let long = prompt(&TEXTS.join(" ").repeat(3));
    let cached = |member| {
        let greedy = SamplingParams { max_tokens: 1, temperature: 0.0, ..SamplingParams::default() };
        collect(engine.submit(Request { member, ..request(long.clone(), greedy) }).unwrap(), 1).remove(0).end.unwrap().1.cached_tokens
    };
    assert_eq!(cached(0), 0);
    assert_eq!(cached(1), 0);
    assert!(cached(1) >= 96 && cached(0) >= 96);
}

#[test]
fn a_form_that_there_is_not_is_refused() {
    let refused = start(defaults()).submit(Request { member: 3, ..request(vec![1], params(0)) }).unwrap_err();
    assert!(matches!(refused, SubmitError::Invalid(invalid) if invalid.param == "model"));
    for speculation in [Speculation { member: 0, most: 3 }, Speculation { member: 3, most: 3 }, Speculation { member: 1, most: 0 }] {
        let elastic = Elastic::new(DECODER.clone(), &patterns(), &Widths::default()).unwrap();
        let error = Engine::start(elastic, vec![0], EngineConfig { speculation: Some(speculation), ..defaults() }).unwrap_err();
        assert!(error.to_string().starts_with("speculation"), "{error}");
    }
}

#[test]
fn drafts_change_nothing_but_the_number_of_passes() {
    let plain = Engine::start(DECODER.clone(), vec![0], defaults()).unwrap();
    for member in [1, 2] {
        let drafted = start(EngineConfig { speculation: Some(Speculation { member, most: 5 }), ..defaults() });
        for sequences in [1, 8] {
            let requests = || (0..sequences).map(|i| request(prompt(TEXTS[i % 4]), SamplingParams { max_tokens: 60 + i, ..params(i) }));
            let all = |engine: &EngineHandle| {
                requests().map(|r| engine.submit(r).unwrap()).collect::<Vec<_>>().into_iter().map(|s| collect(s, 1).remove(0)).collect::<Vec<_>>()
            };
            for (i, (found, expected)) in all(&drafted).iter().zip(&all(&plain)).enumerate() {
                assert_eq!(found.tokens, expected.tokens, "form {member}, {sequences} sequences, number {i}");
                assert!(found.logprobs == expected.logprobs, "form {member}, {sequences} sequences, number {i}");
            }
        }
        let stats = drafted.stats();
        assert!(stats.draft_tokens > 50 && stats.accepted_tokens > 0 && stats.accepted_tokens < stats.draft_tokens, "{stats:?}");
        assert_eq!((stats.kv_blocks_used, stats.running), (0, 0));
    }
}

#[test]
fn the_end_of_sequence_and_stop_tokens_end_among_drafts_too() {
    let plain = Engine::start(DECODER.clone(), vec![0], defaults()).unwrap();
    let drafted = start(EngineConfig { speculation: Some(Speculation { member: 1, most: 6 }), ..defaults() });
    let full = collect(plain.submit(request(prompt(TEXTS[0]), SamplingParams { max_tokens: 40, temperature: 0.0, ..SamplingParams::default() })).unwrap(), 1)
        .remove(0);
    for stop in [full.tokens[9], full.tokens[17], full.tokens[30]] {
        let params = SamplingParams { max_tokens: 40, temperature: 0.0, stop_token_ids: vec![stop], ..SamplingParams::default() };
        // (several, so that every number of drafts is tried)
        for _ in 0..4 {
            let ask = |engine: &EngineHandle| collect(engine.submit(request(prompt(TEXTS[0]), params.clone())).unwrap(), 1).remove(0);
            let (found, expected) = (ask(&drafted), ask(&plain));
            assert_eq!((&found.tokens, found.end.as_ref().map(|e| &e.0)), (&expected.tokens, expected.end.as_ref().map(|e| &e.0)));
        }
    }
    assert!(drafted.stats().accepted_tokens > 0);
}

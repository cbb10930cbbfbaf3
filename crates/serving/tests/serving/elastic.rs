//! Thinner forms of a model beside it in one engine, and as its drafters.

use crate::engine::{DECODER, collect, prompt, request};
use evop_model::{Elastic, Gene, NoCache, Pattern, Span, Widths};
use evop_serving::{Engine, EngineConfig, EngineHandle, EngineStats, Request, SamplingParams, Speculation, SubmitError};

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
    for speculation in [
        Speculation { member: 0, most: 3, always: false },
        Speculation { member: 3, most: 3, always: false },
        Speculation { member: 1, most: 0, always: false },
    ] {
        let elastic = Elastic::new(DECODER.clone(), &patterns(), &Widths::default()).unwrap();
        let error = Engine::start(elastic, vec![0], EngineConfig { speculation: Some(speculation), ..defaults() }).unwrap_err();
        assert!(error.to_string().starts_with("speculation"), "{error}");
    }
}

#[test]
fn drafts_change_nothing_but_the_number_of_passes() {
    let plain = Engine::start(DECODER.clone(), vec![0], defaults()).unwrap();
    for member in [1, 2] {
        let drafted = start(EngineConfig { speculation: Some(Speculation { member, most: 5, always: true }), ..defaults() });
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

/// Pearson's test of what is sampled among drafts: three tokens of four allowed ones, counted against the probabilities of a plain forward pass.
#[test]
fn what_is_sampled_among_drafts_has_the_probabilities_of_the_model() {
    const CHOICES: usize = 64;
    let start_of = prompt(TEXTS[2]);
    let next = |prompt: &[u32]| -> Vec<f32> {
        let batch = DECODER.batch(&[Span::prompt(prompt.len())]).unwrap();
        let hidden = DECODER.forward(prompt, &batch, &mut NoCache).unwrap();
        DECODER.logits(&hidden).unwrap().to_vec2().unwrap().remove(prompt.len() - 1)
    };
    let logits = next(&start_of);
    let mut likely: Vec<u32> = (0..).take(logits.len()).collect();
    likely.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
    let allowed = &likely[..4];

    let mut expected = vec![(Vec::new(), 1.0)];
    for _ in 0..3 {
        expected = expected
            .iter()
            .flat_map(|(tokens, probability): &(Vec<u32>, f64)| {
                let logits = next(&[&start_of[..], tokens].concat());
                let weights = allowed.iter().map(|t| f64::from(logits[*t as usize]).exp());
                let total: f64 = weights.clone().sum();
                allowed.iter().zip(weights).map(|(t, weight)| ([&tokens[..], &[*t]].concat(), probability * weight / total)).collect::<Vec<_>>()
            })
            .collect();
    }

    // (drafts are made where every sequence decodes: all choices read the prompt in one step)
    let speculation = Some(Speculation { member: 2, most: 2, always: true });
    let engine = start(EngineConfig { speculation, max_concurrent: CHOICES, max_batch_tokens: 4096, decode_slowdown: None, ..defaults() });
    let mut counts = vec![0_usize; expected.len()];
    for seed in 1..=48 {
        let params =
            SamplingParams { max_tokens: 3, seed: Some(seed), allowed_token_ids: Some(allowed.to_vec()), ignore_eos: true, ..SamplingParams::default() };
        for choice in collect(engine.submit(Request { n: CHOICES, ..request(start_of.clone(), params) }).unwrap(), CHOICES) {
            counts[expected.iter().position(|(tokens, _)| *tokens == choice.tokens).unwrap()] += 1;
        }
    }
    let EngineStats { draft_tokens, accepted_tokens, .. } = engine.stats();
    assert!(accepted_tokens > 1_000 && draft_tokens - accepted_tokens > 500, "{accepted_tokens} of {draft_tokens} accepted");
    // cells of which fewer than five samples are expected are taken together
    let samples = counts.iter().sum::<usize>() as f64;
    let cells = expected.iter().zip(&counts).map(|((_, p), count)| (samples * p, *count as f64));
    let (common, rare): (Vec<_>, Vec<_>) = cells.partition(|(expected, _)| *expected >= 5.0);
    let rest = rare.iter().fold((0.0, 0.0), |sum, cell| (sum.0 + cell.0, sum.1 + cell.1));
    let statistic: f64 = common.iter().chain([&rest]).map(|(expected, count)| (count - expected).powi(2) / expected).sum();
    // 1 in 1,000 is above this (Wilson and Hilferty's approximation)
    let freedom = common.len() as f64;
    let bound = freedom * (1.0 - 2.0 / (9.0 * freedom) + 3.09 * (2.0 / (9.0 * freedom)).sqrt()).powi(3);
    assert!(freedom > 20.0 && statistic < bound, "{statistic} with {freedom} degrees of freedom: {counts:?}");
}

#[test]
fn the_end_of_sequence_and_stop_tokens_end_among_drafts_too() {
    let plain = Engine::start(DECODER.clone(), vec![0], defaults()).unwrap();
    let ask = |engine: &EngineHandle, stop_token_ids: Vec<u32>| {
        let params = SamplingParams { max_tokens: 44, temperature: 0.0, stop_token_ids, ..SamplingParams::default() };
        collect(engine.submit(request(prompt(TEXTS[0]), params)).unwrap(), 1).remove(0)
    };
    // a form that leaves nothing out is always right: steps end at these places and between them
    let same = Elastic::new(DECODER.clone(), &[Pattern::dense(DECODER.config())], &Widths::default()).unwrap();
    let config = EngineConfig { speculation: Some(Speculation { member: 1, most: 6, always: true }), ..defaults() };
    for place in 2..40 {
        let stop = vec![ask(&plain, Vec::new()).tokens[place]];
        let drafted = Engine::start(same.clone(), vec![0], config).unwrap();
        let (found, expected) = (ask(&drafted, stop.clone()), ask(&plain, stop));
        assert_eq!((&found.tokens, found.end.as_ref().map(|e| &e.0)), (&expected.tokens, expected.end.as_ref().map(|e| &e.0)));
        assert!(found.tokens.len() < 12 || drafted.stats().accepted_tokens > 0, "{} tokens", found.tokens.len());
    }
}

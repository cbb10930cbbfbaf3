//! Grammars in the engine: on the bundled model, through the public interface.

use evop_model::{Checkpoint, DType, Decoder, Device};
use evop_serving::{
    Engine, EngineConfig, EngineHandle, FinishReason, Grammar, GrammarCompiler, GrammarSource, OutputKind, Request, RequestStream, SamplingParams, Thinking,
    Whitespace,
};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::LazyLock;

static CHECKPOINT: LazyLock<Checkpoint> = LazyLock::new(|| Checkpoint::open(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny")).unwrap());
static DECODER: LazyLock<Decoder> = LazyLock::new(|| CHECKPOINT.decoder(&Device::Cpu, DType::F32).unwrap());
static COMPILER: LazyLock<GrammarCompiler> = LazyLock::new(|| GrammarCompiler::new(CHECKPOINT.tokenizer(), &[0], CHECKPOINT.config().vocab_size).unwrap());

fn compile(source: &GrammarSource) -> Grammar {
    COMPILER.compile(source, Thinking::Never).unwrap()
}

/// A person with a short name; short enough to end.
fn person() -> Grammar {
    let schema = json!({
        "type": "object", "properties": {"name": {"type": "string", "maxLength": 40}, "age": {"type": "integer", "minimum": 0, "maximum": 120}, "kind": {"enum": ["sailor", "king"]}},
        "required": ["name", "age", "kind"], "additionalProperties": false
    });
    compile(&GrammarSource::Json { schema, whitespace: Whitespace::Bounded })
}

fn start(config: EngineConfig) -> EngineHandle {
    Engine::start(DECODER.clone(), vec![0], config).unwrap()
}

fn defaults() -> EngineConfig {
    EngineConfig::for_decoder(&DECODER)
}

fn submit(engine: &EngineHandle, text: &str, params: SamplingParams, n: usize) -> RequestStream {
    engine.submit(Request { prompt: CHECKPOINT.encode(text, true).unwrap(), params, n, request_id: "test".into(), ..Request::default() }).unwrap()
}

/// Tokens, text and end of every choice.
fn collect(mut stream: RequestStream, n: usize) -> Vec<(Vec<u32>, String, Option<FinishReason>)> {
    let mut choices = vec![(Vec::new(), Vec::new(), None); n];
    while let Some(output) = stream.blocking_next() {
        let choice = &mut choices[output.index];
        match output.kind {
            OutputKind::Token { id, is_stop, .. } => {
                choice.0.push(id);
                choice.1.extend((!is_stop).then_some(id));
            }
            OutputKind::Finished { reason, .. } => choice.2 = Some(reason),
            OutputKind::PromptRead { .. } | OutputKind::PromptLogprobs(_) => {}
        }
    }
    choices.into_iter().map(|(tokens, text, end)| (tokens, CHECKPOINT.tokenizer().decode(&text, false).unwrap(), end)).collect()
}

fn sampled(grammar: &Grammar, seed: u64) -> SamplingParams {
    SamplingParams { max_tokens: 200, temperature: 1.0, seed: Some(seed), grammar: Some(grammar.clone()), ..SamplingParams::default() }
}

fn check_person(text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{text}: {e}"));
    assert!(value["name"].is_string() && value["age"].as_u64().unwrap() <= 120 && value["kind"].is_string(), "{text}");
}

#[test]
fn greedy_and_sampled_choices_follow_the_schema_to_its_end() {
    let (engine, grammar) = (start(defaults()), person());
    let greedy = SamplingParams { temperature: 0.0, ..sampled(&grammar, 0) };
    // the end of the object is the end, whatever ignore_eos and min_tokens say
    for params in [greedy.clone(), SamplingParams { ignore_eos: true, ..greedy.clone() }, SamplingParams { min_tokens: 190, ..greedy }] {
        let (_, text, end) = collect(submit(&engine, "Once upon a time", params, 1), 1).remove(0);
        check_person(&text);
        assert_eq!(end, Some(FinishReason::Stop));
    }
    let choices = collect(submit(&engine, "Once upon a time", sampled(&grammar, 3), 5), 5);
    choices.iter().for_each(|(_, text, _)| check_person(text));
    assert!(choices[0].1 != choices[1].1);
    assert_eq!(collect(submit(&engine, "Once upon a time", sampled(&grammar, 3), 5), 5), choices);
}

#[test]
fn requests_without_a_grammar_are_not_touched_by_those_with_one() {
    let engine = start(EngineConfig { max_batch_tokens: 32, ..defaults() });
    let free = |seed| SamplingParams { max_tokens: 40, temperature: 0.9, seed: Some(seed), ..SamplingParams::default() };
    let alone: Vec<_> = (0..4).map(|seed| collect(submit(&engine, "It was a dark night", free(seed), 1), 1)).collect();
    let grammar = person();
    let constrained: Vec<RequestStream> = (0..4).map(|seed| submit(&engine, "It was", sampled(&grammar, seed), 1)).collect();
    let beside: Vec<RequestStream> = (0..4).map(|seed| submit(&engine, "It was a dark night", free(seed), 1)).collect();
    assert_eq!(beside.into_iter().map(|s| collect(s, 1)).collect::<Vec<_>>(), alone);
    constrained.into_iter().for_each(|s| check_person(&collect(s, 1)[0].1));
}

#[test]
fn a_sequence_that_gave_way_goes_on_where_its_grammar_was() {
    let schema = json!({"type": "array", "items": {"type": "integer", "minimum": 100, "maximum": 999}, "minItems": 40, "maxItems": 40});
    let grammar = compile(&GrammarSource::Json { schema, whitespace: Whitespace::None });
    let roomy = start(defaults());
    let long = "It was a dark night and the wind came from the sea. ".repeat(5);
    let params = |seed| SamplingParams { max_tokens: 250, ..sampled(&grammar, seed) };
    let alone: Vec<_> = (0..5).map(|seed| collect(submit(&roomy, &long[seed as usize..], params(seed), 1), 1)).collect();
    // enough for one request at its longest
    let block_bytes = 32 * DECODER.config().kv_bytes_per_token(4);
    let blocks = (CHECKPOINT.encode(&long, true).unwrap().len() + 250).div_ceil(32);
    let engine = start(EngineConfig { kv_budget_bytes: blocks * block_bytes, ..defaults() });
    let streams: Vec<RequestStream> = (0..5).map(|seed| submit(&engine, &long[seed as usize..], params(seed), 1)).collect();
    for (found, alone) in streams.into_iter().map(|s| collect(s, 1)).zip(&alone) {
        let numbers: Vec<u32> = serde_json::from_str(&found[0].1).unwrap();
        assert_eq!(numbers.len(), 40);
        assert_eq!(&found, alone);
    }
    assert!(engine.stats().preemptions > 0);
}

#[test]
fn logprobs_are_those_of_the_model_without_the_grammar() {
    let (engine, grammar) = (start(defaults()), compile(&GrammarSource::Choice(vec!["zebra".into()])));
    let params = SamplingParams { logprobs: Some(1), temperature: 0.0, ..sampled(&grammar, 1) };
    let mut stream = submit(&engine, "Once upon a", params, 1);
    let mut least_probable = 0.0_f32;
    while let Some(output) = stream.blocking_next() {
        if let OutputKind::Token { logprobs: Some(logprobs), .. } = output.kind {
            assert!(logprobs.top[0].logprob >= logprobs.token.logprob);
            least_probable = least_probable.min(logprobs.token.logprob);
        }
    }
    assert!(least_probable < -2.0, "the model alone would hardly have said that");
}

#[test]
fn what_leaves_nothing_to_sample_ends_that_request_alone() {
    let (engine, grammar) = (start(defaults()), compile(&GrammarSource::Choice(vec!["yes".into()])));
    let params = SamplingParams { allowed_token_ids: Some(vec![7]), ..sampled(&grammar, 1) };
    let end = collect(submit(&engine, "Once", params, 1), 1).remove(0).2;
    assert!(matches!(end, Some(FinishReason::Error(text)) if text.contains("grammar")));
    assert_eq!(collect(submit(&engine, "Once", sampled(&grammar, 1), 1), 1)[0].1, "yes");
}

#[test]
fn a_grammar_made_to_do_harm_is_refused_or_followed() {
    // four letters: as many rules as there is room for
    let name = |i: usize| -> String { (0..4).rev().map(|place| char::from(b'a' + (i / 26_usize.pow(place) % 26) as u8)).collect() };
    let chain: String = (0..25_000).map(|i| format!("{}:{}\n", name(i), name(i + 1))).collect();
    let defs = |n: usize| -> serde_json::Map<String, Value> { (0..n).map(|i| (format!("d{i}"), json!({"$ref": format!("#/$defs/d{}", i + 1)}))).collect() };
    let mut schema = json!({"$ref": "#/$defs/d0", "$defs": defs(5000)});
    schema["$defs"]["d5000"] = json!({"type": "integer"});
    let json = |schema| GrammarSource::Json { schema, whitespace: Whitespace::Bounded };
    let sources = [
        GrammarSource::Lark(format!("start: aaaa\n{chain}{}: \"x\"", name(25_000))),
        GrammarSource::Lark(format!("start: {}\"x\"{}", "(".repeat(100_000), ")".repeat(100_000))),
        GrammarSource::Regex(format!("{}a{}", "(".repeat(100_000), ")".repeat(100_000))),
        GrammarSource::Regex("(((a|b){1,900}){1,900}){1,900}".into()),
        GrammarSource::Regex(".*a.{300}".into()),
        GrammarSource::Regex("a".repeat(200_000)),
        GrammarSource::Choice(vec!["a".repeat(200_000), "b".into()]),
        GrammarSource::Choice((0..15_000).map(|i| format!("word {i}")).collect()),
        json(schema),
        json(json!({"type": "array", "minItems": 100_000, "items": {"type": "integer"}})),
        json(json!({"type": "string", "pattern": "^(a|ab|abc)*$", "maxLength": 100_000})),
    ];
    let engine = start(defaults());
    for source in sources {
        if let Ok(grammar) = COMPILER.compile(&source, Thinking::Never) {
            collect(submit(&engine, "Once", SamplingParams { max_tokens: 3, ..sampled(&grammar, 1) }, 1), 1);
        }
    }
    let too_long = COMPILER.compile(&GrammarSource::Regex("a".repeat(300_000)), Thinking::Never).unwrap_err();
    assert!(too_long.to_string().contains("too long"));
    assert_eq!(collect(submit(&engine, "Once", sampled(&compile(&GrammarSource::Choice(vec!["yes".into()])), 1), 1), 1)[0].1, "yes");
}

//! Grammars over the bundled model's vocabulary.

use super::*;
use crate::params::SamplingParams;
use crate::sampler::Sampler;
use evop_model::Checkpoint;
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;
use std::sync::LazyLock;

const EOS: u32 = 0;
const VOCABULARY: usize = 4096;
static CHECKPOINT: LazyLock<Checkpoint> =
    LazyLock::new(|| Checkpoint::open(std::path::Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny"))).unwrap());
static COMPILER: LazyLock<GrammarCompiler> = LazyLock::new(|| GrammarCompiler::new(CHECKPOINT.tokenizer(), &[EOS], VOCABULARY).unwrap());

fn json_source(schema: Value) -> GrammarSource {
    GrammarSource::Json { schema, whitespace: Whitespace::Bounded }
}

fn compile(source: &GrammarSource) -> Grammar {
    COMPILER.compile(source, Thinking::Never).unwrap()
}

/// Whether a grammar takes a text, token by token, and may end there.
fn accepts(grammar: &Grammar, text: &str) -> bool {
    let mut state = GrammarState::begin(grammar);
    let ids = CHECKPOINT.encode(text, false).unwrap();
    for id in ids {
        if !state.allowed().unwrap().0.is_allowed(id) {
            return false;
        }
        state.advance(id).unwrap();
    }
    state.allowed().unwrap().0.is_allowed(EOS)
}

/// A text drawn from random logits under a grammar, and whether it came to its end.
fn drawn(grammar: &Grammar, params: SamplingParams, seed: u64) -> (String, bool) {
    let params = SamplingParams { grammar: Some(grammar.clone()), seed: Some(seed), max_tokens: 1000, ..params };
    let mut sampler = Sampler::new(Arc::new(params), &[1], &[EOS], 0);
    let mut random = ChaCha12Rng::seed_from_u64(seed);
    let mut ids = Vec::new();
    for _ in 0..300 {
        let logits: Vec<f32> = (0..VOCABULARY).map(|_| random.random::<f32>() * 8.0).collect();
        let sampled = sampler.sample(&logits).unwrap();
        ids.extend((sampled.id != EOS).then_some(sampled.id));
        if sampled.completes {
            return (CHECKPOINT.tokenizer().decode(&ids, false).unwrap(), true);
        }
    }
    (CHECKPOINT.tokenizer().decode(&ids, false).unwrap(), false)
}

#[test]
fn what_is_drawn_under_a_schema_is_json_of_that_schema() {
    let schema = json!({"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"enum": ["x", "é\"\\"]}}, "required": ["a", "b"], "additionalProperties": false});
    let grammar = compile(&json_source(schema));
    for seed in 0..20 {
        for temperature in [0.0, 1.0] {
            let (text, ended) = drawn(&grammar, SamplingParams { temperature, ..SamplingParams::default() }, seed);
            assert!(ended, "{text}");
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!(value["a"].is_boolean() && ["x", "é\"\\"].contains(&value["b"].as_str().unwrap()), "{text}");
        }
    }
}

#[test]
fn json_may_be_compact_spaced_or_indented_and_no_more() {
    let grammar = compile(&json_source(json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})));
    assert!(accepts(&grammar, "{\"a\":1}") && accepts(&grammar, "{\"a\": 1}") && accepts(&grammar, "{\n  \"a\": 1\n}"));
    assert!(!accepts(&grammar, "{\n\n\n\"a\": 1}"));
    assert!(!accepts(&grammar, "{\"a\": 1.5}"));
    let source =
        GrammarSource::Json { schema: json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}), whitespace: Whitespace::None };
    assert!(accepts(&compile(&source), "{\"a\":1}") && !accepts(&compile(&source), "{\"a\": 1}"));
    let source = GrammarSource::Json { schema: json!({"type": "array", "items": {"type": "integer"}}), whitespace: Whitespace::OneLine };
    assert!(accepts(&compile(&source), "[1, 2]") && !accepts(&compile(&source), "[1,2]") && !accepts(&compile(&source), "[ 1, 2]"));
}

#[test]
fn schemas_as_pydantic_and_zod_write_them_are_taken() {
    let schema = json!({
        "$schema": "http://json-schema.org/draft-07/schema#", "title": "Shape", "description": "One of two", "$defs": {
            "Circle": {"type": "object", "title": "Circle", "properties": {"kind": {"const": "circle", "default": "circle"}, "r": {"type": "number", "exclusiveMinimum": 0}}, "required": ["kind", "r"]},
            "Square": {"type": "object", "properties": {"kind": {"const": "square"}, "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": null}}, "required": ["kind"]},
        },
        "oneOf": [{"$ref": "#/$defs/Circle"}, {"$ref": "#/$defs/Square"}], "discriminator": {"propertyName": "kind", "mapping": {"circle": "#/$defs/Circle", "square": "#/$defs/Square"}},
    });
    let grammar = compile(&json_source(schema));
    assert!(accepts(&grammar, "{\"kind\": \"circle\", \"r\": 1.5}") && accepts(&grammar, "{\"kind\": \"square\", \"note\": null}"));
    assert!(!accepts(&grammar, "{\"kind\": \"circle\"}") && !accepts(&grammar, "{\"kind\": \"circle\", \"r\": 0}"));
}

#[test]
fn a_regex_covers_the_whole_text() {
    let grammar = compile(&GrammarSource::Regex(r"[0-9]{3}-[a-z]+".into()));
    assert!(accepts(&grammar, "123-abc"));
    assert!(!accepts(&grammar, "123-") && !accepts(&grammar, "12-abc") && !accepts(&grammar, "x123-abc"));
}

#[test]
fn a_choice_is_one_of_its_texts_whatever_stands_in_them() {
    let texts = ["yes", "no", "\"maybe\" (é/\\)\n| x"];
    let grammar = compile(&GrammarSource::Choice(texts.map(String::from).to_vec()));
    assert!(texts.iter().all(|text| accepts(&grammar, text)));
    assert!(!accepts(&grammar, "ye") && !accepts(&grammar, "maybe"));
}

#[test]
fn a_lark_grammar_begins_at_start() {
    let grammar = compile(&GrammarSource::Lark("start: greeting \" \" NAME\ngreeting: \"Hello\" | \"Bye\"\nNAME: /[A-Z][a-z]+/".into()));
    assert!(accepts(&grammar, "Bye Anna"));
    assert!(!accepts(&grammar, "Hi Anna"));
}

#[test]
fn what_can_not_be_compiled_says_why() {
    let failing = [
        json_source(json!({"type": "nonsense"})),
        json_source(json!({"$ref": "#/nowhere"})),
        json_source(json!({"allOf": [{"type": "string"}, {"type": "number"}]})),
        GrammarSource::Regex("(".into()),
        GrammarSource::Regex("(".repeat(5000)),
        GrammarSource::Choice(vec![]),
        GrammarSource::Lark("begin: \"x\"".into()),
        GrammarSource::Lark("start: nowhere".into()),
        GrammarSource::Lark(String::new()),
    ];
    for source in failing {
        let error = COMPILER.compile(&source, Thinking::Never).expect_err(&format!("{source:?}"));
        assert!((5..2000).contains(&error.to_string().len()), "{error}");
    }
}

#[test]
fn thinking_stands_before_what_is_constrained() {
    let source = GrammarSource::Choice(vec!["yes".into(), "no".into()]);
    let possible = COMPILER.compile(&source, Thinking::Possible).unwrap();
    assert!(accepts(&possible, "yes") && accepts(&possible, "<think>\nIs it < or > {\"x\"}?\n</think>\n\nno"));
    assert!(!accepts(&possible, "<think>\nyes") && !accepts(&possible, "Hm, yes"));
    let begun = COMPILER.compile(&source, Thinking::Begun).unwrap();
    assert!(accepts(&begun, "\nWell\n</think>yes") && !accepts(&begun, "yes"));
    let object = COMPILER.compile(&json_source(json!({"type": "object"})), Thinking::Begun).unwrap();
    assert!(accepts(&object, "x</think>\n\n{\"a\": [1, null]}"));
}

#[test]
fn nothing_that_ends_the_text_comes_before_min_tokens_unless_nothing_else_can() {
    let grammar = compile(&GrammarSource::Regex("a*".into()));
    let mut logits = vec![0.0; VOCABULARY];
    logits[EOS as usize] = 50.0;
    let params = |min_tokens| SamplingParams { grammar: Some(grammar.clone()), min_tokens, temperature: 0.0, ..SamplingParams::default() };
    let mut sampler = Sampler::new(Arc::new(params(2)), &[1], &[EOS], 0);
    let ids: Vec<u32> = (0..3).map(|_| sampler.sample(&logits).unwrap().id).collect();
    assert!(ids[0] != EOS && ids[1] != EOS && ids[2] == EOS);
    let short = compile(&GrammarSource::Choice(vec!["a".into()]));
    let mut sampler = Sampler::new(Arc::new(SamplingParams { grammar: Some(short), ..params(9) }), &[1], &[EOS], 0);
    let ends = (0..3).take_while(|_| !sampler.sample(&logits).unwrap().completes).count();
    assert!(ends < 3);
}

#[test]
fn bias_and_top_k_choose_among_what_the_grammar_allows() {
    let grammar = compile(&GrammarSource::Choice(vec!["yes".into(), "no".into()]));
    let mut logits = vec![0.0; VOCABULARY];
    logits[100..200].fill(30.0);
    let params = SamplingParams { grammar: Some(grammar.clone()), top_k: 1, seed: Some(1), logit_bias: vec![(150, 50.0)], ..SamplingParams::default() };
    let first = Sampler::new(Arc::new(params), &[1], &[EOS], 0).sample(&logits).unwrap().id;
    assert!(GrammarState::begin(&grammar).allowed().unwrap().0.is_allowed(first));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_json_is_accepted_as_json(text in "\\PC{0,12}", number in -1000_i32..1000, flag: bool) {
        let value = json!({"text": text, "list": [number, flag, null], "deep": {"er": {}}});
        let grammar = compile(&json_source(json!({"type": "object"})));
        prop_assert!(accepts(&grammar, &value.to_string()), "{}", value);
        prop_assert!(accepts(&grammar, &serde_json::to_string_pretty(&value).unwrap()), "{}", value);
        prop_assert!(!accepts(&grammar, &value.to_string()[1..]));
    }
}

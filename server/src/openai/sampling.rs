//! The fields that completions and chat have in common: how to sample, when to stop, how to answer.

use crate::openai::errors::ApiError;
use crate::openai::fields::{Fields, as_token_id};
use evop_model::GenerationConfig;
use evop_serving::{MAX_CHOICES, SamplingParams};
use serde_json::Value;

/// Most stop strings of one request (OpenAI takes 4).
pub const MAX_STOPS: usize = 4;
/// Most words of `bad_words`.
pub const MAX_BAD_WORDS: usize = 1024;

/// Fields that change what is generated and that this version can't honour: better refused than ignored.
pub const UNSUPPORTED: [(&str, &str); 9] = [
    ("suffix", "text after the completion (fill in the middle) is not supported"),
    ("use_beam_search", "beam search is not supported; use n or best_of"),
    ("prompt_embeds", "prompts as embeddings are not supported"),
    ("logits_processors", "logits processors are not supported"),
    ("guided_json", "use structured_outputs: {\"json\": …}"),
    ("guided_regex", "use structured_outputs: {\"regex\": …}"),
    ("guided_choice", "use structured_outputs: {\"choice\": …}"),
    ("guided_grammar", "use structured_outputs: {\"grammar\": …}"),
    ("grammar", "use structured_outputs: {\"grammar\": …}"),
];

/// How a request waits for its turn, and how the generated tokens become an answer.
#[derive(Debug, Clone, Default)]
pub struct AnswerOptions {
    /// Choices to answer with.
    pub n: usize,
    /// Choices to generate, of which the best `n` are the answer.
    pub best_of: usize,
    /// Texts that end a choice.
    pub stop: Vec<String>,
    /// Leave the stop string in the text.
    pub include_stop: bool,
    /// Tokens before which no stop string ends a choice.
    pub min_tokens: usize,
    /// Leave special tokens out of the text.
    pub skip_special_tokens: bool,
    /// vLLM's `return_token_ids`: ids of prompt and answer beside the text.
    pub return_token_ids: bool,
    /// vLLM's `return_tokens_as_token_ids`: logprobs name tokens `token_id:N`.
    pub tokens_as_ids: bool,
    /// Words that may not come.
    pub bad_words: Vec<String>,
    /// vLLM's: who waits with a lower number comes first ([`evop_serving::Request::priority`]).
    pub priority: i32,
    /// vLLM's: whose prompts may be found in the cache.
    pub cache_salt: Option<String>,
    /// If the answer is streamed, how.
    pub stream: Option<StreamOptions>,
}

/// How a stream reports usage.
#[derive(Debug, Clone, Copy, Default)]
pub struct StreamOptions {
    /// A last chunk with the usage.
    pub include_usage: bool,
    /// The usage so far in every chunk.
    pub continuous_usage: bool,
}

/// Refuses what can't be honoured.
///
/// # Errors
/// 400 that names the field.
pub fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ApiError> {
    for (name, why) in UNSUPPORTED {
        if let Some(value) = fields.get(name).filter(|v| !is_nothing(v)) {
            tracing::debug!(name, %value, "unsupported field");
            return Err(ApiError::unsupported(name, format!("{name}: {why}")));
        }
    }
    Ok(())
}

/// `false`, `""`, `[]` and `{}` ask for nothing.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(object) => object.is_empty(),
        _ => false,
    }
}

/// Reads how to sample, with the model's own suggestions where the request is silent. `max_tokens` and the two kinds of logprobs,
/// which differ between the endpoints, are left at their defaults.
///
/// # Errors
/// 400 that names the field.
pub fn sampling_params(fields: &Fields<'_>, model: &GenerationConfig) -> Result<SamplingParams, ApiError> {
    let default = SamplingParams::default();
    let suggested = |value: Option<f64>, fallback: f32| value.map_or(fallback, |v| v as f32);
    // vLLM's -1 and 0 both mean "off"
    let top_k = fields.integer("top_k", -1..=i64::MAX)?.map(|k| usize::try_from(k).unwrap_or(0));
    Ok(SamplingParams {
        temperature: fields.number("temperature")?.unwrap_or(suggested(model.temperature, default.temperature)),
        top_p: fields.number("top_p")?.unwrap_or(suggested(model.top_p, default.top_p)),
        top_k: top_k.unwrap_or(model.top_k.unwrap_or(default.top_k)),
        min_p: fields.number("min_p")?.unwrap_or(default.min_p),
        repetition_penalty: fields.number("repetition_penalty")?.unwrap_or(suggested(model.repetition_penalty, default.repetition_penalty)),
        presence_penalty: fields.number("presence_penalty")?.unwrap_or(default.presence_penalty),
        frequency_penalty: fields.number("frequency_penalty")?.unwrap_or(default.frequency_penalty),
        logit_bias: logit_bias(fields)?,
        allowed_token_ids: fields.token_ids("allowed_token_ids")?,
        seed: fields.integer("seed", i64::MIN..=i64::MAX)?.map(i64::cast_unsigned),
        stop_token_ids: fields.token_ids("stop_token_ids")?.unwrap_or_default(),
        ignore_eos: fields.bool("ignore_eos")?.unwrap_or(default.ignore_eos),
        min_tokens: fields.count("min_tokens", 0..=usize::MAX)?.unwrap_or(default.min_tokens),
        prompt_logprobs: fields.count("prompt_logprobs", 0..=evop_serving::MAX_LOGPROBS)?,
        ..default
    })
}

fn logit_bias(fields: &Fields<'_>) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(value) = fields.get("logit_bias") else { return Ok(Vec::new()) };
    let entry = |(id, bias): (&String, &Value)| Some((id.parse().ok()?, bias.as_f64()? as f32));
    let entries = value.as_object().and_then(|object| object.iter().map(entry).collect::<Option<Vec<_>>>());
    entries.ok_or_else(|| fields.wrong("logit_bias", "an object from token ids (as strings) to numbers", value))
}

/// Reads how to answer.
///
/// # Errors
/// 400 that names the field.
pub fn answer_options(fields: &Fields<'_>) -> Result<AnswerOptions, ApiError> {
    let n = fields.count("n", 1..=MAX_CHOICES)?.unwrap_or(1);
    let best_of = fields.count("best_of", 1..=MAX_CHOICES)?.unwrap_or(n);
    let stream = fields.bool("stream")?.unwrap_or(false);
    let options = fields.object("stream_options")?;
    let options = match options {
        Some(options) => StreamOptions {
            include_usage: options.bool("include_usage")?.unwrap_or(false),
            continuous_usage: options.bool("continuous_usage_stats")?.unwrap_or(false),
        },
        None => StreamOptions::default(),
    };
    if best_of < n {
        return Err(ApiError::invalid("best_of", format!("best_of: expected at least n ({n}), found {best_of}")));
    }
    if stream && best_of > n {
        return Err(ApiError::invalid("best_of", "best_of: the best choices are known at the end only, so they can't be streamed"));
    }
    if !stream && fields.get("stream_options").is_some() {
        return Err(ApiError::invalid("stream_options", "stream_options: only for a stream (\"stream\": true)"));
    }
    fields.string("user")?;
    Ok(AnswerOptions {
        n,
        best_of,
        stop: fields.strings("stop", MAX_STOPS)?,
        min_tokens: fields.count("min_tokens", 0..=usize::MAX)?.unwrap_or(0),
        include_stop: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
        skip_special_tokens: fields.bool("skip_special_tokens")?.unwrap_or(true),
        return_token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
        tokens_as_ids: fields.bool("return_tokens_as_token_ids")?.unwrap_or(false),
        bad_words: fields.strings("bad_words", MAX_BAD_WORDS)?.into_iter().filter(|word| !word.trim().is_empty()).collect(),
        priority: fields.integer("priority", i64::from(i32::MIN)..=i64::from(i32::MAX))?.map_or(0, |priority| priority as i32),
        cache_salt: cache_salt(fields)?,
        stream: stream.then_some(options),
    })
}

fn cache_salt(fields: &Fields<'_>) -> Result<Option<String>, ApiError> {
    match fields.string("cache_salt")? {
        Some("") => Err(ApiError::invalid("cache_salt", "cache_salt: expected a string that isn't empty, or no cache_salt")),
        salt => Ok(salt.map(str::to_string)),
    }
}

/// `truncate_prompt_tokens`: how many tokens of a prompt's end to keep.
///
/// # Errors
/// 400 for anything but -1 (`fitting`: as many as leave room for the answer) and positive numbers.
pub fn truncation(fields: &Fields<'_>, fitting: usize) -> Result<Option<usize>, ApiError> {
    match fields.integer("truncate_prompt_tokens", -1..=i64::MAX)? {
        None => Ok(None),
        Some(-1) => Ok(Some(fitting)),
        Some(0) => Err(ApiError::invalid("truncate_prompt_tokens", "truncate_prompt_tokens: expected -1 or a number of at least 1, found 0")),
        Some(tokens) => Ok(Some(usize::try_from(tokens).unwrap_or(usize::MAX))),
    }
}

/// Prompts as token ids: a list, or a list of lists.
pub fn as_token_ids(list: &[Value]) -> Option<Vec<u32>> {
    list.iter().map(as_token_id).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, json};

    fn object(value: Value) -> Map<String, Value> {
        serde_json::from_value(value).unwrap()
    }

    fn param(error: &ApiError) -> String {
        error.to_json()["error"]["param"].as_str().unwrap().to_string()
    }

    #[test]
    fn the_model_suggests_where_the_request_is_silent() {
        let model = GenerationConfig { temperature: Some(0.5), top_k: Some(7), ..GenerationConfig::default() };
        let params = sampling_params(&Fields::new(&object(json!({}))), &model).unwrap();
        assert_eq!((params.temperature, params.top_p, params.top_k), (0.5, 1.0, 7));
        let params = sampling_params(&Fields::new(&object(json!({"temperature": 0, "top_k": -1}))), &model).unwrap();
        assert_eq!((params.temperature, params.top_k), (0.0, 0));
    }

    #[test]
    fn a_bias_is_a_map_from_ids_to_numbers() {
        let read = |value: Value| sampling_params(&Fields::new(&object(json!({"logit_bias": value}))), &GenerationConfig::default());
        assert_eq!(read(json!({"5": -100, "7": 1.5})).unwrap().logit_bias, [(5, -100.0), (7, 1.5)]);
        for wrong in [json!([5]), json!({"a": 1}), json!({"5": "x"}), json!({"-5": 1})] {
            assert_eq!(param(&read(wrong).unwrap_err()), "logit_bias");
        }
    }

    #[test]
    fn what_would_change_the_answer_is_refused_by_name() {
        for (name, value) in [("suffix", json!("end")), ("use_beam_search", json!(true)), ("guided_regex", json!("a"))] {
            let body = object(json!({name: value}));
            assert_eq!(param(&refuse_unsupported(&Fields::new(&body)).unwrap_err()), name);
        }
        let body = object(json!({"suffix": "", "use_beam_search": false, "response_format": {"type": "text"}}));
        assert!(refuse_unsupported(&Fields::new(&body)).is_ok());
    }

    #[test]
    fn a_request_says_when_it_is_its_turn_and_who_may_share_its_prompt() {
        let read = |value: Value| answer_options(&Fields::new(&object(value)));
        let options = read(json!({"priority": -3, "cache_salt": "tenant", "bad_words": ["no", " "]})).unwrap();
        assert_eq!((options.priority, options.cache_salt.as_deref(), options.bad_words), (-3, Some("tenant"), vec!["no".to_string()]));
        for (name, value) in [("priority", json!(1u64 << 40)), ("cache_salt", json!("")), ("bad_words", json!([1]))] {
            assert_eq!(param(&read(json!({name: value})).unwrap_err()), name);
        }
    }

    #[test]
    fn the_best_of_fewer_than_n_is_refused() {
        let read = |value: Value| answer_options(&Fields::new(&object(value)));
        assert_eq!(param(&read(json!({"n": 3, "best_of": 2})).unwrap_err()), "best_of");
        assert_eq!(param(&read(json!({"n": 1, "best_of": 2, "stream": true})).unwrap_err()), "best_of");
        let options = read(json!({"n": 2, "best_of": 4})).unwrap();
        assert_eq!((options.n, options.best_of), (2, 4));
    }
}

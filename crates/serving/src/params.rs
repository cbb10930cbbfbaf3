//! What a request asks for, and whether it can be asked.

use crate::grammar::Grammar;

/// Most alternatives that `logprobs` and `prompt_logprobs` may ask for.
pub const MAX_LOGPROBS: usize = 20;
/// Most choices of one request.
pub const MAX_CHOICES: usize = 128;

/// A request as the engine sees it: tokens in, tokens out.
#[derive(Debug, Clone)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// How to sample.
    pub params: SamplingParams,
    /// Which form of the model answers: 0 the whole one, i the engine's i-th pattern.
    pub member: usize,
    /// Choices to make from the prompt, 1..=[`MAX_CHOICES`].
    pub n: usize,
    /// For log lines.
    pub request_id: String,
    /// Who waits is served in order of arrival, as if this many seconds later than it was: below zero before others, above it behind them. Nobody waits
    /// for ever behind those that come later.
    pub priority: i32,
    /// Prefixes are shared only with requests of the same salt.
    pub cache_salt: Option<String>,
}

impl Default for Request {
    fn default() -> Self {
        Self { prompt: Vec::new(), params: SamplingParams::default(), member: 0, n: 1, request_id: String::new(), priority: 0, cache_salt: None }
    }
}

/// How tokens are chosen and when to end; the defaults are OpenAI's.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Tokens to make at most; 0 with `prompt_logprobs` scores the prompt only.
    pub max_tokens: usize,
    /// Divides the logits; 0 is greedy.
    pub temperature: f32,
    /// Smallest set of tokens with this much probability; 1 is off.
    pub top_p: f32,
    /// The most probable tokens; 0 is off.
    pub top_k: usize,
    /// Tokens at least this probable, relative to the most probable one; 0 is off.
    pub min_p: f32,
    /// Divides (multiplies, below zero) the logits of tokens in the prompt or the output; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the output.
    pub presence_penalty: f32,
    /// Subtracted from the logits of tokens in the output, once an occurrence.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// If given, nothing else may be sampled.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Sequences of tokens of which the output may have none.
    pub bad_words: Vec<Vec<u32>>,
    /// Makes the choices reproducible; choice i draws from the seed's i-th stream.
    pub seed: Option<u64>,
    /// Tokens that end a choice, besides the model's end of sequence.
    pub stop_token_ids: Vec<u32>,
    /// Go on after the model's end of sequence.
    pub ignore_eos: bool,
    /// Tokens to make before anything may end the choice.
    pub min_tokens: usize,
    /// Log probabilities of every generated token, with so many alternatives.
    pub logprobs: Option<usize>,
    /// Log probabilities of every prompt token, with so many alternatives.
    pub prompt_logprobs: Option<usize>,
    /// What the output must be like; it ends the choice where nothing more can follow, whatever `ignore_eos` and `min_tokens` say.
    pub grammar: Option<Grammar>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            max_tokens: 16,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            seed: None,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            min_tokens: 0,
            logprobs: None,
            prompt_logprobs: None,
            grammar: None,
        }
    }
}

/// A parameter that can't be honoured.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{param}: {message}")]
pub struct InvalidParam {
    /// The field as OpenAI (or vLLM) spells it.
    pub param: &'static str,
    /// What was expected and what was found.
    pub message: String,
}

impl InvalidParam {
    fn new(param: &'static str, message: String) -> Self {
        Self { param, message }
    }
}

impl SamplingParams {
    /// Checks what can be checked without a model.
    ///
    /// # Errors
    /// The first parameter that is out of range.
    pub fn validate(&self) -> Result<(), InvalidParam> {
        let within = |param: &'static str, value: f32, valid: bool, expected: &str| {
            if valid && value.is_finite() { Ok(()) } else { Err(InvalidParam::new(param, format!("expected {expected}, found {value}"))) }
        };
        within("temperature", self.temperature, self.temperature >= 0.0, "a number of at least 0")?;
        within("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "a number above 0 and at most 1")?;
        within("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "a number from 0 to 1")?;
        within("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "a number above 0")?;
        within("presence_penalty", self.presence_penalty, (-2.0..=2.0).contains(&self.presence_penalty), "a number from -2 to 2")?;
        within("frequency_penalty", self.frequency_penalty, (-2.0..=2.0).contains(&self.frequency_penalty), "a number from -2 to 2")?;
        for (_, bias) in &self.logit_bias {
            within("logit_bias", *bias, (-100.0..=100.0).contains(bias), "values from -100 to 100")?;
        }
        if self.bad_words.iter().any(Vec::is_empty) {
            return Err(InvalidParam::new("bad_words", "expected words of at least one token, found an empty one".into()));
        }
        if self.allowed_token_ids.as_ref().is_some_and(Vec::is_empty) {
            return Err(InvalidParam::new("allowed_token_ids", "expected at least one token id, found an empty list".into()));
        }
        if self.min_tokens > self.max_tokens {
            return Err(InvalidParam::new("min_tokens", format!("expected at most max_tokens ({}), found {}", self.max_tokens, self.min_tokens)));
        }
        for (param, asked) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if let Some(asked) = asked.filter(|a| *a > MAX_LOGPROBS) {
                return Err(InvalidParam::new(param, format!("expected at most {MAX_LOGPROBS}, found {asked}")));
            }
        }
        Ok(())
    }
}

impl Request {
    /// Checks everything against a vocabulary; limits on lengths are the engine's business.
    ///
    /// # Errors
    /// The first parameter that is out of range.
    pub fn validate(&self, vocab_size: usize, members: usize) -> Result<(), InvalidParam> {
        self.params.validate()?;
        if self.member >= members {
            return Err(InvalidParam::new("model", format!("expected one of the model's {members} forms, found number {}", self.member)));
        }
        if self.prompt.is_empty() {
            return Err(InvalidParam::new("prompt", "expected at least one token, found none".into()));
        }
        if self.n == 0 || self.n > MAX_CHOICES {
            return Err(InvalidParam::new("n", format!("expected 1 to {MAX_CHOICES}, found {}", self.n)));
        }
        let SamplingParams { logit_bias, allowed_token_ids, bad_words, stop_token_ids, .. } = &self.params;
        known("prompt", self.prompt.iter().copied(), vocab_size)?;
        known("logit_bias", logit_bias.iter().map(|(id, _)| *id), vocab_size)?;
        known("allowed_token_ids", allowed_token_ids.iter().flatten().copied(), vocab_size)?;
        known("bad_words", bad_words.iter().flatten().copied(), vocab_size)?;
        known("stop_token_ids", stop_token_ids.iter().copied(), vocab_size)
    }
}

fn known(param: &'static str, mut ids: impl Iterator<Item = u32>, vocab_size: usize) -> Result<(), InvalidParam> {
    match ids.find(|id| *id as usize >= vocab_size) {
        Some(id) => Err(InvalidParam::new(param, format!("token id {id} is beyond the vocabulary of {vocab_size}"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(params: &SamplingParams) -> &'static str {
        params.validate().unwrap_err().param
    }

    #[test]
    fn the_defaults_are_valid() {
        assert_eq!(SamplingParams::default().validate(), Ok(()));
    }

    #[test]
    fn a_number_out_of_range_is_refused_by_its_openai_name() {
        let base = SamplingParams::default;
        assert_eq!(refused(&SamplingParams { temperature: -0.1, ..base() }), "temperature");
        assert_eq!(refused(&SamplingParams { temperature: f32::NAN, ..base() }), "temperature");
        assert_eq!(refused(&SamplingParams { top_p: 0.0, ..base() }), "top_p");
        assert_eq!(refused(&SamplingParams { min_p: 1.5, ..base() }), "min_p");
        assert_eq!(refused(&SamplingParams { repetition_penalty: 0.0, ..base() }), "repetition_penalty");
        assert_eq!(refused(&SamplingParams { presence_penalty: 2.1, ..base() }), "presence_penalty");
        assert_eq!(refused(&SamplingParams { frequency_penalty: f32::INFINITY, ..base() }), "frequency_penalty");
        assert_eq!(refused(&SamplingParams { logit_bias: vec![(1, 101.0)], ..base() }), "logit_bias");
        assert_eq!(refused(&SamplingParams { allowed_token_ids: Some(vec![]), ..base() }), "allowed_token_ids");
        assert_eq!(refused(&SamplingParams { min_tokens: 17, ..base() }), "min_tokens");
        assert_eq!(refused(&SamplingParams { logprobs: Some(21), ..base() }), "logprobs");
        assert_eq!(refused(&SamplingParams { prompt_logprobs: Some(21), ..base() }), "prompt_logprobs");
    }

    #[test]
    fn a_request_must_name_tokens_that_exist() {
        let request = |prompt: Vec<u32>, params| Request { prompt, params, ..Request::default() };
        let params = SamplingParams::default;
        assert_eq!(request(vec![9], params()).validate(10, 1), Ok(()));
        assert_eq!(request(vec![], params()).validate(10, 1).unwrap_err().param, "prompt");
        assert_eq!(request(vec![10], params()).validate(10, 1).unwrap_err().param, "prompt");
        assert_eq!(request(vec![1], SamplingParams { stop_token_ids: vec![10], ..params() }).validate(10, 1).unwrap_err().param, "stop_token_ids");
        assert_eq!(request(vec![1], SamplingParams { bad_words: vec![vec![1, 10]], ..params() }).validate(10, 1).unwrap_err().param, "bad_words");
        assert_eq!(Request { n: 0, ..request(vec![1], params()) }.validate(10, 1).unwrap_err().param, "n");
    }
}

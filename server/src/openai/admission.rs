//! From a parsed request to one that runs: which model, how many tokens, and a place in the engine's queue.

use crate::app::App;
use crate::auto;
use crate::openai::errors::ApiError;
use crate::openai::fields::Fields;
use crate::openai::generation::{Generation, Submitted};
use crate::openai::sampling::AnswerOptions;
use crate::request_id::RequestId;
use crate::served::{Served, Wanted};
use evop_serving::{Request, SamplingParams, SubmitError};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Semaphore;

/// Text of a token, about.
pub const TOKEN_BYTES: usize = 4;
/// Tokenizing longer texts than this is left to a thread that may block, …
const SHORT_TEXT_BYTES: usize = 16 << 10;
/// … of which so many work at a time: the model computes beside them.
static LONG_TEXTS: Semaphore = Semaphore::const_new(1);

/// Whom a request asks.
#[derive(Debug, Clone)]
pub struct Target {
    /// The model.
    pub served: Arc<Served>,
    /// The name that it was asked by, with its form.
    name: String,
    /// Its form.
    asked: Wanted,
}

/// Who answers a request.
#[derive(Debug, Clone)]
pub struct Answerer {
    /// The model.
    pub served: Arc<Served>,
    /// The name to answer with.
    pub name: String,
    /// Its form, as the engine numbers them.
    pub member: usize,
}

impl Target {
    /// Who answers, given the request's first prompt, which came in the field `param`: `@auto` becomes the form that this prompt chooses. All prompts
    /// of a request get one form, since its answer names one model.
    ///
    /// # Errors
    /// As [`auto::vote`].
    pub async fn settle(self, app: &App, prompts: &[TokenizedPrompt], param: &'static str, arrived: Instant) -> Result<Answerer, ApiError> {
        let Self { served, name, asked } = self;
        let auto = match asked {
            Wanted::Member(member) => return Ok(Answerer { served, name, member }),
            Wanted::Auto(auto) => auto,
        };
        let prompt = prompts.first().map_or(&[][..], |prompt| &prompt.tokens);
        let member = auto::vote(app, &served, &auto, prompt, param, arrived).await?;
        let form = &served.forms[member - 1].name;
        app.metrics.auto_request(form);
        let name = format!("{}@{form}", name.rsplit_once('@').map_or(name.as_str(), |(model, _)| model));
        Ok(Answerer { served, name, member })
    }
}

/// The model that a request names, and the name that it is asked by. Without a name it is the one that is served; without a form, under pressure, a thinner
/// one of it.
///
/// # Errors
/// 400 for a name that is no string, 404 for one that is not served, 503 while there is no model or no more requests are taken.
pub fn served_model(app: &App, fields: &Fields<'_>) -> Result<Target, ApiError> {
    let name = fields.string("model")?.filter(|name| !name.is_empty());
    if app.shutdown.is_draining() {
        return Err(ApiError::unavailable("the server is shutting down"));
    }
    let Some(served) = app.slot.current() else { return Err(ApiError::unavailable("the model is still loading")) };
    let name = name.unwrap_or(&app.names()[0]);
    let Some(asked) = app.asked(&served, name) else { return Err(ApiError::model_not_found(name)) };
    let level = app.pressure.as_ref().filter(|_| matches!(asked, Wanted::Member(0))).map_or(0, |pressure| {
        let level = pressure.level(served.for_any_text().len());
        app.metrics.elastic_level(level);
        level
    });
    let (name, asked) = match served.thinner(level) {
        Some(form) => (format!("{name}@{}", form.name), served.asked(Some(&form.name)).unwrap_or(asked)),
        None => (name.to_string(), asked),
    };
    Ok(Target { served, name, asked })
}

/// Tokenizes texts of so many bytes in all, or joins tokens to such a text, without keeping other requests waiting.
///
/// # Errors
/// 400 with what the tokenizer says.
pub async fn tokenizing<T: Send + 'static>(
    bytes: usize,
    param: &'static str,
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, ApiError> {
    let result = if bytes <= SHORT_TEXT_BYTES {
        work()
    } else {
        // (it is never closed)
        let turn = LONG_TEXTS.acquire().await;
        let task = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work()
        });
        task.await.unwrap_or_else(|e| Err(e.to_string()))
    };
    result.map_err(|message| ApiError::invalid(param, format!("{param} can't be tokenized: {message}")))
}

/// Token ids of a text.
///
/// # Errors
/// As [`tokenizing`].
pub async fn encode(served: &Arc<Served>, text: String, add_special_tokens: bool, param: &'static str) -> Result<Vec<u32>, ApiError> {
    let served = Arc::clone(served);
    tokenizing(text.len(), param, move || served.encode(&text, add_special_tokens)).await
}

/// One prompt, tokenized.
#[derive(Debug)]
pub struct TokenizedPrompt {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Its text, if it is to be echoed.
    pub echo: Option<String>,
}

impl TokenizedPrompt {
    /// Keeps the last `tokens` tokens.
    pub fn truncate(&mut self, tokens: Option<usize>) {
        if let Some(excess) = tokens.and_then(|keep| self.tokens.len().checked_sub(keep)) {
            self.tokens.drain(..excess);
        }
    }
}

/// How many tokens may be made.
#[derive(Debug, Clone, Copy)]
pub struct MaxTokens {
    /// What the request says.
    pub asked: Option<usize>,
    /// If it says nothing: this many, or what is left of the context if that is less. `None` = what is left.
    pub default: Option<usize>,
    /// The field that a prompt which is too long came in.
    pub prompt_field: &'static str,
}

impl MaxTokens {
    /// The longest prompt that leaves room for the answer.
    pub fn longest_prompt(&self, limit: usize) -> usize {
        limit.saturating_sub(self.asked.or(self.default).unwrap_or(1)).max(1)
    }

    /// For a prompt of so many tokens.
    ///
    /// # Errors
    /// 400 `context_length_exceeded`.
    fn resolve(&self, prompt: usize, limit: usize) -> Result<usize, ApiError> {
        let room = limit.saturating_sub(prompt);
        let max_tokens = self.asked.unwrap_or_else(|| self.default.unwrap_or(room).min(room).max(1));
        if prompt.saturating_add(max_tokens) > limit { Err(context_too_long(prompt, max_tokens, limit, self.prompt_field)) } else { Ok(max_tokens) }
    }
}

/// Clients look for the words "maximum context length".
fn context_too_long(prompt: usize, max_tokens: usize, limit: usize, field: &'static str) -> ApiError {
    ApiError::context_length(
        field,
        format!(
            "This model's maximum context length is {limit} tokens. However, you requested {} tokens ({prompt} in the prompt, {max_tokens} for the completion). Please reduce the prompt or the completion.",
            prompt.saturating_add(max_tokens)
        ),
    )
}

/// A request, ready to be submitted.
#[derive(Debug)]
pub struct Admission<'a> {
    /// The server.
    pub app: &'a Arc<App>,
    /// The model that answers.
    pub served: Arc<Served>,
    /// Its form.
    pub member: usize,
    /// For log lines.
    pub request_id: &'a RequestId,
    /// When the request came in.
    pub arrived: Instant,
    /// How to answer.
    pub answer: &'a AnswerOptions,
    /// How to sample; `max_tokens` is still to be set.
    pub params: &'a SamplingParams,
    /// How many tokens may be made.
    pub max_tokens: MaxTokens,
}

impl Admission<'_> {
    /// Submits every prompt. If one is refused, none runs.
    ///
    /// # Errors
    /// Why the engine doesn't take it.
    pub fn submit(self, prompts: Vec<TokenizedPrompt>) -> Result<Generation, ApiError> {
        let limit = self.served.max_model_len();
        let limits = self.served.engine.config();
        let most = limits.max_queue + limits.max_concurrent;
        if prompts.len() > most {
            return Err(ApiError::invalid("prompt", format!("prompt: {} prompts are more than this server can ever take at once, {most}", prompts.len())));
        }
        let bad_words = self.answer.bad_words.iter().map(|word| self.served.spellings(word)).collect::<Result<Vec<_>, _>>();
        let bad_words = bad_words.map_err(|message| ApiError::invalid("bad_words", format!("bad_words can't be tokenized: {message}")))?.concat();
        let lengths = prompts.iter().map(|p| self.max_tokens.resolve(p.tokens.len(), limit)).collect::<Result<Vec<_>, _>>()?;
        let mut submitted = Vec::with_capacity(prompts.len());
        for (prompt, max_tokens) in prompts.into_iter().zip(lengths) {
            let params = SamplingParams { max_tokens, bad_words: bad_words.clone(), ..self.params.clone() };
            let scored = params.prompt_logprobs.is_some();
            let request = Request {
                prompt: prompt.tokens.clone(),
                params,
                member: self.member,
                n: self.answer.best_of,
                request_id: self.request_id.to_string(),
                priority: self.answer.priority,
                cache_salt: self.answer.cache_salt.clone(),
            };
            let stream = self.served.engine.submit(request).map_err(|error| self.refused(error))?;
            submitted.push((Submitted { stream, tokens: prompt.tokens, echo: prompt.echo, scored }, max_tokens));
        }
        let admitted = |(prompt, max_tokens): (Submitted, usize)| {
            self.app.metrics.admitted(prompt.tokens.len(), max_tokens, self.answer.n);
            prompt
        };
        let submitted = submitted.into_iter().map(admitted).collect();
        Ok(Generation::new(Arc::clone(self.app), self.served, submitted, self.answer, self.arrived))
    }

    fn refused(&self, error: SubmitError) -> ApiError {
        let field = self.max_tokens.prompt_field;
        match error {
            SubmitError::Invalid(invalid) if invalid.param == "prompt" => ApiError::from(invalid).at(field),
            SubmitError::Invalid(invalid) => invalid.into(),
            SubmitError::ContextTooLong { prompt, max_tokens, limit } => context_too_long(prompt, max_tokens, limit, field),
            SubmitError::TooLarge { .. } => ApiError::context_length(field, error.to_string()),
            SubmitError::QueueFull { retry_after, .. } => {
                self.app.metrics.rejected("queue_full");
                ApiError::queue_full(retry_after)
            }
            SubmitError::Draining | SubmitError::Stopped => ApiError::unavailable(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_about_max_tokens_never_exceeds_the_context() {
        let completion = |asked| MaxTokens { asked, default: Some(16), prompt_field: "prompt" };
        let chat = MaxTokens { asked: None, default: None, prompt_field: "messages" };
        assert_eq!(completion(None).resolve(10, 100).unwrap(), 16);
        assert_eq!(completion(None).resolve(95, 100).unwrap(), 5);
        assert_eq!(chat.resolve(10, 100).unwrap(), 90);
        assert!(chat.resolve(100, 100).is_err() && completion(None).resolve(101, 100).is_err());
    }

    #[test]
    fn what_was_asked_for_is_given_or_refused() {
        let asked = |n| MaxTokens { asked: Some(n), default: Some(16), prompt_field: "prompt" };
        assert_eq!(asked(90).resolve(10, 100).unwrap(), 90);
        assert_eq!(asked(0).resolve(100, 100).unwrap(), 0);
        let error = asked(91).resolve(10, 100).unwrap_err().to_json();
        assert_eq!(error["error"]["code"], "context_length_exceeded");
        assert!(asked(usize::MAX).resolve(10, 100).is_err());
    }

    #[test]
    fn a_prompt_is_cut_at_its_beginning() {
        let cut = |keep| {
            let mut prompt = TokenizedPrompt { tokens: vec![1, 2, 3], echo: None };
            prompt.truncate(keep);
            prompt.tokens
        };
        assert_eq!(cut(Some(2)), [2, 3]);
        assert_eq!(cut(Some(9)), [1, 2, 3]);
        assert_eq!(cut(None), [1, 2, 3]);
    }
}

//! `POST /v1/completions`.

use crate::app::App;
use crate::openai::JsonBody;
use crate::openai::admission::{Admission, Answerer, Target, TokenizedPrompt, served_model, tokenizing};
use crate::openai::collect::{Collected, CollectedPrompt, collect};
use crate::openai::completion_request::{CompletionRequest, Prompt};
use crate::openai::errors::{ApiError, Problems};
use crate::openai::fields::Fields;
use crate::openai::generation::{Event, Generation, Token};
use crate::openai::logprobs::{CompletionForm, prompt_form};
use crate::openai::sampling::AnswerOptions;
use crate::openai::schema;
use crate::openai::sse::{self, Chunk, ChunkWriter};
use crate::openai::types::{Answer, CompletionChoice, End, Head, Usage};
use crate::request_id::RequestId;
use crate::served::Served;
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use evop_serving::Thinking;
use std::sync::Arc;
use std::time::Instant;

/// Continues prompts.
#[utoipa::path(
    post,
    path = "/v1/completions",
    operation_id = "completions",
    tag = "Text",
    request_body = schema::CompletionRequest,
    responses((status = 200, description = "The continuations; with `stream`, pieces of them.", content((Answer<'static, CompletionChoice> = "application/json"), (Answer<'static, CompletionChoice> = "text/event-stream"))), Problems)
)]
pub async fn create(State(app): State<Arc<App>>, request_id: RequestId, JsonBody(body): JsonBody) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let (target, mut request) = parse(&app, &body)?;
    if let Some(constraint) = &request.constraint {
        request.params.grammar = Some(constraint.compile(&target.served, Thinking::Never).await?);
    }
    let prompts = tokenize(&target.served, &request).await?;
    let Answerer { served, name: model, member } = target.settle(&app, &prompts, "prompt", arrived).await?;
    let (answer, params, max_tokens) = (&request.answer, &request.params, request.max_tokens);
    let admission = Admission { app: &app, served, member, request_id: &request_id, arrived, answer, params, max_tokens };
    let count = prompts.len();
    let mut generation = admission.submit(prompts)?;
    let head = Head::new("cmpl", "text_completion", model, generation.served());
    if request.answer.stream.is_some() {
        let writer = Writer::new(head, &request, count);
        return Ok(sse::respond(generation, writer));
    }
    let (prompts, usage) = collect(&mut generation, count, &request.answer).await?;
    Ok(whole(&generation, &head, &request, prompts, usage))
}

/// Apart from the handler, because [`Fields`] must not live across an await.
fn parse(app: &App, body: &serde_json::Map<String, serde_json::Value>) -> Result<(Target, CompletionRequest), ApiError> {
    let fields = Fields::new(body);
    let target = served_model(app, &fields)?;
    let request = CompletionRequest::parse(&fields, &target.served.generation, target.served.max_model_len())?;
    Ok((target, request))
}

async fn tokenize(served: &Arc<Served>, request: &CompletionRequest) -> Result<Vec<TokenizedPrompt>, ApiError> {
    let CompletionRequest { add_special_tokens, truncate, echo, .. } = *request;
    let (served, prompts, skip_special_tokens) = (Arc::clone(served), request.prompts.clone(), request.answer.skip_special_tokens);
    let one = move |prompt: Prompt| {
        let tokens = match &prompt {
            Prompt::Text(text) => served.encode(text, add_special_tokens)?,
            Prompt::Tokens(tokens) => tokens.clone(),
        };
        let mut tokenized = TokenizedPrompt { tokens, echo: None };
        let before = tokenized.tokens.len();
        tokenized.truncate(truncate);
        if echo {
            let text = match prompt {
                Prompt::Text(text) if tokenized.tokens.len() == before => text,
                _ => served.decode(&tokenized.tokens, skip_special_tokens)?,
            };
            tokenized.echo = Some(text);
        }
        Ok(tokenized)
    };
    let bytes = prompts.iter().map(Prompt::bytes).sum();
    tokenizing(bytes, "prompt", move || prompts.into_iter().map(one).collect()).await
}

/// The whole answer at once.
fn whole(generation: &Generation, head: &Head, request: &CompletionRequest, prompts: Vec<CollectedPrompt>, usage: Usage) -> Response {
    let (served, answer) = (generation.served(), &request.answer);
    let choice = |index: usize, prompt: usize, collected: Collected| CompletionChoice {
        index,
        logprobs: request.logprobs.map(|_| form(answer).write(served, &[collected.echoed.as_slice(), &collected.tokens].concat())),
        prompt_logprobs: None,
        token_ids: answer.return_token_ids.then(|| collected.token_ids()),
        prompt_token_ids: answer.return_token_ids.then(|| generation.prompt(prompt).to_vec()),
        text: collected.text,
        end: collected.end,
    };
    let mut choices = Vec::with_capacity(prompts.len() * answer.n);
    for (prompt, collected) in prompts.into_iter().enumerate() {
        let asked = request.asked_prompt_logprobs;
        let scores = asked.map(|_| prompt_form(served, &collected.logprobs));
        for one in collected.choices {
            let index = choices.len();
            choices.push(CompletionChoice { prompt_logprobs: scores.clone(), ..choice(index, prompt, one) });
        }
    }
    Json(Answer { head, choices, usage: Some(Some(usage)), prompt_logprobs: None, prompt_token_ids: None }).into_response()
}

fn form(answer: &AnswerOptions) -> CompletionForm {
    CompletionForm::new(answer.tokens_as_ids, answer.skip_special_tokens)
}

/// The answer chunk by chunk.
struct Writer {
    head: Head,
    answer: AnswerOptions,
    logprobs: bool,
    /// Where each choice's text stands.
    forms: Vec<CompletionForm>,
    /// Tokens of each choice.
    tokens: Vec<usize>,
    /// Choices whose prompt's ids were sent.
    introduced: Vec<bool>,
}

impl Writer {
    fn new(head: Head, request: &CompletionRequest, prompts: usize) -> Self {
        let choices = prompts * request.answer.best_of;
        let answer = request.answer.clone();
        let forms = vec![form(&answer); choices];
        Self { head, answer, logprobs: request.logprobs.is_some(), forms, tokens: vec![0; choices], introduced: vec![false; choices] }
    }

    fn usage(&self, generation: &Generation) -> Usage {
        Usage::new(generation.prompt_tokens(), self.tokens.iter().sum(), generation.cached_tokens())
    }

    fn chunk(&mut self, generation: &Generation, choice: usize, text: String, tokens: &[Token], end: End, ids: Vec<u32>) -> Chunk {
        let first = !std::mem::replace(&mut self.introduced[choice], true);
        let choice = CompletionChoice {
            index: choice,
            text,
            logprobs: (self.logprobs && !tokens.is_empty()).then(|| self.forms[choice].write(generation.served(), tokens)),
            end,
            prompt_logprobs: None,
            token_ids: self.answer.return_token_ids.then_some(ids),
            prompt_token_ids: (self.answer.return_token_ids && first).then(|| generation.prompt(choice / self.answer.best_of).to_vec()),
        };
        let options = self.answer.stream.unwrap_or_default();
        let usage = options.include_usage.then(|| options.continuous_usage.then(|| self.usage(generation)));
        Chunk::data(&Answer { head: &self.head, choices: vec![choice], usage, prompt_logprobs: None, prompt_token_ids: None })
    }
}

impl ChunkWriter for Writer {
    fn begin(&mut self, _: &Generation) -> Vec<Chunk> {
        Vec::new()
    }

    fn write(&mut self, generation: &Generation, event: Event) -> Vec<Chunk> {
        let chunk = match event {
            Event::Echo { choice, text, tokens } => Some(self.chunk(generation, choice, text, &tokens, End::default(), Vec::new())),
            Event::Text { choice, text, tokens } => {
                self.tokens[choice] += tokens.len();
                let wanted = !text.is_empty() || self.logprobs || self.answer.return_token_ids;
                let ids = tokens.iter().map(|t| t.id).collect();
                wanted.then(|| self.chunk(generation, choice, text, &tokens, End::default(), ids))
            }
            Event::Finished { choice, finish, .. } => Some(self.chunk(generation, choice, String::new(), &[], finish.into(), Vec::new())),
            Event::PromptLogprobs { .. } | Event::Failed(_) => None,
        };
        chunk.into_iter().collect()
    }

    fn end(&mut self, generation: &Generation) -> Vec<Chunk> {
        let usage = Some(Some(self.usage(generation)));
        let answer: Answer<'_, CompletionChoice> = Answer { head: &self.head, choices: Vec::new(), usage, prompt_logprobs: None, prompt_token_ids: None };
        let usage = self.answer.stream.unwrap_or_default().include_usage.then(|| Chunk::data(&answer));
        usage.into_iter().chain([Chunk::done()]).collect()
    }
}

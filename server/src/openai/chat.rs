//! `POST /v1/chat/completions`.

use crate::app::App;
use crate::openai::JsonBody;
use crate::openai::admission::{Admission, Answerer, Target, TokenizedPrompt, encode, served_model};
use crate::openai::chat_output::{ASSISTANT, ChatOutput, ChatOutputOptions, message};
use crate::openai::chat_request::{ChatRequest, Conversation};
use crate::openai::collect::{Collected, CollectedPrompt, collect};
use crate::openai::errors::{ApiError, Problems};
use crate::openai::fields::Fields;
use crate::openai::generation::{Event, Generation, Token};
use crate::openai::logprobs::{chat_form, prompt_form};
use crate::openai::sampling::AnswerOptions;
use crate::openai::schema;
use crate::openai::sse::{self, Chunk, ChunkWriter};
use crate::openai::structured::Constraint;
use crate::openai::tools::CallFormat;
use crate::openai::types::{Answer, ChatChoice, ChatChunkChoice, Delta, End, Head, Usage};
use crate::request_id::RequestId;
use crate::served::Served;
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use evop_serving::{ChatRenderer, GrammarSource};
use std::sync::Arc;
use std::time::Instant;

/// Answers a conversation.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    operation_id = "chat",
    tag = "Text",
    request_body = schema::ChatCompletionRequest,
    responses((status = 200, description = "The answer; with `stream`, pieces of it.", content((Answer<'static, ChatChoice> = "application/json"), (Answer<'static, ChatChunkChoice> = "text/event-stream"))), Problems)
)]
pub async fn create(State(app): State<Arc<App>>, request_id: RequestId, JsonBody(body): JsonBody) -> Result<Response, ApiError> {
    let Chat { mut generation, request, output, model } = start(&app, &request_id, &body).await?;
    if request.answer.stream.is_some() {
        let head = Head::new("chatcmpl", "chat.completion.chunk", model, generation.served());
        let outputs = (0..request.answer.n).map(|_| ChatOutput::new(&output)).collect();
        let writer = Writer { head, logprobs: request.logprobs.is_some(), tokens: 0, answer: request.answer, outputs };
        return Ok(sse::respond(generation, writer));
    }
    let head = Head::new("chatcmpl", "chat.completion", model, generation.served());
    let (prompts, usage) = collect(&mut generation, 1, &request.answer).await?;
    Ok(whole(&generation, &head, &request, &output, prompts, usage))
}

/// A conversation that is being answered.
#[derive(Debug)]
pub struct Chat {
    /// What comes of it.
    pub generation: Generation,
    /// What was asked for.
    pub request: ChatRequest,
    /// How the text is to be read.
    pub output: ChatOutputOptions,
    /// The name to answer with.
    pub model: String,
}

/// From a body to a conversation that is being answered: the way of every API that has conversations.
///
/// # Errors
/// 400 that names the field, or why the request can't run now.
pub async fn start(app: &Arc<App>, request_id: &RequestId, body: &serde_json::Map<String, serde_json::Value>) -> Result<Chat, ApiError> {
    let arrived = Instant::now();
    let (target, mut request) = parse(app, body)?;
    let text = render(&target.served, &request.conversation)?;
    let output = prepare(&target.served, &mut request, &text).await?;
    let mut prompt = TokenizedPrompt { tokens: encode(&target.served, text, request.conversation.add_special_tokens, "messages").await?, echo: None };
    prompt.truncate(request.truncate);
    let prompts = vec![prompt];
    let Answerer { served, name: model, member } = target.settle(app, &prompts, "messages", arrived).await?;
    let (answer, params, max_tokens) = (&request.answer, &request.params, request.max_tokens);
    let admission = Admission { app, served, member, request_id, arrived, answer, params, max_tokens };
    let generation = admission.submit(prompts)?;
    Ok(Chat { generation, request, output, model })
}

/// Apart from the handler, because [`Fields`] must not live across an await.
fn parse(app: &App, body: &serde_json::Map<String, serde_json::Value>) -> Result<(Target, ChatRequest), ApiError> {
    let fields = Fields::new(body);
    let target = served_model(app, &fields)?;
    let request = ChatRequest::parse(&fields, &target.served.generation, target.served.max_model_len())?;
    Ok((target, request))
}

/// A conversation as the model reads it.
///
/// # Errors
/// 400 if there is no template, or it can't take this conversation.
pub async fn tokenize(served: &Arc<Served>, conversation: &Conversation) -> Result<Vec<u32>, ApiError> {
    let text = render(served, conversation)?;
    encode(served, text, conversation.add_special_tokens, "messages").await
}

fn template(served: &Served) -> Result<&ChatRenderer, ApiError> {
    served.chat.as_ref().map_err(|message| ApiError::invalid("messages", message.clone()))
}

fn render(served: &Served, conversation: &Conversation) -> Result<String, ApiError> {
    template(served)?.render(&conversation.input()).map_err(|e| ApiError::invalid("messages", e.to_string()))
}

/// Compiles what the output must be like, and says how it is to be read.
async fn prepare(served: &Arc<Served>, request: &mut ChatRequest, text: &str) -> Result<ChatOutputOptions, ApiError> {
    let template = template(served)?;
    let thinking = served.thinking(text);
    let tools = request.conversation.tools.as_ref();
    if tools.is_some() && !template.mentions("tools") {
        tracing::info!("the chat template ignores tools: the model doesn't know of them unless a message says so");
    }
    let constraint = match (tools, request.constraint.take()) {
        (Some(tools), _) if tools.is_forced() => Some(Constraint { source: tools.grammar(CallFormat::of(template), None), param: "tools" }),
        // an answer in this form, or calls
        (Some(tools), Some(Constraint { source: GrammarSource::Json { schema, .. }, param: param @ "response_format" })) => {
            Some(Constraint { source: tools.grammar(CallFormat::of(template), Some(&schema)), param })
        }
        (_, constraint) => constraint,
    };
    if let Some(constraint) = constraint {
        request.params.grammar = Some(constraint.compile(served, thinking).await?);
    }
    if (tools.is_some() || served.thinks) && served.marks_by_special_tokens() {
        request.answer.skip_special_tokens = false;
    }
    Ok(ChatOutputOptions::new(thinking, tools, request.include_reasoning))
}

/// The whole answer at once.
fn whole(generation: &Generation, head: &Head, request: &ChatRequest, output: &ChatOutputOptions, prompts: Vec<CollectedPrompt>, usage: Usage) -> Response {
    let (served, answer) = (generation.served(), &request.answer);
    let choice = |(index, collected): (usize, Collected)| {
        let logprobs = request.logprobs.map(|_| chat_form(served, &collected.tokens, answer.tokens_as_ids));
        let token_ids = answer.return_token_ids.then(|| collected.token_ids());
        let (message, end) = message(output, &collected.text, collected.end);
        ChatChoice { index, message, logprobs, end, token_ids }
    };
    let prompt_logprobs = request.params.prompt_logprobs.map(|_| prompt_form(served, prompts.first().map_or(&[], |p| p.logprobs.as_slice())));
    let choices = prompts.into_iter().flat_map(|prompt| prompt.choices).enumerate().map(choice).collect();
    let prompt_token_ids = answer.return_token_ids.then(|| generation.prompt(0).to_vec());
    Json(Answer { head, choices, usage: Some(Some(usage)), prompt_logprobs, prompt_token_ids }).into_response()
}

/// The answer chunk by chunk.
struct Writer {
    head: Head,
    answer: AnswerOptions,
    logprobs: bool,
    /// Made so far.
    tokens: usize,
    /// One a choice.
    outputs: Vec<ChatOutput>,
}

impl Writer {
    fn usage(&self, generation: &Generation) -> Usage {
        Usage::new(generation.prompt_tokens(), self.tokens, generation.cached_tokens())
    }

    fn answer(&self, generation: &Generation, choices: Vec<ChatChunkChoice>, prompt_token_ids: Option<Vec<u32>>) -> Chunk {
        let options = self.answer.stream.unwrap_or_default();
        let usage = options.include_usage.then(|| options.continuous_usage.then(|| self.usage(generation)));
        Chunk::data(&Answer { head: &self.head, choices, usage, prompt_logprobs: None, prompt_token_ids })
    }

    /// One chunk a delta; the tokens come with the first, which may be empty.
    fn chunks(&self, generation: &Generation, choice: usize, mut deltas: Vec<Delta>, tokens: &[Token]) -> Vec<Chunk> {
        if deltas.is_empty() && !tokens.is_empty() && (self.logprobs || self.answer.return_token_ids) {
            deltas.push(Delta { content: Some(String::new()), ..Delta::default() });
        }
        let chunk = |(i, delta)| self.chunk(generation, choice, delta, if i == 0 { tokens } else { &[] }, End::default());
        deltas.into_iter().enumerate().map(chunk).collect()
    }

    fn chunk(&self, generation: &Generation, index: usize, delta: Delta, tokens: &[Token], end: End) -> Chunk {
        let choice = ChatChunkChoice {
            index,
            delta,
            logprobs: (self.logprobs && !tokens.is_empty()).then(|| chat_form(generation.served(), tokens, self.answer.tokens_as_ids)),
            end,
            token_ids: self.answer.return_token_ids.then(|| tokens.iter().map(|t| t.id).collect()),
        };
        self.answer(generation, vec![choice], None)
    }
}

impl ChunkWriter for Writer {
    /// The role of every choice.
    fn begin(&mut self, generation: &Generation) -> Vec<Chunk> {
        let role = |index| {
            let delta = Delta { role: Some(ASSISTANT), content: Some(String::new()), ..Delta::default() };
            let token_ids = self.answer.return_token_ids.then(Vec::new);
            let choice = ChatChunkChoice { index, delta, logprobs: None, end: End::default(), token_ids };
            let ids = (self.answer.return_token_ids && index == 0).then(|| generation.prompt(0).to_vec());
            self.answer(generation, vec![choice], ids)
        };
        (0..self.answer.n).map(role).collect()
    }

    fn write(&mut self, generation: &Generation, event: Event) -> Vec<Chunk> {
        match event {
            Event::Text { choice, text, tokens } => {
                self.tokens += tokens.len();
                let deltas = self.outputs[choice].push(&text);
                self.chunks(generation, choice, deltas, &tokens)
            }
            Event::Finished { choice, finish, .. } => {
                let deltas = self.outputs[choice].finish();
                let mut chunks = self.chunks(generation, choice, deltas, &[]);
                let end = self.outputs[choice].end(finish.into());
                chunks.push(self.chunk(generation, choice, Delta::default(), &[], end));
                chunks
            }
            Event::Echo { .. } | Event::PromptLogprobs { .. } | Event::Failed(_) => Vec::new(),
        }
    }

    fn end(&mut self, generation: &Generation) -> Vec<Chunk> {
        let usage = Some(Some(self.usage(generation)));
        let answer: Answer<'_, ChatChunkChoice> = Answer { head: &self.head, choices: Vec::new(), usage, prompt_logprobs: None, prompt_token_ids: None };
        let usage = self.answer.stream.unwrap_or_default().include_usage.then(|| Chunk::data(&answer));
        usage.into_iter().chain([Chunk::done()]).collect()
    }
}

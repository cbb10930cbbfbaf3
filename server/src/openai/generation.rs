//! From the engine's tokens to text: all prompts and choices of one request as one sequence of events, which the streaming and the
//! whole answer both read.

use crate::app::App;
use crate::openai::choice::{Choice, Progress};
use crate::openai::errors::ApiError;
use crate::openai::sampling::AnswerOptions;
use crate::pressure::Wait;
use crate::rate_limit::Account;
use crate::served::Served;
use crate::traces::GenerationAttributes;
use evop_serving::{FinishReason, OutputKind, RequestStream, StepOutput, TokenLogprobs};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;
use tracing::Span;

/// A token as the answer may show it.
#[derive(Debug, Clone)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// If they were asked for; a prompt's first token has none.
    pub logprobs: Option<TokenLogprobs>,
}

/// Why a choice ended, in OpenAI's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Finish {
    /// At the model's end of sequence.
    Stop,
    /// At a stop string.
    StopString(String),
    /// At one of `stop_token_ids`.
    StopToken(u32),
    /// At `max_tokens`.
    Length,
}

/// What happens to a request's choices. A choice's number is its prompt's number times n, plus its own.
#[derive(Debug)]
pub enum Event {
    /// Log probabilities of a prompt, before anything else of it.
    PromptLogprobs {
        /// The prompt.
        prompt: usize,
        /// One entry a token, the first `None`.
        logprobs: Vec<Option<TokenLogprobs>>,
    },
    /// The prompt itself, if it was to be echoed.
    Echo {
        /// The choice.
        choice: usize,
        /// The prompt's text.
        text: String,
        /// The prompt's tokens.
        tokens: Vec<Token>,
    },
    /// More of an answer.
    Text {
        /// The choice.
        choice: usize,
        /// May be empty: a token need not be a whole character, and text may be held back for a stop string.
        text: String,
        /// The tokens that arrived.
        tokens: Vec<Token>,
    },
    /// The end of a choice.
    Finished {
        /// The choice.
        choice: usize,
        /// Why.
        finish: Finish,
        /// Tokens that it made.
        completion_tokens: usize,
    },
    /// The end of everything.
    Failed(ApiError),
}

/// One prompt, submitted.
#[derive(Debug)]
pub struct Submitted {
    /// Its outputs.
    pub stream: RequestStream,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Its text, if it is to be echoed.
    pub echo: Option<String>,
    /// `prompt_logprobs` were asked for.
    pub scored: bool,
}

/// One prompt and its choices.
struct Part {
    stream: RequestStream,
    tokens: Vec<u32>,
    echo: Option<String>,
    /// Outputs that wait for the prompt's log probabilities, `None` once those are here.
    waiting: Option<Vec<StepOutput>>,
    choices: Vec<Choice>,
    /// Tokens of the prompt that the engine had in its cache.
    cached_tokens: usize,
    ended: bool,
}

/// A request that runs. Dropping it cancels whatever has not finished.
pub struct Generation {
    app: Arc<App>,
    served: Arc<Served>,
    parts: Vec<Part>,
    choices_per_prompt: usize,
    /// The part to ask first, so that all get their turn.
    turn: usize,
    ready: VecDeque<Event>,
    arrived: Instant,
    /// The end of the request's time.
    deadline: Option<Pin<Box<tokio::time::Sleep>>>,
    /// The end of the server's patience.
    stopping: Pin<Box<dyn Future<Output = ()> + Send>>,
    failed: bool,
    /// The wait for the first token, if somebody follows it.
    wait: Option<Wait>,
    /// Who pays for the tokens, if they are counted.
    account: Option<Arc<Account>>,
    /// The request's.
    span: Span,
}

impl Generation {
    /// Begins to read what was submitted.
    pub fn new(app: Arc<App>, served: Arc<Served>, prompts: Vec<Submitted>, answer: &AnswerOptions, arrived: Instant) -> Self {
        let part = |prompt: Submitted| Part {
            choices: (0..answer.best_of).map(|_| Choice::new(&served, answer, arrived)).collect(),
            waiting: prompt.scored.then(Vec::new),
            stream: prompt.stream,
            tokens: prompt.tokens,
            echo: prompt.echo,
            cached_tokens: 0,
            ended: false,
        };
        let parts: Vec<Part> = prompts.into_iter().map(part).collect();
        let shutdown = app.shutdown.clone();
        let deadline = app.config.request_timeout().map(|limit| Box::pin(tokio::time::sleep_until((arrived + limit).into())));
        let wait = app.pressure.as_ref().map(|pressure| pressure.wait(arrived));
        let stopping = Box::pin(async move { shutdown.stopping().await });
        let mut generation = Self {
            app,
            served,
            parts,
            choices_per_prompt: answer.best_of,
            turn: 0,
            ready: VecDeque::new(),
            arrived,
            deadline,
            stopping,
            failed: false,
            wait,
            account: Account::current(),
            span: Span::current(),
        };
        if let Some(account) = &generation.account {
            account.charge(generation.prompt_tokens());
        }
        for part in 0..generation.parts.len() {
            if generation.parts[part].waiting.is_none() {
                generation.echo(part, &[]);
            }
        }
        generation
    }

    /// The model that answers.
    pub fn served(&self) -> &Arc<Served> {
        &self.served
    }

    /// Tokens of all prompts.
    pub fn prompt_tokens(&self) -> usize {
        self.parts.iter().map(|part| part.tokens.len()).sum()
    }

    /// Those of them that were in the engine's cache; known of a prompt when its first choice begins.
    pub fn cached_tokens(&self) -> usize {
        self.parts.iter().map(|part| part.cached_tokens).sum()
    }

    /// The tokens of one prompt.
    pub fn prompt(&self, prompt: usize) -> &[u32] {
        &self.parts[prompt].tokens
    }

    /// The next event; `None` when every choice has finished, or after [`Event::Failed`].
    pub async fn next(&mut self) -> Option<Event> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                self.failed |= matches!(event, Event::Failed(_));
                return Poll::Ready(Some(event));
            }
            if self.failed {
                return Poll::Ready(None);
            }
            match self.poll_parts(context) {
                Poll::Ready(Some((part, output))) => self.take(part, output),
                Poll::Ready(None) => return Poll::Ready(None),
                Poll::Pending => match self.poll_limits(context) {
                    Poll::Ready(error) => self.ready.push_back(Event::Failed(error)),
                    Poll::Pending => return Poll::Pending,
                },
            }
        }
    }

    /// An output of any part that has one; `None` when all have ended.
    fn poll_parts(&mut self, context: &mut Context<'_>) -> Poll<Option<(usize, StepOutput)>> {
        let count = self.parts.len();
        let mut all_ended = true;
        for offset in 0..count {
            let index = (self.turn + offset) % count;
            let part = &mut self.parts[index];
            // a choice that ended at a stop string need not wait for the engine to notice
            if part.ended || part.choices.iter().all(Choice::is_done) {
                continue;
            }
            match part.stream.poll_next(context) {
                Poll::Ready(Some(output)) => {
                    self.turn = index + 1;
                    return Poll::Ready(Some((index, output)));
                }
                Poll::Ready(None) => part.ended = true,
                Poll::Pending => all_ended = false,
            }
        }
        if all_ended { Poll::Ready(None) } else { Poll::Pending }
    }

    /// Waits until the request's time, or the server's patience, is over.
    pub async fn out_of_time(&mut self) -> ApiError {
        std::future::poll_fn(|context| self.poll_limits(context)).await
    }

    fn poll_limits(&mut self, context: &mut Context<'_>) -> Poll<ApiError> {
        if self.stopping.as_mut().poll(context).is_ready() {
            return Poll::Ready(ApiError::unavailable("the server is shutting down"));
        }
        if let Some(deadline) = &mut self.deadline
            && deadline.as_mut().poll(context).is_ready()
        {
            return Poll::Ready(ApiError::timeout(self.app.config.request_timeout().unwrap_or_default()));
        }
        Poll::Pending
    }

    /// Turns an output into events.
    fn take(&mut self, index: usize, output: StepOutput) {
        let part = &mut self.parts[index];
        let (choice, at) = (output.index, output.at);
        match (output.kind, &mut part.waiting) {
            (OutputKind::PromptRead { cached_tokens, queued }, _) => {
                part.choices[choice].begun(queued);
                // (the other choices find what the first one has just computed)
                if choice == 0 {
                    part.cached_tokens = cached_tokens;
                }
            }
            (OutputKind::PromptLogprobs(logprobs), _) => {
                let held = part.waiting.take().unwrap_or_default();
                self.echo(index, &logprobs);
                self.ready.push_back(Event::PromptLogprobs { prompt: index, logprobs });
                held.into_iter().for_each(|output| self.take(index, output));
            }
            (kind @ OutputKind::Finished { .. }, Some(_)) if choice == 0 => {
                // the choice that was to bring them has ended without
                let held = part.waiting.take().unwrap_or_default();
                held.into_iter().chain([StepOutput { index: choice, kind, at }]).for_each(|output| self.take(index, output));
            }
            (kind, Some(held)) => held.push(StepOutput { index: choice, kind, at }),
            (kind, None) => self.advance(index, StepOutput { index: choice, kind, at }),
        }
    }

    fn advance(&mut self, index: usize, StepOutput { index: choice_index, kind, at }: StepOutput) {
        let metrics = &self.app.metrics;
        let part = &mut self.parts[index];
        let choice = &mut part.choices[choice_index];
        let number = index * self.choices_per_prompt + choice_index;
        let progress = match kind {
            OutputKind::Token { id, logprobs, is_stop } => {
                let first_of_request = choice_index == 0;
                if let Some(wait) = self.wait.take() {
                    wait.came(at);
                }
                choice.token(Token { id, logprobs }, is_stop, at, metrics, first_of_request)
            }
            OutputKind::Finished { reason: FinishReason::Error(message), .. } => {
                choice.failed("error", metrics);
                Err(message)
            }
            OutputKind::Finished { reason: FinishReason::Cancelled, .. } => {
                choice.failed("abort", metrics);
                self.ready.push_back(Event::Failed(ApiError::unavailable("the server is shutting down")));
                return;
            }
            OutputKind::Finished { reason, .. } => choice.ended(&reason, at, metrics),
            OutputKind::PromptRead { .. } | OutputKind::PromptLogprobs(_) => return,
        };
        match progress {
            Ok(Progress { text, tokens, finish }) => {
                if !text.is_empty() || !tokens.is_empty() {
                    self.ready.push_back(Event::Text { choice: number, text, tokens });
                }
                if let Some(finish) = finish {
                    if matches!(finish, Finish::StopString(_)) {
                        part.stream.stop_choice(choice_index);
                    }
                    self.ready.push_back(Event::Finished { choice: number, finish, completion_tokens: choice.completion_tokens() });
                }
            }
            Err(message) => self.ready.push_back(Event::Failed(ApiError::internal(message))),
        }
    }

    /// The prompt before its choices, if it was asked for.
    fn echo(&mut self, index: usize, logprobs: &[Option<TokenLogprobs>]) {
        let part = &self.parts[index];
        let Some(text) = &part.echo else { return };
        let token = |(i, id): (usize, &u32)| Token { id: *id, logprobs: logprobs.get(i).cloned().flatten() };
        let tokens: Vec<Token> = part.tokens.iter().enumerate().map(token).collect();
        for choice in 0..self.choices_per_prompt {
            self.ready.push_back(Event::Echo { choice: index * self.choices_per_prompt + choice, text: text.clone(), tokens: tokens.clone() });
        }
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        for choice in self.parts.iter_mut().flat_map(|part| &mut part.choices) {
            choice.failed("abort", &self.app.metrics);
        }
        let completion_tokens = self.parts.iter().flat_map(|part| &part.choices).map(Choice::completion_tokens).sum::<usize>();
        if let Some(account) = &self.account {
            account.charge(completion_tokens);
        }
        let attributes = GenerationAttributes {
            model: &self.served.id,
            prompt_tokens: self.prompt_tokens(),
            cached_tokens: self.cached_tokens(),
            completion_tokens,
            first: self.parts.first().and_then(|part| part.choices.first()?.finished()),
        };
        attributes.record(&self.span);
        tracing::info!(
            model = %self.served.id,
            prompt_tokens = self.prompt_tokens(),
            completion_tokens,
            seconds = self.arrived.elapsed().as_secs_f32(),
            "generation ended"
        );
    }
}

impl std::fmt::Debug for Generation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Generation").field("served", &self.served.id).field("prompts", &self.parts.len()).finish_non_exhaustive()
    }
}

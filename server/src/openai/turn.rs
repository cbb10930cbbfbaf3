//! The assistant's turn for APIs whose answers are lists of items or blocks: a chat's deltas go into an [`Assembly`], which is the whole answer in the
//! end and says on the way what a stream has to tell.

use crate::openai::chat::Chat;
use crate::openai::chat_output::ChatOutput;
use crate::openai::errors::ApiError;
use crate::openai::generation::{Event, Generation};
use crate::openai::sse::{Chunk, ChunkWriter, respond as respond_in_chunks};
use crate::openai::types::{Delta, End, Usage};
use axum::Json;
use axum::response::{IntoResponse, Response, sse};
use serde::Serialize;

/// An answer that grows.
pub trait Assembly: Send + 'static {
    /// What it is in the end.
    type Answer: Serialize;

    /// All of it.
    fn into_answer(self) -> Self::Answer;

    /// What a stream tells of it, serialised.
    fn take_events(&mut self) -> Vec<Chunk>;

    /// It begins, after a prompt of so many tokens.
    fn begin(&mut self, prompt_tokens: usize);

    /// More of it.
    fn add(&mut self, delta: Delta);

    /// It is complete.
    fn end(&mut self, end: End, usage: TurnUsage);

    /// It will not be complete.
    fn fail(&mut self, error: &ApiError);

    /// What a stream says while there is nothing to say.
    fn keep_alive(&self) -> sse::Event {
        sse::Event::default().comment("keep-alive")
    }
}

/// Tokens of a turn.
#[derive(Debug, Clone, Copy)]
pub struct TurnUsage {
    /// Of prompt and answer.
    pub tokens: Usage,
    /// Of the answer's, those that were reasoning.
    pub reasoning_tokens: usize,
}

/// One turn, read from a generation.
#[derive(Debug)]
struct Turn<A> {
    assembly: A,
    output: ChatOutput,
    completion_tokens: usize,
    reasoning_tokens: usize,
    ended: End,
}

impl<A: Assembly> Turn<A> {
    /// Before its first token.
    fn new(chat: &Chat, assembly: A) -> Self {
        Self { assembly, output: ChatOutput::new(&chat.output), completion_tokens: 0, reasoning_tokens: 0, ended: End::default() }
    }

    /// Reads the generation to its end.
    ///
    /// # Errors
    /// What ended it early.
    async fn whole(mut self, generation: &mut Generation) -> Result<A, ApiError> {
        self.assembly.begin(generation.prompt_tokens());
        while let Some(event) = generation.next().await {
            match event {
                Event::Failed(error) => return Err(error),
                event => self.take(event),
            }
            // nobody listens
            drop(self.assembly.take_events());
        }
        self.complete(generation);
        Ok(self.assembly)
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Text { text, tokens, .. } => {
                let reasoned = self.output.is_reasoning();
                let deltas = self.output.push(&text);
                self.completion_tokens += tokens.len();
                if reasoned || self.output.is_reasoning() {
                    self.reasoning_tokens += tokens.len();
                }
                deltas.into_iter().for_each(|delta| self.assembly.add(delta));
            }
            Event::Finished { finish, .. } => {
                self.output.finish().into_iter().for_each(|delta| self.assembly.add(delta));
                self.ended = self.output.end(finish.into());
            }
            Event::Echo { .. } | Event::PromptLogprobs { .. } | Event::Failed(_) => {}
        }
    }

    fn complete(&mut self, generation: &Generation) {
        let tokens = Usage::new(generation.prompt_tokens(), self.completion_tokens, generation.cached_tokens());
        self.assembly.end(std::mem::take(&mut self.ended), TurnUsage { tokens, reasoning_tokens: self.reasoning_tokens });
    }
}

/// A chat's answer as this assembly makes it: whole, or streamed where that was asked for.
///
/// # Errors
/// What ended it early, if it isn't streamed.
pub async fn respond<A: Assembly>(mut chat: Chat, assembly: A) -> Result<Response, ApiError> {
    let turn = Turn::new(&chat, assembly);
    if chat.request.answer.stream.is_some() {
        return Ok(respond_in_chunks(chat.generation, turn));
    }
    Ok(Json(turn.whole(&mut chat.generation).await?.into_answer()).into_response())
}

impl<A: Assembly> ChunkWriter for Turn<A> {
    fn begin(&mut self, generation: &Generation) -> Vec<Chunk> {
        self.assembly.begin(generation.prompt_tokens());
        self.assembly.take_events()
    }

    fn write(&mut self, _: &Generation, event: Event) -> Vec<Chunk> {
        self.take(event);
        self.assembly.take_events()
    }

    fn end(&mut self, generation: &Generation) -> Vec<Chunk> {
        self.complete(generation);
        self.assembly.take_events()
    }

    fn fail(&mut self, error: &ApiError) -> Vec<Chunk> {
        self.assembly.fail(error);
        self.assembly.take_events()
    }

    fn keep_alive(&self) -> sse::Event {
        self.assembly.keep_alive()
    }
}

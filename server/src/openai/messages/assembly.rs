//! A message as it grows: blocks, and the events that tell of them.

use super::edge::detail;
use super::types::{Block, BlockDelta, Message, MessageEnd, MessageEvent, MessageUsage, StopReason};
use crate::openai::chat::Chat;
use crate::openai::chat_output::ASSISTANT;
use crate::openai::errors::ApiError;
use crate::openai::sse::Chunk;
use crate::openai::turn::{Assembly, TurnUsage};
use crate::openai::types::{self, Delta, DeltaToolCall, End};
use axum::response::sse;
use serde_json::Map;

/// A message that is being made.
#[derive(Debug)]
pub struct MessageAssembly {
    message: Message,
    /// The last block is not complete.
    open: bool,
    /// JSON text of the last block's input.
    input: String,
    /// Told, and not taken yet.
    events: Vec<MessageEvent>,
}

impl MessageAssembly {
    /// Nothing yet.
    pub fn new(chat: &Chat) -> Self {
        let message = Message {
            id: format!("msg_{}", uuid::Uuid::new_v4().simple()),
            kind: "message",
            role: ASSISTANT,
            model: chat.model.clone(),
            content: Vec::new(),
            stop_reason: None,
            stop_sequence: None,
            usage: MessageUsage { input_tokens: 0, cache_read_input_tokens: 0, cache_creation_input_tokens: 0, output_tokens: 0 },
        };
        Self { message, open: false, input: String::new(), events: Vec::new() }
    }

    /// Of the last block.
    fn index(&self) -> usize {
        self.message.content.len().saturating_sub(1)
    }

    fn begin_block(&mut self, block: Block) {
        self.end_block();
        self.message.content.push(block.clone());
        self.open = true;
        self.events.push(MessageEvent::ContentBlockStart { index: self.index(), content_block: block });
    }

    fn delta(&mut self, delta: BlockDelta) {
        self.events.push(MessageEvent::ContentBlockDelta { index: self.index(), delta });
    }

    fn think(&mut self, more: String) {
        if !(self.open && matches!(self.message.content.last(), Some(Block::Thinking { .. }))) {
            self.begin_block(Block::Thinking { thinking: String::new(), signature: String::new() });
        }
        if let Some(Block::Thinking { thinking, .. }) = self.message.content.last_mut() {
            thinking.push_str(&more);
        }
        self.delta(BlockDelta::Thinking { thinking: more });
    }

    fn say(&mut self, more: String) {
        if !(self.open && matches!(self.message.content.last(), Some(Block::Text { .. }))) {
            self.begin_block(Block::Text { text: String::new() });
        }
        if let Some(Block::Text { text }) = self.message.content.last_mut() {
            text.push_str(&more);
        }
        self.delta(BlockDelta::Text { text: more });
    }

    fn call(&mut self, call: DeltaToolCall) {
        if let (Some(id), Some(name)) = (call.id, call.function.name) {
            self.begin_block(Block::ToolUse { id, name, input: Map::new() });
        }
        let partial_json = call.function.arguments;
        if !partial_json.is_empty() {
            self.input.push_str(&partial_json);
            self.delta(BlockDelta::InputJson { partial_json });
        }
    }

    fn end_block(&mut self) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        let text = std::mem::take(&mut self.input);
        if let Some(Block::ToolUse { input, name, .. }) = self.message.content.last_mut() {
            match serde_json::from_str(&text) {
                Ok(complete) => *input = complete,
                Err(error) => tracing::info!(tool = %name, %error, "a call's input is not complete, so it is left empty"),
            }
        }
        self.events.push(MessageEvent::ContentBlockStop { index: self.index() });
    }
}

impl Assembly for MessageAssembly {
    type Answer = Message;

    fn into_answer(self) -> Message {
        self.message
    }

    fn take_events(&mut self) -> Vec<Chunk> {
        self.events.drain(..).map(|event| Chunk::named(event.name(), &event)).collect()
    }

    fn begin(&mut self, prompt_tokens: usize) {
        // what of it is cached is known when the first token comes
        self.message.usage.input_tokens = prompt_tokens;
        self.events.extend([MessageEvent::MessageStart { message: Box::new(self.message.clone()) }, MessageEvent::Ping]);
    }

    fn add(&mut self, delta: Delta) {
        if let Some(text) = delta.reasoning {
            self.think(text);
        }
        if let Some(text) = delta.content {
            self.say(text);
        }
        delta.tool_calls.into_iter().flatten().for_each(|call| self.call(call));
    }

    fn end(&mut self, end: End, usage: TurnUsage) {
        self.end_block();
        let (stop_reason, stop_sequence) = match (end.finish_reason, end.stop_reason) {
            (Some("length"), _) => (StopReason::MaxTokens, None),
            (Some("tool_calls"), _) => (StopReason::ToolUse, None),
            (_, Some(types::StopReason::Text(text))) => (StopReason::StopSequence, Some(text)),
            _ => (StopReason::EndTurn, None),
        };
        let cached = usage.tokens.prompt_tokens_details.cached_tokens;
        self.message.usage = MessageUsage {
            input_tokens: usage.tokens.prompt_tokens.saturating_sub(cached),
            cache_read_input_tokens: cached,
            cache_creation_input_tokens: 0,
            output_tokens: usage.tokens.completion_tokens,
        };
        self.message.stop_reason = Some(stop_reason);
        self.message.stop_sequence.clone_from(&stop_sequence);
        let delta = MessageEnd { stop_reason: Some(stop_reason), stop_sequence };
        self.events.extend([MessageEvent::MessageDelta { delta, usage: self.message.usage }, MessageEvent::MessageStop]);
    }

    fn fail(&mut self, error: &ApiError) {
        self.events.push(MessageEvent::Error { error: detail(error) });
    }

    fn keep_alive(&self) -> sse::Event {
        sse::Event::default().event("ping").data(r#"{"type": "ping"}"#)
    }
}

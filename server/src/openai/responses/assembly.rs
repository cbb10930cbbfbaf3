//! A response as it grows: items, and the events that tell of them.

use super::types::{
    Echo, IncompleteDetails, InputTokensDetails, Numbered, OutputItem, OutputTokensDetails, Part, Place, Response, ResponseError, ResponseEvent, ResponseUsage,
    Status,
};
use crate::openai::chat::Chat;
use crate::openai::chat_output::ASSISTANT;
use crate::openai::errors::ApiError;
use crate::openai::sse::Chunk;
use crate::openai::turn::{Assembly, TurnUsage};
use crate::openai::types::{Delta, DeltaToolCall, End, now};

/// A response that is being made.
#[derive(Debug)]
pub struct ResponseAssembly {
    response: Response,
    /// The output's last item is not complete.
    open: bool,
    sequence_number: u64,
    /// Told, and not taken yet.
    events: Vec<Numbered>,
}

/// What a text belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Voice {
    Thought,
    Said,
}

impl ResponseAssembly {
    /// Nothing yet.
    pub fn new(chat: &Chat, echo: Echo) -> Self {
        let response = Response {
            id: unique("resp"),
            object: "response",
            created_at: now(),
            completed_at: None,
            status: Status::InProgress,
            error: None,
            incomplete_details: None,
            model: chat.model.clone(),
            output: Vec::new(),
            temperature: chat.request.params.temperature,
            top_p: chat.request.params.top_p,
            echo,
            usage: None,
        };
        Self { response, open: false, sequence_number: 0, events: Vec::new() }
    }

    fn tell(&mut self, event: ResponseEvent) {
        self.events.push(Numbered { event, sequence_number: self.sequence_number });
        self.sequence_number += 1;
    }

    /// Of the last item.
    fn place(&self) -> Place {
        let item_id = self.response.output.last().map_or("", OutputItem::id).to_string();
        Place { item_id, output_index: self.response.output.len().saturating_sub(1) }
    }

    fn begin_item(&mut self, item: OutputItem) {
        self.end_item(Status::Completed);
        self.response.output.push(item.clone());
        self.open = true;
        self.tell(ResponseEvent::OutputItemAdded { output_index: self.response.output.len() - 1, item });
    }

    fn begin_text(&mut self, voice: Voice) {
        let status = Status::InProgress;
        self.begin_item(match voice {
            Voice::Thought => OutputItem::Reasoning { id: unique("rs"), summary: Vec::new(), content: Vec::new(), status },
            Voice::Said => OutputItem::Message { id: unique("msg"), role: ASSISTANT, status, content: Vec::new() },
        });
        let part = match voice {
            Voice::Thought => Part::ReasoningText { text: String::new() },
            Voice::Said => Part::OutputText { text: String::new(), annotations: Vec::new(), logprobs: Vec::new() },
        };
        if let Some(OutputItem::Reasoning { content, .. } | OutputItem::Message { content, .. }) = self.response.output.last_mut() {
            content.push(part.clone());
        }
        self.tell(ResponseEvent::ContentPartAdded { place: self.place(), content_index: 0, part });
    }

    fn text(&mut self, voice: Voice, delta: String) {
        let last = self.response.output.last().filter(|_| self.open).and_then(OutputItem::voice);
        if last != Some(voice) {
            self.begin_text(voice);
        }
        if let Some(OutputItem::Reasoning { content, .. } | OutputItem::Message { content, .. }) = self.response.output.last_mut() {
            for Part::OutputText { text, .. } | Part::ReasoningText { text } in content {
                text.push_str(&delta);
            }
        }
        let place = self.place();
        self.tell(match voice {
            Voice::Thought => ResponseEvent::ReasoningTextDelta { place, content_index: 0, delta },
            Voice::Said => ResponseEvent::OutputTextDelta { place, content_index: 0, delta, logprobs: Vec::new() },
        });
    }

    fn call(&mut self, call: DeltaToolCall) {
        let delta = call.function.arguments;
        if let (Some(call_id), Some(name)) = (call.id, call.function.name) {
            self.begin_item(OutputItem::FunctionCall { id: unique("fc"), call_id, name, arguments: String::new(), status: Status::InProgress });
        }
        let Some(OutputItem::FunctionCall { arguments, .. }) = self.response.output.last_mut() else { return };
        if !delta.is_empty() {
            arguments.push_str(&delta);
            self.tell(ResponseEvent::FunctionCallArgumentsDelta { place: self.place(), delta });
        }
    }

    /// Completes the last item, or leaves it cut short.
    fn end_item(&mut self, how: Status) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        let Some(last) = self.response.output.last_mut() else { return };
        let (OutputItem::Reasoning { status, .. } | OutputItem::Message { status, .. } | OutputItem::FunctionCall { status, .. }) = last;
        *status = how;
        let (item, place) = (last.clone(), self.place());
        match &item {
            OutputItem::Reasoning { content, .. } | OutputItem::Message { content, .. } => {
                for part in content.clone() {
                    let place = place.clone();
                    self.tell(match part.clone() {
                        Part::ReasoningText { text } => ResponseEvent::ReasoningTextDone { place, content_index: 0, text },
                        Part::OutputText { text, .. } => ResponseEvent::OutputTextDone { place, content_index: 0, text, logprobs: Vec::new() },
                    });
                    self.tell(ResponseEvent::ContentPartDone { place: self.place(), content_index: 0, part });
                }
            }
            OutputItem::FunctionCall { name, arguments, .. } => {
                self.tell(ResponseEvent::FunctionCallArgumentsDone { place, name: name.clone(), arguments: arguments.clone() });
            }
        }
        self.tell(ResponseEvent::OutputItemDone { output_index: self.response.output.len() - 1, item });
    }
}

impl OutputItem {
    fn id(&self) -> &str {
        let (Self::Reasoning { id, .. } | Self::Message { id, .. } | Self::FunctionCall { id, .. }) = self;
        id
    }

    fn voice(&self) -> Option<Voice> {
        match self {
            Self::Reasoning { .. } => Some(Voice::Thought),
            Self::Message { .. } => Some(Voice::Said),
            Self::FunctionCall { .. } => None,
        }
    }
}

impl Assembly for ResponseAssembly {
    type Answer = Response;

    fn into_answer(self) -> Response {
        self.response
    }

    fn take_events(&mut self) -> Vec<Chunk> {
        self.events.drain(..).map(|numbered| Chunk::named(numbered.event.name(), &numbered)).collect()
    }

    fn begin(&mut self, _: usize) {
        let response = Box::new(self.response.clone());
        self.tell(ResponseEvent::Created { response: response.clone() });
        self.tell(ResponseEvent::InProgress { response });
    }

    fn add(&mut self, delta: Delta) {
        if let Some(text) = delta.reasoning {
            self.text(Voice::Thought, text);
        }
        if let Some(text) = delta.content {
            self.text(Voice::Said, text);
        }
        delta.tool_calls.into_iter().flatten().for_each(|call| self.call(call));
    }

    fn end(&mut self, end: End, usage: TurnUsage) {
        if self.response.output.is_empty() {
            // it said nothing, and that is a message too
            self.begin_text(Voice::Said);
        }
        let cut = end.finish_reason == Some("length");
        let status = if cut { Status::Incomplete } else { Status::Completed };
        self.end_item(status);
        self.response.status = status;
        self.response.incomplete_details = cut.then_some(IncompleteDetails { reason: "max_output_tokens" });
        self.response.completed_at = (!cut).then(now);
        let tokens = usage.tokens;
        self.response.usage = Some(ResponseUsage {
            input_tokens: tokens.prompt_tokens,
            input_tokens_details: InputTokensDetails { cached_tokens: tokens.prompt_tokens_details.cached_tokens, cache_write_tokens: 0 },
            output_tokens: tokens.completion_tokens,
            output_tokens_details: OutputTokensDetails { reasoning_tokens: usage.reasoning_tokens },
            total_tokens: tokens.total_tokens,
        });
        let response = Box::new(self.response.clone());
        self.tell(if cut { ResponseEvent::Incomplete { response } } else { ResponseEvent::Completed { response } });
    }

    fn fail(&mut self, error: &ApiError) {
        self.response.status = Status::Failed;
        self.response.error = Some(ResponseError { code: "server_error", message: error.message().into() });
        self.tell(ResponseEvent::Failed { response: Box::new(self.response.clone()) });
    }
}

fn unique(prefix: &str) -> String {
    format!("{prefix}_{}", uuid::Uuid::new_v4().simple())
}

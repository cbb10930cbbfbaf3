//! One choice as it grows: tokens to text, stop strings, and how long it all took.

use crate::metrics::{FinishedChoice, Metrics, SinceToken, finished_reason};
use crate::openai::generation::{Finish, Token};
use crate::openai::sampling::AnswerOptions;
use crate::served::Served;
use evop_serving::{Detokenizer, FinishReason, StopMatcher, Stopped};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The state of one choice.
#[derive(Debug)]
pub struct Choice {
    detokenizer: Detokenizer,
    stop: StopMatcher,
    stops: Vec<String>,
    /// Tokens before which no stop string is looked for.
    min_tokens: usize,
    completion_tokens: usize,
    /// How it went; nothing more comes of it.
    finished: Option<FinishedChoice>,
    arrived: Instant,
    queued: Option<Duration>,
    first_token: Option<Duration>,
    last_token: Option<Instant>,
}

/// What a token, or the end, brought.
#[derive(Debug, Default)]
pub struct Progress {
    /// Text that is certain now.
    pub text: String,
    /// Tokens that are part of the answer.
    pub tokens: Vec<Token>,
    /// It has ended.
    pub finish: Option<Finish>,
}

impl Choice {
    /// Nothing yet.
    pub fn new(served: &Served, answer: &AnswerOptions, arrived: Instant) -> Self {
        Self {
            detokenizer: Detokenizer::new(Arc::clone(&served.tokenizer), answer.skip_special_tokens),
            stop: StopMatcher::new(answer.stop.clone(), answer.include_stop),
            stops: answer.stop.clone(),
            min_tokens: answer.min_tokens,
            completion_tokens: 0,
            finished: None,
            arrived,
            queued: None,
            first_token: None,
            last_token: None,
        }
    }

    /// Tokens that are part of the answer so far, the one that ended it included.
    pub fn completion_tokens(&self) -> usize {
        self.completion_tokens
    }

    /// Nothing more comes of it.
    pub fn is_done(&self) -> bool {
        self.finished.is_some()
    }

    /// How it went, if it has ended.
    pub fn finished(&self) -> Option<&FinishedChoice> {
        self.finished.as_ref()
    }

    /// Its prompt has been read, after it waited so long for a place.
    pub fn begun(&mut self, queued: Duration) {
        self.queued = Some(queued);
    }

    /// Takes a token, made at this moment. What arrives after a stop string is swallowed.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn token(&mut self, token: Token, is_stop: bool, at: Instant, metrics: &Metrics, first_of_request: bool) -> Result<Progress, String> {
        if self.is_done() {
            return Ok(Progress::default());
        }
        self.note_time(at, metrics, first_of_request);
        self.completion_tokens += 1;
        let piece = if is_stop { String::new() } else { self.detokenizer.push(token.id).map_err(|e| e.to_string())? };
        let stopped = if self.completion_tokens > self.min_tokens { self.stop.push(&piece) } else { Stopped { text: piece, matched: None } };
        let finish = stopped.matched.and_then(|i| self.stops.get(i)).map(|stop| Finish::StopString(stop.clone()));
        if finish.is_some() {
            self.finish("stop", at, metrics);
        }
        Ok(Progress { text: stopped.text, tokens: vec![token], finish })
    }

    /// The engine has ended it: whatever was still held back comes out.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn ended(&mut self, reason: &FinishReason, at: Instant, metrics: &Metrics) -> Result<Progress, String> {
        if self.is_done() {
            return Ok(Progress::default());
        }
        let rest = self.detokenizer.finish().map_err(|e| e.to_string())?;
        let stopped = self.stop.push(&rest);
        let finish = match (stopped.matched.and_then(|i| self.stops.get(i)), reason) {
            (Some(stop), _) => Finish::StopString(stop.clone()),
            (None, FinishReason::Length) => Finish::Length,
            (None, FinishReason::StopToken(id)) => Finish::StopToken(*id),
            (None, _) => Finish::Stop,
        };
        self.finish(finished_reason(reason), at, metrics);
        Ok(Progress { text: stopped.text + &self.stop.finish(), tokens: Vec::new(), finish: Some(finish) })
    }

    /// It will not end by itself any more.
    pub fn failed(&mut self, reason: &'static str, metrics: &Metrics) {
        if !self.is_done() {
            self.finish(reason, Instant::now(), metrics);
        }
    }

    fn finish(&mut self, reason: &'static str, at: Instant, metrics: &Metrics) {
        let total = at.saturating_duration_since(self.arrived);
        let finished = FinishedChoice { reason, tokens: self.completion_tokens, total, first_token: self.first_token, queued: self.queued };
        metrics.finished(&finished);
        self.finished = Some(finished);
    }

    fn note_time(&mut self, at: Instant, metrics: &Metrics, first_of_request: bool) {
        let since_arrival = at.saturating_duration_since(self.arrived);
        metrics.token(match self.last_token {
            Some(last) => SinceToken::PreviousToken(at.saturating_duration_since(last)),
            None if first_of_request => SinceToken::RequestArrived(since_arrival),
            None => SinceToken::Unknown,
        });
        self.first_token.get_or_insert(since_arrival);
        self.last_token = Some(at);
    }
}
